//! A job is taken off its groups and waits again: after a loss, for a drain, or for a more urgent one. What the checkpoint
//! store has of it is kept.

use std::collections::BTreeSet;

use proto::v1::{CancelTask, JobFailure, ParkTask, TaskParked, control_request::Command};

use super::{
    Effect, Millis, State,
    job::{Saved, TaskPhase},
    tasks::End,
};

/// Workers that may be lost with a job before it got a step further: then it is the job that kills them.
pub const MAX_LOSSES: u32 = 3;

/// Times that a job may be put off before it gets a step further. Workers have tried for three minutes each time that a store
/// was away or full: two hours in all.
pub const MAX_POSTPONES: u32 = 30;
/// First pause of a job that is put off; it doubles with each.
const FIRST_POSTPONE: Millis = 1000;
/// Longest pause of a job that is put off: about as soon as an operator has made room.
const LAST_POSTPONE: Millis = 60 * 1000;

/// Why a job waits again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Why {
    /// A group it ran on came to the end of its epoch.
    GroupLost,
    /// A worker it ran on wants to go.
    Drained,
    /// A more urgent job took its place.
    Preempted,
    /// A store was away or full for long, or a worker had as much as it takes.
    Postponed,
    /// Another coordinator leads, and a worker that had it did not come back in time.
    Restarted,
}

impl Why {
    pub(super) fn reason(self) -> &'static str {
        match self {
            Self::GroupLost => "GROUP_LOST",
            Self::Drained => "DRAINED",
            Self::Preempted => "PREEMPTED",
            Self::Postponed => "POSTPONED",
            Self::Restarted => "COORDINATOR_RESTARTED",
        }
    }
}

impl State {
    /// A task went down with its group.
    pub(super) fn task_lost(&mut self, number: u64, stage: &str, message: &str) {
        let Some(job) = self.jobs.get(number).filter(|job| job.tasks.contains_key(stage)) else {
            return;
        };
        match (job.images.is_empty(), job.cancelling) {
            (false, _) => self.end_job(number, End::Succeeded),
            (true, true) => self.end_job(number, End::Cancelled),
            (true, false) => self.requeue(number, Why::GroupLost, message.to_owned()),
        }
    }

    /// Counts the loss of a worker against the jobs that ran on it; those that had their share of losses end here.
    pub(super) fn blame(&mut self, tasks: &BTreeSet<(u64, String)>, cause: &str) {
        let runs = |(number, stage): &&(u64, String)| {
            let job = self.jobs.get(*number).filter(|job| job.images.is_empty() && !job.cancelling);
            job.and_then(|job| job.tasks.get(stage)).is_some_and(|task| task.phase == TaskPhase::Running)
        };
        let running: BTreeSet<(u64, String)> = tasks.iter().filter(runs).cloned().collect();
        for (number, stage) in running {
            if let Some(job) = self.jobs.get_mut(number) {
                job.suspect = true;
            }
            self.count_loss(number, &stage, cause);
        }
    }

    /// One more try went wrong before the job got further. Says whether it may go on.
    pub(super) fn count_loss(&mut self, number: u64, stage: &str, cause: &str) -> bool {
        let Some(job) = self.jobs.get_mut(number).filter(|job| !job.is_over()) else {
            return false;
        };
        let losses = job.count_loss();
        if losses < MAX_LOSSES {
            self.persist(number);
            return true;
        }
        let message = format!("{losses} tries ended before it got a step further, the last: {cause}");
        let failure = JobFailure { reason: "TRIES_EXHAUSTED".into(), message, stage: stage.to_owned() };
        self.end_job(number, End::Failed(failure));
        false
    }

    /// The job leaves its groups at once and waits, for a while without having its turn: it would come to the same again. Nobody was
    /// lost with it.
    pub(super) fn postpone(&mut self, number: u64, stage: &str, reason: String, cause: String) {
        let Some(job) = self.jobs.get_mut(number).filter(|job| !job.is_over()) else {
            return;
        };
        job.postponed += 1;
        if job.postponed > MAX_POSTPONES {
            let message = format!("it was put off {MAX_POSTPONES} times and got no step further, the last: {cause}");
            return self.end_job(number, End::Failed(JobFailure { reason, message, stage: stage.to_owned() }));
        }
        let pause = FIRST_POSTPONE.saturating_mul(1 << (job.postponed - 1).min(16)).min(LAST_POSTPONE);
        self.requeue_until(number, Why::Postponed, cause, Some(self.now + pause));
    }

    /// The job leaves its groups at once and waits.
    pub(super) fn requeue(&mut self, number: u64, why: Why, message: String) {
        self.requeue_until(number, why, message, None);
    }

    fn requeue_until(&mut self, number: u64, why: Why, message: String, rests_until: Option<Millis>) {
        self.cancel_tasks(number);
        self.release_all(number);
        let Some(job) = self.jobs.get_mut(number).filter(|job| !job.is_over()) else {
            return;
        };
        job.wait_again(why, message, self.now);
        self.tally.requeued(&job.spec.model, why);
        job.rests_until = rests_until;
        match rests_until {
            None => self.queue.add_again(&job.spec.model, job.priority, number, &job.tenant),
            Some(until) => {
                self.queue.rest(&job.spec.model, job.priority, number, &job.tenant);
                self.due.insert((until, number));
            }
        }
        self.job_changed(number);
    }

