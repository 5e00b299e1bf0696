//! What the coordinator knows and what it does when something happens: `apply(now, event) -> effects`.
//!
//! A pure machine: no I/O, no clock, no randomness. Time is an argument; ids and seeds come in with events. One task
//! owns it (`runtime.rs`), so a test can play any order of failures in microseconds.
//!
//! - `group.rs`, `model.rs`, `job.rs`: what is known of one group, model, job; `groups.rs`: which groups have room
//! - `jobs.rs`, `queue.rs`, `record.rs`: all jobs, by id, by request, by age; those that wait; as they are written down
//! - `cluster.rs`: workers come and go, groups form and end; `away.rs`: a worker's stream breaks and it is back
//! - `work.rs`: jobs are accepted, started, cancelled
//! - `tasks.rs`: what leaders report, and how jobs come to their end
//! - `requeue.rs`: a job is taken off its groups and waits again; jobs that kill workers
//! - `drain.rs`: workers that want to go, urgent jobs that need a place
//! - `tenants.rs`: what each tenant may use, and what it uses
//! - `stuck.rs`, `estimate.rs`: groups that get nowhere; how long a job will take
//! - `recovery.rs`: what a new coordinator takes over from the one before
//! - `view.rs`: what can be asked; changes nothing
//! - `tally.rs`, `measure.rs`, `spans.rs`: what is counted as it happens; what Prometheus is told; what traces are told

mod away;
mod cluster;
mod drain;
mod estimate;
mod group;
mod groups;
mod job;
mod jobs;
mod measure;
mod model;
mod queue;
mod record;
mod recovery;
mod requeue;
mod spans;
mod stuck;
mod tally;
mod tasks;
mod tenants;
mod view;
mod work;

#[cfg(test)]
mod adapter_tests;
#[cfg(test)]
mod away_tests;
#[cfg(test)]
mod card_tests;
#[cfg(test)]
mod chaos;
#[cfg(test)]
mod control_tests;
#[cfg(test)]
mod durable_tests;
#[cfg(test)]
mod fair_tests;
#[cfg(test)]
mod products_tests;
#[cfg(test)]
mod room_tests;
#[cfg(test)]
mod stuck_tests;
#[cfg(test)]
mod takeover_tests;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet};

use proto::v1::{
    self, GroupRecord, Holding, JobRecord, JobSpec, Registration, control_request::Command, control_response::Report,
};

use telemetry::{Span, TraceContext};

use self::{
    estimate::Cost, groups::Groups, jobs::Jobs, model::Model, queue::Queue, recovery::Settling, tally::Tally, tenants::Tenants,
};
use crate::{config::Limits, error::Result, models_file::ModelConfig};

pub use self::{
    recovery::{SETTLE, SavedSteps},
    requeue::{MAX_LOSSES, MAX_POSTPONES},
    tenants::{DEFAULT_BURST_SECONDS, MAX_WEIGHT, Quota, TenantLimits},
    view::{EVENTS_PER_PAGE, EventPage, Viewer},
};

/// Milliseconds since 1970, on a clock that never goes back.
pub type Millis = u64;

/// Tasks of a group that does not denoise. It has room for the jobs of many denoising groups, since all tasks of a job
/// are sent at its start and most of them wait.
pub const MAX_WAITING_TASKS: usize = 256;
/// How long a cancelled job waits for its workers to say that they stopped; a step of a large model on a CPU may take
/// a minute.
pub const CANCEL_DEADLINE: Millis = 120 * 1000;
/// How long a job with its pictures waits for the reports of its earlier stages, which come on other streams.
pub const LATE_REPORT_DEADLINE: Millis = 5 * 1000;
/// First pause after a group could not be formed; it doubles with each failure.
pub const FIRST_RETRY: Millis = 1000;
/// Longest pause after a group could not be formed.
pub const LAST_RETRY: Millis = 30 * 1000;
/// Pause before a group that worked and was lost forms again: the loss of a worker is often reported by its peers
/// before its own stream ends.
pub const REFORM_PAUSE: Millis = 300;

/// What the machine is made with.
#[derive(Debug, Clone)]
pub struct Settings {
    /// The models to serve.
    pub models: Vec<ModelConfig>,
    /// What clients may ask for.
    pub limits: Limits,
    /// host:port of the blob service, for workers.
    pub blob_address: String,
    /// Every group's secret is derived from this. Random, and never leaves the process.
    pub key: Key,
    /// Most bytes of a new job's record, if the store has such a limit.
    pub max_record_bytes: Option<usize>,
    /// Grows with every coordinator that leads this cluster.
    pub term: u64,
    /// No group's first epoch is earlier. Greater in each life of the coordinator, so that epochs never come twice even where what
    /// was written down is lost with a temporary folder.
    pub first_epoch: u64,
}

