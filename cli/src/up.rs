//! `atelier up`: a whole cluster on this machine.
//!
//! The coordinator runs in this process; each worker is a process of its own, started again when it dies. How many workers,
//! and with which labels, follows from the models file: for every selector, as many as the largest group it selects for.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use clap::Args;
use coordinator::models_file::ModelConfig;
use identity::authority::{self, Existing, files};
use identity::{Files, Role};
use proto::v1::{GroupState, ListModelsRequest, ModelStatus};
use tokio::net::TcpListener;
use tokio::process::{Child, Command};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tonic::Code;

use crate::client::{Client, ServerArgs};
use crate::error::Error;
use crate::generate::{self, JobArgs};
use crate::progress::Progress;

/// The bundled model's cluster, looked for here and beside the program.
const BUNDLED: &str = "bundled/models.toml";
/// Longest time from start until every model is ready.
const READY_WITHIN: Duration = Duration::from_secs(600);
/// A worker that dies within this time of its start waits before the next.
const RESTART_PAUSE: Duration = Duration::from_secs(1);

#[derive(Debug, Args)]
pub(crate) struct UpArgs {
    /// The models to serve and how each is cut. Default: the bundled model.
    #[arg(long, env = "ATELIER_MODELS")]
    models: Option<PathBuf>,
    /// Where the coordinator listens.
    #[arg(long, env = "ATELIER_LISTEN", default_value = "127.0.0.1:7700")]
    listen: std::net::SocketAddr,
    /// Keep membership in this etcd instead of in the coordinator; several by comma.
    #[arg(long, env = "ATELIER_ETCD", value_delimiter = ',')]
    etcd: Vec<String>,
    /// Where pictures are kept. Default: a temporary folder, removed at the end.
    #[arg(long, env = "ATELIER_DATA_DIR")]
    data_dir: Option<PathBuf>,
    /// Where the coordinator's metrics are read, at /metrics; at /targets there it says where those of the workers are, each of
    /// which has a free port of this machine.
    #[arg(long, env = "ATELIER_METRICS_LISTEN", default_value = "127.0.0.1:0")]
    metrics_listen: std::net::SocketAddr,
    /// How this process and the workers write their logs: `text`, or `json` for one object a line.
    #[arg(long, env = "ATELIER_LOG_FORMAT", default_value = "text")]
    log_format: telemetry::log::Format,
    /// Threads each worker computes with. Default: this machine's cores shared among them, at least one each.
    #[arg(long)]
    threads: Option<usize>,
    /// TLS between all processes and to clients, with the certificates in this folder; they are made if it has none.
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = crate::certs::DEFAULT_DIR)]
    tls: Option<PathBuf>,
    /// Listen without TLS where other machines can reach it: whoever can, may use it.
    #[arg(long, env = "ATELIER_INSECURE", conflicts_with = "tls")]
    insecure: bool,
    /// Serve metrics where other machines can reach them: they are plain text with TLS too.
    #[arg(long, env = "ATELIER_METRICS_INSECURE")]
    metrics_insecure: bool,
    /// Who clients are; needs --tls.
    #[command(flatten)]
    auth: coordinator::config::AuthArgs,
    /// The file that holds the key with which this command itself draws.
    #[arg(long, env = "ATELIER_API_KEY_FILE")]
    api_key_file: Option<PathBuf>,
    /// Draw one picture, then stop.
    #[command(subcommand)]
    then: Option<Then>,
}

#[derive(Debug, clap::Subcommand)]
enum Then {
    /// Draw one picture, then stop.
    Generate(JobArgs),
}

impl UpArgs {
    pub(crate) fn log_format(&self) -> telemetry::log::Format {
        self.log_format
    }

    /// What may be open to other machines without TLS.
    fn leave(&self) -> identity::TlsArgs {
        identity::TlsArgs { insecure: self.insecure, metrics_insecure: self.metrics_insecure, ..Default::default() }
    }
}

