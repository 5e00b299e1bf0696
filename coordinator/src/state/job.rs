//! One job: where it stands, the tasks it has, and everything that happened to it.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use proto::v1::{
    ImageResult, Job as JobView, JobEvent, JobFailure, JobRequeued, JobSpec, JobState, Products, StageFinished, StageProgress,
    StageStarted, TaskRef, job_event::Kind,
};

use telemetry::TraceContext;

use super::{Millis, requeue::Why};
use crate::{
    plan::Plan,
    request::{OPEN_SIDE, brought},
};

/// Progress events of a job. One of more steps tells only some of them.
pub(super) const MAX_PROGRESS_EVENTS: u32 = 2000;
/// Where the sequence numbers of a coordinator's life begin, in a job that it did not accept itself: above all that
/// earlier lives can have told.
const SEQUENCES_PER_TERM: u64 = 1 << 20;

/// A job, from acceptance until it is forgotten.
#[derive(Debug)]
pub(super) struct Job {
    /// Counts the jobs in the order they were accepted.
    pub(super) number: u64,
    pub(super) id: String,
    pub(super) request_id: String,
    /// Whose it is.
    pub(super) tenant: Arc<str>,
    /// sha256 of what the client asked for, before defaults.
    pub(super) fingerprint: [u8; 32],
    pub(super) spec: JobSpec,
    /// What its pictures are multiplied in.
    pub(super) products: Products,
    /// What each picture that it brings costs for each that is drawn.
    pub(super) pixels_per_image: u64,
    /// Shared by all jobs with the same stages.
    pub(super) plan: Arc<Plan>,
    pub(super) priority: i32,
    /// The client's: it is ended then.
    pub(super) deadline: Option<Millis>,
    /// The trace it belongs to, and the client's span in it.
    pub(super) trace: Option<TraceContext>,
    /// Counts from 1 with each new try.
    pub(super) attempt: u32,
    /// By stage; empty until the job is placed.
    pub(super) tasks: BTreeMap<String, Task>,
    /// What the checkpoint store has of it.
    pub(super) saved: Saved,
    /// Every worker that was ever told of it: all of them are told when it is over.
    pub(super) told: BTreeSet<String>,
    /// When it began to wait last.
    pub(super) queued: Millis,
    /// When it was placed last.
    pub(super) placed: Millis,
    /// When the checkpoint store had last got more of it.
    pub(super) saved_at: Millis,
    pub(super) state: JobState,
    /// Boxed: most jobs wait, or end well.
    pub(super) failure: Option<Box<JobFailure>>,
    pub(super) images: Vec<ImageResult>,
    /// Its pictures had to make room for others': they may be gone.
    pub(super) pictures_dropped: bool,
    pub(super) finished: Option<Millis>,
    /// Set when a client asked it to stop.
    pub(super) cancelling: bool,
    /// Set when it is being taken off its groups at the next step.
    pub(super) parking: Option<Why>,
    /// The job ends at this time whatever its workers say.
    pub(super) overdue: Option<Millis>,
    /// Workers lost since it got further last.
    pub(super) losses: u32,
    /// Times that it was put off since it got further last.
    pub(super) postponed: u32,
    /// It waits, and has no turn before this.
    pub(super) rests_until: Option<Millis>,
    /// Runs alone in its groups until it gets further: a worker died with it and others.
    pub(super) suspect: bool,
    /// How far it ever was, and at the last loss: (stage, step).
    furthest: (usize, u32),
    furthest_at_loss: (usize, u32),
    progress_events: u32,
    next_sequence: u64,
    log: Vec<Entry>,
}

/// What the checkpoint store has of a job.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Saved {
    /// Stages whose output is there.
    pub(super) outputs: BTreeSet<String>,
    /// The newest step of a denoising stage that is there.
    pub(super) steps: BTreeMap<String, u32>,
    /// There is more, which was multiplied in another way and is no good.
    pub(super) of_another_way: bool,
}

impl Saved {
    /// The store has nothing at all of the job.
    pub(super) fn is_nothing(&self) -> bool {
        *self == Self::default()
    }
}

