//! Serves `BlobService`.

use bytes::BytesMut;
use futures::{Stream, StreamExt, stream};
use proto::v1::{
    DownloadBlobRequest, DownloadBlobResponse, UploadBlobRequest, UploadBlobResponse, blob_service_server::BlobService,
    download_blob_response::Part,
};
use tokio::{fs::File, io::AsyncReadExt};
use tonic::{Request, Response, Status, Streaming};

use super::{BlobStore, Owners};
use crate::{
    api::status,
    auth::Caller,
    error::{Error, Result},
    runtime::Handle,
};

/// The store, to clients and workers.
#[derive(Debug, Clone)]
pub(crate) struct BlobApi {
    pub(crate) store: BlobStore,
    pub(crate) handle: Handle,
    pub(crate) owners: Owners,
}

impl BlobApi {
    /// Nobody learns what others have.
    async fn check_owner(&self, caller: &Caller, blob_id: &str) -> Result<()> {
        if caller.is_worker {
            return Ok(());
        }
        let tenant = caller.tenant()?;
        // The one tenant without a name has whatever is there: pictures of before a restart, too.
        if tenant.is_empty() || self.owners.has(&tenant, blob_id) {
            return Ok(());
        }
        let id = blob_id.to_owned();
        let has = self.handle.read(move |state| state.has_blob(&tenant, &id)).await?;
        if has { Ok(()) } else { Err(Error::BlobNotFound(blob_id.to_owned())) }
    }
}

#[tonic::async_trait]
impl BlobService for BlobApi {
    async fn upload_blob(&self, request: Request<Streaming<UploadBlobRequest>>) -> Result<Response<UploadBlobResponse>, Status> {
        let caller = Caller::of(request.extensions());
        let tenant = if caller.is_worker { None } else { Some(caller.tenant().map_err(|error| status(&error))?) };
        let blob_id = self.store.receive(request.into_inner()).await.map_err(|error| status(&error))?;
        if let Some(tenant) = tenant.filter(|tenant| !tenant.is_empty()) {
            self.owners.note(tenant, blob_id.clone(), &self.store);
        }
        Ok(Response::new(UploadBlobResponse { blob_id }))
    }

    type DownloadBlobStream = stream::BoxStream<'static, Result<DownloadBlobResponse, Status>>;

    async fn download_blob(&self, request: Request<DownloadBlobRequest>) -> Result<Response<Self::DownloadBlobStream>, Status> {
        let caller = Caller::of(request.extensions());
        let blob_id = request.into_inner().blob_id;
        self.check_owner(&caller, &blob_id).await.map_err(|error| status(&error))?;
        let parts = self.store.send(&blob_id).await.map_err(|error| status(&error))?;
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
