//! Groups that work but get nowhere, found by their steps: a process may well be alive and answer.

use super::{Millis, State, group::Group, job::TaskPhase};

/// Least time without a step after which a group is given up.
const LEAST_LIMIT: Millis = 5000;
/// How many times longer than usual a step may take.
const FACTOR: f64 = 5.0;
/// Longest first step of a group of which nothing is known: a large model on few processor cores.
const FIRST_LIMIT: Millis = 30 * 60 * 1000;
/// Weight of the newest step in the usual time.
const NEWEST: f64 = 0.3;

/// How a group gets on.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Pace {
    /// When it made a step or began to work, whichever was last.
    since: Millis,
    /// Usual time between two steps, and the pixels that were worked on.
    usual: Option<(f64, f64)>,
}

impl Pace {
    /// It begins to work.
    pub(super) fn begin(&mut self, now: Millis) {
        self.since = now;
    }

    /// It made a step with so many pixels in hand.
    pub(super) fn step(&mut self, pixels: u64, now: Millis) {
        let (took, pixels) = (now.saturating_sub(self.since) as f64, pixels as f64);
        self.usual = Some(match self.usual {
            Some((millis, usual)) => (millis + NEWEST * (took - millis), usual + NEWEST * (pixels - usual)),
            None => (took, pixels),
        });
        self.since = now;
    }

    /// How long nothing has happened, if that is too long for work on so many pixels.
    pub(super) fn stuck(&self, pixels: u64, now: Millis) -> Option<Millis> {
        let limit = match self.usual {
            // Attention grows with the square of the pixels.
            Some((millis, usual)) => {
                let larger = (pixels as f64 / usual.max(1.0)).max(1.0);
                (millis * FACTOR * larger * larger) as Millis
            }
            None => FIRST_LIMIT,
        };
        let silent = now.saturating_sub(self.since);
        (silent > limit.max(LEAST_LIMIT)).then_some(silent)
    }
}

impl State {
    /// Pixels of the jobs that a group works on.
    fn pixels(&self, group: &Group) -> u64 {
        let running = group.tasks.iter().filter_map(|(number, stage)| {
            let job = self.jobs.get(*number)?;
            let task = job.tasks.get(stage)?;
            (task.phase == TaskPhase::Running && !task.computed).then(|| job.pixels())
        });
        running.sum()
    }

    /// A task of the group began.
    pub(super) fn group_began(&mut self, group_id: &str) {
        let idle = self.groups.get(group_id).is_some_and(|group| self.pixels(group) == 0);
        if let Some(group) = self.groups.get_mut(group_id).filter(|_| idle) {
            group.pace.begin(self.now);
        }
    }

    /// A task of the group made a step.
    pub(super) fn group_stepped(&mut self, group_id: &str) {
        let Some(pixels) = self.groups.get(group_id).map(|group| self.pixels(group)) else {
            return;
        };
        if let Some(group) = self.groups.get_mut(group_id) {
            group.pace.step(pixels, self.now);
        }
    }

    /// Ends the epoch of every group that should have made a step long ago.
    pub(super) fn end_stuck_groups(&mut self) {
        let busy = self.groups.iter().filter(|(_, group)| group.is_ready() && !group.tasks.is_empty());
        let stuck: Vec<(String, Millis)> = busy
            .filter_map(|(id, group)| {
                let pixels = self.pixels(group);
                let silent = group.pace.stuck(pixels, self.now).filter(|_| pixels > 0)?;
                Some((id.clone(), silent))
            })
            .collect();
        for (id, silent) in stuck {
            if let Some(group) = self.groups.get_mut(&id) {
                group.pause(self.now, true);
            }
            self.end_epoch(&id, format!("it made no step for {:.1} s", silent as f64 / 1000.0), false);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_step_may_take_five_times_the_usual_and_more_for_larger_pictures() {
        let mut pace = Pace::default();
        pace.begin(0);
        assert_eq!(pace.stuck(100, FIRST_LIMIT), None);
        for step in 1..=10 {
            pace.step(100, step * 2000);
        }
        assert_eq!(pace.stuck(100, 30_000), None);
        assert_eq!(pace.stuck(100, 30_001), Some(10_001));
        assert_eq!(pace.stuck(200, 30_001), None, "twice the pixels, four times the time");
        assert_eq!(pace.stuck(200, 60_001), Some(40_001));
    }

    #[test]
    fn quick_groups_have_five_seconds() {
        let mut pace = Pace::default();
        pace.begin(0);
        pace.step(100, 10);
        assert_eq!((pace.stuck(100, 5010), pace.stuck(100, 5011)), (None, Some(5001)));
    }
}