/// One stage of a placed job.
#[derive(Debug)]
pub(super) struct Task {
    pub(super) group_id: String,
    pub(super) epoch: u64,
    /// The worker that is told.
    pub(super) leader: String,
    pub(super) phase: TaskPhase,
    /// Steps that an earlier try had done.
    pub(super) resumed_step: u32,
    /// It runs, and its group has nothing left to do for it: what it waits for is a store, or another worker.
    pub(super) computed: bool,
    step: u32,
    /// In all; 0 until its leader has told.
    steps: u32,
    /// When it began or made its last step, if that is known.
    stepped: Option<Millis>,
    /// How long its last step took.
    pub(super) took: Option<Millis>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum TaskPhase {
    /// Its leader was told; it waits for its inputs.
    Sent,
    Running,
    Ended,
}

impl Task {
    pub(super) fn new(group_id: String, epoch: u64, leader: String, resumed_step: u32) -> Self {
        let phase = TaskPhase::Sent;
        Self {
            group_id,
            epoch,
            leader,
            phase,
            resumed_step,
            computed: false,
            step: resumed_step,
            steps: 0,
            stepped: None,
            took: None,
        }
    }

    /// It was worked on, and has no step left: its output is handed on.
    pub(super) fn has_made_all_steps(&self) -> bool {
        self.steps > 0 && self.step >= self.steps
    }

    /// Whether this is when its last step was made.
    pub(super) fn stepped_at(&self, now: Millis) -> bool {
        self.stepped == Some(now) && self.took.is_some()
    }
}

/// An event as it is kept: small, since there are many. [`Job::event`] makes it whole.
#[derive(Debug)]
struct Entry {
    sequence: u64,
    time: Millis,
    what: What,
}

#[derive(Debug)]
enum What {
    State(JobState),
    Started { stage: usize, group_id: String, resumed_step: u32 },
    Progress { stage: usize, step: u32, steps: u32 },
    Finished { stage: usize, seconds: f64 },
    Requeued { why: Why, message: String, attempt: u32 },
}

/// What a new job is made of.
#[derive(Debug)]
pub(super) struct NewJob {
    pub(super) id: String,
    pub(super) request_id: String,
    pub(super) tenant: Arc<str>,
    pub(super) fingerprint: [u8; 32],
    pub(super) spec: JobSpec,
    pub(super) products: Products,
    pub(super) pixels_per_image: u64,
    /// Shared by all jobs with the same stages.
    pub(super) plan: Arc<Plan>,
    pub(super) priority: i32,
    pub(super) deadline: Option<Millis>,
    pub(super) trace: Option<TraceContext>,
}

impl Job {
    pub(super) fn new(number: u64, new: NewJob, now: Millis) -> Self {
        let mut job = Self {
            number,
            id: new.id,
            request_id: new.request_id,
            tenant: new.tenant,
            fingerprint: new.fingerprint,
            spec: new.spec,
            products: new.products,
            pixels_per_image: new.pixels_per_image,
            plan: new.plan,
            priority: new.priority,
            deadline: new.deadline,
            trace: new.trace,
            attempt: 1,
            tasks: BTreeMap::new(),
            saved: Saved::default(),
            told: BTreeSet::new(),
            queued: now,
            placed: now,
            saved_at: now,
            state: JobState::Queued,
            failure: None,
            images: Vec::new(),
            pictures_dropped: false,
            finished: None,
            cancelling: false,
            parking: None,
            overdue: None,
            losses: 0,
            postponed: 0,
            rests_until: None,
            suspect: false,
            furthest: (0, 0),
            furthest_at_loss: (0, 0),
            progress_events: 0,
            next_sequence: 1,
            // Most jobs wait, and nothing has happened to them yet.
            log: Vec::with_capacity(1),
        };
        job.enter(JobState::Queued, now);
        job
    }

    /// Changes the state and records it.
    pub(super) fn enter(&mut self, state: JobState, now: Millis) {
        self.state = state;
        if state == JobState::Queued {
            self.queued = now;
        }
        if self.is_over() {
            self.finished = Some(now);
        }
        self.push(now, What::State(state));
    }

    pub(super) fn is_over(&self) -> bool {
        matches!(self.state, JobState::Succeeded | JobState::Failed | JobState::Cancelled)
    }

    pub(super) fn is_placed(&self) -> bool {
        !self.tasks.is_empty()
    }

    pub(super) fn has_task(&self, phase: TaskPhase) -> bool {
        self.tasks.values().any(|task| task.phase == phase)
    }

    /// What its work is about proportional to: the pixels that are drawn, and what the pictures that it brings cost beside them.
    pub(super) fn pixels(&self) -> u64 {
        let drawn = u64::from(self.spec.num_images_per_prompt.unwrap_or(1).max(1));
        let brought = brought(&self.spec).saturating_mul(self.pixels_per_image);
        self.drawn_pixels().saturating_add(brought.saturating_mul(drawn))
    }

