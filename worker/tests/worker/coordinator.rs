//! A coordinator that does what a test says, and a worker that runs within the test.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use bytes::Bytes;
use proto::v1::blob_service_server::{BlobService, BlobServiceServer};
use proto::v1::control_request::Command;
use proto::v1::control_response::Report;
use proto::v1::membership_service_server::{MembershipService, MembershipServiceServer};
use proto::v1::worker_service_client::WorkerServiceClient;
use proto::v1::{
    BlobHeader, ControlRequest, ControlResponse, DescribeModel, DownloadBlobRequest, DownloadBlobResponse, GroupLost, Heartbeat,
    JoinGroup, Layout, RegisterRequest, RegisterResponse, Registration, TaskDone, TaskFailed, TaskRef, UploadBlobRequest,
    UploadBlobResponse, download_blob_response, model_described, upload_blob_request,
};
use tokio::sync::mpsc;
use tokio_stream::wrappers::{ReceiverStream, TcpListenerStream};
use tokio_util::sync::{CancellationToken, DropGuard};
use tonic::{Request, Response, Status, Streaming};
use worker::config::{Config, Membership};
use worker::{Result, Worker};

use crate::model::Counting;

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
        layout: Some(Layout { tp: workers.len() as u32, block_ranges: 1 }),
        rank: 0,
        data_addresses: workers.iter().map(|worker| worker.registration.data_address.clone()).collect(),
        secret: vec![7; 16].into(),
        max_batch: 1,
        max_jobs: 4,
    }
}

/// A worker in this process.
pub(crate) struct Running {
    pub(crate) registration: Registration,
    stop: CancellationToken,
    ended: tokio::task::JoinHandle<Result<()>>,
}

impl Running {
    pub(crate) async fn start(coordinator: &Coordinator) -> Self {
        let url = format!("http://{}", coordinator.address());
        Self::with(Membership::Coordinator { url }).await
    }

    pub(crate) async fn with(membership: Membership) -> Self {
        let config = Config {
            listen: "127.0.0.1:0".parse().unwrap(),
            data_listen: "127.0.0.1:0".parse().unwrap(),
            advertise_host: None,
            membership,
            labels: HashMap::from([("role".into(), "any".into())]),
            worker_id: uuid::Uuid::new_v4().to_string(),
            threads: 1,
            prompt_cache_bytes: 0,
            load_timeout: PATIENCE,
        };
        let worker = Worker::bind(config, Arc::new(Counting)).await.unwrap();
        let registration = worker.registration().clone();
        let stop = CancellationToken::new();
        let ended = tokio::spawn(worker.run(stop.clone().cancelled_owned()));
        Self { registration, stop, ended }
    }

    pub(crate) fn address(&self) -> String {
        self.registration.address.clone()
    }

    /// Stops it, and expects that to be quick.
    pub(crate) async fn stop(self) {
        self.stop.cancel();
        tokio::time::timeout(Duration::from_secs(10), self.ended).await.unwrap().unwrap().unwrap();
    }

    /// Opens the control stream and takes the hello.
    pub(crate) async fn control(&self) -> Control {
        let deadline = Instant::now() + PATIENCE;
        let mut client = loop {
            match WorkerServiceClient::connect(format!("http://{}", self.address())).await {
                Ok(client) => break client,
                Err(error) => assert!(Instant::now() < deadline, "{error}"),
            }
        };
        let (commands, outgoing) = mpsc::channel(16);
        let reports = client.control(ReceiverStream::new(outgoing)).await.unwrap().into_inner();
        let beat = CancellationToken::new();
        let (beating, to_beat) = (beat.clone(), commands.clone());
        tokio::spawn(beating.run_until_cancelled_owned(async move {
            let mut tick = tokio::time::interval(Duration::from_secs(1));
            loop {
                tick.tick().await;
                let command = Some(Command::Heartbeat(Heartbeat {}));
                drop(to_beat.try_send(ControlRequest { command }));
            }
        }));
        let mut control = Control { commands, reports, seen: Vec::new(), _beat: beat.drop_guard() };
        let hello = |report: &Report| if let Report::Hello(hello) = report { Some(hello.clone()) } else { None };
        assert_eq!(control.wait("hello", hello).await, self.registration);
        control
    }
}

/// A coordinator's end of a control stream.
pub(crate) struct Control {
    commands: mpsc::Sender<ControlRequest>,
    reports: Streaming<ControlResponse>,
    /// Everything that was reported, but for heartbeats.
    pub(crate) seen: Vec<Report>,
    _beat: DropGuard,
}

