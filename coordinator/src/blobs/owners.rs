//! Whose the pictures are that clients brought and no job names yet. Of those that a job names, the state knows.

use std::{
    collections::BTreeSet,
    sync::{Arc, Mutex, PoisonError},
};

use super::BlobStore;

/// Entries after which those are dropped whose picture is gone.
const MANY: usize = 4096;

/// Which tenant brought which picture. Not written down: after a restart, what no job names is brought again. Cheap to clone.
#[derive(Debug, Clone, Default)]
pub(crate) struct Owners(Arc<Mutex<BTreeSet<Brought>>>);

/// A tenant, and a picture it brought.
type Brought = (Arc<str>, String);

impl Owners {
    /// The tenant brought it.
    pub(crate) fn note(&self, tenant: Arc<str>, blob_id: String, store: &BlobStore) {
        let mut owners = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if owners.len() >= MANY {
            owners.retain(|(_, blob_id)| store.contains(blob_id));
        }
        owners.insert((tenant, blob_id));
    }

    /// Whether the tenant brought it.
    pub(crate) fn has(&self, tenant: &Arc<str>, blob_id: &str) -> bool {
        let owners = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        owners.contains(&(tenant.clone(), blob_id.to_owned()))
    }
}