pub(crate) async fn run(args: UpArgs) -> Result<(), Error> {
    let models = args.models.clone().map_or_else(bundled, Ok)?;
    let mut config = coordinator::config::Config::for_models(&models)?;
    if config.models.is_empty() {
        return Err(Error::Flag { flag: "--models", reason: format!("{} names no model", models.display()) });
    }
    config.data_dir = args.data_dir.clone();
    if !args.etcd.is_empty() {
        let prefix = coordinator::config::DEFAULT_ETCD_PREFIX.to_owned();
        config.etcd = Some(coordinator::config::EtcdConfig::new(args.etcd.clone(), prefix));
    }
    let tls = args.tls.as_deref().map(local_tls).transpose()?;
    config.identity =
        tls.as_ref().map(|dir| identity::Identity::open(files(dir, Role::Coordinator), Role::Coordinator)).transpose()?;
    config.auth = args.auth.clone().config(tls.is_some())?;
    if tls.is_none() {
        args.leave().check_listen("--listen", args.listen.ip())?;
    }
    args.leave().check_plain("--metrics-listen", args.metrics_listen.ip())?;
    let fleet = fleet(&config.models);
    let taken = |source| Error::File { path: format!("--listen {}", args.listen), source };
    let listener = TcpListener::bind(args.listen).await.map_err(taken)?;
    let mut server = server(listener.local_addr()?, tls.as_deref());
    server.api_key_file = args.api_key_file.clone();

    let stop = CancellationToken::new();
    let tracker = TaskTracker::new();
    let metrics = coordinator::metrics::bind(Some(args.metrics_listen)).await?;
    let metrics_address = metrics.as_ref().map(TcpListener::local_addr).transpose()?;
    let serving = coordinator::run_measured(config, listener, metrics, stop.clone().cancelled_owned());
    let mut coordinator = tokio::spawn(serving);
    let threads =
        args.threads.unwrap_or_else(|| std::thread::available_parallelism().map_or(1, usize::from).div_ceil(fleet.len().max(1)));
    for labels in &fleet {
        let (labels, server, etcd, tls) = (labels.clone(), server.server.clone(), args.etcd.clone(), tls.clone());
        let worker = WorkerProcess { labels, threads, server, etcd, tls, log_format: args.log_format };
        tracker.spawn(worker.supervise(stop.clone()));
    }
    tracker.close();
    eprintln!("coordinator at {}, {} workers, models from {}", server.server, fleet.len(), models.display());
    if let Some(address) = metrics_address {
        eprintln!("metrics at http://{address}/metrics, where workers' are at http://{address}/targets");
    }

    let (outcome, ended) = tokio::select! {
        outcome = work(&server, args.then) => (outcome, None),
        () = crate::stop_signal() => (Ok(()), None),
        // It cannot start, or what it writes to failed: there is nobody to wait for.
        ended = &mut coordinator => (Err(Error::Up("the coordinator ended".into())), Some(ended)),
    };
    stop.cancel();
    tracker.wait().await;
    let ended = match ended {
        Some(ended) => ended,
        None => coordinator.await,
    };
    ended.map_err(|e| Error::Up(e.to_string()))??;
    outcome
}

async fn work(server: &ServerArgs, then: Option<Then>) -> Result<(), Error> {
    let mut client = ready(server).await?;
    match then {
        Some(Then::Generate(job)) => generate::draw(&mut client, &job).await,
        None => {
            client.cluster.list_models(ListModelsRequest {}).await?.into_inner().models.iter().for_each(warn_of);
            let tls = [("ca", &server.tls_ca), ("cert", &server.tls_cert), ("key", &server.tls_key)];
            let tls: String =
                tls.iter().filter_map(|(name, path)| Some(format!(" --tls-{name} {}", path.as_ref()?.display()))).collect();
            eprintln!("ready: atelier generate \"red heart\" --server {}{tls}", server.server);
            std::future::pending().await
        }
    }
}

