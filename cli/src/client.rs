//! The connection to a coordinator, and the calls that take more than one message.

use std::path::Path;

use clap::Args;
use proto::v1::blob_service_client::BlobServiceClient;
use proto::v1::cluster_service_client::ClusterServiceClient;
use proto::v1::download_blob_response::Part as DownloadPart;
use proto::v1::job_service_client::JobServiceClient;
use proto::v1::upload_blob_request::Part as UploadPart;
use proto::v1::{BlobHeader, DownloadBlobRequest, UploadBlobRequest};
use tonic::transport::{Channel, Endpoint};

use crate::error::Error;

/// Where the coordinator is.
#[derive(Debug, Clone, Args)]
pub(crate) struct ServerArgs {
    /// The coordinator's address.
    #[arg(long, env = "ATELIER_SERVER", default_value = "http://127.0.0.1:7700")]
    pub(crate) server: String,
}

/// Clients of the three services over one connection.
#[derive(Debug, Clone)]
pub(crate) struct Client {
    pub(crate) jobs: JobServiceClient<Channel>,
    pub(crate) cluster: ClusterServiceClient<Channel>,
    blobs: BlobServiceClient<Channel>,
}

impl Client {
    pub(crate) async fn connect(args: &ServerArgs) -> Result<Self, Error> {
        let connect = |source| Error::Connect { address: args.server.clone(), source };
        let channel = Endpoint::from_shared(args.server.clone()).map_err(connect)?.connect().await.map_err(connect)?;
        Ok(Self {
            jobs: JobServiceClient::new(channel.clone()),
            cluster: ClusterServiceClient::new(channel.clone()),
            blobs: BlobServiceClient::new(channel),
        })
    }

    /// Uploads a picture and returns its blob id.
    pub(crate) async fn upload(&mut self, path: &Path) -> Result<String, Error> {
        let bytes = tokio::fs::read(path).await.map_err(|source| Error::File { path: path.display().to_string(), source })?;
        let media_type = media_type(path)?;
        let header = BlobHeader { byte_size: bytes.len() as u64, sha256: String::new(), media_type };
        let bytes = prost_bytes(bytes);
        let chunks = (0..bytes.len()).step_by(proto::CHUNK_BYTES).map(move |at| {
            let end = (at + proto::CHUNK_BYTES).min(bytes.len());
            UploadBlobRequest { part: Some(UploadPart::Chunk(bytes.slice(at..end))) }
        });
        let header = UploadBlobRequest { part: Some(UploadPart::Header(header)) };
        let messages = tokio_stream::iter(std::iter::once(header).chain(chunks).collect::<Vec<_>>());
        Ok(self.blobs.upload_blob(messages).await?.into_inner().blob_id)
    }

    /// Downloads a blob whole.
    pub(crate) async fn download(&mut self, blob_id: &str) -> Result<Vec<u8>, Error> {
        let mut stream = self.blobs.download_blob(DownloadBlobRequest { blob_id: blob_id.to_owned() }).await?.into_inner();
        let mut bytes = Vec::new();
        while let Some(message) = stream.message().await? {
            if let Some(DownloadPart::Chunk(chunk)) = message.part {
                bytes.extend_from_slice(&chunk);
            }
        }
        Ok(bytes)
    }
}

fn prost_bytes(bytes: Vec<u8>) -> bytes::Bytes {
    bytes.into()
}

fn media_type(path: &Path) -> Result<String, Error> {
    let extension = path.extension().map(|e| e.to_string_lossy().to_lowercase()).unwrap_or_default();
    match extension.as_str() {
        "png" => Ok("image/png".into()),
        "jpg" | "jpeg" => Ok("image/jpeg".into()),
        "webp" => Ok("image/webp".into()),
        _ => Err(Error::Flag { flag: "--image/--mask", reason: format!("`{}` is not a .png, .jpg or .webp", path.display()) }),
    }
}
