//! A cluster that `atelier up --tls` starts, and load on it.

use std::collections::BTreeSet;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use identity::authority::{self, Authority};
use identity::{Files, Identity, Role};
use proto::v1::blob_service_client::BlobServiceClient;
use proto::v1::cluster_service_client::ClusterServiceClient;
use proto::v1::job_service_client::JobServiceClient;
use proto::v1::{CreateJobRequest, GetJobRequest, Job, JobSpec, JobState};
use tests::cluster::{Client, PATIENCE, Process, atelier, eventually, free_port, tiny_flux};
use tonic::metadata::{Ascii, MetadataValue};
use tonic::service::{Interceptor, interceptor::InterceptedService};
use tonic::transport::{Channel, Endpoint};
use tonic::{Request, Status};

use super::strangers::{Kind, served_certificate};

/// What every job asks for; it must be nowhere.
pub(crate) const PROMPT: &str = "a heliotrope armadillo that nobody else mentions";

/// The cluster.
pub(crate) struct Up {
    process: Process,
    port: u16,
    /// The folder of certificates.
    pub(crate) tls: PathBuf,
    dir: tempfile::TempDir,
}

/// The names that its certificates have.
pub(crate) fn hosts() -> Vec<String> {
    vec!["127.0.0.1".to_owned(), "localhost".to_owned()]
}

impl Up {
    /// With two workers that hold the transformer together.
    pub(crate) async fn start(flags: &[&str]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let models = dir.path().join("models.toml");
        let path = tiny_flux();
        let text = format!("[[model]]\nname = \"tiny\"\npath = \"{}\"\n[model.components.transformer]\ntp = 2\n", path.display());
        std::fs::write(&models, text).unwrap();
        let (tls, port) = (dir.path().join("tls"), free_port());
        let log = std::fs::File::create(dir.path().join("log")).unwrap();
        let mut command = atelier();
        command.arg("up").arg(format!("--tls={}", tls.display())).arg("--models").arg(models);
        command.arg("--data-dir").arg(dir.path().join("data")).args(["--listen", &format!("127.0.0.1:{port}")]).args(flags);
        command.env("NO_COLOR", "1").env("RUST_LOG", "debug").stderr(log).stdout(Stdio::null());
        Self { process: Process(command.spawn().unwrap()), port, tls, dir }
    }

    /// The coordinator's.
    pub(crate) fn port(&self) -> u16 {
        self.port
    }

    /// What all its processes said.
    pub(crate) fn log(&self) -> String {
        String::from_utf8_lossy(&std::fs::read(self.dir.path().join("log")).unwrap()).into_owned()
    }

    /// Everything that the run wrote, but for the certificates.
    pub(crate) fn written(&self) -> Vec<(PathBuf, Vec<u8>)> {
        let (mut folders, mut found) = (vec![self.dir.path().to_owned()], Vec::new());
        while let Some(folder) = folders.pop() {
            for entry in std::fs::read_dir(folder).unwrap() {
                let path = entry.unwrap().path();
                if path.is_dir() && path != self.tls {
                    folders.push(path);
                } else if path.is_file() {
                    found.extend(std::fs::read(&path).ok().map(|bytes| (path, bytes)));
                }
            }
        }
        assert!(found.iter().any(|(path, _)| path.starts_with(self.dir.path().join("data"))), "{found:?}");
        found
    }

    /// A client with the certificate of one, once the coordinator answers.
    pub(crate) async fn client(&self) -> Caller {
        let files = authority::files(&self.tls, Role::Client);
        let ready = || Files::clone(&files);
        let identity = eventually("certificates are made", async || Identity::open(ready(), Role::Client).ok()).await;
        let endpoint = Endpoint::from_shared(format!("http://127.0.0.1:{}", self.port)).unwrap();
        let connector = identity.connector_by_name(Role::Coordinator);
        let connect = async || endpoint.connect_with_connector(connector.clone()).await.ok();
        let channel = eventually("the coordinator answers", connect).await;
        Caller(Client {
            jobs: JobServiceClient::new(channel.clone()),
            blobs: BlobServiceClient::new(channel.clone()),
            cluster: ClusterServiceClient::new(channel),
        })
    }

