//! Which class of a checkpoint is which code: the one list to extend for a new family.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use parallel::weights::Measured;
use parallel::{Collective, DType, Device, Weights};

use crate::block_runner::{BlockRunner, Follower};
use crate::blocks::{BlockModel, Layout, RankGroup};
use crate::card::Card;
use crate::control::{ControlSource, Controlled, OpenControls};
use crate::lora::mapping::Sites;
use crate::lora::store::{AdapterStore, Sources};
use crate::model_dir::ModelDir;
use crate::stage::Stage;
use crate::{
    Error, Result, checkpoint_names, deepfloyd_if, dit, flux, hunyuan, lama, pixart, qwen_image, sd3, stable_diffusion,
    stable_diffusion_xl,
};

/// The components that denoise: control networks are held beside them.
const DENOISERS: [&str; 2] = ["unet", "transformer"];

/// A rank with its weights.
pub enum Rank {
    /// Rank 0: holds the tasks.
    Leader(Box<dyn Stage>),
    /// Any other rank: does the forwards it is handed.
    Follower(Follower),
}

impl Rank {
    /// A rank of a group that holds `model` together; its leader runs the stage that is made with them.
    pub(crate) fn of(
        mut model: Box<dyn BlockModel>,
        group: RankGroup,
        stage: impl FnOnce(BlockRunner) -> Result<Box<dyn Stage>>,
    ) -> Result<Self> {
        if group.controls().are_held() {
            model = Box::new(Controlled::new(model, group.controls().clone()));
        }
        if group.is_leader() {
            return stage(BlockRunner::new(model, group)).map(Self::Leader);
        }
        Ok(Self::Follower(Follower::new(model, group)))
    }
}

/// What a rank needs in order to load.
#[derive(Debug)]
pub struct LoadSpec<'a> {
    /// The model.
    pub dir: &'a ModelDir,
    /// The component to hold.
    pub component: &'a str,
    /// This rank's place in the group.
    pub group: RankGroup,
    /// Where to compute.
    pub device: Device,
    /// Limits of the denoise engine.
    pub limits: Limits,
}

/// Limits of the stages a group runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Pictures in one forward pass. A job of more pictures than this still goes, alone.
    pub max_batch: usize,
    /// Jobs denoised at once; more wait their turn.
    pub max_jobs: usize,
    /// Bytes of prompt embeddings kept for prompts that come again.
    pub prompt_cache_bytes: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self { max_batch: 4, max_jobs: 16, prompt_cache_bytes: 256 << 20 }
    }
}

/// How far a rank is with its weights.
#[derive(Clone, Debug)]
pub struct LoadProgress {
    /// Bytes read so far, of each of its checkpoints.
    read: Vec<Arc<AtomicU64>>,
    /// About how many there will be: a checkpoint's bytes over the ranks that hold it once.
    pub total: u64,
}

impl LoadProgress {
    /// Of one checkpoint.
    pub fn new(read: Arc<AtomicU64>, total: u64) -> Self {
        Self { read: vec![read], total }
    }

    /// Bytes read so far.
    pub fn read(&self) -> u64 {
        self.read.iter().map(|read| read.load(Ordering::Relaxed)).sum()
    }

    /// The same, with another checkpoint.
    fn with(mut self, weights: &Weights, ranks: u64) -> Self {
        self.read.push(weights.bytes_read());
        self.total += weights.total_bytes() / ranks;
        self
    }
}

/// Says what the model in `dir` is, by what it holds: reads every byte of it once.
///
/// # Errors
/// When its class is of no family here, or a part of it is not supported.
pub fn describe(dir: &ModelDir) -> Result<Card> {
    let mut card = outline(dir)?;
    for component in &mut card.components {
        component.fingerprint = dir.fingerprint(&component.name)?;
    }
    Ok(Card { digest: dir.digest()?, ..card })
}

