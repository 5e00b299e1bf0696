//! A task from its command to its end: wait for its inputs, hand it to the group's leader, hand its output on.

use std::convert::Infallible;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use futures::future::{try_join, try_join_all};
use futures::stream;
use models::stage::{Inputs, Pictures};
use models::{Checkpoint, Payload, Request};
use proto::v1::control_response::Report;
use proto::v1::worker_service_client::WorkerServiceClient;
use proto::v1::{Destination, ImageResult, RunTask, StageKind, TaskComputed, TaskProgress, TaskRef, TaskStarted};
use tokio::sync::{oneshot, watch};

use crate::blobs::Blobs;
use crate::cards::scheduler_class;
use crate::checkpoints::Store;
use crate::dial::{self, Dial};
use crate::failure::Failure;
use crate::groups::{Groups, Leader};
use crate::home::Home;
use crate::inbox::TaskId;
use crate::mail::Mail;
use crate::outbox::Reports;
use crate::payload_wire::Outgoing;
use crate::rank::{Command, Outcome, Progress, Sink};
use crate::saver::keep_saving;
use crate::spans::StageSpan;
use crate::tasks::Ticket;
use crate::{Error, pictures, request_wire};

/// How often it is said that an output waits to be taken: at most a fifth of the time after which a group is taken for stuck.
const HANDING_OVER: Duration = Duration::from_secs(1);

/// What every task works with.
pub(crate) struct Means {
    pub(crate) groups: Arc<Groups>,
    pub(crate) mail: Arc<Mail>,
    /// The way to other workers.
    pub(crate) dial: Dial,
    /// The way to the coordinator.
    pub(crate) home: Arc<Home>,
    pub(crate) next_key: AtomicU64,
}

/// A task that was taken on.
pub(crate) struct Task {
    pub(crate) means: Arc<Means>,
    pub(crate) reports: Reports,
    pub(crate) ticket: Arc<Ticket>,
    pub(crate) run: RunTask,
    pub(crate) id: TaskId,
    /// Its place in its job's trace.
    pub(crate) span: Option<Arc<StageSpan>>,
}

/// How a task ends that does not fail.
pub(crate) enum Ending {
    /// Its output was handed over.
    Done { seconds: f64, images: Vec<ImageResult>, stored: bool },
    /// It stopped; what was done up to this step is stored.
    Parked { saved_step: u32 },
}

/// What the leader's thread came to.
enum Computed {
    Output { payload: Payload, seconds: f64, steps: usize },
    Parked(Option<Box<Checkpoint>>),
}

impl Task {
    pub(crate) async fn work(&self) -> Result<Ending, Failure> {
        let leader = self.means.groups.leader(&self.id).map_err(|error| Failure::new("STALE_EPOCH", error.to_string()))?;
        let store = Store::of(&self.run, &self.id.job_id, leader.products, &self.means.home);
        let cancel = &self.ticket.cancel;
        let (request, inputs) = tokio::select! {
            prepared = self.prepare(&store) => prepared?,
            () = cancel.cancelled() => return Err(Failure::cancelled(0)),
            () = leader.ended.cancelled() => return Err(Failure::lost()),
            () = self.ticket.park.cancelled() => return Ok(Ending::Parked { saved_step: self.ticket.saved_step() }),
        };
        if let Some(span) = &self.span {
            span.prepared();
        }
        match self.compute(&leader, &store, request, inputs).await? {
            Computed::Output { payload, seconds, steps } => tokio::select! {
                handed = self.hand_over(&store, payload, &leader) => {
                    let (images, stored) = handed?;
                    Ok(Ending::Done { seconds, images, stored })
                }
                () = cancel.cancelled() => Err(Failure::cancelled(steps)),
                never = self.say_computed() => match never {},
            },
            Computed::Parked(checkpoint) => {
                let step = checkpoint.as_ref().map_or(0, |checkpoint| checkpoint.step);
                tokio::select! {
                    saved_step = self.keep(&store, checkpoint) => Ok(Ending::Parked { saved_step }),
                    () = cancel.cancelled() => Err(Failure::cancelled(step)),
                }
            }
        }
    }

