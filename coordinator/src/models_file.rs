//! `models.toml`: what is served, as data. Unknown keys are refused, and an error names file, line and field.
//!
//! What only a model's card can tell (which components there are, which cuts fit) is checked when the card is known,
//! in [`crate::placement`].

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
};

use proto::v1::{AdapterDefault, AdapterFile, ControlFolder, Layout, Products};
use serde::Deserialize;
use toml::Spanned;

use crate::error::{Error, Result};

/// Pictures in one forward pass when models.toml does not say: more gains little on one device and costs memory.
pub const DEFAULT_MAX_BATCH: u32 = 4;
/// Jobs at once in the denoise engine when models.toml does not say.
pub const DEFAULT_MAX_JOBS: u32 = 16;
/// The largest `max_batch` and `max_jobs`: beyond it, it is a typing error.
pub const MAX_ENGINE_JOBS: u32 = 1024;
/// The largest number of replicas of one component.
pub const MAX_REPLICAS: u32 = 1024;
/// Tensor-parallel degrees: divisors of the eight chunks that sums are cut into, whatever the degree.
pub const TP_DEGREES: [u32; 4] = [1, 2, 4, 8];
/// The largest number of block ranges.
pub const MAX_BLOCK_RANGES: u32 = 64;
/// The largest number of lanes: classifier-free guidance has two passes, three with a layer skipped; more serve other jobs.
pub const MAX_CFG_PARALLEL: u32 = 8;
/// Most ranks of one group; workers refuse more.
pub const MAX_GROUP_RANKS: u64 = 64;
/// The longest name of a model.
pub const MAX_NAME_CHARS: usize = 64;
/// The most adapters of one model: its card travels in one message.
pub const MAX_ADAPTERS: usize = 256;
/// The most control networks of one model: all are held at once.
pub const MAX_CONTROLS: usize = 16;
/// What a model is multiplied in when models.toml does not say.
pub const DEFAULT_PRODUCTS: Products = Products::F32;
/// What was a label of workers before it was a setting of models.
const PRODUCTS_LABEL: &str = "products";

/// A model to serve.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelConfig {
    /// What jobs call it.
    pub name: String,
    /// Its directory, on every worker.
    pub path: PathBuf,
    /// The directory of the model that goes on with its latents, on every worker.
    pub refiner: Option<PathBuf>,
    /// Most pictures in one forward pass.
    pub max_batch: u32,
    /// Most jobs at once in the denoise engine.
    pub max_jobs: u32,
    /// What all its components are multiplied in.
    pub products: Products,
    /// How its components are held; one that is not here gets the default.
    pub components: BTreeMap<String, ComponentConfig>,
    /// The adapters that its jobs may name.
    pub adapters: Vec<AdapterConfig>,
    /// The control networks that its jobs may name.
    pub controls: Vec<ControlConfig>,
}

impl ModelConfig {
    /// Its directory and its refiner's, as workers are told; empty: it has none.
    pub fn paths(&self) -> [String; 2] {
        let said = |path: Option<&PathBuf>| path.map(|path| path.to_string_lossy().into_owned()).unwrap_or_default();
        [said(Some(&self.path)), said(self.refiner.as_ref())]
    }
}

/// An adapter (LoRA) that jobs may name.
#[derive(Debug, Clone, PartialEq)]
pub struct AdapterConfig {
    /// What jobs call it.
    pub name: String,
    /// Its file, or a folder with it, on every worker.
    pub path: PathBuf,
    /// What it wants for the jobs that use it.
    pub defaults: BTreeMap<String, f64>,
}

impl AdapterConfig {
    /// Where it is, as workers are told.
    pub fn file(&self) -> AdapterFile {
        AdapterFile {
            name: self.name.clone(),
            path: self.path.to_string_lossy().into_owned(),
            defaults: self.defaults.iter().map(|(name, value)| AdapterDefault { name: name.clone(), value: *value }).collect(),
            ..AdapterFile::default()
        }
    }
}

/// A control network (ControlNet, T2I-Adapter) that jobs may name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ControlConfig {
    /// What jobs call it.
    pub name: String,
    /// Its folder, on every worker.
    pub path: PathBuf,
}

