//! `atelier bench load`: a real coordinator with a real journal, and workers that speak the protocol but draw nothing.

pub(super) mod watching;

use std::ffi::OsString;
use std::io::Write;
use std::path::Path;
use std::process::Stdio;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use clap::Args;
use coordinator::stand_in::{self, Pace, Register, StandIn};
use coordinator::world::Dial;
use proto::v1::{CancelJobRequest, CreateJobRequest, JobSpec, ListModelsRequest};
use tokio::net::TcpListener;
use tokio::process::{Child, Command};
use tokio::task::JoinSet;
use tokio_stream::wrappers::TcpListenerStream;
use tokio_util::sync::{CancellationToken, DropGuard};
use tonic::Code;

use self::watching::Watching;
use super::queue;
use super::table::{Row, percentile, print};
use crate::client::{Client, ServerArgs};
use crate::error::Error;

const MODELS: &str = "[[model]]\nname = \"stand-in\"\npath = \"stand-in\"\nmax_jobs = 8\n\
                      [model.components.transformer]\nreplicas = 4\n";
const WORKERS: usize = 4;
/// For anything that takes a few seconds.
const PATIENCE: Duration = Duration::from_secs(60);

#[derive(Debug, Args)]
pub(crate) struct LoadArgs {
    /// Durable submits to make.
    #[arg(long, default_value_t = 100_000, value_parser = clap::value_parser!(u64).range(1..))]
    submits: u64,
    /// Submits under way at once.
    #[arg(long, default_value_t = 64)]
    in_flight: usize,
    /// Streams that watch running jobs.
    #[arg(long, default_value_t = 2000)]
    watchers: usize,
    /// Seconds of watching, with submits beside.
    #[arg(long, default_value_t = 10)]
    watch_seconds: u64,
    /// Jobs in the queue when decisions are measured.
    #[arg(long, default_value_t = 100_000)]
    queued: usize,
    /// Workers when decisions are measured.
    #[arg(long, default_value_t = 1000)]
    workers: u32,
    /// One line of JSON for each figure.
    #[arg(long)]
    json: bool,
}

pub(crate) async fn run(args: LoadArgs) -> Result<(), Error> {
    let folder = tempfile::tempdir_in(".")?;
    let mut rows = queue::measure(args.queued, args.workers);
    let fsyncs = fsyncs_per_second(folder.path())?;
    let mut cluster = Cluster::start(&folder.path().join("submits"), args.submits).await?;
    rows.extend(cluster.submits(&args, fsyncs).await?);
    rows.extend(cluster.refusals().await?);
    rows.extend(cluster.killed(args.submits).await?);
    drop(cluster);
    if args.watchers > 0 {
        let cluster = Cluster::start(&folder.path().join("watchers"), args.submits).await?;
        rows.extend(cluster.watchers(&args).await?);
    }
    print(&rows, args.json);
    Ok(())
}

/// How often this disk makes 4 KiB durable, one after the other: the floor of a durable submit's latency.
fn fsyncs_per_second(folder: &Path) -> Result<f64, Error> {
    let mut file = std::fs::File::create(folder.join("fsync"))?;
    let start = Instant::now();
    let mut done = 0;
    while start.elapsed() < Duration::from_secs(1) {
        file.write_all(&[1; 4096])?;
        file.sync_data()?;
        done += 1;
    }
    Ok(f64::from(done) / start.elapsed().as_secs_f64())
}

/// A coordinator, which is a process of its own, and its workers.
struct Cluster {
    server: ServerArgs,
    process: Process,
    /// The workers end with it.
    _workers: DropGuard,
}

/// How the coordinator was started, and what was.
struct Process {
    arguments: Vec<OsString>,
    child: Child,
}

impl Process {
    fn start(arguments: Vec<OsString>) -> Result<Self, Error> {
        let mut command = Command::new(std::env::current_exe()?);
        let child = command.args(&arguments).env("RUST_LOG", "off").stdin(Stdio::null()).kill_on_drop(true).spawn()?;
        Ok(Self { arguments, child })
    }

