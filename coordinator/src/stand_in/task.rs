//! A task of a stand-in worker, from its command to its report.

use std::sync::{
    Arc,
    atomic::{AtomicBool, AtomicU32, Ordering},
};

use proto::v1::{
    CheckpointKey, HeldTask, ImageResult, JobSpec, Products, RunTask, StageKind, TaskDone, TaskFailed, TaskParked, TaskProgress,
    TaskRef, TaskStarted, control_response::Report,
};
use tokio::sync::Notify;

use super::{
    POISON, decoded, embedding, first_latents, lock, next_latents,
    rpc::{get_checkpoint, put_checkpoint, put_payload, upload},
    service::{Fake, key},
};

/// A task that waits or runs; cheap to clone.
#[derive(Debug, Clone)]
pub(super) struct Running(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    task: TaskRef,
    /// What its group is multiplied in.
    products: Products,
    news: Arc<Notify>,
    started: AtomicBool,
    cancelled: AtomicBool,
    parked: AtomicBool,
    step: AtomicU32,
    steps: AtomicU32,
    saved: AtomicU32,
}

impl Running {
    pub(super) fn new(task: TaskRef, products: Products, news: Arc<Notify>) -> Self {
        let inner = Inner {
            task,
            products,
            news,
            started: AtomicBool::default(),
            cancelled: AtomicBool::default(),
            parked: AtomicBool::default(),
            step: AtomicU32::default(),
            steps: AtomicU32::default(),
            saved: AtomicU32::default(),
        };
        Self(Arc::new(inner))
    }

    pub(super) fn task(&self) -> &TaskRef {
        &self.0.task
    }

    pub(super) fn is_of(&self, job_id: &str) -> bool {
        self.0.task.job_id == job_id
    }

    pub(super) fn cancel(&self) {
        self.0.cancelled.store(true, Ordering::SeqCst);
        self.0.news.notify_waiters();
    }

    pub(super) fn park(&self) {
        self.0.parked.store(true, Ordering::SeqCst);
        self.0.news.notify_waiters();
    }

    pub(super) fn held(&self) -> HeldTask {
        HeldTask {
            task: Some(self.0.task.clone()),
            started: self.0.started.load(Ordering::SeqCst),
            step: self.0.step.load(Ordering::SeqCst),
            steps: self.0.steps.load(Ordering::SeqCst),
            saved_step: self.0.saved.load(Ordering::SeqCst),
            stopping: self.0.cancelled.load(Ordering::SeqCst) || self.0.parked.load(Ordering::SeqCst),
        }
    }

    fn saved(&self) -> u32 {
        self.0.saved.load(Ordering::SeqCst)
    }

    /// At a boundary: whether to go on.
    fn check(&self) -> Result<(), End> {
        if self.0.cancelled.load(Ordering::SeqCst) {
            return Err(End::Failed("CANCELLED", "it was cancelled".into()));
        }
        if self.0.parked.load(Ordering::SeqCst) {
            return Err(End::Parked);
        }
        Ok(())
    }
}

/// Why a task ended without output.
enum End {
    Failed(&'static str, String),
    Parked,
}

pub(super) fn failed(task: &TaskRef, reason: &str, message: &str) -> Report {
    let (reason, message) = (reason.to_owned(), message.to_owned());
    Report::TaskFailed(TaskFailed { task: Some(task.clone()), reason, message, step: 0 })
}

impl Fake {
    pub(super) async fn run(self, run: RunTask, running: Running) {
        let work = self.work(&run, &running);
        let outcome = tokio::select! {
            biased;
            outcome = work => outcome,
            () = self.life.cancelled() => return,
        };
        let task = running.task().clone();
        let report = match outcome {
            Ok((images, stored)) => Report::TaskDone(TaskDone { task: Some(task.clone()), seconds: 0.1, images, stored }),
            Err(End::Parked) => Report::TaskParked(TaskParked { task: Some(task.clone()), saved_step: running.saved() }),
            Err(End::Failed(reason, message)) => failed(&task, reason, &message),
        };
        self.report_end(&task, report);
    }