impl ControlConfig {
    /// Where it is, as workers are told.
    pub fn folder(&self) -> ControlFolder {
        ControlFolder { name: self.name.clone(), path: self.path.to_string_lossy().into_owned(), ..ControlFolder::default() }
    }
}

/// How a component is held.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ComponentConfig {
    /// Tensor-parallel degree.
    pub tp: u32,
    /// Number of block ranges.
    pub block_ranges: u32,
    /// How many times a group holds it, so that several forwards of a denoiser are done side by side.
    pub cfg_parallel: u32,
    /// How many groups hold it, at most: each has workers of its own, and one without enough of them waits for more.
    pub replicas: u32,
    /// Labels a worker must have, all of them.
    pub workers: BTreeMap<String, String>,
    /// A worker may hold several ranks of one group, and of several.
    pub colocate: bool,
}

impl Default for ComponentConfig {
    fn default() -> Self {
        Self { tp: 1, block_ranges: 1, cfg_parallel: 1, replicas: 1, workers: BTreeMap::new(), colocate: false }
    }
}

impl ComponentConfig {
    /// How it is cut.
    pub fn layout(&self) -> Layout {
        Layout { tp: self.tp, block_ranges: self.block_ranges, cfg_parallel: self.cfg_parallel }
    }
}

/// Reads models.toml.
pub fn read(path: &Path) -> Result<Vec<ModelConfig>> {
    let text = fs::read_to_string(path).map_err(Error::io(format!("read {}", path.display())))?;
    let folder = match path.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder,
        _ => Path::new("."),
    };
    let folder = fs::canonicalize(folder).map_err(Error::io(format!("resolve {}", folder.display())))?;
    parse(&text, path, &folder)
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    #[serde(default)]
    model: Vec<Spanned<Model>>,
    #[serde(default)]
    adapter: Vec<Spanned<Adapter>>,
    #[serde(default)]
    control: Vec<Spanned<Control>>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Control {
    name: String,
    path: PathBuf,
    models: Vec<String>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Adapter {
    name: String,
    path: PathBuf,
    models: Vec<String>,
    #[serde(default)]
    defaults: BTreeMap<String, f64>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Model {
    name: String,
    path: PathBuf,
    refiner: Option<PathBuf>,
    #[serde(default = "default_max_batch")]
    max_batch: u32,
    #[serde(default = "default_max_jobs")]
    max_jobs: u32,
    products: Option<String>,
    #[serde(default)]
    components: BTreeMap<String, ComponentConfig>,
}

fn default_max_batch() -> u32 {
    DEFAULT_MAX_BATCH
}

fn default_max_jobs() -> u32 {
    DEFAULT_MAX_JOBS
}

/// Reads the text of the models.toml at `path`; relative paths in it begin at `folder`.
///
/// # Errors
/// With file, line and field.
pub fn parse(text: &str, path: &Path, folder: &Path) -> Result<Vec<ModelConfig>> {
    let error = |offset: usize, problem: String| Error::ModelsFile {
        path: path.to_owned(),
        line: text.as_bytes().iter().take(offset).filter(|byte| **byte == b'\n').count() + 1,
        problem,
    };
    let file: File = toml::from_str(text).map_err(|e| error(e.span().map_or(0, |span| span.start), e.message().to_owned()))?;

    let mut names = BTreeSet::new();
    let mut models = Vec::new();
    for entry in file.model {
        let offset = entry.span().start;
        let model = entry.into_inner();
        check(&model).map_err(|problem| error(offset, problem))?;
        let products = products(&model).map_err(|problem| error(offset, problem))?;
        if !names.insert(model.name.clone()) {
            return Err(error(offset, format!("model.name = {:?}: another model has this name", model.name)));
        }
        models.push(ModelConfig {
            path: folder.join(model.path),
            refiner: model.refiner.map(|refiner| folder.join(refiner)),
            name: model.name,
            max_batch: model.max_batch,
            max_jobs: model.max_jobs,
            products,
            components: model.components,
            adapters: Vec::new(),
            controls: Vec::new(),
        });
    }
    for entry in file.adapter {
        let offset = entry.span().start;
        add_adapter(entry.into_inner(), folder, &mut models).map_err(|problem| error(offset, problem))?;
    }
    for entry in file.control {
        let offset = entry.span().start;
        add_control(entry.into_inner(), folder, &mut models).map_err(|problem| error(offset, problem))?;
    }
    Ok(models)
}

/// Gives a control network to the models that it names.
fn add_control(control: Control, folder: &Path, models: &mut [ModelConfig]) -> Result<(), String> {
    let name = &control.name;
    for model in named("control", name, &control.models, models)? {
        if model.controls.iter().any(|other| other.name == *name) {
            return Err(format!("control.name = {name:?}: model {:?} has another control of this name", model.name));
        }
        if model.controls.len() == MAX_CONTROLS {
            return Err(format!("control {name:?}: model {:?} has {MAX_CONTROLS} controls already", model.name));
        }
        model.controls.push(ControlConfig { name: name.clone(), path: folder.join(&control.path) });
    }
    Ok(())
}

/// The models that the `what` of this name is for.
fn named<'a>(
    what: &str,
    name: &str,
    wanted: &[String],
    models: &'a mut [ModelConfig],
) -> Result<Vec<&'a mut ModelConfig>, String> {
    if !is_name(name) {
        return Err(format!("{what}.name = {name:?}: must be 1 to {MAX_NAME_CHARS} of a-z 0-9 . _ -"));
    }
    if wanted.is_empty() {
        return Err(format!("{what} {name:?}: models: must name at least one"));
    }
    let known = |wanted: &&String| models.iter().any(|model| model.name == **wanted);
    if let Some(nobody) = wanted.iter().find(|wanted| !known(wanted)) {
        return Err(format!("{what} {name:?}: models: no model is named {nobody:?}"));
    }
    Ok(models.iter_mut().filter(|model| wanted.contains(&model.name)).collect())
}

