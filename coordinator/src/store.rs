//! What is kept of jobs and groups so that nothing accepted is lost: every change is durable before anybody is told of it.
//!
//! Two stores behind one [`StoreHandle`]: [`Journal`], an fsynced log in a folder, for one coordinator; [`EtcdStore`],
//! whose every write is fenced by the leader's key, for several. A failure is final in both: a store that could not
//! make something durable once never says again that something is.
//!
//! - `disk.rs`: the few calls to a file system, so that tests can break it (`memory.rs`)
//! - `frame.rs`: how segments and frames look on disk, and where a torn tail begins
//! - `load.rs`: what a folder holds
//! - `segment.rs`: segments that are written, logs and snapshots
//! - `journal.rs`: opening a folder; the thread that commits in groups and compacts
//! - `etcd.rs`: the same in etcd

pub mod bench;
mod disk;
mod etcd;
mod frame;
mod journal;
mod load;
pub mod memory;
mod segment;
#[cfg(test)]
mod tests;
mod writes;

use std::{
    io,
    path::PathBuf,
    sync::{Arc, Mutex, PoisonError},
};

use proto::v1::{GroupRecord, JobRecord};
use tokio::sync::{mpsc, watch};

pub(crate) use self::writes::Writes;
pub use self::{
    disk::{Disk, DiskFile, RealDisk},
    etcd::{EtcdStore, MAX_ACCEPTED_BYTES, MAX_RECORD_BYTES},
    journal::{COMPACT_BYTES, COMPACT_RATIO, Journal},
};

/// A result whose error is the store's.
pub type Result<T, E = StoreError> = std::result::Result<T, E>;

/// Why a store cannot be opened or written to.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StoreError {
    /// Something that was durable is not readable any more. Starting without it would lose accepted jobs.
    #[error("DATA_LOSS: {}: {problem} at byte {offset}; restore the file, or move it away and lose what it held", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// Where in it.
        offset: u64,
        /// What is wrong there.
        problem: String,
    },
    /// A later version of the coordinator wrote it.
    #[error("{}: has format {found}; this coordinator reads format {known}", path.display())]
    Version {
        /// The file.
        path: PathBuf,
        /// Its format.
        found: u32,
        /// The newest that is known.
        known: u32,
    },
    /// Another process has the folder open.
    #[error("{}: another coordinator uses this folder", .0.display())]
    InUse(PathBuf),
    /// The disk.
    #[error("{what}")]
    Io {
        /// What was tried.
        what: String,
        /// What came of it.
        source: io::Error,
    },
    /// etcd.
    #[error("etcd: {0}")]
    Etcd(#[source] Box<crate::Error>),
    /// etcd holds something that is no job.
    #[error("DATA_LOSS: etcd key {key}: {problem}")]
    DamagedKey {
        /// The key.
        key: String,
        /// What is wrong with its value.
        problem: String,
    },
    /// A record that is too large for etcd.
    #[error("job {job_id}: its record has {bytes} bytes; the limit in etcd is {limit}")]
    TooLarge {
        /// The job.
        job_id: String,
        /// Bytes of its record.
        bytes: usize,
        /// Most bytes of a record.
        limit: usize,
    },
    /// The lease was lost, or another coordinator has taken over.
    #[error("another coordinator leads")]
    Fenced,
}

impl StoreError {
    /// Wraps an I/O error with what was tried: `.map_err(StoreError::io("..."))`.
    pub(crate) fn io(what: impl Into<String>) -> impl FnOnce(io::Error) -> Self {
        let what = what.into();
        move |source| Self::Io { what, source }
    }

    /// The error and all that caused it, in one line.
    pub(crate) fn chain(&self) -> String {
        let mut text = self.to_string();
        let mut source = std::error::Error::source(self);
        while let Some(cause) = source {
            text = format!("{text}: {cause}");
            source = cause.source();
        }
        text
    }
}

/// The store's own error is the source; `get_ref` and `downcast_ref` find it.
impl From<StoreError> for crate::Error {
    fn from(error: StoreError) -> Self {
        Self::Io { what: "the store of jobs cannot be used".into(), source: io::Error::other(error) }
    }
}

/// One change to be made durable.
#[derive(Debug, Clone, PartialEq)]
pub enum Change {
    /// Keep this of the job; it replaces what was kept before.
    Put(Box<JobRecord>),
    /// Keep nothing of the job any more.
    Forget {
        /// The job.
        job_id: String,
    },
    /// Keep this of the group; it replaces what was kept before.
    Group(GroupRecord),
}

