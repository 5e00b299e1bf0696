//! `atelier bench gpu`: the check-list for the first run on a GPU. What was never run on one is run there, each point with what
//! it is held against; with `--device cpu` the same list on the processor, small.
//!
//! Order: golden cases (is it right?), attention by blocks (is it the plain formula?), one step of FLUX.1 beside the device's own limit (is it
//! fast?), then two devices together: the same numbers, and how fast they add up.

mod golden;
mod measure;
mod pair;
mod report;

use std::path::PathBuf;

use clap::Args;
use parallel::device::Place;
use parallel::{Device, Error as DeviceError};

use super::synthetic::flux::Flux;
use super::synthetic::{Checkpoint, Format};
use crate::error::Error;
use report::{Check, Report};

/// FLUX.1's own width and a picture of 1024 x 1024, or what a processor does in a moment.
const TRUE: Flux = Flux { blocks: [1, 1], heads: 24, text_width: 4096, grid: 64, text_tokens: 512 };
const SMALL: Flux = Flux { blocks: [1, 1], heads: 2, text_width: 256, grid: 8, text_tokens: 16 };

#[derive(Debug, Args)]
pub(crate) struct GpuArgs {
    /// Where to compute: cuda:N, or cpu for the same list on the processor, small.
    #[arg(long, default_value = "cuda:0")]
    device: Place,
    /// The second device, for what takes two. Default: the next one.
    #[arg(long)]
    peer: Option<Place>,
    /// A folder of golden cases (tests/golden of the sources).
    #[arg(long, env = "GOLDEN_DIR")]
    golden: Option<PathBuf>,
    /// On the processor too at FLUX.1's true width: minutes, and 5 GiB of memory.
    #[arg(long)]
    full: bool,
    /// Write one JSON object a line.
    #[arg(long)]
    json: bool,
}

/// Where the list is done.
struct Bench {
    device: Device,
    on_cpu: bool,
    scale: Flux,
}

pub(super) fn run(args: &GpuArgs) -> Result<(), Error> {
    // Nothing else is taken in the place of a device that is not there.
    let device = args.device.open().map_err(models::Error::from)?;
    let on_cpu = args.device == Place::Cpu;
    let bench = Bench { device, on_cpu, scale: if on_cpu && !args.full { SMALL } else { TRUE } };
    let mut report = Report::new(args.json, args.device);
    golden::run(&bench, args.golden.as_deref(), &mut report);
    report.take("attention by blocks", measure::attention(&bench));
    let model = Checkpoint::write(bench.scale, Format::Bf16, &std::env::temp_dir(), &mut |_, _| ());
    match &model {
        Ok(model) => report.take("one step of FLUX.1", measure::step(&bench, model)),
        Err(error) => report.add(Check::fail("one step of FLUX.1", error.to_string())),
    }
    match (second(args), &model) {
        (Ok(peer), Ok(model)) => {
            report.take("tp 2 equals tp 1", pair::equivalence(&bench, &peer, model));
            report.take("all_reduce of two", pair::all_reduce(&bench, &peer));
        }
        (Err(reason), _) => {
            for what in ["tp 2 equals tp 1", "all_reduce of two"] {
                report.add(Check::not_run(what, format!("it takes two devices: {reason}")));
            }
        }
        (Ok(_), Err(error)) => report.add(Check::fail("two devices", error.to_string())),
    }
    report.finish()
}

/// The second device: a GPU of its own, since two ranks of NCCL may not share one. A device that was asked for by name must be there.
fn second(args: &GpuArgs) -> Result<Device, DeviceError> {
    let next = match args.device {
        Place::Cpu => Place::Cpu,
        Place::Cuda { ordinal } => Place::Cuda { ordinal: ordinal + 1 },
    };
    args.peer.unwrap_or(next).open()
}