    /// A client with a key alone, which goes with every call.
    pub(crate) async fn client_with(&self, key: &str) -> Keyed {
        let own = None;
        let identity = Identity::open(Files { own, ca: self.tls.join("ca.crt") }, Role::Client).unwrap();
        let endpoint = Endpoint::from_shared(format!("http://127.0.0.1:{}", self.port)).unwrap();
        let channel = endpoint.connect_with_connector(identity.connector_by_name(Role::Coordinator)).await.unwrap();
        let value: MetadataValue<Ascii> = format!("Bearer {key}").parse().unwrap();
        let calls = InterceptedService::new(channel, Bearer(value));
        Keyed { jobs: JobServiceClient::new(calls.clone()), blobs: BlobServiceClient::new(calls) }
    }

    /// Whether `atelier health` says so, with the files of a role.
    pub(crate) fn health(&self, port: u16, role: &str, flags: &[&str]) -> bool {
        let file = |name: String| self.tls.join(name).into_os_string().into_string().unwrap();
        let (cert, key) = (file(format!("{role}.crt")), file(format!("{role}.key")));
        let mut command = atelier();
        command.args(["health", &format!("127.0.0.1:{port}"), "--tls-ca", &file("ca.crt".into())]).args(flags);
        command.args(["--tls-cert", &cert, "--tls-key", &key]);
        command.stderr(Stdio::null()).status().unwrap().success()
    }

    /// `atelier generate` with a key, as a person would.
    pub(crate) fn generate(&self, key: &str) -> std::process::Output {
        let file = self.dir.path().join("key");
        std::fs::write(&file, format!("{key}\n")).unwrap();
        let mut command = atelier();
        command.args(["generate", PROMPT, "--steps", "2", "--size", "48x32", "--quiet", "--max-sequence-length", "16"]);
        command.arg("--server").arg(format!("https://localhost:{}", self.port)).arg("--api-key-file").arg(&file);
        command.arg("--tls-ca").arg(self.tls.join("ca.crt")).arg("--out").arg(self.dir.path().join("picture.png"));
        let drawn = command.output().unwrap();
        std::fs::remove_file(file).unwrap();
        drawn
    }

    /// Every port that a process of the cluster listens at, as the system knows them, and what it is for.
    pub(crate) fn ports(&self) -> Vec<(u16, Kind)> {
        let up = self.process.0.id();
        let mut ports: Vec<_> = listening(up).into_iter().map(|port| (port, Kind::Coordinator)).collect();
        let log = self.log();
        for worker in children(up) {
            for port in listening(worker) {
                let of_ranks = log.contains(&format!("data_address=\"127.0.0.1:{port}\""));
                ports.push((port, if of_ranks { Kind::Ranks } else { Kind::Worker }));
            }
        }
        ports.retain(|(port, _)| !is_metrics(*port));
        ports
    }

    /// Waits until a condition holds at every port.
    pub(crate) async fn wait_until_all<F: Future<Output = bool>>(&self, holds: impl Fn(Kind, u16) -> F) {
        for (port, kind) in self.ports() {
            eventually("every port has what is new", async || holds(kind, port).await.then_some(())).await;
        }
    }

    /// Waits until every port shows the certificate that is in the folder.
    pub(crate) async fn all_serve_what_is_in_the_folder(&self) {
        self.wait_until_all(|kind, port| async move {
            let role = if kind == Kind::Coordinator { Role::Coordinator } else { Role::Worker };
            served_certificate(&self.tls, kind, port).await == Some(der(&self.tls.join(format!("{role}.crt"))))
        })
        .await;
    }

    /// Puts `ca` in the place of the authorities that are believed.
    pub(crate) fn believe(&self, ca: &str) {
        replace(&self.tls.join("ca.crt"), ca);
    }