/// How far the store has come.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Durable {
    /// The newest batch that is durable, and with it all before it. 0: none yet.
    pub batch: u64,
    /// Why nothing later will be, ever.
    pub failed: Option<String>,
}

/// What was read when a store was opened.
#[derive(Debug, Clone, PartialEq)]
pub struct Recovered {
    /// By number.
    pub jobs: Vec<JobRecord>,
    /// The newest epoch of every group, in no order.
    pub groups: Vec<GroupRecord>,
    /// Grows with every opening.
    pub term: u64,
}

/// Makes changes durable, in order. Cheap to clone. A store ends when all its handles are gone and all that they gave it
/// is written.
#[derive(Debug, Clone)]
pub struct StoreHandle {
    outbox: Arc<Mutex<Outbox>>,
    durable: watch::Receiver<Durable>,
    max_accepted_bytes: Option<usize>,
}

#[derive(Debug)]
struct Outbox {
    newest: u64,
    // Without a limit, since `write` may not wait: what waits is bounded by the jobs that may be accepted at once.
    batches: mpsc::UnboundedSender<Batch>,
}

/// Changes that become durable together.
#[derive(Debug)]
struct Batch {
    number: u64,
    changes: Vec<Change>,
}

impl StoreHandle {
    /// Never waits. The batch's number, counted from 1; batches become durable in order, each as a whole.
    pub fn write(&self, changes: Vec<Change>) -> u64 {
        // The outbox is whole between any two statements that hold the lock, whoever panicked.
        let mut outbox = self.outbox.lock().unwrap_or_else(PoisonError::into_inner);
        outbox.newest += 1;
        let number = outbox.newest;
        // A store that has ended has said so in `durable`.
        drop(outbox.batches.send(Batch { number, changes }));
        number
    }

    /// Changes as more becomes durable. An error in it is final.
    pub fn durable(&self) -> watch::Receiver<Durable> {
        self.durable.clone()
    }

    /// Waits until a batch is durable, or says why it will not be. For callers with one batch; the runtime watches.
    pub async fn until_durable(&self, batch: u64) -> Result<(), String> {
        let mut durable = self.durable.clone();
        match durable.wait_for(|durable| durable.batch >= batch || durable.failed.is_some()).await {
            Ok(reached) if reached.batch >= batch => Ok(()),
            Ok(reached) => Err(reached.failed.clone().unwrap_or_default()),
            Err(_) => Err(ENDED.into()),
        }
    }

    /// Most bytes that the record of a new job may have; none: any. To be asked before a job is accepted: a record that is
    /// too large breaks a store for good when it is written.
    pub fn max_accepted_bytes(&self) -> Option<usize> {
        self.max_accepted_bytes
    }

    /// A handle, and what a store reads and writes at its other end.
    fn pair(max_accepted_bytes: Option<usize>) -> (Self, mpsc::UnboundedReceiver<Batch>, Progress) {
        let (batches, inbox) = mpsc::unbounded_channel();
        let (told, durable) = watch::channel(Durable::default());
        let outbox = Arc::new(Mutex::new(Outbox { newest: 0, batches }));
        (Self { outbox, durable, max_accepted_bytes }, inbox, Progress { told })
    }
}

/// A store that is as slow as a test says.
#[cfg(test)]
pub(crate) struct Slow {
    progress: Progress,
    _inbox: mpsc::UnboundedReceiver<Batch>,
}

#[cfg(test)]
impl Slow {
    pub(crate) fn open() -> (StoreHandle, Self) {
        let (handle, inbox, progress) = StoreHandle::pair(None);
        (handle, Self { progress, _inbox: inbox })
    }

    pub(crate) fn durable(&self, batch: u64) {
        self.progress.durable(batch);
    }
}

/// Said by a store that is no more.
const ENDED: &str = "the store has ended";

/// The store's end of [`StoreHandle::durable`].
#[derive(Debug)]
struct Progress {
    told: watch::Sender<Durable>,
}

impl Progress {
    fn durable(&self, batch: u64) {
        self.told.send_if_modified(|durable| {
            let grows = durable.failed.is_none() && batch > durable.batch;
            if grows {
                durable.batch = batch;
            }
            grows
        });
    }

    fn failed(&self, why: String) {
        self.told.send_if_modified(|durable| {
            let first = durable.failed.is_none();
            if first {
                durable.failed = Some(why);
            }
            first
        });
    }
}

/// Whatever ends a store, a panic too, is told.
impl Drop for Progress {
    fn drop(&mut self) {
        self.failed(ENDED.into());
    }
}
