//! A coordinator in memory that does what a test says.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use bytes::Bytes;
use proto::v1::blob_service_server::{BlobService, BlobServiceServer};
use proto::v1::checkpoint_service_server::CheckpointServiceServer;
use proto::v1::membership_service_server::{MembershipService, MembershipServiceServer};
use proto::v1::{
    BlobHeader, DownloadBlobRequest, DownloadBlobResponse, JoinGroup, Layout, RegisterRequest, RegisterResponse, Registration,
    UploadBlobRequest, UploadBlobResponse, download_blob_response, upload_blob_request,
};
use tokio::sync::mpsc;
use tokio_stream::wrappers::{ReceiverStream, TcpListenerStream};
use tokio_util::sync::{CancellationToken, DropGuard};
use tonic::{Code, Request, Response, Status, Streaming};

use crate::checkpoints::Checkpoints;
use crate::running::Running;

/// Longest wait for anything; the machine may be busy.
pub(crate) const PATIENCE: Duration = Duration::from_secs(30);

/// Polls until it is so.
pub(crate) async fn until(what: &str, mut is_so: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !is_so() {
        assert!(Instant::now() < deadline, "waited in vain until {what}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// The first rank's join of a group that these workers hold.
pub(crate) fn join(group_id: &str, epoch: u64, component: &str, workers: &[&Running]) -> JoinGroup {
    JoinGroup {
        group_id: group_id.into(),
        epoch,
        model: "fake".into(),
        path: "/nowhere".into(),
        component: component.into(),
        layout: Some(Layout { tp: workers.len() as u32, block_ranges: 1, ..Layout::default() }),
        rank: 0,
        data_addresses: workers.iter().map(|worker| worker.registration.data_address.clone()).collect(),
        secret: vec![7; 16].into(),
        max_batch: 1,
        max_jobs: 4,
        adapters: vec![],
        controls: vec![],
        products: proto::v1::Products::F32.into(),
        refiner_path: String::new(),
        fingerprint: String::new(),
    }
}

/// Membership and blobs, in memory.
pub(crate) struct Coordinator {
    address: String,
    shared: Shared,
    pub(crate) checkpoints: Checkpoints,
    _stop: DropGuard,
}

/// A coordinator that is not there.
pub(crate) struct Gone {
    shared: Shared,
    checkpoints: Checkpoints,
}

impl Gone {
    /// There again, at another address.
    pub(crate) async fn back(self) -> Coordinator {
        Coordinator::serve(self.shared, self.checkpoints).await
    }
}

#[derive(Clone, Default)]
struct Shared {
    members: Arc<Mutex<Vec<Registration>>>,
    blobs: Arc<Mutex<HashMap<String, Bytes>>>,
    /// How the blob service refuses all calls, while it does.
    trouble: Arc<Mutex<Option<Code>>>,
}

impl Shared {
    fn check(&self) -> Result<(), Status> {
        self.trouble.lock().unwrap().map_or(Ok(()), |code| Err(Status::new(code, "not now")))
    }
}

impl Coordinator {
    pub(crate) async fn start() -> Self {
        Self::serve(Shared::default(), Checkpoints::default()).await
    }

    /// The next leader: what was stored is there, at another address.
    pub(crate) async fn succeed(self) -> Self {
        self.away().back().await
    }

    /// Stopped, with all that was stored.
    pub(crate) fn away(self) -> Gone {
        let Self { shared, checkpoints, .. } = self;
        Gone { shared, checkpoints }
    }

    async fn serve(shared: Shared, checkpoints: Checkpoints) -> Self {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let stop = CancellationToken::new();
        let server = tonic::transport::Server::builder()
            .add_service(MembershipServiceServer::new(shared.clone()))
            .add_service(BlobServiceServer::new(shared.clone()))
            .add_service(CheckpointServiceServer::new(checkpoints.clone()))
            .serve_with_incoming(TcpListenerStream::new(listener));
        tokio::spawn(stop.clone().run_until_cancelled_owned(server));
        Self { address, shared, checkpoints, _stop: stop.drop_guard() }
    }

    pub(crate) fn address(&self) -> String {
        self.address.clone()
    }

    pub(crate) fn members(&self) -> Vec<Registration> {
        self.shared.members.lock().unwrap().clone()
    }

    /// From now on the blob service refuses all calls, or none.
    pub(crate) fn trouble(&self, code: Option<Code>) {
        *self.shared.trouble.lock().unwrap() = code;
    }

    /// Stores `bytes` under an id that need not be theirs.
    pub(crate) fn store(&self, id: &str, bytes: &'static [u8]) {
        self.shared.blobs.lock().unwrap().insert(id.into(), bytes.into());
    }

    pub(crate) fn blob(&self, id: &str) -> Bytes {
        self.shared.blobs.lock().unwrap()[id].clone()
    }
}

#[tonic::async_trait]
impl MembershipService for Shared {
    type RegisterStream = ReceiverStream<Result<RegisterResponse, Status>>;

    async fn register(&self, request: Request<Streaming<RegisterRequest>>) -> Result<Response<Self::RegisterStream>, Status> {
        let (responses, stream) = mpsc::channel(4);
        let (mut requests, members) = (request.into_inner(), self.members.clone());
        tokio::spawn(async move {
            let first = requests.message().await.unwrap().unwrap().registration.unwrap();
            members.lock().unwrap().push(first.clone());
            while let Ok(Some(_)) = requests.message().await {
                drop(responses.try_send(Ok(RegisterResponse {})));
            }
            members.lock().unwrap().retain(|member| *member != first);
        });
        Ok(Response::new(ReceiverStream::new(stream)))
    }
}

#[tonic::async_trait]
impl BlobService for Shared {
    type DownloadBlobStream = ReceiverStream<Result<DownloadBlobResponse, Status>>;

    async fn upload_blob(&self, request: Request<Streaming<UploadBlobRequest>>) -> Result<Response<UploadBlobResponse>, Status> {
        self.check()?;
        assert!(request.metadata().contains_key(proto::RESULT), "a worker says that it brings a result");
        let mut parts = request.into_inner();
        let (mut blob_id, mut bytes) = (String::new(), Vec::new());
        while let Some(part) = parts.message().await? {
            match part.part.unwrap() {
                upload_blob_request::Part::Header(header) => blob_id = header.sha256,
                upload_blob_request::Part::Chunk(chunk) => bytes.extend_from_slice(&chunk),
            }
        }
        self.blobs.lock().unwrap().insert(blob_id.clone(), bytes.into());
        Ok(Response::new(UploadBlobResponse { blob_id }))
    }

    async fn download_blob(&self, request: Request<DownloadBlobRequest>) -> Result<Response<Self::DownloadBlobStream>, Status> {
        self.check()?;
        let blob_id = request.into_inner().blob_id;
        let found = self.blobs.lock().unwrap().get(&blob_id).cloned();
        let bytes = found.ok_or_else(|| Status::not_found("there is no such blob"))?;
        let (parts, stream) = mpsc::channel(4);
        tokio::spawn(async move {
            let header = BlobHeader { byte_size: bytes.len() as u64, sha256: blob_id, media_type: "image/png".into() };
            for part in [download_blob_response::Part::Header(header), download_blob_response::Part::Chunk(bytes)] {
                drop(parts.send(Ok(DownloadBlobResponse { part: Some(part) })).await);
            }
        });
        Ok(Response::new(ReceiverStream::new(stream)))
    }
}
