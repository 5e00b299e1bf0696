//! The store of one coordinator: a folder with a log, on a thread of its own.
//!
//! The thread takes all batches that wait, writes them as one frame and syncs once. When the logs are much larger than
//! what is in them, a new log begins and a second thread turns the old ones into a snapshot.

use std::{
    collections::HashMap,
    path::{Path, PathBuf},
    sync::Arc,
    thread::{self, JoinHandle},
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use prost::Message;
use proto::v1::{GroupRecord, JobRecord};
use tokio::sync::mpsc;
use tracing::{error, info, warn};

use super::{
    Batch, Change, Progress, Recovered, Result, StoreError, StoreHandle,
    disk::Disk,
    frame::Builder,
    load::{Loaded, damaged, load},
    segment::{self, Log, failed},
};

/// Below this many bytes of logs nothing is compacted: reading them takes some tens of milliseconds.
pub const COMPACT_BYTES: u64 = 16 << 20;
/// The logs are compacted when they have this many times the bytes of the jobs in them.
pub const COMPACT_RATIO: u64 = 4;
/// Most bytes of one log: what is read at once when a folder is opened.
const LOG_BYTES: u64 = 64 << 20;
/// Most segments before they are compacted whatever they hold: each opening begins one.
const MAX_SEGMENTS: usize = 64;
/// A group commit takes no further batches once it has this many bytes.
const GROUP_BYTES: usize = 4 << 20;
/// How long opening waits for another coordinator to let go of the folder: one that is just ending.
const LOCK_PATIENCE: Duration = Duration::from_secs(2);
/// How often it looks.
const LOCK_PAUSE: Duration = Duration::from_millis(20);
/// The file whose lock says that somebody uses the folder.
const LOCK: &str = "LOCK";

/// The limits that tests make small.
#[derive(Debug, Clone, Copy)]
pub(super) struct Tuning {
    pub(super) compact_bytes: u64,
    pub(super) log_bytes: u64,
    pub(super) lock_patience: Duration,
    /// The term of a folder's first opening. Workers refuse coordinators of a lower term than they have seen: seconds since
    /// 1970 are above all terms of a folder that was used before.
    pub(super) first_term: u64,
}

impl Default for Tuning {
    fn default() -> Self {
        Self { compact_bytes: COMPACT_BYTES, log_bytes: LOG_BYTES, lock_patience: LOCK_PATIENCE, first_term: 1 }
    }
}

/// The store of one coordinator: an append-only, fsynced log.
#[derive(Debug)]
pub struct Journal;

impl Journal {
    /// Opens the journal in a folder, which is made if need be, and starts its thread. Blocks: it reads all there is.
    ///
    /// # Errors
    /// [`StoreError::Damaged`] if anything that was durable cannot be read; [`StoreError::InUse`] if another process has
    /// the folder open; [`StoreError::Version`]; [`StoreError::Io`].
    pub fn open(folder: &Path, disk: Arc<dyn Disk>) -> Result<(StoreHandle, Recovered)> {
        let first_term = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
        open(folder, disk, Tuning { first_term, ..Tuning::default() })
    }

    /// As [`Self::open`], but nothing is written unless the returned future is polled, which takes `sync` for each group
    /// commit: for simulations, where time is not real. Terms count from 1.
    ///
    /// # Errors
    /// As [`Self::open`].
    pub fn open_driven(
        folder: &Path,
        disk: Arc<dyn Disk>,
        sync: Duration,
    ) -> Result<(StoreHandle, Recovered, impl Future<Output = ()> + Send + use<>)> {
        let (handle, recovered, job) = prepare(folder, disk, Tuning::default())?;
        Ok((handle, recovered, job.drive(sync)))
    }
}

pub(super) fn open(folder: &Path, disk: Arc<dyn Disk>, tuning: Tuning) -> Result<(StoreHandle, Recovered)> {
    let (handle, recovered, job) = prepare(folder, disk, tuning)?;
    thread::Builder::new().name("journal".into()).spawn(|| job.run()).map_err(StoreError::io("start the journal's thread"))?;
    Ok((handle, recovered))
}

fn prepare(folder: &Path, disk: Arc<dyn Disk>, tuning: Tuning) -> Result<(StoreHandle, Recovered, Job)> {
    disk.make_folder(folder).map_err(failed("make", folder))?;
    let lock = lock(disk.as_ref(), &folder.join(LOCK), tuning.lock_patience)?;
    let loaded = load(disk.as_ref(), folder, None)?;
    // What is superseded goes only when what supersedes it is sure to stay.
    disk.sync_folder(folder).map_err(failed("sync", folder))?;
    remove(disk.as_ref(), &loaded.stale);
    let (jobs, groups) = decode(folder, &loaded)?;

    let mut begin = Builder::default();
    begin.push_changes(&loaded.unconfirmed);
    let term = if loaded.term == 0 { tuning.first_term } else { loaded.term + 1 };
    let log = Log::create(disk.as_ref(), folder, term, loaded.next, begin)?;

    let (handle, inbox, progress) = StoreHandle::pair(None);
    let live = loaded.jobs.iter().map(|(id, record)| (id.clone(), record.len() as u32)).collect();
    let writer = Writer {
        live_bytes: loaded.live_bytes(),
        live,
        logged: loaded.bytes + log.bytes(),
        segments: loaded.segments + 1,
        compact_above: tuning.compact_bytes,
        disk,
        folder: folder.to_owned(),
        term,
        tuning,
        log,
        compaction: None,
    };
    info!(folder = %folder.display(), jobs = jobs.len(), term, "journal opened");
    Ok((handle, Recovered { jobs, groups, term }, Job { writer, inbox, progress, _lock: lock }))
}

/// What is done as long as the journal is open.
struct Job {
    writer: Writer,
    inbox: mpsc::UnboundedReceiver<Batch>,
    progress: Progress,
    _lock: Box<dyn Send>,
}

impl Job {
    fn run(mut self) {
        while let Some(batch) = self.inbox.blocking_recv() {
            if self.commit(batch).is_err() {
                break;
            }
        }
        self.writer.finish();
    }

    async fn drive(mut self, sync: Duration) {
        while let Some(batch) = self.inbox.recv().await {
            tokio::time::sleep(sync).await;
            if self.commit(batch).is_err() {
                break;
            }
        }
        self.writer.finish();
    }

    fn commit(&mut self, batch: Batch) -> Result<()> {
        self.writer.commit(batch, &mut self.inbox, &self.progress).inspect_err(|failure| {
            // Final: after a failed write or sync nobody knows what is on the disk.
            error!(error = failure.chain(), "the journal is broken, nothing more is accepted");
            self.progress.failed(failure.chain());
        })
    }
}

fn lock(disk: &dyn Disk, path: &Path, patience: Duration) -> Result<Box<dyn Send>> {
    let start = Instant::now();
    loop {
        if let Some(lock) = disk.lock(path).map_err(failed("lock", path))? {
            return Ok(lock);
        }
        if start.elapsed() >= patience {
            return Err(StoreError::InUse(path.to_owned()));
        }
        thread::sleep(LOCK_PAUSE);
    }
}

/// On all cores: there may be a hundred thousand jobs, and nobody is served meanwhile.
fn decode(folder: &Path, loaded: &Loaded) -> Result<(Vec<JobRecord>, Vec<GroupRecord>)> {
    let kept: Vec<(&String, &[u8])> = loaded.jobs.iter().map(|(id, record)| (id, &**record)).collect();
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let some = |kept: &[(&String, &[u8])]| -> Result<Vec<JobRecord>> {
        kept.iter().map(|(id, record)| record_of(folder, id, record, |job: &JobRecord| &job.id)).collect()
    };
    let mut jobs = Vec::with_capacity(kept.len());
    std::thread::scope(|scope| {
        let parts: Vec<_> = kept.chunks(kept.len().div_ceil(threads).max(1)).collect();
        let decoding: Vec<_> = parts.into_iter().map(|part| scope.spawn(|| some(part))).collect();
        for part in decoding {
            jobs.extend(part.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))?);
        }
        Ok::<_, StoreError>(())
    })?;
    // Records are large to move about.
    jobs.sort_by_cached_key(|job| (job.number, job.id.clone()));
    let own: fn(&GroupRecord) -> &String = |group| &group.group_id;
    let groups = loaded.groups.iter().map(|(id, record)| record_of(folder, id, record, own)).collect::<Result<_>>()?;
    Ok((jobs, groups))
}

