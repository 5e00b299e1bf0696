//! The tasks this worker leads: taken on, cancelled, parked, forgotten, and told of when a new coordinator comes.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use proto::v1::control_response::Report;
use proto::v1::{HeldTask, RunTask, TaskDone, TaskParked, TaskRef};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::failure::Failure;
use crate::groups::MAX_TASKS;
use crate::inbox::TaskId;
use crate::outbox::Reports;
use crate::rank::Progress;
use crate::spans::StageSpan;
use crate::task::{Ending, Means, Task};

/// The tasks this worker leads.
pub(crate) struct Tasks {
    means: Arc<Means>,
    reports: Reports,
    running: Mutex<HashMap<TaskId, Arc<Ticket>>>,
    /// Every task until its end has been told.
    tracker: TaskTracker,
}

/// What is asked of a task, and how far it is.
#[derive(Debug, Default)]
pub(crate) struct Ticket {
    /// Cancelled when it is to stop.
    pub(crate) cancel: CancellationToken,
    /// Cancelled when it is to stop and keep what was done of it.
    pub(crate) park: CancellationToken,
    /// Nobody wants to know how it ends.
    pub(crate) forgotten: AtomicBool,
    /// The newest step whose state is stored.
    pub(crate) saved: Arc<AtomicU32>,
    /// As it was told last.
    pub(crate) progress: Mutex<Progress>,
}

impl Tasks {
    pub(crate) fn new(means: Means, reports: Reports) -> Arc<Self> {
        let tracker = TaskTracker::new();
        tracker.close();
        Arc::new(Self { means: Arc::new(means), reports, running: Mutex::default(), tracker })
    }

    /// Takes a task on; what becomes of it is reported.
    pub(crate) async fn run(self: &Arc<Self>, run: RunTask) {
        let id = TaskId::from(run.task.clone().unwrap_or_default());
        if let Some(end) = self.reports.end_of(&id) {
            // A coordinator that does not know yet: it is told again, not done again.
            return self.reports.send(end).await;
        }
        let ticket = Arc::new(Ticket::default());
        ticket.saved.store(run.resume_step, Ordering::SeqCst);
        match self.admit(&id, &ticket) {
            Ok(true) => {}
            Ok(false) => return tracing::warn!(job.id = id.job_id, stage = id.stage, "told to run a task twice"),
            Err(failure) => {
                let report = failure.report(id.clone().into());
                return self.reports.end(id, report, &ticket.forgotten).await;
            }
        }
        let span = StageSpan::of(&run, &id).map(Arc::new);
        let trace_id = span.as_ref().map(|span| span.trace_id()).unwrap_or_default();
        tracing::info!(job.id = id.job_id, trace_id, stage = id.stage, group.id = id.group_id, "a task was taken on");
        let task = Task { means: self.means.clone(), reports: self.reports.clone(), ticket, run, id, span };
        let tasks = self.clone();
        self.tracker.spawn(async move {
            let ended = task.work().await;
            let Task { id, ticket, span, .. } = task;
            if let Some(span) = span {
                span.ended(ended.as_ref().err().map(|failure| failure.reason));
            }
            let report = conclude(ended, &id, &trace_id);
            tasks.means.mail.forget(|task| *task == id);
            // Until it is told, a coordinator that comes finds it among those that run.
            tasks.reports.end(id.clone(), report, &ticket.forgotten).await;
            tasks.running().remove(&id);
        });
    }

    /// Stops a task at its next step.
    pub(crate) fn cancel(&self, task: TaskRef) {
        if let Some(ticket) = self.running().get(&task.into()) {
            ticket.cancel.cancel();
        }
    }

    /// Stops a task at its next step and keeps what was done of it.
    pub(crate) fn park(&self, task: TaskRef) {
        if let Some(ticket) = self.running().get(&task.into()) {
            ticket.park.cancel();
        }
    }

