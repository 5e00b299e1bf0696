//! What a folder holds: the newest snapshot, then the logs from there on, each up to where the next one begins.

use std::{
    collections::HashMap,
    path::{Path, PathBuf},
};

use super::{
    Result, StoreError,
    disk::Disk,
    frame::{self, BadHeader, HEADER_BYTES, Header, Kind, Written},
    segment::{self, UNFINISHED, failed},
};

/// The content of a folder.
#[derive(Debug, Default)]
pub(super) struct Loaded {
    /// The newest record of every job that was not forgotten, as it was written.
    pub(super) jobs: HashMap<String, Box<[u8]>>,
    /// The newest record of every group.
    pub(super) groups: HashMap<String, Box<[u8]>>,
    /// The newest opening that wrote something; 0 in an empty folder.
    pub(super) term: u64,
    /// Number of the first frame that a new log may have: of the last frame, if nothing shows that it was synced, and then
    /// of the empty one before it, if there is one, for that was to be synced with it.
    pub(super) next: u64,
    /// The changes of that last frame, which the new log must hold again.
    pub(super) unconfirmed: Vec<u8>,
    /// Bytes of all segments that count.
    pub(super) bytes: u64,
    /// Segments that count.
    pub(super) segments: usize,
    /// Files that count no more: superseded by a snapshot, or never finished.
    pub(super) stale: Vec<PathBuf>,
}

impl Loaded {
    /// Bytes of the jobs.
    pub(super) fn live_bytes(&self) -> u64 {
        self.jobs.iter().map(|(id, record)| (id.len() + record.len()) as u64).sum()
    }
}

/// Reads a folder. With `before`, only what had been written when the log `before` began.
pub(super) fn load(disk: &dyn Disk, folder: &Path, before: Option<u64>) -> Result<Loaded> {
    let segments = Segments::find(disk, folder, before)?;
    let mut loaded = Loaded { stale: segments.stale, next: 1, ..Loaded::default() };
    if let Some(first) = segments.snapshot {
        loaded.read_snapshot(disk, &folder.join(segment::name(Kind::Snapshot, first)), first)?;
        loaded.next = first;
    }
    for (at, first) in segments.logs.iter().enumerate() {
        let path = folder.join(segment::name(Kind::Log, *first));
        if *first != loaded.next {
            return Err(damaged(&path, 0, &format!("the commits from {} to this log's first are missing", loaded.next)));
        }
        let end = segments.logs.get(at + 1).copied().or(before);
        loaded.read_log(disk, &path, *first, end)?;
    }
    if segments.logs.is_empty() && segments.snapshot.is_some() && before.is_none() {
        return Err(damaged(folder, 0, "the log that goes on from the snapshot is missing"));
    }
    Ok(loaded)
}

#[derive(Debug, Default)]
struct Segments {
    /// The newest.
    snapshot: Option<u64>,
    /// Those from the snapshot on, in order.
    logs: Vec<u64>,
    stale: Vec<PathBuf>,
}

impl Segments {
    fn find(disk: &dyn Disk, folder: &Path, before: Option<u64>) -> Result<Self> {
        let mut found = Self::default();
        let mut snapshots = Vec::new();
        for name in disk.list(folder).map_err(failed("list", folder))? {
            match segment::parse_name(&name) {
                Some((Kind::Log, first)) => found.logs.push(first),
                Some((Kind::Snapshot, first)) => snapshots.push(first),
                None if name.ends_with(UNFINISHED) => found.stale.push(folder.join(name)),
                None => {}
            }
        }
        let counts = |first: &u64| before.is_none_or(|before| *first < before);
        found.logs.retain(counts);
        snapshots.retain(counts);
        found.snapshot = snapshots.iter().max().copied();
        let newest = found.snapshot.unwrap_or(0);
        let superseded = |kind, firsts: &[u64]| -> Vec<PathBuf> {
            firsts.iter().filter(|first| **first < newest).map(|first| folder.join(segment::name(kind, *first))).collect()
        };
        found.stale.extend(superseded(Kind::Snapshot, &snapshots));
        found.stale.extend(superseded(Kind::Log, &found.logs));
        found.logs.retain(|first| *first >= newest);
        found.logs.sort_unstable();
        Ok(found)
    }
}

impl Loaded {
    fn read_snapshot(&mut self, disk: &dyn Disk, path: &Path, first: u64) -> Result<()> {
        let (header, bytes) = self.read(disk, path, Kind::Snapshot, first)?;
        let (mut at, mut number) = (HEADER_BYTES, header.first_frame());
        loop {
            let frame = frame::frame_at(&bytes, at, header.salt).filter(|frame| frame.number == number);
            let frame = frame.ok_or_else(|| damaged(path, at, "the snapshot is cut short or damaged"))?;
            if frame.changes.is_empty() {
                return Ok(());
            }
            self.take(path, at, frame.changes)?;
            (at, number) = (frame.end, number + 1);
        }
    }

    /// Reads a log up to frame `end`, where the next log begins; the last one as far as it is whole.
    fn read_log(&mut self, disk: &dyn Disk, path: &Path, first: u64, end: Option<u64>) -> Result<()> {
        let (header, bytes) = self.read(disk, path, Kind::Log, first)?;
        let (mut at, mut number) = (HEADER_BYTES, first);
        let (mut last, mut confirms) = (0..0, false);
        while end != Some(number) {
            let Some(frame) = frame::frame_at(&bytes, at, header.salt).filter(|frame| frame.number == number) else {
                // A log's first frame was synced before the log had its name.
                if end.is_some() || number == first || frame::frame_behind(&bytes, at, header.salt) {
                    return Err(damaged(path, at, &format!("commit {number}, which was durable, is missing or damaged")));
                }
                break;
            };
            self.take(path, at, frame.changes)?;
            confirms = number > first + 1 && last.is_empty();
            last = frame.end - frame.changes.len()..frame.end;
            (at, number) = (frame.end, number + 1);
        }
        if end.is_some() || number == first + 1 {
            self.next = number;
        } else {
            self.next = number - 1 - u64::from(confirms);
            self.unconfirmed = bytes[last].to_vec();
        }
        Ok(())
    }

    fn read(&mut self, disk: &dyn Disk, path: &Path, kind: Kind, first: u64) -> Result<(Header, Vec<u8>)> {
        let bytes = disk.read(path).map_err(failed("read", path))?;
        let header = Header::decode(&bytes).map_err(|bad| match bad {
            BadHeader::Version(found) => StoreError::Version { path: path.to_owned(), found, known: frame::VERSION },
            BadHeader::Damaged(problem) => damaged(path, 0, problem),
        })?;
        if header.kind != kind || header.first != first {
            return Err(damaged(path, 0, "the header is that of another segment"));
        }
        self.term = self.term.max(header.term);
        self.bytes += bytes.len() as u64;
        self.segments += 1;
        Ok((header, bytes))
    }

    fn take(&mut self, path: &Path, at: usize, changes: &[u8]) -> Result<()> {
        for change in frame::changes(changes) {
            match change.ok_or_else(|| damaged(path, at, "a change makes no sense"))? {
                Written::Job(id, record) => drop(self.jobs.insert(id.to_owned(), record.into())),
                Written::Forgotten(id) => drop(self.jobs.remove(id)),
                Written::Group(id, record) => drop(self.groups.insert(id.to_owned(), record.into())),
            }
        }
        Ok(())
    }
}

pub(super) fn damaged(path: &Path, offset: usize, problem: &str) -> StoreError {
    StoreError::Damaged { path: path.to_owned(), offset: offset as u64, problem: problem.to_owned() }
}
