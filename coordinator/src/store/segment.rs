//! Segments as they are written: logs, which grow, and snapshots, which take the place of all logs before them.
//!
//! A segment gets its name only when its beginning (a snapshot: all of it) is synced, so what has a name is whole up to
//! there.

use std::{
    io,
    path::{Path, PathBuf},
};

use uuid::Uuid;

use super::{
    Result, StoreError,
    disk::{Disk, DiskFile},
    frame::{Builder, Header, Kind},
    load::Loaded,
};

/// Bytes of a snapshot's frames: what is in memory beside the jobs.
const SNAPSHOT_FRAME_BYTES: usize = 1 << 20;
/// Files that are not whole yet end with this.
pub(super) const UNFINISHED: &str = ".tmp";

/// The name of a segment.
pub(super) fn name(kind: Kind, first: u64) -> String {
    match kind {
        Kind::Log => format!("log-{first:020}"),
        Kind::Snapshot => format!("snapshot-{first:020}"),
    }
}

/// What the name of a segment says.
pub(super) fn parse_name(name: &str) -> Option<(Kind, u64)> {
    let (kind, first) = name.split_once('-')?;
    let kind = match kind {
        "log" => Kind::Log,
        "snapshot" => Kind::Snapshot,
        _ => return None,
    };
    (first.len() == 20).then(|| first.parse().ok()).flatten().map(|first| (kind, first))
}

/// A log that is appended to.
#[derive(Debug)]
pub(super) struct Log {
    file: Box<dyn DiskFile>,
    path: PathBuf,
    header: Header,
    next: u64,
    bytes: u64,
    /// The last frame only says that the one before it is durable, and was not synced itself.
    confirmed: bool,
}

impl Log {
    /// A new log, durable when this returns, whose first frame holds `begin`.
    pub(super) fn create(disk: &dyn Disk, folder: &Path, term: u64, first: u64, mut begin: Builder) -> Result<Self> {
        let header = Header { kind: Kind::Log, term, first, salt: draw_salt() };
        let (mut file, unfinished, path) = unfinished(disk, folder, &header)?;
        let mut bytes = header.encode();
        bytes.extend(begin.finish(header.salt, first));
        file.append(&bytes).map_err(failed("write", &unfinished))?;
        publish(disk, folder, file.as_mut(), &unfinished, &path)?;
        Ok(Self { file, path, header, next: first + 1, bytes: bytes.len() as u64, confirmed: false })
    }

    /// Number of the first frame.
    pub(super) fn first(&self) -> u64 {
        self.header.first
    }

    /// Number of the first frame of the log that comes after this one: every frame before it is durable.
    pub(super) fn successor(&self) -> u64 {
        if self.confirmed { self.next - 1 } else { self.next }
    }

    /// Bytes written so far.
    pub(super) fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Writes a frame and makes it durable.
    pub(super) fn commit(&mut self, frame: &mut Builder) -> Result<()> {
        self.append(frame)?;
        self.confirmed = false;
        self.file.sync().map_err(failed("sync", &self.path))
    }

    /// Writes an empty frame, which says that the one before it is durable.
    pub(super) fn confirm(&mut self) -> Result<()> {
        self.append(&mut Builder::default())?;
        self.confirmed = true;
        Ok(())
    }

    fn append(&mut self, frame: &mut Builder) -> Result<()> {
        let bytes = frame.finish(self.header.salt, self.next);
        self.file.append(&bytes).map_err(failed("write", &self.path))?;
        self.next += 1;
        self.bytes += bytes.len() as u64;
        Ok(())
    }
}

/// Writes all jobs and groups as they were before commit `first`, durable when this returns. Gives the bytes written.
pub(super) fn write_snapshot(disk: &dyn Disk, folder: &Path, term: u64, first: u64, loaded: &Loaded) -> Result<u64> {
    let header = Header { kind: Kind::Snapshot, term, first, salt: draw_salt() };
    let (mut file, unfinished, path) = unfinished(disk, folder, &header)?;
    let begin = header.encode();
    let mut written = begin.len() as u64;
    file.append(&begin).map_err(failed("write", &unfinished))?;
    let mut number = header.first_frame();
    let mut frame = Builder::default();
    let mut put = |frame: &mut Builder| {
        let bytes = frame.finish(header.salt, number);
        number += 1;
        written += bytes.len() as u64;
        file.append(&bytes).map_err(failed("write", &unfinished))
    };
    let too_large = || failed("write a record to", &unfinished)(io::ErrorKind::FileTooLarge.into());
    for (group_id, record) in &loaded.groups {
        frame.push_group(group_id, record).ok_or_else(too_large)?;
    }
    for (job_id, record) in &loaded.jobs {
        frame.push_job(job_id, record).ok_or_else(too_large)?;
        if frame.len() >= SNAPSHOT_FRAME_BYTES {
            put(&mut frame)?;
        }
    }
    if frame.len() > 0 {
        put(&mut frame)?;
    }
    // An empty frame is the end: a snapshot without it is not whole.
    put(&mut frame)?;
    publish(disk, folder, file.as_mut(), &unfinished, &path)?;
    Ok(written)
}

type Unfinished = (Box<dyn DiskFile>, PathBuf, PathBuf);

fn unfinished(disk: &dyn Disk, folder: &Path, header: &Header) -> Result<Unfinished> {
    let name = name(header.kind, header.first);
    let unfinished = folder.join(format!("{name}{UNFINISHED}"));
    match disk.remove(&unfinished) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(failed("remove", &unfinished)(error)),
        _ => {}
    }
    let file = disk.create(&unfinished).map_err(failed("make", &unfinished))?;
    Ok((file, unfinished, folder.join(name)))
}

fn publish(disk: &dyn Disk, folder: &Path, file: &mut dyn DiskFile, unfinished: &Path, path: &Path) -> Result<()> {
    file.sync().map_err(failed("sync", unfinished))?;
    disk.rename(unfinished, path).map_err(failed("name", path))?;
    disk.sync_folder(folder).map_err(failed("sync", folder))
}

/// Known to nobody outside.
fn draw_salt() -> u64 {
    Uuid::new_v4().as_u64_pair().1 ^ Uuid::new_v4().as_u64_pair().0
}

pub(super) fn failed(what: &str, path: &Path) -> impl FnOnce(io::Error) -> StoreError + use<> {
    StoreError::io(format!("{what} {}", path.display()))
}
