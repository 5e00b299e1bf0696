//! Clusters of real processes on this machine: a coordinator and workers, started as an operator would.

use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use proto::v1::blob_service_client::BlobServiceClient;
use proto::v1::cluster_service_client::ClusterServiceClient;
use proto::v1::job_event::Kind;
use proto::v1::job_service_client::JobServiceClient;
use proto::v1::upload_blob_request::Part;
use proto::v1::{
    BlobHeader, CreateJobRequest, DownloadBlobRequest, Job, JobEvent, JobSpec, JobState, ListModelsRequest, ListWorkersRequest,
    ModelStatus, UploadBlobRequest, WatchJobRequest, WorkerStatus, download_blob_response,
};
use serde_json::Value;
use tonic::transport::{Channel, Endpoint};

use crate::proxy::Proxy;

/// Longest wait for anything that a healthy cluster does in a second or two; the machine may be busy.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// Where processes with variables of their own log.
const LOG: &str = "log";

/// A process that is killed when it goes out of sight.
#[derive(Debug)]
pub struct Process(pub Child);

impl Process {
    /// SIGKILL.
    pub fn kill(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }

    /// How it ended by itself, if it does in time.
    pub fn wait(&mut self, patience: Duration) -> Option<std::process::ExitStatus> {
        let deadline = Instant::now() + patience;
        loop {
            match self.0.try_wait() {
                Ok(Some(status)) => return Some(status),
                Ok(None) if Instant::now() < deadline => std::thread::sleep(Duration::from_millis(10)),
                _ => return None,
            }
        }
    }

    /// Sends a signal by name, such as "STOP".
    pub fn signal(&self, name: &str) {
        let _ = Command::new("kill").args([&format!("-{name}"), &self.0.id().to_string()]).stderr(Stdio::null()).status();
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.signal("CONT");
        self.kill();
    }
}

/// A coordinator and its workers.
#[derive(Debug)]
pub struct Cluster {
    /// The workers, in the order they were started.
    pub workers: Vec<Process>,
    /// The coordinator.
    pub coordinator: Process,
    /// http://host:port of the coordinator.
    pub address: String,
    /// host:port the coordinator listens on.
    listen: String,
    etcd: Option<String>,
    /// Variables of every process.
    variables: Vec<(String, String)>,
    dir: tempfile::TempDir,
}

impl Cluster {
    /// Starts a coordinator with this models.toml, and a worker for each of `labels` ("role=encoder", or "" for none).
    pub fn start(models: &str, labels: &[&str], etcd: Option<&str>) -> Self {
        Self::start_with(models, labels, etcd, &[])
    }

    /// As [`Self::start`], with variables for every process, whose logs are then in a file: [`Self::log`].
    pub fn start_with(models: &str, labels: &[&str], etcd: Option<&str>, variables: &[(&str, &str)]) -> Self {
        let dir = tempfile::tempdir().expect("a temporary folder");
        std::fs::write(dir.path().join("models.toml"), models).expect("models.toml can be written");
        let listen = format!("127.0.0.1:{}", free_port());
        let coordinator = coordinator(&listen, dir.path(), etcd, variables);
        let (address, etcd) = (format!("http://{listen}"), etcd.map(str::to_owned));
        let variables = variables.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
        let mut cluster = Self { workers: Vec::new(), coordinator, address, listen, etcd, variables, dir };
        labels.iter().for_each(|labels| cluster.add_worker(labels));
        cluster
    }

    /// kill -9 to the coordinator, and another on the same address and data.
    pub fn restart_coordinator(&mut self) {
        self.coordinator.kill();
        self.coordinator = coordinator(&self.listen, self.dir.path(), self.etcd.as_deref(), &self.variables);
    }

    /// As [`Self::restart_coordinator`], with another models.toml.
    ///
    /// # Panics
    /// When it cannot be written.
    pub fn restart_coordinator_with(&mut self, models: &str) {
        self.coordinator.kill();
        std::fs::write(self.dir.path().join("models.toml"), models).expect("models.toml can be written");
        self.restart_coordinator();
    }

    /// What a supervisor does: a coordinator that has ended by itself is started again. Says whether it had.
    pub fn supervise(&mut self) -> bool {
        let ended = matches!(self.coordinator.0.try_wait(), Ok(Some(_)));
        if ended {
            self.coordinator = coordinator(&self.listen, self.dir.path(), self.etcd.as_deref(), &self.variables);
        }
        ended
    }