/// The same, from its configurations alone: the digest and the fingerprints are empty.
pub fn outline(dir: &ModelDir) -> Result<Card> {
    if let Some(refiner) = dir.refiner().filter(|_| !stable_diffusion_xl::CLASSES.contains(&dir.pipeline_class())) {
        let value = format!("{} of {}", refiner.pipeline_class(), dir.pipeline_class());
        return Err(Error::Unsupported { field: "refiner".into(), value });
    }
    match dir.pipeline_class() {
        class if deepfloyd_if::CLASSES.contains(&class) => deepfloyd_if::describe(dir),
        class if dit::CLASSES.contains(&class) => dit::describe(dir),
        class if flux::CLASSES.contains(&class) => flux::describe(dir),
        class if hunyuan::CLASSES.contains(&class) => hunyuan::describe(dir),
        class if lama::CLASSES.contains(&class) => lama::describe(dir),
        class if pixart::CLASSES.contains(&class) => pixart::describe(dir),
        class if qwen_image::CLASSES.contains(&class) => qwen_image::describe(dir),
        class if sd3::CLASSES.contains(&class) => sd3::describe(dir),
        class if stable_diffusion::CLASSES.contains(&class) => stable_diffusion::describe(dir),
        class if stable_diffusion_xl::CLASSES.contains(&class) => stable_diffusion_xl::describe(dir),
        other => Err(unknown(other)),
    }
}

/// Loads one rank of one component, telling `on_open` how to watch.
///
/// # Errors
/// When the component does not exist, cannot be cut so, or its checkpoint is not what its configuration says.
pub fn load(spec: LoadSpec<'_>, on_open: &mut dyn FnMut(LoadProgress)) -> Result<Rank> {
    load_with(spec, Sources::default(), &[], on_open)
}

/// As [`load`], with adapters and control networks that jobs may name. No adapter is read before a job needs it; control networks are read at once.
///
/// # Errors
/// As [`load`], and [`Error::Control`] with the first that cannot be held.
pub fn load_with(
    spec: LoadSpec<'_>,
    adapters: Sources,
    controls: &[ControlSource],
    on_open: &mut dyn FnMut(LoadProgress),
) -> Result<Rank> {
    let LoadSpec { dir, component, mut group, device, limits } = spec;
    let controls = if DENOISERS.contains(&component) { controls } else { &[] };
    let (dir, own_name) = dir.part(component);
    // Adapters and control networks are the base model's. Jobs name them to the refiner's network too, which has its components' names.
    let adapters = if own_name == component { adapters } else { adapters.changing_nothing() };
    let component = own_name;
    let path = dir.require(component)?.path;
    let weights = open(dir, &path, group.tensor.clone(), &device)?;
    let ranks = group.layout().lane_ranks() as u64;
    let mut progress = LoadProgress::new(weights.bytes_read(), weights.total_bytes() / ranks);
    let controls = OpenControls::open(controls, &group, &device)?;
    for (_, weights) in controls.weights() {
        progress = progress.with(weights, group.layout().tp as u64);
    }
    on_open(progress);
    group = group.with_controls(controls.load()?);
    if !adapters.named.is_empty() {
        let store = AdapterStore::new(weights.adapters().clone(), sites(dir, component)?, adapters);
        group = group.with_adapters(Arc::new(store));
    }
    let group = group.on(device.clone());
    load_from(LoadSpec { dir, component, group, device, limits }, &weights)
}

/// The layers of a component that adapters can change, over all ranks. Reads no weights.
///
/// # Errors
/// As [`load`].
pub fn sites(dir: &ModelDir, component: &str) -> Result<Sites> {
    let (_, weights) = measured(dir, component, RankGroup::placeholder(0, Layout::SOLO))?;
    let sites = Sites::new(component, weights.adapters().sites());
    Ok(if dir.component("text_encoder_3").is_none() { sites.without_third_text_encoder() } else { sites })
}

/// A component's checkpoint by the names that its model has here, whatever it was stored under.
///
/// # Errors
/// When it is not one.
pub fn open(dir: &ModelDir, path: &Path, group: Arc<dyn Collective>, device: &Device) -> Result<Weights> {
    let names = |name: &str, shape: &[usize]| checkpoint_names::names(dir.pipeline_class(), name, shape);
    Ok(Weights::open_as(path, group, DType::F32, device, &names)?)
}