    /// Puts certificates by another authority in place.
    pub(crate) fn replace_certificates(&self, authority: &Authority) {
        for role in Role::ALL {
            let leaf = authority.certificate(role, &hosts()).unwrap();
            replace(&self.tls.join(format!("{role}.crt")), &leaf.certificate);
            replace(&self.tls.join(format!("{role}.key")), &leaf.key);
        }
    }

    /// kill -9 to one worker; `up` starts another.
    pub(crate) fn kill_a_worker(&mut self) {
        let worker = *children(self.process.0.id()).first().unwrap();
        assert!(Command::new("kill").args(["-9", &worker.to_string()]).status().unwrap().success());
    }
}

/// Metrics are read in plain text, by whoever is on this machine, and nothing else is answered there.
fn is_metrics(port: u16) -> bool {
    let ask = |path: &str| {
        let mut stream = TcpStream::connect(("127.0.0.1", port)).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        let asked = write!(stream, "GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n");
        let mut answer = Vec::new();
        drop(asked.and_then(|()| stream.read_to_end(&mut answer)));
        String::from_utf8_lossy(&answer).into_owned()
    };
    let is = ask("/metrics").starts_with("HTTP/1.1 200");
    assert!(!is || ask("/").starts_with("HTTP/1.1 404"), "a port of metrics answers something else");
    is
}

impl Drop for Up {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("{}", self.log().lines().filter(|line| !line.contains("DEBUG")).collect::<Vec<_>>().join("\n"));
        }
        // So that its workers end too.
        self.process.signal("TERM");
        let _ = self.process.wait(PATIENCE);
    }
}

/// Adds a key to every call.
#[derive(Clone)]
pub(crate) struct Bearer(MetadataValue<Ascii>);

impl Interceptor for Bearer {
    fn call(&mut self, mut request: Request<()>) -> Result<Request<()>, Status> {
        request.metadata_mut().insert("authorization", self.0.clone());
        Ok(request)
    }
}

/// A client that shows a key.
pub(crate) struct Keyed {
    pub(crate) jobs: JobServiceClient<InterceptedService<Channel, Bearer>>,
    pub(crate) blobs: BlobServiceClient<InterceptedService<Channel, Bearer>>,
}

impl Keyed {
    /// Asks for a job.
    pub(crate) async fn create(&mut self, spec: JobSpec) -> Result<Job, Status> {
        let request = CreateJobRequest { spec: Some(spec), ..CreateJobRequest::default() };
        Ok(self.jobs.create_job(request).await?.into_inner().job.unwrap())
    }

    /// Waits for its end.
    pub(crate) async fn finish(&mut self, job_id: &str) -> Job {
        let request = GetJobRequest { job_id: job_id.to_owned() };
        let ended = async || {
            let job = self.jobs.get_job(request.clone()).await.unwrap().into_inner().job.unwrap();
            job.finish_time.is_some().then_some(job)
        };
        eventually("the job ends", ended).await
    }
}

/// A small picture.
pub(crate) fn spec(steps: u32) -> JobSpec {
    JobSpec {
        model: "tiny".into(),
        prompt: PROMPT.into(),
        width: Some(48),
        height: Some(32),
        num_inference_steps: Some(steps),
        seed: Some(7),
        max_sequence_length: Some(16),
        ..JobSpec::default()
    }
}

/// The file of keys of a cluster.
pub(crate) struct Keys(tempfile::TempDir);

impl Keys {
    /// Without any.
    pub(crate) fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    pub(crate) fn file(&self) -> PathBuf {
        self.0.path().join("keys.toml")
    }

    /// A new key of a tenant.
    pub(crate) fn add(&self, tenant: &str) -> String {
        let made = atelier().args(["keys", "new", tenant, "--file"]).arg(self.file()).output().unwrap();
        assert!(made.status.success(), "{made:?}");
        String::from_utf8(made.stdout).unwrap().trim().to_owned()
    }

    /// What a tenant may use.
    pub(crate) fn limit(&self, tenant: &str, limits: &str) {
        let text = std::fs::read_to_string(self.file()).unwrap();
        std::fs::write(self.file(), format!("{text}\n[[tenant]]\nname = \"{tenant}\"\n{limits}")).unwrap();
    }
}

