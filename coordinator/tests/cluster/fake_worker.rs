//! A worker that is a real gRPC server and says all the right things, but draws nothing.
//!
//! It lives on a runtime of its own: dropping it closes its sockets as kill -9 does.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use futures::StreamExt;
use proto::v1::{
    BlobHeader, Component, ControlRequest, ControlResponse, GroupReady, Heartbeat, Holding, ImageResult, ModelCard,
    ModelDescribed, Parameter, PayloadHeader, Products, PutPayloadRequest, PutPayloadResponse, RegisterRequest, Registration,
    RunTask, StageKind, StageTemplate, TaskDone, TaskFailed, TaskProgress, TaskStarted, UploadBlobRequest,
    blob_service_client::BlobServiceClient,
    control_request::Command,
    control_response::Report,
    membership_service_client::MembershipServiceClient,
    model_described::Outcome,
    put_payload_request, upload_blob_request,
    worker_service_client::WorkerServiceClient,
    worker_service_server::{WorkerService, WorkerServiceServer},
};
use tokio::{net::TcpListener, runtime::Runtime, sync::mpsc};
use tokio_stream::wrappers::{ReceiverStream, TcpListenerStream};
use tonic::{Code, Request, Response, Status, Streaming, metadata::MetadataValue, transport::Server};

use crate::harness::{Coordinator, DEADLINE, POLL};

const HEARTBEAT: Duration = Duration::from_millis(500);
/// Of a picture, when nobody says.
const WIDTH: u32 = 64;

#[derive(Clone, Copy, PartialEq)]
pub(crate) enum Pace {
    Run,
    /// Begins to denoise and never ends, unless it is cancelled.
    HoldDenoise,
}

pub(crate) struct FakeWorker {
    fake: Fake,
    pub(crate) registration: Registration,
    runtime: Option<Runtime>,
}

impl FakeWorker {
    /// Serves, and registers at the coordinator.
    pub(crate) fn start(coordinator: &Coordinator, id: &str, pace: Pace) -> Self {
        let worker = Self::serve(id, pace);
        let register = register(coordinator.address.clone(), worker.registration.clone());
        worker.runtime.as_ref().unwrap().spawn(register);
        worker
    }

    /// Serves, and leaves it to the caller to be found.
    pub(crate) fn serve(id: &str, pace: Pace) -> Self {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        listener.set_nonblocking(true).unwrap();
        let registration = Registration {
            worker_id: id.into(),
            address: listener.local_addr().unwrap().to_string(),
            data_address: "127.0.0.1:1".into(),
            device: "cpu".into(),
            products: Products::ALL.map(i32::from).to_vec(),
            ..Registration::default()
        };
        let fake = Fake { registration: registration.clone(), shared: Arc::new(Mutex::new(Shared::new(pace))) };
        let service = WorkerServiceServer::new(fake.clone());
        runtime.spawn(async move {
            let incoming = TcpListenerStream::new(TcpListener::from_std(listener).unwrap());
            Server::builder().add_service(service).serve_with_incoming(incoming).await.unwrap();
        });
        Self { fake, registration, runtime: Some(runtime) }
    }

    pub(crate) fn set_pace(&self, pace: Pace) {
        self.fake.shared.lock().unwrap().pace = pace;
    }
}

impl Drop for FakeWorker {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

async fn register(coordinator: String, registration: Registration) {
    let mut client = MembershipServiceClient::connect(format!("http://{coordinator}")).await.unwrap();
    let (sender, requests) = mpsc::channel(4);
    sender.send(RegisterRequest { registration: Some(registration) }).await.unwrap();
    let _responses = client.register(ReceiverStream::new(requests)).await.unwrap();
    let mut beat = tokio::time::interval(HEARTBEAT);
    while sender.send(RegisterRequest { registration: None }).await.is_ok() {
        beat.tick().await;
    }
}

#[derive(Clone)]
struct Fake {
    registration: Registration,
    shared: Arc<Mutex<Shared>>,
}

struct Shared {
    pace: Pace,
    reports: Option<mpsc::Sender<Result<ControlResponse, Status>>>,
    /// By job and stage, with the inputs that have not come yet.
    waiting: HashMap<(String, String), (RunTask, Vec<String>)>,
}

impl Shared {
    fn new(pace: Pace) -> Self {
        Self { pace, reports: None, waiting: HashMap::new() }
    }
}

impl Fake {
    async fn report(&self, report: Report) {
        let reports = self.shared.lock().unwrap().reports.clone();
        if let Some(reports) = reports {
            drop(reports.send(Ok(ControlResponse { report: Some(report) })).await);
        }
    }