    /// Everything the task starts from.
    async fn prepare(&self, store: &Store) -> Result<(Request, Inputs), Failure> {
        let invalid = |message: String| Failure::new("INVALID_REQUEST", message);
        let spec = self.run.spec.as_ref().ok_or_else(|| invalid("spec: is missing".into()))?;
        let request = request_wire::from_wire(spec).map_err(|error| invalid(error.to_string()))?;
        let mut inputs = Inputs::default();
        let come = async { Ok(self.means.mail.claim(&self.id, &self.run.inputs).await) };
        let (come, stored) = try_join(come, self.stored(store)).await?;
        for payload in come.into_iter().chain(stored) {
            inputs.add(payload).map_err(|error| Failure::of_model(&error, 0))?;
        }
        if self.run.resume_step > 0 {
            if self.run.kind() != StageKind::Denoise {
                return Err(invalid("resume_step: only a denoiser has steps to go on from".into()));
            }
            let state = store.state(&self.id.stage, self.run.resume_step).await;
            inputs.checkpoint = Some(state.map_err(|error| Failure::checkpoint_lost(&error))?);
        }
        let controls = if self.run.with_controls { spec.controls.as_slice() } else { &[] };
        if self.run.kind() == StageKind::EncodeImage && spec.image_blob_id.is_empty() && controls.is_empty() {
            return Err(invalid("image_blob_id: is missing".into()));
        }
        if self.run.with_pictures {
            let image = self.picture(&spec.image_blob_id).await?;
            let mask_image = self.picture(&spec.mask_image_blob_id).await?;
            inputs.pictures = Pictures { image, mask_image, ..Pictures::default() };
            for more in &spec.more_image_blob_ids {
                let missing = || invalid("more_image_blob_ids: one is empty".into());
                inputs.pictures.more.push(self.picture(more).await?.ok_or_else(missing)?);
            }
        }
        for control in controls {
            let missing = || invalid("controls: one names no picture".into());
            inputs.pictures.controls.push(self.picture(&control.image_blob_id).await?.ok_or_else(missing)?);
        }
        Ok((request, inputs))
    }

    /// The outputs of stages of an earlier try.
    async fn stored(&self, store: &Store) -> Result<Vec<Payload>, Failure> {
        let outputs = self.run.stored_inputs.iter().map(|stage| store.output(stage));
        try_join_all(outputs).await.map_err(|error| Failure::checkpoint_lost(&error))
    }

    /// The picture of this id; an empty one is none.
    async fn picture(&self, blob_id: &str) -> Result<Option<Vec<u8>>, Failure> {
        if blob_id.is_empty() {
            return Ok(None);
        }
        let downloaded = self.blobs().download(blob_id).await;
        downloaded.map(Some).map_err(|error| match &error {
            Error::Blob { .. } | Error::Call { code: tonic::Code::NotFound, .. } => {
                Failure::new("INVALID_IMAGE", error.to_string())
            }
            error => Failure::of_store(error),
        })
    }