/// A client.
#[derive(Clone)]
pub(crate) struct Caller(pub(crate) Client);

impl Caller {
    /// Waits until every model is ready.
    pub(crate) async fn wait_ready(&mut self) {
        self.0.wait_ready().await;
    }

    /// Draws, and says what came of it: the sha256 of the picture.
    pub(crate) async fn picture(&mut self, steps: u32) -> String {
        let job = self.0.run(spec(steps)).await;
        assert_eq!(job.state(), JobState::Succeeded, "{:?}", job.failure);
        job.images[0].sha256.clone()
    }
}

/// Jobs, one after the other, until they are told to stop.
pub(crate) struct Load {
    done: Arc<AtomicUsize>,
    stop: Arc<AtomicBool>,
    task: tokio::task::JoinHandle<Vec<String>>,
}

impl Load {
    pub(crate) fn start(mut client: Caller) -> Self {
        let (done, stop) = (Arc::<AtomicUsize>::default(), Arc::<AtomicBool>::default());
        let (counted, stopped) = (done.clone(), stop.clone());
        let task = tokio::spawn(async move {
            let mut pictures = Vec::new();
            while !stopped.load(Ordering::SeqCst) {
                pictures.push(client.picture(4).await);
                counted.fetch_add(1, Ordering::SeqCst);
            }
            pictures
        });
        Self { done, stop, task }
    }

    /// Waits for one more picture than there are, begun from now on.
    pub(crate) async fn goes_on(&self) {
        let before = self.done.load(Ordering::SeqCst);
        eventually("jobs go on", async || {
            (self.done.load(Ordering::SeqCst) >= before + 2 || self.task.is_finished()).then_some(())
        })
        .await;
    }

    /// All pictures.
    pub(crate) async fn stop(self) -> Vec<String> {
        self.stop.store(true, Ordering::SeqCst);
        self.task.await.expect("no job failed")
    }
}

/// The second line of a private key: its secret, in part.
pub(crate) fn key_material(tls: &Path, role: Role) -> String {
    let text = std::fs::read_to_string(tls.join(format!("{role}.key"))).unwrap();
    text.lines().nth(1).unwrap().to_owned()
}

fn der(path: &Path) -> Vec<u8> {
    use rustls_pki_types::pem::PemObject;
    rustls_pki_types::CertificateDer::from_pem_file(path).unwrap().to_vec()
}

/// As a mounted secret changes: whole, from one moment to the next.
fn replace(path: &Path, text: &str) {
    let new = path.with_extension("next");
    std::fs::write(&new, text).unwrap();
    std::fs::rename(new, path).unwrap();
}

fn children(parent: u32) -> Vec<u32> {
    let processes = std::fs::read_dir("/proc").unwrap().filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok());
    let is_child = |pid: &u32| {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        let after_name = stat.rsplit(')').next().unwrap_or_default();
        after_name.split_whitespace().nth(1) == Some(&parent.to_string())
    };
    processes.filter(is_child).collect()
}

/// The TCP ports at which a process listens.
fn listening(pid: u32) -> BTreeSet<u16> {
    let fds = std::fs::read_dir(format!("/proc/{pid}/fd")).unwrap();
    let links = fds.filter_map(|fd| std::fs::read_link(fd.ok()?.path()).ok());
    let sockets: BTreeSet<String> =
        links.filter_map(|link| Some(link.to_str()?.strip_prefix("socket:[")?.strip_suffix(']')?.to_owned())).collect();
    let mut ports = BTreeSet::new();
    for table in ["tcp", "tcp6"] {
        for line in std::fs::read_to_string(format!("/proc/{pid}/net/{table}")).unwrap_or_default().lines().skip(1) {
            let columns: Vec<&str> = line.split_whitespace().collect();
            // 0A: it listens.
            if columns[3] == "0A" && sockets.contains(columns[9]) {
                let port = columns[1].rsplit(':').next().unwrap();
                ports.insert(u16::from_str_radix(port, 16).unwrap());
            }
        }
    }
    ports
}
