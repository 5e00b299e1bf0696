//! What there is, with its sizes, and what uploads have spoken for.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex},
};

use proto::v1::Products;

use super::{CheckpointError, header::Key, lock};

#[derive(Debug, Default)]
pub(super) struct Index {
    known: BTreeMap<Key, Known>,
    /// Counts what was written.
    writes: u64,
    /// Of all checkpoints, and of all uploads that have begun.
    bytes: u64,
}

#[derive(Debug)]
struct Known {
    bytes: u64,
    /// When, by [`Index::writes`].
    written: u64,
}

impl Index {
    /// Adds what was found; the oldest first.
    pub(super) fn insert(&mut self, key: Key, bytes: u64) {
        self.bytes += bytes;
        self.take(key, bytes);
    }

    /// Adds what was found late.
    pub(super) fn insert_unknown(&mut self, key: Key, bytes: u64) {
        if !self.known.contains_key(&key) {
            self.insert(key, bytes);
        }
    }

    pub(super) fn remove(&mut self, key: &Key) {
        if let Some(known) = self.known.remove(key) {
            self.bytes = self.bytes.saturating_sub(known.bytes);
        }
    }

    pub(super) fn bytes(&self) -> u64 {
        self.bytes
    }

    pub(super) fn of_job(&self, job_id: &str) -> impl Iterator<Item = Key> + use<'_> {
        let first = Key { job_id: job_id.to_owned(), stage: String::new(), products: Products::Unspecified, step: 0 };
        let job_id = job_id.to_owned();
        self.known.range(first..).map(|(key, _)| key.clone()).take_while(move |key| key.job_id == job_id)
    }

    /// Those of a job that were written before `write`.
    pub(super) fn written_before(&self, job_id: &str, write: u64) -> impl Iterator<Item = Key> + use<'_> {
        self.of_job(job_id).filter(move |key| self.known.get(key).is_some_and(|known| known.written < write))
    }

    /// What the next that is written is later than all that there is by.
    pub(super) fn next_write(&self) -> u64 {
        self.writes + 1
    }

    /// Each job once.
    pub(super) fn jobs(&self) -> impl Iterator<Item = String> + use<'_> {
        let mut last = None;
        self.known.keys().filter_map(move |key| {
            let first = last != Some(&key.job_id);
            last = Some(&key.job_id);
            first.then(|| key.job_id.clone())
        })
    }

    /// States of the key's stage, in its way, beyond the `kept` that were written last; a stage's output is none. By time and not by
    /// step: a try that began anew must not lose its states to those of the try before.
    pub(super) fn superseded(&self, key: &Key, kept: usize) -> Vec<Key> {
        let first = Key { step: 1, ..key.clone() };
        let last = Key { step: u32::MAX, ..key.clone() };
        let mut states: Vec<_> = self.known.range(first..=last).map(|(key, known)| (known.written, key)).collect();
        states.sort_unstable_by(|a, b| b.cmp(a));
        states.into_iter().skip(kept).map(|(_, key)| key.clone()).collect()
    }

    /// The state of the key's stage, in its way, with the most steps, and no fewer than the key's; a stage's output is no state.
    pub(super) fn latest_state(&self, key: &Key) -> Option<Key> {
        let last = Key { step: u32::MAX, ..key.clone() };
        let mut states = self.known.range(key.clone()..=last).filter(|_| key.step > 0);
        states.next_back().map(|(key, _)| key.clone())
    }

    /// The bytes are counted already.
    fn take(&mut self, key: Key, bytes: u64) {
        self.writes += 1;
        if let Some(old) = self.known.insert(key, Known { bytes, written: self.writes }) {
            self.bytes = self.bytes.saturating_sub(old.bytes);
        }
    }
}

/// Bytes of the store that an upload has spoken for; given back when dropped.
#[derive(Debug)]
pub(super) struct Share {
    index: Arc<Mutex<Index>>,
    bytes: u64,
}

impl Share {
    pub(super) fn take(index: &Arc<Mutex<Index>>, bytes: u64, most: u64) -> Result<Self, CheckpointError> {
        let mut held = lock(index);
        let total = held.bytes.saturating_add(bytes);
        if total > most {
            return Err(CheckpointError::Full(most));
        }
        held.bytes = total;
        Ok(Self { index: index.clone(), bytes })
    }

    /// The bytes belong to a checkpoint from now on. `index` is the share's own, locked.
    pub(super) fn keep(mut self, index: &mut Index, key: Key) {
        index.take(key, std::mem::take(&mut self.bytes));
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        if self.bytes > 0 {
            let mut index = lock(&self.index);
            index.bytes = index.bytes.saturating_sub(self.bytes);
        }
    }
}
