//! The `atelier` command.

mod bench;
mod certs;
mod client;
mod error;
mod generate;
mod gguf;
mod health;
mod keys;
mod list;
mod patience;
mod pictures;
mod plan;
mod progress;
mod quantise;
mod reader;
mod show;
mod stop;
mod top;
mod trace;
mod up;

use std::process::ExitCode;

use clap::{Parser, Subcommand};
use error::Error;

/// Text-to-image models, served by machines that hold them together.
#[derive(Debug, Parser)]
#[command(name = "atelier", version)]
struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Start a coordinator and the workers that a models file asks for, on this machine.
    Up(Box<up::UpArgs>),
    /// Draw a picture.
    Generate(Box<generate::GenerateArgs>),
    /// List jobs; show one, fetch its pictures, or cancel it.
    Jobs(list::JobsArgs),
    /// Show the models that are served and what each takes.
    Models(list::ModelsArgs),
    /// Show the workers and the ranks they hold.
    Workers(list::WorkersArgs),
    /// Show workers, groups, the queue and the jobs that run, again each second.
    Top(top::TopArgs),
    /// Make an authority and certificates for development.
    Certs(certs::CertsArgs),
    /// Ask a process whether it serves, as a probe.
    Health(health::HealthArgs),
    /// API keys of tenants.
    #[command(subcommand)]
    Keys(keys::KeysCommand),
    /// Say what a model needs on each rank of a layout, and whether it fits.
    Plan(plan::PlanArgs),
    /// Write a model's directory again, with its weights in blocks of fewer bits (GGUF).
    #[command(alias = "quantize")]
    Quantise(quantise::QuantiseArgs),
    /// Measure what this machine computes and its cluster takes, against the machine's own limits.
    #[command(subcommand)]
    Bench(bench::BenchCommand),
    /// Run a coordinator.
    Coordinator(coordinator::config::Args),
    /// Run a worker.
    Worker(worker::config::Args),
}

impl Command {
    /// Whether this process works on tensors. A coordinator's many small blocks are better off with an arena for each thread.
    fn computes(&self) -> bool {
        match self {
            Self::Worker(_) | Self::Quantise(_) => true,
            Self::Bench(command) => command.computes(),
            _ => false,
        }
    }
}

fn main() -> ExitCode {
    let args = Args::parse();
    if !matches!(args.command, Command::Up(_) | Command::Coordinator(_) | Command::Worker(_)) {
        reader::end_when_gone();
    }
    if args.command.computes() {
        kernels::memory::keep_freed_pages();
    }
    match run(args.command) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{}", error.for_people());
            ExitCode::FAILURE
        }
    }
}

fn run(command: Command) -> Result<(), Error> {
    let default_level = if matches!(command, Command::Coordinator(_) | Command::Worker(_)) { "info" } else { "error" };
    let filter = tracing_subscriber::EnvFilter::try_from_default_env().unwrap_or_else(|_| default_level.into());
    let (format, service) = match &command {
        Command::Up(args) => (args.log_format(), "atelier-coordinator"),
        Command::Coordinator(args) => (args.log_format, "atelier-coordinator"),
        Command::Worker(args) => (args.log_format, "atelier-worker"),
        _ => (telemetry::log::Format::Text, "atelier-client"),
    };
    telemetry::log::start(format, filter);
    let runtime = tokio::runtime::Runtime::new()?;
    runtime.block_on(async {
        telemetry::start_export(service, |name| std::env::var(name).ok())?;
        // Boxed: it is as large as the largest of the commands.
        let ended = Box::pin(perform(command)).await;
        // What is left is sent, or is not.
        drop(tokio::task::spawn_blocking(telemetry::flush).await);
        ended
    })
}

async fn perform(command: Command) -> Result<(), Error> {
    match command {
        Command::Up(args) => up::run(*args).await,
        Command::Generate(args) => generate::run(*args).await,
        Command::Jobs(args) => list::jobs(args).await,
        Command::Models(args) => list::models(args).await,
        Command::Workers(args) => list::workers(args).await,
        Command::Top(args) => top::run(args).await,
        Command::Certs(args) => certs::run(args),
        Command::Health(args) => health::run(args).await,
        Command::Keys(command) => keys::run(command),
        Command::Plan(args) => plan::run(&args),
        Command::Quantise(args) => quantise::run(&args),
        Command::Bench(command) => bench::run(command).await,
        Command::Coordinator(args) => {
            let taken = |source| Error::File { path: format!("--listen {}", args.listen), source };
            let listener = tokio::net::TcpListener::bind(args.listen).await.map_err(taken)?;
            let metrics = coordinator::metrics::bind(args.metrics_listen).await?;
            Ok(coordinator::run_measured(args.try_into()?, listener, metrics, stop_signal()).await?)
        }
        Command::Worker(args) => Ok(worker::run(args.try_into()?, stop_signal()).await?),
    }
}

/// Resolves when the process is asked to stop.
async fn stop_signal() {
    let terminate = async {
        match tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate()) {
            Ok(mut signal) => drop(signal.recv().await),
            Err(_) => std::future::pending().await,
        }
    };
    tokio::select! {
        () = terminate => {}
        _ = tokio::signal::ctrl_c() => {}
    }
}
