//! What was done of jobs that are not over, so that another group can go on with it: outputs of stages, and a denoiser's
//! state after each step. Kept as objects, in a folder or in S3.
//!
//! ```text
//! checkpoints/{job}/{stage}/{products}/{step} = header, bytes     step 0: the stage's output; others: states
//! ```
//!
//! What a model is multiplied in is part of a checkpoint's name: a job of which something was done in another way, before models.toml
//! was changed or by an older program, which did not say, cannot be given it, whoever stored it and however late.
//!
//! A checkpoint counts when it is whole, has the sha256 that was announced, and is durable. Of a stage's
//! states the two that were written last are kept, and nothing of a job that is over.
//!
//! - `place.rs`: a folder or a bucket
//! - `header.rs`: what may be stored, and under which names
//! - `object.rs`: one object, streamed in and out in chunks, never whole in memory
//! - `index.rs`: what there is, with its sizes
//! - `service.rs`: `CheckpointService`
//! - `janitor.rs`: what is not needed any more goes

mod header;
mod index;
mod janitor;
mod object;
mod place;
mod service;
#[cfg(test)]
pub(crate) mod tests;

use std::{
    collections::{BTreeSet, HashMap},
    fmt,
    hash::{DefaultHasher, Hash, Hasher},
    io,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use futures::{Stream, StreamExt, TryStreamExt};
use object_store::{ObjectStore, ObjectStoreExt, buffered::BufWriter, path::Path};
use proto::v1::{CheckpointKey, GetCheckpointResponse, Products, PutCheckpointRequest, put_checkpoint_request::Part};
use tokio::time::timeout;
use tonic::{Code, Status};
use tonic_types::{ErrorDetails, StatusExt};
use tracing::warn;

use self::{
    header::{Key, refused},
    index::{Index, Share},
    object::Writer,
};

pub(crate) use self::janitor::{Done, DoneWith};
pub use self::{header::MAX_TENSORS, place::Place, service::CheckpointApi};

/// States of a stage that are kept, those written last: the newest may be one that a worker wrote while it was being lost.
pub const STATES_KEPT: usize = 2;
/// Bytes of one checkpoint: as many as a payload between workers may have.
pub const MAX_CHECKPOINT_BYTES: u64 = 1 << 30;
/// Bytes of all checkpoints.
pub const MAX_TOTAL_CHECKPOINT_BYTES: u64 = 64 << 30;
/// Longest wait for the next chunk: a stalled worker must not hold its share of the store.
const CHUNK_DEADLINE: Duration = Duration::from_secs(30);
/// Bytes of one part of an upload: the least that S3 takes. Smaller objects go in one request.
const PART_BYTES: usize = 5 << 20;
/// Parts on their way at once: with the one that fills, all that an upload holds in memory.
const PARTS_IN_FLIGHT: usize = 2;
/// Jobs whose objects appear or go at once.
const CHANGES_AT_ONCE: usize = 64;
/// Folder of all keys.
const FOLDER: &str = "checkpoints";

/// Why a checkpoint is not stored, or not given.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CheckpointError {
    /// Something that cannot be taken.
    #[error("{field}: {problem}")]
    Invalid {
        /// The field of the header, or `chunk`.
        field: String,
        /// What is wrong with it.
        problem: String,
    },
    /// Larger than a checkpoint may be.
    #[error("a checkpoint may have {limit} bytes at most")]
    TooLarge {
        /// Most bytes of a checkpoint.
        limit: u64,
    },
    /// All bytes that may be stored are stored.
    #[error("the checkpoint store is full: its limit is {0} bytes")]
    Full(u64),
    /// The job is over, or unknown.
    #[error("job {0} is over, nothing of it is kept")]
    JobOver(String),
    /// There is none.
    #[error("there is no checkpoint {0}")]
    NotFound(Saved),
    /// There is one, but it is not what was stored.
    #[error("checkpoint {0} is damaged")]
    Damaged(Saved),
    /// The object store.
    #[error("{what}")]
    Storage {
        /// What was tried.
        what: &'static str,
        /// What came of it.
        source: Box<object_store::Error>,
    },
    /// The object store, through its stream.
    #[error("{what}")]
    Io {
        /// What was tried.
        what: &'static str,
        /// What came of it.
        source: io::Error,
    },
}