/// A secret that is never shown.
#[derive(Clone)]
pub struct Key(pub [u8; 32]);

impl std::fmt::Debug for Key {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Key(..)")
    }
}

/// Something that happened.
#[derive(Debug)]
pub enum Event {
    /// A worker can be commanded.
    WorkerJoined {
        /// Who.
        worker: Registration,
        /// What it holds from before.
        holding: Holding,
    },
    /// A worker cannot be commanded for the moment: its stream broke. It joins again or leaves within seconds.
    WorkerAway {
        /// Which.
        worker_id: String,
    },
    /// A worker can no longer be commanded.
    WorkerLeft {
        /// Which.
        worker_id: String,
        /// Why, for people.
        cause: String,
    },
    /// A worker said something.
    Report {
        /// Which worker.
        worker_id: String,
        /// What.
        report: Report,
    },
    /// A client wants pictures. Answered.
    Submit(Box<Submission>),
    /// A client wants a job to stop. Answered.
    Cancel {
        /// The job.
        job_id: String,
    },
    /// What tenants may use has changed.
    Tenants(BTreeMap<String, TenantLimits>),
    /// Time has passed.
    Tick,
}

impl Event {
    /// It may let a group form or a job start. Most events are progress and may not.
    fn is_news(&self) -> bool {
        let Self::Report { report, .. } = self else {
            return true;
        };
        !matches!(
            report,
            Report::Heartbeat(_)
                | Report::GroupLoading(_)
                | Report::TaskStarted(_)
                | Report::TaskProgress(_)
                | Report::TaskComputed(_)
        )
    }
}

/// What comes with a client's request.
#[derive(Debug, Clone)]
pub struct Submission {
    /// The id the job will have.
    pub job_id: String,
    /// The client's id for its request, or one drawn for it.
    pub request_id: String,
    /// Whose job it is; empty when clients need not say who they are.
    pub tenant: String,
    /// What the client wrote.
    pub spec: JobSpec,
    /// Taken if the client names no seed.
    pub seed: u64,
    /// Fields that name a blob which is not there.
    pub missing_blobs: Vec<String>,
    /// Bytes that the blob store holds, and that uploads will take which have begun.
    pub blob_bytes: u64,
    /// As the client asked for.
    pub priority: i32,
    /// The picture is wanted within this time.
    pub timeout: Option<Millis>,
    /// The trace it is to belong to.
    pub trace: Option<TraceContext>,
}

/// Something to be done about it.
#[derive(Debug)]
pub enum Effect {
    /// Tell a worker.
    Send {
        /// Which worker.
        worker_id: String,
        /// What.
        command: Command,
    },
    /// A job must be written down as it is now, before any effect that follows is carried out.
    Persist(Box<JobRecord>),
    /// The newest epoch of a group must be written down, before any effect that follows is carried out.
    PersistGroup(GroupRecord),
    /// A job that ended long ago need not be kept any more.
    Forget {
        /// Which job.
        job_id: String,
    },
    /// What the checkpoint store has of a job is not needed any more.
    DropCheckpoints {
        /// Which job.
        job_id: String,
        /// It goes on, and what it stores from now on is needed.
        goes_on: bool,
    },
    /// The answer to the client whose event this was.
    Answer(Result<v1::Job>),
    /// A job has new events.
    JobChanged {
        /// Which job.
        job_id: String,
        /// It came to its end.
        over: bool,
    },
    /// A model can be used from now on, or no longer.
    ModelReady {
        /// Which model.
        model: String,
        /// It can be used.
        ready: bool,
    },
    /// A group came to the end of its epoch.
    GroupLost {
        /// Which group.
        group_id: String,
        /// Which epoch.
        epoch: u64,
        /// Why, for people.
        cause: String,
    },
}

