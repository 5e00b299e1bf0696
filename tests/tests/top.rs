//! `atelier top` and `atelier up` as an operator sees them.

#![allow(clippy::unwrap_used)] // helpers of tests are tests

use std::process::{Command, Stdio};

use proto::v1::{JobSpec, JobState};
use tests::cluster::{Client, Cluster, Process, atelier, eventually, free_port, tiny_flux};
use tests::prometheus::get;

/// Enough that the job is seen while it runs; it is cancelled then.
const STEPS: u32 = 500;

/// When all is well.
const HEAD: &str = "2 workers, 4 of 4 groups ready; jobs: 0 queued, 1 running, 0 succeeded, 0 failed\n";

fn models() -> String {
    format!("[[model]]\nname = \"tiny\"\npath = \"{}\"\n[model.components.transformer]\ntp = 2\n", tiny_flux().display())
}

fn output(mut command: Command) -> String {
    let output = command.output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn top_shows_workers_groups_and_the_steps_of_a_job_that_runs_once_when_there_is_no_terminal() {
    let cluster = Cluster::start(&models(), &["role=painter", ""], None);
    let mut client = cluster.ready().await;
    let spec = JobSpec {
        model: "tiny".into(),
        prompt: "a very secret fox".into(),
        width: Some(48),
        height: Some(32),
        num_inference_steps: Some(STEPS),
        num_images_per_prompt: Some(4),
        max_sequence_length: Some(16),
        ..JobSpec::default()
    };
    let job = client.create(spec).await.unwrap();
    let shown = eventually("top shows a step of the job", async || {
        let mut command = atelier();
        command.args(["top", "--once", "--server", &cluster.address]);
        let text = tokio::task::spawn_blocking(move || output(command)).await.unwrap();
        (text.contains(&format!("/{STEPS}")) && text.starts_with(HEAD)).then_some(text)
    })
    .await;
    client.jobs.cancel_job(proto::v1::CancelJobRequest { job_id: job.id.clone() }).await.unwrap();
    let line =
        |start: &str| shown.lines().find(|line| line.starts_with(start)).unwrap_or_else(|| panic!("{start} is not in {shown}"));
    assert!(line("tiny/transformer/0").contains(" ready "), "{shown}");
    assert!(line(&job.id).contains("running") && line(&job.id).contains("denoise"), "{shown}");
    assert!(shown.contains("role=painter"), "{shown}");
    assert!(!shown.contains("secret") && !shown.contains('\u{1b}'), "{shown}");
    assert_eq!(client.finish(&job.id).await.state(), JobState::Cancelled);
}

#[tokio::test(flavor = "multi_thread")]
async fn up_says_where_its_metrics_are_and_two_clusters_do_not_clash() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("models.toml");
    std::fs::write(&file, models()).unwrap();
    let mut running = Vec::new();
    for name in ["a", "b"] {
        let listen = format!("127.0.0.1:{}", free_port());
        let log = folder.path().join(name);
        let mut command = atelier();
        command.args(["up", "--threads", "1", "--listen", &listen, "--models"]).arg(&file);
        command.stderr(std::fs::File::create(&log).unwrap()).stdout(Stdio::null());
        running.push((Process(command.spawn().unwrap()), listen, log));
    }
    for (process, listen, log) in &running {
        Client::connect(&format!("http://{listen}")).await.wait_ready().await;
        let said = std::fs::read_to_string(log).unwrap();
        let address = said.split("metrics at http://").nth(1).and_then(|rest| rest.split("/metrics").next());
        let address = address.unwrap_or_else(|| panic!("{said}"));
        assert!(address.starts_with("127.0.0.1:"), "{address}");
        assert!(get(address, "/metrics").unwrap().contains("\natelier_workers{state=\"connected\"} 2.0\n"));
        let targets: serde_json::Value = serde_json::from_str(&get(address, "/targets").unwrap()).unwrap();
        let workers: Vec<&str> = targets.as_array().unwrap().iter().map(|of| of["targets"][0].as_str().unwrap()).collect();
        assert_eq!(workers.len(), 2);
        for worker in workers {
            assert!(get(worker, "/metrics").unwrap().contains("\natelier_worker_led 1.0\n"), "{worker}");
        }
        process.signal("TERM");
    }
    // Each stops its own workers: killed, it would leave them behind.
    for (process, ..) in &mut running {
        assert!(process.wait(tests::cluster::PATIENCE).is_some_and(|status| status.success()));
    }
}
