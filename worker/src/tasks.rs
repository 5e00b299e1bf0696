//! A task from its command to its report: wait for its inputs, hand it to the group's leader, hand its output on.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use bytes::Bytes;
use futures::future::try_join_all;
use futures::stream;
use models::image_io;
use models::stage::{Inputs, Pictures};
use models::{Payload, Request};
use proto::v1::control_response::Report;
use proto::v1::worker_service_client::WorkerServiceClient;
use proto::v1::{Destination, ImageResult, RunTask, StageKind, TaskDone, TaskFailed, TaskProgress, TaskRef, TaskStarted};
use sha2::{Digest, Sha256};
use tokio::sync::{Notify, oneshot, watch};
use tokio_util::sync::CancellationToken;

use crate::blobs::{Blobs, hex};
use crate::cards::scheduler_class;
use crate::dial::{self, Dial};
use crate::groups::{Groups, Leader, MAX_TASKS, Reports};
use crate::inbox::{Inbox, TaskId};
use crate::payload_wire::Outgoing;
use crate::rank::{Command, Outcome, Progress, Sink};
use crate::{Error, Result, provenance, request_wire};

/// The inbox, and what wakes the tasks that wait for it.
#[derive(Debug, Default)]
pub(crate) struct Mail {
    inbox: Mutex<Inbox>,
    arrived: Notify,
}

/// Room in the inbox for a payload that is on its way in. Given back when it does not come.
pub(crate) struct Reservation<'a> {
    mail: &'a Mail,
    bytes: u64,
}

impl Mail {
    /// Makes room for `bytes`.
    pub(crate) fn reserve(&self, bytes: u64) -> Result<Reservation<'_>> {
        self.inbox().reserve(bytes, Instant::now())?;
        Ok(Reservation { mail: self, bytes })
    }

    fn inbox(&self) -> MutexGuard<'_, Inbox> {
        self.inbox.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn claim(&self, task: &TaskId, stages: &[String]) -> Vec<Payload> {
        loop {
            let arrived = self.arrived.notified();
            tokio::pin!(arrived);
            // From here on nothing that arrives is missed.
            arrived.as_mut().enable();
            if let Some(payloads) = self.inbox().claim(task, stages) {
                return payloads;
            }
            arrived.await;
        }
    }
}

impl Reservation<'_> {
    /// Puts the payload where the room was.
    pub(crate) fn fill(mut self, task: TaskId, from_stage: &str, payload: Payload) {
        let bytes = std::mem::take(&mut self.bytes);
        self.mail.inbox().insert(task, from_stage, payload, bytes, Instant::now());
        self.mail.arrived.notify_waiters();
    }
}

impl Drop for Reservation<'_> {
    fn drop(&mut self) {
        self.mail.inbox().release(self.bytes);
    }
}

/// The tasks this worker leads.
pub(crate) struct Tasks {
    groups: Arc<Groups>,
    mail: Arc<Mail>,
    dial: Dial,
    /// Cancelled when the task is to stop.
    running: Mutex<HashMap<TaskId, CancellationToken>>,
    next_key: AtomicU64,
}

/// Why a task ended without output.
struct Failure {
    reason: &'static str,
    message: String,
    step: usize,
}

impl Tasks {
    pub(crate) fn new(groups: Arc<Groups>, mail: Arc<Mail>) -> Arc<Self> {
        let (dial, running, next_key) = (Dial::default(), Mutex::default(), AtomicU64::new(1));
        Arc::new(Self { groups, mail, dial, running, next_key })
    }

    /// Takes a task on; what becomes of it is reported.
    pub(crate) async fn run(self: &Arc<Self>, run: RunTask, reports: &Reports) {
        let id = TaskId::from(run.task.clone().unwrap_or_default());
        let cancel = CancellationToken::new();
        match self.admit(&id, &cancel) {
            Ok(true) => {}
            Ok(false) => return tracing::warn!(job.id = id.job_id, stage = id.stage, "told to run a task twice"),
            Err(failure) => return reports.send(failure.report(id.into())).await,
        }
        let (tasks, reports) = (self.clone(), reports.clone());
        tokio::spawn(async move {
            let outcome = tasks.work(&run, &id, &cancel, &reports).await;
            tasks.running().remove(&id);
            tasks.mail.inbox().forget(|task| *task == id);
            reports.send(conclude(outcome, id)).await;
        });
    }

