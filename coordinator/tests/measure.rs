//! What Prometheus is told of a cluster, from the pure state: no clock, no network.

#![allow(clippy::unwrap_used)] // helpers of tests are tests

use coordinator::{
    config::Limits,
    models_file::ModelConfig,
    stand_in,
    state::{Effect, Event, Key, Settings, State, Submission},
};
use proto::v1::{
    GroupReady, Holding, ImageResult, JobSpec, ModelDescribed, RunTask, TaskDone, TaskFailed, TaskStarted,
    control_request::Command, control_response::Report, model_described::Outcome,
};
use telemetry::Page;

/// One model, and workers that hold whatever they are asked to.
struct Cluster {
    state: State,
    now: u64,
    jobs: u32,
    tasks: Vec<(String, RunTask)>,
}

impl Cluster {
    fn new() -> Self {
        let model = ModelConfig {
            name: "emoji".into(),
            path: "emoji".into(),
            refiner: None,
            max_batch: 1,
            max_jobs: 1,
            products: coordinator::models_file::DEFAULT_PRODUCTS,
            components: Default::default(),
            adapters: vec![],
            controls: vec![],
        };
        let settings = Settings {
            models: vec![model],
            limits: Limits::default(),
            blob_address: "127.0.0.1:1".into(),
            key: Key([7; 32]),
            max_record_bytes: None,
            term: 1,
            first_epoch: 1,
        };
        Self { state: State::new(settings), now: 1000, jobs: 0, tasks: Vec::new() }
    }

    fn join(&mut self, id: &str) {
        self.apply(Event::WorkerJoined { worker: stand_in::registration(id, "10.0.0.1:1"), holding: Holding::default() });
    }

