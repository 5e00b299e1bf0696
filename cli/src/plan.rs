//! `atelier plan`: what a model needs on each rank of a layout, and whether it fits.
//!
//! Nothing is computed: every rank's loading code runs against the checkpoint's headers and counts the bytes it would take.

use std::path::PathBuf;

use clap::Args;
use models::blocks::Layout;
use models::model_dir::ModelDir;
use models::registry;

use crate::error::Error;

#[derive(Debug, Args)]
pub(crate) struct PlanArgs {
    /// A model's directory (diffusers' layout).
    path: PathBuf,
    /// The component to cut. Default: all, each with the same layout as far as it can be cut.
    #[arg(long)]
    component: Option<String>,
    /// Tensor parallel degree.
    #[arg(long, default_value_t = 1)]
    tp: usize,
    /// Block ranges.
    #[arg(long, default_value_t = 1)]
    block_ranges: usize,
    /// Memory of each worker's device, in GiB. Default: this machine's.
    #[arg(long)]
    memory: Option<f64>,
}

pub(crate) fn run(args: &PlanArgs) -> Result<(), Error> {
    let dir = ModelDir::open(&args.path)?;
    let card = registry::describe(&dir)?;
    let memory = args.memory.map_or_else(machine_memory, |gib| (gib * f64::from(1 << 30)) as u64);
    println!("{} ({}), weights are held as f32", card.family, card.pipeline_class);
    println!("{:<16} {:<22} {:>5} {:>12} {:>12}  fits {:.1} GiB", "component", "layout", "rank", "reads", "holds", gib(memory));
    for component in card.components.iter().filter(|c| args.component.as_ref().is_none_or(|name| *name == c.name)) {
        let layout = if args.component.is_some() {
            check(component, args)?
        } else {
            // As far as this component can be cut.
            let tp = if component.tp_options.contains(&args.tp) { args.tp } else { 1 };
            Layout::new(tp, args.block_ranges.min(component.max_block_ranges))
        };
        for (rank, need) in registry::measure(&dir, &component.name, layout)?.into_iter().enumerate() {
            let cut = format!("tp={} block_ranges={}", layout.tp, layout.block_ranges);
            let fits = if need.held_bytes <= memory { "yes" } else { "NO" };
            println!(
                "{:<16} {cut:<22} {rank:>5} {:>12} {:>12}  {fits}",
                component.name,
                mib(need.read_bytes),
                mib(need.held_bytes)
            );
        }
    }
    println!("Activations come on top: a few times batch x tokens x width x 4 bytes.");
    Ok(())
}

fn check(component: &models::card::ComponentCard, args: &PlanArgs) -> Result<Layout, Error> {
    if !component.tp_options.contains(&args.tp) {
        let reason = format!("{} can be cut by {:?}", component.name, component.tp_options);
        return Err(Error::Flag { flag: "--tp", reason });
    }
    if args.block_ranges == 0 || args.block_ranges > component.max_block_ranges {
        let reason = format!("{} can be cut into 1 to {}", component.name, component.max_block_ranges);
        return Err(Error::Flag { flag: "--block-ranges", reason });
    }
    Ok(Layout::new(args.tp, args.block_ranges))
}

/// Bytes of memory of this machine; 0 if it does not say.
fn machine_memory() -> u64 {
    let text = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let kib = text.lines().find_map(|l| l.strip_prefix("MemTotal:")?.trim().strip_suffix("kB")?.trim().parse::<u64>().ok());
    kib.unwrap_or_default() * 1024
}

fn gib(bytes: u64) -> f64 {
    bytes as f64 / f64::from(1 << 30)
}

fn mib(bytes: u64) -> String {
    format!("{:.2} MiB", bytes as f64 / f64::from(1 << 20))
}
