//! Blobs that are kept as objects, where every coordinator finds them.
//!
//! ```text
//! blobs/{id}.{extension} = bytes
//! ```

use std::{path::Path as FilePath, sync::Arc, time::Instant};

use bytes::{Bytes, BytesMut};
use futures::{Stream, StreamExt, TryStreamExt, stream, stream::BoxStream};
use object_store::{ObjectStore, ObjectStoreExt, buffered::BufWriter, path::Path};
use proto::v1::{DownloadBlobResponse, download_blob_response::Part};
use tokio::{
    fs::File,
    io::{AsyncReadExt, AsyncWriteExt},
};
use tonic::Status;

use super::{Blob, Index, MEDIA_TYPES, incoming::Whole, not_found, parse_name};
use crate::{
    api::status,
    error::{Error, Result},
};

/// Folder of all keys.
const FOLDER: &str = "blobs";
/// Bytes of one part of an upload: the least that S3 takes. Smaller blobs go in one request.
const PART_BYTES: usize = 5 << 20;
/// Parts on their way at once.
const PARTS_IN_FLIGHT: usize = 2;

/// Where the blobs are.
#[derive(Debug, Clone)]
pub(super) struct Remote {
    objects: Arc<dyn ObjectStore>,
}

impl Remote {
    pub(super) fn new(objects: Arc<dyn ObjectStore>) -> Self {
        Self { objects }
    }

    /// Lists what is there.
    pub(super) async fn index(&self) -> Result<Index> {
        let found: Vec<_> = self.objects.list(Some(&Path::from(FOLDER))).try_collect().await.map_err(failed("list the blobs"))?;
        let mut index = Index::default();
        for object in found {
            if let Some((id, media_type, extension)) = object.location.filename().and_then(parse_name) {
                index.add(id, Blob { byte_size: object.size, media_type, extension, used: Instant::now(), brought: false });
            }
        }
        Ok(index)
    }

    /// Looks for one blob.
    pub(super) async fn find(&self, id: &str) -> Result<Option<Blob>> {
        for (media_type, extension) in MEDIA_TYPES {
            let blob = Blob { byte_size: 0, media_type, extension, used: Instant::now(), brought: false };
            match self.objects.head(&path(id, &blob)).await {
                Ok(object) => return Ok(Some(Blob { byte_size: object.size, ..blob })),
                Err(object_store::Error::NotFound { .. }) => {}
                Err(error) => return Err(failed("look for a blob")(error)),
            }
        }
        Ok(None)
    }

    /// Stores an upload that was checked. Durable when this returns.
    pub(super) async fn store(&self, upload: &Whole, id: &str, blob: &Blob) -> Result<()> {
        let file = match upload {
            Whole::File(file) => file,
            Whole::Memory(bytes) => {
                let stored = self.objects.put(&path(id, blob), bytes.clone().into()).await;
                return stored.map(drop).map_err(failed("store a blob"));
            }
        };
        let upload = BufWriter::with_capacity(self.objects.clone(), path(id, blob), PART_BYTES);
        let mut upload = upload.with_max_concurrency(PARTS_IN_FLIGHT);
        let stored = copy(file, &mut upload).await;
        if stored.is_err()
            && let Err(error) = upload.abort().await
        {
            tracing::warn!(%error, "aborting an upload failed");
        }
        stored?;
        upload.shutdown().await.map_err(Error::blob_storage("finish a blob's upload"))
    }

    /// The bytes in chunks, each as large as it may be.
    pub(super) async fn chunks(
        &self,
        id: &str,
        blob: &Blob,
    ) -> Result<impl Stream<Item = Result<DownloadBlobResponse, Status>> + Send + use<>> {
        let object = match self.objects.get(&path(id, blob)).await {
            Ok(object) => object,
            Err(object_store::Error::NotFound { .. }) => return Err(not_found(id)),
            Err(error) => return Err(failed("read a blob")(error)),
        };
        let source = Source { stream: object.into_stream(), buffer: BytesMut::new() };
        let chunks = stream::try_unfold(source, async |mut source| {
            let chunk = source.next().await.map_err(|error| status(&failed("read a blob")(error)))?;
            Ok(chunk.map(|chunk| (DownloadBlobResponse { part: Some(Part::Chunk(chunk)) }, source)))
        });
        Ok(chunks)
    }

    pub(super) async fn remove(&self, id: &str, blob: &Blob) -> Result<()> {
        match self.objects.delete(&path(id, blob)).await {
            Ok(()) | Err(object_store::Error::NotFound { .. }) => Ok(()),
            Err(error) => Err(failed("remove a blob")(error)),
        }
    }
}

async fn copy(file: &FilePath, upload: &mut BufWriter) -> Result<()> {
    let mut file = File::open(file).await.map_err(Error::blob_storage("read an upload"))?;
    loop {
        let mut chunk = BytesMut::with_capacity(proto::CHUNK_BYTES);
        if file.read_buf(&mut chunk).await.map_err(Error::blob_storage("read an upload"))? == 0 {
            return Ok(());
        }
        upload.put(chunk.freeze()).await.map_err(failed("store a blob"))?;
    }
}

/// An object's bytes, cut anew.
struct Source {
    stream: BoxStream<'static, object_store::Result<Bytes>>,
    buffer: BytesMut,
}

impl Source {
    async fn next(&mut self) -> object_store::Result<Option<Bytes>> {
        while self.buffer.len() < proto::CHUNK_BYTES {
            match self.stream.next().await {
                Some(more) => self.buffer.extend_from_slice(&more?),
                None => break,
            }
        }
        let bytes = self.buffer.len().min(proto::CHUNK_BYTES);
        Ok((bytes > 0).then(|| self.buffer.split_to(bytes).freeze()))
    }
}

fn path(id: &str, blob: &Blob) -> Path {
    Path::from_iter([FOLDER, &format!("{id}.{}", blob.extension)])
}

fn failed(what: &'static str) -> impl FnOnce(object_store::Error) -> Error {
    move |error| Error::blob_storage(what)(error.into())
}
