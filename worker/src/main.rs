//! The `atelier-worker` program.

use std::process::ExitCode;

use clap::Parser;
use tracing_subscriber::EnvFilter;
use worker::config::LogFormat;
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
    start_log(args.log_format);
    let ended = Config::try_from(args).map_err(|error| error.to_string()).and_then(|config| {
        let runtime = tokio::runtime::Runtime::new().map_err(|error| format!("could not start the runtime: {error}"))?;
        let ended = runtime.block_on(worker::run(config, worker::signals::stop()));
        // A rank's thread in the middle of a step is not waited for.
        runtime.shutdown_background();
        ended.map_err(|error| match std::error::Error::source(&error) {
            Some(source) => format!("{error}: {source}"),
            None => error.to_string(),
        })
    });
    match ended {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!(error, "the worker failed");
            ExitCode::FAILURE
        }
    }
}

fn start_log(format: LogFormat) {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info"));
    let log = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    match format {
        LogFormat::Text => log.init(),
        LogFormat::Json => log.json().init(),
    }
}
