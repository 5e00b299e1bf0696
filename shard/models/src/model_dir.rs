//! A model's directory, as diffusers lays it out: `model_index.json` and one folder per component.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use parallel::weights::checkpoint_files;
use serde::de::DeserializeOwned;
use serde_json::Value;
use sha2::{Digest, Sha256};

use crate::{Error, Result};

pub(crate) mod fingerprint;

/// Longest configuration that is read; published ones have a few kilobytes.
const MAX_CONFIG_BYTES: u64 = 4 << 20;
/// Most files of a directory, and how deep they may lie. Links that lead round in a circle end here.
const MAX_FILES: usize = 10_000;
const MAX_DEPTH: usize = 8;

const INDEX: &str = "model_index.json";
const SCHEDULER: &str = "scheduler";

/// The component of a model with a refiner that the refiner's network is.
pub const REFINER: &str = "refiner";

/// Where a model is.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Location {
    /// Its directory.
    pub path: PathBuf,
    /// The directory of the model that goes on with its latents, if there is one.
    pub refiner: Option<PathBuf>,
}

impl Location {
    /// A model by itself.
    pub fn of(path: impl Into<PathBuf>) -> Self {
        Self { path: path.into(), refiner: None }
    }

    /// Reads the `model_index.json` of each.
    ///
    /// # Errors
    /// As [`ModelDir::open`].
    pub fn open(&self) -> Result<ModelDir> {
        let dir = ModelDir::open(&self.path)?;
        let refiner = self.refiner.as_deref().map(ModelDir::open).transpose()?;
        Ok(ModelDir { refiner: refiner.map(Box::new), ..dir })
    }
}

/// A model's directory.
#[derive(Clone, Debug)]
pub struct ModelDir {
    root: PathBuf,
    refiner: Option<Box<ModelDir>>,
    pipeline_class: String,
    /// `(library, class name)` by component.
    components: BTreeMap<String, (String, String)>,
    /// What else the index says.
    settings: BTreeMap<String, Value>,
}

/// One component's folder.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ComponentDir {
    /// The folder.
    pub path: PathBuf,
    /// Library and class name, such as `("transformers", "T5EncoderModel")`.
    pub class: (String, String),
}

impl ModelDir {
    /// Reads `model_index.json`.
    ///
    /// # Errors
    /// When it is missing or is not one; the error names the file and the field.
    pub fn open(root: &Path) -> Result<Self> {
        let path = root.join(INDEX);
        let index: BTreeMap<String, Value> = read_json(&path)?;
        let class = index.get("_class_name").and_then(Value::as_str);
        let pipeline_class = class.ok_or_else(|| bad(&path, "`_class_name` is missing or not a string"))?.to_owned();
        let (mut components, mut settings) = (BTreeMap::new(), BTreeMap::new());
        for (name, value) in &index {
            // [null, null] is a component that this model does without.
            let Some(pair) = value.as_array().filter(|_| !name.starts_with('_')) else {
                settings.insert(name.clone(), value.clone());
                continue;
            };
            if pair.len() == 2 && pair.iter().all(Value::is_null) {
                continue;
            }
            let [Value::String(library), Value::String(class)] = pair.as_slice() else {
                return Err(bad(&path, format!("`{name}` is not a pair of library and class")));
            };
            if name.is_empty() || name.contains(['/', '\\']) || name.starts_with('.') {
                return Err(bad(&path, format!("`{name}` is not a plain folder name")));
            }
            components.insert(name.clone(), (library.clone(), class.clone()));
        }
        Ok(Self { root: root.to_owned(), refiner: None, pipeline_class, components, settings })
    }

    /// The directory.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// The model that goes on with this one's latents.
    pub fn refiner(&self) -> Option<&ModelDir> {
        self.refiner.as_deref()
    }