    /// Stops a task at its next step.
    pub(crate) fn cancel(&self, task: TaskRef) {
        if let Some(cancel) = self.running().get(&task.into()) {
            cancel.cancel();
        }
    }

    /// Drops what is held of a job that is over.
    pub(crate) fn forget_job(&self, job_id: &str) {
        self.stop_where(|task| task.job_id == job_id);
    }

    /// Drops everything.
    pub(crate) fn forget_all(&self) {
        self.stop_where(|_| true);
    }

    /// Drops what has come for a group that is given up.
    pub(crate) fn forget_group(&self, group_id: &str, epoch: u64) {
        self.mail.inbox().forget(|task| task.group_id == group_id && task.epoch == epoch);
    }

    fn admit(&self, id: &TaskId, cancel: &CancellationToken) -> Result<bool, Failure> {
        self.groups.leader(id).map_err(|error| Failure::new("STALE_EPOCH", error.to_string()))?;
        let mut running = self.running();
        if running.contains_key(id) {
            return Ok(false);
        }
        if running.len() >= MAX_TASKS {
            return Err(Failure::new("OVERLOADED", format!("this worker has {MAX_TASKS} tasks already")));
        }
        running.insert(id.clone(), cancel.clone());
        self.mail.inbox().announce(id);
        Ok(true)
    }

    fn stop_where(&self, which: impl Fn(&TaskId) -> bool) {
        self.running().iter().filter(|(task, _)| which(task)).for_each(|(_, cancel)| cancel.cancel());
        self.mail.inbox().forget(which);
    }

    async fn work(
        &self,
        run: &RunTask,
        id: &TaskId,
        cancel: &CancellationToken,
        reports: &Reports,
    ) -> Result<(f64, Vec<ImageResult>), Failure> {
        let leader = self.groups.leader(id).map_err(|error| Failure::new("STALE_EPOCH", error.to_string()))?;
        let (request, inputs) = tokio::select! {
            prepared = self.prepare(run, id) => prepared?,
            () = cancel.cancelled() => return Err(Failure::cancelled(0)),
            () = leader.ended.cancelled() => return Err(Failure::lost()),
        };
        let attempt = Attempt { id, cancel, reports, leader: &leader };
        let key = self.next_key.fetch_add(1, Ordering::Relaxed);
        let (payload, seconds, steps) = attempt.compute(key, request, inputs).await?;
        tokio::select! {
            images = self.hand_over(run, id, payload, &leader) => Ok((seconds, images?)),
            () = cancel.cancelled() => Err(Failure::cancelled(steps)),
        }
    }

    /// Everything the task starts from.
    async fn prepare(&self, run: &RunTask, id: &TaskId) -> Result<(Request, Inputs), Failure> {
        let spec = run.spec.as_ref().ok_or_else(|| Failure::new("INVALID_REQUEST", "spec: is missing"))?;
        let request = request_wire::from_wire(spec).map_err(|error| Failure::new("INVALID_REQUEST", error.to_string()))?;
        let mut inputs = Inputs::default();
        for payload in self.mail.claim(id, &run.inputs).await {
            inputs.add(payload).map_err(|error| Failure::of_model(&error, 0))?;
        }
        if run.kind() == StageKind::EncodeImage {
            if spec.image_blob_id.is_empty() {
                return Err(Failure::new("INVALID_REQUEST", "image_blob_id: is missing"));
            }
            let image = self.picture(run, &spec.image_blob_id).await?;
            let mask_image = match spec.mask_image_blob_id.as_str() {
                "" => None,
                blob_id => Some(self.picture(run, blob_id).await?),
            };
            inputs.pictures = Pictures { image: Some(image), mask_image };
        }
        Ok((request, inputs))
    }

