//! `atelier jobs`, `atelier models`, `atelier workers`: what the cluster has.

use clap::{Args, Subcommand};
use proto::v1::{
    Adapter, CancelJobRequest, GetJobRequest, GroupState, Job, JobState, ListJobsRequest, ListModelsRequest, ListWorkersRequest,
    ModelStatus, Parameter, Products,
};

use crate::client::{Client, ServerArgs};
use crate::error::Error;

#[derive(Debug, Args)]
pub(crate) struct JobsArgs {
    #[command(flatten)]
    server: ServerArgs,
    #[command(subcommand)]
    command: Option<JobsCommand>,
}

#[derive(Debug, Subcommand)]
enum JobsCommand {
    /// Show one job.
    Show {
        /// Its id.
        job_id: String,
    },
    /// Stop a job at its next step.
    Cancel {
        /// Its id.
        job_id: String,
    },
}

#[derive(Debug, Args)]
pub(crate) struct ModelsArgs {
    #[command(flatten)]
    server: ServerArgs,
}

#[derive(Debug, Args)]
pub(crate) struct WorkersArgs {
    #[command(flatten)]
    server: ServerArgs,
}

pub(crate) async fn jobs(args: JobsArgs) -> Result<(), Error> {
    let mut client = Client::connect(&args.server).await?;
    match args.command {
        None => {
            let jobs = client.jobs.list_jobs(ListJobsRequest::default()).await?.into_inner().jobs;
            println!("{:<36}  {:<10} {:<16} {:>9} {:>5}  seed", "job", "state", "model", "size", "steps");
            jobs.iter().for_each(|job| println!("{}", job_line(job)));
        }
        Some(JobsCommand::Show { job_id }) => {
            let job = client.jobs.get_job(GetJobRequest { job_id }).await?.into_inner().job;
            show(&job.ok_or(Error::Protocol("no job"))?);
        }
        Some(JobsCommand::Cancel { job_id }) => {
            let job = client.jobs.cancel_job(CancelJobRequest { job_id }).await?.into_inner().job;
            show(&job.ok_or(Error::Protocol("no job"))?);
        }
    }
    Ok(())
}

pub(crate) async fn models(args: ModelsArgs) -> Result<(), Error> {
    let mut client = Client::connect(&args.server).await?;
    for model in client.cluster.list_models(ListModelsRequest {}).await?.into_inner().models {
        print_model(&model);
    }
    Ok(())
}

pub(crate) async fn workers(args: WorkersArgs) -> Result<(), Error> {
    let mut client = Client::connect(&args.server).await?;
    println!("{:<38} {:<22} {:<6} {:<24} {:<18} ranks", "worker", "address", "device", "labels", "multiplies in");
    for worker in client.cluster.list_workers(ListWorkersRequest {}).await?.into_inner().workers {
        let mut labels: Vec<String> = worker.labels.iter().map(|(k, v)| format!("{k}={v}")).collect();
        labels.sort();
        println!(
            "{:<38} {:<22} {:<6} {:<24} {:<18} {}",
            worker.worker_id,
            worker.address,
            worker.device,
            labels.join(","),
            worker.products().map(Products::name).collect::<Vec<_>>().join(","),
            worker.ranks.join(" ")
        );
    }
    Ok(())
}

fn job_line(job: &Job) -> String {
    let spec = job.spec.clone().unwrap_or_default();
    // A model may choose sides itself.
    let side = |pixels: Option<u32>| pixels.map_or("?".to_owned(), |pixels| pixels.to_string());
    let size = format!("{}x{}", side(spec.width), side(spec.height));
    let (steps, seed) = (spec.num_inference_steps.unwrap_or_default(), spec.seed.unwrap_or_default());
    format!("{:<36}  {:<10} {:<16} {size:>9} {steps:>5}  {seed}", job.id, state(job.state()), spec.model)
}

fn show(job: &Job) {
    println!("{}", job_line(job));
    if !job.trace_id.is_empty() {
        println!("  trace {}", job.trace_id);
    }
    if job.products() != Products::Unspecified {
        println!("  multiplied in {}", job.products());
    }
    if let Some(failure) = &job.failure {
        println!(
            "  {} ({}{}{})",
            failure.message,
            failure.reason,
            if failure.stage.is_empty() { "" } else { " in " },
            failure.stage
        );
    }
    for image in &job.images {
        println!("  {}x{} {} {} bytes, blob {}", image.width, image.height, image.media_type, image.byte_size, image.blob_id);
    }
}

fn state(state: JobState) -> &'static str {
    match state {
        JobState::Unspecified => "?",
        JobState::Queued => "queued",
        JobState::Running => "running",
        JobState::Succeeded => "succeeded",
        JobState::Failed => "failed",
        JobState::Cancelled => "cancelled",
    }
}

fn print_model(model: &ModelStatus) {
    println!("{}  {}, multiplied in {}", model.name, if model.ready { "ready" } else { "not ready" }, model.products());
    if !model.problem.is_empty() {
        println!("  problem: {}", model.problem);
    }
    if let Some(card) = &model.card {
        println!(
            "  {} ({}), {}, digest {}",
            card.family,
            card.pipeline_class,
            card.scheduler,
            card.digest.get(..16).unwrap_or(&card.digest)
        );
        println!("  at most {} pixels a job; takes:", card.max_pixels);
        card.parameters.iter().for_each(|p| println!("    {}", parameter(p)));
        if !card.adapters.is_empty() {
            println!("  adapters:");
            card.adapters.iter().for_each(|a| println!("    {}", adapter(a)));
        }
    }
    for group in &model.groups {
        let layout = group.layout.unwrap_or_default();
        let state = match group.state() {
            GroupState::Ready => "ready".to_owned(),
            GroupState::Loading => format!("loading {} of {} MB", group.loaded_bytes >> 20, group.total_bytes >> 20),
            GroupState::Waiting | GroupState::Unspecified => "waiting for workers".to_owned(),
        };
        let cut = layout.in_words();
        println!("  {:<32} epoch {:<3} {cut:<22} {state}, {} tasks", group.group_id, group.epoch, group.running_tasks);
    }
}

fn adapter(a: &Adapter) -> String {
    if !a.problem.is_empty() {
        return format!("{:<28} problem: {}", a.name, a.problem);
    }
    let digest = a.digest.get(..16).unwrap_or(&a.digest);
    let defaults: Vec<String> = a.defaults.iter().map(|d| format!("{}={}", d.name, d.value)).collect();
    let defaults = if defaults.is_empty() { String::new() } else { format!(", {}", defaults.join(" ")) };
    format!("{:<28} changes {}, digest {digest}, {} bytes{defaults}", a.name, a.components.join(" and "), a.byte_size)
}

fn parameter(p: &Parameter) -> String {
    if p.maximum == 0.0 && p.minimum == 0.0 {
        let text = p.default_text.as_ref().map(|text| format!("default {text:?}"));
        let what = text.or_else(|| p.required.then(|| "needed".to_owned()));
        return what.map_or_else(|| p.name.clone(), |what| format!("{:<28} {what}", p.name));
    }
    let multiple = if p.multiple_of > 1.0 { format!(", a multiple of {}", p.multiple_of) } else { String::new() };
    let default = p.default_value.map(|d| format!(", default {d}")).unwrap_or_default();
    format!("{:<28} {} to {}{multiple}{default}", p.name, p.minimum, p.maximum)
}