    fn apply(&mut self, event: Event) {
        let mut events = vec![event];
        while let Some(event) = events.pop() {
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

    fn submit(&mut self, steps: u32) {
        self.jobs += 1;
        let spec =
            JobSpec { model: "emoji".into(), prompt: "secret".into(), num_inference_steps: Some(steps), ..JobSpec::default() };
        self.apply(Event::Submit(Box::new(Submission {
            job_id: format!("job-{}", self.jobs),
            request_id: format!("10000000-0000-4000-8000-{:012}", self.jobs),
            tenant: String::new(),
            spec,
            seed: 1,
            missing_blobs: Vec::new(),
            blob_bytes: 0,
            priority: 0,
            timeout: None,
            trace: None,
        })));
    }

    /// Every task of one job takes so long.
    fn finish(&mut self, seconds: f64) {
        // Sent downstream first.
        for (worker_id, run) in std::mem::take(&mut self.tasks).into_iter().rev() {
            let images = if run.outputs.is_empty() { vec![ImageResult::default()] } else { Vec::new() };
            let started = Report::TaskStarted(TaskStarted { task: run.task.clone() });
            self.apply(Event::Report { worker_id: worker_id.clone(), report: started });
            let done = Report::TaskDone(TaskDone { task: run.task, seconds, images, stored: false });
            self.apply(Event::Report { worker_id, report: done });
        }
    }

    /// The value of a line of the page.
    fn value(&self, line: &str) -> f64 {
        let mut page = Page::default();
        self.state.measure(&mut page);
        let text = page.text().unwrap();
        assert!(!text.contains("secret") && !text.contains("job-"), "{text}");
        let found = text.lines().find_map(|found| found.strip_prefix(line)?.strip_prefix(' '));
        found.unwrap_or_else(|| panic!("{line} is not in {text}")).parse().unwrap()
    }

    fn work(&self, stage: &str) -> f64 {
        self.value(&format!("atelier_queue_work_seconds{{model=\"emoji\",stage=\"{stage}\"}}"))
    }
}

#[test]
fn work_that_waits_is_known_from_what_earlier_jobs_took_and_before_them_it_is_not_nothing() {
    let mut cluster = Cluster::new();
    cluster.join("worker-1");
    assert_eq!(cluster.work("denoise"), 0.0);
    cluster.apply(Event::WorkerLeft { worker_id: "worker-1".into(), cause: "a test".into() });
    cluster.submit(10);
    // An autoscaler that starts from no worker must see that there is work.
    assert_eq!((cluster.work("denoise"), cluster.work("decode")), (10.0, 10.0));
    assert_eq!(cluster.value("atelier_queue_jobs{model=\"emoji\",stage=\"denoise\"}"), 1.0);

    cluster.now += 3_700_000;
    cluster.apply(Event::Tick);
    assert_eq!(cluster.value("atelier_queue_oldest_seconds{model=\"emoji\"}"), 3700.0);
    cluster.join("worker-2");
    cluster.finish(8.0);
    assert_eq!(cluster.value("atelier_jobs_finished_total{model=\"emoji\",state=\"succeeded\"}"), 1.0);
    assert_eq!(cluster.value("atelier_job_wait_seconds_sum{model=\"emoji\"}"), 3700.0);
    assert_eq!(cluster.value("atelier_stage_seconds_sum{model=\"emoji\",stage=\"denoise\"}"), 8.0);
    assert_eq!(cluster.work("denoise"), 0.0);

    cluster.apply(Event::WorkerLeft { worker_id: "worker-2".into(), cause: "a test".into() });
    cluster.submit(10);
    cluster.submit(20);
    // 8 s for 10 steps: 8 s and 16 s; a picture is decoded in 8 s whatever its steps were.
    assert!((cluster.work("denoise") - 24.0).abs() < 1e-9, "{}", cluster.work("denoise"));
    assert!((cluster.work("decode") - 16.0).abs() < 1e-9, "{}", cluster.work("decode"));
}

#[test]
fn losses_and_failures_are_counted_and_a_strange_reason_is_one_of_the_others() {
    let mut cluster = Cluster::new();
    cluster.join("worker-1");
    cluster.submit(10);
    assert_eq!(cluster.value("atelier_jobs{model=\"emoji\",state=\"running\"}"), 1.0);
    cluster.tasks.clear();
    cluster.apply(Event::WorkerLeft { worker_id: "worker-1".into(), cause: "a test".into() });
    assert_eq!(cluster.value("atelier_requeues_total{model=\"emoji\",reason=\"GROUP_LOST\"}"), 1.0);
    assert_eq!(cluster.value("atelier_workers{state=\"connected\"}"), 0.0);
    let lost = "atelier_group_epochs_ended_total{model=\"emoji\",component=\"transformer\",reason=\"lost\"}";
    assert_eq!(cluster.value(lost), 1.0);
    let state = |word: &str| {
        format!("atelier_group_state{{model=\"emoji\",component=\"transformer\",group=\"emoji/transformer/0\",state=\"{word}\"}}")
    };
    assert_eq!((cluster.value(&state("ready")), cluster.value(&state("waiting"))), (0.0, 1.0));

    cluster.now += 60_000;
    cluster.join("worker-2");
    assert_eq!((cluster.value(&state("ready")), cluster.value(&state("waiting"))), (1.0, 0.0));
    let (worker_id, run) = cluster.tasks.pop().unwrap();
    let failed = TaskFailed { task: run.task, reason: "a word of the worker's".into(), ..TaskFailed::default() };
    cluster.apply(Event::Report { worker_id, report: Report::TaskFailed(failed) });
    assert_eq!(cluster.value("atelier_jobs_failed_total{model=\"emoji\",reason=\"OTHER\"}"), 1.0);
    assert_eq!(cluster.value("atelier_jobs_finished_total{model=\"emoji\",state=\"failed\"}"), 1.0);
}

/// Stages of the cards of all families, by what they are scaled with.
const STAGES: [(&str, &str); 8] = [
    ("encode_text", "encoder"),
    ("encode_text_2", "encoder"),
    ("encode_text_3", "encoder"),
    ("encode_image", "encoder"),
    ("denoise", "denoiser"),
    ("refine", "denoiser"),
    ("inpaint", "denoiser"),
    ("decode", "decoder"),
];

#[test]
fn keda_scales_some_workers_for_the_work_of_every_stage() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../deploy/kubernetes/components/keda/scale.yaml");
    let text = std::fs::read_to_string(path).unwrap();
    let query = |object: &str| {
        let role = object.lines().find_map(|line| line.trim().strip_prefix("name: atelier-")).unwrap().to_owned();
        let stages = object.split("stage=~\"").nth(1).unwrap().split('"').next().unwrap();
        (role, stages.split('|').map(str::to_owned).collect::<Vec<_>>())
    };
    let queries: Vec<(String, Vec<String>)> = text.split("\n---\n").map(query).collect();
    let matches = |pattern: &String, stage: &str| match pattern.strip_suffix(".*") {
        Some(start) => stage.starts_with(start),
        None => pattern == stage,
    };
    for (stage, role) in STAGES {
        let scaled: Vec<&String> = queries
            .iter()
            .filter(|(_, patterns)| patterns.iter().any(|pattern| matches(pattern, stage)))
            .map(|(role, _)| role)
            .collect();
        assert_eq!(scaled, [role], "{stage}");
    }
}
