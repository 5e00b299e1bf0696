//! One job: where it stands, the tasks it has, and everything that happened to it.

use std::collections::BTreeMap;

use proto::v1::{
    ImageResult, Job as JobView, JobEvent, JobFailure, JobSpec, JobState, StageFinished, StageProgress, StageStarted, TaskRef,
    job_event::Kind,
};

use super::Millis;
use crate::plan::Plan;

/// Progress events of one stage. A stage of more steps tells only some of them.
pub(super) const MAX_PROGRESS_EVENTS: u32 = 2000;

/// A job, from acceptance until it is forgotten.
#[derive(Debug)]
pub(super) struct Job {
    /// Counts the jobs in the order they were accepted.
    pub(super) number: u64,
    pub(super) id: String,
    pub(super) request_id: String,
    /// sha256 of what the client wrote, before defaults.
    pub(super) fingerprint: [u8; 32],
    pub(super) spec: JobSpec,
    pub(super) plan: Plan,
    /// Counts from 1 with each new try.
    pub(super) attempt: u32,
    /// By stage; empty until the job is placed.
    pub(super) tasks: BTreeMap<String, Task>,
    pub(super) state: JobState,
    pub(super) failure: Option<JobFailure>,
    pub(super) images: Vec<ImageResult>,
    pub(super) finished: Option<Millis>,
    /// Set when a client asked it to stop.
    pub(super) cancelling: bool,
    /// The job ends at this time whatever its workers say.
    pub(super) deadline: Option<Millis>,
    log: Vec<Entry>,
}

/// One stage of a placed job.
#[derive(Debug)]
pub(super) struct Task {
    pub(super) group_id: String,
    pub(super) epoch: u64,
    /// The worker that is told.
    pub(super) leader: String,
    pub(super) phase: TaskPhase,
    step: u32,
    progress_events: u32,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum TaskPhase {
    /// Its leader was told; it waits for its inputs.
    Sent,
    Running,
    Ended,
}

impl Task {
    pub(super) fn new(group_id: String, epoch: u64, leader: String) -> Self {
        Self { group_id, epoch, leader, phase: TaskPhase::Sent, step: 0, progress_events: 0 }
    }
}

/// An event as it is kept: small, since there are many. [`Job::event`] makes it whole.
#[derive(Debug)]
struct Entry {
    time: Millis,
    what: What,
}

#[derive(Debug)]
enum What {
    State(JobState),
    Started { stage: usize, group_id: String },
    Progress { stage: usize, step: u32, steps: u32 },
    Finished { stage: usize, seconds: f64 },
}

/// What a new job is made of.
#[derive(Debug)]
pub(super) struct NewJob {
    pub(super) id: String,
    pub(super) request_id: String,
    pub(super) fingerprint: [u8; 32],
    pub(super) spec: JobSpec,
    pub(super) plan: Plan,
}

impl Job {
    pub(super) fn new(number: u64, new: NewJob, now: Millis) -> Self {
        let mut job = Self {
            number,
            id: new.id,
            request_id: new.request_id,
            fingerprint: new.fingerprint,
            spec: new.spec,
            plan: new.plan,
            attempt: 1,
            tasks: BTreeMap::new(),
            state: JobState::Queued,
            failure: None,
            images: Vec::new(),
            finished: None,
            cancelling: false,
            deadline: None,
            log: Vec::new(),
        };
        job.enter(JobState::Queued, now);
        job
    }

    /// Changes the state and records it.
    pub(super) fn enter(&mut self, state: JobState, now: Millis) {
        self.state = state;
        if self.is_over() {
            self.finished = Some(now);
        }
        self.log.push(Entry { time: now, what: What::State(state) });
    }

    pub(super) fn is_over(&self) -> bool {
        matches!(self.state, JobState::Succeeded | JobState::Failed | JobState::Cancelled)
    }

    pub(super) fn is_placed(&self) -> bool {
        !self.tasks.is_empty()
    }

    pub(super) fn stage_started(&mut self, stage: &str, now: Millis) {
        if self.state == JobState::Queued {
            self.enter(JobState::Running, now);
        }
        let Some(task) = self.tasks.get_mut(stage) else {
            return;
        };
        task.phase = TaskPhase::Running;
        let group_id = task.group_id.clone();
        self.record(stage, now, |stage| What::Started { stage, group_id });
    }

    /// Records a step. Steps only count up; of very many only every n-th is kept. Says whether it was recorded.
    pub(super) fn stage_progressed(&mut self, stage: &str, step: u32, steps: u32, now: Millis) -> bool {
        let Some(task) = self.tasks.get_mut(stage) else {
            return false;
        };
        let every = steps.div_ceil(MAX_PROGRESS_EVENTS).max(1);
        let kept = step == steps || step.is_multiple_of(every);
        if step <= task.step || !kept || task.progress_events >= MAX_PROGRESS_EVENTS {
            return false;
        }
        task.step = step;
        task.progress_events += 1;
        self.record(stage, now, |stage| What::Progress { stage, step, steps });
        true
    }

    pub(super) fn stage_finished(&mut self, stage: &str, seconds: f64, now: Millis) {
        self.end_task(stage);
        self.record(stage, now, |stage| What::Finished { stage, seconds });
    }

    pub(super) fn end_task(&mut self, stage: &str) {
        if let Some(task) = self.tasks.get_mut(stage) {
            task.phase = TaskPhase::Ended;
        }
    }

