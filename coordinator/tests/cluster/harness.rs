//! A coordinator in this process, and what a client does with it.

use std::time::{Duration, Instant};

use coordinator::{
    Config,
    config::{EtcdConfig, Limits},
};
use proto::v1::{
    BlobHeader, CreateJobRequest, DownloadBlobRequest, Job, JobEvent, JobSpec, ListModelsRequest, ModelStatus, UploadBlobRequest,
    WatchJobRequest, WatchJobResponse, blob_service_client::BlobServiceClient, cluster_service_client::ClusterServiceClient,
    download_blob_response::Part, job_event::Kind, job_service_client::JobServiceClient, upload_blob_request::Part as UploadPart,
};
use tokio::{net::TcpListener, task::JoinHandle};
use tokio_util::sync::CancellationToken;
use tonic::{Status, Streaming, transport::Channel};

/// Longest wait for anything in these tests, on a busy machine.
pub(crate) const DEADLINE: Duration = Duration::from_secs(30);
/// Pause between two looks at a condition.
pub(crate) const POLL: Duration = Duration::from_millis(20);

const MODELS: &str = "[[model]]\nname = \"emoji\"\npath = \"emoji\"\n[model.components.transformer]\ntp = 2\n";

pub(crate) struct Coordinator {
    pub(crate) address: String,
    channel: Channel,
    stop: CancellationToken,
    serving: JoinHandle<coordinator::Result<()>>,
}

impl Coordinator {
    pub(crate) async fn start() -> Self {
        Self::start_with(None).await
    }

    pub(crate) async fn start_with(etcd: Option<EtcdConfig>) -> Self {
        Self::start_in(etcd, Limits::default()).await
    }

    pub(crate) async fn start_in(etcd: Option<EtcdConfig>, limits: Limits) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let models = folder.path().join("models.toml");
        std::fs::write(&models, MODELS).unwrap();
        let config = Config { etcd, limits, ..Config::for_models(&models).unwrap() };
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let stop = CancellationToken::new();
        let serving = tokio::spawn(coordinator::run(config, listener, stop.clone().cancelled_owned()));
        let channel = Channel::from_shared(format!("http://{address}")).unwrap().connect().await.unwrap();
        Self { address, channel, stop, serving }
    }

    pub(crate) async fn stop(self) {
        self.stop.cancel();
        tokio::time::timeout(DEADLINE, self.serving).await.expect("it returns").unwrap().unwrap();
    }

    pub(crate) fn channel(&self) -> Channel {
        self.channel.clone()
    }

    pub(crate) fn jobs(&self) -> JobServiceClient<Channel> {
        JobServiceClient::new(self.channel())
    }

    pub(crate) fn cluster(&self) -> ClusterServiceClient<Channel> {
        ClusterServiceClient::new(self.channel())
    }

    /// None while it does not lead, or while whoever stood by hangs up since it leads now.
    pub(crate) async fn models(&self) -> Vec<ModelStatus> {
        match self.cluster().list_models(ListModelsRequest {}).await {
            Ok(response) => response.into_inner().models,
            Err(status) if matches!(status.code(), tonic::Code::Unavailable | tonic::Code::Cancelled) => vec![],
            Err(status) => panic!("{status}"),
        }
    }

    pub(crate) async fn until(&self, what: &str, condition: impl AsyncFn() -> bool) {
        let start = Instant::now();
        while !condition().await {
            assert!(start.elapsed() < DEADLINE, "never came: {what}; {:?}", self.models().await);
            tokio::time::sleep(POLL).await;
        }
    }

    pub(crate) async fn until_ready(&self) {
        self.until("the model is ready", async || self.models().await.first().is_some_and(|model| model.ready)).await;
    }

    pub(crate) async fn create(&self, spec: JobSpec) -> Job {
        let request = CreateJobRequest { spec: Some(spec), ..CreateJobRequest::default() };
        self.jobs().create_job(request).await.unwrap().into_inner().job.unwrap()
    }

    pub(crate) async fn open_watch(&self, job_id: &str, after_sequence: u64) -> Streaming<WatchJobResponse> {
        let request = WatchJobRequest { job_id: job_id.to_owned(), after_sequence };
        self.jobs().watch_job(request).await.unwrap().into_inner()
    }

    /// All events until the stream ends by itself.
    pub(crate) async fn watch(&self, job_id: &str, after_sequence: u64) -> Vec<JobEvent> {
        let mut stream = self.open_watch(job_id, after_sequence).await;
        let mut events = vec![];
        let all = async {
            while let Some(response) = stream.message().await.unwrap() {
                events.push(response.event.unwrap());
            }
        };
        tokio::time::timeout(DEADLINE, all).await.expect("the job comes to its end");
        events
    }

    pub(crate) async fn until_stage(&self, job_id: &str, stage: &str) {
        let mut stream = self.open_watch(job_id, 0).await;
        let begun = async {
            while let Some(response) = stream.message().await.unwrap() {
                match response.event.unwrap().kind {
                    Some(Kind::StageStarted(started)) if started.stage == stage => return,
                    _ => {}
                }
            }
            panic!("the job ended before {stage}");
        };
        tokio::time::timeout(DEADLINE, begun).await.expect("the stage begins");
    }

    pub(crate) async fn upload(&self, bytes: Vec<u8>) -> Result<String, Status> {
        let header = BlobHeader { byte_size: bytes.len() as u64, media_type: "image/png".into(), ..BlobHeader::default() };
        let chunks = bytes.chunks(proto::CHUNK_BYTES).map(|chunk| UploadPart::Chunk(chunk.to_vec().into()));
        let parts = std::iter::once(UploadPart::Header(header)).chain(chunks);
        let parts: Vec<_> = parts.map(|part| UploadBlobRequest { part: Some(part) }).collect();
        let uploaded = BlobServiceClient::new(self.channel()).upload_blob(tokio_stream::iter(parts)).await;
        uploaded.map(|response| response.into_inner().blob_id)
    }

    pub(crate) async fn download(&self, blob_id: &str) -> Vec<u8> {
        let request = DownloadBlobRequest { blob_id: blob_id.to_owned() };
        let mut parts = BlobServiceClient::new(self.channel()).download_blob(request).await.unwrap().into_inner();
        let mut bytes = vec![];
        while let Some(response) = parts.message().await.unwrap() {
            if let Some(Part::Chunk(chunk)) = response.part {
                bytes.extend_from_slice(&chunk);
            }
        }
        bytes
    }
}

pub(crate) fn spec() -> JobSpec {
    JobSpec { model: "emoji".into(), prompt: "a red car".into(), ..JobSpec::default() }
}

pub(crate) fn sequences(events: &[JobEvent]) -> Vec<u64> {
    events.iter().map(|event| event.sequence).collect()
}

/// The job as the last event shows it.
pub(crate) fn terminal(events: &[JobEvent]) -> Job {
    match events.last().and_then(|event| event.kind.clone()) {
        Some(Kind::StateChanged(job)) => job,
        other => panic!("the last event is no change of state: {other:?}"),
    }
}
