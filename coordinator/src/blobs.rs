//! Pictures on their way in and out: content-addressed, streamed in chunks, never whole in memory. Files of a folder, or
//! objects in S3 when there are several coordinators (`remote.rs`).
//!
//! A blob's id is the sha256 of its bytes, so storing it twice is storing it once. What no job needs is swept away
//! some minutes after it was used last, or sooner when there is no room.

mod incoming;
mod owners;
mod remote;
mod service;

use std::{
    collections::{BTreeSet, HashMap},
    fs, io,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use futures::{Stream, StreamExt, stream};
use proto::v1::{BlobHeader, DownloadBlobResponse, UploadBlobRequest, download_blob_response, upload_blob_request};
use telemetry::Page;
use tokio::fs::File;
use tonic::Status;

use self::{
    incoming::{Deadline, Incoming, next_part},
    remote::Remote,
};
use crate::{
    checkpoints::Place,
    config::Limits,
    error::{Error, Result},
    request::is_blob_id,
};

pub(crate) use self::{owners::Owners, service::BlobApi};

/// How long a blob is kept that no job needs, counted from its last use.
pub const UNUSED_BLOB_TTL: Duration = Duration::from_secs(10 * 60);
/// What was used more recently than this is not swept though the store be full: a client has still to name it in a job, or a worker
/// to say that it is a result.
const FRESH: Duration = Duration::from_secs(60);
/// How soon room is made again in a store that is full: all jobs are asked what they use, and there may be a hundred thousand.
const MAKE_ROOM_PAUSE: Duration = Duration::from_secs(1);
/// Files that are not whole yet begin with this; found at start, they are left over from a crash.
const INCOMING: &str = "incoming-";
/// Media types that are taken, and what their files end with.
const MEDIA_TYPES: [(&str, &str); 3] = [("image/png", "png"), ("image/jpeg", "jpg"), ("image/webp", "webp")];

/// The blobs of one coordinator. Cheap to clone.
#[derive(Debug, Clone)]
pub struct BlobStore {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    /// Of the blobs; with `remote`, only of uploads that are not whole yet. None: those wait in memory.
    folder: Option<PathBuf>,
    remote: Option<Remote>,
    max_blob_bytes: u64,
    max_total_bytes: u64,
    index: Mutex<Index>,
    /// When room was made last.
    made_room: tokio::sync::Mutex<Option<Instant>>,
    /// Read by uploads that become blobs, written by sweeps: what is swept is never what was just stored.
    sweeping: tokio::sync::RwLock<()>,
}

#[derive(Debug, Default)]
struct Index {
    blobs: HashMap<String, Blob>,
    /// Of all blobs, and of all uploads that have begun.
    bytes: u64,
    /// Of those, what clients have brought. What was there when the coordinator began counts as results: nobody knows any more.
    brought: u64,
    /// Of those that jobs needed when it was looked last.
    pinned: u64,
}

/// Who brings a blob.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum By {
    /// A client, for jobs to start from. All of these may take half of the store.
    Client,
    /// A worker, as a job's result.
    Worker,
}

#[derive(Debug, Clone)]
struct Blob {
    byte_size: u64,
    media_type: &'static str,
    extension: &'static str,
    used: Instant,
    /// By a client.
    brought: bool,
}

impl Index {
    /// Adds what was found, unless it is known.
    fn add(&mut self, id: &str, blob: Blob) {
        if !self.blobs.contains_key(id) {
            self.bytes += blob.byte_size;
            self.blobs.insert(id.to_owned(), blob);
        }
    }

    fn remove(&mut self, id: &str) -> Option<Blob> {
        let blob = self.blobs.remove(id)?;
        self.give_back(blob.byte_size, blob.brought);
        Some(blob)
    }

    fn give_back(&mut self, bytes: u64, brought: bool) {
        self.bytes = self.bytes.saturating_sub(bytes);
        self.brought = self.brought.saturating_sub(if brought { bytes } else { 0 });
    }