/// Says what of a model that is served cannot be used.
fn warn_of(model: &ModelStatus) {
    let Some(card) = &model.card else { return };
    let adapters = card.adapters.iter().map(|adapter| ("adapter", &adapter.name, &adapter.problem));
    let controls = card.controls.iter().map(|control| ("control", &control.name, &control.problem));
    for (kind, name, problem) in adapters.chain(controls).filter(|(.., problem)| !problem.is_empty()) {
        eprintln!("warning: {kind} {name} of model {} cannot be used: {problem}", model.name);
    }
}

/// The folder, with certificates in it.
fn local_tls(dir: &Path) -> Result<PathBuf, Error> {
    if !files(dir, Role::Coordinator).ca.exists() {
        authority::write(dir, &crate::certs::hosts(Vec::new()), Existing::Refuse)?;
    }
    Ok(dir.to_owned())
}

/// How this program itself reaches the coordinator.
fn server(address: std::net::SocketAddr, tls: Option<&Path>) -> ServerArgs {
    let Some(dir) = tls else {
        return ServerArgs::plain(format!("http://{address}"));
    };
    let Files { own, ca } = files(dir, Role::Client);
    let (cert, key) = own.unzip();
    ServerArgs { tls_ca: Some(ca), tls_cert: cert, tls_key: key, ..ServerArgs::plain(format!("https://{address}")) }
}

