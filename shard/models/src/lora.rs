//! Adapters (LoRA) of a model: their files, whose keys name layers in the style of whoever trained them, and what a rank holds
//! of them.
//!
//! A network knows nothing of this: its layers are sites by their full names ([`parallel::lora`]), and a file's keys are mapped to
//! those names, one file a style ([`peft`], [`processors`], [`kohya`], [`flux_original`], [`sgm`]). A worker checks a file against all of a model's sites
//! before it is offered ([`card`]); a rank reads its slice when a job first needs it ([`store`]).

use serde::{Deserialize, Serialize};

use crate::Error;
use crate::request::Lora;

pub mod card;
pub mod file;
pub mod flux_original;
pub mod kohya;
pub mod mapping;
pub mod peft;
pub mod processors;
pub mod sgm;
pub mod store;

/// Most adapters of one job: each costs two small products a layer.
pub const MAX_PER_JOB: usize = 8;

/// Consecutive items (dimension 0) of a forward, and the adapters that are active on each.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Share {
    /// How many items.
    pub items: usize,
    /// By name, with the bits of the scale: numbers as text need not come back as they were.
    loras: Vec<(String, u64)>,
}

impl Share {
    /// `items` items with these adapters.
    pub fn new(items: usize, loras: &[Lora]) -> Self {
        Self { items, loras: loras.iter().map(|lora| (lora.name.clone(), lora.scale.to_bits())).collect() }
    }

    /// The adapters and their scales, in the order in which they are added.
    pub fn loras(&self) -> impl Iterator<Item = (&str, f64)> {
        self.loras.iter().map(|(name, bits)| (name.as_str(), f64::from_bits(*bits)))
    }

    /// Whether an adapter takes part.
    pub fn names(&self, name: &str) -> bool {
        self.loras.iter().any(|(n, _)| n == name)
    }

    /// Whether none takes part.
    pub fn is_plain(&self) -> bool {
        self.loras.is_empty()
    }
}

fn unusable(name: &str, reason: impl ToString) -> Error {
    Error::Adapter { name: name.to_owned(), reason: reason.to_string() }
}

/// A part of a model that adapters can change.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Part {
    /// The network that denoises, whatever its folder is called.
    Denoiser,
    /// A text encoder, by its folder.
    TextEncoder(String),
}

impl Part {
    /// What a component is to adapters; `None`: they do not change it (autoencoders).
    pub fn of(component: &str) -> Option<Self> {
        match component {
            "transformer" | "unet" => Some(Part::Denoiser),
            _ if component.starts_with("text_encoder") => Some(Part::TextEncoder(component.to_owned())),
            _ => None,
        }
    }
}

/// What is wrong with a file, named by its path.
fn bad(path: &std::path::Path, reason: impl Into<String>) -> Error {
    Error::ModelDir { path: path.to_owned(), reason: reason.into() }
}

/// The first few of a list of keys, and how many there are more.
fn listed(keys: &[String]) -> String {
    const SHOWN: usize = 8;
    const KEY_CHARS: usize = 120;
    let key = |key: &String| format!("`{}`", key.chars().take(KEY_CHARS).collect::<String>());
    let shown: Vec<String> = keys.iter().take(SHOWN).map(key).collect();
    let more = keys.len().saturating_sub(SHOWN);
    if more == 0 { shown.join(", ") } else { format!("{} and {more} more", shown.join(", ")) }
}