    /// What jobs need is looked at.
    fn note_pinned(&mut self, in_use: &BTreeSet<String>) {
        self.pinned = in_use.iter().filter_map(|id| self.blobs.get(id)).map(|blob| blob.byte_size).sum();
    }

    /// The limit that so many bytes more would exceed.
    fn exceeds(&self, bytes: u64, by: By, most: u64) -> Option<u64> {
        if by == By::Client && self.brought.saturating_add(bytes) > most / 2 {
            return Some(most / 2);
        }
        (self.bytes.saturating_add(bytes) > most).then_some(most)
    }
}

impl BlobStore {
    /// Opens the blobs of a folder, which is made if need be.
    pub fn open(folder: &Path, limits: &Limits) -> Result<Self> {
        let failed = |what: &str| Error::io(format!("{what} {}", folder.display()));
        make_folder(folder).map_err(failed("make the folder"))?;
        let mut index = Index::default();
        for entry in fs::read_dir(folder).map_err(failed("list"))? {
            let entry = entry.map_err(failed("list"))?;
            let name = entry.file_name().to_string_lossy().into_owned();
            if name.starts_with(INCOMING) {
                fs::remove_file(entry.path()).map_err(failed("clear"))?;
            } else if let Some((id, media_type, extension)) = parse_name(&name) {
                let byte_size = entry.metadata().map_err(failed("list"))?.len();
                index.bytes += byte_size;
                index
                    .blobs
                    .insert(id.to_owned(), Blob { byte_size, media_type, extension, used: Instant::now(), brought: false });
            }
        }
        Ok(Self::new(Some(folder), None, limits, index))
    }

    /// Opens the blobs of an object store. Uploads come in through `folder`, which is made if need be. A coordinator opens this
    /// once it leads; what the one before stores a moment later is found when it is asked for, or by a sweep.
    pub async fn open_remote(folder: &Path, place: &Place, limits: &Limits) -> Result<Self> {
        // Whatever is in it is from before.
        drop(Self::open(folder, limits)?);
        let remote = Remote::new(place.open()?);
        let index = remote.index().await?;
        Ok(Self::new(Some(folder), Some(remote), limits, index))
    }

    /// As [`Self::open_remote`] without a folder: uploads are whole in memory before they are stored. For simulations,
    /// with [`Place::Memory`].
    pub async fn open_in_memory(place: &Place, limits: &Limits) -> Result<Self> {
        let remote = Remote::new(place.open()?);
        let index = remote.index().await?;
        Ok(Self::new(None, Some(remote), limits, index))
    }

    fn new(folder: Option<&Path>, remote: Option<Remote>, limits: &Limits, index: Index) -> Self {
        let shared = Shared {
            folder: folder.map(Path::to_owned),
            remote,
            max_blob_bytes: limits.blob_bytes,
            max_total_bytes: limits.total_blob_bytes,
            index: Mutex::new(index),
            made_room: tokio::sync::Mutex::default(),
            sweeping: tokio::sync::RwLock::default(),
        };
        Self { shared: Arc::new(shared) }
    }

    /// The blob is known; asking counts as a use.
    pub fn contains(&self, id: &str) -> bool {
        self.shared.use_blob(id).is_some()
    }

    /// The blob is known; asking is no use of it.
    fn knows(&self, id: &str) -> bool {
        self.shared.lock().blobs.contains_key(id)
    }

    /// As [`Self::contains`], and in an object store one that the coordinator before stored late is looked for.
    pub async fn holds(&self, id: &str) -> Result<bool> {
        Ok(self.find(id).await?.is_some())
    }

    async fn find(&self, id: &str) -> Result<Option<Blob>> {
        if let Some(blob) = self.shared.use_blob(id) {
            return Ok(Some(blob));
        }
        let Some(remote) = self.shared.remote.as_ref().filter(|_| is_blob_id(id)) else { return Ok(None) };
        // What a sweep is removing is not found and counted as there.
        let _no_sweep = self.shared.sweeping.read().await;
        let found = remote.find(id).await?;
        if let Some(blob) = &found {
            self.shared.lock().add(id, blob.clone());
        }
        Ok(found)
    }

