//! An upload on its way in: a file under a temporary name that becomes a blob when it is whole and as announced.

use std::{
    path::Path,
    sync::Arc,
    time::{Duration, Instant},
};

use bytes::{Bytes, BytesMut};
use futures::{Stream, StreamExt};
use proto::v1::{BlobHeader, UploadBlobRequest, upload_blob_request::Part};
use sha2::{Digest, Sha256};
use tempfile::TempPath;
use tokio::{fs::File, io::AsyncWriteExt, time::timeout};
use tonic::Status;

use super::{Blob, INCOMING, MEDIA_TYPES, Shared};
use crate::{
    error::{Error, Result},
    request::is_blob_id,
};

/// Longest wait for the next chunk of an upload: a stalled client must not hold its share of the store.
const CHUNK_DEADLINE: Duration = Duration::from_secs(30);

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
        let (file, path) = file.map_err(Error::io("make a file for an upload"))?.into_parts();
        Ok(Self::File(File::from_std(file), path))
    }

    async fn write(&mut self, chunk: &Bytes) -> Result<()> {
        match self {
            Self::File(file, _) => file.write_all(chunk).await.map_err(Error::io("write a blob")),
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
                file.sync_all().await.map_err(Error::io("write a blob"))?;
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
    pub(super) fn begin(shared: Arc<Shared>, header: BlobHeader) -> Result<Self> {
        let Some((media_type, extension)) = MEDIA_TYPES.into_iter().find(|(name, _)| *name == header.media_type) else {
            return Err(Error::invalid("header.media_type", "must be image/png, image/jpeg or image/webp"));
        };
        if !header.sha256.is_empty() && !is_blob_id(&header.sha256) {
            return Err(Error::invalid("header.sha256", "must be 64 hex digits in lower case, or empty"));
        }
        let most = shared.max_blob_bytes;
        if header.byte_size == 0 || header.byte_size > most {
            return Err(Error::invalid("header.byte_size", format!("{}: must be 1 to {most}", header.byte_size)));
        }
        let share = Share::take(&shared, header.byte_size)?;
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
        let blob = Blob { byte_size: received, media_type, extension, used: Instant::now() };
        let _no_sweep = shared.sweeping.read().await;
        if let Some(remote) = &shared.remote
            && shared.use_blob(&id).is_none()
        {
            remote.store(&whole, &id, &blob).await?;
        }
        let mut index = shared.lock();
        if let Some(known) = index.blobs.get_mut(&id) {
            known.used = Instant::now();
        } else {
            if shared.remote.is_none()
                && let Whole::File(path) = whole
            {
                path.persist(shared.path(&id, &blob)).map_err(|error| Error::io("name a blob")(error.error))?;
            }
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
        Ok(Self { shared: shared.clone(), bytes })
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

/// The next message of an upload; nothing at its end.
pub(super) async fn next_part(
    parts: &mut (impl Stream<Item = Result<UploadBlobRequest, Status>> + Unpin),
) -> Result<Option<Part>> {
    match timeout(CHUNK_DEADLINE, parts.next()).await {
        Ok(None) => Ok(None),
        Ok(Some(Ok(UploadBlobRequest { part: Some(part) }))) => Ok(Some(part)),
        Ok(Some(Ok(UploadBlobRequest { part: None }))) => Err(Error::invalid("part", "must be a header or a chunk")),
        Ok(Some(Err(_))) => Err(Error::invalid("chunk", "the upload broke off")),
        Err(_) => Err(Error::invalid("chunk", format!("none came for {} s", CHUNK_DEADLINE.as_secs()))),
    }
}

fn hex(digest: &[u8]) -> String {
    digest.iter().map(|byte| format!("{byte:02x}")).collect()
}
