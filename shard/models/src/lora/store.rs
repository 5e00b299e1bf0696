//! The adapters that one rank holds: read when a forward first needs them, dropped when the space is needed for others.
//!
//! An adapter counts with the bytes of all its factors for the component in f32, as if this rank held the whole of it: so every
//! rank of a group drops and reads the same ones, and what fits on the leader fits everywhere.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use parallel::lora::{Activated, Adapter, Adapters};

use super::file::AdapterFile;
use super::mapping::{Sites, bytes_of, changes};
use super::{Share, unusable};
use crate::request::Lora;
use crate::{Error, Result};

/// Bytes of adapters that a rank holds, if nobody says otherwise: a dozen of usual size.
pub const DEFAULT_CACHE_BYTES: u64 = 2 << 30;

/// Adapters that jobs may name.
#[derive(Clone, Debug, Default)]
pub struct Sources {
    /// Each with where it is.
    pub named: Vec<Source>,
    /// Most bytes of adapters that one rank holds.
    pub cache_bytes: u64,
}

impl Sources {
    /// The same to a component that none of them changes: the names are known there, and nothing is read.
    pub fn changing_nothing(mut self) -> Self {
        self.named.iter_mut().for_each(|source| source.components.clear());
        self
    }
}

/// Where an adapter is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Source {
    /// What jobs call it.
    pub name: String,
    /// Its file, or a folder with it.
    pub path: PathBuf,
    /// sha256 of the file, in hex: another file is not this adapter.
    pub digest: String,
    /// The components it changes.
    pub components: Vec<String>,
}

/// One rank's adapters.
pub struct AdapterStore {
    adapters: Arc<Adapters>,
    /// Of the whole component, not of this rank alone.
    sites: Sites,
    sources: HashMap<String, Source>,
    cache_bytes: u64,
    cache: Mutex<Cache>,
}

#[derive(Default)]
struct Cache {
    /// The least recently used first.
    held: Vec<(String, Held)>,
    /// Of every adapter that was ever read.
    sizes: HashMap<String, u64>,
}

#[derive(Clone)]
struct Held {
    adapter: Arc<Adapter>,
    bytes: u64,
}

impl AdapterStore {
    /// For a rank whose layers have registered with `adapters`; `sites` are those of its whole component.
    pub fn new(adapters: Arc<Adapters>, sites: Sites, sources: Sources) -> Self {
        let Sources { named, cache_bytes } = sources;
        let sources = named.into_iter().map(|source| (source.name.clone(), source)).collect();
        Self { adapters, sites, sources, cache_bytes, cache: Mutex::default() }
    }

    /// Those of a job's adapters that change this component.
    ///
    /// # Errors
    /// [`Error::Adapter`] when one has no such name here.
    pub fn relevant(&self, loras: &[Lora]) -> Result<Vec<Lora>> {
        let mut relevant = Vec::new();
        for lora in loras {
            let source = self.source(&lora.name)?;
            if source.components.iter().any(|component| component == self.sites.component()) {
                relevant.push(lora.clone());
            }
        }
        Ok(relevant)
    }

    /// Whether these adapters can be active in one forward. Of one that was never read nobody knows: it goes without others.
    pub fn fit_together(&self, names: &[&str]) -> bool {
        let cache = self.cache();
        let size = |name: &&str| cache.sizes.get(*name).copied().unwrap_or(self.cache_bytes);
        names.len() <= 1 || names.iter().map(size).fold(0, u64::saturating_add) <= self.cache_bytes
    }

    /// Makes the adapters of a forward active, reading those that are not held.
    ///
    /// # Errors
    /// [`Error::Adapter`] with the first that cannot be.
    pub fn activate(&self, shares: &[Share]) -> Result<Activated> {
        let mut needed: Vec<&str> = Vec::new();
        for (name, _) in shares.iter().flat_map(Share::loras) {
            if !needed.contains(&name) {
                needed.push(name);
            }
        }
        let mut held = HashMap::new();
        for name in &needed {
            held.insert(*name, self.hold(name, &needed)?);
        }
        let runs = shares.iter().map(|share| {
            let uses = share.loras().filter_map(|(name, scale)| Some((held.get(name)?.clone(), scale)));
            (share.items, uses.collect())
        });
        Ok(self.adapters.activate(runs.collect()))
    }

    /// Names of what is held, the least recently used first.
    pub fn held(&self) -> Vec<String> {
        self.cache().held.iter().map(|(name, _)| name.clone()).collect()
    }

    fn source(&self, name: &str) -> Result<&Source> {
        self.sources.get(name).ok_or_else(|| unusable(name, "no adapter of the model has this name"))
    }

    fn hold(&self, name: &str, needed: &[&str]) -> Result<Arc<Adapter>> {
        let mut cache = self.cache();
        if let Some(at) = cache.held.iter().position(|(held, _)| held == name) {
            let used = cache.held.remove(at);
            let adapter = used.1.adapter.clone();
            cache.held.push(used);
            return Ok(adapter);
        }
        let Plan { file, changes, bytes } = self.plan(self.source(name)?).map_err(|error| unusable(name, error))?;
        cache.sizes.insert(name.to_owned(), bytes);
        cache.make_room(bytes, self.cache_bytes, needed).map_err(|reason| unusable(name, reason))?;
        let factors = changes.iter().map(|change| change.factors(&file));
        let adapter = Arc::new(self.adapters.adapter::<Error>(factors).map_err(|error| unusable(name, error))?);
        cache.held.push((name.to_owned(), Held { adapter: adapter.clone(), bytes }));
        Ok(adapter)
    }

    fn plan(&self, source: &Source) -> Result<Plan> {
        let file = AdapterFile::open(&source.path)?;
        if file.digest() != source.digest {
            let reason = format!("its sha256 is {}, and it was registered with {}", file.digest(), source.digest);
            return Err(super::bad(file.path(), reason));
        }
        let changes = changes(&file, std::slice::from_ref(&self.sites), true)?;
        let bytes = bytes_of(&changes, self.sites.component());
        Ok(Plan { file, changes, bytes })
    }

    fn cache(&self) -> MutexGuard<'_, Cache> {
        self.cache.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A file that is about to be held.
struct Plan {
    file: AdapterFile,
    changes: Vec<super::mapping::Change>,
    bytes: u64,
}

impl Cache {
    /// Drops what was used longest ago and is not `needed`, until `bytes` fit.
    fn make_room(&mut self, bytes: u64, limit: u64, needed: &[&str]) -> Result<(), String> {
        while self.bytes() + bytes > limit {
            let Some(oldest) = self.held.iter().position(|(name, _)| !needed.contains(&name.as_str())) else {
                let others = self.bytes();
                return Err(format!("its {bytes} bytes do not fit beside {others} of the job's others: a rank holds {limit}"));
            };
            self.held.remove(oldest);
        }
        Ok(())
    }

    fn bytes(&self) -> u64 {
        self.held.iter().map(|(_, held)| held.bytes).sum()
    }
}

impl std::fmt::Debug for AdapterStore {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "AdapterStore({}, holds {:?})", self.sites.component(), self.held())
    }
}