    /// The task is one of this job's, as it runs now.
    pub(super) fn task_ref(&self, stage: &str, task: &Task) -> TaskRef {
        TaskRef {
            job_id: self.id.clone(),
            stage: stage.to_owned(),
            attempt: self.attempt,
            group_id: task.group_id.clone(),
            epoch: task.epoch,
        }
    }

    fn record(&mut self, stage: &str, time: Millis, what: impl FnOnce(usize) -> What) {
        if let Some(stage) = self.plan.stages.iter().position(|other| other.id == stage) {
            self.log.push(Entry { time, what: what(stage) });
        }
    }

    /// The job as clients see it.
    pub(super) fn view(&self) -> JobView {
        self.view_at(self.log.len(), self.state)
    }

    /// The job as it was when it entered `state` with event number `sequence`.
    fn view_at(&self, sequence: usize, state: JobState) -> JobView {
        let over = self.is_over() && state == self.state;
        JobView {
            id: self.id.clone(),
            request_id: self.request_id.clone(),
            state: state as i32,
            spec: Some(self.spec.clone()),
            create_time: self.log.first().map(|entry| timestamp(entry.time)),
            finish_time: self.finished.filter(|_| over).map(timestamp),
            failure: self.failure.clone().filter(|_| over),
            images: if over && state == JobState::Succeeded { self.images.clone() } else { Vec::new() },
            sequence: sequence as u64,
            priority: 0,
            deadline: None,
            attempt: self.attempt,
        }
    }

    /// Sequence number of the newest event.
    pub(super) fn sequence(&self) -> u64 {
        self.log.len() as u64
    }

    /// Events after `sequence`, oldest first.
    pub(super) fn events_after(&self, sequence: u64) -> impl Iterator<Item = JobEvent> {
        let skip = usize::try_from(sequence).unwrap_or(usize::MAX);
        self.log.iter().enumerate().skip(skip).map(|(index, entry)| self.event(index + 1, entry))
    }

    fn event(&self, sequence: usize, entry: &Entry) -> JobEvent {
        let stage = |index: usize| self.plan.stages.get(index).map(|stage| stage.id.clone()).unwrap_or_default();
        let kind = match &entry.what {
            What::State(state) => Kind::StateChanged(self.view_at(sequence, *state)),
            What::Started { stage: index, group_id } => {
                Kind::StageStarted(StageStarted { stage: stage(*index), group_id: group_id.clone(), resumed_step: 0 })
            }
            What::Progress { stage: index, step, steps } => {
                Kind::StageProgress(StageProgress { stage: stage(*index), step: *step, steps: *steps })
            }
            What::Finished { stage: index, seconds } => {
                Kind::StageFinished(StageFinished { stage: stage(*index), seconds: *seconds })
            }
        };
        JobEvent { sequence: sequence as u64, time: Some(timestamp(entry.time)), kind: Some(kind) }
    }
}

fn timestamp(millis: Millis) -> prost_types::Timestamp {
    prost_types::Timestamp {
        seconds: i64::try_from(millis / 1000).unwrap_or(i64::MAX),
        nanos: (millis % 1000) as i32 * 1_000_000,
    }
}

#[cfg(test)]
mod tests {
    use proto::v1::StageKind;

    use super::*;
    use crate::plan::Stage;

    fn job() -> Job {
        let stage = Stage { id: "denoise".into(), kind: StageKind::Denoise, component: "transformer".into(), inputs: vec![] };
        let new = NewJob {
            id: "j".into(),
            request_id: "r".into(),
            fingerprint: [0; 32],
            spec: JobSpec::default(),
            plan: Plan { stages: vec![stage] },
        };
        let mut job = Job::new(1, new, 1000);
        job.tasks.insert("denoise".into(), Task::new("g".into(), 1, "w".into()));
        job
    }

    #[test]
    fn sequences_count_from_one_without_gaps() {
        let mut job = job();
        job.stage_started("denoise", 1001);
        for step in 1..=4 {
            job.stage_progressed("denoise", step, 4, 1002);
        }
        job.stage_finished("denoise", 0.5, 1003);
        job.enter(JobState::Succeeded, 1004);
        let all: Vec<u64> = job.events_after(0).map(|event| event.sequence).collect();
        assert_eq!(all, (1..=9).collect::<Vec<_>>());
        let rest: Vec<u64> = job.events_after(7).map(|event| event.sequence).collect();
        assert_eq!(rest, [8, 9]);
        assert_eq!(job.events_after(u64::MAX).count(), 0);
    }

    #[test]
    fn an_old_event_shows_the_job_as_it_was() {
        let mut job = job();
        job.stage_started("denoise", 1001);
        job.images.push(ImageResult::default());
        job.enter(JobState::Succeeded, 1004);
        let states: Vec<_> = job
            .events_after(0)
            .filter_map(|event| match event.kind {
                Some(Kind::StateChanged(job)) => Some((job.state(), job.images.len(), job.finish_time.is_some())),
                _ => None,
            })
            .collect();
        let expected = [(JobState::Queued, 0, false), (JobState::Running, 0, false), (JobState::Succeeded, 1, true)];
        assert_eq!(states, expected);
    }

    #[test]
    fn a_stage_of_very_many_steps_tells_a_bounded_number_of_them() {
        let mut job = job();
        let before = job.sequence();
        for step in 1..=10_000 {
            job.stage_progressed("denoise", step, 10_000, 1002);
        }
        assert_eq!(job.sequence() - before, u64::from(MAX_PROGRESS_EVENTS));
        assert!(!job.stage_progressed("denoise", 5, 10_000, 1003), "steps only count up");
    }
}
