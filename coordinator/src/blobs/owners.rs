//! Whose the pictures are that clients brought and no job names yet. Of those that a job names, the state knows.

use std::{
    collections::BTreeSet,
    sync::{Arc, Mutex, PoisonError},
};

use super::BlobStore;

/// Entries after which those are dropped whose picture is gone, and at least as many more for each time after: so each is looked at
/// about once.
const MANY: usize = 4096;

/// Which tenant brought which picture. Not written down: after a restart, what no job names is brought again. Cheap to clone.
#[derive(Debug, Clone, Default)]
pub(crate) struct Owners(Arc<Mutex<Known>>);

#[derive(Debug, Default)]
struct Known {
    brought: BTreeSet<Brought>,
    /// How many were kept when they were looked at last.
    kept: usize,
}

/// A tenant, and a picture it brought.
type Brought = (Arc<str>, String);

impl Owners {
    /// The tenant brought it.
    pub(crate) fn note(&self, tenant: Arc<str>, blob_id: String, store: &BlobStore) {
        let mut known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if known.brought.len() >= MANY.max(2 * known.kept) {
            known.brought.retain(|(_, blob_id)| store.knows(blob_id));
            known.kept = known.brought.len();
        }
        known.brought.insert((tenant, blob_id));
    }

    /// Whether the tenant brought it.
    pub(crate) fn has(&self, tenant: &Arc<str>, blob_id: &str) -> bool {
        let known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        known.brought.contains(&(tenant.clone(), blob_id.to_owned()))
    }
}