    /// Takes in an upload and gives the blob's id. A stream that ends early, or is not as announced, leaves nothing.
    pub async fn receive(&self, parts: impl Stream<Item = Result<UploadBlobRequest, Status>> + Unpin) -> Result<String> {
        // Whoever knows of no jobs cannot say what may go to make room.
        self.receive_by(By::Worker, std::future::ready(Err(Error::Stopping)), parts).await
    }

    /// As [`Self::receive`]. If there is no room, what is not in use makes some: `in_use` is asked only then.
    pub(crate) async fn receive_by(
        &self,
        by: By,
        in_use: impl Future<Output = Result<BTreeSet<String>>>,
        mut parts: impl Stream<Item = Result<UploadBlobRequest, Status>> + Unpin,
    ) -> Result<String> {
        let Some(upload_blob_request::Part::Header(header)) = next_part(&mut parts, None).await? else {
            return Err(Error::invalid("header", "must be the first message"));
        };
        let bytes = header.byte_size;
        let mut begun = Incoming::begin(self.shared.clone(), by, header.clone());
        if matches!(begun, Err(Error::BlobStoreFull(_))) {
            self.make_room(bytes, by, in_use).await;
            begun = Incoming::begin(self.shared.clone(), by, header);
        }
        let (mut incoming, deadline) = (begun?, Deadline::of(bytes));
        while let Some(part) = next_part(&mut parts, Some(&deadline)).await? {
            match part {
                upload_blob_request::Part::Chunk(chunk) => incoming.write(&chunk).await?,
                upload_blob_request::Part::Header(_) => {
                    return Err(Error::invalid("header", "must come only once"));
                }
            }
        }
        incoming.finish().await
    }

