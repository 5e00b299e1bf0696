//! The `atelier-coordinator` binary: reads flags and environment, sets up logging, and runs until it is told to stop.

use std::{error::Error, process::ExitCode};

use clap::Parser;
use coordinator::{Args, Config};
use tokio::{
    net::TcpListener,
    signal::unix::{SignalKind, signal},
};
use tracing_subscriber::EnvFilter;

/// The coordinator's flags, and those of its process.
#[derive(Debug, Parser)]
#[command(name = "atelier-coordinator", version, about)]
struct Flags {
    #[command(flatten)]
    coordinator: Args,

    /// Which log lines to write, such as "info" or "coordinator=debug".
    #[arg(long, env = "ATELIER_LOG", default_value = "info")]
    log: String,
}

#[tokio::main]
async fn main() -> ExitCode {
    let flags = Flags::parse();
    match start(flags).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("atelier-coordinator: {error}");
            let mut source = error.source();
            while let Some(cause) = source {
                eprintln!("  because: {cause}");
                source = cause.source();
            }
            ExitCode::FAILURE
        }
    }
}

async fn start(flags: Flags) -> Result<(), Box<dyn Error>> {
    telemetry::log::start(flags.coordinator.log_format, EnvFilter::try_new(&flags.log)?);
    telemetry::start_export("atelier-coordinator", |name| std::env::var(name).ok())?;
    let (listen, metrics) = (flags.coordinator.listen, flags.coordinator.metrics_listen);
    let config = Config::try_from(flags.coordinator)?;
    let listener = TcpListener::bind(listen).await.map_err(|error| format!("listen on {listen}: {error}"))?;
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let shutdown = async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
    };
    let metrics = coordinator::metrics::bind(metrics).await?;
    let ended = Box::pin(coordinator::run_measured(config, listener, metrics, shutdown)).await;
    tokio::task::spawn_blocking(telemetry::flush).await?;
    Ok(ended?)
}