/// The record that is kept under `id`, which must be its own.
fn record_of<M: Message + Default>(folder: &Path, id: &str, bytes: &[u8], own: fn(&M) -> &String) -> Result<M> {
    let record = M::decode(bytes).map_err(|error| damaged(folder, 0, &format!("{id} cannot be decoded: {error}")))?;
    if own(&record) != id {
        return Err(damaged(folder, 0, &format!("{id} holds the record of {:?}", own(&record))));
    }
    Ok(record)
}

/// What is left over is harmless: it does not count, and the next opening tries again.
fn remove(disk: &dyn Disk, paths: &[PathBuf]) {
    for path in paths {
        if let Err(error) = disk.remove(path) {
            warn!(path = %path.display(), %error, "removing a superseded segment failed");
        }
    }
}

/// The thread that writes.
struct Writer {
    disk: Arc<dyn Disk>,
    folder: PathBuf,
    term: u64,
    tuning: Tuning,
    log: Log,
    /// Bytes of every job's newest record.
    live: HashMap<String, u32>,
    live_bytes: u64,
    /// Bytes and number of all segments that count.
    logged: u64,
    segments: usize,
    /// Grows when a compaction fails, so that it is not tried with every commit.
    compact_above: u64,
    compaction: Option<Compaction>,
}

/// A compaction that goes on.
struct Compaction {
    thread: JoinHandle<Result<u64>>,
    /// What it will take the place of.
    bytes: u64,
    segments: usize,
}

