//! What a control network says of itself, checked against the model it is for before any job may name it.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use parallel::weights::checkpoint_files;

use super::kind::ControlKind;
use super::networks::{ControlSource, OpenControls};
use crate::blocks::RankGroup;
use crate::model_dir::{ModelDir, digest_of, fingerprint};
use crate::{Error, Result};

/// Degrees that any network can be cut into.
const TP_DEGREES: [usize; 4] = [1, 2, 4, 8];
/// Longest reason: a model's card is one message.
const MAX_PROBLEM_CHARS: usize = 1000;

/// A control network that is to be served.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct RegisteredControl {
    /// What jobs call it.
    pub name: String,
    /// Its folder.
    pub path: PathBuf,
}

/// A control network as read from its folder.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ControlCard {
    /// What jobs call it.
    pub name: String,
    /// The reference's class, such as "ControlNetModel".
    pub class: String,
    /// sha256 over every file of the folder, in hex.
    pub digest: String,
    /// sha256 over the names, sizes and samples of its configuration and weights, in hex.
    pub fingerprint: String,
    /// Bytes of its weights as stored.
    pub weight_bytes: u64,
    /// How many kinds of pictures it knows, of which a job must name one; 0: it has no modes.
    pub modes: usize,
    /// Sides of pictures are multiples of this, in pixels.
    pub multiple: usize,
    /// The degrees it can be cut into: it is cut as the denoiser is.
    pub tp_options: Vec<usize>,
    /// How many tensors of each kind it gives: those of a job's controls are added up.
    pub residuals: BTreeMap<&'static str, usize>,
    /// Whether guess mode is anything to it.
    pub guesses: bool,
    /// Why it cannot be used; empty when it can.
    pub problem: String,
}

/// Reads control networks for the model in `dir`, every byte of them once. One that cannot be used says why; the others are well.
pub fn describe(dir: &ModelDir, registered: &[RegisteredControl]) -> Vec<ControlCard> {
    let each = registered.iter().map(|control| {
        let card = one(dir, control).unwrap_or_else(|error| {
            let problem = error.to_string().chars().take(MAX_PROBLEM_CHARS).collect();
            ControlCard { problem, ..ControlCard::default() }
        });
        ControlCard { name: control.name.clone(), ..card }
    });
    each.collect()
}

fn one(dir: &ModelDir, control: &RegisteredControl) -> Result<ControlCard> {
    let kind = ControlKind::read(&control.path)?;
    kind.check_fits(dir)?;
    let source = ControlSource { name: control.name.clone(), path: control.path.clone(), fingerprint: String::new() };
    // Its tensors have the shapes that its configuration says.
    OpenControls::open(&[source], &RankGroup::solo(), &parallel::Device::Cpu)?.measuring().load()?;
    Ok(ControlCard {
        name: String::new(),
        class: kind.class().into(),
        digest: digest_of(&control.path)?,
        fingerprint: fingerprint::of_network(&control.path)?,
        weight_bytes: weight_bytes(&control.path)?,
        modes: kind.modes().unwrap_or_default(),
        multiple: kind.multiple(),
        tp_options: TP_DEGREES.into_iter().filter(|tp| kind.shares().is_multiple_of(*tp)).collect(),
        residuals: kind.residuals(),
        guesses: kind.guesses(),
        problem: String::new(),
    })
}

/// Bytes of a network's weight files.
pub fn weight_bytes(folder: &Path) -> Result<u64> {
    let size = |path: PathBuf| match std::fs::metadata(&path) {
        Ok(metadata) => Ok(metadata.len()),
        Err(error) => Err(Error::ModelDir { path, reason: error.to_string() }),
    };
    checkpoint_files(folder)?.into_iter().map(size).sum()
}
