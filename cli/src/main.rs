//! The `atelier` command.

mod bench;
mod certs;
mod client;
mod error;
mod generate;
mod health;
mod keys;
mod list;
mod plan;
mod progress;
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
    Up(up::UpArgs),
    /// Draw a picture.
    Generate(generate::GenerateArgs),
    /// List jobs, show one, or cancel one.
    Jobs(list::JobsArgs),
    /// Show the models that are served and what each takes.
    Models(list::ModelsArgs),
    /// Show the workers and the ranks they hold.
    Workers(list::WorkersArgs),
    /// Make an authority and certificates for development.
    Certs(certs::CertsArgs),
    /// Ask a process whether it serves, as a probe.
    Health(health::HealthArgs),
    /// API keys of tenants.
    #[command(subcommand)]
    Keys(keys::KeysCommand),
    /// Say what a model needs on each rank of a layout, and whether it fits.
    Plan(plan::PlanArgs),
    /// Measure what this machine computes and its cluster takes, against the machine's own limits.
    #[command(subcommand)]
    Bench(bench::BenchCommand),
    /// Run a coordinator.
    Coordinator(coordinator::config::Args),
    /// Run a worker.
    Worker(worker::config::Args),
}

fn main() -> ExitCode {
    kernels::memory::keep_freed_pages();
    let args = Args::parse();
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
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).init();
    let runtime = tokio::runtime::Runtime::new()?;
    runtime.block_on(async {
        match command {
            Command::Up(args) => up::run(args).await,
            Command::Generate(args) => generate::run(args).await,
            Command::Jobs(args) => list::jobs(args).await,
            Command::Models(args) => list::models(args).await,
            Command::Workers(args) => list::workers(args).await,
            Command::Certs(args) => certs::run(args),
            Command::Health(args) => health::run(args).await,
            Command::Keys(command) => keys::run(command),
            Command::Plan(args) => plan::run(&args),
            Command::Bench(command) => bench::run(command).await,
            Command::Coordinator(args) => {
                let taken = |source| Error::File { path: format!("--listen {}", args.listen), source };
                let listener = tokio::net::TcpListener::bind(args.listen).await.map_err(taken)?;
                Ok(coordinator::run(args.try_into()?, listener, stop_signal()).await?)
            }
            Command::Worker(args) => Ok(worker::run(args.try_into()?, stop_signal()).await?),
        }
    })
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