impl CheckpointError {
    fn storage(what: &'static str, source: object_store::Error) -> Self {
        Self::Storage { what, source: Box::new(source) }
    }

    /// The code a caller gets, and the word for programs.
    fn code(&self) -> (Code, &'static str) {
        match self {
            Self::Invalid { .. } | Self::TooLarge { .. } => (Code::InvalidArgument, "INVALID_CHECKPOINT"),
            Self::Full(_) => (Code::ResourceExhausted, "CHECKPOINT_STORE_FULL"),
            Self::JobOver(_) => (Code::FailedPrecondition, "JOB_OVER"),
            Self::NotFound(_) => (Code::NotFound, "CHECKPOINT_NOT_FOUND"),
            Self::Damaged(_) => (Code::DataLoss, "CHECKPOINT_DAMAGED"),
            Self::Storage { .. } | Self::Io { .. } => (Code::Unavailable, "CHECKPOINT_STORE_UNAVAILABLE"),
        }
    }
}

impl From<CheckpointError> for Status {
    fn from(error: CheckpointError) -> Self {
        let (code, reason) = error.code();
        if let CheckpointError::Storage { .. } | CheckpointError::Io { .. } | CheckpointError::Damaged(_) = &error {
            warn!(%error, source = ?std::error::Error::source(&error), "checkpoint store");
        }
        let details = ErrorDetails::with_error_info(reason, proto::ERROR_DOMAIN, HashMap::new());
        Status::with_error_details(code, error.to_string(), details)
    }
}

/// A checkpoint that is there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Saved {
    /// The stage.
    pub stage: String,
    /// Of a denoiser's state: the steps done. 0: the stage's output.
    pub step: u32,
    /// What it was multiplied in.
    pub products: Products,
}

impl From<Key> for Saved {
    fn from(key: Key) -> Self {
        Self { stage: key.stage, step: key.step, products: key.products }
    }
}

impl fmt::Display for Saved {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {} in {}", self.stage, self.step, self.products)
    }
}

/// Ceilings that no caller can raise.
#[derive(Debug, Clone, Copy)]
pub struct CheckpointLimits {
    /// Bytes of one checkpoint.
    pub bytes: u64,
    /// Bytes of all.
    pub total_bytes: u64,
}

impl Default for CheckpointLimits {
    fn default() -> Self {
        Self { bytes: MAX_CHECKPOINT_BYTES, total_bytes: MAX_TOTAL_CHECKPOINT_BYTES }
    }
}

/// Says whether a job is known and not over. Asked at the beginning and at the end of every put;
/// must not block. A job must be over by this before it is forgotten.
pub type IsLive = Arc<dyn Fn(&str) -> bool + Send + Sync>;

/// The checkpoints of a cluster. Cheap to clone.
#[derive(Clone)]
pub struct CheckpointStore {
    objects: Arc<dyn ObjectStore>,
    index: Arc<Mutex<Index>>,
    limits: CheckpointLimits,
    is_live: IsLive,
    changes: Arc<[tokio::sync::Mutex<()>; CHANGES_AT_ONCE]>,
}

impl fmt::Debug for CheckpointStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CheckpointStore").field("objects", &self.objects).field("limits", &self.limits).finish_non_exhaustive()
    }
}

impl CheckpointStore {
    /// Opens the store and lists what is there.
    ///
    /// # Errors
    /// A place that cannot be opened or listed.
    pub async fn open(place: &Place, limits: CheckpointLimits, is_live: IsLive) -> crate::Result<Self> {
        let objects = place.open()?;
        let failed = |error: object_store::Error| crate::Error::io(format!("list {place:?}"))(error.into());
        let mut found: Vec<_> = objects.list(Some(&Path::from(FOLDER))).try_collect().await.map_err(failed)?;
        found.sort_by_key(|object| object.last_modified);
        let mut index = Index::default();
        for object in found {
            if let Some(key) = parse_path(&object.location) {
                index.insert(key, object.size);
            }
        }
        Ok(Self {
            objects,
            index: Arc::new(Mutex::new(index)),
            limits,
            is_live,
            changes: Arc::new(std::array::from_fn(|_| tokio::sync::Mutex::default())),
        })
    }

