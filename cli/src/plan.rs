//! `atelier plan`: what a model needs on each rank of a layout, and whether it fits.
//!
//! Nothing is computed: every rank's loading code runs against the checkpoint's headers and counts the bytes it would take.

use std::path::PathBuf;

use clap::Args;
use models::blocks::Layout;
use models::card::{Card, ComponentCard, StageKind};
use models::control::ControlSource;
use models::control::kind::ControlKind;
use models::model_dir::{Location, ModelDir};
use models::registry;
use parallel::ops::Products;
use serde::Serialize;

use crate::error::Error;

/// Tensor parallel degrees and numbers of lanes that any component can have.
const TP_DEGREES: [usize; 4] = [1, 2, 4, 8];
const MAX_CFG_PARALLEL: usize = coordinator::models_file::MAX_CFG_PARALLEL as usize;

#[derive(Debug, Args)]
pub(crate) struct PlanArgs {
    /// A model's directory (diffusers' layout).
    path: PathBuf,
    /// The directory of the model that goes on with its latents (`refiner` in models.toml).
    #[arg(long)]
    refiner: Option<PathBuf>,
    /// The component to cut. Default: all, each with the same layout as far as it can be cut.
    #[arg(long)]
    component: Option<String>,
    /// Tensor parallel degree.
    #[arg(long, default_value_t = 1)]
    tp: usize,
    /// Block ranges.
    #[arg(long, default_value_t = 1)]
    block_ranges: usize,
    /// Lanes of the component that denoises: how many times it is held whole, to do the passes of guidance side by side.
    #[arg(long, default_value_t = 1)]
    cfg_parallel: usize,
    /// What the model is multiplied in (`products` in models.toml): convolutions are held as they are multiplied.
    #[arg(long, default_value_t = Products::F32)]
    products: Products,
    /// The folder of a control network (ControlNet, T2I-Adapter) that the denoiser's first block range holds as well. May be repeated.
    #[arg(long = "control")]
    controls: Vec<PathBuf>,
    /// Memory of each worker's device, in GiB. Default: this machine's.
    #[arg(long)]
    memory: Option<f64>,
    /// As JSON.
    #[arg(long)]
    json: bool,
}

/// What a model needs.
#[derive(Serialize)]
struct Plan {
    family: String,
    pipeline_class: String,
    /// What it is multiplied in.
    products: String,
    /// Of each rank's device.
    memory_bytes: u64,
    components: Vec<ComponentPlan>,
}

#[derive(Serialize)]
struct ComponentPlan {
    name: String,
    layout: Layout,
    /// Of its weight files.
    stored_bytes: u64,
    ranks: Vec<RankPlan>,
}

#[derive(Serialize)]
struct RankPlan {
    rank: usize,
    /// From the checkpoint.
    reads_bytes: u64,
    /// Of these, tensors that all ranks of its range read whole.
    whole_bytes: u64,
    /// In memory.
    holds_bytes: u64,
    fits: bool,
}

pub(crate) fn run(args: &PlanArgs) -> Result<(), Error> {
    let dir = Location { refiner: args.refiner.clone(), ..Location::of(&args.path) }.open()?;
    let card = registry::outline(&dir)?;
    let memory_bytes = args.memory.map_or_else(machine_memory, |gib| (gib * f64::from(1 << 30)) as u64);
    let controls = controls(&dir, &args.controls)?;
    let components = layouts(&card, args)?.into_iter().map(|(component, layout)| {
        let needs = args.products.scope(|| registry::measure_with(&dir, &component.name, &controls, layout))?;
        let ranks = needs.iter().enumerate().map(|(rank, need)| RankPlan {
            rank,
            reads_bytes: need.read_bytes,
            whole_bytes: need.whole_bytes(),
            holds_bytes: need.held_bytes,
            fits: need.held_bytes <= memory_bytes,
        });
        Ok(ComponentPlan { name: component.name.clone(), layout, stored_bytes: component.weight_bytes, ranks: ranks.collect() })
    });
    let components = components.collect::<Result<_, Error>>()?;
    let (family, pipeline_class) = (card.family.clone(), card.pipeline_class.clone());
    let plan = Plan { family, pipeline_class, products: args.products.to_string(), memory_bytes, components };
    if args.json {
        println!("{}", serde_json::json!(plan));
    } else {
        print(&plan);
    }
    Ok(())
}

