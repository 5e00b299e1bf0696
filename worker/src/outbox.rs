//! What the coordinator is told, whichever coordinator that is by then.
//!
//! Ranks and tasks outlive the stream they were started on, so they report here and not into a stream. While no coordinator
//! listens, only the ends of tasks are kept: all else the next one learns from [`Holding`], which is made when it comes.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use proto::v1::control_response::Report;
use proto::v1::{ControlResponse, Holding, Registration};
use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;
use tonic::Status;

use crate::inbox::TaskId;

/// Reports that wait for the coordinator to read them. More, and whoever reports waits.
const MAX_REPORTS: usize = 1024;
/// Ends of tasks kept until their jobs are forgotten, which a coordinator does as soon as a job is over: four times the tasks
/// a worker has at once.
const MAX_ENDS: usize = 4096;
/// Bytes of them. One has some hundred.
const MAX_END_BYTES: usize = 4 << 20;

/// Where reports wait for one coordinator.
pub(crate) type Sender = mpsc::Sender<Result<ControlResponse, Status>>;

/// The queue of one stream: it has room for what is said at once when the stream begins.
pub(crate) fn queue() -> (Sender, mpsc::Receiver<Result<ControlResponse, Status>>) {
    mpsc::channel(MAX_REPORTS + MAX_ENDS + 2)
}

/// Where every report goes.
#[derive(Clone, Debug, Default)]
pub(crate) struct Reports(Arc<Shared>);

#[derive(Debug, Default)]
struct Shared {
    inner: Mutex<Inner>,
    /// Whether a coordinator listens.
    attached: watch::Sender<bool>,
}

#[derive(Debug, Default)]
struct Inner {
    line: Option<Line>,
    ends: VecDeque<End>,
    end_bytes: usize,
}

/// The way to the coordinator that listens.
#[derive(Clone, Debug)]
pub(crate) struct Line {
    sender: Sender,
    /// Cancelled when it does not listen any more: nobody waits for it then.
    over: CancellationToken,
}

/// How a task ended, until its job is forgotten.
#[derive(Debug)]
struct End {
    task: TaskId,
    report: Report,
    bytes: usize,
}

impl Reports {
    /// Tells the coordinator, in the order of one caller's calls. One that is not there learns it from [`Holding`].
    pub(crate) async fn send(&self, report: Report) {
        let line = self.inner().line.clone();
        tell(line, report).await;
    }

    /// As [`Self::send`], for a report that ends a task: kept for coordinators to come, unless the job is forgotten.
    pub(crate) async fn end(&self, task: TaskId, report: Report, forgotten: &AtomicBool) {
        let line = {
            let mut inner = self.inner();
            // Read under the lock: whoever forgets a job marks its tasks first and comes here second.
            if !forgotten.load(Ordering::SeqCst) {
                inner.keep(End { task, bytes: report_bytes(&report), report: report.clone() });
            }
            inner.line.clone()
        };
        tell(line, report).await;
    }

    /// How `task` ended, if it did and its job is not forgotten.
    pub(crate) fn end_of(&self, task: &TaskId) -> Option<Report> {
        self.inner().ends.iter().find(|end| end.task == *task).map(|end| end.report.clone())
    }

    /// Drops what is kept of a job.
    pub(crate) fn forget_job(&self, job_id: &str) {
        let mut inner = self.inner();
        inner.ends.retain(|end| end.task.job_id != job_id);
        inner.end_bytes = inner.ends.iter().map(|end| end.bytes).sum();
    }

    /// From now on `sender` is told: first who this is, then what is held, then every end that is kept.
    pub(crate) fn attach(&self, sender: Sender, hello: Registration, holding: impl FnOnce() -> Holding) -> Line {
        let mut inner = self.inner();
        // Made under the lock: what changes after it is reported after it.
        let first = [Report::Hello(hello), Report::Holding(holding())];
        for report in first.into_iter().chain(inner.ends.iter().map(|end| end.report.clone())) {
            // The queue is new and has room.
            drop(sender.try_send(Ok(ControlResponse { report: Some(report) })));
        }
        let line = Line { sender, over: CancellationToken::new() };
        if let Some(before) = inner.line.replace(line.clone()) {
            before.over.cancel();
        }
        self.0.attached.send_replace(true);
        line
    }

    /// The coordinator at `line` does not listen any more.
    pub(crate) fn detach(&self, line: &Line) {
        line.over.cancel();
        let mut inner = self.inner();
        if inner.line.as_ref().is_some_and(|current| current.sender.same_channel(&line.sender)) {
            inner.line = None;
            self.0.attached.send_replace(false);
        }
    }

