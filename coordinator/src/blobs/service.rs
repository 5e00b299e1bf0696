//! Serves `BlobService`.

use bytes::BytesMut;
use futures::{Stream, StreamExt, stream};
use proto::v1::{
    DownloadBlobRequest, DownloadBlobResponse, UploadBlobRequest, UploadBlobResponse, blob_service_server::BlobService,
    download_blob_response::Part,
};
use tokio::{fs::File, io::AsyncReadExt};
use tonic::{Request, Response, Status, Streaming};

use super::BlobStore;
use crate::{
    api::status,
    error::{Error, Result},
};

/// The store, to clients and workers.
#[derive(Debug, Clone)]
pub(crate) struct BlobApi {
    pub(crate) store: BlobStore,
}

#[tonic::async_trait]
impl BlobService for BlobApi {
    async fn upload_blob(&self, request: Request<Streaming<UploadBlobRequest>>) -> Result<Response<UploadBlobResponse>, Status> {
        let blob_id = self.store.receive(request.into_inner()).await.map_err(|error| status(&error))?;
        Ok(Response::new(UploadBlobResponse { blob_id }))
    }

    type DownloadBlobStream = stream::BoxStream<'static, Result<DownloadBlobResponse, Status>>;

    async fn download_blob(&self, request: Request<DownloadBlobRequest>) -> Result<Response<Self::DownloadBlobStream>, Status> {
        let parts = self.store.send(&request.into_inner().blob_id).await.map_err(|error| status(&error))?;
        Ok(Response::new(parts.boxed()))
    }
}

/// The bytes of a file, each message as large as it may be.
pub(super) fn chunks(file: File) -> impl Stream<Item = Result<DownloadBlobResponse, Status>> {
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
        let part = Some(Part::Chunk(chunk.freeze()));
        Ok(Some((DownloadBlobResponse { part }, file)))
    })
}
