//! One checkpoint as an object: the header's length, the header, then the bytes; streamed in and out.

use bytes::{Buf, Bytes, BytesMut};
use futures::{Stream, StreamExt, stream, stream::BoxStream};
use object_store::{GetResult, buffered::BufWriter};
use prost::Message;
use proto::v1::{CheckpointHeader, GetCheckpointResponse, get_checkpoint_response::Part};
use sha2::{Digest, Sha256};
use tokio::io::AsyncWriteExt;

use super::{CheckpointError, header::Key};

/// Longest header that is read: [`super::MAX_TENSORS`] tensors with the longest names take some 13 KiB.
const MAX_HEADER_BYTES: u32 = 64 << 10;
/// Bytes of the header's length.
const LENGTH_BYTES: usize = 4;

/// An object that is being written. It is there only after [`Writer::finish`].
pub(super) struct Writer {
    upload: BufWriter,
    sha256: Sha256,
    expected: [u8; 32],
    missing: u64,
}

impl Writer {
    /// Begins with a header that was checked.
    pub(super) async fn begin(mut upload: BufWriter, header: &CheckpointHeader) -> Result<Self, CheckpointError> {
        let mut expected = [0; 32];
        expected.copy_from_slice(&header.sha256);
        let mut begin = BytesMut::new();
        begin.extend_from_slice(&(header.encoded_len() as u32).to_le_bytes());
        begin.extend_from_slice(&header.encode_to_vec());
        upload.put(begin.freeze()).await.map_err(|source| CheckpointError::storage("begin an object", source))?;
        Ok(Self { upload, sha256: Sha256::new(), expected, missing: header.byte_size })
    }

    pub(super) async fn write(&mut self, chunk: Bytes) -> Result<(), CheckpointError> {
        self.missing = self
            .missing
            .checked_sub(chunk.len() as u64)
            .ok_or_else(|| super::header::refused("chunk", "goes beyond the bytes that the header announced"))?;
        self.sha256.update(&chunk);
        self.upload.put(chunk).await.map_err(|source| CheckpointError::storage("write an object", source))
    }

    /// All has come and is what was announced.
    pub(super) fn check(&mut self) -> Result<(), CheckpointError> {
        if self.missing > 0 {
            return Err(super::header::refused("chunk", format!("the stream ended {} bytes early", self.missing)));
        }
        let sha256: [u8; 32] = std::mem::take(&mut self.sha256).finalize().into();
        if sha256 != self.expected {
            return Err(super::header::refused("sha256", "is not that of the bytes"));
        }
        Ok(())
    }

    /// Makes the object appear, whole.
    pub(super) async fn finish(&mut self) -> Result<(), CheckpointError> {
        self.upload.shutdown().await.map_err(|error| CheckpointError::Io { what: "finish an object", source: error })
    }

    /// Leaves nothing behind.
    pub(super) async fn abort(mut self) {
        if let Err(error) = self.upload.abort().await {
            tracing::warn!(%error, "aborting an upload failed");
        }
    }
}

/// The header and the chunks of a stored object. The last chunk comes only if all of them have the right sha256.
pub(super) async fn read(
    key: &Key,
    object: GetResult,
) -> Result<impl Stream<Item = Result<GetCheckpointResponse, CheckpointError>> + Send + use<>, CheckpointError> {
    let size = object.meta.size;
    let mut source = Source { stream: object.into_stream(), buffer: BytesMut::new() };
    let damaged = || CheckpointError::Damaged(key.clone().into());
    let length = source.take(LENGTH_BYTES).await?.ok_or_else(damaged)?.get_u32_le();
    if length > MAX_HEADER_BYTES {
        return Err(damaged());
    }
    let header = source.take(length as usize).await?.ok_or_else(damaged)?;
    let header = CheckpointHeader::decode(header).map_err(|_| damaged())?;
    let is_key = Key::check(header.key.clone()).is_ok_and(|found| found == *key);
    if !is_key || header.sha256.len() != 32 || size != (LENGTH_BYTES as u64) + u64::from(length) + header.byte_size {
        return Err(damaged());
    }
    let rest = Rest {
        source,
        sha256: Sha256::new(),
        expected: header.sha256.to_vec(),
        missing: header.byte_size,
        key: key.clone(),
        ended: header.byte_size == 0,
    };
    let chunks = stream::try_unfold(rest, async |mut rest| Ok(rest.next().await?.map(|chunk| (chunk, rest))));
    let parts = stream::once(async { Ok(Part::Header(header)) }).chain(chunks.map(|chunk| chunk.map(Part::Chunk)));
    Ok(parts.map(|part| part.map(|part| GetCheckpointResponse { part: Some(part) })))
}

struct Rest {
    source: Source,
    sha256: Sha256,
    expected: Vec<u8>,
    missing: u64,
    key: Key,
    ended: bool,
}

impl Rest {
    async fn next(&mut self) -> Result<Option<Bytes>, CheckpointError> {
        if self.ended {
            return Ok(None);
        }
        let bytes = self.missing.min(proto::CHUNK_BYTES as u64);
        let damaged = || CheckpointError::Damaged(self.key.clone().into());
        let chunk = self.source.take(bytes as usize).await?.ok_or_else(damaged)?;
        self.sha256.update(&chunk);
        self.missing -= bytes;
        self.ended = self.missing == 0;
        if self.ended && self.sha256.finalize_reset()[..] != self.expected[..] {
            return Err(damaged());
        }
        Ok(Some(chunk))
    }
}

/// An object's bytes, cut anew.
struct Source {
    stream: BoxStream<'static, object_store::Result<Bytes>>,
    buffer: BytesMut,
}

impl Source {
    /// The next bytes; nothing if the object ends before.
    async fn take(&mut self, bytes: usize) -> Result<Option<Bytes>, CheckpointError> {
        while self.buffer.len() < bytes {
            match self.stream.next().await {
                Some(Ok(more)) => self.buffer.extend_from_slice(&more),
                Some(Err(source)) => return Err(CheckpointError::storage("read an object", source)),
                None => return Ok(None),
            }
        }
        Ok(Some(self.buffer.split_to(bytes).freeze()))
    }
}
