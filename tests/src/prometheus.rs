//! A real Prometheus beside a cluster, asked over its HTTP API, and what the files of `deploy/` want of it.

use std::collections::BTreeSet;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::cluster::{PATIENCE, Process, free_port};

/// Ports that are tried.
const TRIES: usize = 5;
/// Longest wait for an answer.
const ANSWER: Duration = Duration::from_secs(20);

/// The folder of the monitoring component.
pub fn monitoring() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/kubernetes/components/monitoring")
}

/// The rules of the monitoring component as Prometheus itself reads them: what is in the object's `spec`.
///
/// # Panics
/// When the file is not there.
pub fn rules() -> String {
    let text = std::fs::read_to_string(monitoring().join("rules.yaml")).expect("rules.yaml");
    let spec = text.split_once("\nspec:\n").expect("an object with a spec").1;
    spec.lines().map(|line| format!("{}\n", line.strip_prefix("  ").unwrap_or(line))).collect()
}

/// The body of `GET path` at host:port; none if nobody answers with 200.
pub fn get(address: &str, path: &str) -> Option<String> {
    let mut stream = TcpStream::connect(address).ok()?;
    stream.set_read_timeout(Some(ANSWER)).ok()?;
    // Of 1.0, so that the body comes in one piece.
    stream.write_all(format!("GET {path} HTTP/1.0\r\nHost: {address}\r\n\r\n").as_bytes()).ok()?;
    let mut response = String::new();
    stream.read_to_string(&mut response).ok()?;
    let (head, body) = response.split_once("\r\n\r\n")?;
    head.lines().next()?.contains(" 200 ").then(|| body.to_owned())
}

/// A Prometheus that reads a cluster's metrics every second.
#[derive(Debug)]
pub struct Prometheus {
    address: String,
    _process: Process,
    _dir: tempfile::TempDir,
}

impl Prometheus {
    /// Starts one for the coordinator whose metrics are at `coordinator`; workers are found there.
    ///
    /// # Panics
    /// When the program is not there, or does not get ready.
    pub fn start(coordinator: &str) -> Self {
        let dir = tempfile::tempdir().expect("a temporary folder");
        std::fs::write(dir.path().join("rules.yaml"), rules()).expect("rules can be written");
        let config = format!(
            "global:\n  scrape_interval: 1s\n  scrape_timeout: 1s\n  evaluation_interval: 1s\nrule_files: [rules.yaml]\nscrape_configs:\n  \
             - job_name: atelier-coordinators\n    static_configs:\n      - targets: [\"{coordinator}\"]\n        labels: {{namespace: atelier}}\n  \
             - job_name: atelier/atelier-worker\n    http_sd_configs:\n      - url: http://{coordinator}/targets\n        refresh_interval: 1s\n    \
             relabel_configs:\n      - target_label: namespace\n        replacement: atelier\n"
        );
        let file = dir.path().join("prometheus.yaml");
        std::fs::write(&file, config).expect("the configuration can be written");
        // Somebody else may take a port between the moment it is found free and the moment it is taken.
        for _ in 0..TRIES {
            let address = format!("127.0.0.1:{}", free_port());
            let mut command = Command::new("prometheus");
            command.arg("--config.file").arg(&file).arg("--storage.tsdb.path").arg(dir.path().join("data"));
            command.args(["--web.listen-address", &address, "--log.level", "error"]);
            let child = command.stdin(Stdio::null()).stdout(Stdio::null()).spawn();
            let mut process = Process(child.expect("prometheus starts (scripts/setup --tests installs it)"));
            let deadline = Instant::now() + PATIENCE;
            while process.wait(Duration::from_millis(50)).is_none() && Instant::now() < deadline {
                if get(&address, "/-/ready").is_some() {
                    return Self { address, _process: process, _dir: dir };
                }
            }
        }
        panic!("prometheus does not get ready");
    }

    /// What an expression gives now: the value of the only series, if there is one.
    pub fn value(&self, expression: &str) -> Option<f64> {
        let answer = self.ask(&format!("/api/v1/query?query={}", encoded(expression)))?;
        let [series] = answer["result"].as_array()?.as_slice() else { return None };
        series["value"][1].as_str()?.parse().ok()
    }

    /// The names of all metrics that were ever read.
    pub fn names(&self) -> BTreeSet<String> {
        let names = self.ask("/api/v1/label/__name__/values").unwrap_or_default();
        names.as_array().into_iter().flatten().filter_map(|name| Some(name.as_str()?.to_owned())).collect()
    }

    /// (Rule, what went wrong when it was evaluated last), of all rules that were evaluated.
    pub fn rules(&self) -> Vec<(String, String)> {
        let answer = self.ask("/api/v1/rules").unwrap_or_default();
        let groups = answer["groups"].as_array().cloned().unwrap_or_default();
        let rules = groups.iter().flat_map(|group| group["rules"].as_array().cloned().unwrap_or_default());
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        rules.filter(|rule| rule["health"] != "unknown").map(|rule| (text(&rule["name"]), text(&rule["lastError"]))).collect()
    }

    fn ask(&self, path: &str) -> Option<Value> {
        let answer: Value = serde_json::from_str(&get(&self.address, path)?).ok()?;
        (answer["status"] == "success").then(|| answer["data"].clone())
    }
}

fn encoded(text: &str) -> String {
    text.bytes()
        .map(|byte| if byte.is_ascii_alphanumeric() { char::from(byte).to_string() } else { format!("%{byte:02X}") })
        .collect()
}