    /// Whose a component is, and what it is called there: the refiner's network is that model's `unet`.
    pub fn part<'a>(&'a self, component: &'a str) -> (&'a ModelDir, &'a str) {
        match self.refiner() {
            Some(refiner) if component == REFINER => (refiner, "unet"),
            _ => (self, component),
        }
    }

    /// The reference's pipeline class, such as `FluxPipeline`.
    pub fn pipeline_class(&self) -> &str {
        &self.pipeline_class
    }

    /// A setting of the pipeline, if the index has it.
    pub fn setting(&self, name: &str) -> Option<&Value> {
        self.settings.get(name)
    }

    /// The names of all components.
    pub fn components(&self) -> impl Iterator<Item = &str> {
        self.components.keys().map(String::as_str)
    }

    /// A component, if the model has it.
    pub fn component(&self, name: &str) -> Option<ComponentDir> {
        let class = self.components.get(name)?.clone();
        Some(ComponentDir { path: self.root.join(name), class })
    }

    /// A component that the model cannot do without.
    pub fn require(&self, name: &str) -> Result<ComponentDir> {
        self.component(name).ok_or_else(|| bad(&self.root.join(INDEX), format!("it names no component `{name}`")))
    }

    /// A component's `config.json`.
    pub fn config<T: DeserializeOwned>(&self, component: &str) -> Result<T> {
        read_json(&self.require(component)?.path.join("config.json"))
    }

    /// The noise scheduler's `scheduler_config.json`, which must be `class`'s: another's steps are others.
    ///
    /// # Errors
    /// [`Error::Unsupported`] when the index or the file names another class; and those of [`read_json`].
    pub fn scheduler_config<T: DeserializeOwned>(&self, class: &str) -> Result<T> {
        let scheduler = self.require(SCHEDULER)?;
        let path = scheduler.path.join("scheduler_config.json");
        let config: Value = read_json(&path)?;
        let own = config.get("_class_name").map(|name| name.as_str().map_or_else(|| name.to_string(), str::to_owned));
        for (file, found) in [(INDEX, Some(scheduler.class.1)), ("scheduler_config.json: _class_name", own)] {
            if let Some(value) = found.filter(|found| found != class) {
                return Err(Error::Unsupported { field: format!("{SCHEDULER} ({file})"), value });
            }
        }
        serde_json::from_value(config).map_err(|e| bad(&path, e.to_string()))
    }

    /// The noise scheduler's class and `scheduler_config.json`, for families that have several.
    ///
    /// # Errors
    /// [`Error::Unsupported`] when the file is another class's than the index says; and those of [`read_json`].
    pub fn scheduler_file(&self) -> Result<(String, Value)> {
        let scheduler = self.require(SCHEDULER)?;
        let path = scheduler.path.join("scheduler_config.json");
        let config: Value = read_json(&path)?;
        let class = scheduler.class.1;
        match config.get("_class_name").filter(|own| *own != class.as_str()) {
            None => Ok((class, config)),
            Some(own) => Err(Error::Unsupported {
                field: format!("{SCHEDULER} (scheduler_config.json: _class_name)"),
                value: own.to_string(),
            }),
        }
    }

    /// Bytes of a component's weight files.
    pub fn weight_bytes(&self, component: &str) -> Result<u64> {
        let size = |path: PathBuf| Ok(std::fs::metadata(&path).map_err(io(&path))?.len());
        checkpoint_files(&self.require(component)?.path)?.into_iter().map(size).sum()
    }

    /// sha256, in hex, over the relative name and the sha256 of every file, in the order of their names. Hidden files and
    /// folders (a download tool's notes) do not count. Reads everything once: seconds per gigabyte.
    ///
    /// Of a model with a refiner it is that of both such digests.
    pub fn digest(&self) -> Result<String> {
        let own = digest_of(&self.root)?;
        let Some(refiner) = self.refiner() else { return Ok(own) };
        Ok(hex(&Sha256::new().chain_update(own).chain_update(refiner.digest()?).finalize()))
    }
}

/// As [`ModelDir::digest`], of any folder.
pub(crate) fn digest_of(folder: &Path) -> Result<String> {
    let mut files = BTreeMap::new();
    list_files(folder, "", 0, &mut files)?;
    let mut digest = Sha256::new();
    for (name, path) in files {
        digest.update((name.len() as u64).to_le_bytes());
        digest.update(name.as_bytes());
        digest.update(hash_file(&path)?);
    }
    Ok(hex(&digest.finalize()))
}

/// Reads a JSON file of limited size into `T`; keys that `T` does not have are ignored. Minus infinity, which is no JSON and which Python
/// writes all the same (diffusers' `lambda_min_clipped`), is null.
///
/// # Errors
/// When it cannot be read or does not fit; the error names the file and the field.
pub fn read_json<T: DeserializeOwned>(path: &Path) -> Result<T> {
    let text = String::from_utf8(read_limited(path)?).map_err(|e| bad(path, e.to_string()))?;
    serde_json::from_str(&text.replace(": -Infinity", ": null")).map_err(|e| bad(path, e.to_string()))
}

fn read_limited(path: &Path) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    let file = File::open(path).map_err(io(path))?;
    file.take(MAX_CONFIG_BYTES + 1).read_to_end(&mut bytes).map_err(io(path))?;
    if bytes.len() as u64 > MAX_CONFIG_BYTES {
        return Err(bad(path, format!("it has more than {MAX_CONFIG_BYTES} bytes")));
    }
    Ok(bytes)
}

fn list_files(dir: &Path, prefix: &str, depth: usize, files: &mut BTreeMap<String, PathBuf>) -> Result<()> {
    if depth > MAX_DEPTH || files.len() > MAX_FILES {
        return Err(bad(dir, format!("a model has at most {MAX_FILES} files and {MAX_DEPTH} levels of folders")));
    }
    for entry in std::fs::read_dir(dir).map_err(io(dir))? {
        let path = entry.map_err(io(dir))?.path();
        let name = path.file_name().and_then(|name| name.to_str());
        let name = name.ok_or_else(|| bad(&path, "its name is not UTF-8"))?;
        if name.starts_with('.') {
            continue;
        }
        let relative = format!("{prefix}{name}");
        // Follows links: a download cache keeps the files elsewhere.
        if std::fs::metadata(&path).map_err(io(&path))?.is_dir() {
            list_files(&path, &format!("{relative}/"), depth + 1, files)?;
        } else {
            files.insert(relative, path);
        }
    }
    Ok(())
}