    /// Stores a checkpoint: a header, then chunks. Durable when this returns; in place of one with the same key.
    ///
    /// # Errors
    /// [`CheckpointError`]; then nothing new is there.
    pub async fn put(
        &self,
        mut parts: impl Stream<Item = Result<PutCheckpointRequest, Status>> + Unpin,
    ) -> Result<(), CheckpointError> {
        let Some(Part::Header(mut header)) = next_part(&mut parts).await? else {
            return Err(refused("header", "must be the first message"));
        };
        let key = header::check(&mut header, self.limits.bytes)?;
        self.check_live(&key)?;
        let share = Share::take(&self.index, header.byte_size, self.limits.total_bytes)?;
        let upload = BufWriter::with_capacity(self.objects.clone(), path(&key), PART_BYTES).with_max_concurrency(PARTS_IN_FLIGHT);
        let mut writer = Writer::begin(upload, &header).await?;
        if let Err(error) = receive(&mut writer, parts).await {
            writer.abort().await;
            return Err(error);
        }
        let _one_at_a_time = self.changes(&key.job_id).await;
        // Asked under the lock: either this is refused, or `forget` comes later and finds what is stored here.
        if let Err(over) = self.check_live(&key) {
            writer.abort().await;
            return Err(over);
        }
        writer.finish().await?;
        let superseded = {
            let mut index = self.lock();
            share.keep(&mut index, key.clone());
            index.superseded(&key, STATES_KEPT)
        };
        for old in superseded {
            self.remove(&old).await;
        }
        Ok(())
    }

    /// What was stored: its header, then chunks. The last chunk comes only if the sha256 of all is right. In place of a state that
    /// is not there any more comes the newest later one of its stage in the same way: a worker that was given up and does not know it yet may have
    /// stored more, and a job's states are the same whoever computed them.
    ///
    /// # Errors
    /// [`CheckpointError::NotFound`], [`CheckpointError::Damaged`], at the beginning or within the stream.
    pub async fn get(
        &self,
        key: Option<CheckpointKey>,
    ) -> Result<impl Stream<Item = Result<GetCheckpointResponse, CheckpointError>> + Send + use<>, CheckpointError> {
        let asked = Key::check(key)?;
        let mut key = asked.clone();
        loop {
            match self.objects.get(&path(&key)).await {
                Ok(object) => return object::read(&key, object).await,
                Err(object_store::Error::NotFound { .. }) => {}
                Err(source) => return Err(CheckpointError::storage("read an object", source)),
            }
            // It may go in its turn; steps only grow.
            let later = self.lock().latest_state(&asked).filter(|latest| latest.step > key.step);
            key = later.ok_or_else(|| CheckpointError::NotFound(asked.clone().into()))?;
        }
    }

    /// What there is of a job, by stage, then way, then step.
    pub fn list(&self, job_id: &str) -> Vec<Saved> {
        self.lock().of_job(job_id).map(Saved::from).collect()
    }

    /// Removes all there is of a job, which must not be live any more.
    pub async fn forget(&self, job_id: &str) {
        self.forget_before(job_id, u64::MAX).await;
    }

    /// What is written next comes after all that there is now.
    fn next_write(&self) -> u64 {
        self.lock().next_write()
    }

    /// Removes what there is of a job and was written before `write`.
    async fn forget_before(&self, job_id: &str, write: u64) {
        let _one_at_a_time = self.changes(job_id).await;
        let keys: Vec<Key> = self.lock().written_before(job_id, write).collect();
        for key in keys {
            self.remove(&key).await;
        }
    }

    /// Removes all that belongs to no job in `live`: what was missed when a job ended. What the coordinator before stored when
    /// this one had begun is found by one sweep and removed by the next: a coordinator that was itself followed by another, and
    /// knows nothing of its jobs, does not live so long.
    pub async fn sweep(&self, live: &BTreeSet<String>) {
        let jobs: Vec<String> = self.lock().jobs().filter(|job_id| !live.contains(job_id)).collect();
        for job_id in jobs {
            self.forget(&job_id).await;
        }
        match self.objects.list(Some(&Path::from(FOLDER))).try_collect::<Vec<_>>().await {
            Ok(found) => {
                let keys = found.into_iter().filter_map(|object| Some((parse_path(&object.location)?, object.size)));
                let orphans: Vec<_> = keys.filter(|(key, _)| !(self.is_live)(&key.job_id)).collect();
                orphans.into_iter().for_each(|(key, bytes)| self.lock().insert_unknown(key, bytes));
            }
            Err(error) => warn!(%error, "listing the checkpoints failed"),
        }
    }