    fn blobs(&self) -> Blobs<'_> {
        Blobs { address: &self.run.blob_address, home: &self.means.home }
    }

    /// Has the leader's thread work on it, and tells how far it is.
    async fn compute(&self, leader: &Leader, store: &Store, request: Request, inputs: Inputs) -> Result<Computed, Failure> {
        let key = self.means.next_key.fetch_add(1, Ordering::Relaxed);
        let (progress, mut seen) = watch::channel(Progress::Waiting);
        let (states, to_save) = watch::channel(None);
        let (outcome, mut over) = oneshot::channel();
        let sink = Sink { progress, states, outcome, began: None, stepped: None, span: self.span.clone() };
        let _saving = keep_saving(store.clone(), self.id.stage.clone(), to_save, self.ticket.saved.clone());
        let tell = |command: Command| leader.commands.try_send(command).map_err(|_| Failure::lost());
        tell(Command::Start { key, request: Box::new(request), inputs: Box::new(inputs), sink })?;
        let (mut told_to_stop, mut told_to_park) = (false, false);
        loop {
            tokio::select! {
                biased;
                outcome = &mut over => {
                    let last = *seen.borrow_and_update();
                    self.tell(last).await;
                    let steps = if let Progress::Step { step, .. } = last { step } else { 0 };
                    return match outcome {
                        Ok(Outcome::Done { payload, seconds }) => Ok(Computed::Output { payload, seconds, steps }),
                        Ok(Outcome::Failed { error: models::Error::Parked(checkpoint), .. }) => Ok(Computed::Parked(checkpoint)),
                        Ok(Outcome::Failed { error, step }) => Err(Failure::of_model(&error, step)),
                        Err(_) => Err(Failure::lost()),
                    };
                }
                () = leader.ended.cancelled() => return Err(Failure::lost()),
                () = self.ticket.cancel.cancelled(), if !told_to_stop => {
                    told_to_stop = true;
                    tell(Command::Cancel { key })?;
                }
                () = self.ticket.park.cancelled(), if !told_to_park => {
                    told_to_park = true;
                    tell(Command::Park { key })?;
                }
                Ok(()) = seen.changed() => {
                    let now = *seen.borrow_and_update();
                    self.tell(now).await;
                }
            }
        }
    }

    /// Tells what is new. What is told is noted first, so that nothing older is said of the task later.
    async fn tell(&self, now: Progress) {
        let before = std::mem::replace(&mut *self.ticket.progress(), now);
        let task = || Some(TaskRef::from(self.id.clone()));
        if before == Progress::Waiting && now != Progress::Waiting {
            self.reports.send(Report::TaskStarted(TaskStarted { task: task() })).await;
        }
        if let Progress::Step { step, steps } = now
            && now != before
        {
            let (step, steps) = (step as u32, steps as u32);
            // The thread may be further by now than is told here.
            let saved_step = self.ticket.saved_step().min(step);
            self.reports.send(Report::TaskProgress(TaskProgress { task: task(), step, steps, saved_step })).await;
        }
    }

    /// Says now and then that the group has done its part, while the output is handed over: a group that made no step would be
    /// taken for stuck.
    async fn say_computed(&self) -> Infallible {
        loop {
            tokio::time::sleep(HANDING_OVER).await;
            self.reports.send(Report::TaskComputed(TaskComputed { task: Some(self.id.clone().into()) })).await;
        }
    }

    /// Stores what a parked task has done, and says which step is stored in the end.
    async fn keep(&self, store: &Store, checkpoint: Option<Box<Checkpoint>>) -> u32 {
        let saved = self.ticket.saved_step();
        match checkpoint {
            Some(checkpoint) if checkpoint.step as u32 != saved => {
                let stored = store.put_state(&self.id.stage, *checkpoint).await;
                stored.unwrap_or_else(|error| {
                    tracing::warn!(job.id = self.id.job_id, stage = self.id.stage, saved, %error, "a parked task could not be stored");
                    saved
                })
            }
            _ => saved,
        }
    }

    /// Hands the output to whoever waits for it, other tasks or the blob service, and the former to the store too.
    async fn hand_over(&self, store: &Store, payload: Payload, leader: &Leader) -> Result<(Vec<ImageResult>, bool), Failure> {
        if self.run.outputs.is_empty() {
            return Ok((self.upload(payload, leader).await?, false));
        }
        let encoded = tokio::task::spawn_blocking(move || Outgoing::of(&payload)).await;
        let encoded = encoded.map_err(|_| Error::Panicked).flatten().map_err(|error| Failure::internal(&error))?;
        let puts = try_join_all(self.run.outputs.iter().map(|to| self.put(&encoded, to)));
        // Both to their end: when nobody takes the output, the store is where it is found.
        let (put, stored) = futures::future::join(puts, store.put_output(&self.id.stage, &encoded)).await;
        if let Err(error) = &stored {
            tracing::warn!(job.id = self.id.job_id, stage = self.id.stage, %error, "a stage's output could not be stored");
        }
        put?;
        Ok((Vec::new(), stored.is_ok()))
    }

    async fn put(&self, payload: &Outgoing, to: &Destination) -> Result<(), Failure> {
        let refused = |error: Error| Failure::refused(&error);
        let client = WorkerServiceClient::new(self.means.dial.channel(identity::Role::Worker, &to.address).map_err(refused)?)
            .max_encoding_message_size(proto::MAX_MESSAGE_BYTES);
        let task = to.task.clone().unwrap_or_default();
        let answer = dial::call(&to.address, || {
            let mut client = client.clone();
            let messages = payload.messages(task.clone(), &self.id.stage);
            async move { client.put_payload(stream::iter(messages)).await }
        });
        answer.await.map(drop).map_err(refused)
    }

    async fn upload(&self, payload: Payload, leader: &Leader) -> Result<Vec<ImageResult>, Failure> {
        let (run, path, products) = (self.run.clone(), leader.path.clone(), leader.products);
        let encode = move || pictures::encode(&run, &payload, scheduler_class(&path).as_deref(), products);
        let encoded = tokio::task::spawn_blocking(encode)
            .await
            .map_err(|_| Error::Panicked)
            .flatten()
            .map_err(|error| Failure::internal(&error))?;
        let blobs = self.blobs();
        let uploads = encoded.into_iter().map(|(bytes, image)| {
            let blobs = &blobs;
            async move {
                let uploaded = blobs.upload_png(&bytes, &image.sha256).await;
                let blob_id = uploaded.map_err(|error| Failure::of_store(&error))?;
                Ok(ImageResult { blob_id, ..image })
            }
        });
        try_join_all(uploads).await
    }
}
