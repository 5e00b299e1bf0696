//! Groups that work but get nowhere, found by their steps: a process may well be alive and answer.

use proto::v1::StageKind;

use super::{
    Millis, State,
    group::Group,
    job::{Job, Task, TaskPhase},
};

/// Least time without a step after which a group is given up.
const LEAST_LIMIT: Millis = 5000;
/// How many times longer than usual a step may take.
const FACTOR: f64 = 5.0;
/// Longest time without a step where nothing tells how long one takes, on a large model and few processor cores: a group's first
/// one, and whatever is done in one go. What a text encoder was given last says nothing of what comes next, since it may have
/// known it; the first step with an adapter reads it; and with further pictures or control networks a step is several times the work
/// of one without.
const FIRST_LIMIT: Millis = 30 * 60 * 1000;
/// Weight of the newest step in the usual time.
const NEWEST: f64 = 0.3;

/// How a group gets on.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Pace {
    /// When it was last heard of: it made a step, or began to work.
    since: Millis,
    /// Usual time of a job's step, and the pixels that were worked on.
    usual: Option<(f64, f64)>,
}

impl Pace {
    /// It begins to work.
    pub(super) fn begin(&mut self, now: Millis) {
        self.since = now;
    }

    /// A job made a step, with so many pixels in hand.
    fn step(&mut self, took: Millis, pixels: u64) {
        let (took, pixels) = (took as f64, pixels as f64);
        self.usual = Some(match self.usual {
            Some((millis, usual)) => (millis + NEWEST * (took - millis), usual + NEWEST * (pixels - usual)),
            None => (took, pixels),
        });
    }

    /// How long nothing may happen in work on so many pixels.
    fn limit(&self, pixels: u64) -> Millis {
        let limit = match self.usual {
            // Attention grows with the square of the pixels.
            Some((millis, usual)) => {
                let larger = (pixels as f64 / usual.max(1.0)).max(1.0);
                (millis * FACTOR * larger * larger) as Millis
            }
            None => FIRST_LIMIT,
        };
        limit.max(LEAST_LIMIT)
    }

    /// How long nothing has happened, if that is longer than `limit`.
    fn silent(&self, limit: Millis, now: Millis) -> Option<Millis> {
        let silent = now.saturating_sub(self.since);
        (silent > limit).then_some(silent)
    }
}

/// A task that runs, as far as its steps say how its group gets on.
struct Running<'a> {
    job: &'a Job,
    task: &'a Task,
    in_steps: bool,
}

impl Running<'_> {
    /// Nobody knows how long it may take to the next sign of it.
    fn is_unknown(&self) -> bool {
        let spec = &self.job.spec;
        let is_odd = !spec.loras.is_empty() || !spec.controls.is_empty() || !spec.more_image_blob_ids.is_empty();
        !self.in_steps || (is_odd && self.task.took.is_none())
    }
}

impl State {
    /// The tasks that run on a group.
    fn running<'a>(&'a self, group: &'a Group) -> impl Iterator<Item = Running<'a>> {
        group.tasks.iter().filter_map(|(number, stage)| {
            let job = self.jobs.get(*number)?;
            let task = job.tasks.get(stage).filter(|task| task.phase == TaskPhase::Running && !task.computed)?;
            let in_steps = job.plan.stage(stage).is_some_and(|stage| stage.kind == StageKind::Denoise);
            Some(Running { job, task, in_steps })
        })
    }

    /// A task of the group began.
    pub(super) fn group_began(&mut self, group_id: &str) {
        let Some(group) = self.groups.get(group_id) else { return };
        let idle = self.running(group).all(|running| running.task.has_made_all_steps());
        if let Some(group) = self.groups.get_mut(group_id).filter(|_| idle) {
            group.pace.begin(self.now);
        }
    }

    /// A task of the group made a step, or handed its output on, of which nothing is learnt.
    pub(super) fn group_stepped(&mut self, group_id: &str) {
        let Some(group) = self.groups.get(group_id) else { return };
        let in_steps = || self.running(group).filter(|running| running.in_steps);
        let made_now = in_steps().filter(|running| running.task.stepped_at(self.now));
        // From the job's own last step on: jobs that share a forward tell of it one right after the other.
        let took = made_now.filter_map(|running| running.task.took).max();
        let pixels = in_steps().map(|running| running.job.pixels()).sum();
        let now = self.now;
        if let Some(group) = self.groups.get_mut(group_id) {
            group.pace.begin(now);
            if let Some(took) = took {
                group.pace.step(took, pixels);
            }
        }
    }

    /// How long nothing has happened in a group, if that is too long for what it works on.
    fn stuck(&self, group: &Group) -> Option<Millis> {
        let at_work = || self.running(group).filter(|running| !running.task.has_made_all_steps());
        self.running(group).next()?;
        let known = at_work().next().is_some() && !at_work().any(|running| running.is_unknown());
        let limit = if known { group.pace.limit(at_work().map(|running| running.job.pixels()).sum()) } else { FIRST_LIMIT };
        group.pace.silent(limit, self.now)
    }

    /// Ends the epoch of every group that should have made a step long ago.
    pub(super) fn end_stuck_groups(&mut self) {
        let busy = self.groups.iter().filter(|(_, group)| group.is_ready() && !group.tasks.is_empty());
        let stuck: Vec<(String, Millis)> = busy.filter_map(|(id, group)| Some((id.clone(), self.stuck(group)?))).collect();
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

    fn stuck(pace: &Pace, pixels: u64, now: Millis) -> Option<Millis> {
        pace.silent(pace.limit(pixels), now)
    }

    #[test]
    fn a_step_may_take_five_times_the_usual_and_more_for_larger_pictures() {
        let mut pace = Pace::default();
        pace.begin(0);
        assert_eq!(stuck(&pace, 100, FIRST_LIMIT), None);
        for step in 1..=10 {
            pace.step(2000, 100);
            pace.begin(step * 2000);
        }
        assert_eq!(stuck(&pace, 100, 30_000), None);
        assert_eq!(stuck(&pace, 100, 30_001), Some(10_001));
        assert_eq!(stuck(&pace, 200, 30_001), None, "twice the pixels, four times the time");
        assert_eq!(stuck(&pace, 200, 60_001), Some(40_001));
    }

    #[test]
    fn quick_groups_have_five_seconds() {
        let mut pace = Pace::default();
        pace.step(10, 100);
        pace.begin(10);
        assert_eq!((stuck(&pace, 100, 5010), stuck(&pace, 100, 5011)), (None, Some(5001)));
    }
}