    async fn work(&self, run: &RunTask, running: &Running) -> Result<(Vec<ImageResult>, bool), End> {
        let spec = run.spec.clone().unwrap_or_default();
        let input = self.input(run, running).await?;
        running.0.started.store(true, Ordering::SeqCst);
        self.report(Report::TaskStarted(TaskStarted { task: run.task.clone() }));
        let (kind, output) = match run.kind() {
            StageKind::Denoise => ("latents", self.denoise(run, running, &spec, input).await?),
            StageKind::Decode => {
                tokio::time::sleep(self.pace.step).await;
                return Ok((vec![self.store(run, running, decoded(&input, running.0.products)).await?], false));
            }
            _ => {
                tokio::time::sleep(self.pace.step).await;
                ("conditioning", embedding(&spec, running.0.products))
            }
        };
        let at = self.key(running, 0);
        let stored =
            self.pace.checkpoints && put_checkpoint(&self.dial, &self.home(&run.blob_address), at, &output).await.is_ok();
        for to in &run.outputs {
            let refused = |status: tonic::Status| End::Failed("PAYLOAD_REFUSED", status.message().to_owned());
            put_payload(&self.dial, to, &running.task().stage, kind, &output).await.map_err(refused)?;
        }
        Ok((Vec::new(), stored))
    }

    /// The one input a stage has, from the stage before or from the checkpoint store.
    async fn input(&self, run: &RunTask, running: &Running) -> Result<[u8; 32], End> {
        if let Some(stage) = run.stored_inputs.first() {
            let at = CheckpointKey { stage: stage.clone(), ..self.key(running, 0) };
            return Ok(self.fetch(run, at).await?.1);
        }
        let Some(stage) = run.inputs.first() else {
            return Ok([0; 32]);
        };
        let place = (key(running.task()), stage.clone());
        loop {
            let news = self.news.notified();
            tokio::pin!(news);
            news.as_mut().enable();
            running.check()?;
            if let Some(payload) = lock(&self.held).payloads.remove(&place) {
                return Ok(payload);
            }
            news.await;
        }
    }

    async fn denoise(&self, run: &RunTask, running: &Running, spec: &JobSpec, input: [u8; 32]) -> Result<[u8; 32], End> {
        let steps = spec.num_inference_steps();
        running.0.steps.store(steps, Ordering::SeqCst);
        let (done, mut latents) = match run.resume_step {
            0 => (0, first_latents(&input, spec)),
            step => self.fetch(run, self.key(running, step)).await?,
        };
        running.0.saved.store(done, Ordering::SeqCst);
        for step in done + 1..=steps {
            running.check()?;
            if spec.prompt.contains(POISON) {
                self.life.cancel();
            }
            tokio::time::sleep(self.pace.step).await;
            latents = next_latents(&latents, running.0.products);
            running.0.step.store(step, Ordering::SeqCst);
            let at = self.key(running, step);
            if self.pace.checkpoints && put_checkpoint(&self.dial, &self.home(&run.blob_address), at, &latents).await.is_ok() {
                running.0.saved.store(step, Ordering::SeqCst);
            }
            let progress = TaskProgress { task: run.task.clone(), step, steps, saved_step: running.saved() };
            self.report(Report::TaskProgress(progress));
        }
        Ok(latents)
    }

    async fn fetch(&self, run: &RunTask, at: CheckpointKey) -> Result<(u32, [u8; 32]), End> {
        // A coordinator that is not there is no reason to begin anew.
        let mut last = String::new();
        for _ in 0..20 {
            match get_checkpoint(&self.dial, &self.home(&run.blob_address), at.clone()).await {
                Ok(state) => return Ok(state),
                Err(status) if matches!(status.code(), tonic::Code::NotFound | tonic::Code::DataLoss) => {
                    return Err(End::Failed("CHECKPOINT_LOST", status.message().to_owned()));
                }
                Err(status) => last = status.message().to_owned(),
            }
            tokio::time::sleep(super::HEARTBEAT).await;
        }
        Err(End::Failed("PAYLOAD_REFUSED", last))
    }

    /// Hands the picture over, however long it takes for a coordinator to be there.
    async fn store(&self, run: &RunTask, running: &Running, picture: [u8; 32]) -> Result<ImageResult, End> {
        loop {
            match upload(&self.dial, &self.home(&run.blob_address), picture).await {
                Ok(image) => return Ok(image),
                Err(_) => tokio::time::sleep(super::HEARTBEAT / 2).await,
            }
            if running.0.cancelled.load(Ordering::SeqCst) {
                running.check()?;
            }
        }
    }

    fn key(&self, running: &Running, step: u32) -> CheckpointKey {
        let task = running.task();
        let products = if self.pace.says_products { running.0.products } else { Products::F32 };
        CheckpointKey { job_id: task.job_id.clone(), stage: task.stage.clone(), step, products: products.into() }
    }
}