/// A rank's loading code, run without reading.
fn measured(dir: &ModelDir, component: &str, group: RankGroup) -> Result<(Rank, Weights)> {
    let (dir, component) = dir.part(component);
    let path = dir.require(component)?.path;
    let weights = open(dir, &path, group.tensor.clone(), &Device::Cpu)?.measuring();
    let rank = load_from(LoadSpec { dir, component, group, device: Device::Cpu, limits: Limits::default() }, &weights)?;
    Ok((rank, weights))
}

/// What one rank needs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Need {
    /// Bytes it reads from the checkpoint.
    pub read_bytes: u64,
    /// Bytes of weights it holds afterwards.
    pub held_bytes: u64,
    /// What it reads of each tensor, by name.
    pub tensors: BTreeMap<String, Measured>,
}

impl Need {
    fn of(weights: &Weights) -> Self {
        let read_bytes = weights.bytes_read().load(Ordering::Relaxed);
        Self { read_bytes, held_bytes: weights.bytes_held(), tensors: weights.measured() }
    }

    /// Of [`Self::read_bytes`] those of tensors that every rank of its range reads whole.
    pub fn whole_bytes(&self) -> u64 {
        self.tensors.values().filter(|tensor| tensor.whole).map(|tensor| tensor.bytes).sum()
    }
}

/// What each rank of a component would need, in rank order, by running its loading code without reading.
pub fn measure(dir: &ModelDir, component: &str, layout: Layout) -> Result<Vec<Need>> {
    measure_with(dir, component, &[], layout)
}

/// The same of a component with its control networks, whose tensors are under their names.
pub fn measure_with(dir: &ModelDir, component: &str, controls: &[ControlSource], layout: Layout) -> Result<Vec<Need>> {
    let controls = if DENOISERS.contains(&component) { controls } else { &[] };
    let rank = |rank: usize| {
        let group = RankGroup::placeholder(rank, layout);
        let (_, weights) = measured(dir, component, group.clone())?;
        let mut need = Need::of(&weights);
        let controls = OpenControls::open(controls, &group, &Device::Cpu)?.measuring();
        controls.load()?;
        for (name, weights) in controls.weights() {
            let Need { read_bytes, held_bytes, tensors } = Need::of(weights);
            need.read_bytes += read_bytes;
            need.held_bytes += held_bytes;
            need.tensors.extend(tensors.into_iter().map(|(tensor, measured)| (format!("{name}/{tensor}"), measured)));
        }
        Ok(need)
    };
    (0..layout.ranks()).map(rank).collect()
}

fn load_from(spec: LoadSpec<'_>, weights: &Weights) -> Result<Rank> {
    match spec.dir.pipeline_class() {
        class if deepfloyd_if::CLASSES.contains(&class) => deepfloyd_if::load(spec, weights),
        class if dit::CLASSES.contains(&class) => dit::load(spec, weights),
        class if flux::CLASSES.contains(&class) => flux::load(spec, weights),
        class if hunyuan::CLASSES.contains(&class) => hunyuan::load(spec, weights),
        class if lama::CLASSES.contains(&class) => lama::load(spec, weights),
        class if pixart::CLASSES.contains(&class) => pixart::load(spec, weights),
        class if qwen_image::CLASSES.contains(&class) => qwen_image::load(spec, weights),
        class if sd3::CLASSES.contains(&class) => sd3::load(spec, weights),
        class if stable_diffusion::CLASSES.contains(&class) => stable_diffusion::load(spec, weights),
        class if stable_diffusion_xl::CLASSES.contains(&class) => stable_diffusion_xl::load(spec, weights),
        other => Err(unknown(other)),
    }
}

fn unknown(class: &str) -> Error {
    Error::Unsupported { field: "model_index.json: _class_name".into(), value: class.into() }
}

impl std::fmt::Debug for Rank {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Rank::Leader(_) => "Leader",
            Rank::Follower(_) => "Follower",
        })
    }
}
