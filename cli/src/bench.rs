//! `atelier bench`: how close this machine's cluster is to what the machine can do.

mod gpu;
mod load;
mod model;
mod queue;
mod ranks;
mod speed;
mod synthetic;
mod table;

use clap::Subcommand;

use crate::error::Error;

#[derive(Debug, Subcommand)]
pub(crate) enum BenchCommand {
    /// One row for each operation and shape of FLUX.1: its speed, the limit, the ratio.
    Kernels(speed::KernelsArgs),
    /// The check-list for a GPU: golden pictures, attention, a step of FLUX.1 beside the device's limit, two devices together.
    Gpu(gpu::GpuArgs),
    /// A forward of a published network with untrained weights, whole or some of its blocks: time beside the limit, memory beside the plan.
    Model(model::ModelArgs),
    /// Durable submits, watchers and a deep queue, against a coordinator with stand-in workers.
    Load(load::LoadArgs),
    /// The streams of `load`.
    #[command(hide = true)]
    Watching(load::watching::WatchingArgs),
}

impl BenchCommand {
    /// Whether this process works on tensors.
    pub(crate) fn computes(&self) -> bool {
        !matches!(self, Self::Load(_) | Self::Watching(_))
    }
}

pub(crate) async fn run(command: BenchCommand) -> Result<(), Error> {
    match command {
        BenchCommand::Kernels(args) => speed::run(&args),
        BenchCommand::Gpu(args) => gpu::run(&args),
        BenchCommand::Model(args) => model::run(&args),
        BenchCommand::Load(args) => load::run(args).await,
        BenchCommand::Watching(args) => load::watching::run(args).await,
    }
}
