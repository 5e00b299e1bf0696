//! One job of three stages on one worker that holds them all, as a coordinator would run it.

use proto::v1::control_request::Command;
use proto::v1::control_response::Report;
use proto::v1::{Destination, RunTask, TaskRef};

use crate::coordinator::{Coordinator, join};
use crate::run;
use crate::running::{Control, Running};

/// A worker with all three stages.
pub(crate) struct Bench {
    pub(crate) worker: Running,
    pub(crate) control: Control,
}

/// The tasks of one try of a job.
pub(crate) struct Job {
    pub(crate) encode: TaskRef,
    pub(crate) denoise: TaskRef,
    pub(crate) decode: TaskRef,
    steps: u32,
    to: String,
    blob_address: String,
}

impl Bench {
    pub(crate) async fn start(coordinator: &Coordinator, transformer: &str) -> Self {
        let worker = Running::start(coordinator).await;
        Self::of(worker, transformer).await
    }

    pub(crate) async fn of(worker: Running, transformer: &str) -> Self {
        let mut control = worker.control().await;
        for (group_id, component) in [("e", "encoder"), ("t", transformer), ("v", "vae")] {
            control.send(Command::JoinGroup(join(group_id, 1, component, &[&worker]))).await;
            control.ready(group_id, 1).await;
        }
        Self { worker, control }
    }

    /// A try of a job on this worker.
    pub(crate) fn job(&self, coordinator: &Coordinator, job_id: &str, attempt: u32, steps: u32) -> Job {
        let task = |stage: &str, group_id: &str| TaskRef {
            job_id: job_id.into(),
            stage: stage.into(),
            attempt,
            group_id: group_id.into(),
            epoch: 1,
        };
        Job {
            encode: task("encode_text", "e"),
            denoise: task("denoise", "t"),
            decode: task("decode", "v"),
            steps,
            to: self.worker.address(),
            blob_address: coordinator.address(),
        }
    }

    pub(crate) async fn send(&self, run: RunTask) {
        self.control.send(Command::RunTask(run)).await;
    }

    /// The sha256 of each of the job's pictures.
    pub(crate) async fn pictures(&mut self, job: &Job) -> Vec<String> {
        self.control.done(&job.decode).await.images.into_iter().map(|image| image.sha256).collect()
    }

    /// Draws without disturbance.
    pub(crate) async fn draw(&mut self, job: &Job) -> Vec<String> {
        for run in job.whole() {
            self.send(run).await;
        }
        self.pictures(job).await
    }

    /// Draws from what is stored of the job after `step`.
    pub(crate) async fn draw_from(&mut self, job: &Job, step: u32) -> Vec<String> {
        for run in job.resumed(step) {
            self.send(run).await;
        }
        let pictures = self.pictures(job).await;
        assert!(self.steps(job).iter().all(|told| *told > step), "no step is done twice: {:?}", self.steps(job));
        pictures
    }

    /// The steps that were told of the job.
    pub(crate) fn steps(&self, job: &Job) -> Vec<u32> {
        let step = |report: &Report| match report {
            Report::TaskProgress(p) if p.task.as_ref() == Some(&job.denoise) => Some(p.step),
            _ => None,
        };
        self.control.seen.iter().filter_map(step).collect()
    }
}

impl Job {
    /// From the prompt.
    pub(crate) fn whole(&self) -> Vec<RunTask> {
        let encode = RunTask { outputs: vec![self.to(&self.denoise)], ..self.run(&self.encode) };
        let inputs = vec!["encode_text".into()];
        let denoise = RunTask { inputs, outputs: vec![self.to(&self.decode)], ..self.run(&self.denoise) };
        vec![self.decode_what_comes(), denoise, encode]
    }

    /// From the denoiser's state after `step`; 0: from its inputs.
    pub(crate) fn resumed(&self, step: u32) -> Vec<RunTask> {
        let stored_inputs = vec!["encode_text".into()];
        let outputs = vec![self.to(&self.decode)];
        let denoise = RunTask { stored_inputs, resume_step: step, outputs, ..self.run(&self.denoise) };
        vec![self.decode_what_comes(), denoise]
    }

    /// From the denoiser's output.
    pub(crate) fn decoding(&self) -> RunTask {
        RunTask { stored_inputs: vec!["denoise".into()], ..self.run(&self.decode) }
    }

    fn decode_what_comes(&self) -> RunTask {
        RunTask { inputs: vec!["denoise".into()], ..self.run(&self.decode) }
    }

    fn to(&self, task: &TaskRef) -> Destination {
        Destination { task: Some(task.clone()), address: self.to.clone() }
    }

    fn run(&self, task: &TaskRef) -> RunTask {
        let (blob_address, model_digest) = (self.blob_address.clone(), "abc".into());
        RunTask { blob_address, model_digest, ..run(task.clone(), self.steps) }
    }
}
