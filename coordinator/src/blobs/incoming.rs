//! An upload on its way in: a file under a temporary name that becomes a blob when it is whole and as announced.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use bytes::{Bytes, BytesMut};
use futures::{Stream, StreamExt};
use proto::v1::{BlobHeader, UploadBlobRequest, upload_blob_request::Part};
use sha2::{Digest, Sha256};
use tempfile::TempPath;
use tokio::{
    fs::File,
    io::AsyncWriteExt,
    time::{Instant, timeout_at},
};
use tonic::Status;

use super::{Blob, By, INCOMING, MEDIA_TYPES, Shared, sync_folder};
use crate::{
    error::{Error, Result},
    request::is_blob_id,
};

/// Longest wait for the next chunk of an upload: a stalled client must not hold its share of the store.
const CHUNK_DEADLINE: Duration = Duration::from_secs(30);

/// Slowest that an upload may be on the whole, however regularly its chunks come.
const SLOWEST_BYTES_PER_SECOND: u64 = 64 << 10;

/// When all of an upload must have come.
#[derive(Debug)]
pub(super) struct Deadline {
    at: Instant,
    seconds: u64,
}

impl Deadline {
    /// Of an upload of so many bytes, which begins now.
    pub(super) fn of(bytes: u64) -> Self {
        let seconds = CHUNK_DEADLINE.as_secs() + bytes / SLOWEST_BYTES_PER_SECOND;
        Self { at: Instant::now() + Duration::from_secs(seconds), seconds }
    }
}

/// What came of an upload so far.
enum Body {
    /// A file under a temporary name.
    File(File, TempPath),
    /// For stores without a folder.
    Memory(BytesMut),
}

impl Body {
    fn begin(folder: Option<&Path>) -> Result<Self> {
        let Some(folder) = folder else {
            return Ok(Self::Memory(BytesMut::new()));
        };
        let file = tempfile::Builder::new().prefix(INCOMING).tempfile_in(folder);
        let (file, path) = file.map_err(Error::blob_storage("make a file for an upload"))?.into_parts();
        Ok(Self::File(File::from_std(file), path))
    }

    async fn write(&mut self, chunk: &Bytes) -> Result<()> {
        match self {
            Self::File(file, _) => file.write_all(chunk).await.map_err(Error::blob_storage("write a blob")),
            Self::Memory(bytes) => {
                bytes.extend_from_slice(chunk);
                Ok(())
            }
        }
    }

    /// Durable, as far as it can be before it has its name.
    async fn finish(self) -> Result<Whole> {
        match self {
            Self::File(file, path) => {
                file.sync_all().await.map_err(Error::blob_storage("write a blob"))?;
                Ok(Whole::File(path))
            }
            Self::Memory(bytes) => Ok(Whole::Memory(bytes.freeze())),
        }
    }
}

/// All of an upload.
pub(super) enum Whole {
    /// A file under a temporary name, which goes with this.
    File(TempPath),
    /// Its bytes.
    Memory(Bytes),
}

/// An upload: what came of it, and its share of the store. Dropping it gives both back.
pub(super) struct Incoming {
    shared: Arc<Shared>,
    header: BlobHeader,
    media_type: &'static str,
    extension: &'static str,
    body: Body,
    sha256: Sha256,
    received: u64,
    share: Share,
}

impl Incoming {
    pub(super) fn begin(shared: Arc<Shared>, by: By, header: BlobHeader) -> Result<Self> {
        let Some((media_type, extension)) = MEDIA_TYPES.into_iter().find(|(name, _)| *name == header.media_type) else {
            return Err(Error::invalid("header.media_type", "must be image/png, image/jpeg or image/webp"));
        };
        if !header.sha256.is_empty() && !is_blob_id(&header.sha256) {
            return Err(Error::invalid("header.sha256", "must be 64 hex digits in lower case, or empty"));
        }
        let most = match by {
            By::Client => shared.max_blob_bytes.min(shared.max_total_bytes / 2),
            By::Worker => shared.max_blob_bytes,
        };
        if header.byte_size == 0 || header.byte_size > most {
            return Err(Error::invalid("header.byte_size", format!("{}: must be 1 to {most}", header.byte_size)));
        }
        let share = Share::take(&shared, header.byte_size, by)?;
        let body = Body::begin(shared.folder.as_deref())?;
        Ok(Self { shared, header, media_type, extension, body, sha256: Sha256::new(), received: 0, share })
    }

