//! Pictures in and out of the coordinator's blob service.

use bytes::Bytes;
use futures::stream;
use proto::v1::blob_service_client::BlobServiceClient;
use proto::v1::{
    BlobHeader, DownloadBlobRequest, DownloadBlobResponse, UploadBlobRequest, download_blob_response, upload_blob_request,
};
use sha2::{Digest, Sha256};
use tonic::metadata::MetadataValue;
use tonic::transport::Channel;
use tonic::{Request, Status, Streaming};

use crate::home::Home;
use crate::{Error, Result};

/// Largest picture that is taken in. The same as the coordinator's own limit.
pub(crate) const MAX_BLOB_BYTES: u64 = 32 << 20;

/// The coordinator's blob service.
pub(crate) struct Blobs<'a> {
    /// Where it is, if the coordinator has not moved.
    pub(crate) address: &'a str,
    /// The way to it.
    pub(crate) home: &'a Home,
}

impl Blobs<'_> {
    /// The bytes of a blob, which are what its id says.
    pub(crate) async fn download(&self, blob_id: &str) -> Result<Vec<u8>> {
        let bytes = self.home.call(self.address, |channel| {
            let mut client = client(channel);
            let request = DownloadBlobRequest { blob_id: blob_id.to_owned() };
            async move { collect(client.download_blob(request).await?.into_inner()).await }
        });
        let bytes = bytes.await?.map_err(|reason| blob_error(blob_id, reason))?;
        let (bytes, id) = tokio::task::spawn_blocking(move || {
            let id = hex(&Sha256::digest(&bytes));
            (bytes, id)
        })
        .await
        .map_err(|_| Error::Panicked)?;
        if id == blob_id { Ok(bytes) } else { Err(blob_error(blob_id, "its bytes have another sha256".into())) }
    }

    /// Stores a PNG whose sha256 (in hex) is `sha256` and returns its id.
    pub(crate) async fn upload_png(&self, bytes: &Bytes, sha256: &str) -> Result<String> {
        let response = self.home.call_until_taken(self.address, |channel| {
            let mut client = client(channel);
            let mut upload = Request::new(stream::iter(upload_messages(bytes.clone(), sha256.to_owned())));
            upload.metadata_mut().insert(proto::RESULT, MetadataValue::from_static("1"));
            async move { client.upload_blob(upload).await }
        });
        Ok(response.await?.into_inner().blob_id)
    }
}

fn client(channel: Channel) -> BlobServiceClient<Channel> {
    BlobServiceClient::new(channel)
        .max_decoding_message_size(proto::MAX_MESSAGE_BYTES)
        .max_encoding_message_size(proto::MAX_MESSAGE_BYTES)
}

/// The outer error may be worth another try; the inner one says that the blob is not what we take.
async fn collect(mut parts: Streaming<DownloadBlobResponse>) -> Result<Result<Vec<u8>, String>, Status> {
    let mut expected = None;
    let mut bytes = Vec::new();
    while let Some(part) = parts.message().await? {
        match (part.part, expected) {
            (Some(download_blob_response::Part::Header(header)), None) if header.byte_size <= MAX_BLOB_BYTES => {
                expected = Some(header.byte_size);
            }
            (Some(download_blob_response::Part::Header(header)), None) => {
                return Ok(Err(format!("it has {} bytes; the limit is {MAX_BLOB_BYTES}", header.byte_size)));
            }
            (Some(download_blob_response::Part::Chunk(chunk)), Some(size)) if (bytes.len() + chunk.len()) as u64 <= size => {
                bytes.extend_from_slice(&chunk);
            }
            _ => return Ok(Err("its parts are out of order".into())),
        }
    }
    Ok(if expected == Some(bytes.len() as u64) { Ok(bytes) } else { Err(format!("it ended after {} bytes", bytes.len())) })
}

fn upload_messages(bytes: Bytes, sha256: String) -> impl Iterator<Item = UploadBlobRequest> {
    let header = BlobHeader { byte_size: bytes.len() as u64, sha256, media_type: "image/png".into() };
    let chunks = (0..bytes.len()).step_by(proto::CHUNK_BYTES).map(move |start| {
        let end = bytes.len().min(start + proto::CHUNK_BYTES);
        upload_blob_request::Part::Chunk(bytes.slice(start..end))
    });
    let parts = std::iter::once(upload_blob_request::Part::Header(header)).chain(chunks);
    parts.map(|part| UploadBlobRequest { part: Some(part) })
}

fn blob_error(blob_id: &str, reason: String) -> Error {
    Error::Blob { blob_id: blob_id.to_owned(), reason }
}

pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
