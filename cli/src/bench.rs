//! `atelier bench`: how close this machine's cluster is to what the machine can do.

mod load;
mod queue;
mod table;

use clap::{Args, Subcommand};

use crate::error::Error;

#[derive(Debug, Args)]
pub(crate) struct BenchArgs {
    #[command(subcommand)]
    what: What,
}

#[derive(Debug, Subcommand)]
enum What {
    /// Submits, watchers and a deep queue against a coordinator with stand-in workers.
    Load(load::LoadArgs),
}

pub(crate) async fn run(args: BenchArgs) -> Result<(), Error> {
    match args.what {
        What::Load(args) => load::run(args).await,
    }
}