    /// Pixels of the pictures that it draws.
    pub(super) fn drawn_pixels(&self) -> u64 {
        let spec = &self.spec;
        let count = |given: Option<u32>, otherwise: u32| u64::from(given.unwrap_or(otherwise).max(1));
        count(spec.width, OPEN_SIDE) * count(spec.height, OPEN_SIDE) * count(spec.num_images_per_prompt, 1)
    }

    /// Bytes of its pictures.
    pub(super) fn result_bytes(&self) -> u64 {
        self.images.iter().map(|image| image.byte_size).fold(0, u64::saturating_add)
    }

    pub(super) fn stage_started(&mut self, stage: &str, now: Millis) {
        if self.state == JobState::Queued {
            self.enter(JobState::Running, now);
        }
        let Some(task) = self.tasks.get_mut(stage) else {
            return;
        };
        task.phase = TaskPhase::Running;
        task.stepped = Some(now);
        let (group_id, resumed_step) = (task.group_id.clone(), task.resumed_step);
        self.note(stage, now, |stage| What::Started { stage, group_id, resumed_step });
    }

    /// Records a step. Steps only count up; of very many only every n-th is kept. Says whether it was recorded.
    pub(super) fn stage_progressed(&mut self, stage: &str, step: u32, steps: u32, now: Millis) -> bool {
        let Some(task) = self.tasks.get_mut(stage) else {
            return false;
        };
        if step <= task.step {
            return false;
        }
        (task.step, task.steps) = (step, steps);
        task.took = task.stepped.replace(now).map(|before| now.saturating_sub(before));
        self.got_to(stage, step);
        let every = steps.div_ceil(MAX_PROGRESS_EVENTS).max(1);
        let kept = step == steps || step.is_multiple_of(every);
        if !kept || self.progress_events >= MAX_PROGRESS_EVENTS {
            return false;
        }
        self.progress_events += 1;
        self.note(stage, now, |stage| What::Progress { stage, step, steps });
        true
    }

    pub(super) fn stage_finished(&mut self, stage: &str, seconds: f64, now: Millis) {
        self.end_task(stage);
        self.got_to(stage, u32::MAX);
        self.note(stage, now, |stage| What::Finished { stage, seconds });
    }

    pub(super) fn end_task(&mut self, stage: &str) {
        if let Some(task) = self.tasks.get_mut(stage) {
            task.phase = TaskPhase::Ended;
        }
    }

    /// What is left to do, given what is saved.
    pub(super) fn remaining(&self) -> Plan {
        self.plan.without(&self.saved.outputs)
    }

    /// The checkpoint store has this step of a stage.
    pub(super) fn saw_saved(&mut self, stage: &str, step: u32, now: Millis) {
        if step > 0 && self.plan.stage(stage).is_some() {
            let newest = self.saved.steps.entry(stage.to_owned()).or_default();
            if step > *newest {
                *newest = step;
                self.saved_at = now;
            }
        }
    }

    /// A worker was lost with it. Says how many were since it got further last.
    pub(super) fn count_loss(&mut self) -> u32 {
        self.losses = if self.furthest > self.furthest_at_loss { 1 } else { self.losses + 1 };
        self.furthest_at_loss = self.furthest;
        self.losses
    }

    /// It waits for its groups again, under the next attempt.
    pub(super) fn wait_again(&mut self, why: Why, message: String, now: Millis) {
        self.tasks.clear();
        self.parking = None;
        self.overdue = None;
        self.attempt += 1;
        self.push(now, What::Requeued { why, message, attempt: self.attempt });
        self.enter(JobState::Queued, now);
    }

    /// From now on events are numbered above all that coordinators before `term` can have told.
    pub(super) fn number_from_term(&mut self, term: u64) {
        self.next_sequence = self.next_sequence.max(term.saturating_mul(SEQUENCES_PER_TERM));
    }

