//! `atelier jobs`, `atelier models`, `atelier workers`: what the cluster has.

use std::path::PathBuf;

use clap::{Args, Subcommand};
use proto::v1::{
    Adapter, CancelJobRequest, ControlNetwork, GetJobRequest, GroupState, Job, JobState, ListJobsRequest, ListModelsRequest,
    ListWorkersRequest, ModelStatus, Parameter, Products,
};

use crate::client::{Client, ServerArgs};
use crate::error::Error;
use crate::show::show;
use crate::{generate, pictures};

/// Jobs that are listed unless all are asked for. The help of `--all` says it.
const NEWEST: u32 = 50;
/// Jobs on a page when all are asked for: the most there may be.
const PAGE_OF_ALL: u32 = 1000;

#[derive(Debug, Args)]
pub(crate) struct JobsArgs {
    #[command(flatten)]
    server: ServerArgs,
    /// List all of them, not only the newest 50.
    #[arg(long)]
    all: bool,
    #[command(subcommand)]
    command: Option<JobsCommand>,
}

#[derive(Debug, Subcommand)]
enum JobsCommand {
    /// Show one job: how it is, what happened to it, and why it waits or has waited again.
    Show {
        /// Its id.
        job_id: String,
    },
    /// Fetch the pictures of a job that has succeeded.
    Fetch {
        /// Its id.
        job_id: String,
        /// Where the picture goes; several get -1, -2, ... before the extension.
        #[arg(long, default_value = generate::DEFAULT_OUT)]
        out: PathBuf,
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
        None => list(&mut client, args.all).await,
        Some(JobsCommand::Show { job_id }) => {
            let job = get(&mut client, job_id).await?;
            show(&mut client, &job).await
        }
        Some(JobsCommand::Fetch { job_id, out }) => {
            let job = get(&mut client, job_id).await?;
            if job.state() != JobState::Succeeded {
                return Err(Error::Job(format!("is {}: it has no pictures to fetch", state(job.state()))));
            }
            pictures::fetch(&mut client, &job, &out).await
        }
        Some(JobsCommand::Cancel { job_id }) => {
            let job = client.jobs.cancel_job(CancelJobRequest { job_id }).await?.into_inner().job;
            show(&mut client, &job.ok_or(Error::Protocol("no job"))?).await
        }
    }
}

async fn get(client: &mut Client, job_id: String) -> Result<Job, Error> {
    let job = client.jobs.get_job(GetJobRequest { job_id }).await?.into_inner().job;
    job.ok_or(Error::Protocol("no job"))
}

/// The newest jobs, or all of them.
async fn list(client: &mut Client, all: bool) -> Result<(), Error> {
    println!("{:<36}  {:<10} {:<16} {:>9} {:>5}  seed", "job", "state", "model", "size", "steps");
    let mut page_token = String::new();
    loop {
        let page_size = if all { PAGE_OF_ALL } else { NEWEST };
        let page = client.jobs.list_jobs(ListJobsRequest { page_size, page_token }).await?.into_inner();
        page.jobs.iter().for_each(|job| println!("{}", job_line(job)));
        page_token = page.next_page_token;
        if page_token.is_empty() {
            return Ok(());
        }
        if !all {
            eprintln!("there are older ones: `atelier jobs --all` lists them");
            return Ok(());
        }
    }
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

pub(crate) fn job_line(job: &Job) -> String {
    let spec = job.spec.clone().unwrap_or_default();
    // A model may choose sides itself.
    let side = |pixels: Option<u32>| pixels.map_or("?".to_owned(), |pixels| pixels.to_string());
    let size = format!("{}x{}", side(spec.width), side(spec.height));
    let (steps, seed) = (spec.num_inference_steps.unwrap_or_default(), spec.seed.unwrap_or_default());
    format!("{:<36}  {:<10} {:<16} {size:>9} {steps:>5}  {seed}", job.id, state(job.state()), spec.model)
}

pub(crate) fn state(state: JobState) -> &'static str {
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
        let scheduler = if card.scheduler.is_empty() { String::new() } else { format!("{}, ", card.scheduler) };
        let digest = card.digest.get(..16).unwrap_or(&card.digest);
        println!("  {} ({}), {scheduler}digest {digest}", card.family, card.pipeline_class);
        println!("  at most {} pixels a job; takes:", card.max_pixels);
        card.parameters.iter().for_each(|p| println!("    {}", parameter(p)));
        if !card.adapters.is_empty() {
            println!("  adapters:");
            card.adapters.iter().for_each(|a| println!("    {}", adapter(a)));
        }
    }
    if let Some(card) = model.card.as_ref().filter(|card| !card.controls.is_empty()) {
        println!("  controls:");
        card.controls.iter().for_each(|c| println!("    {}", control(c)));
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

fn control(c: &ControlNetwork) -> String {
    if !c.problem.is_empty() {
        return format!("{:<28} problem: {}", c.name, c.problem);
    }
    let digest = c.digest.get(..16).unwrap_or(&c.digest);
    let modes = if c.modes > 0 { format!(", modes 0 to {}", c.modes - 1) } else { String::new() };
    format!("{:<28} {}, digest {digest}, {} bytes{modes}", c.name, c.class, c.weight_bytes)
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