    /// Another coordinator of the same cluster, at an address of its own. It stands by.
    pub fn add_coordinator(&self) -> (Process, String) {
        let listen = format!("127.0.0.1:{}", free_port());
        (coordinator(&listen, self.dir.path(), self.etcd.as_deref(), &self.variables), format!("http://{listen}"))
    }

    /// Starts one more worker.
    pub fn add_worker(&mut self, labels: &str) {
        self.add_worker_with(labels, &[]);
    }

    /// Starts one more worker that others reach through a proxy: it listens on 127.0.0.1, and says that it is at 127.0.0.2.
    pub async fn add_worker_behind_proxy(&mut self, labels: &str) -> Proxy {
        let port = free_port();
        let proxy = Proxy::start(([127, 0, 0, 2], port).into(), ([127, 0, 0, 1], port).into()).await;
        self.add_worker_with(labels, &["--listen", &format!("127.0.0.1:{port}"), "--advertise-host", "127.0.0.2"]);
        proxy
    }

    fn add_worker_with(&mut self, labels: &str, flags: &[&str]) {
        let mut command = atelier();
        command.args(["worker", "--threads", "1", "--metrics-listen", "127.0.0.1:0"]).args(flags);
        match &self.etcd {
            Some(etcd) => command.args(["--etcd", etcd]),
            None => command.args(["--coordinator", &self.address]),
        };
        if !labels.is_empty() {
            command.args(["--label", labels]);
        }
        with_variables(&mut command, self.dir.path(), &self.variables);
        self.workers.push(Process(command.spawn().expect("a worker starts")));
    }

    /// host:port the coordinator's metrics are read at, of a cluster of [`Self::start_with`] that logs in JSON what is info.
    pub async fn metrics(&self) -> String {
        let said = async || {
            let lines = self.log();
            let fields = lines.lines().filter_map(|line| Some(serde_json::from_str::<Value>(line).ok()?["fields"].clone()));
            let mut said = fields.filter(|fields| fields["message"] == "metrics are read at /metrics");
            said.next().and_then(|fields| fields["address"].as_str().map(str::to_owned))
        };
        eventually("the coordinator says where its metrics are", said).await
    }

    /// What the processes of [`Self::start_with`] have logged.
    pub fn log(&self) -> String {
        std::fs::read_to_string(self.dir.path().join(LOG)).unwrap_or_default()
    }

    /// What the coordinator keeps.
    pub fn data(&self) -> PathBuf {
        self.dir.path().join("data")
    }

    /// A client, once the coordinator answers.
    pub async fn client(&self) -> Client {
        Client::connect(&self.address).await
    }

    /// A client, once every model is ready.
    pub async fn ready(&self) -> Client {
        let mut client = self.client().await;
        client.wait_ready().await;
        client
    }
}

fn coordinator<S: AsRef<std::ffi::OsStr>>(listen: &str, dir: &Path, etcd: Option<&str>, variables: &[(S, S)]) -> Process {
    let mut command = atelier();
    command.args(["coordinator", "--listen", listen, "--metrics-listen", "127.0.0.1:0", "--models"]).arg(dir.join("models.toml"));
    command.arg("--data-dir").arg(dir.join("data")).args(["--queue-limit", "1000000"]);
    if let Some(etcd) = etcd {
        command.args(["--etcd", etcd]);
    }
    with_variables(&mut command, dir, variables);
    Process(command.spawn().expect("the coordinator starts"))
}

fn with_variables<S: AsRef<std::ffi::OsStr>>(command: &mut Command, dir: &Path, variables: &[(S, S)]) {
    if variables.is_empty() {
        return;
    }
    let log = std::fs::OpenOptions::new().create(true).append(true).open(dir.join(LOG)).expect("a log can be written");
    command.envs(variables.iter().map(|(name, value)| (name, value))).stderr(log);
}

/// Clients of a coordinator's services.
#[derive(Debug, Clone)]
pub struct Client {
    /// Jobs.
    pub jobs: JobServiceClient<Channel>,
    /// Blobs.
    pub blobs: BlobServiceClient<Channel>,
    /// Models and workers.
    pub cluster: ClusterServiceClient<Channel>,
}