    async fn picture(&self, run: &RunTask, blob_id: &str) -> Result<Vec<u8>, Failure> {
        let failed = |error: Error| match &error {
            Error::Blob { .. } | Error::Call { code: tonic::Code::NotFound, .. } => {
                Failure::new("INVALID_IMAGE", error.to_string())
            }
            _ => Failure::new("INTERNAL", error.to_string()),
        };
        Blobs::at(&run.blob_address, &self.dial).map_err(failed)?.download(blob_id).await.map_err(failed)
    }

    /// Hands the output to whoever waits for it: other tasks, or the blob service.
    async fn hand_over(
        &self,
        run: &RunTask,
        id: &TaskId,
        payload: Payload,
        leader: &Leader,
    ) -> Result<Vec<ImageResult>, Failure> {
        if run.outputs.is_empty() {
            return self.store(run, payload, leader).await;
        }
        let encoded = tokio::task::spawn_blocking(move || Outgoing::encode(&payload)).await;
        let encoded = encoded.map_err(|_| Error::Panicked).flatten().map_err(|e| Failure::new("INTERNAL", e.to_string()))?;
        try_join_all(run.outputs.iter().map(|to| self.put(&encoded, &id.stage, to))).await?;
        Ok(Vec::new())
    }

    async fn put(&self, payload: &Outgoing, from_stage: &str, to: &Destination) -> Result<(), Failure> {
        let refused = |error: Error| Failure::new("PAYLOAD_REFUSED", error.to_string());
        let client = WorkerServiceClient::new(self.dial.channel(&to.address).map_err(refused)?)
            .max_encoding_message_size(proto::MAX_MESSAGE_BYTES);
        let task = to.task.clone().unwrap_or_default();
        let answer = dial::call(&to.address, || {
            let mut client = client.clone();
            let messages = payload.messages(task.clone(), from_stage);
            async move { client.put_payload(stream::iter(messages)).await }
        });
        answer.await.map(drop).map_err(refused)
    }

    async fn store(&self, run: &RunTask, payload: Payload, leader: &Leader) -> Result<Vec<ImageResult>, Failure> {
        let (run_again, path) = (run.clone(), leader.path.clone());
        let encoded = tokio::task::spawn_blocking(move || {
            let scheduler = scheduler_class(&path);
            encode_pictures(&run_again, &payload, scheduler.as_deref())
        });
        let internal = |error: Error| Failure::new("INTERNAL", error.to_string());
        let pictures = encoded.await.map_err(|_| Error::Panicked).flatten().map_err(internal)?;
        let refused = |error: Error| Failure::new("PAYLOAD_REFUSED", error.to_string());
        let blobs = Blobs::at(&run.blob_address, &self.dial).map_err(refused)?;
        let uploads = pictures.into_iter().map(|(bytes, image)| {
            let blobs = &blobs;
            async move {
                let blob_id = blobs.upload_png(&bytes, &image.sha256).await.map_err(refused)?;
                Ok(ImageResult { blob_id, ..image })
            }
        });
        try_join_all(uploads).await
    }

    fn running(&self) -> MutexGuard<'_, HashMap<TaskId, CancellationToken>> {
        self.running.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A task while the leader works on it.
struct Attempt<'a> {
    id: &'a TaskId,
    cancel: &'a CancellationToken,
    reports: &'a Reports,
    leader: &'a Leader,
}