impl Control {
    pub(crate) async fn send(&self, command: Command) {
        self.commands.send(ControlRequest { command: Some(command) }).await.unwrap();
    }

    /// The first report that `pick` takes, of those that came and those that will.
    pub(crate) async fn wait<T>(&mut self, what: &str, pick: impl Fn(&Report) -> Option<T>) -> T {
        let deadline = tokio::time::Instant::now() + PATIENCE;
        let mut looked_at = 0;
        loop {
            if let Some(found) = self.seen[looked_at..].iter().find_map(&pick) {
                return found;
            }
            looked_at = self.seen.len();
            let message = tokio::time::timeout_at(deadline, self.reports.message()).await;
            match message.unwrap_or_else(|_| panic!("waited in vain for {what}; came: {:#?}", self.seen)) {
                Ok(Some(ControlResponse { report: Some(Report::Heartbeat(_)) })) => {}
                Ok(Some(ControlResponse { report: Some(report) })) => self.seen.push(report),
                other => panic!("the stream ended while waiting for {what}: {other:?}"),
            }
        }
    }

    pub(crate) async fn ready(&mut self, group_id: &str, epoch: u64) {
        let pick = |report: &Report| match report {
            Report::GroupReady(ready) if ready.group_id == group_id && ready.epoch == epoch => Some(()),
            _ => None,
        };
        self.wait("a ready group", pick).await;
    }

    pub(crate) async fn lost(&mut self, group_id: &str, epoch: u64) -> GroupLost {
        let pick = |report: &Report| match report {
            Report::GroupLost(lost) if lost.group_id == group_id && lost.epoch == epoch => Some(lost.clone()),
            _ => None,
        };
        self.wait("a lost group", pick).await
    }

    pub(crate) async fn stepped(&mut self, task: &TaskRef, at_least: u32) {
        let pick = |report: &Report| match report {
            Report::TaskProgress(p) if p.task.as_ref() == Some(task) && p.step >= at_least => Some(()),
            _ => None,
        };
        self.wait("a step", pick).await;
    }

    pub(crate) async fn done(&mut self, task: &TaskRef) -> TaskDone {
        let pick = |report: &Report| match report {
            Report::TaskDone(done) if done.task.as_ref() == Some(task) => Some(Ok(done.clone())),
            Report::TaskFailed(failed) if failed.task.as_ref() == Some(task) => Some(Err(failed.clone())),
            _ => None,
        };
        self.wait("the end of a task", pick).await.unwrap()
    }

    pub(crate) async fn failed(&mut self, task: &TaskRef) -> TaskFailed {
        let pick = |report: &Report| match report {
            Report::TaskFailed(failed) if failed.task.as_ref() == Some(task) => Some(failed.clone()),
            _ => None,
        };
        let failed = self.wait("a failed task", pick).await;
        assert!(!failed.message.contains("secret"), "{failed:?}");
        failed
    }

    pub(crate) async fn describe(&mut self, model: &str, path: &str) -> Result<(), String> {
        self.send(Command::DescribeModel(DescribeModel { model: model.into(), path: path.into() })).await;
        let pick = |report: &Report| match report {
            Report::ModelDescribed(described) if described.model == model => described.outcome.clone(),
            _ => None,
        };
        match self.wait("a card", pick).await {
            model_described::Outcome::Card(_) => Ok(()),
            model_described::Outcome::Error(reason) => Err(reason),
        }
    }
}

/// Membership and blobs, in memory.
pub(crate) struct Coordinator {
    address: String,
    shared: Shared,
    _stop: DropGuard,
}

#[derive(Clone, Default)]
struct Shared {
    members: Arc<Mutex<Vec<Registration>>>,
    blobs: Arc<Mutex<HashMap<String, Bytes>>>,
}

impl Coordinator {
    pub(crate) async fn start() -> Self {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let (shared, stop) = (Shared::default(), CancellationToken::new());
        let server = tonic::transport::Server::builder()
            .add_service(MembershipServiceServer::new(shared.clone()))
            .add_service(BlobServiceServer::new(shared.clone()))
            .serve_with_incoming(TcpListenerStream::new(listener));
        tokio::spawn(stop.clone().run_until_cancelled_owned(server));
        Self { address, shared, _stop: stop.drop_guard() }
    }

    pub(crate) fn address(&self) -> String {
        self.address.clone()
    }

    pub(crate) fn members(&self) -> Vec<Registration> {
        self.shared.members.lock().unwrap().clone()
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
