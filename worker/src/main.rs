//! The `atelier-worker` program.

use std::process::ExitCode;

use clap::Parser;
use tracing_subscriber::EnvFilter;
use worker::{Args, Config};

/// Holds parts of text-to-image models and runs their stages for an Atelier coordinator.
#[derive(Parser)]
#[command(name = "atelier-worker", version)]
struct Cli {
    #[command(flatten)]
    args: Args,
}

fn main() -> ExitCode {
    kernels::memory::keep_freed_pages();
    let args = Cli::parse().args;
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info"));
    telemetry::log::start(args.log_format, filter);
    let ended = Config::try_from(args).map_err(|error| error.to_string()).and_then(|config| {
        let runtime = tokio::runtime::Runtime::new().map_err(|error| format!("could not start the runtime: {error}"))?;
        let ended = runtime.block_on(async {
            let exporting = telemetry::start_export("atelier-worker", |name| std::env::var(name).ok());
            exporting.map_err(|error| with_source(&error))?;
            let ended = worker::run(config, worker::signals::stop()).await;
            // What is left is sent, or is not.
            drop(tokio::task::spawn_blocking(telemetry::flush).await);
            ended.map_err(|error| with_source(&error))
        });
        // A rank's thread in the middle of a step is not waited for.
        runtime.shutdown_background();
        ended
    });
    match ended {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!(error, "the worker failed");
            ExitCode::FAILURE
        }
    }
}

fn with_source(error: &dyn std::error::Error) -> String {
    match error.source() {
        Some(source) => format!("{error}: {source}"),
        None => error.to_string(),
    }
}
