//! Pictures on their way in and out: content-addressed files, streamed in chunks, never whole in memory.
//!
//! A blob's id is the sha256 of its bytes, so storing it twice is storing it once. What no job refers to is swept away
//! some minutes after it was used last.

use std::{
    collections::{BTreeSet, HashMap},
    fs,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use bytes::{Bytes, BytesMut};
use futures::{Stream, StreamExt, stream};
use proto::v1::{
    BlobHeader, DownloadBlobRequest, DownloadBlobResponse, UploadBlobRequest, UploadBlobResponse,
    blob_service_server::BlobService, download_blob_response, upload_blob_request,
};
use sha2::{Digest, Sha256};
use tempfile::TempPath;
use tokio::{
    fs::File,
    io::{AsyncReadExt, AsyncWriteExt},
    time::timeout,
};
use tonic::{Request, Response, Status, Streaming};

use crate::{
    api::status,
    config::Limits,
    error::{Error, Result},
    request::is_blob_id,
};

/// How long a blob is kept that no job refers to, counted from its last use.
pub const UNUSED_BLOB_TTL: Duration = Duration::from_secs(10 * 60);
/// Longest wait for the next chunk of an upload: a stalled client must not hold its share of the store.
const CHUNK_DEADLINE: Duration = Duration::from_secs(30);
/// Files that are not whole yet begin with this; found at start, they are left over from a crash.
const INCOMING: &str = "incoming-";
/// Media types that are taken, and what their files end with.
const MEDIA_TYPES: [(&str, &str); 3] = [
    ("image/png", "png"),
    ("image/jpeg", "jpg"),
    ("image/webp", "webp"),
];

/// The blobs of one coordinator. Cheap to clone.
#[derive(Debug, Clone)]
pub struct BlobStore {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    folder: PathBuf,
    max_blob_bytes: u64,
    max_total_bytes: u64,
    index: Mutex<Index>,
}

#[derive(Debug, Default)]
struct Index {
    blobs: HashMap<String, Blob>,
    /// Of all blobs, and of all uploads that have begun.
    bytes: u64,
}

#[derive(Debug, Clone)]
struct Blob {
    byte_size: u64,
    media_type: &'static str,
    extension: &'static str,
    used: Instant,
}

impl BlobStore {
    /// Opens the blobs of a folder, which is made if need be.
    pub fn open(folder: &Path, limits: &Limits) -> Result<Self> {
        let failed = |what: &str| Error::io(format!("{what} {}", folder.display()));
        fs::create_dir_all(folder).map_err(failed("make the folder"))?;
        let mut index = Index::default();
        for entry in fs::read_dir(folder).map_err(failed("list"))? {
            let entry = entry.map_err(failed("list"))?;
            let name = entry.file_name().to_string_lossy().into_owned();
            if name.starts_with(INCOMING) {
                fs::remove_file(entry.path()).map_err(failed("clear"))?;
            } else if let Some((id, media_type, extension)) = parse_name(&name) {
                let byte_size = entry.metadata().map_err(failed("list"))?.len();
                index.bytes += byte_size;
                index.blobs.insert(
                    id.to_owned(),
                    Blob {
                        byte_size,
                        media_type,
                        extension,
                        used: Instant::now(),
                    },
                );
            }
        }
        let shared = Shared {
            folder: folder.to_owned(),
            max_blob_bytes: limits.blob_bytes,
            max_total_bytes: limits.total_blob_bytes,
            index: Mutex::new(index),
        };
        Ok(Self {
            shared: Arc::new(shared),
        })
    }

    /// The blob is there; asking counts as a use.
    pub fn contains(&self, id: &str) -> bool {
        self.shared.use_blob(id).is_some()
    }

    /// Takes in an upload and gives the blob's id. A stream that ends early, or is not as announced, leaves nothing.
    pub async fn receive(
        &self,
        mut parts: impl Stream<Item = Result<UploadBlobRequest, Status>> + Unpin,
    ) -> Result<String> {
        let Some(upload_blob_request::Part::Header(header)) = next_part(&mut parts).await? else {
            return Err(Error::invalid("header", "must be the first message"));
        };
        let mut incoming = Incoming::begin(self.shared.clone(), header)?;
        while let Some(part) = next_part(&mut parts).await? {
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
    pub async fn send(
        &self,
        id: &str,
    ) -> Result<impl Stream<Item = Result<DownloadBlobResponse, Status>> + Send + 'static> {
        let blob = self.shared.use_blob(id).ok_or_else(|| not_found(id))?;
        let file = File::open(self.shared.path(id, &blob))
            .await
            .map_err(Error::io("open a blob"))?;
        let header = BlobHeader {
            byte_size: blob.byte_size,
            sha256: id.to_owned(),
            media_type: blob.media_type.to_owned(),
        };
        let header = DownloadBlobResponse {
            part: Some(download_blob_response::Part::Header(header)),
        };
        Ok(stream::once(async { Ok(header) }).chain(chunks(file)))
    }

    /// Removes what is not in use and was last used longer ago than `ttl`.
    pub async fn sweep(&self, in_use: &BTreeSet<String>, ttl: Duration) {
        for path in self.shared.forget_unused(in_use, ttl) {
            if let Err(error) = tokio::fs::remove_file(&path).await {
                tracing::warn!(%error, "removing a blob failed");
            }
        }
    }

    /// Bytes of all blobs, and of all uploads that have begun.
    pub fn bytes(&self) -> u64 {
        self.shared.lock().bytes
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
        self.folder.join(format!("{id}.{}", blob.extension))
    }

    fn forget_unused(&self, in_use: &BTreeSet<String>, ttl: Duration) -> Vec<PathBuf> {
        let mut index = self.lock();
        let is_unused = |id: &str, blob: &Blob| !in_use.contains(id) && blob.used.elapsed() >= ttl;
        let unused: Vec<String> = index
            .blobs
            .iter()
            .filter(|(id, blob)| is_unused(id, blob))
            .map(|(id, _)| id.clone())
            .collect();
        let mut paths = Vec::new();
        for id in unused {
            if let Some(blob) = index.blobs.remove(&id) {
                index.bytes = index.bytes.saturating_sub(blob.byte_size);
                paths.push(self.path(&id, &blob));
            }
        }
        paths
    }
}

/// An upload: a file under a temporary name, and its share of the store. Dropping it gives both back.
struct Incoming {
    shared: Arc<Shared>,
    header: BlobHeader,
    media_type: &'static str,
    extension: &'static str,
    file: File,
    path: TempPath,
    sha256: Sha256,
    received: u64,
    share: Share,
}

impl Incoming {
    fn begin(shared: Arc<Shared>, header: BlobHeader) -> Result<Self> {
        let Some((media_type, extension)) = MEDIA_TYPES
            .into_iter()
            .find(|(name, _)| *name == header.media_type)
        else {
            return Err(Error::invalid(
                "header.media_type",
                "must be image/png, image/jpeg or image/webp",
            ));
        };
        if !header.sha256.is_empty() && !is_blob_id(&header.sha256) {
            return Err(Error::invalid(
                "header.sha256",
                "must be 64 hex digits in lower case, or empty",
            ));
        }
        let most = shared.max_blob_bytes;
        if header.byte_size == 0 || header.byte_size > most {
            return Err(Error::invalid(
                "header.byte_size",
                format!("{}: must be 1 to {most}", header.byte_size),
            ));
        }
        let share = Share::take(&shared, header.byte_size)?;
        let file = tempfile::Builder::new()
            .prefix(INCOMING)
            .tempfile_in(&shared.folder)
            .map_err(Error::io("make a file for an upload"))?;
        let (file, path) = file.into_parts();
        let file = File::from_std(file);
        Ok(Self {
            shared,
            header,
            media_type,
            extension,
            file,
            path,
            sha256: Sha256::new(),
            received: 0,
            share,
        })
    }

    async fn write(&mut self, chunk: &Bytes) -> Result<()> {
        self.received += chunk.len() as u64;
        if self.received > self.header.byte_size {
            let announced = self.header.byte_size;
            return Err(Error::invalid(
                "header.byte_size",
                format!("{announced} bytes were announced, more came"),
            ));
        }
        self.sha256.update(chunk);
        self.file
            .write_all(chunk)
            .await
            .map_err(Error::io("write a blob"))
    }

    async fn finish(self) -> Result<String> {
        let Self {
            shared,
            header,
            media_type,
            extension,
            file,
            path,
            sha256,
            received,
            share,
        } = self;
        if received < header.byte_size {
            let text = format!("{} bytes were announced, {received} came", header.byte_size);
            return Err(Error::invalid("header.byte_size", text));
        }
        let id = hex(&sha256.finalize());
        if !header.sha256.is_empty() && header.sha256 != id {
            return Err(Error::invalid(
                "header.sha256",
                format!("the bytes have the sha256 {id}"),
            ));
        }
        file.sync_all().await.map_err(Error::io("write a blob"))?;
        drop(file);
        let blob = Blob {
            byte_size: received,
            media_type,
            extension,
            used: Instant::now(),
        };
        let mut index = shared.lock();
        if let Some(known) = index.blobs.get_mut(&id) {
            known.used = Instant::now();
        } else {
            path.persist(shared.path(&id, &blob))
                .map_err(|error| Error::io("name a blob")(error.error))?;
            index.blobs.insert(id.clone(), blob);
            share.keep();
        }
        Ok(id)
    }
}

/// Bytes of the store that are spoken for.
struct Share {
    shared: Arc<Shared>,
    bytes: u64,
}

impl Share {
    fn take(shared: &Arc<Shared>, bytes: u64) -> Result<Self> {
        let mut index = shared.lock();
        if index.bytes.saturating_add(bytes) > shared.max_total_bytes {
            return Err(Error::BlobStoreFull(shared.max_total_bytes));
        }
        index.bytes += bytes;
        Ok(Self {
            shared: shared.clone(),
            bytes,
        })
    }

    /// The bytes belong to a blob from now on.
    fn keep(mut self) {
        self.bytes = 0;
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        if self.bytes > 0 {
            let mut index = self.shared.lock();
            index.bytes = index.bytes.saturating_sub(self.bytes);
        }
    }
}

async fn next_part(
    parts: &mut (impl Stream<Item = Result<UploadBlobRequest, Status>> + Unpin),
) -> Result<Option<upload_blob_request::Part>> {
    match timeout(CHUNK_DEADLINE, parts.next()).await {
        Ok(None) => Ok(None),
        Ok(Some(Ok(UploadBlobRequest { part: Some(part) }))) => Ok(Some(part)),
        Ok(Some(Ok(UploadBlobRequest { part: None }))) => {
            Err(Error::invalid("part", "must be a header or a chunk"))
        }
        Ok(Some(Err(_))) => Err(Error::invalid("chunk", "the upload broke off")),
        Err(_) => Err(Error::invalid(
            "chunk",
            format!("none came for {} s", CHUNK_DEADLINE.as_secs()),
        )),
    }
}

fn chunks(file: File) -> impl Stream<Item = Result<DownloadBlobResponse, Status>> {
    stream::try_unfold(file, async |mut file| {
        let mut chunk = BytesMut::with_capacity(proto::CHUNK_BYTES);
        while chunk.len() < proto::CHUNK_BYTES {
            let room = (proto::CHUNK_BYTES - chunk.len()) as u64;
            let read = (&mut file).take(room).read_buf(&mut chunk).await;
            if read.map_err(|error| status(&Error::io("read a blob")(error)))? == 0 {
                break;
            }
        }
        if chunk.is_empty() {
            return Ok(None);
        }
        let part = Some(download_blob_response::Part::Chunk(chunk.freeze()));
        Ok(Some((DownloadBlobResponse { part }, file)))
    })
}

fn parse_name(name: &str) -> Option<(&str, &'static str, &'static str)> {
    let (id, extension) = name.split_once('.')?;
    let (media_type, extension) = MEDIA_TYPES
        .into_iter()
        .find(|(_, known)| *known == extension)?;
    is_blob_id(id).then_some((id, media_type, extension))
}

fn hex(digest: &[u8]) -> String {
    digest.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn not_found(id: &str) -> Error {
    Error::BlobNotFound(id.chars().take(crate::request::BLOB_ID_CHARS).collect())
}

/// Serves `BlobService`.
#[derive(Debug, Clone)]
pub(crate) struct BlobApi {
    pub(crate) store: BlobStore,
}

#[tonic::async_trait]
impl BlobService for BlobApi {
    async fn upload_blob(
        &self,
        request: Request<Streaming<UploadBlobRequest>>,
    ) -> Result<Response<UploadBlobResponse>, Status> {
        let blob_id = self
            .store
            .receive(request.into_inner())
            .await
            .map_err(|error| status(&error))?;
        Ok(Response::new(UploadBlobResponse { blob_id }))
    }

    type DownloadBlobStream = stream::BoxStream<'static, Result<DownloadBlobResponse, Status>>;

    async fn download_blob(
        &self,
        request: Request<DownloadBlobRequest>,
    ) -> Result<Response<Self::DownloadBlobStream>, Status> {
        let parts = self
            .store
            .send(&request.into_inner().blob_id)
            .await
            .map_err(|error| status(&error))?;
        Ok(Response::new(parts.boxed()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMITS: Limits = Limits {
        queued_jobs: 1,
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
        BlobHeader {
            byte_size,
            sha256: sha256.into(),
            media_type: "image/png".into(),
        }
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
        store
            .send(id)
            .await
            .unwrap()
            .map(Result::unwrap)
            .collect()
            .await
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
                    assert_eq!(
                        (header.byte_size, header.sha256.as_str()),
                        (1_500_000, id.as_str())
                    );
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
        assert_eq!(
            refused_field(upload(&store, header(11, ""), b"ten bytes.").await),
            "header.byte_size"
        );
        let mut broken = parts(header(20, ""), b"ten bytes.");
        broken.push(Err(Status::cancelled("gone")));
        assert_eq!(
            refused_field(store.receive(stream::iter(broken)).await),
            "chunk"
        );
        assert_eq!((files(&folder), store.bytes()), (0, 0));
    }

    #[tokio::test]
    async fn what_is_not_as_announced_stores_nothing() {
        let (folder, store) = store();
        let other = "0".repeat(64);
        assert_eq!(
            refused_field(upload(&store, header(10, &other), b"ten bytes.").await),
            "header.sha256"
        );
        assert_eq!(
            refused_field(upload(&store, header(9, ""), b"ten bytes.").await),
            "header.byte_size"
        );
        assert_eq!(
            refused_field(upload(&store, header(2_000_001, ""), b"").await),
            "header.byte_size"
        );
        let text = BlobHeader {
            media_type: "text/html".into(),
            ..header(10, "")
        };
        assert_eq!(
            refused_field(upload(&store, text, b"ten bytes.").await),
            "header.media_type"
        );
        assert_eq!((files(&folder), store.bytes()), (0, 0));
    }

    #[tokio::test]
    async fn the_same_bytes_are_stored_once() {
        let (folder, store) = store();
        let first = upload(&store, header(10, ""), b"ten bytes.").await.unwrap();
        let second = upload(&store, header(10, &first), b"ten bytes.")
            .await
            .unwrap();
        assert_eq!(first, second);
        assert_eq!((files(&folder), store.bytes()), (1, 10));
    }

    #[tokio::test]
    async fn the_store_has_a_limit() {
        let (_folder, store) = store();
        upload(&store, header(2_000_000, ""), &vec![1; 2_000_000])
            .await
            .unwrap();
        let second = upload(&store, header(2_000_000, ""), &vec![2; 2_000_000]).await;
        assert!(matches!(second, Err(Error::BlobStoreFull(3_000_000))));
    }

    #[tokio::test]
    async fn only_blobs_can_be_asked_for() {
        let (_folder, store) = store();
        for id in ["", "../secret", &"a".repeat(64)] {
            assert!(matches!(
                store.send(id).await.err(),
                Some(Error::BlobNotFound(_))
            ));
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
    async fn blobs_outlive_the_process_and_halves_do_not() {
        let (folder, store) = store();
        let id = upload(&store, header(10, ""), b"ten bytes.").await.unwrap();
        fs::write(folder.path().join("incoming-x"), b"half").unwrap();
        let reopened = BlobStore::open(folder.path(), &LIMITS).unwrap();
        assert!(reopened.contains(&id));
        assert_eq!((files(&folder), reopened.bytes()), (1, 10));
    }
}