/// Everything the coordinator knows.
#[derive(Debug)]
pub struct State {
    settings: Settings,
    now: Millis,
    models: Vec<Model>,
    workers: BTreeMap<String, Registration>,
    groups: Groups,
    jobs: Jobs,
    queue: Queue,
    tenants: Tenants,
    /// Workers that want to go.
    draining: BTreeSet<String>,
    /// Workers whose stream broke a moment ago.
    away: BTreeSet<String>,
    /// When something is due of a job; looked at then, whether it still is or not.
    due: BTreeSet<(Millis, u64)>,
    /// By model.
    costs: BTreeMap<String, Cost>,
    /// The newest epoch of each group when this coordinator took over.
    epochs: BTreeMap<String, u64>,
    /// While the workers of an earlier coordinator come back.
    settling: Option<Settling>,
    stale_reports: u64,
    tally: Tally,
    spans: Vec<Span>,
    effects: Vec<Effect>,
}

impl State {
    /// A cluster without workers and jobs.
    pub fn new(settings: Settings) -> Self {
        let models = settings.models.iter().cloned().map(Model::new).collect();
        Self {
            settings,
            now: 0,
            models,
            workers: BTreeMap::new(),
            groups: Groups::default(),
            jobs: Jobs::default(),
            queue: Queue::default(),
            tenants: Tenants::default(),
            draining: BTreeSet::new(),
            away: BTreeSet::new(),
            due: BTreeSet::new(),
            costs: BTreeMap::new(),
            epochs: BTreeMap::new(),
            settling: None,
            stale_reports: 0,
            tally: Tally::default(),
            spans: Vec::new(),
            effects: Vec::new(),
        }
    }

    /// Takes in what happened at `now` and says what to do, in order. An event of a client gets exactly one answer.
    pub fn apply(&mut self, now: Millis, event: Event) -> Vec<Effect> {
        self.now = self.now.max(now);
        let is_news = event.is_news();
        match event {
            Event::WorkerJoined { worker, holding } => self.worker_joined(worker, holding),
            Event::WorkerAway { worker_id } => self.worker_away(&worker_id),
            Event::WorkerLeft { worker_id, cause } => self.worker_left(&worker_id, &cause),
            Event::Report { worker_id, report } => {
                if let Some(report) = self.set_aside(&worker_id, report) {
                    self.report(&worker_id, report);
                }
            }
            Event::Submit(submission) => {
                let answer = self.submit(*submission);
                self.effects.push(Effect::Answer(answer));
            }
            Event::Cancel { job_id } => {
                let answer = self.cancel(&job_id);
                self.effects.push(Effect::Answer(answer));
            }
            Event::Tenants(limits) => self.set_tenants(limits),
            Event::Tick => {
                self.settle();
                self.end_overdue_jobs();
                self.end_stuck_groups();
            }
        }
        if is_news {
            self.describe_models();
            if self.settling.is_none() {
                self.drain_groups();
                self.groups.refresh(&self.draining, &self.away);
                self.form_groups();
                self.groups.refresh(&self.draining, &self.away);
                self.start_jobs();
            }
            self.groups.refresh(&self.draining, &self.away);
            self.announce_models();
        }
        std::mem::take(&mut self.effects)
    }

    fn report(&mut self, worker_id: &str, report: Report) {
        self.forget_if_over(worker_id, &report);
        let known = match report {
            Report::ModelDescribed(described) => self.model_described(worker_id, described),
            Report::GroupLoading(loading) => self.group_loading(worker_id, &loading),
            Report::GroupReady(ready) => self.group_ready(worker_id, &ready),
            Report::GroupLost(lost) => self.group_lost(worker_id, &lost),
            Report::TaskStarted(started) => self.task_started(worker_id, started.task.as_ref()),
            Report::TaskProgress(progress) => self.task_progress(worker_id, &progress),
            Report::TaskComputed(computed) => self.task_computed(worker_id, computed.task.as_ref()),
            Report::TaskDone(done) => self.task_done(worker_id, done),
            Report::TaskFailed(failed) => self.task_failed(worker_id, failed),
            Report::TaskParked(parked) => self.task_parked(worker_id, &parked),
            Report::Draining(_) => self.worker_draining(worker_id),
            Report::Hello(_) | Report::Heartbeat(_) | Report::Holding(_) => Some(()),
        };
        if known.is_none() {
            self.stale_reports += 1;
        }
    }

    fn model(&self, name: &str) -> Option<&Model> {
        self.models.iter().find(|model| model.config.name == name)
    }

    fn send(&mut self, worker_id: &str, command: Command) {
        // One who is away is told when it is back.
        if self.workers.contains_key(worker_id) && !self.away.contains(worker_id) {
            self.effects.push(Effect::Send { worker_id: worker_id.to_owned(), command });
        }
    }
}