/// The control networks in these folders, which are for this model.
fn controls(dir: &ModelDir, folders: &[PathBuf]) -> Result<Vec<ControlSource>, Error> {
    let name = |path: &PathBuf| path.to_string_lossy().into_owned();
    let sources: Vec<_> =
        folders.iter().map(|path| ControlSource { name: name(path), path: path.clone(), fingerprint: String::new() }).collect();
    for path in folders {
        let fits = ControlKind::read(path).and_then(|kind| kind.check_fits(dir));
        fits.map_err(|error| Error::Flag { flag: "--control", reason: format!("{}: {error}", path.display()) })?;
    }
    Ok(sources)
}

fn print(plan: &Plan) {
    let Plan { family, pipeline_class, products, .. } = plan;
    println!(
        "{family} ({pipeline_class}), weights of 16 bits and in blocks are held as stored, others as f32; convolutions in {products}"
    );
    let memory = plan.memory_bytes as f64 / f64::from(1 << 30);
    println!(
        "{:<16} {:<14} {:>4} {:>14} {:>14} {:>14}  fits {memory:.1} GiB",
        "component", "layout", "rank", "reads", "of it whole", "holds"
    );
    for component in &plan.components {
        for rank in &component.ranks {
            println!(
                "{:<16} {:<14} {:>4} {:>14} {:>14} {:>14}  {}",
                component.name,
                component.layout.to_string(),
                rank.rank,
                mib(rank.reads_bytes),
                mib(rank.whole_bytes),
                mib(rank.holds_bytes),
                if rank.fits { "yes" } else { "NO" }
            );
        }
    }
    println!("Activations come on top: a few times batch x tokens x width x 4 bytes.");
}

/// The components that are asked for, each with its layout.
fn layouts<'a>(card: &'a Card, args: &PlanArgs) -> Result<Vec<(&'a ComponentCard, Layout)>, Error> {
    let flag = |flag, reason: String| Error::Flag { flag, reason };
    if !TP_DEGREES.contains(&args.tp) {
        return Err(flag("--tp", format!("{} is none of {TP_DEGREES:?}", args.tp)));
    }
    if args.block_ranges == 0 {
        return Err(flag("--block-ranges", "must be at least 1".into()));
    }
    if !(1..=MAX_CFG_PARALLEL).contains(&args.cfg_parallel) {
        return Err(flag("--cfg-parallel", format!("must be 1 to {MAX_CFG_PARALLEL}")));
    }
    let denoises = |name: &str| card.stages.iter().any(|stage| stage.kind == StageKind::Denoise && stage.component == name);
    let Some(name) = &args.component else {
        let most = card.components.iter().map(|c| c.max_block_ranges).max().unwrap_or(1);
        if args.block_ranges > most {
            return Err(flag("--block-ranges", format!("no component can be cut into more than {most}")));
        }
        // As far as each component can be cut.
        let layout = |component: &ComponentCard| {
            let tp = component.tp_options.iter().copied().filter(|tp| *tp <= args.tp).max().unwrap_or(1);
            let lanes = if denoises(&component.name) { args.cfg_parallel } else { 1 };
            Layout::new(tp, args.block_ranges.min(component.max_block_ranges)).with_cfg_parallel(lanes)
        };
        return Ok(card.components.iter().map(|component| (component, layout(component))).collect());
    };
    let Some(component) = card.components.iter().find(|c| c.name == *name) else {
        let names: Vec<&str> = card.components.iter().map(|c| c.name.as_str()).collect();
        return Err(flag("--component", format!("the model has no `{name}`, only {}", names.join(", "))));
    };
    if !component.tp_options.contains(&args.tp) {
        return Err(flag("--tp", format!("{name} can be cut by {:?}", component.tp_options)));
    }
    if args.block_ranges > component.max_block_ranges {
        return Err(flag("--block-ranges", format!("{name} can be cut into 1 to {}", component.max_block_ranges)));
    }
    if args.cfg_parallel > 1 && !denoises(name) {
        return Err(flag("--cfg-parallel", format!("{name} does not denoise")));
    }
    Ok(vec![(component, Layout::new(args.tp, args.block_ranges).with_cfg_parallel(args.cfg_parallel))])
}

/// Bytes of memory of this machine; 0 if it does not say.
fn machine_memory() -> u64 {
    let text = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let kib = text.lines().find_map(|l| l.strip_prefix("MemTotal:")?.trim().strip_suffix("kB")?.trim().parse::<u64>().ok());
    kib.unwrap_or_default() * 1024
}

fn mib(bytes: u64) -> String {
    format!("{:.2} MiB", bytes as f64 / f64::from(1 << 20))
}