impl Writer {
    fn finish(&mut self) {
        if let Some(compaction) = self.compaction.take() {
            self.end(compaction);
        }
    }

    /// Makes a batch and all that wait behind it durable with one sync.
    fn commit(&mut self, first: Batch, inbox: &mut mpsc::UnboundedReceiver<Batch>, progress: &Progress) -> Result<()> {
        let mut frame = Builder::default();
        let mut newest = first.number;
        self.add(&mut frame, first)?;
        while frame.len() < GROUP_BYTES
            && let Ok(batch) = inbox.try_recv()
        {
            newest = batch.number;
            self.add(&mut frame, batch)?;
        }
        let before = self.log.bytes();
        self.log.commit(&mut frame)?;
        progress.durable(newest);
        if inbox.is_empty() {
            self.log.confirm()?;
        }
        self.logged += self.log.bytes() - before;
        self.tidy()
    }

    fn add(&mut self, frame: &mut Builder, batch: Batch) -> Result<()> {
        for change in batch.changes {
            let bytes =
                frame.push(&change).ok_or_else(|| StoreError::io("write a batch")(std::io::ErrorKind::FileTooLarge.into()))?;
            match change {
                Change::Put(record) => {
                    // A frame's limit is below 4 GiB.
                    let overhead = record.id.len() + CHANGE_OVERHEAD;
                    let size = bytes.saturating_sub(overhead) as u32;
                    self.live_bytes += u64::from(size) + record.id.len() as u64;
                    let id_bytes = record.id.len();
                    if let Some(old) = self.live.insert(record.id, size) {
                        self.live_bytes -= u64::from(old) + id_bytes as u64;
                    }
                }
                Change::Forget { job_id } => {
                    if let Some(old) = self.live.remove(&job_id) {
                        self.live_bytes -= u64::from(old) + job_id.len() as u64;
                    }
                }
                // There are few, and they never grow.
                Change::Group(_) => {}
            }
        }
        Ok(())
    }

    /// Ends logs that are long, and begins and ends compactions.
    fn tidy(&mut self) -> Result<()> {
        if let Some(compaction) = self.compaction.take_if(|compaction| compaction.thread.is_finished()) {
            self.end(compaction);
        }
        let much = self.logged > self.compact_above && self.logged > COMPACT_RATIO * self.live_bytes;
        let many = self.segments >= MAX_SEGMENTS && self.compact_above <= self.tuning.compact_bytes;
        if self.compaction.is_none() && (much || many) {
            let (bytes, segments) = (self.logged, self.segments);
            self.rotate()?;
            let (disk, folder, term, first) = (self.disk.clone(), self.folder.clone(), self.term, self.log.first());
            let run = move || compact(disk.as_ref(), &folder, term, first);
            let thread = thread::Builder::new().name("compaction".into()).spawn(run);
            let thread = thread.map_err(StoreError::io("start a compaction"))?;
            self.compaction = Some(Compaction { thread, bytes, segments });
        } else if self.log.bytes() > self.tuning.log_bytes {
            self.rotate()?;
        }
        Ok(())
    }

    fn rotate(&mut self) -> Result<()> {
        self.log = Log::create(self.disk.as_ref(), &self.folder, self.term, self.log.successor(), Builder::default())?;
        self.logged += self.log.bytes();
        self.segments += 1;
        Ok(())
    }

    fn end(&mut self, compaction: Compaction) {
        let outcome =
            compaction.thread.join().unwrap_or_else(|_| Err(StoreError::io("compact")(std::io::Error::other("it panicked"))));
        match outcome {
            Ok(bytes) => {
                self.logged = self.logged - compaction.bytes + bytes;
                self.segments = self.segments - compaction.segments + 1;
                self.compact_above = self.tuning.compact_bytes;
                info!(before = compaction.bytes, after = bytes, "journal compacted");
            }
            // The logs are all there still.
            Err(failure) => {
                self.compact_above = self.logged + self.tuning.compact_bytes;
                warn!(error = failure.chain(), "compacting the journal failed; it is tried again when it has grown");
            }
        }
    }
}

/// Bytes of a change beside the job's id and its record.
const CHANGE_OVERHEAD: usize = 7;

/// Puts a snapshot in place of all logs before `first`.
fn compact(disk: &dyn Disk, folder: &Path, term: u64, first: u64) -> Result<u64> {
    let loaded = load(disk, folder, Some(first))?;
    let bytes = segment::write_snapshot(disk, folder, term, first, &loaded)?;
    let superseded = load_stale(disk, folder, first)?;
    remove(disk, &superseded);
    Ok(bytes)
}

fn load_stale(disk: &dyn Disk, folder: &Path, first: u64) -> Result<Vec<PathBuf>> {
    let names = disk.list(folder).map_err(failed("list", folder))?;
    let segments = names.iter().filter_map(|name| segment::parse_name(name));
    Ok(segments.filter(|(_, of)| *of < first).map(|(kind, of)| folder.join(segment::name(kind, of))).collect())
}