/// Gives an adapter to the models that it names.
fn add_adapter(adapter: Adapter, folder: &Path, models: &mut [ModelConfig]) -> Result<(), String> {
    let name = &adapter.name;
    if let Some((default, value)) = adapter.defaults.iter().find(|(_, value)| !value.is_finite()) {
        return Err(format!("adapter {name:?}: defaults.{default} = {value}: must be a finite number"));
    }
    for model in named("adapter", name, &adapter.models, models)? {
        if model.adapters.iter().any(|other| other.name == *name) {
            return Err(format!("adapter.name = {name:?}: model {:?} has another adapter of this name", model.name));
        }
        if model.adapters.len() == MAX_ADAPTERS {
            return Err(format!("adapter {name:?}: model {:?} has {MAX_ADAPTERS} adapters already", model.name));
        }
        let config = AdapterConfig { name: name.clone(), path: folder.join(&adapter.path), defaults: adapter.defaults.clone() };
        model.adapters.push(config);
    }
    Ok(())
}

/// Whether this can be a model's or an adapter's name: nothing that could be a path.
pub fn is_name(name: &str) -> bool {
    let legal = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || "._-".contains(c);
    !name.is_empty() && name.len() <= MAX_NAME_CHARS && name.chars().all(legal)
}

fn check(model: &Model) -> Result<(), String> {
    let name = &model.name;
    if !is_name(name) {
        return Err(format!("model.name = {name:?}: must be 1 to {MAX_NAME_CHARS} of a-z 0-9 . _ -"));
    }
    for (field, value) in [("max_batch", model.max_batch), ("max_jobs", model.max_jobs)] {
        if !(1..=MAX_ENGINE_JOBS).contains(&value) {
            return Err(format!("model {name:?}: {field} = {value}: must be 1 to {MAX_ENGINE_JOBS}"));
        }
    }
    for (component, config) in &model.components {
        check_component(config).map_err(|problem| format!("model {name:?}: components.{component}.{problem}"))?;
    }
    Ok(())
}

fn products(model: &Model) -> Result<Products, String> {
    let Some(given) = &model.products else {
        return Ok(DEFAULT_PRODUCTS);
    };
    let unknown = || {
        let known = Products::ALL.map(Products::name).join(", ");
        format!("model {:?}: products = {given:?}: must be one of {known}", model.name)
    };
    Products::of_name(given).ok_or_else(unknown)
}