    /// The next event has this number.
    pub(super) fn number_from(&mut self, sequence: u64) {
        self.next_sequence = sequence;
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

    fn got_to(&mut self, stage: &str, step: u32) {
        let index = self.plan.stages.iter().position(|other| other.id == stage).unwrap_or_default();
        if (index, step) > self.furthest {
            self.furthest = (index, step);
            self.suspect = false;
            self.postponed = 0;
        }
    }

    fn note(&mut self, stage: &str, time: Millis, what: impl FnOnce(usize) -> What) {
        if let Some(stage) = self.plan.stages.iter().position(|other| other.id == stage) {
            self.push(time, what(stage));
        }
    }

    fn push(&mut self, time: Millis, what: What) {
        self.log.push(Entry { sequence: self.next_sequence, time, what });
        self.next_sequence += 1;
    }

    /// When it was accepted.
    pub(super) fn created(&self) -> Millis {
        self.log.first().map_or(0, |entry| entry.time)
    }

    /// The job as clients see it.
    pub(super) fn view(&self) -> JobView {
        self.view_at(self.sequence(), self.state)
    }

    /// The job as it was when it entered `state` with event number `sequence`.
    fn view_at(&self, sequence: u64, state: JobState) -> JobView {
        let over = self.is_over() && state == self.state;
        JobView {
            id: self.id.clone(),
            request_id: self.request_id.clone(),
            state: state as i32,
            spec: Some(self.spec.clone()),
            create_time: self.log.first().map(|entry| timestamp(entry.time)),
            finish_time: self.finished.filter(|_| over).map(timestamp),
            failure: self.failure.as_deref().filter(|_| over).cloned(),
            images: if over && state == JobState::Succeeded { self.images.clone() } else { Vec::new() },
            sequence,
            priority: self.priority,
            deadline: self.deadline.map(timestamp),
            attempt: self.attempt,
            trace_id: self.trace.map(|trace| trace.id()).unwrap_or_default(),
            products: self.products as i32,
            pictures_dropped: over && self.pictures_dropped,
            tenant: self.tenant.to_string(),
        }
    }

    /// The trace, and the span in it that is the job's own.
    pub(super) fn span(&self) -> Option<TraceContext> {
        self.trace.map(|trace| trace.under(&["job", &self.id]))
    }

    /// Above all sequence numbers that were ever told, and below those to come: who watches after it is told what is new.
    pub(super) fn sequence(&self) -> u64 {
        self.next_sequence - 1
    }

    /// Events after `sequence`, oldest first.
    pub(super) fn events_after(&self, sequence: u64) -> impl Iterator<Item = JobEvent> {
        let from = self.log.partition_point(|entry| entry.sequence <= sequence);
        self.log.iter().skip(from).map(|entry| self.event(entry))
    }

    fn event(&self, entry: &Entry) -> JobEvent {
        let stage = |index: usize| self.plan.stages.get(index).map(|stage| stage.id.clone()).unwrap_or_default();
        let kind = match &entry.what {
            What::State(state) => Kind::StateChanged(self.view_at(entry.sequence, *state)),
            What::Started { stage: index, group_id, resumed_step } => {
                let (group_id, resumed_step) = (group_id.clone(), *resumed_step);
                Kind::StageStarted(StageStarted { stage: stage(*index), group_id, resumed_step })
            }
            What::Progress { stage: index, step, steps } => {
                Kind::StageProgress(StageProgress { stage: stage(*index), step: *step, steps: *steps })
            }
            What::Finished { stage: index, seconds } => {
                Kind::StageFinished(StageFinished { stage: stage(*index), seconds: *seconds })
            }
            What::Requeued { why, message, attempt } => {
                let (reason, message) = (why.reason().to_owned(), message.clone());
                Kind::Requeued(JobRequeued { reason, message, attempt: *attempt })
            }
        };
        JobEvent { sequence: entry.sequence, time: Some(timestamp(entry.time)), kind: Some(kind) }
    }
}

pub(super) fn timestamp(millis: Millis) -> prost_types::Timestamp {
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
        let stage = Stage {
            id: "denoise".into(),
            kind: StageKind::Denoise,
            component: "transformer".into(),
            inputs: vec![],
            with_pictures: false,
            with_controls: false,
        };
        let new = NewJob {
            id: "j".into(),
            request_id: "r".into(),
            tenant: "".into(),
            fingerprint: [0; 32],
            spec: JobSpec::default(),
            products: Products::F32,
            pixels_per_image: 0,
            plan: Arc::new(Plan { stages: vec![stage] }),
            priority: 0,
            deadline: None,
            trace: None,
        };
        let mut job = Job::new(1, new, 1000);
        job.tasks.insert("denoise".into(), Task::new("g".into(), 1, "w".into(), 0));
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