    /// Drops what is held of a job that is over.
    pub(crate) fn forget_job(&self, job_id: &str) {
        self.forget_where(|task| task.job_id == job_id);
        self.reports.forget_job(job_id);
    }

    /// Drops everything that runs or waits: nobody is left who wants it.
    pub(crate) fn forget_all(&self) {
        self.forget_where(|_| true);
    }

    /// Drops what has come for a group that is given up.
    pub(crate) fn forget_group(&self, group_id: &str, epoch: u64) {
        self.means.mail.forget(|task| task.group_id == group_id && task.epoch == epoch);
    }

    /// Those that wait or run.
    pub(crate) fn held(&self) -> Vec<HeldTask> {
        self.running().iter().map(|(id, ticket)| ticket.held(id)).collect()
    }

    /// How many wait or run.
    pub(crate) fn count(&self) -> usize {
        self.running().len()
    }

    /// Whether there are none.
    pub(crate) fn is_empty(&self) -> bool {
        self.running().is_empty()
    }

    /// Returns when every task's end has been told.
    pub(crate) async fn all_over(&self) {
        self.tracker.wait().await;
    }

    fn admit(&self, id: &TaskId, ticket: &Arc<Ticket>) -> Result<bool, Failure> {
        self.means.groups.leader(id).map_err(|error| Failure::new("STALE_EPOCH", error.to_string()))?;
        let mut running = self.running();
        if running.contains_key(id) {
            return Ok(false);
        }
        if running.len() >= MAX_TASKS {
            return Err(Failure::new("OVERLOADED", format!("this worker has {MAX_TASKS} tasks already")));
        }
        running.insert(id.clone(), ticket.clone());
        self.means.mail.announce(id);
        Ok(true)
    }

    fn forget_where(&self, which: impl Fn(&TaskId) -> bool) {
        for (_, ticket) in self.running().iter().filter(|(task, _)| which(task)) {
            ticket.forgotten.store(true, Ordering::SeqCst);
            ticket.cancel.cancel();
        }
        self.means.mail.forget(which);
    }

    fn running(&self) -> MutexGuard<'_, HashMap<TaskId, Arc<Ticket>>> {
        self.running.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Ticket {
    pub(crate) fn saved_step(&self) -> u32 {
        self.saved.load(Ordering::SeqCst)
    }

    pub(crate) fn progress(&self) -> MutexGuard<'_, Progress> {
        self.progress.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn held(&self, id: &TaskId) -> HeldTask {
        let progress = *self.progress();
        let (step, steps) = if let Progress::Step { step, steps } = progress { (step, steps) } else { (0, 0) };
        HeldTask {
            task: Some(id.clone().into()),
            started: progress != Progress::Waiting,
            // One that goes on from a checkpoint has made these steps before its first.
            step: (step as u32).max(self.saved_step()),
            steps: steps as u32,
            saved_step: self.saved_step(),
            stopping: self.cancel.is_cancelled() || self.park.is_cancelled(),
        }
    }
}

fn conclude(ended: Result<Ending, Failure>, id: &TaskId, trace_id: &str) -> Report {
    let task = TaskRef::from(id.clone());
    match ended {
        Ok(Ending::Done { seconds, images, stored }) => Report::TaskDone(TaskDone { task: Some(task), seconds, images, stored }),
        Ok(Ending::Parked { saved_step }) => {
            tracing::info!(
                job.id = id.job_id,
                trace_id,
                stage = id.stage,
                group.id = id.group_id,
                saved_step,
                "a task was parked"
            );
            Report::TaskParked(TaskParked { task: Some(task), saved_step })
        }
        Err(failure) => {
            let Failure { reason, message, .. } = &failure;
            tracing::info!(
                job.id = id.job_id,
                trace_id,
                stage = id.stage,
                group.id = id.group_id,
                reason,
                message,
                "a task failed"
            );
            failure.report(task)
        }
    }
}
