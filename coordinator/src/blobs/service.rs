//! Serves `BlobService`.

use bytes::BytesMut;
use futures::{Stream, StreamExt, stream};
use identity::Peer;
use proto::v1::{
    DownloadBlobRequest, DownloadBlobResponse, UploadBlobRequest, UploadBlobResponse, blob_service_server::BlobService,
    download_blob_response::Part,
};
use tokio::{fs::File, io::AsyncReadExt};
use tonic::{Request, Response, Status, Streaming};

use super::{BlobStore, By, Owners, not_found};
use crate::{
    api::status,
    auth::Caller,
    error::{Error, Result},
    metrics::Meter,
    runtime::Handle,
};

/// The store, to clients and workers.
#[derive(Debug, Clone)]
pub(crate) struct BlobApi {
    pub(crate) store: BlobStore,
    pub(crate) handle: Handle,
    pub(crate) owners: Owners,
    pub(crate) meter: Meter,
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
        // Most that are not there are found out here: the state looks through all jobs of the tenant.
        if self.store.holds(blob_id).await? {
            let id = blob_id.to_owned();
            if self.handle.read(move |state| state.has_blob(&tenant, &id)).await? {
                return Ok(());
            }
        }
        Err(not_found(blob_id))
    }
}

#[tonic::async_trait]
impl BlobService for BlobApi {
    async fn upload_blob(&self, request: Request<Streaming<UploadBlobRequest>>) -> Result<Response<UploadBlobResponse>, Status> {
        let caller = Caller::of(request.extensions());
        let tenant = if caller.is_worker { None } else { Some(caller.tenant().map_err(|error| status(&error))?) };
        let by = brought_by(&caller, &request);
        let in_use = self.handle.read(|state| state.blobs_in_use());
        let received = self.store.receive_by(by, in_use, request.into_inner()).await;
        let blob_id = received.map_err(|error| {
            self.meter.upload_failed(&error);
            status(&error)
        })?;
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

/// Where nobody shows a certificate, a worker is who says so.
fn brought_by<T>(caller: &Caller, request: &Request<T>) -> By {
    let is_secure = request.extensions().get::<Peer>().is_some_and(|peer| peer.secure);
    let says_so = !is_secure && request.metadata().contains_key(proto::RESULT);
    if caller.is_worker || says_so { By::Worker } else { By::Client }
}

/// The bytes of a file, each message as large as it may be.
pub(super) fn chunks(file: File) -> impl Stream<Item = Result<DownloadBlobResponse, Status>> {
    stream::try_unfold(file, async |mut file| {
        let mut chunk = BytesMut::with_capacity(proto::CHUNK_BYTES);
        while chunk.len() < proto::CHUNK_BYTES {
            let room = (proto::CHUNK_BYTES - chunk.len()) as u64;
            let read = (&mut file).take(room).read_buf(&mut chunk).await;
            if read.map_err(|error| status(&Error::blob_storage("read a blob")(error)))? == 0 {
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
