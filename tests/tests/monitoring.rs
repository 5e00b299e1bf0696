//! What an operator sees: a real Prometheus reads a real cluster, and finds there all that alerts, dashboards and autoscalers ask
//! for; every alert fires, ends, and is in the runbook.

#![allow(clippy::unwrap_used)] // helpers of tests are tests

use std::collections::BTreeSet;
use std::path::Path;
use std::process::Command;
use std::time::Instant;

use proto::v1::{JobSpec, JobState};
use tests::cluster::{Cluster, eventually, tiny_flux};
use tests::prometheus::{Prometheus, get, monitoring, rules};

const STEPS: u32 = 12;

fn deploy() -> std::path::PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy")
}

/// The metrics that a text names.
fn named(text: &str) -> BTreeSet<String> {
    let words = text.split(|c: char| !c.is_ascii_alphanumeric() && c != '_');
    words.filter(|word| word.starts_with("atelier_") || word.starts_with("process_")).map(str::to_owned).collect()
}

/// The metrics that rules, dashboards and autoscalers name.
fn asked_for() -> BTreeSet<String> {
    let mut names = named(&rules());
    assert!(names.len() > 10, "the rules name metrics: {names:?}");
    for entry in std::fs::read_dir(monitoring().join("dashboards")).unwrap() {
        let text = std::fs::read_to_string(entry.unwrap().path()).unwrap();
        serde_json::from_str::<serde_json::Value>(&text).unwrap();
        let of_board = named(&text);
        assert!(of_board.len() > 5, "a dashboard names metrics: {of_board:?}");
        names.extend(of_board);
    }
    let scale = std::fs::read_to_string(deploy().join("kubernetes/components/keda/scale.yaml")).unwrap();
    assert!(named(&scale).contains("atelier_queue_work_seconds"));
    names.extend(named(&scale));
    names
}

/// The names of the alerts in a text, after this word.
fn alerts(text: &str, word: &str) -> Vec<String> {
    let names = text.lines().filter_map(|line| line.trim().strip_prefix("- ").unwrap_or(line.trim()).strip_prefix(word));
    names.map(|name| name.trim().to_owned()).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_real_prometheus_sees_jobs_and_a_killed_worker_and_finds_every_metric_that_is_asked_for() {
    let path = tiny_flux();
    let models = format!("[[model]]\nname = \"tiny\"\npath = \"{}\"\n[model.components.transformer]\ntp = 2\n", path.display());
    let mut cluster = Cluster::start_with(&models, &["", ""], None, &[("RUST_LOG", "info"), ("ATELIER_LOG_FORMAT", "json")]);
    let mut client = cluster.ready().await;
    let metrics = cluster.metrics().await;
    let prometheus = Prometheus::start(&metrics);
    eventually("both workers and the coordinator are read", async || (prometheus.value("sum(up)") == Some(3.0)).then_some(()))
        .await;

    let spec = JobSpec {
        model: "tiny".into(),
        prompt: "a very secret fox".into(),
        width: Some(48),
        height: Some(32),
        num_inference_steps: Some(STEPS),
        max_sequence_length: Some(16),
        ..JobSpec::default()
    };
    assert_eq!(client.run(spec).await.state(), JobState::Succeeded);
    let sees = async |expression: &str, value: f64| {
        eventually(expression, async || (prometheus.value(expression) == Some(value)).then_some(())).await;
    };
    sees("atelier_jobs_finished_total{model=\"tiny\",state=\"succeeded\"}", 1.0).await;
    sees("atelier_stage_seconds_count{stage=\"denoise\"}", 1.0).await;
    // Not all of them, should the group have been lost on a very busy machine: the next epoch's rank counts anew.
    sees("sum(atelier_worker_step_seconds_count{component=\"transformer\"}) > bool 0", 1.0).await;
    sees("sum(atelier_group_state{component=\"transformer\",state=\"ready\"})", 1.0).await;
    sees("count(atelier_worker_collective_sent_bytes_total{component=\"transformer\"} > 0)", 2.0).await;
    sees("atelier_leader", 1.0).await;

    let names = prometheus.names();
    let missing: Vec<String> = asked_for().into_iter().filter(|name| !names.contains(name)).collect();
    assert!(missing.is_empty(), "no process has the metrics {missing:?}");
    let wanted = alerts(&rules(), "alert:");
    let evaluated =
        eventually("every rule is evaluated", async || Some(prometheus.rules()).filter(|rules| rules.len() == wanted.len()));
    for (rule, problem) in evaluated.await {
        assert_eq!(problem, "", "{rule}");
    }
    let page = get(&metrics, "/metrics").unwrap();
    assert!(!page.contains("secret"), "a prompt is in a metric");

    let killed = Instant::now();
    cluster.workers[1].kill();
    sees("atelier_workers{state=\"connected\"}", 1.0).await;
    println!("a killed worker is seen in Prometheus after {:.1} s, read every second", killed.elapsed().as_secs_f64());
    sees("sum(atelier_group_epochs_ended_total{component=\"transformer\",reason=\"lost\"}) > bool 0", 1.0).await;
    sees("sum(atelier_group_state{component=\"transformer\",state=\"ready\"})", 0.0).await;
}

#[test]
fn every_alert_fires_and_ends() {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("rules.yaml"), rules()).unwrap();
    let test = std::fs::read_to_string(monitoring().join("alerts-test.yaml")).unwrap();
    std::fs::write(folder.path().join("alerts-test.yaml"), &test).unwrap();
    for arguments in [["check", "rules", "rules.yaml"], ["test", "rules", "alerts-test.yaml"]] {
        let ran = Command::new("promtool").args(arguments).current_dir(folder.path()).output();
        let ran = ran.expect("promtool starts (scripts/setup --tests installs it)");
        assert!(ran.status.success(), "{}{}", String::from_utf8_lossy(&ran.stdout), String::from_utf8_lossy(&ran.stderr));
    }
    // promtool says nothing of alerts that no test names, or names only where they do not fire.
    for alert in alerts(&rules(), "alert:") {
        let of_alert = test.split("\n  - name: ").find(|part| part.starts_with(&format!("{alert}\n")));
        let of_alert = of_alert.unwrap_or_else(|| panic!("alerts-test.yaml has no test of {alert}"));
        let (fires, ends) = (of_alert.matches("exp_labels:").count(), of_alert.matches("exp_alerts: []").count());
        assert_eq!(alerts(of_alert, "alertname:"), vec![alert.clone(); 2]);
        assert!(fires > 0 && ends == 1, "{alert} is not shown to fire and to end");
    }
}

#[test]
fn every_alert_is_in_the_runbook_with_what_to_look_at_and_what_to_do() {
    let runbook = std::fs::read_to_string(deploy().join("RUNBOOK.md")).unwrap();
    let rules = rules();
    let alerts = alerts(&rules, "alert:");
    for alert in &alerts {
        let section = runbook.split("\n## ").find(|section| section.lines().next() == Some(alert));
        let section = section.unwrap_or_else(|| panic!("RUNBOOK.md has no section {alert}"));
        for part in ["**Symptom.**", "**Look.**", "**Do.**"] {
            assert!(section.contains(part), "{alert}: the runbook says nothing under {part}");
        }
        let link = format!("runbook: deploy/RUNBOOK.md#{}\n", alert.to_lowercase());
        assert_eq!(rules.matches(&link).count(), 1, "{alert} does not name its section");
    }
    let sections = runbook.lines().filter_map(|line| line.strip_prefix("## Atelier")).count();
    assert_eq!(sections, alerts.len(), "the runbook has sections for alerts that are not there");
}