    async fn obey(self, mut commands: Streaming<ControlRequest>) {
        self.report(Report::Hello(self.registration.clone())).await;
        self.report(Report::Holding(Holding::default())).await;
        let mut beat = tokio::time::interval(HEARTBEAT);
        loop {
            tokio::select! {
                _ = beat.tick() => self.report(Report::Heartbeat(Heartbeat {})).await,
                message = commands.message() => match message {
                    Ok(Some(ControlRequest { command: Some(command) })) => self.command(command).await,
                    Ok(Some(_)) => {}
                    Ok(None) | Err(_) => return,
                },
            }
        }
    }

    async fn command(&self, command: Command) {
        match command {
            Command::DescribeModel(question) => {
                let outcome = Some(Outcome::Card(card()));
                self.report(Report::ModelDescribed(ModelDescribed { model: question.model, outcome })).await;
            }
            Command::JoinGroup(join) => {
                let ready = GroupReady { group_id: join.group_id, epoch: join.epoch, rank: join.rank };
                self.report(Report::GroupReady(ready)).await;
            }
            Command::RunTask(task) => self.accept(task),
            Command::CancelTask(cancel) => {
                let (task, reason) = (cancel.task, "CANCELLED".to_owned());
                let failed = TaskFailed { task, reason, message: "cancelled".into(), step: 1 };
                self.report(Report::TaskFailed(failed)).await;
            }
            Command::LeaveGroup(_) | Command::ForgetJob(_) | Command::Heartbeat(_) | Command::Lead(_) | Command::ParkTask(_) => {}
        }
    }

    fn accept(&self, task: RunTask) {
        if task.inputs.is_empty() {
            tokio::spawn(self.clone().run(task));
        } else {
            let reference = task.task.clone().unwrap();
            let inputs = task.inputs.clone();
            self.shared.lock().unwrap().waiting.insert((reference.job_id, reference.stage), (task, inputs));
        }
    }

    /// Nothing if the task is not there yet; otherwise the task, if this was the last of its inputs.
    fn take_in(&self, header: &PayloadHeader) -> Option<Option<RunTask>> {
        let task = header.task.as_ref()?;
        let key = (task.job_id.clone(), task.stage.clone());
        let mut shared = self.shared.lock().unwrap();
        let (_, missing) = shared.waiting.get_mut(&key)?;
        missing.retain(|stage| *stage != header.from_stage);
        let is_last = missing.is_empty();
        Some(if is_last { shared.waiting.remove(&key).map(|(task, _)| task) } else { None })
    }

    async fn run(self, task: RunTask) {
        self.report(Report::TaskStarted(TaskStarted { task: task.task.clone() })).await;
        if task.kind() == StageKind::Denoise {
            if self.shared.lock().unwrap().pace == Pace::HoldDenoise {
                return;
            }
            let steps = task.spec.as_ref().unwrap().num_inference_steps();
            for step in 1..=steps {
                self.report(Report::TaskProgress(TaskProgress { task: task.task.clone(), step, steps, saved_step: 0 })).await;
            }
        }
        for destination in &task.outputs {
            let header = PayloadHeader {
                task: destination.task.clone(),
                from_stage: task.task.as_ref().unwrap().stage.clone(),
                ..PayloadHeader::default()
            };
            let part = Some(put_payload_request::Part::Header(header));
            let mut next = WorkerServiceClient::connect(format!("http://{}", destination.address)).await.unwrap();
            next.put_payload(tokio_stream::once(PutPayloadRequest { part })).await.unwrap();
        }
        let width = task.spec.as_ref().unwrap().width();
        let images = if task.outputs.is_empty() { vec![upload(&task.blob_address, width).await] } else { vec![] };
        self.report(Report::TaskDone(TaskDone { task: task.task, seconds: 0.1, images, stored: false })).await;
    }
}

#[tonic::async_trait]
impl WorkerService for Fake {
    type ControlStream = ReceiverStream<Result<ControlResponse, Status>>;

    async fn control(&self, request: Request<Streaming<ControlRequest>>) -> Result<Response<Self::ControlStream>, Status> {
        let (sender, reports) = mpsc::channel(64);
        self.shared.lock().unwrap().reports = Some(sender);
        tokio::spawn(self.clone().obey(request.into_inner()));
        Ok(Response::new(ReceiverStream::new(reports)))
    }