    /// The blob's header and its bytes.
    pub async fn send(&self, id: &str) -> Result<impl Stream<Item = Result<DownloadBlobResponse, Status>> + Send + 'static> {
        let blob = self.find(id).await?.ok_or_else(|| not_found(id))?;
        let chunks = match &self.shared.remote {
            Some(remote) => remote.chunks(id, &blob).await?.left_stream(),
            None => {
                let file = File::open(self.shared.path(id, &blob)).await.map_err(|error| match error.kind() {
                    io::ErrorKind::NotFound => not_found(id),
                    _ => Error::blob_storage("open a blob")(error),
                })?;
                service::chunks(file).right_stream()
            }
        };
        let header = BlobHeader { byte_size: blob.byte_size, sha256: id.to_owned(), media_type: blob.media_type.to_owned() };
        let header = DownloadBlobResponse { part: Some(download_blob_response::Part::Header(header)) };
        Ok(stream::once(async { Ok(header) }).chain(chunks))
    }

    /// Removes what is not in use and was last used longer ago than `ttl`. What an object store has that was not known counts as
    /// used just now.
    pub async fn sweep(&self, in_use: &BTreeSet<String>, ttl: Duration) {
        let listed = match &self.shared.remote {
            Some(remote) => remote.index().await,
            None => Ok(Index::default()),
        };
        let _no_uploads = self.shared.sweeping.write().await;
        let removed = self.remove(self.shared.forget_unused(in_use, ttl)).await;
        // Listed before anything was removed: what was just removed is not to come back.
        match listed {
            Ok(listed) => {
                let mut index = self.shared.lock();
                listed.blobs.into_iter().filter(|(id, _)| !removed.contains(id)).for_each(|(id, blob)| index.add(&id, blob));
            }
            Err(error) => tracing::warn!(%error, "listing the blobs failed"),
        }
    }

    /// Removes whatever no job uses and is not fresh: a job that is asked for would find no room.
    pub(crate) async fn clear_unused(&self, in_use: impl Future<Output = Result<BTreeSet<String>>>) {
        // There is never room for as much as that beside anything.
        self.make_room(self.shared.max_total_bytes, By::Worker, in_use).await;
    }

    /// Removes what no job uses, the oldest first, until an upload has room: not what is fresh.
    async fn make_room(&self, bytes: u64, by: By, in_use: impl Future<Output = Result<BTreeSet<String>>>) {
        let mut last = self.shared.made_room.lock().await;
        // Another upload may have made it meanwhile, or found that none can be made.
        let is_full = self.shared.lock().exceeds(bytes, by, self.shared.max_total_bytes).is_some();
        if !is_full || last.is_some_and(|last| last.elapsed() < MAKE_ROOM_PAUSE) {
            return;
        }
        *last = Some(Instant::now());
        let Ok(in_use) = in_use.await else { return };
        let _no_uploads = self.shared.sweeping.write().await;
        let removed = self.remove(self.shared.forget_oldest(&in_use, bytes, by)).await;
        tracing::info!(blobs = removed.len(), "pictures that no job uses made room for others");
    }

    /// Removes what was forgotten. Under the write lock of `sweeping`.
    async fn remove(&self, forgotten: Vec<(String, Blob)>) -> BTreeSet<String> {
        let mut removed = BTreeSet::new();
        for (id, blob) in forgotten {
            let result = match &self.shared.remote {
                Some(remote) => remote.remove(&id, &blob).await,
                None => tokio::fs::remove_file(self.shared.path(&id, &blob)).await.map_err(Error::io("remove a blob")),
            };
            if let Err(error) = result {
                tracing::warn!(%error, "removing a blob failed");
            }
            removed.insert(id);
        }
        removed
    }

    /// Bytes of all blobs, and of all uploads that have begun.
    pub fn bytes(&self) -> u64 {
        self.shared.lock().bytes
    }

    /// Adds how full the store is.
    pub(crate) fn measure(&self, page: &mut Page) {
        let (bytes, pinned) = {
            let index = self.shared.lock();
            (index.bytes as f64, index.pinned as f64)
        };
        page.gauge("atelier_blob_bytes", "Bytes of the pictures that are stored, and of uploads that have begun.", bytes);
        let help = "Bytes that all pictures may have together; what clients bring may fill half of it.";
        page.gauge("atelier_blob_limit_bytes", help, self.shared.max_total_bytes as f64);
        let help = "Bytes of the pictures that jobs needed when it was looked last, within a minute: inputs of those that are not over, \
                    and results that are kept.";
        page.gauge("atelier_blob_pinned_bytes", help, pinned);
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Index> {
        // The index is whole between any two statements that hold the lock, whoever panicked.
        self.index.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn use_blob(&self, id: &str) -> Option<Blob> {
        let mut index = self.lock();
        let blob = index.blobs.get_mut(id)?;
        blob.used = Instant::now();
        Some(blob.clone())
    }

    fn path(&self, id: &str, blob: &Blob) -> PathBuf {
        // Asked only where there is no remote store, and then there is a folder.
        self.folder.clone().unwrap_or_default().join(format!("{id}.{}", blob.extension))
    }

    fn forget_unused(&self, in_use: &BTreeSet<String>, ttl: Duration) -> Vec<(String, Blob)> {
        let mut index = self.lock();
        index.note_pinned(in_use);
        let is_unused = |id: &str, blob: &Blob| !in_use.contains(id) && blob.used.elapsed() >= ttl;
        let unused: Vec<String> = index.blobs.iter().filter(|(id, blob)| is_unused(id, blob)).map(|(id, _)| id.clone()).collect();
        unused.into_iter().filter_map(|id| index.remove(&id).map(|blob| (id, blob))).collect()
    }

    /// What is to go so that there is room for `bytes`.
    fn forget_oldest(&self, in_use: &BTreeSet<String>, bytes: u64, by: By) -> Vec<(String, Blob)> {
        let mut index = self.lock();
        index.note_pinned(in_use);
        let may_go = index.blobs.iter().filter(|(id, blob)| !in_use.contains(*id) && blob.used.elapsed() >= FRESH);
        let mut may_go: Vec<(Instant, bool, String)> = may_go.map(|(id, blob)| (blob.used, blob.brought, id.clone())).collect();
        may_go.sort_unstable();
        let mut forgotten = Vec::new();
        for (_, brought, id) in may_go {
            match index.exceeds(bytes, by, self.max_total_bytes) {
                None => break,
                // A result's going is no room for what clients bring beyond their half.
                Some(limit) if limit < self.max_total_bytes && !brought => {}
                Some(_) => forgotten.extend(index.remove(&id).map(|blob| (id, blob))),
            }
        }
        forgotten
    }
}

/// Makes a folder and those above it, and their names durable.
fn make_folder(folder: &Path) -> io::Result<()> {
    if folder.is_dir() {
        return Ok(());
    }
    match folder.parent().filter(|parent| !parent.as_os_str().is_empty()) {
        Some(parent) => {
            make_folder(parent)?;
            fs::create_dir_all(folder)?;
            sync_folder(parent)
        }
        None => {
            fs::create_dir_all(folder)?;
            sync_folder(Path::new("."))
        }
    }
}

/// Makes the names in a folder durable.
fn sync_folder(folder: &Path) -> io::Result<()> {
    fs::File::open(folder)?.sync_all()
}

fn parse_name(name: &str) -> Option<(&str, &'static str, &'static str)> {
    let (id, extension) = name.split_once('.')?;
    let (media_type, extension) = MEDIA_TYPES.into_iter().find(|(_, known)| *known == extension)?;
    is_blob_id(id).then_some((id, media_type, extension))
}

fn not_found(id: &str) -> Error {
    Error::BlobNotFound(id.chars().take(crate::request::BLOB_ID_CHARS).collect())
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::*;
    use crate::checkpoints::tests::Home;

    const LIMITS: Limits = Limits {
        queued_jobs: 1,
        finished_jobs: 1,
        finished_job_age: 1,
        blob_bytes: 2_000_000,
        total_blob_bytes: 3_000_000,
        pixels: 1,
    };

    fn store() -> (tempfile::TempDir, BlobStore) {
        let folder = tempfile::tempdir().unwrap();
        let store = BlobStore::open(folder.path(), &LIMITS).unwrap();
        (folder, store)
    }

    fn header(byte_size: u64, sha256: &str) -> BlobHeader {
        BlobHeader { byte_size, sha256: sha256.into(), media_type: "image/png".into() }
    }

    fn parts(header: BlobHeader, bytes: &[u8]) -> Vec<Result<UploadBlobRequest, Status>> {
        let chunk = |chunk: &[u8]| upload_blob_request::Part::Chunk(Bytes::copy_from_slice(chunk));
        [upload_blob_request::Part::Header(header)]
            .into_iter()
            .chain(bytes.chunks(proto::CHUNK_BYTES).map(chunk))
            .map(|part| Ok(UploadBlobRequest { part: Some(part) }))
            .collect()
    }

    async fn upload(store: &BlobStore, header: BlobHeader, bytes: &[u8]) -> Result<String> {
        store.receive(stream::iter(parts(header, bytes))).await
    }

    async fn download(store: &BlobStore, id: &str) -> Vec<DownloadBlobResponse> {
        store.send(id).await.unwrap().map(Result::unwrap).collect().await
    }

    fn refused_field(result: Result<String>) -> String {
        match result {
            Err(Error::InvalidRequest(violations)) => violations[0].field.clone(),
            other => panic!("expected a violation, found {other:?}"),
        }
    }

    fn files(folder: &tempfile::TempDir) -> usize {
        fs::read_dir(folder.path()).unwrap().count()
    }

    #[tokio::test]
    async fn a_blob_comes_back_in_chunks_as_it_went_in() {
        let (_folder, store) = store();
        let bytes: Vec<u8> = (0..1_500_000u32).map(|i| (i * 7 % 251) as u8).collect();
        let id = upload(&store, header(1_500_000, ""), &bytes).await.unwrap();
        let mut back = vec![];
        for response in download(&store, &id).await {
            match response.part.unwrap() {
                download_blob_response::Part::Header(header) => {
                    assert_eq!((header.byte_size, header.sha256.as_str()), (1_500_000, id.as_str()));
                }
                download_blob_response::Part::Chunk(chunk) => {
                    assert!(chunk.len() <= proto::CHUNK_BYTES);
                    back.extend_from_slice(&chunk);
                }
            }
        }
        assert!(back == bytes);
    }

    #[tokio::test]
    async fn a_truncated_upload_stores_nothing() {
        let (folder, store) = store();
        assert_eq!(refused_field(upload(&store, header(11, ""), b"ten bytes.").await), "header.byte_size");
        let mut broken = parts(header(20, ""), b"ten bytes.");
        broken.push(Err(Status::cancelled("gone")));
        assert_eq!(refused_field(store.receive(stream::iter(broken)).await), "chunk");
        assert_eq!((files(&folder), store.bytes()), (0, 0));
    }

    #[tokio::test]
    async fn what_is_not_as_announced_stores_nothing() {
        let (folder, store) = store();
        let other = "0".repeat(64);
        assert_eq!(refused_field(upload(&store, header(10, &other), b"ten bytes.").await), "header.sha256");
        assert_eq!(refused_field(upload(&store, header(9, ""), b"ten bytes.").await), "header.byte_size");
        assert_eq!(refused_field(upload(&store, header(2_000_001, ""), b"").await), "header.byte_size");
        let text = BlobHeader { media_type: "text/html".into(), ..header(10, "") };
        assert_eq!(refused_field(upload(&store, text, b"ten bytes.").await), "header.media_type");
        assert_eq!((files(&folder), store.bytes()), (0, 0));
    }

    #[tokio::test]
    async fn the_same_bytes_are_stored_once() {
        let (folder, store) = store();
        let first = upload(&store, header(10, ""), b"ten bytes.").await.unwrap();
        let second = upload(&store, header(10, &first), b"ten bytes.").await.unwrap();
        assert_eq!(first, second);
        assert_eq!((files(&folder), store.bytes()), (1, 10));
    }

    #[tokio::test]
    async fn the_store_has_a_limit() {
        let (_folder, store) = store();
        upload(&store, header(2_000_000, ""), &vec![1; 2_000_000]).await.unwrap();
        let second = upload(&store, header(2_000_000, ""), &vec![2; 2_000_000]).await;
        assert!(matches!(second, Err(Error::BlobStoreFull(3_000_000))));
    }

    async fn upload_by(store: &BlobStore, by: By, in_use: &[&String], bytes: &[u8]) -> Result<String> {
        let in_use = std::future::ready(Ok(in_use.iter().map(|id| (*id).clone()).collect()));
        store.receive_by(by, in_use, stream::iter(parts(header(bytes.len() as u64, ""), bytes))).await
    }

    /// Makes it as if the blob had not been used for so long.
    fn unused_for(store: &BlobStore, id: &str, time: Duration) {
        let mut index = store.shared.lock();
        let blob = index.blobs.get_mut(id).unwrap();
        blob.used = blob.used.checked_sub(time).unwrap();
    }

    #[tokio::test]
    async fn a_full_store_makes_room_of_what_no_job_uses_the_oldest_first_and_nothing_fresh() {
        let (folder, store) = store();
        let mut ids = vec![];
        for byte in 0..3 {
            ids.push(upload_by(&store, By::Worker, &[], &vec![byte; 900_000]).await.unwrap());
        }
        let full = |result: Result<String>| assert!(matches!(result, Err(Error::BlobStoreFull(3_000_000))));
        full(upload_by(&store, By::Worker, &[], &vec![9; 1_000_000]).await);
        *store.shared.made_room.lock().await = None;
        unused_for(&store, &ids[0], FRESH * 2);
        unused_for(&store, &ids[1], FRESH * 3);
        unused_for(&store, &ids[2], FRESH);
        full(upload_by(&store, By::Worker, &[&ids[0], &ids[1], &ids[2]], &vec![9; 1_000_000]).await);
        *store.shared.made_room.lock().await = Some(Instant::now() + UNUSED_BLOB_TTL);
        full(upload_by(&store, By::Worker, &[], &vec![9; 1_000_000]).await);
        *store.shared.made_room.lock().await = None;
        upload_by(&store, By::Worker, &[&ids[1]], &vec![9; 1_000_000]).await.unwrap();
        let kept: Vec<bool> = ids.iter().map(|id| store.knows(id)).collect();
        assert_eq!(kept, [false, true, true], "the oldest that no job uses, and no more than was needed");
        assert_eq!((files(&folder), store.bytes()), (3, 2_800_000));
    }

    #[tokio::test]
    async fn what_clients_bring_leaves_half_of_the_store_to_results() {
        let (_folder, store) = store();
        let first = upload_by(&store, By::Client, &[], &vec![1; 1_000_000]).await.unwrap();
        let second = upload_by(&store, By::Client, &[], &vec![2; 1_000_000]).await;
        assert!(matches!(second, Err(Error::BlobStoreFull(1_500_000))));
        assert_eq!(refused_field(upload_by(&store, By::Client, &[], &vec![2; 1_600_000]).await), "header.byte_size");
        let result = upload_by(&store, By::Worker, &[], &vec![3; 2_000_000]).await.unwrap();
        *store.shared.made_room.lock().await = None;
        for id in [&first, &result] {
            unused_for(&store, id, FRESH);
        }
        upload_by(&store, By::Client, &[], &vec![4; 900_000]).await.unwrap();
        assert!(store.knows(&result) && !store.knows(&first), "a result's going would be no room for it");
        assert_eq!((store.bytes(), store.shared.lock().brought), (2_900_000, 900_000));
    }

    #[tokio::test(start_paused = true)]
    async fn an_upload_that_never_ends_gives_its_share_back() {
        let (folder, store) = store();
        let chunk = || Ok(UploadBlobRequest { part: Some(upload_blob_request::Part::Chunk(Bytes::from_static(b"."))) });
        let drops = stream::unfold((), |()| async {
            tokio::time::sleep(Duration::from_secs(20)).await;
            Some((chunk(), ()))
        });
        let parts = stream::iter(parts(header(1_900_000, ""), b"")).chain(drops).boxed();
        match store.receive(parts).await {
            Err(Error::InvalidRequest(violations)) => assert!(violations[0].problem.contains("58 s"), "{violations:?}"),
            other => panic!("expected a violation, found {other:?}"),
        }
        assert_eq!((files(&folder), store.bytes()), (0, 0));
    }

    #[tokio::test]
    async fn a_store_that_cannot_be_written_to_may_be_asked_again() {
        let (folder, store) = store();
        fs::remove_dir(folder.path()).unwrap();
        let failed = upload(&store, header(10, ""), b"ten bytes.").await.unwrap_err();
        let status = crate::api::status(&failed);
        assert_eq!((status.code(), failed.reason()), (tonic::Code::Unavailable, "BLOB_STORE_UNAVAILABLE"));
        assert_eq!(store.bytes(), 0);
    }

    #[tokio::test]
    async fn who_brought_what_is_forgotten_with_it_and_is_no_use_of_it() {
        let (_folder, store) = store();
        let (owners, tenant): (Owners, std::sync::Arc<str>) = (Owners::default(), "a".into());
        let kept = upload(&store, header(4, ""), b"kept").await.unwrap();
        unused_for(&store, &kept, UNUSED_BLOB_TTL);
        owners.note(tenant.clone(), kept.clone(), &store);
        let gone = |number: usize| format!("{number:064}");
        for number in 0..20_000 {
            owners.note(tenant.clone(), gone(number), &store);
        }
        assert!(owners.has(&tenant, &kept) && owners.has(&tenant, &gone(19_999)) && !owners.has(&tenant, &gone(0)));
        store.sweep(&BTreeSet::new(), UNUSED_BLOB_TTL).await;
        assert!(!store.knows(&kept), "that somebody brought it keeps nothing");
    }

    #[tokio::test]
    async fn only_blobs_can_be_asked_for() {
        let (_folder, store) = store();
        for id in ["", "../secret", &"a".repeat(64)] {
            assert!(matches!(store.send(id).await.err(), Some(Error::BlobNotFound(_))));
        }
    }

    #[tokio::test]
    async fn a_sweep_takes_what_nobody_uses() {
        let (folder, store) = store();
        let kept = upload(&store, header(4, ""), b"kept").await.unwrap();
        let swept = upload(&store, header(5, ""), b"swept").await.unwrap();
        store.sweep(&BTreeSet::new(), UNUSED_BLOB_TTL).await;
        assert_eq!(files(&folder), 2, "both were used just now");
        store.sweep(&[kept.clone()].into(), Duration::ZERO).await;
        assert!(store.contains(&kept) && !store.contains(&swept));
        assert_eq!((files(&folder), store.bytes()), (1, 4));
    }

    #[tokio::test]
    async fn blobs_of_an_object_store_come_back_and_are_swept() {
        let (folder, home) = (tempfile::tempdir().unwrap(), Home::s3().await);
        let limits = Limits { blob_bytes: 20_000_000, total_blob_bytes: 20_000_000, ..LIMITS };
        let open = || BlobStore::open_remote(folder.path(), &home.place, &limits);
        let store = open().await.unwrap();
        // One request, and several parts.
        let large: Vec<u8> = (0..12_000_001u32).map(|i| (i * 7 % 251) as u8).collect();
        let large_id = upload(&store, header(12_000_001, ""), &large).await.unwrap();
        let small_id = upload(&store, header(10, ""), b"ten bytes.").await.unwrap();
        assert_eq!(upload(&store, header(10, ""), b"ten bytes.").await.unwrap(), small_id, "stored once");
        assert_eq!(refused_field(upload(&store, header(9, ""), b"ten bytes.").await), "header.byte_size");
        assert_eq!(files(&folder), 0, "nothing stays in the folder");
        let next = open().await.unwrap();
        assert_eq!(next.bytes(), 12_000_011);
        let mut back = vec![];
        for response in download(&next, &large_id).await {
            if let Some(download_blob_response::Part::Chunk(chunk)) = response.part {
                assert!(chunk.len() <= proto::CHUNK_BYTES);
                back.extend_from_slice(&chunk);
            }
        }
        assert!(back == large);
        next.sweep(&[small_id.clone()].into(), Duration::ZERO).await;
        assert!(next.contains(&small_id) && !next.contains(&large_id));
        assert_eq!(open().await.unwrap().bytes(), 10);
    }

    #[tokio::test]
    async fn what_the_coordinator_before_stored_late_is_found_and_swept() {
        let (folder, home) = (tempfile::tempdir().unwrap(), Home::s3().await);
        let open = || BlobStore::open_remote(folder.path(), &home.place, &LIMITS);
        let (before, now) = (open().await.unwrap(), open().await.unwrap());
        let late = upload(&before, header(4, ""), b"late").await.unwrap();
        let unseen = upload(&before, header(6, ""), b"unseen").await.unwrap();
        assert!(!now.contains(&late) && now.holds(&late).await.unwrap() && !now.holds(&"0".repeat(64)).await.unwrap());
        assert_eq!((download(&now, &late).await.len(), now.bytes()), (2, 4));
        now.sweep(&[late.clone()].into(), Duration::ZERO).await;
        assert_eq!(now.bytes(), 10, "found, and used just now");
        now.sweep(&[late.clone()].into(), Duration::ZERO).await;
        assert!(now.contains(&late) && !now.holds(&unseen).await.unwrap());
        assert_eq!((now.bytes(), open().await.unwrap().bytes()), (4, 4));
    }

    #[tokio::test]
    async fn blobs_outlive_the_process_and_halves_do_not() {
        let (folder, store) = store();
        let id = upload(&store, header(10, ""), b"ten bytes.").await.unwrap();
        fs::write(folder.path().join("incoming-x"), b"half").unwrap();
        let reopened = BlobStore::open(folder.path(), &LIMITS).unwrap();
        assert!(reopened.contains(&id));
        assert_eq!((files(&folder), reopened.bytes()), (1, 10));
    }
}
