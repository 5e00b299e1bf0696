//! How long a job will take, from those that ran before: only to refuse what cannot be in time.

use super::{Millis, State, job::Job};

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

/// What a job's cost grows with.
pub(super) fn work(job: &Job) -> f64 {
    job.pixels() as f64 * f64::from(job.spec.num_inference_steps.unwrap_or(1).max(1))
}

impl State {
    /// When a job that came now would be done, if anything is known of its model.
    pub(super) fn predicted_millis(&self, model: &str, work: f64, priority: i32) -> Option<Millis> {
        let own = self.costs.get(model)?.of(work)?;
        let model = self.model(model)?;
        let groups = model.groups.iter().filter_map(|id| self.groups.get(id));
        let slots = groups.map(|group| group.limit).min().unwrap_or(1).max(1);
        let ahead = self.queue.ahead(&model.config.name, priority);
        Some((own * (1.0 + ahead as f64 / slots as f64)) as Millis)
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
