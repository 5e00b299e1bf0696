//! `atelier bench model`: one forward of a published network at its true width, on ranks that are threads of this process, each with
//! threads of its own. Weights are untrained; every other figure is as it would be.

use std::path::PathBuf;
use std::thread;

use clap::Args;
use indicatif::{ProgressBar, ProgressStyle};
use models::blocks::{Layout, RankGroup};
use models::unet_2d_condition::UNet2DConditionConfig;
use parallel::Device;
use parallel::ops::Products;
use parallel::ops::kernels::blocks::BlockType;
use parallel::ops::kernels::gemm::Order;
use parallel::ops::kernels::limit;

use self::forwards::{Work, forwards};
use self::memory::Memory;
use super::synthetic::flux::{self, Flux};
use super::synthetic::t5::{self, T5};
use super::synthetic::unet::{self, UNet};
use super::synthetic::vae::Vae;
use super::synthetic::{Checkpoint, Format, Network};
use super::table::{Row, print};
use crate::error::Error;

mod forwards;
mod memory;

const MIB: f64 = (1 << 20) as f64;

#[derive(Debug, Args)]
pub(crate) struct ModelArgs {
    /// The network.
    #[arg(long, value_enum, default_value_t = Family::Flux)]
    family: Family,
    /// Of FLUX.1: blocks of two streams, of 19. Of T5: blocks, of 24.
    #[arg(long)]
    blocks: Option<usize>,
    /// Of FLUX.1: blocks of one stream, of 38.
    #[arg(long)]
    single_blocks: Option<usize>,
    /// What its weights are stored and held as.
    #[arg(long, value_enum, default_value_t = Format::Bf16)]
    weights: Format,
    /// What layers whose weights are not f32 multiply in, and attention: `f32`, `bf16` or `int8`.
    #[arg(long, default_value_t = Products::F32)]
    products: Products,
    /// A side of the picture in pixels; 16 of them are one token.
    #[arg(long, default_value_t = 512)]
    side: usize,
    /// Tokens of the text.
    #[arg(long, default_value_t = 512)]
    text_tokens: usize,
    /// Ranks that divide every layer.
    #[arg(long, default_value_t = 1)]
    tp: usize,
    /// Ranges of blocks, one after the other: as many times the ranks.
    #[arg(long, default_value_t = 1)]
    block_ranges: usize,
    /// Jobs in flight; with ranges, each has a forward of another one.
    #[arg(long, default_value_t = 1)]
    jobs: usize,
    /// Threads of each rank. Default: the machine's, divided by the ranks.
    #[arg(long)]
    threads: Option<usize>,
    /// Forwards of each job; the best counts, or with ranges or jobs the average from the first output to the last.
    #[arg(long, default_value_t = 2)]
    steps: usize,
    /// Where the weights are written for the time of the run. Default: the system's folder of temporary files.
    #[arg(long)]
    folder: Option<PathBuf>,
    /// Write one JSON object a line.
    #[arg(long)]
    json: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Family {
    /// FLUX.1's transformer, 12 billion weights in 19 + 38 blocks.
    Flux,
    /// T5-XXL's encoder, 4.7 billion weights in 24 blocks.
    T5,
    /// FLUX.1's autoencoder, decoding a picture.
    Vae,
    /// Stable Diffusion 1.5's U-Net, 0.86 billion weights.
    Sd15,
    /// Stable Diffusion XL's U-Net, 2.6 billion weights.
    Sdxl,
}

pub(super) fn run(args: &ModelArgs) -> Result<(), Error> {
    let flag = |flag, reason: &str| Err(Error::Flag { flag, reason: reason.to_owned() });
    if ![1, 2, 4, 8].contains(&args.tp) {
        return flag("--tp", "must be 1, 2, 4 or 8");
    }
    if args.side < 16 || !args.side.is_multiple_of(16) || args.side > 4096 {
        return flag("--side", "must be a multiple of 16, 16 to 4096");
    }
    if !(1..=4096).contains(&args.text_tokens) {
        return flag("--text-tokens", "must be 1 to 4096");
    }
    let network_ranges = match args.family {
        Family::Flux => args.blocks.unwrap_or(flux::BLOCKS[0]) + args.single_blocks.unwrap_or(flux::BLOCKS[1]),
        Family::T5 => args.blocks.unwrap_or(t5::BLOCKS),
        Family::Vae => 1,
        Family::Sd15 => unet::sd15().blocks(),
        Family::Sdxl => unet::sdxl().blocks(),
    };
    if !(1..=network_ranges.min(8)).contains(&args.block_ranges) {
        return flag("--block-ranges", "must be 1 to 8, and no more than there are blocks");
    }
    if !(1..=64).contains(&args.jobs) {
        return flag("--jobs", "must be 1 to 64");
    }
    if args.block_ranges * args.jobs > 1 && args.steps * args.jobs < 2 {
        return flag("--jobs", "of ranges, the time from one output to the next is measured: two forwards at least");
    }
    if args.steps == 0 || args.threads == Some(0) {
        return flag(if args.steps == 0 { "--steps" } else { "--threads" }, "must be at least 1");
    }
    let products = |reason: String| Error::Flag { flag: "--products", reason };
    args.products.check(&Device::Cpu).map_err(|error| products(error.to_string()))?;
    if matches!(args.products, Products::Bf16 | Products::Amx) && args.weights == Format::F32 {
        return Err(products(format!("{} needs weights that are not f32: see --weights", args.products)));
    }
    if args.products == Products::Int8 && matches!(args.weights, Format::F32 | Format::Bf16) {
        return Err(products("int8 needs weights in blocks: see --weights".into()));
    }
    match args.family {
        Family::Flux => {
            let blocks = [args.blocks.unwrap_or(flux::BLOCKS[0]), args.single_blocks.unwrap_or(flux::BLOCKS[1])];
            if blocks.iter().zip(flux::BLOCKS).any(|(held, all)| *held > all) || blocks == [0, 0] {
                return flag("--blocks", "FLUX.1 has 19 blocks of two streams and 38 of one; at least one is needed");
            }
            let grid = args.side / 16;
            let name = format!("FLUX.1, {} + {} blocks, {} tokens", blocks[0], blocks[1], grid * grid + args.text_tokens);
            measure(args, name, Flux { blocks, heads: 24, text_width: 4096, grid, text_tokens: args.text_tokens })
        }
        Family::T5 => {
            let blocks = args.blocks.unwrap_or(t5::BLOCKS);
            if !(1..=t5::BLOCKS).contains(&blocks) {
                return flag("--blocks", "T5-XXL has 24; at least one is needed");
            }
            if args.single_blocks.is_some() {
                return flag("--single-blocks", "T5 has none");
            }
            let name = format!("T5-XXL, {blocks} blocks, {} tokens", args.text_tokens);
            measure(args, name, T5 { blocks, tokens: args.text_tokens })
        }
        Family::Vae => {
            if args.blocks.or(args.single_blocks).is_some() {
                return flag("--blocks", "an autoencoder has none to leave out");
            }
            if args.tp != 1 {
                return flag("--tp", "every rank holds an autoencoder whole: 1");
            }
            measure(args, format!("FLUX.1's autoencoder, decoding {0} x {0}", args.side), Vae { side: args.side })
        }
        Family::Sd15 => measure_unet(args, "1.5", unet::sd15()),
        Family::Sdxl => measure_unet(args, "XL", unet::sdxl()),
    }
}

fn measure_unet(args: &ModelArgs, version: &str, config: UNet2DConditionConfig) -> Result<(), Error> {
    let flag = |flag, reason: String| Err(Error::Flag { flag, reason });
    if args.blocks.or(args.single_blocks).is_some() {
        return flag("--blocks", "a U-Net has none to leave out".into());
    }
    let multiple = 8 * config.multiple();
    if !args.side.is_multiple_of(multiple) {
        return flag("--side", format!("must be a multiple of {multiple} for this network"));
    }
    if !config.shares().is_multiple_of(args.tp) {
        return flag("--tp", format!("must divide {}, what its heads and groups have in common", config.shares()));
    }
    measure(args, format!("Stable Diffusion {version}'s U-Net, {0} x {0}", args.side), UNet { config, side: args.side })
}

fn measure<N: Network>(args: &ModelArgs, name: String, network: N) -> Result<(), Error> {
    let folder = args.folder.clone().unwrap_or_else(std::env::temp_dir);
    let bar = bytes_bar("writing weights");
    let checkpoint = Checkpoint::write(network, args.weights, &folder, &mut |done, all| {
        bar.set_length(all);
        bar.set_position(done);
    })?;
    bar.finish_and_clear();
    let layout = Layout::new(args.tp, args.block_ranges);
    // Convolutions are held as they are multiplied.
    let planned = args.products.scope(|| planned(&checkpoint, layout))?;
    let most = || match args.products {
        Products::F32 => limit::gflops(),
        Products::Bf16 => limit::gflops_bf16(Order::Pairs),
        Products::Amx => limit::gflops_bf16(Order::Tiles),
        Products::Int8 => limit::gops_int8(if args.weights == Format::Q4K { BlockType::Q4K } else { BlockType::Q8_0 }),
    };
    let limit_before = most();
    let memory = Memory::watch();
    let before = memory.now();
    let threads = threads(args);
    let ran = forwards(Work { layout, products: args.products, threads, steps: args.steps, jobs: args.jobs }, &checkpoint)?;
    let peak = memory.peak();
    let gflops = limit_before.max(most());
    let reached = checkpoint.network.flops() / ran.forward.as_secs_f64() / 1e9;
    let weights: u64 = planned.iter().sum();
    print(
        &[
            Row::new(
                format!("{name}: a forward"),
                ran.forward.as_secs_f64(),
                "s",
                format!("{layout}, {threads} threads each, {} in flight", args.jobs),
            ),
            Row::new(
                "reached",
                reached,
                "GFLOP/s",
                format!("{:.2} of {gflops:.1}, the limit of all threads in {}", reached / gflops, args.products),
            ),
            Row::new(
                "weights in memory",
                (ran.loaded.saturating_sub(before)) as f64 / MIB,
                "MiB",
                format!(
                    "{:.3} of the planned {:.1}, all ranks",
                    ran.loaded.saturating_sub(before) as f64 / weights as f64,
                    weights as f64 / MIB
                ),
            ),
            Row::new(
                "at most in memory",
                peak.saturating_sub(before) as f64 / MIB,
                "MiB",
                format!("{:.3} of the planned weights", peak.saturating_sub(before) as f64 / weights as f64),
            ),
            Row::new("page faults", ran.faults as f64, "", format!("in the last of {} steps, all ranks", args.steps)),
        ],
        args.json,
    );
    Ok(())
}

fn threads(args: &ModelArgs) -> usize {
    args.threads
        .unwrap_or_else(|| (thread::available_parallelism().map_or(1, usize::from) / (args.tp * args.block_ranges)).max(1))
}

/// Bytes that each rank is to hold, as `atelier plan` counts them.
fn planned<N: Network>(checkpoint: &Checkpoint<N>, layout: Layout) -> Result<Vec<u64>, Error> {
    let rank = |rank| checkpoint.held(&RankGroup::placeholder(rank, layout));
    Ok((0..layout.ranks()).map(rank).collect::<models::Result<_>>()?)
}

fn bytes_bar(message: &'static str) -> ProgressBar {
    let bar = ProgressBar::new(0).with_style(style("{msg:16} {bar:30} {bytes:>10}/{total_bytes:<10} {elapsed:>4}"));
    bar.set_message(message);
    bar
}

fn style(template: &str) -> ProgressStyle {
    ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar())
}
