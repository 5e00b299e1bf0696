//! How long a job will take, from those that ran before: only to refuse what cannot be in time.

use std::collections::BTreeMap;

use super::{Millis, State, job::Job, model::Model};

/// Weight of the newest job when it was slower than thought. A faster one counts half: an estimate that is too high
/// refuses jobs, and then nothing corrects it.
const SLOWER: f64 = 0.1;
const FASTER: f64 = 0.5;

/// A model's usual cost.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Cost {
    /// Milliseconds for one pixel and one step, on its groups.
    millis: Option<f64>,
}

impl Cost {
    /// A job of so many pixels times steps took so long.
    pub(super) fn saw(&mut self, work: f64, millis: Millis) {
        let sample = millis as f64 / work.max(1.0);
        self.millis = Some(match self.millis {
            Some(usual) if sample < usual => usual + FASTER * (sample - usual),
            Some(usual) => usual + SLOWER * (sample - usual),
            None => sample,
        });
    }

    fn of(self, work: f64) -> Option<f64> {
        self.millis.map(|millis| millis * work)
    }
}

/// What a job's cost grows with, as tenants' shares are counted: pixels times steps of all its pictures.
pub(super) fn pixel_steps(job: &Job) -> u64 {
    job.pixels().saturating_mul(u64::from(job.spec.num_inference_steps.unwrap_or(1).max(1)))
}

/// Bytes of a PNG beside its pixels: what it says of itself, a prompt in several languages among it.
const PNG_BYTES: u64 = 64 << 10;

/// About the most bytes that a job's pictures can have: PNGs of noise, three bytes a pixel and a little for each row.
pub(super) fn picture_bytes(job: &Job, most_of_one: u64) -> u64 {
    let pictures = u64::from(job.spec.num_images_per_prompt.unwrap_or(1).max(1));
    let pixels = job.drawn_pixels() / pictures;
    let one = pixels.saturating_mul(3).saturating_add(pixels / 64 + PNG_BYTES).min(most_of_one);
    one.saturating_mul(pictures)
}

/// What a job's cost grows with.
pub(super) fn work(job: &Job) -> f64 {
    job.pixels() as f64 * f64::from(job.spec.num_inference_steps.unwrap_or(1).max(1))
}

impl State {
    /// When a job that came now would be done, if anything is known of its model.
    pub(super) fn predicted_millis(&self, job: &Job) -> Option<Millis> {
        let model = self.model(&job.spec.model)?;
        let own = self.costs.get(&job.spec.model)?.of(work(job))?;
        let ahead = self.queue.ahead(&job.spec.model, job.priority, &job.tenant);
        Some((own * (1.0 + ahead as f64 / self.slots(model) as f64)) as Millis)
    }

    /// How many jobs of a model run at a time: as many as its narrowest component takes, in all its groups that are ready. Of one
    /// that has none now, all count.
    fn slots(&self, model: &Model) -> usize {
        let mut slots: BTreeMap<&str, (usize, usize)> = BTreeMap::new();
        for group in model.groups.iter().filter_map(|id| self.groups.get(id)) {
            let (ready, all) = slots.entry(&group.wanted.component).or_default();
            *ready += if self.takes_tasks(group) { group.limit } else { 0 };
            *all += group.limit;
        }
        let widths = slots.values().map(|(ready, all)| if *ready > 0 { *ready } else { *all });
        widths.min().unwrap_or(1).max(1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slow_job_moves_the_estimate_little_and_a_fast_one_much() {
        let mut cost = Cost::default();
        assert_eq!(cost.of(10.0), None);
        cost.saw(10.0, 100);
        cost.saw(10.0, 200);
        assert_eq!(cost.of(10.0).map(f64::round), Some(110.0));
        cost.saw(10.0, 10);
        assert_eq!(cost.of(10.0).map(f64::round), Some(60.0));
    }
}