/// Waits until every model is ready, showing how far the weights are. A broken one ends it.
async fn ready(server: &ServerArgs) -> Result<Client, Error> {
    let progress = Progress::new(false);
    let deadline = Instant::now() + READY_WITHIN;
    let mut client = loop {
        match Client::connect(server).await {
            Ok(client) => break client,
            Err(e) if Instant::now() > deadline => return Err(e),
            Err(_) => tokio::time::sleep(Duration::from_millis(50)).await,
        }
    };
    loop {
        let models = match client.cluster.list_models(ListModelsRequest {}).await {
            Ok(models) => models.into_inner().models,
            // With etcd it is a moment until it leads, or another does.
            Err(status) if status.code() == Code::Unavailable && Instant::now() < deadline => {
                progress.say(format!("the coordinator does not lead yet: {}", status.message()));
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            }
            Err(status) => return Err(status.into()),
        };
        if models.iter().all(|m| m.ready) {
            progress.finish();
            return Ok(client);
        }
        let groups: Vec<_> = models.iter().flat_map(|m| &m.groups).collect();
        let ready = groups.iter().filter(|g| g.state() == GroupState::Ready).count();
        let (loaded, total) = groups.iter().fold((0, 0), |(l, t), g| (l + g.loaded_bytes, t + g.total_bytes));
        progress.say(format!("loading: {ready} of {} groups ready, {:.1} of {:.1} MB", groups.len(), mega(loaded), mega(total)));
        if let Some(broken) = models.iter().find(|m| m.broken) {
            return Err(Error::Up(format!("model {}: {}", broken.name, broken.problem)));
        }
        if Instant::now() > deadline {
            let problems: Vec<String> =
                models.iter().filter(|m| !m.ready).map(|m| format!("{}: {}", m.name, m.problem)).collect();
            return Err(Error::Up(format!("not ready after {} s: {}", READY_WITHIN.as_secs(), problems.join("; "))));
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

fn mega(bytes: u64) -> f64 {
    bytes as f64 / 1e6
}

/// The workers that the models ask for: one entry of labels each.
fn fleet(models: &[ModelConfig]) -> Vec<BTreeMap<String, String>> {
    let mut needed: BTreeMap<BTreeMap<String, String>, u32> = BTreeMap::new();
    for component in models.iter().flat_map(|m| m.components.values()) {
        let ranks = if component.colocate { 1 } else { component.layout().ranks() as u32 * component.replicas };
        let workers = needed.entry(component.workers.clone()).or_default();
        *workers = ranks.max(*workers);
    }
    // A component that no section mentions takes any worker; there must be one.
    if needed.is_empty() {
        needed.insert(BTreeMap::new(), 1);
    }
    needed.into_iter().flat_map(|(labels, count)| std::iter::repeat_n(labels, count as usize)).collect()
}

fn bundled() -> Result<PathBuf, Error> {
    let beside = std::env::current_exe().ok();
    let above = beside.iter().flat_map(|exe| exe.ancestors()).map(|dir| dir.join(BUNDLED));
    let found = std::iter::once(Path::new(BUNDLED).to_owned()).chain(above).find(|path| path.is_file());
    found.ok_or_else(|| Error::Flag {
        flag: "--models",
        reason: format!("there is no {BUNDLED} here or beside the program: name a file"),
    })
}

/// One worker process, started again when it dies.
#[derive(Debug)]
struct WorkerProcess {
    labels: BTreeMap<String, String>,
    threads: usize,
    server: String,
    etcd: Vec<String>,
    log_format: telemetry::log::Format,
    /// Where the certificates are.
    tls: Option<PathBuf>,
}

impl WorkerProcess {
    async fn supervise(self, stop: CancellationToken) {
        while !stop.is_cancelled() {
            match self.start() {
                Ok(mut child) => {
                    tokio::select! {
                        status = child.wait() => eprintln!("a worker ended ({}); starting another", status.map_or_else(|e| e.to_string(), |s| s.to_string())),
                        () = stop.cancelled() => return terminate(child).await,
                    }
                }
                Err(error) => eprintln!("could not start a worker: {error}"),
            }
            tokio::select! {
                () = tokio::time::sleep(RESTART_PAUSE) => {}
                () = stop.cancelled() => return,
            }
        }
    }

    fn start(&self) -> std::io::Result<Child> {
        let mut command = Command::new(std::env::current_exe()?);
        command.arg("worker").args(["--threads", &self.threads.to_string(), "--metrics-listen", "127.0.0.1:0"]);
        command.args(["--log-format", &self.log_format.to_string()]);
        if self.etcd.is_empty() {
            command.args(["--coordinator", &self.server]);
        } else {
            command.args(["--etcd", &self.etcd.join(",")]);
        }
        if let Some(Files { own: Some((cert, key)), ca }) = self.tls.as_deref().map(|dir| files(dir, Role::Worker)) {
            command.arg("--tls-cert").arg(cert).arg("--tls-key").arg(key).arg("--tls-ca").arg(ca);
        }
        for (key, value) in &self.labels {
            command.args(["--label", &format!("{key}={value}")]);
        }
        if std::env::var_os("RUST_LOG").is_none() {
            command.env("RUST_LOG", "error");
        }
        command.stdin(Stdio::null()).kill_on_drop(true).spawn()
    }
}

/// SIGTERM, and SIGKILL if that is not enough.
async fn terminate(mut child: Child) {
    if let Some(pid) = child.id() {
        let _ = Command::new("kill").arg(pid.to_string()).status().await;
    }
    if tokio::time::timeout(Duration::from_secs(5), child.wait()).await.is_err() {
        let _ = child.kill().await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_fleet_has_a_worker_for_every_rank_of_the_largest_group() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("models.toml");
        let text = "[[model]]\nname = \"m\"\npath = \"m\"\n[model.components.vae]\nworkers = { role = \"encoder\" }\n\
                    [model.components.transformer]\ntp = 2\nblock_ranges = 2\nworkers = { role = \"denoiser\" }\n";
        std::fs::write(&file, text).unwrap();
        let fleet = fleet(&coordinator::models_file::read(&file).unwrap());
        let roles: Vec<&str> = fleet.iter().map(|labels| labels["role"].as_str()).collect();
        assert_eq!(roles, ["denoiser", "denoiser", "denoiser", "denoiser", "encoder"]);
    }
}
