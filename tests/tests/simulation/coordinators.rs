//! The lives of coordinators: one with a journal, or two of which one leads, by etcd.

use std::{cell::RefCell, ops::Range, path::Path, rc::Rc, sync::Arc, time::Duration};

use coordinator::{
    Config, World,
    blobs::BlobStore,
    checkpoints::Place,
    config::{AuthConfig, EtcdConfig, Limits},
    context::Context,
    leadership::campaign,
    metrics::Meter,
    models_file::{ComponentConfig, DEFAULT_PRODUCTS, ModelConfig},
    run_in,
    store::{EtcdStore, Journal, Recovered, StoreError},
};
use proto::v1::Products;
use tokio_util::sync::CancellationToken;

use crate::{
    cluster::{ETCD, MODEL, Machine, Mutation},
    faults::Random,
    history::History,
    net::{PORT, dial, listen},
};

/// The transformer's groups.
const REPLICAS: u32 = 2;
/// When the simulation begins, since 1970.
const EPOCH: Duration = Duration::from_secs(1_800_000_000);
/// Clocks of coordinators are wrong by up to so many milliseconds, either way.
const SKEW: u64 = 20_000;
/// A leader may notice so many milliseconds late that it leads no more, as one that was stopped for a while does.
const LATE: Range<u64> = 1..5_000;
/// What a sync of the disk takes.
const SYNC: Duration = Duration::from_millis(2);

/// Where workers and coordinators find each other if there are several.
pub(crate) fn etcd() -> EtcdConfig {
    EtcdConfig { dial: dial(), ..EtcdConfig::new(vec![format!("http://{ETCD}:{PORT}")], "/atelier") }
}

/// What models.toml says in this life that the model is multiplied in: in every third seed another way may be written there
/// between two lives.
fn products(machine: &Machine, life: u64) -> Products {
    if !Random::of(machine.seed, 4).once_in(3) {
        return DEFAULT_PRODUCTS;
    }
    let narrow = Random::of(machine.seed, 3000 + life).once_in(2);
    if narrow { Products::Bf16 } else { DEFAULT_PRODUCTS }
}

fn config(etcd: Option<EtcdConfig>, products: Products) -> Config {
    let transformer = ComponentConfig { tp: 2, replicas: REPLICAS, ..ComponentConfig::default() };
    let model = ModelConfig {
        name: MODEL.into(),
        path: "/models/model".into(),
        refiner: None,
        max_batch: 4,
        max_jobs: 4,
        products,
        components: [("transformer".to_owned(), transformer)].into(),
        adapters: vec![],
        controls: vec![],
    };
    let (identity, auth) = (None, AuthConfig::default());
    let (advertise, data_dir, object_store) = (None, None, None);
    Config { models: vec![model], identity, auth, advertise, data_dir, object_store, etcd, limits: Limits::default() }
}

/// The next life of any coordinator.
fn begin(machine: &Machine) -> u64 {
    let life = machine.lives.get();
    machine.lives.set(life + 1);
    life
}

/// What a life takes from outside, its clock right or wrong.
fn context(machine: &Machine, life: u64) -> Arc<Context> {
    let mut random = Random::of(machine.seed, 1000 + life);
    let mut now = EPOCH + History::now();
    if Random::of(machine.seed, 3).once_in(2) || machine.mutation == Mutation::NoEpochs {
        now = now + random.millis(0..2 * SKEW) - Duration::from_millis(SKEW);
    }
    Arc::new(Context::seeded(random.next(), now))
}

/// What a life knows of those before it, unless it is made to forget.
fn remembered(mutation: Mutation, mut recovered: Recovered) -> Recovered {
    match mutation {
        Mutation::NoRecovery => recovered.jobs.clear(),
        Mutation::NoDedupe => recovered.jobs.iter_mut().for_each(|job| job.request_id.clone_from(&job.id)),
        Mutation::NoEpochs => recovered.groups.clear(),
        Mutation::None | Mutation::NoSync | Mutation::NoFence | Mutation::NoProducts => {}
    }
    recovered
}

/// One life of the process of the only coordinator. It ends by itself only when its disk fails.
pub(crate) async fn alone(name: &'static str, machine: Rc<Machine>, history: Rc<RefCell<History>>) {
    let life = begin(&machine);
    let place = Place::Memory(machine.objects.clone());
    let opened = Journal::open_driven(Path::new("/journal"), machine.disk.mount(), SYNC);
    let (handle, recovered, drive) = match opened {
        Ok(opened) => opened,
        // The disk may fail while it is opened, too.
        Err(StoreError::Io { .. }) => return,
        Err(error) => {
            history.borrow_mut().violation(format!("the journal cannot be opened: {error}"));
            return std::future::pending().await;
        }
    };
    let mut failures = handle.durable();
    tokio::spawn(drive);
    let config = config(None, products(&machine, life));
    let world = World {
        context: context(&machine, life),
        dial: dial(),
        store: (handle, remembered(machine.mutation, recovered)),
        takes_over: life > 0,
        lost: CancellationToken::new(),
        blobs: BlobStore::open_in_memory(&place, &config.limits).await.unwrap(),
        place,
        address: format!("{name}:{PORT}"),
        meter: Meter::default(),
    };
    let ended = Box::pin(run_in(config, world, listen().await.unwrap(), std::future::pending())).await;
    let failed = failures.borrow_and_update().failed.clone().unwrap_or_default();
    if !failed.contains("os error") {
        history.borrow_mut().violation(format!("the coordinator ended: {ended:?}; the store: {failed:?}"));
    }
}

/// Cancelled so long after `lost`.
fn later(lost: CancellationToken, late: Duration) -> CancellationToken {
    let noticed = CancellationToken::new();
    let notice = noticed.clone();
    tokio::spawn(async move {
        lost.cancelled().await;
        tokio::time::sleep(late).await;
        notice.cancel();
    });
    noticed
}

/// One life of the process of one of several coordinators. It ends when it leads no more.
pub(crate) async fn one_of_several(name: &'static str, machine: Rc<Machine>, history: Rc<RefCell<History>>) {
    let life = begin(&machine);
    let (etcd, address) = (etcd(), format!("{name}:{PORT}"));
    let mut led = campaign(&etcd, &address, &CancellationToken::new()).await.unwrap();
    let mut random = Random::of(machine.seed, 2000 + life);
    if random.once_in(3) {
        led.lost = later(led.lost.clone(), random.millis(LATE));
    }
    history.borrow_mut().leads(name, led.term);
    let (handle, recovered) = match EtcdStore::open(&etcd, &led).await {
        Ok(opened) => opened,
        Err(StoreError::Etcd(_)) => return,
        Err(error) => return history.borrow_mut().violation(format!("the store cannot be opened: {error}")),
    };
    let mut failures = handle.durable();
    let config = config(Some(etcd), products(&machine, life));
    let place = Place::Memory(machine.objects.clone());
    let world = World {
        context: context(&machine, life),
        dial: dial(),
        store: (handle, remembered(machine.mutation, recovered)),
        takes_over: true,
        lost: led.lost.clone(),
        blobs: BlobStore::open_in_memory(&place, &config.limits).await.unwrap(),
        place,
        address,
        meter: Meter::default(),
    };
    let ended = Box::pin(run_in(config, world, listen().await.unwrap(), std::future::pending())).await;
    let failed = failures.borrow_and_update().failed.clone().unwrap_or_default();
    if !led.lost.is_cancelled() && failed != StoreError::Fenced.to_string() {
        history.borrow_mut().violation(format!("{name} ended: {ended:?}; the store: {failed:?}"));
    }
}