    pub(super) async fn write(&mut self, chunk: &Bytes) -> Result<()> {
        self.received += chunk.len() as u64;
        if self.received > self.header.byte_size {
            let announced = self.header.byte_size;
            return Err(Error::invalid("header.byte_size", format!("{announced} bytes were announced, more came")));
        }
        self.sha256.update(chunk);
        self.body.write(chunk).await
    }

    pub(super) async fn finish(self) -> Result<String> {
        let Self { shared, header, media_type, extension, body, sha256, received, share } = self;
        if received < header.byte_size {
            let text = format!("{} bytes were announced, {received} came", header.byte_size);
            return Err(Error::invalid("header.byte_size", text));
        }
        let id = hex(&sha256.finalize());
        if !header.sha256.is_empty() && header.sha256 != id {
            return Err(Error::invalid("header.sha256", format!("the bytes have the sha256 {id}")));
        }
        let whole = body.finish().await?;
        let blob = Blob { byte_size: received, media_type, extension, used: std::time::Instant::now(), brought: share.brought };
        let _no_sweep = shared.sweeping.read().await;
        if shared.use_blob(&id).is_none() {
            match (&shared.remote, whole) {
                (Some(remote), whole) => remote.store(&whole, &id, &blob).await?,
                (None, Whole::File(upload)) => name(upload, shared.path(&id, &blob)).await?,
                (None, Whole::Memory(_)) => {}
            }
        }
        let mut index = shared.lock();
        // Two may bring the same at once: its file then has its name from both, and counts once.
        if let Some(known) = index.blobs.get_mut(&id) {
            known.used = std::time::Instant::now();
        } else {
            index.blobs.insert(id.clone(), blob);
            share.keep();
        }
        Ok(id)
    }
}

/// Gives an upload its name, durably.
async fn name(upload: TempPath, name: PathBuf) -> Result<()> {
    let named = tokio::task::spawn_blocking(move || {
        upload.persist(&name).map_err(|error| error.error)?;
        name.parent().map_or(Ok(()), sync_folder)
    });
    let panicked = |_| Err(std::io::Error::other("naming it panicked"));
    named.await.unwrap_or_else(panicked).map_err(Error::blob_storage("name a blob"))
}

/// Bytes of the store that are spoken for.
struct Share {
    shared: Arc<Shared>,
    bytes: u64,
    /// By a client.
    brought: bool,
}

impl Share {
    fn take(shared: &Arc<Shared>, bytes: u64, by: By) -> Result<Self> {
        let mut index = shared.lock();
        if let Some(limit) = index.exceeds(bytes, by, shared.max_total_bytes) {
            return Err(Error::BlobStoreFull(limit));
        }
        let brought = by == By::Client;
        index.bytes += bytes;
        index.brought += if brought { bytes } else { 0 };
        Ok(Self { shared: shared.clone(), bytes, brought })
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
            index.give_back(self.bytes, self.brought);
        }
    }
}

/// The next message of an upload; nothing at its end.
pub(super) async fn next_part(
    parts: &mut (impl Stream<Item = Result<UploadBlobRequest, Status>> + Unpin),
    deadline: Option<&Deadline>,
) -> Result<Option<Part>> {
    let next = Instant::now() + CHUNK_DEADLINE;
    let late = deadline.filter(|deadline| deadline.at < next);
    match timeout_at(late.map_or(next, |deadline| deadline.at), parts.next()).await {
        Ok(None) => Ok(None),
        Ok(Some(Ok(UploadBlobRequest { part: Some(part) }))) => Ok(Some(part)),
        Ok(Some(Ok(UploadBlobRequest { part: None }))) => Err(Error::invalid("part", "must be a header or a chunk")),
        Ok(Some(Err(_))) => Err(Error::invalid("chunk", "the upload broke off")),
        Err(_) => Err(Error::invalid(
            "chunk",
            late.map_or_else(
                || format!("none came for {} s", CHUNK_DEADLINE.as_secs()),
                |deadline| format!("not all had come after {} s", deadline.seconds),
            ),
        )),
    }
}

fn hex(digest: &[u8]) -> String {
    digest.iter().map(|byte| format!("{byte:02x}")).collect()
}