impl Attempt<'_> {
    /// The output, the seconds it took and the steps that were made.
    async fn compute(&self, key: u64, request: Request, inputs: Inputs) -> Result<(Payload, f64, usize), Failure> {
        let (progress, mut seen) = watch::channel(Progress::Waiting);
        let (outcome, mut over) = oneshot::channel();
        let sink = Sink { progress, outcome, began: None };
        let start = Command::Start { key, request: Box::new(request), inputs, sink };
        self.leader.commands.try_send(start).map_err(|_| Failure::lost())?;
        let mut told = Told::default();
        let mut asked_to_stop = false;
        loop {
            tokio::select! {
                biased;
                outcome = &mut over => {
                    let last = *seen.borrow_and_update();
                    self.tell(last, &mut told).await;
                    return match outcome {
                        Ok(Outcome::Done { payload, seconds }) => Ok((payload, seconds, told.step)),
                        Ok(Outcome::Failed { error, step }) => Err(Failure::of_model(&error, step)),
                        Err(_) => Err(Failure::lost()),
                    };
                }
                () = self.leader.ended.cancelled() => return Err(Failure::lost()),
                () = self.cancel.cancelled(), if !asked_to_stop => {
                    asked_to_stop = true;
                    self.leader.commands.try_send(Command::Cancel { key }).map_err(|_| Failure::lost())?;
                }
                Ok(()) = seen.changed() => {
                    let now = *seen.borrow_and_update();
                    self.tell(now, &mut told).await;
                }
            }
        }
    }

    async fn tell(&self, progress: Progress, told: &mut Told) {
        let task = || Some(TaskRef::from(self.id.clone()));
        if progress != Progress::Waiting && !told.started {
            told.started = true;
            self.reports.send(Report::TaskStarted(TaskStarted { task: task() })).await;
        }
        if let Progress::Step { step, steps } = progress
            && told.step != step
        {
            told.step = step;
            let (step, steps) = (step as u32, steps as u32);
            self.reports.send(Report::TaskProgress(TaskProgress { task: task(), step, steps, saved_step: 0 })).await;
        }
    }
}

/// What the coordinator has been told of a task.
#[derive(Default)]
struct Told {
    started: bool,
    step: usize,
}

impl Failure {
    fn new(reason: &'static str, message: impl Into<String>) -> Self {
        Self { reason, message: message.into(), step: 0 }
    }

    fn cancelled(step: usize) -> Self {
        Self { step, ..Self::new("CANCELLED", "the task was cancelled") }
    }

    fn lost() -> Self {
        Self::new("PEER_LOST", "the group is over")
    }

    fn of_model(error: &models::Error, step: usize) -> Self {
        let (reason, message) = match error {
            models::Error::Cancelled => return Self::cancelled(step),
            models::Error::Invalid { field, .. } if field.contains("image") => ("INVALID_IMAGE", error.to_string()),
            models::Error::Invalid { .. } => ("INVALID_REQUEST", error.to_string()),
            error if error.loses_group() => ("PEER_LOST", error.to_string()),
            // What a tokenizer says may quote its text.
            models::Error::Tokenizer(_) => ("INTERNAL", "the tokenizer failed".into()),
            error => ("INTERNAL", error.to_string()),
        };
        Self { step, ..Self::new(reason, message) }
    }

    fn report(self, task: TaskRef) -> Report {
        let Self { reason, message, step } = self;
        Report::TaskFailed(TaskFailed { task: Some(task), reason: reason.into(), message, step: step as u32 })
    }
}

fn conclude(outcome: Result<(f64, Vec<ImageResult>), Failure>, id: TaskId) -> Report {
    match outcome {
        Ok((seconds, images)) => Report::TaskDone(TaskDone { task: Some(id.into()), seconds, images, stored: false }),
        Err(failure) => {
            let Failure { reason, message, .. } = &failure;
            tracing::info!(job.id = id.job_id, stage = id.stage, group.id = id.group_id, reason, message, "a task failed");
            failure.report(id.into())
        }
    }
}

/// PNGs, and what is known of each before it is stored.
fn encode_pictures(run: &RunTask, payload: &Payload, scheduler: Option<&str>) -> Result<Vec<(Bytes, ImageResult)>> {
    let spec = run.spec.clone().unwrap_or_default();
    let pictures = image_io::to_u8(payload.image()?)?;
    let encoded = pictures.iter().enumerate().map(|(index, picture)| {
        let text = provenance::text(run, &spec, scheduler, index);
        let bytes = Bytes::from(image_io::encode_png(picture, &text)?);
        let image = ImageResult {
            blob_id: String::new(),
            sha256: hex(&Sha256::digest(&bytes)),
            width: picture.width as u32,
            height: picture.height as u32,
            media_type: "image/png".into(),
            byte_size: bytes.len() as u64,
        };
        Ok((bytes, image))
    });
    encoded.collect()
}