impl Client {
    /// To a coordinator, once it answers.
    pub async fn connect(address: &str) -> Self {
        let endpoint = Endpoint::from_shared(address.to_owned()).expect("an address");
        let channel = eventually("the coordinator answers", async || endpoint.connect().await.ok()).await;
        Self {
            jobs: JobServiceClient::new(channel.clone()),
            blobs: BlobServiceClient::new(channel.clone()),
            cluster: ClusterServiceClient::new(channel),
        }
    }

    /// Waits until every model is ready.
    pub async fn wait_ready(&mut self) {
        let client = self.clone();
        let ready = async || {
            let models = client.clone().models().await;
            (!models.is_empty() && models.iter().all(|m| m.ready)).then_some(())
        };
        eventually("every model is ready", ready).await;
    }

    /// Every event of a job after `after_sequence` until it is over, from whatever coordinator leads meanwhile.
    pub async fn follow(&mut self, job_id: &str, mut after_sequence: u64) -> Vec<JobEvent> {
        let deadline = Instant::now() + PATIENCE;
        let mut events: Vec<JobEvent> = Vec::new();
        while Instant::now() < deadline {
            let request = WatchJobRequest { job_id: job_id.to_owned(), after_sequence };
            if let Ok(stream) = self.jobs.watch_job(request).await {
                let mut stream = stream.into_inner();
                while let Ok(Ok(Some(message))) = tokio::time::timeout(PATIENCE, stream.message()).await {
                    let event = message.event.expect("an event");
                    after_sequence = event.sequence;
                    events.push(event);
                }
            }
            let over = |event: &JobEvent| matches!(&event.kind, Some(Kind::StateChanged(job)) if job.finish_time.is_some());
            if events.last().is_some_and(over) {
                return events;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        panic!("job {job_id} does not end: {:?}", events.last());
    }

    /// The models.
    pub async fn models(&mut self) -> Vec<ModelStatus> {
        self.cluster.list_models(ListModelsRequest {}).await.map(|r| r.into_inner().models).unwrap_or_default()
    }

    /// The workers.
    pub async fn workers(&mut self) -> Vec<WorkerStatus> {
        self.cluster.list_workers(ListWorkersRequest {}).await.map(|r| r.into_inner().workers).unwrap_or_default()
    }

    /// Brings a picture; gives its id.
    ///
    /// # Panics
    /// When it is not taken.
    pub async fn upload(&mut self, bytes: Vec<u8>) -> String {
        let header = BlobHeader { byte_size: bytes.len() as u64, media_type: "image/png".into(), ..BlobHeader::default() };
        let parts = [Part::Header(header), Part::Chunk(bytes.into())].map(|part| UploadBlobRequest { part: Some(part) });
        self.blobs.upload_blob(tokio_stream::iter(parts)).await.expect("an upload").into_inner().blob_id
    }

    /// A finished picture's bytes.
    ///
    /// # Panics
    /// When it is not there.
    pub async fn download(&mut self, blob_id: &str) -> Vec<u8> {
        let request = DownloadBlobRequest { blob_id: blob_id.to_owned() };
        let mut stream = self.blobs.download_blob(request).await.expect("the blob is there").into_inner();
        let mut bytes = Vec::new();
        while let Some(message) = stream.message().await.expect("a whole stream") {
            if let Some(download_blob_response::Part::Chunk(chunk)) = message.part {
                bytes.extend_from_slice(&chunk);
            }
        }
        bytes
    }

    /// Asks for a job.
    pub async fn create(&mut self, spec: JobSpec) -> Result<Job, tonic::Status> {
        let response = self.jobs.create_job(CreateJobRequest { spec: Some(spec), ..CreateJobRequest::default() }).await?;
        Ok(response.into_inner().job.expect("a job"))
    }

    /// Follows a job until `enough` says so or it is over; returns the events seen.
    pub async fn watch(&mut self, job_id: &str, after_sequence: u64, mut enough: impl FnMut(&JobEvent) -> bool) -> Vec<JobEvent> {
        let request = WatchJobRequest { job_id: job_id.to_owned(), after_sequence };
        let mut stream = self.jobs.watch_job(request).await.expect("the job can be watched").into_inner();
        let mut events = Vec::new();
        while let Some(message) =
            tokio::time::timeout(PATIENCE, stream.message()).await.expect("events keep coming").expect("a whole stream")
        {
            let event = message.event.expect("an event");
            let stop = enough(&event);
            events.push(event);
            if stop {
                break;
            }
        }
        events
    }

    /// Follows a job to its end.
    pub async fn finish(&mut self, job_id: &str) -> Job {
        let events = self.follow(job_id, 0).await;
        let mut jobs = events.into_iter().rev().filter_map(|e| match e.kind {
            Some(Kind::StateChanged(job)) => Some(job),
            _ => None,
        });
        jobs.next().expect("a job has states")
    }

    /// Asks for a job and follows it to its end.
    pub async fn run(&mut self, spec: JobSpec) -> Job {
        let job = self.create(spec).await.expect("the job is accepted");
        self.finish(&job.id).await
    }
}

/// A job of more than 50 steps draws the same bytes as `undisturbed` although a worker of its denoiser's is killed, and again although its coordinator
/// is; the workers go on meanwhile.
///
/// # Panics
/// When it does not.
pub async fn survives_losses(cluster: &mut Cluster, spec: JobSpec, undisturbed: &str) {
    survives_losses_in("denoise", "", cluster, spec, undisturbed).await;
}

/// As [`survives_losses`], in a stage of this name, which the third worker has a part in: another with `labels` takes its place.
///
/// # Panics
/// When it does not.
pub async fn survives_losses_in(stage: &str, labels: &str, cluster: &mut Cluster, spec: JobSpec, undisturbed: &str) {
    let mut client = cluster.client().await;
    let half_done = |event: &JobEvent| step_of(stage, event).is_some_and(|step| step >= 50);
    let running = client.create(spec.clone()).await.expect("it is accepted");
    client.watch(&running.id, 0, half_done).await;
    cluster.workers[2].kill();
    cluster.add_worker(labels);
    let done = client.finish(&running.id).await;
    assert_eq!(sha256(&done), undisturbed);
    assert!(done.attempt >= 2);

    let running = client.create(spec).await.expect("it is accepted");
    client.watch(&running.id, 0, half_done).await;
    cluster.restart_coordinator();
    let mut client = cluster.client().await;
    let done = client.finish(&running.id).await;
    assert_eq!(sha256(&done), undisturbed);
    assert_eq!(done.attempt, 1, "the workers went on meanwhile");
}

/// The SHA-256 of the first picture of a job that is done.
///
/// # Panics
/// When the job ended otherwise.
pub fn sha256(job: &Job) -> String {
    assert_eq!(job.state(), JobState::Succeeded, "{:?}", job.failure);
    job.images[0].sha256.clone()
}

/// The denoising step that an event tells of.
pub fn denoise_step(event: &JobEvent) -> Option<u32> {
    step_of("denoise", event)
}

/// The same of a stage of this name.
pub fn step_of(stage: &str, event: &JobEvent) -> Option<u32> {
    match &event.kind {
        Some(Kind::StageProgress(progress)) if progress.stage == stage => Some(progress.step),
        _ => None,
    }
}

/// Asks until there is an answer.
///
/// # Panics
/// When there is none within [`PATIENCE`].
pub async fn eventually<T>(what: &str, mut ask: impl AsyncFnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Some(answer) = ask().await {
            return answer;
        }
        assert!(Instant::now() < deadline, "waited too long: {what}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// A port nobody listens on now.
pub fn free_port() -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
    listener.local_addr().expect("an address").port()
}

/// The `atelier` program beside this test.
///
/// # Panics
/// When it was not built.
pub fn program() -> PathBuf {
    let test = std::env::current_exe().expect("this program's path");
    let program = test.ancestors().map(|dir| dir.join("atelier")).find(|path| path.is_file());
    program.expect("the atelier program: cargo build --release -p cli, or scripts/test")
}

/// A command of it, which logs errors only.
pub fn atelier() -> Command {
    let mut command = Command::new(program());
    command
        .stdin(Stdio::null())
        .env_remove("RUST_LOG")
        .env("RUST_LOG", std::env::var("CLUSTER_LOG").unwrap_or_else(|_| "error".into()));
    command
}

/// The folder of a model that the tests serve: the recorded FLUX.1-dev pipeline with its tiny random weights.
pub fn tiny_flux() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("golden/flux_dev_txt2img/pipeline")
}
