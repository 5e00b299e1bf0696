//! `atelier generate` and `atelier jobs` as a person uses them, also when the coordinator is not there.

#![allow(clippy::unwrap_used)] // helpers of tests are tests

use std::path::PathBuf;
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use proto::v1::{GetJobRequest, Job, JobSpec, JobState, ListJobsRequest};
use tests::cluster::{Client, Cluster, PATIENCE, Process, atelier, eventually, free_port, tiny_flux};
use tests::proxy::Proxy;

/// A job that is done at once.
const SHORT: [&str; 4] = ["--steps", "2", "--size", "48x32"];
/// One that goes on until it is cancelled.
const LONG: [&str; 4] = ["--steps", "500", "--size", "512x512"];

fn models() -> String {
    format!("[[model]]\nname = \"tiny\"\npath = \"{}\"\n", tiny_flux().display())
}

/// `atelier` with these arguments, at a server.
fn ask(server: &str, arguments: &[&str]) -> Output {
    // Flags may stand behind the subcommand.
    atelier().args(arguments).args(["--server", server]).output().unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// An `atelier generate` that runs.
struct Drawing {
    process: Process,
    folder: tempfile::TempDir,
}

impl Drawing {
    fn start(server: &str, job: &[&str]) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let said = std::fs::File::create(folder.path().join("said")).unwrap();
        let mut command = generate(server, job, &folder.path().join("a.png"));
        let process = Process(command.stdout(Stdio::null()).stderr(said).spawn().unwrap());
        Self { process, folder }
    }

    fn said(&self) -> String {
        std::fs::read_to_string(self.folder.path().join("said")).unwrap()
    }

    async fn until_it_says(&self, what: &str) {
        eventually(what, async || self.said().contains(what).then_some(())).await;
    }

    /// The id of its job, as soon as it is accepted.
    async fn job(&self) -> String {
        self.until_it_says("\n").await;
        job_id(&self.said())
    }

    fn ctrl_c(&self) {
        self.process.signal("INT");
    }

    /// What it said in the end; it must have failed.
    async fn failed(mut self, within: Duration) -> String {
        let (status, this) = tokio::task::spawn_blocking(move || (self.process.wait(within), self)).await.unwrap();
        let status = status.unwrap_or_else(|| panic!("it does not end: {}", this.said()));
        assert!(!status.success(), "{}", this.said());
        this.said()
    }
}

fn generate(server: &str, job: &[&str], out: &std::path::Path) -> Command {
    let mut command = atelier();
    command.args(["generate", "a fox", "--seed", "7", "--max-sequence-length", "16", "--model", "tiny", "--server", server]);
    command.args(job).arg("--out").arg(out);
    command
}

/// What `generate` says of its job.
fn job_id(said: &str) -> String {
    let line = said.lines().find_map(|line| line.strip_prefix("job "));
    line.unwrap_or_else(|| panic!("no job is named: {said}")).to_owned()
}

async fn state(client: &mut Client, job_id: &str) -> Job {
    client.jobs.get_job(GetJobRequest { job_id: job_id.to_owned() }).await.unwrap().into_inner().job.unwrap()
}

/// A job that waits, once the only worker is gone.
async fn queued(cluster: &mut Cluster) -> Job {
    let mut client = cluster.ready().await;
    cluster.workers[0].kill();
    eventually("the worker is missed", async || client.workers().await.is_empty().then_some(())).await;
    client.create(spec()).await.unwrap()
}

fn spec() -> JobSpec {
    JobSpec {
        model: "tiny".into(),
        prompt: "a fox".into(),
        width: Some(48),
        height: Some(32),
        num_inference_steps: Some(2),
        max_sequence_length: Some(16),
        ..JobSpec::default()
    }
}

/// The coordinator, by a way that can be blocked.
async fn proxied(cluster: &Cluster) -> (Proxy, String) {
    let port = free_port();
    let coordinator = cluster.address.trim_start_matches("http://").parse().unwrap();
    (Proxy::start(([127, 0, 0, 1], port).into(), coordinator).await, format!("http://127.0.0.1:{port}"))
}

#[tokio::test(flavor = "multi_thread")]
async fn a_jobs_pictures_can_be_fetched_again_by_the_id_that_generate_says_and_show_tells_what_happened() {
    let cluster = Cluster::start(&models(), &[""], None);
    cluster.ready().await;
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    let drawn = generate(&cluster.address, &SHORT, &path("a.png")).output().unwrap();
    assert!(drawn.status.success(), "{}", text(&drawn.stderr));
    let id = job_id(&text(&drawn.stderr));

    let b: PathBuf = path("b.png");
    let fetched = ask(&cluster.address, &["jobs", "fetch", &id, "--out", b.to_str().unwrap()]);
    assert!(fetched.status.success(), "{}", text(&fetched.stderr));
    assert_eq!(std::fs::read(b).unwrap(), std::fs::read(path("a.png")).unwrap());

    let shown = text(&ask(&cluster.address, &["jobs", "show", &id]).stdout);
    for part in
        ["succeeded after ", "try 1, priority 0", "denoise began on tiny/transformer/0", "decode took ", "multiplied in f32"]
    {
        assert!(shown.contains(part), "{part}: {shown}");
    }
    assert!(!shown.contains("fox"), "prompts stay private: {shown}");
    let nobodys = ask(&cluster.address, &["jobs", "fetch", "nobody"]);
    assert!(!nobodys.status.success() && text(&nobodys.stderr).contains("JOB_NOT_FOUND"), "{}", text(&nobodys.stderr));
}