    /// kill -9, and another in its place.
    async fn again(&mut self) -> Result<(), Error> {
        self.child.kill().await?;
        *self = Self::start(std::mem::take(&mut self.arguments))?;
        Ok(())
    }

    /// Bytes of memory it holds.
    fn resident_bytes(&self) -> u64 {
        self.child.id().map_or(0, |id| queue::resident_bytes(&id.to_string()))
    }
}

impl Cluster {
    /// Its queue takes so many jobs.
    async fn start(folder: &Path, queue_limit: u64) -> Result<Self, Error> {
        std::fs::create_dir(folder)?;
        let models = folder.join("models.toml");
        std::fs::write(&models, MODELS)?;
        // Free now, and the coordinator's in a moment.
        let address = TcpListener::bind("127.0.0.1:0").await?.local_addr()?.to_string();
        let (data, limit) = (folder.join("data").into_os_string(), queue_limit.to_string().into());
        let [listen, of_models, of_data, of_limit] = ["--listen", "--models", "--data-dir", "--queue-limit"].map(OsString::from);
        let flags = vec![listen, address.clone().into(), of_models, models.into(), of_data, data, of_limit, limit];
        let process = Process::start([vec!["coordinator".into()], flags].concat())?;
        let stop = CancellationToken::new();
        for worker in 0..WORKERS {
            let listener = TcpListener::bind("127.0.0.1:0").await?;
            let registration = stand_in::registration(&format!("stand-in-{worker}"), &listener.local_addr()?.to_string());
            let pace = Pace { load: Duration::ZERO, step: Duration::from_secs(1), checkpoints: false, says_products: true };
            let worker = StandIn { registration, pace, dial: Dial::tcp(), drain: CancellationToken::new() };
            tokio::spawn(worker.run(Register::Coordinator(address.clone()), TcpListenerStream::new(listener), stop.clone()));
        }
        let cluster = Self { server: ServerArgs::plain(format!("http://{address}")), process, _workers: stop.drop_guard() };
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Ok(mut client) = Client::connect(&cluster.server).await {
                let models = client.cluster.list_models(ListModelsRequest {}).await?.into_inner().models;
                if models.iter().all(|model| model.ready) {
                    return Ok(cluster);
                }
            }
            if Instant::now() > deadline {
                return Err(Error::Up("the stand-in cluster is not ready after 60 s".into()));
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    /// How long nothing is accepted when the coordinator is killed, with all these jobs in its journal.
    async fn killed(&mut self, stored: u64) -> Result<Vec<Row>, Error> {
        self.make_room().await?;
        let killed = Instant::now();
        self.process.again().await?;
        loop {
            if let Ok(mut client) = Client::connect(&self.server).await
                && client.jobs.create_job(request(1000)).await.is_ok()
            {
                break;
            }
            if killed.elapsed() > PATIENCE {
                return Err(Error::Up("the coordinator accepts nothing 60 s after it was killed".into()));
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        let seconds = killed.elapsed().as_secs_f64();
        let what = format!("kill -9 of a coordinator with {stored} jobs, to the next accepted");
        Ok(vec![Row::new(what, seconds, "s", "wanted: at most 2")])
    }

    /// Makes room in a full queue, for a job and for those that run: they wait again until their workers have said what they hold.
    async fn make_room(&self) -> Result<(), Error> {
        let mut client = Client::connect(&self.server).await?;
        let newest = proto::v1::ListJobsRequest { page_size: 100, page_token: String::new() };
        for job in client.jobs.list_jobs(newest).await?.into_inner().jobs {
            client.jobs.cancel_job(CancelJobRequest { job_id: job.id }).await?;
        }
        Ok(())
    }

    /// Submits as fast as answers come.
    async fn submits(&self, args: &LoadArgs, fsyncs: f64) -> Result<Vec<Row>, Error> {
        let left = Arc::new(AtomicU64::new(args.submits));
        let start = Instant::now();
        let mut senders = JoinSet::new();
        for _ in 0..args.in_flight {
            let (mut client, left) = (Client::connect(&self.server).await?, left.clone());
            senders.spawn(async move {
                let mut took = Vec::new();
                while left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| left.checked_sub(1)).is_ok() {
                    let start = Instant::now();
                    client.jobs.create_job(request(1000)).await?;
                    took.push(start.elapsed().as_secs_f64() * 1e3);
                }
                Ok::<_, tonic::Status>(took)
            });
        }
        let mut took = Vec::new();
        while let Some(sender) = senders.join_next().await {
            took.extend(sender.map_err(|error| Error::Up(error.to_string()))??);
        }
        let rate = took.len() as f64 / start.elapsed().as_secs_f64();
        let beside = format!("{:.1}x the {fsyncs:.0} single fsyncs/s of this disk; wanted: 6000", rate / fsyncs);
        Ok(vec![
            Row::new(format!("durable submits, {} in flight", args.in_flight), rate, "/s", beside),
            Row::new("durable submit, median", percentile(&mut took, 0.5), "ms", ""),
            Row::new("durable submit, p99", percentile(&mut took, 0.99), "ms", "wanted: at most 25"),
        ])
    }

    /// What a full queue says, and how soon. The queue is as long as there were submits, some of which run.
    async fn refusals(&self) -> Result<Vec<Row>, Error> {
        let mut client = Client::connect(&self.server).await?;
        let mut took = Vec::new();
        let mut tries = 0;
        while took.len() < 1000 && tries < 5000 {
            tries += 1;
            let start = Instant::now();
            match client.jobs.create_job(request(1000)).await {
                Err(status) if status.code() == Code::ResourceExhausted => took.push(start.elapsed().as_secs_f64() * 1e3),
                Err(status) => return Err(status.into()),
                Ok(_) => {}
            }
        }
        Ok(vec![Row::new("refusal of a full queue, p99", percentile(&mut took, 0.99), "ms", "wanted: at most 10")])
    }

    /// Streams on running jobs that make a step a second, with submits beside.
    async fn watchers(&self, args: &LoadArgs) -> Result<Vec<Row>, Error> {
        let mut client = Client::connect(&self.server).await?;
        let mut jobs = Vec::new();
        for _ in 0..16 {
            let created = client.jobs.create_job(request(1000)).await?.into_inner();
            jobs.push(created.job.ok_or(Error::Protocol("no job"))?.id);
        }
        let before = self.process.resident_bytes();
        let mut watching = Watching::start(&self.server, args.watchers, &jobs).await?;
        // A step of each job, told to all.
        tokio::time::sleep(Duration::from_secs(2)).await;
        let grown = self.process.resident_bytes().saturating_sub(before);
        watching.seen().await?;
        let start = Instant::now();
        let mut took = Vec::new();
        let mut beat = tokio::time::interval(Duration::from_millis(1));
        let mut submitting = JoinSet::new();
        while start.elapsed() < Duration::from_secs(args.watch_seconds) {
            beat.tick().await;
            let mut client = client.clone();
            submitting.spawn(async move {
                let start = Instant::now();
                client.jobs.create_job(request(1000)).await.map(|_| start.elapsed().as_secs_f64() * 1e3)
            });
            while let Some(done) = submitting.try_join_next() {
                took.extend(done.ok().and_then(Result::ok));
            }
        }
        let seconds = start.elapsed().as_secs_f64();
        let seen = watching.seen().await?;
        watching.stop().await?;
        let (submits, told) = (took.len() as f64 / seconds, seen.events / seconds);
        let streams = args.watchers;
        Ok(vec![
            Row::new(
                format!("submit beside {streams} watchers, {submits:.0}/s, p99"),
                percentile(&mut took, 0.99),
                "ms",
                "wanted: at most 50",
            ),
            Row::new(format!("progress to the watcher, {told:.0}/s, p99"), seen.late_p99_millis, "ms", "wanted: at most 500"),
            Row::new(
                "memory of a watching stream in the coordinator",
                grown as f64 / streams as f64,
                "bytes",
                "wanted: at most 16384",
            ),
        ])
    }
}

fn request(steps: u32) -> CreateJobRequest {
    let spec =
        JobSpec { model: "stand-in".into(), prompt: "p".repeat(600), num_inference_steps: Some(steps), ..JobSpec::default() };
    CreateJobRequest { spec: Some(spec), ..CreateJobRequest::default() }
}