    async fn put_payload(&self, request: Request<Streaming<PutPayloadRequest>>) -> Result<Response<PutPayloadResponse>, Status> {
        let Some(Ok(first)) = request.into_inner().next().await else {
            return Err(Status::invalid_argument("empty"));
        };
        let Some(put_payload_request::Part::Header(header)) = first.part else {
            return Err(Status::invalid_argument("no header"));
        };
        // The payload and the task come on different streams: either may be first.
        let start = Instant::now();
        let complete = loop {
            match self.take_in(&header) {
                Some(complete) => break complete,
                None if start.elapsed() > DEADLINE => {
                    return Err(Status::not_found("no task waits for this payload"));
                }
                None => tokio::time::sleep(POLL).await,
            }
        };
        if let Some(task) = complete {
            tokio::spawn(self.clone().run(task));
        }
        Ok(Response::new(PutPayloadResponse {}))
    }
}

/// What every picture of a fake worker holds, of the usual width.
pub(crate) fn picture() -> Vec<u8> {
    picture_of(WIDTH)
}

/// What every picture of this width holds.
pub(crate) fn picture_of(width: u32) -> Vec<u8> {
    (0..700_000u32).map(|i| ((i + width - WIDTH) % 251) as u8).collect()
}

/// Tries until the store has room, as a worker does.
async fn upload(address: &str, width: u32) -> ImageResult {
    let bytes = picture_of(width);
    let header = BlobHeader { byte_size: bytes.len() as u64, sha256: String::new(), media_type: "image/png".into() };
    let chunks = bytes.chunks(proto::CHUNK_BYTES).map(|chunk| upload_blob_request::Part::Chunk(chunk.to_vec().into()));
    let parts: Vec<_> = std::iter::once(upload_blob_request::Part::Header(header))
        .chain(chunks)
        .map(|part| UploadBlobRequest { part: Some(part) })
        .collect();
    let mut blobs = BlobServiceClient::connect(format!("http://{address}")).await.unwrap();
    let start = Instant::now();
    let blob_id = loop {
        let mut upload = Request::new(tokio_stream::iter(parts.clone()));
        upload.metadata_mut().insert(proto::RESULT, MetadataValue::from_static("1"));
        match blobs.upload_blob(upload).await {
            Ok(response) => break response.into_inner().blob_id,
            Err(status) if status.code() == Code::ResourceExhausted && start.elapsed() < DEADLINE => {
                tokio::time::sleep(POLL).await;
            }
            Err(status) => panic!("{status}"),
        }
    };
    ImageResult {
        sha256: blob_id.clone(),
        blob_id,
        width,
        height: WIDTH,
        media_type: "image/png".into(),
        byte_size: bytes.len() as u64,
    }
}

fn card() -> ModelCard {
    let stage = |id: &str, kind: StageKind, component: &str, inputs: &[&str]| StageTemplate {
        id: id.into(),
        kind: kind as i32,
        component: component.into(),
        inputs: inputs.iter().map(|input| (*input).to_owned()).collect(),
        condition: 0,
        with_pictures: false,
        with_controls: false,
        replaces: String::new(),
    };
    let component = |name: &str, tp_options: &[u32]| Component {
        name: name.into(),
        weight_bytes: 1,
        tp_options: tp_options.to_vec(),
        max_block_ranges: 1,
        fingerprint: String::new(),
    };
    let number = |name: &str, minimum, maximum, default| Parameter {
        name: name.into(),
        minimum,
        maximum,
        default_value: Some(default),
        ..Parameter::default()
    };
    ModelCard {
        name: "emoji".into(),
        digest: "d".repeat(64),
        components: vec![component("text_encoder", &[1]), component("transformer", &[1, 2]), component("vae", &[1])],
        stages: vec![
            stage("encode_text", StageKind::EncodeText, "text_encoder", &[]),
            stage("denoise", StageKind::Denoise, "transformer", &["encode_text"]),
            stage("decode", StageKind::Decode, "vae", &["denoise"]),
        ],
        parameters: vec![
            number("width", 16.0, 4096.0, WIDTH.into()),
            number("height", 16.0, 4096.0, WIDTH.into()),
            number("num_inference_steps", 1.0, 100.0, 4.0),
        ],
        max_pixels: 1 << 24,
        ..ModelCard::default()
    }
}
