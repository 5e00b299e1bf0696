//! What an adapter says of itself, checked against the model it is for before any job may name it.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use super::Part;
use super::file::AdapterFile;
use super::mapping::{Sites, changes};
use crate::card::{Card, DEFAULTS_FILE};
use crate::model_dir::{ModelDir, read_json};
use crate::{Error, Result, registry};

/// What an adapter may want for the jobs that use it: few-step adapters are made for one number of steps and for no guidance.
pub const DEFAULTS: [&str; 4] = ["num_inference_steps", "true_cfg_scale", "guidance_scale", "shift"];
/// Longest reason: the card of a model with many adapters is one message.
const MAX_PROBLEM_CHARS: usize = 1000;

/// An adapter that is to be served.
#[derive(Clone, Debug, PartialEq)]
pub struct Registered {
    /// What jobs call it.
    pub name: String,
    /// Its file, or a folder with it.
    pub path: PathBuf,
    /// Defaults for the jobs that use it, before those of the `atelier.json` beside its file.
    pub defaults: BTreeMap<String, f64>,
}

/// An adapter as read from its file.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct AdapterCard {
    /// What jobs call it.
    pub name: String,
    /// sha256 of the file, in hex.
    pub digest: String,
    /// Bytes of the file.
    pub bytes: u64,
    /// The components it changes.
    pub components: Vec<String>,
    /// Taken when neither the job nor another of its adapters says otherwise.
    pub defaults: BTreeMap<String, f64>,
    /// Why it cannot be used; empty when it can.
    pub problem: String,
}

/// Reads adapters for the model in `dir`. One that cannot be used says why; the others are well.
///
/// # Errors
/// When the model's own layers cannot be listed.
pub fn describe(dir: &ModelDir, card: &Card, registered: &[Registered]) -> Result<Vec<AdapterCard>> {
    if registered.is_empty() {
        return Ok(Vec::new());
    }
    let names = card.components.iter().map(|component| component.name.as_str()).filter(|name| Part::of(name).is_some());
    let sites = names.map(|name| registry::sites(dir, name)).collect::<Result<Vec<_>>>()?;
    let each = registered.iter().map(|adapter| {
        let failed = |error: Error| {
            let problem = error.to_string().chars().take(MAX_PROBLEM_CHARS).collect();
            AdapterCard { problem, ..AdapterCard::default() }
        };
        let card = one(card, &sites, adapter).unwrap_or_else(failed);
        AdapterCard { name: adapter.name.clone(), ..card }
    });
    Ok(each.collect())
}

fn one(card: &Card, sites: &[Sites], adapter: &Registered) -> Result<AdapterCard> {
    let file = AdapterFile::open(&adapter.path)?;
    let changes = changes(&file, sites, false)?;
    let mut components: Vec<String> = changes.into_iter().map(|change| change.component).collect();
    components.dedup(); // they are in the order of the components
    let beside = file.path().parent().unwrap_or(Path::new(".")).join(DEFAULTS_FILE);
    let mut defaults: BTreeMap<String, f64> = if beside.is_file() { read_json(&beside)? } else { BTreeMap::new() };
    defaults.extend(adapter.defaults.clone());
    check_defaults(card, &adapter.path, &defaults)?;
    let (digest, bytes) = (file.digest().to_owned(), file.byte_size());
    Ok(AdapterCard { digest, bytes, components, defaults, ..AdapterCard::default() })
}

fn check_defaults(card: &Card, path: &Path, defaults: &BTreeMap<String, f64>) -> Result<()> {
    for (name, value) in defaults {
        let bad = |reason: &str| Err(super::bad(path, format!("default `{name}` = {value}: {reason}")));
        if !DEFAULTS.contains(&name.as_str()) {
            return bad(&format!("an adapter may set {}", DEFAULTS.join(", ")));
        }
        match card.parameters.iter().find(|parameter| parameter.name == *name) {
            None => return bad("the model has no such parameter"),
            Some(bounds) if !(bounds.minimum..=bounds.maximum).contains(value) => return bad("is outside the model's bounds"),
            Some(bounds) if bounds.multiple_of > 0.0 && value % bounds.multiple_of != 0.0 => {
                return bad(&format!("is not a multiple of {}", bounds.multiple_of));
            }
            Some(_) => {}
        }
    }
    Ok(())
}