    /// Whether a coordinator listens.
    pub(crate) fn attached(&self) -> watch::Receiver<bool> {
        self.0.attached.subscribe()
    }

    /// Returns when no coordinator listens.
    pub(crate) async fn detached(&self) {
        // The sender lives as long as `self`.
        drop(self.attached().wait_for(|attached| !attached).await);
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.0.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Inner {
    fn keep(&mut self, end: End) {
        self.end_bytes += end.bytes;
        self.ends.push_back(end);
        while self.ends.len() > MAX_ENDS || self.end_bytes > MAX_END_BYTES {
            let Some(oldest) = self.ends.pop_front() else { break };
            self.end_bytes -= oldest.bytes;
            tracing::warn!(job.id = oldest.task.job_id, stage = oldest.task.stage, "dropped the end of a task nobody forgot");
        }
    }
}

async fn tell(line: Option<Line>, report: Report) {
    let Some(Line { sender, over }) = line else { return };
    tokio::select! {
        // A coordinator that is gone is not told.
        sent = sender.send(Ok(ControlResponse { report: Some(report) })) => drop(sent),
        () = over.cancelled() => {}
    }
}

fn report_bytes(report: &Report) -> usize {
    report.encoded_len()
}

#[cfg(test)]
mod tests {
    use proto::v1::{TaskFailed, TaskRef};

    use super::*;

    fn task(job: usize) -> TaskId {
        let task = TaskRef { job_id: job.to_string(), ..TaskRef::default() };
        task.into()
    }

    fn failed(job: usize, message: &str) -> Report {
        let message = message.to_owned();
        Report::TaskFailed(TaskFailed { task: Some(task(job).into()), reason: "X".into(), message, step: 0 })
    }

    fn told(receiver: &mut mpsc::Receiver<Result<ControlResponse, Status>>) -> Vec<Report> {
        std::iter::from_fn(|| receiver.try_recv().ok()).map(|message| message.unwrap().report.unwrap()).collect()
    }

    #[tokio::test]
    async fn ends_are_told_to_every_coordinator_until_their_job_is_forgotten() {
        let (reports, known) = (Reports::default(), AtomicBool::new(false));
        reports.end(task(1), failed(1, "a"), &known).await;
        reports.end(task(2), failed(2, "b"), &AtomicBool::new(true)).await;
        for _ in 0..2 {
            let (sender, mut receiver) = queue();
            let line = reports.attach(sender, Registration::default(), Holding::default);
            let told = told(&mut receiver);
            assert!(matches!(told.as_slice(), [Report::Hello(_), Report::Holding(_), end] if *end == failed(1, "a")), "{told:?}");
            reports.detach(&line);
        }
        reports.forget_job("1");
        assert_eq!(reports.end_of(&task(1)), None);
        let (sender, mut receiver) = queue();
        reports.attach(sender, Registration::default(), Holding::default);
        assert_eq!(told(&mut receiver).len(), 2);
    }

    #[tokio::test]
    async fn ends_that_nobody_forgets_are_bounded() {
        let (reports, known) = (Reports::default(), AtomicBool::new(false));
        for job in 0..MAX_ENDS + 2 {
            reports.end(task(job), failed(job, ""), &known).await;
        }
        assert_eq!((reports.end_of(&task(1)), reports.end_of(&task(2))), (None, Some(failed(2, ""))));
        let long = "x".repeat(MAX_END_BYTES / 2);
        reports.end(task(0), failed(0, &long), &known).await;
        reports.end(task(1), failed(1, &long), &known).await;
        assert_eq!((reports.end_of(&task(0)), reports.end_of(&task(1)).is_some()), (None, true));
    }

    #[tokio::test]
    async fn nobody_waits_for_a_coordinator_that_was_replaced() {
        let reports = Reports::default();
        let (sender, _unread) = queue();
        reports.attach(sender, Registration::default(), Holding::default);
        let full = async {
            loop {
                reports.send(failed(0, "")).await;
            }
        };
        let replaced = async {
            let (sender, receiver) = queue();
            reports.attach(sender, Registration::default(), Holding::default);
            receiver
        };
        // The loop fills the first queue, waits, and goes on into the second when that takes its place.
        let mut second = tokio::select! {
            biased;
            () = full => unreachable!(),
            receiver = replaced => receiver,
        };
        reports.send(failed(3, "")).await;
        assert!(told(&mut second).contains(&failed(3, "")));
    }
}
