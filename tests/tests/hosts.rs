//! A coordinator, three members of etcd and workers, each on a host of its own: a network namespace with an address and a cable. Under
//! load workers come, go and are cut off, and so is a member of etcd; no job is lost and every picture has its bits.
//!
//! Where namespaces are not permitted it says that it was not run, and why. A harness of its own, since libtest knows no such result.
#![allow(clippy::unwrap_used, clippy::print_stdout)] // helpers of tests are tests

use std::collections::BTreeMap;
use std::path::Path;
use std::process::{ExitCode, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use proto::v1::{CreateJobRequest, Job, JobSpec, JobState};
use tests::cluster::{Client, PATIENCE, Process, eventually, program, tiny_flux};
use tests::hosts::{Host, Hosts};

const NAME: &str = "workers_on_hosts_of_their_own_come_go_and_are_cut_off_under_load_and_nothing_is_lost";
/// Set in the process that runs on the client's host.
const INSIDE: &str = "HOSTS_INSIDE";
/// Steps of a job: long enough to be disturbed.
const STEPS: u32 = 60;
/// Jobs under way at once while there is load.
const AT_ONCE: usize = 6;
/// For a program that is asked to end.
const TO_END: Duration = Duration::from_secs(60);

fn main() -> ExitCode {
    if let Ok(words) = std::env::var(INSIDE) {
        let hosts: Vec<Host> = words.split(';').map(|words| Host::from_words(words).unwrap()).collect();
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
        runtime.block_on(come_and_go(&hosts));
        return ExitCode::SUCCESS;
    }
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let filters: Vec<&String> = arguments.iter().filter(|argument| !argument.starts_with('-')).collect();
    if arguments.iter().any(|argument| argument == "--list") {
        println!("{NAME}: test");
        return ExitCode::SUCCESS;
    }
    if !filters.is_empty() && !filters.iter().any(|filter| NAME.contains(filter.as_str())) {
        return ExitCode::SUCCESS;
    }
    println!("\nrunning 1 test");
    let made = Hosts::new().and_then(|mut hosts| {
        let each = (0..HOSTS).map(|_| hosts.add()).collect::<Result<Vec<_>, _>>()?;
        Ok((hosts, each))
    });
    let (hosts, each) = match made {
        Ok(made) => made,
        Err(reason) => {
            println!("test {NAME} ... NOT RUN: no network namespaces are permitted here: {reason}\n");
            println!("test result: NOT RUN. 0 passed; 0 failed; 1 not run");
            return ExitCode::SUCCESS;
        }
    };
    // The client is on a host too: this very program, there.
    let words: Vec<String> = each.iter().map(Host::to_words).collect();
    let status = each[CLIENT].command(std::env::current_exe().unwrap()).env(INSIDE, words.join(";")).status();
    drop(hosts);
    let passed = status.is_ok_and(|status| status.success());
    let (word, count) = if passed { ("ok", "1 passed; 0 failed") } else { ("FAILED", "0 passed; 1 failed") };
    println!("test {NAME} ... {word}\n\ntest result: {word}. {count}; 0 not run");
    if passed { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// Who is on which host.
const CLIENT: usize = 0;
const COORDINATOR: usize = 1;
const ETCD: std::ops::Range<usize> = 2..5;
const WORKERS: std::ops::Range<usize> = 5..9;
const HOSTS: usize = WORKERS.end;

async fn come_and_go(hosts: &[Host]) {
    let folder = tempfile::tempdir().unwrap();
    let etcd = &hosts[ETCD];
    let _etcd: Vec<Process> = (0..etcd.len()).map(|member| start_etcd(etcd, member, folder.path())).collect();
    let urls: Vec<String> = etcd.iter().map(|host| format!("http://{}:2379", host.address)).collect();
    let urls = urls.join(",");
    let coordinator = Supervised::start(hosts[COORDINATOR].clone(), folder.path(), &urls);
    let workers = &hosts[WORKERS];
    let mut first = start_worker(&workers[0], &urls);
    let _second = start_worker(&workers[1], &urls);

    let mut client = Client::connect(&format!("http://{}:7700", hosts[COORDINATOR].address)).await;
    client.wait_ready().await;
    let mut pictures = BTreeMap::new();
    for seed in 0..3 {
        pictures.insert(seed, picture(&client.run(job(seed)).await));
    }
    let load = Load::start(client.clone());

    println!("scale out: two workers more");
    let _third = start_worker(&workers[2], &urls);
    let _fourth = start_worker(&workers[3], &urls);
    until_denoisers(&client, 4).await;
    load.goes_on().await;

    println!("scale in: a worker is asked to go");
    first.signal("TERM");
    let status = first.wait(TO_END).expect("a worker that is asked to go ends");
    assert!(status.success(), "{status}");
    until_denoisers(&client, 3).await;
    load.goes_on().await;

    println!("a worker's cable is pulled");
    workers[1].connect(false);
    until_denoisers(&client, 2).await;
    load.goes_on().await;

    println!("a member of etcd loses its cable as well");
    etcd[0].connect(false);
    load.goes_on().await;

    println!("both cables are back");
    etcd[0].connect(true);
    workers[1].connect(true);
    until_denoisers(&client, 3).await;
    load.goes_on().await;

    let accepted = load.stop().await;
    let (mut succeeded, mut again) = (0, 0);
    for (id, seed) in &accepted {
        let done = client.finish(id).await;
        assert_eq!(picture(&done), pictures[seed], "job {id}, try {}", done.attempt);
        succeeded += 1;
        again += u32::from(done.attempt > 1);
    }
    let restarts = coordinator.restarts.load(Ordering::Relaxed);
    println!("{succeeded} of {} accepted jobs gave their pictures, {again} of them not at the first try", accepted.len());
    println!("the coordinator was started again {restarts} times: one that etcd does not hear ends, so that another may lead");
}

/// Asks for jobs, a few at once, until it is told to stop.
struct Load {
    stop: Arc<AtomicBool>,
    finished: tokio::sync::watch::Receiver<usize>,
    asking: tokio::task::JoinHandle<Vec<(String, u64)>>,
}

impl Load {
    fn start(client: Client) -> Self {
        let (stop, (finished, told)) = (Arc::new(AtomicBool::new(false)), tokio::sync::watch::channel(0));
        let stopped = stop.clone();
        let asking = tokio::spawn(async move {
            let mut running = tokio::task::JoinSet::new();
            let mut accepted = Vec::new();
            while !stopped.load(Ordering::Relaxed) {
                while running.len() < AT_ONCE {
                    let (seed, mut client) = (accepted.len() as u64 % 3, client.clone());
                    let id = accept(&mut client, seed).await;
                    accepted.push((id.clone(), seed));
                    running.spawn(async move { drop(client.finish(&id).await) });
                }
                running.join_next().await.unwrap().expect("a job that was accepted ends");
                finished.send_modify(|finished| *finished += 1);
            }
            running.join_all().await;
            accepted
        });
        Self { stop, finished: told, asking }
    }

    /// Waits until as many jobs as are under way have come to their end since: what was disturbed is over.
    async fn goes_on(&self) {
        let mut finished = self.finished.clone();
        let enough = *finished.borrow() + 2 * AT_ONCE;
        tokio::time::timeout(TO_END * 2, finished.wait_for(|finished| *finished >= enough)).await.expect("jobs go on").unwrap();
    }

    async fn stop(self) -> Vec<(String, u64)> {
        self.stop.store(true, Ordering::Relaxed);
        self.asking.await.expect("every job that was accepted ended")
    }
}

/// Asks for a job until it is accepted: once, however often it was asked for, since it is the same request.
async fn accept(client: &mut Client, seed: u64) -> String {
    let request =
        CreateJobRequest { request_id: uuid::Uuid::new_v4().to_string(), spec: Some(job(seed)), ..CreateJobRequest::default() };
    let deadline = Instant::now() + PATIENCE;
    loop {
        match client.jobs.create_job(request.clone()).await {
            Ok(response) => return response.into_inner().job.unwrap().id,
            Err(status) => assert!(Instant::now() < deadline, "no job is accepted: {status}"),
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

/// A coordinator that is started again when it ends, as by an operator's supervisor.
struct Supervised {
    restarts: Arc<AtomicUsize>,
    stop: Arc<AtomicBool>,
    watching: Option<std::thread::JoinHandle<()>>,
}

impl Supervised {
    fn start(host: Host, folder: &Path, etcd: &str) -> Self {
        let (restarts, stop) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicBool::new(false)));
        let (counted, stopped, folder, etcd) = (restarts.clone(), stop.clone(), folder.to_owned(), etcd.to_owned());
        let mut process = start_coordinator(&host, &folder, &etcd);
        let watching = std::thread::spawn(move || {
            while !stopped.load(Ordering::Relaxed) {
                if process.wait(Duration::from_millis(50)).is_some() {
                    process = start_coordinator(&host, &folder, &etcd);
                    counted.fetch_add(1, Ordering::Relaxed);
                }
            }
        });
        Self { restarts, stop, watching: Some(watching) }
    }
}

impl Drop for Supervised {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        drop(self.watching.take().map(std::thread::JoinHandle::join));
    }
}

/// Waits until so many workers hold the denoiser, each on a host of its own, and no other is listed.
async fn until_denoisers(client: &Client, count: usize) {
    let holds = async || {
        let workers = client.clone().workers().await;
        let denoisers = workers.iter().filter(|worker| worker.ranks.iter().any(|rank| rank.contains("transformer"))).count();
        (workers.len() == count && denoisers == count).then_some(())
    };
    eventually(&format!("{count} workers hold the denoiser"), holds).await;
}

fn job(seed: u64) -> JobSpec {
    JobSpec {
        model: "tiny".into(),
        prompt: "a red fox".into(),
        width: Some(48),
        height: Some(32),
        num_inference_steps: Some(STEPS),
        seed: Some(seed),
        max_sequence_length: Some(16),
        ..JobSpec::default()
    }
}

fn picture(job: &Job) -> String {
    assert_eq!(job.state(), JobState::Succeeded, "{:?}", job.failure);
    job.images[0].sha256.clone()
}

fn start_etcd(members: &[Host], number: usize, folder: &Path) -> Process {
    let host = &members[number];
    let url = |port: u16| format!("http://{}:{port}", host.address);
    let all: Vec<String> = members.iter().enumerate().map(|(i, m)| format!("m{i}=http://{}:2380", m.address)).collect();
    let mut command = host.command("etcd");
    command.arg("--name").arg(format!("m{number}")).arg("--data-dir").arg(folder.join(format!("etcd-{number}")));
    command.args(["--listen-client-urls", &url(2379), "--advertise-client-urls", &url(2379)]);
    command.args(["--listen-peer-urls", &url(2380), "--initial-advertise-peer-urls", &url(2380)]);
    command.args(["--initial-cluster", &all.join(",")]).stdout(Stdio::null()).stderr(Stdio::null());
    host.start(&mut command)
}

fn start_coordinator(host: &Host, folder: &Path, etcd: &str) -> Process {
    let components = ["text_encoder", "text_encoder_2", "transformer", "vae"];
    let components = components.map(|name| format!("[model.components.{name}]\nreplicas = 4\n")).concat();
    let models = folder.join("models.toml");
    std::fs::write(&models, format!("[[model]]\nname = \"tiny\"\npath = {:?}\n{components}", tiny_flux())).unwrap();
    let mut command = host.command(program());
    command.args(["coordinator", "--insecure", "--listen", "0.0.0.0:7700", "--advertise", &format!("{}:7700", host.address)]);
    command.arg("--models").arg(models).arg("--data-dir").arg(folder.join("data")).args(["--etcd", etcd]);
    host.start(command.env("RUST_LOG", log_level()))
}

fn start_worker(host: &Host, etcd: &str) -> Process {
    let mut command = host.command(program());
    command.args(["worker", "--insecure", "--threads", "1", "--etcd", etcd, "--advertise-host", &host.address]);
    command.args(["--listen", "0.0.0.0:7701", "--data-listen", "0.0.0.0:7702", "--label", &format!("host={}", host.address)]);
    host.start(command.env("RUST_LOG", log_level()))
}

fn log_level() -> String {
    std::env::var("CLUSTER_LOG").unwrap_or_else(|_| "error".into())
}
