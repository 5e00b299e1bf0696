//! Which jobs are known and not over, for those who must not ask the state.

use std::{
    collections::{BTreeSet, HashSet},
    sync::{Arc, PoisonError, RwLock},
};

use proto::v1::JobRecord;

/// The ids of jobs that are not over. Cheap to clone; all clones see the same.
#[derive(Debug, Clone, Default)]
pub(crate) struct LiveJobs(Arc<RwLock<HashSet<String>>>);

impl LiveJobs {
    /// Takes in what was written down of a job.
    pub(crate) fn note(&self, record: &JobRecord) {
        let mut live = self.0.write().unwrap_or_else(PoisonError::into_inner);
        if record.end.is_some() {
            live.remove(&record.id);
        } else if !live.contains(&record.id) {
            live.insert(record.id.clone());
        }
    }

    pub(crate) fn contains(&self, job_id: &str) -> bool {
        self.0.read().unwrap_or_else(PoisonError::into_inner).contains(job_id)
    }

    /// All of them, as they are now.
    pub(crate) fn all(&self) -> BTreeSet<String> {
        self.0.read().unwrap_or_else(PoisonError::into_inner).iter().cloned().collect()
    }
}