fn hash_file(path: &Path) -> Result<[u8; 32]> {
    let mut file = File::open(path).map_err(io(path))?;
    let mut buffer = vec![0; 1 << 20];
    let mut digest = Sha256::new();
    loop {
        match file.read(&mut buffer).map_err(io(path))? {
            0 => return Ok(digest.finalize().into()),
            n => digest.update(&buffer[..n]),
        }
    }
}

pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn bad(path: &Path, reason: impl Into<String>) -> Error {
    Error::ModelDir { path: path.to_owned(), reason: reason.into() }
}

fn io(path: &Path) -> impl Fn(std::io::Error) -> Error + '_ {
    move |source| Error::ModelDir { path: path.to_owned(), reason: format!("could not be read: {source}") }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn model(index: &str) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join(INDEX), index).unwrap();
        dir
    }

    const FLUX: &str = r#"{"_class_name": "FluxPipeline", "_diffusers_version": "0.30", "vae": ["diffusers", "AutoencoderKL"],
        "image_encoder": [null, null], "requires_safety_checker": true}"#;

    #[test]
    fn components_are_the_pairs_that_are_not_null() {
        let dir = model(FLUX);
        std::fs::create_dir(dir.path().join("vae")).unwrap();
        std::fs::write(dir.path().join("vae/config.json"), r#"{"a": 1, "more": {}}"#).unwrap();
        let model = ModelDir::open(dir.path()).unwrap();
        assert_eq!((model.pipeline_class(), model.components().collect::<Vec<_>>()), ("FluxPipeline", vec!["vae"]));
        let vae = model.component("vae").unwrap();
        assert_eq!((vae.path, vae.class.1.as_str()), (dir.path().join("vae"), "AutoencoderKL"));
        assert_eq!(model.config::<BTreeMap<String, Value>>("vae").unwrap()["a"], 1);
        assert!(model.component("image_encoder").is_none());
        assert!(model.config::<Value>("transformer").unwrap_err().to_string().contains("`transformer`"));
    }

    #[test]
    fn a_scheduler_of_another_class_is_refused_by_name_wherever_it_is_named() {
        const EULER: &str = "FlowMatchEulerDiscreteScheduler";
        const UNIPC: &str = "UniPCMultistepScheduler";
        let read = |index: &str, config: &str| {
            let dir = model(&format!(r#"{{"_class_name": "X", "scheduler": ["diffusers", "{index}"]}}"#));
            std::fs::create_dir(dir.path().join("scheduler")).unwrap();
            std::fs::write(dir.path().join("scheduler/scheduler_config.json"), config).unwrap();
            ModelDir::open(dir.path()).unwrap().scheduler_config::<BTreeMap<String, Value>>(EULER)
        };
        let named = |class: &str| format!(r#"{{"_class_name": "{class}", "shift": 3.0}}"#);
        assert_eq!(read(EULER, &named(EULER)).unwrap()["shift"], 3.0);
        assert!(read(EULER, "{}").is_ok(), "the index names it");
        for (index, config) in [(UNIPC, named(EULER)), (EULER, named(UNIPC)), (UNIPC, "{}".into())] {
            let Err(Error::Unsupported { field, value }) = read(index, &config) else { panic!("{index} with {config}") };
            assert!(field.starts_with("scheduler") && value == UNIPC, "{field} = {value}");
        }
        assert!(read(EULER, r#"{"_class_name": 7}"#).is_err());
    }

    #[test]
    fn a_malformed_index_is_named_with_its_field() {
        let cases = [
            ("{", "EOF"),
            ("[]", "map"),
            ("{}", "`_class_name`"),
            (r#"{"_class_name": "X", "vae": ["one"]}"#, "`vae`"),
            (r#"{"_class_name": "X", "../up": ["a", "b"]}"#, "`../up`"),
        ];
        for (index, field) in cases {
            let dir = model(index);
            let error = ModelDir::open(dir.path()).unwrap_err();
            assert!(matches!(error, Error::ModelDir { .. }));
            assert!(error.to_string().contains(INDEX) && error.to_string().contains(field), "{index}: {error}");
        }
        assert!(matches!(ModelDir::open(Path::new("/nowhere")), Err(Error::ModelDir { .. })));
    }

    #[test]
    fn the_digest_sees_names_and_contents_but_no_hidden_files() {
        let dir = model(FLUX);
        let digest = || ModelDir::open(dir.path()).unwrap().digest().unwrap();
        std::fs::create_dir(dir.path().join("vae")).unwrap();
        std::fs::write(dir.path().join("vae/a"), "1").unwrap();
        let first = digest();
        assert_eq!((first.len(), first == digest()), (64, true));
        std::fs::write(dir.path().join(".notes"), "x").unwrap();
        assert_eq!(digest(), first);
        std::fs::write(dir.path().join("vae/a"), "2").unwrap();
        assert_ne!(digest(), first);
        std::fs::remove_file(dir.path().join("vae/a")).unwrap();
        std::fs::write(dir.path().join("vae/b"), "1").unwrap();
        assert_ne!(digest(), first);
    }
}
