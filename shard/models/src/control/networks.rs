//! The control networks that a rank holds.

use std::path::PathBuf;

use parallel::{DType, Device, Weights};

use super::ControlNetwork;
use super::kind::{ControlFacts, ControlKind};
use crate::blocks::RankGroup;
use crate::model_dir::fingerprint;
use crate::{Error, Result};

/// Where a control network is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ControlSource {
    /// What jobs call it.
    pub name: String,
    /// Its folder.
    pub path: PathBuf,
    /// What its card says of its files; empty: it is not asked whether they are the same here.
    pub fingerprint: String,
}

/// The control networks of a group, as one of its ranks holds them.
#[derive(Debug, Default)]
pub struct ControlNetworks {
    facts: Vec<ControlFacts>,
    /// In the order of the facts; none beyond the first block range.
    networks: Vec<Box<dyn ControlNetwork>>,
}

impl ControlNetworks {
    /// What a denoiser must know of them, in their order.
    pub fn facts(&self) -> &[ControlFacts] {
        &self.facts
    }

    /// The network at a place in that order, where this rank holds it.
    pub(crate) fn get(&self, index: usize) -> Option<&dyn ControlNetwork> {
        self.networks.get(index).map(|network| &**network)
    }

    /// Whether this rank holds any.
    pub(crate) fn are_held(&self) -> bool {
        !self.networks.is_empty()
    }
}

/// Control networks on their way to a rank: their files are open, nothing is read yet.
#[derive(Debug)]
pub struct OpenControls {
    each: Vec<(ControlFacts, Weights)>,
    held: bool,
}

impl OpenControls {
    /// Opens the networks of `sources` for a rank of `group`.
    ///
    /// # Errors
    /// [`Error::Control`] with the first that cannot be.
    pub fn open(sources: &[ControlSource], group: &RankGroup, device: &Device) -> Result<Self> {
        let one = |source: &ControlSource| -> Result<(ControlFacts, Weights)> {
            fingerprint::check_network(&source.name, &source.path, &source.fingerprint)?;
            let facts = ControlFacts { name: source.name.clone(), kind: ControlKind::read(&source.path)? };
            Ok((facts, Weights::open(&source.path, group.tensor.clone(), DType::F32, device)?))
        };
        let named = |source: &ControlSource| {
            one(source).map_err(|error| Error::Control { name: source.name.clone(), reason: error.to_string() })
        };
        Ok(Self { each: sources.iter().map(named).collect::<Result<_>>()?, held: group.range.is_first() })
    }

    /// The same, measured instead of read.
    pub fn measuring(self) -> Self {
        Self { each: self.each.into_iter().map(|(facts, weights)| (facts, weights.measuring())).collect(), ..self }
    }

    /// The weights of those that this rank holds, by their names.
    pub fn weights(&self) -> impl Iterator<Item = (&str, &Weights)> {
        self.each.iter().filter(|_| self.held).map(|(facts, weights)| (facts.name.as_str(), weights))
    }

    /// Reads what this rank holds of them.
    ///
    /// # Errors
    /// [`Error::Control`] with the first that is not what its configuration says, or cannot be cut so.
    pub fn load(&self) -> Result<ControlNetworks> {
        let load = |(facts, weights): &(ControlFacts, Weights)| match facts.kind.load(weights) {
            Err(error) if error.loses_group() => Err(error),
            loaded => loaded.map_err(|error| Error::Control { name: facts.name.clone(), reason: error.to_string() }),
        };
        Ok(ControlNetworks {
            facts: self.each.iter().map(|(facts, _)| facts.clone()).collect(),
            networks: self.each.iter().filter(|_| self.held).map(load).collect::<Result<_>>()?,
        })
    }
}
