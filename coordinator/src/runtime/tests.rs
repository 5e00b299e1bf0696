//! The owner of the state beside a store that is slow, in time that passes when all wait.

use std::path::PathBuf;

use proto::v1::{ModelDescribed, Products, model_described::Outcome};
use tokio::time::{Instant, timeout};
use tonic::Request;
use tonic_health::{
    pb::{HealthCheckRequest, health_check_response::ServingStatus as Status, health_server::Health},
    server::HealthService,
};

use super::*;
use crate::{
    checkpoints::{CheckpointLimits, CheckpointStore, Place},
    config::Limits,
    models_file::ModelConfig,
    state::{Key, Settings},
    store::Slow,
    testing,
};

struct Bench {
    handle: Handle,
    store: Slow,
    health: HealthService,
    _stop: tokio_util::sync::DropGuard,
}

impl Bench {
    async fn start() -> Self {
        let model = ModelConfig {
            name: "emoji".into(),
            path: PathBuf::from("/models/emoji"),
            refiner: None,
            max_batch: 4,
            max_jobs: 2,
            products: Products::F32,
            components: BTreeMap::new(),
            adapters: vec![],
            controls: vec![],
        };
        let settings = Settings {
            models: vec![model],
            limits: Limits { queued_jobs: usize::MAX, ..Limits::default() },
            blob_address: "coordinator:7700".into(),
            key: Key([7; 32]),
            max_record_bytes: None,
            term: 1,
            first_epoch: 1,
        };
        let place = Place::Memory(Arc::new(object_store::memory::InMemory::new()));
        let checkpoints = CheckpointStore::open(&place, CheckpointLimits::default(), Arc::new(|_| true)).await.unwrap();
        let (reporter, _server) = tonic_health::server::health_reporter();
        reporter.set_service_status(JOB_SERVICE, ServingStatus::Serving).await;
        let (handle_to_store, store) = Slow::open();
        let parts = Parts {
            state: State::new(settings),
            context: Arc::new(Context::system()),
            health: reporter.clone(),
            store: handle_to_store,
            live: LiveJobs::default(),
            done_with: DoneWith::new(checkpoints).0,
        };
        let stop = CancellationToken::new();
        let (handle, _owner) = Handle::spawn(parts, stop.clone());
        let (commands, _unread) = mpsc::channel(64);
        let link = WorkerLink { commands, clogged: CancellationToken::new() };
        handle.connected(testing::worker("w1", "any"), Holding::default(), link).await.unwrap();
        let card = Some(Outcome::Card(testing::card("emoji")));
        let described = Report::ModelDescribed(ModelDescribed { model: "emoji".into(), outcome: card });
        handle.report("w1".into(), described).await.unwrap();
        Self { handle, store, health: HealthService::from_health_reporter(reporter), _stop: stop.drop_guard() }
    }

    async fn submit(&self) -> Result<Job> {
        let id = uuid::Uuid::new_v4().to_string();
        let submission = Submission {
            job_id: id.clone(),
            request_id: id,
            tenant: String::new(),
            spec: testing::spec("emoji"),
            seed: 42,
            missing_blobs: vec![],
            blob_bytes: 0,
            priority: 0,
            timeout: None,
            trace: None,
        };
        self.handle.submit(submission).await
    }

    async fn status(&self) -> Status {
        let request = Request::new(HealthCheckRequest { service: JOB_SERVICE.into() });
        self.health.check(request).await.unwrap().into_inner().status()
    }
}

fn seconds(result: Result<impl std::fmt::Debug>) -> u64 {
    match result {
        Err(Error::StoreStalled { seconds }) => seconds,
        other => panic!("expected a store that stalls, found {other:?}"),
    }
}

#[tokio::test(start_paused = true)]
async fn nobody_waits_for_a_store_that_stalls_and_all_is_well_when_it_answers() {
    let bench = Bench::start().await;
    let began = Instant::now();
    let (submitted, read) = tokio::join!(bench.submit(), bench.handle.read(|state| state.models()));
    assert_eq!((seconds(submitted), seconds(read)), (10, 10));
    assert!(began.elapsed() < STALLED * 2);
    assert_eq!(bench.status().await, Status::NotServing);
    let began = Instant::now();
    seconds(bench.submit().await);
    seconds(bench.handle.follow("job".into(), 0).await.map(|_| ()));
    assert!(began.elapsed() < Duration::from_secs(1), "told at once by now");
    assert_eq!(bench.handle.look(|state| state.metrics_addresses().len()).await.unwrap(), 0, "what hangs on no store");
    bench.store.durable(u64::MAX);
    tokio::time::sleep(TICK * 2).await;
    assert_eq!(bench.status().await, Status::Serving);
    // What was given to the store while nobody could be told is accepted all the same.
    assert_eq!(bench.handle.read(|state| state.jobs("", 10, "").unwrap().0.len()).await.unwrap(), 1);
    assert!(bench.submit().await.is_ok());
}

#[tokio::test(start_paused = true)]
async fn replies_that_wait_for_the_store_are_bounded_and_nobody_keeps_those_of_who_has_gone() {
    let bench = Bench::start().await;
    let ask = || {
        let handle = bench.handle.clone();
        tokio::spawn(async move { handle.read(|state| state.models().len()).await })
    };
    let waiting: Vec<_> = (0..MAX_REPLIES).map(|_| ask()).collect();
    tokio::time::sleep(TICK).await;
    assert!(timeout(TICK, ask()).await.is_ok_and(|refused| matches!(refused.unwrap(), Err(Error::StoreStalled { .. }))));
    waiting.iter().for_each(tokio::task::JoinHandle::abort);
    tokio::time::sleep(TICK * 2).await;
    let asked = ask();
    tokio::time::sleep(TICK * 2).await;
    bench.store.durable(u64::MAX);
    assert_eq!(asked.await.unwrap().unwrap(), 1);
}