    /// Bytes of all checkpoints, and of all uploads that have begun.
    pub fn bytes(&self) -> u64 {
        self.lock().bytes()
    }

    fn check_live(&self, key: &Key) -> Result<(), CheckpointError> {
        if (self.is_live)(&key.job_id) { Ok(()) } else { Err(CheckpointError::JobOver(key.job_id.clone())) }
    }

    /// Objects of a job appear and go one after the other: what is removed is never what another call just stored.
    async fn changes(&self, job_id: &str) -> tokio::sync::MutexGuard<'_, ()> {
        let mut hasher = DefaultHasher::new();
        job_id.hash(&mut hasher);
        self.changes[hasher.finish() as usize % CHANGES_AT_ONCE].lock().await
    }

    /// Under [`Self::changes`] of the job. What cannot be removed stays known, and the next sweep tries again.
    async fn remove(&self, key: &Key) {
        match self.objects.delete(&path(key)).await {
            Ok(()) | Err(object_store::Error::NotFound { .. }) => self.lock().remove(key),
            Err(error) => warn!(job.id = key.job_id, %error, "removing a checkpoint failed"),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Index> {
        lock(&self.index)
    }
}

async fn receive(
    writer: &mut Writer,
    mut parts: impl Stream<Item = Result<PutCheckpointRequest, Status>> + Unpin,
) -> Result<(), CheckpointError> {
    while let Some(part) = next_part(&mut parts).await? {
        match part {
            Part::Chunk(chunk) => writer.write(chunk).await?,
            Part::Header(_) => return Err(refused("header", "must come only once")),
        }
    }
    writer.check()
}

fn lock(index: &Mutex<Index>) -> MutexGuard<'_, Index> {
    // The index is whole between any two statements that hold the lock, whoever panicked.
    index.lock().unwrap_or_else(PoisonError::into_inner)
}

fn path(key: &Key) -> Path {
    let (name, step) = (key.products.name(), key.step.to_string());
    let way = Some(name).filter(|_| key.products != Products::Unspecified);
    Path::from_iter([FOLDER, &key.job_id, &key.stage].into_iter().chain(way).chain([step.as_str()]))
}

fn parse_path(path: &Path) -> Option<Key> {
    let parts: Vec<_> = path.parts().collect();
    let parts: Vec<&str> = parts.iter().map(AsRef::as_ref).collect();
    let (job_id, stage, products, step) = match *parts.as_slice() {
        [_, job_id, stage, way, step] => (job_id, stage, Products::of_name(way)?, step),
        // As an older program named them.
        [_, job_id, stage, step] => (job_id, stage, Products::Unspecified, step),
        _ => return None,
    };
    let (job_id, stage, products) = (job_id.to_owned(), stage.to_owned(), products.into());
    Key::check(Some(CheckpointKey { job_id, stage, step: step.parse().ok()?, products })).ok()
}

/// The next message of an upload; nothing at its end.
async fn next_part(
    parts: &mut (impl Stream<Item = Result<PutCheckpointRequest, Status>> + Unpin),
) -> Result<Option<Part>, CheckpointError> {
    match timeout(CHUNK_DEADLINE, parts.next()).await {
        Ok(None) => Ok(None),
        Ok(Some(Ok(PutCheckpointRequest { part: Some(part) }))) => Ok(Some(part)),
        Ok(Some(Ok(PutCheckpointRequest { part: None }))) => Err(refused("part", "must be a header or a chunk")),
        Ok(Some(Err(_))) => Err(refused("chunk", "the upload broke off")),
        Err(_) => Err(refused("chunk", format!("none came for {} s", CHUNK_DEADLINE.as_secs()))),
    }
}