    /// What was kept of the job is no good: it begins anew.
    pub(super) fn checkpoint_lost(&mut self, number: u64, stage: &str, message: &str) {
        if !self.count_loss(number, stage, message) {
            return;
        }
        if let Some(job) = self.jobs.get_mut(number) {
            job.saved = Saved::default();
            self.effects.push(Effect::DropCheckpoints { job_id: job.id.clone(), goes_on: true });
        }
        self.requeue(number, Why::GroupLost, message.to_owned());
        self.fail_without_components(number);
    }

    /// Of the jobs of a model that wait, fails those that need what its card has not: recorded by an earlier coordinator, whose model
    /// had more. They would wait for ever, and all others behind them.
    pub(super) fn fail_jobs_without_components(&mut self, model: &str) {
        let waiting: Vec<u64> = self.queue.of(model).collect();
        for number in waiting {
            self.fail_without_components(number);
        }
    }

    fn fail_without_components(&mut self, number: u64) {
        let Some(job) = self.jobs.get(number).filter(|job| !job.is_over() && !job.cancelling) else {
            return;
        };
        let Some(card) = self.model(&job.spec.model).and_then(|model| model.card.as_ref()) else {
            return;
        };
        let is_there = |name: &str| card.components.iter().any(|component| component.name == name);
        let Some(stage) = job.remaining().stages.into_iter().find(|stage| !is_there(&stage.component)) else {
            return;
        };
        let message = format!(
            "stage {:?} of this job needs component {:?}, which model {:?} has no longer",
            stage.id, stage.component, card.name
        );
        let failure = JobFailure { reason: "INVALID_REQUEST".into(), message, stage: stage.id };
        self.end_job(number, End::Failed(failure));
    }

    /// Asks the job's groups to let go of it at their next step. It waits again once all have.
    pub(super) fn park(&mut self, number: u64, why: Why) {
        let Some(job) = self.jobs.get_mut(number) else {
            return;
        };
        if job.is_over() || job.cancelling || job.parking.is_some() || !job.images.is_empty() || !job.is_placed() {
            return;
        }
        job.parking = Some(why);
        let unfinished = job.tasks.iter().filter(|(_, task)| task.phase != TaskPhase::Ended);
        let mut commands = Vec::new();
        for (stage, task) in unfinished {
            commands.push((task.leader.clone(), ParkTask { task: Some(job.task_ref(stage, task)) }));
        }
        for (leader, park) in commands {
            self.send(&leader, Command::ParkTask(park));
        }
        self.finish_parking(number);
    }

    pub(super) fn task_parked(&mut self, worker_id: &str, report: &TaskParked) -> Option<()> {
        let (number, stage) = self.current_task(worker_id, report.task.as_ref())?;
        self.release(number, &stage);
        let job = self.jobs.get_mut(number)?;
        job.end_task(&stage);
        job.saw_saved(&stage, report.saved_step, self.now);
        if job.parking.is_none() && !job.cancelling && job.images.is_empty() {
            self.stopped_unasked(number, &stage);
            return Some(());
        }
        self.finish_parking(number);
        self.conclude(number);
        Some(())
    }

    /// A task stopped, and nobody here had said so: the job goes on in a new try. Counted, so that a worker that stops whatever it
    /// is given comes to an end with it.
    pub(super) fn stopped_unasked(&mut self, number: u64, stage: &str) {
        let message = "a task of it stopped at the word of an earlier coordinator";
        if self.count_loss(number, stage, message) {
            self.requeue(number, Why::Restarted, message.to_owned());
        }
    }

    /// The job waits again once no group has it any more.
    pub(super) fn finish_parking(&mut self, number: u64) {
        let Some(job) = self.jobs.get(number) else {
            return;
        };
        let held = job.has_task(TaskPhase::Sent) || job.has_task(TaskPhase::Running);
        let may_go_on = job.images.is_empty() && !job.is_over() && !job.cancelling;
        if let Some(why) = job.parking.filter(|_| !held && may_go_on) {
            let message = match why {
                Why::Drained => "its worker is going".to_owned(),
                _ => "a more urgent job takes its place".to_owned(),
            };
            self.requeue(number, why, message);
        }
    }

    /// Every group has room again for what the job had there: it is placed no more.
    pub(super) fn release_all(&mut self, number: u64) {
        let Some(job) = self.jobs.get(number).filter(|job| job.is_placed()) else {
            return;
        };
        for (stage, task) in &job.tasks {
            if let Some(group) = self.groups.get_mut(&task.group_id) {
                group.release(number, stage);
            }
        }
        self.note_unplaced(number);
    }

    /// Stops what still runs of the job, wherever it is.
    pub(super) fn cancel_tasks(&mut self, number: u64) {
        let Some(job) = self.jobs.get(number) else {
            return;
        };
        let unfinished = job.tasks.iter().filter(|(_, task)| task.phase != TaskPhase::Ended);
        let commands: Vec<_> = unfinished.map(|(stage, task)| (task.leader.clone(), job.task_ref(stage, task))).collect();
        for (leader, task) in commands {
            self.send(&leader, Command::CancelTask(CancelTask { task: Some(task) }));
        }
    }
}