fn check_component(config: &ComponentConfig) -> Result<(), String> {
    if let Some(given) = config.workers.get(PRODUCTS_LABEL) {
        let instead = "it is a setting of the model, for all its components";
        return Err(format!("workers.{PRODUCTS_LABEL}: {instead}: write `products = {given:?}` under its [[model]]"));
    }
    if !TP_DEGREES.contains(&config.tp) {
        return Err(format!("tp = {}: must be one of 1, 2, 4, 8", config.tp));
    }
    for (field, value, most) in [
        ("block_ranges", config.block_ranges, MAX_BLOCK_RANGES),
        ("cfg_parallel", config.cfg_parallel, MAX_CFG_PARALLEL),
        ("replicas", config.replicas, MAX_REPLICAS),
    ] {
        if !(1..=most).contains(&value) {
            return Err(format!("{field} = {value}: must be 1 to {most}"));
        }
    }
    let ranks = config.layout().ranks();
    if ranks > MAX_GROUP_RANKS {
        return Err(format!("tp * block_ranges * cfg_parallel = {ranks}: must be at most {MAX_GROUP_RANKS}"));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse_text(text: &str) -> Result<Vec<ModelConfig>> {
        parse(text, Path::new("models.toml"), Path::new("/srv"))
    }

    fn problem(text: &str) -> String {
        parse_text(text).unwrap_err().to_string()
    }

    #[test]
    fn a_model_needs_only_a_name_and_a_path() {
        let models = parse_text("[[model]]\nname = \"emoji\"\npath = \"bundled/emoji\"\n").unwrap();
        assert_eq!(models[0].path, Path::new("/srv/bundled/emoji"));
        assert_eq!((models[0].max_batch, models[0].max_jobs), (4, 16));
    }

    #[test]
    fn a_component_is_cut_as_written() {
        let text = "[[model]]\nname = \"emoji\"\npath = \"/m\"\n[model.components.transformer]\ntp = 2\nblock_ranges = 2\n\
                    workers = { role = \"denoiser\" }\ncolocate = true\n";
        let transformer = parse_text(text).unwrap()[0].components["transformer"].clone();
        assert_eq!((transformer.tp, transformer.block_ranges, transformer.replicas), (2, 2, 1));
        assert_eq!(transformer.workers["role"], "denoiser");
        assert!(transformer.colocate);
    }

    #[test]
    fn an_unknown_field_is_refused_by_file_line_and_name() {
        let problem = problem("[[model]]\nname = \"emoji\"\npath = \"x\"\nmax_bach = 4\n");
        assert!(problem.starts_with("models.toml:4: unknown field `max_bach`"), "{problem}");
    }

    #[test]
    fn an_unknown_field_of_a_component_is_refused_by_line() {
        let problem = problem("[[model]]\nname = \"e\"\npath = \"x\"\n[model.components.vae]\nreplica = 2\n");
        assert!(problem.starts_with("models.toml:5: unknown field `replica`"), "{problem}");
    }

    #[test]
    fn a_wrong_degree_names_model_and_field() {
        let problem = problem("[[model]]\nname = \"emoji\"\npath = \"x\"\n[model.components.transformer]\ntp = 3\n");
        let expected = "models.toml:1: model \"emoji\": components.transformer.tp = 3: must be one of 1, 2, 4, 8";
        assert_eq!(problem, expected);
    }

    #[test]
    fn a_model_is_multiplied_in_what_it_says_and_in_f32_otherwise() {
        let model = |line: &str| format!("[[model]]\nname = \"emoji\"\npath = \"x\"\n{line}");
        let products = |line: &str| parse_text(&model(line)).unwrap()[0].products;
        assert_eq!(products(""), Products::F32);
        for way in Products::ALL {
            assert_eq!(products(&format!("products = \"{way}\"\n")), way);
        }
        let unknown = problem(&model("products = \"fp8\"\n"));
        assert_eq!(unknown, "models.toml:1: model \"emoji\": products = \"fp8\": must be one of f32, bf16, amx, int8");
        let label = problem(&model("[model.components.transformer]\nworkers = { products = \"amx\" }\n"));
        assert!(label.starts_with("models.toml:1: model \"emoji\": components.transformer.workers.products: "), "{label}");
        assert!(label.ends_with("write `products = \"amx\"` under its [[model]]"), "{label}");
    }

    #[test]
    fn an_adapter_goes_to_the_models_it_names() {
        let models = "[[model]]\nname = \"emoji\"\npath = \"x\"\n[[model]]\nname = \"other\"\npath = \"y\"\n";
        let adapter = "[[adapter]]\nname = \"pixel\"\npath = \"loras/pixel.safetensors\"\nmodels = [\"emoji\"]\n";
        let read = parse_text(&format!("{models}{adapter}[adapter.defaults]\nnum_inference_steps = 8\n")).unwrap();
        let expected = AdapterConfig {
            name: "pixel".into(),
            path: "/srv/loras/pixel.safetensors".into(),
            defaults: [("num_inference_steps".to_owned(), 8.0)].into(),
        };
        assert_eq!((read[0].adapters.as_slice(), read[1].adapters.len()), (&[expected][..], 0));
        let wrong = |text: &str, part: &str| {
            let problem = problem(&format!("{models}{text}"));
            assert!(problem.starts_with("models.toml:") && problem.contains(part), "{problem}");
        };
        wrong(&adapter.replace("pixel\"\n", "../pixel\"\n"), "adapter.name = \"../pixel\"");
        wrong(&adapter.replace("[\"emoji\"]", "[\"nobody\"]"), "no model is named \"nobody\"");
        wrong(&adapter.replace("[\"emoji\"]", "[]"), "models: must name at least one");
        wrong(&format!("{adapter}scale = 1\n"), "unknown field `scale`");
        wrong(&format!("{adapter}{adapter}"), "another adapter of this name");
    }

    #[test]
    fn a_control_network_goes_to_the_models_it_names() {
        let models = "[[model]]\nname = \"emoji\"\npath = \"x\"\n[[model]]\nname = \"other\"\npath = \"y\"\n";
        let control = "[[control]]\nname = \"canny\"\npath = \"nets/canny\"\nmodels = [\"emoji\"]\n";
        let read = parse_text(&format!("{models}{control}")).unwrap();
        let expected = ControlConfig { name: "canny".into(), path: "/srv/nets/canny".into() };
        assert_eq!((read[0].controls.as_slice(), read[1].controls.len()), (&[expected][..], 0));
        let wrong = |text: &str, part: &str| {
            let problem = problem(&format!("{models}{text}"));
            assert!(problem.starts_with("models.toml:") && problem.contains(part), "{problem}");
        };
        wrong(&control.replace("canny\"\np", "../canny\"\np"), "control.name = \"../canny\"");
        wrong(&control.replace("[\"emoji\"]", "[\"nobody\"]"), "no model is named \"nobody\"");
        wrong(&format!("{control}scale = 1\n"), "unknown field `scale`");
        wrong(&format!("{control}{control}"), "another control of this name");
    }

    #[test]
    fn a_group_has_few_lanes_and_ranks() {
        let cut = |cut: &str| format!("[[model]]\nname = \"emoji\"\npath = \"x\"\n[model.components.transformer]\n{cut}\n");
        let lanes = parse_text(&cut("tp = 2\nblock_ranges = 2\ncfg_parallel = 2")).unwrap()[0].components["transformer"].layout();
        assert_eq!((lanes.to_string().as_str(), lanes.ranks()), ("tp2x2xcfg2", 8));
        for lanes in [0, 9] {
            let problem = problem(&cut(&format!("cfg_parallel = {lanes}")));
            assert!(problem.ends_with(&format!("transformer.cfg_parallel = {lanes}: must be 1 to 8")), "{problem}");
        }
        let problem = problem(&cut("tp = 8\nblock_ranges = 8\ncfg_parallel = 2"));
        assert!(problem.ends_with("tp * block_ranges * cfg_parallel = 128: must be at most 64"), "{problem}");
    }

    #[test]
    fn names_are_plain_and_unique() {
        assert!(problem("[[model]]\nname = \"Emoji\"\npath = \"x\"\n").contains("model.name = \"Emoji\""));
        let twice = "[[model]]\nname = \"e\"\npath = \"x\"\n[[model]]\nname = \"e\"\npath = \"y\"\n";
        assert_eq!(problem(twice), "models.toml:4: model.name = \"e\": another model has this name");
    }
}