#[tokio::test(flavor = "multi_thread")]
async fn no_job_is_asked_for_whose_picture_could_not_be_written() {
    let cluster = Cluster::start(&models(), &[""], None);
    let mut client = cluster.ready().await;
    let folder = tempfile::tempdir().unwrap();
    let refused = generate(&cluster.address, &SHORT, &folder.path().join("none/a.png")).output().unwrap();
    let said = text(&refused.stderr);
    assert!(!refused.status.success() && said.contains("--out ") && said.contains("none/a.png"), "{said}");
    assert!(client.jobs.list_jobs(ListJobsRequest::default()).await.unwrap().into_inner().jobs.is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn ctrl_c_cancels_the_job_and_waits_until_it_has_stopped() {
    let cluster = Cluster::start(&models(), &[""], None);
    let mut client = cluster.ready().await;
    let drawing = Drawing::start(&cluster.address, &LONG);
    let id = drawing.job().await;
    eventually("it runs", async || (state(&mut client, &id).await.state() == JobState::Running).then_some(())).await;
    drawing.ctrl_c();
    let said = drawing.failed(PATIENCE).await;
    assert!(said.contains("cancelling") && said.contains("the job was cancelled"), "{said}");
    assert_eq!(state(&mut client, &id).await.state(), JobState::Cancelled);
}

#[tokio::test(flavor = "multi_thread")]
async fn ctrl_c_is_heard_while_the_coordinator_is_not_there() {
    let mut cluster = Cluster::start(&models(), &[""], None);
    queued(&mut cluster).await;
    let mut client = cluster.client().await;
    let (proxy, server) = proxied(&cluster).await;
    let mut drawing = Drawing::start(&server, &SHORT);
    let id = drawing.job().await;
    proxy.stall(true);
    drawing.ctrl_c();
    drawing.until_it_says("cancelling").await;
    let heard = Instant::now();
    let leaves = async || {
        drawing.ctrl_c();
        drawing.process.0.try_wait().unwrap()
    };
    eventually("it leaves at the second one", leaves).await;
    assert!(heard.elapsed() < Duration::from_secs(5), "nothing is waited for: no keep-alive, no wish to cancel");
    let said = drawing.failed(Duration::ZERO).await;
    assert!(said.contains(&format!("interrupted: job {id} may still run: `atelier jobs cancel {id}` ends it")), "{said}");
    assert!(ask(&cluster.address, &["jobs", "cancel", &id]).status.success());
    client.finish(&id).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_coordinator_whose_host_is_gone_without_a_word_is_missed_and_found_again() {
    let mut cluster = Cluster::start(&models(), &[""], None);
    queued(&mut cluster).await;
    let mut client = cluster.client().await;
    let (proxy, server) = proxied(&cluster).await;
    let mut drawing = Drawing::start(&server, &SHORT);
    let id = drawing.job().await;
    proxy.stall(true);
    drawing.until_it_says("the coordinator is away").await;
    assert!(drawing.process.0.try_wait().unwrap().is_none(), "it waits: {}", drawing.said());
    proxy.stall(false);
    assert!(ask(&cluster.address, &["jobs", "cancel", &id]).status.success());
    let said = drawing.failed(PATIENCE).await;
    assert!(said.contains("the job was cancelled"), "{said}");
    client.finish(&id).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_that_waits_says_what_for() {
    let mut cluster = Cluster::start(&models(), &[""], None);
    let waiting = queued(&mut cluster).await;
    let drawing = Drawing::start(&cluster.address, &SHORT);
    let id = drawing.job().await;
    drawing.until_it_says("queued: tiny/").await;
    for id in [&waiting.id, &id] {
        let shown = text(&ask(&cluster.address, &["jobs", "show", id]).stdout);
        assert!(shown.contains("it waits: tiny/") && shown.contains("needs 1 workers"), "{shown}");
    }
    drawing.ctrl_c();
    assert!(drawing.failed(PATIENCE).await.contains("the job was cancelled"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_list_of_jobs_that_is_cut_says_so_and_all_are_listed_when_asked_for() {
    let mut cluster = Cluster::start(&models(), &[""], None);
    queued(&mut cluster).await;
    let mut client = cluster.client().await;
    for _ in 0..51 {
        client.create(spec()).await.unwrap();
    }
    let listed = ask(&cluster.address, &["jobs"]);
    assert_eq!(text(&listed.stdout).lines().count(), 1 + 50);
    assert!(text(&listed.stderr).contains("there are older ones: `atelier jobs --all` lists them"));
    let all = ask(&cluster.address, &["jobs", "--all"]);
    assert_eq!((text(&all.stdout).lines().count(), text(&all.stderr).as_str()), (1 + 52, ""));
}
