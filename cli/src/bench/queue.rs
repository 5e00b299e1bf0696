//! A deep queue and a large fleet, without a network: how long the state takes for one decision, and what a job weighs.

use std::time::Instant;

use coordinator::config::Limits;
use coordinator::models_file::{ComponentConfig, ModelConfig};
use coordinator::stand_in;
use coordinator::state::{Effect, Event, Key, Settings, State, Submission};
use proto::v1::control_request::Command;
use proto::v1::control_response::Report;
use proto::v1::model_described::Outcome;
use proto::v1::{GroupReady, Holding, ImageResult, JobSpec, ModelDescribed, RunTask, TaskDone};

use super::table::{Row, percentile};

const MODEL: &str = "stand-in";

/// The state, and what it told its workers.
struct Fleet {
    state: State,
    now: u64,
    submitted: u64,
    tasks: Vec<(String, RunTask)>,
}

impl Fleet {
    fn new(workers: u32, jobs: usize) -> Self {
        let component = |replicas| ComponentConfig { replicas, ..ComponentConfig::default() };
        let components = [("text_encoder", 4), ("transformer", workers), ("vae", 4)];
        let model = ModelConfig {
            name: MODEL.into(),
            path: MODEL.into(),
            refiner: None,
            max_batch: 1,
            max_jobs: 1,
            products: coordinator::models_file::DEFAULT_PRODUCTS,
            components: components.map(|(name, replicas)| (name.to_owned(), component(replicas))).into(),
            adapters: vec![],
            controls: vec![],
        };
        let settings = Settings {
            models: vec![model],
            limits: Limits { queued_jobs: 2 * jobs, ..Limits::default() },
            blob_address: "127.0.0.1:1".into(),
            key: Key([7; 32]),
            max_record_bytes: None,
            term: 1,
            first_epoch: 1,
        };
        let mut fleet = Self { state: State::new(settings), now: 1, submitted: 0, tasks: Vec::new() };
        for worker in 0..workers {
            let worker = stand_in::registration(&format!("worker-{worker:05}"), &format!("10.0.0.1:{worker}"));
            fleet.apply(Event::WorkerJoined { worker, holding: Holding::default() });
        }
        fleet
    }

    fn apply(&mut self, event: Event) {
        let mut events = vec![event];
        while let Some(event) = events.pop() {
            self.now += 1;
            for effect in self.state.apply(self.now, event) {
                let Effect::Send { worker_id, command } = effect else { continue };
                let report = match command {
                    Command::DescribeModel(asked) => {
                        let outcome = Some(Outcome::Card(stand_in::card(&asked.model)));
                        Report::ModelDescribed(ModelDescribed { model: asked.model, outcome })
                    }
                    Command::JoinGroup(join) => {
                        Report::GroupReady(GroupReady { group_id: join.group_id, epoch: join.epoch, rank: join.rank })
                    }
                    Command::RunTask(task) => {
                        self.tasks.push((worker_id, task));
                        continue;
                    }
                    _ => continue,
                };
                events.push(Event::Report { worker_id, report });
            }
        }
    }

    fn submission(&mut self) -> Event {
        self.submitted += 1;
        let spec = JobSpec { model: MODEL.into(), prompt: "p".repeat(600), ..JobSpec::default() };
        Event::Submit(Box::new(Submission {
            job_id: format!("00000000-0000-4000-8000-{:012}", self.submitted),
            request_id: format!("10000000-0000-4000-8000-{:012}", self.submitted),
            tenant: String::new(),
            spec,
            seed: self.submitted,
            missing_blobs: Vec::new(),
            blob_bytes: 0,
            priority: 0,
            timeout: None,
            trace: None,
        }))
    }

    /// A task that ends makes room: the next job is chosen and placed.
    fn finish_one(&mut self) -> Option<f64> {
        let (worker_id, task) = self.tasks.pop()?;
        let images = if task.outputs.is_empty() { vec![ImageResult::default()] } else { Vec::new() };
        let report = Report::TaskDone(TaskDone { task: task.task, seconds: 1.0, images, stored: false });
        let start = Instant::now();
        self.apply(Event::Report { worker_id, report });
        Some(start.elapsed().as_secs_f64() * 1e6)
    }
}

/// Fills a queue and measures decisions on it.
pub(super) fn measure(jobs: usize, workers: u32) -> Vec<Row> {
    let mut fleet = Fleet::new(workers, jobs);
    let before = resident_bytes("self");
    for _ in 0..jobs + workers as usize {
        let event = fleet.submission();
        fleet.apply(event);
    }
    let grown = resident_bytes("self").saturating_sub(before);
    let mut decisions: Vec<f64> = (0..3000).filter_map(|_| fleet.finish_one()).collect();
    let about = format!("{jobs} queued, {workers} workers");
    vec![
        Row::new(format!("decision, {about}, median"), percentile(&mut decisions, 0.5), "us", ""),
        Row::new(format!("decision, {about}, p99"), percentile(&mut decisions, 0.99), "us", "wanted: at most 100"),
        Row::new("memory of a queued job (prompt of 600 bytes)", grown as f64 / jobs as f64, "bytes", "wanted: at most 2048"),
    ]
}

/// Bytes of memory that a process holds.
pub(super) fn resident_bytes(process: &str) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{process}/status")).unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let kib = line.and_then(|line| line.trim().trim_end_matches("kB").trim().parse::<u64>().ok());
    kib.unwrap_or_default() * 1024
}
