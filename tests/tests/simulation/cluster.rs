//! The hosts, and the loop that lets time pass and things go wrong.

use std::{
    cell::{Cell, RefCell},
    collections::BTreeMap,
    path::Path,
    rc::Rc,
    sync::Arc,
    time::Duration,
};

use coordinator::{
    Config, World,
    blobs::BlobStore,
    checkpoints::Place,
    config::{AuthConfig, Limits},
    context::Context,
    models_file::{ComponentConfig, ModelConfig},
    run_in,
    stand_in::{Pace, StandIn, registration},
    store::{Journal, StoreError, memory::MemoryDisk},
};
use object_store::memory::InMemory;
use tokio_util::sync::CancellationToken;
use turmoil::Sim;

use crate::{
    client,
    faults::{self, Fault, NORMAL_LATENCY, Random},
    history::{History, Outcome},
    net::{PORT, dial, listen},
};

/// The host of the coordinator.
pub(crate) const COORDINATOR: &str = "coordinator";
/// The host of whoever submits jobs.
pub(crate) const CLIENT: &str = "client";
/// How many workers there are.
pub(crate) const WORKERS: u64 = 5;
/// What the model is called.
pub(crate) const MODEL: &str = "model";
/// The transformer's groups.
const REPLICAS: u32 = 2;
/// When the simulation begins, since 1970.
const EPOCH: Duration = Duration::from_secs(1_800_000_000);
/// What a process takes to be started again when it has ended by itself.
const RESTART: Duration = Duration::from_millis(700);
/// What a sync of the disk takes.
const SYNC: Duration = Duration::from_millis(2);
/// How finely time passes.
const TICK: Duration = Duration::from_millis(2);
/// No run takes longer: it would hang.
const LONGEST: Duration = Duration::from_secs(300);

/// The host of a worker.
pub(crate) fn worker(index: u64) -> String {
    format!("worker-{index}")
}

/// What is broken on purpose.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Mutation {
    /// Nothing.
    None,
    /// What is acknowledged is not synced.
    NoSync,
    /// A coordinator that takes over does not know what its predecessor accepted.
    NoRecovery,
}

impl Mutation {
    /// All that break something.
    pub(crate) const ALL: [Self; 2] = [Self::NoSync, Self::NoRecovery];

    /// For another process.
    pub(crate) fn name(self) -> String {
        format!("{self:?}")
    }

    /// From another process.
    pub(crate) fn named(name: &str) -> Self {
        Self::ALL.into_iter().find(|mutation| mutation.name() == name).unwrap_or(Self::None)
    }
}

/// What outlives the coordinator's process.
pub(crate) struct Machine {
    seed: u64,
    mutation: Mutation,
    /// Its journal.
    pub(crate) disk: MemoryDisk,
    /// Pictures and checkpoints.
    pub(crate) objects: Arc<InMemory>,
    /// How often the process was started.
    pub(crate) lives: Cell<u64>,
}

/// Runs a seed.
pub(crate) fn run(seed: u64, mutation: Mutation) -> Outcome {
    let mut random = Random::of(seed, 0);
    let mut builder = turmoil::Builder::new();
    builder.rng_seed(seed).simulation_duration(LONGEST).tick_duration(TICK).enable_random_order();
    builder.min_message_latency(Duration::from_millis(1)).max_message_latency(Duration::from_millis(NORMAL_LATENCY));
    builder.tcp_capacity(4096);
    let mut sim = builder.build();

    let machine =
        Rc::new(Machine { seed, mutation, disk: MemoryDisk::new(), objects: Arc::new(InMemory::new()), lives: Cell::new(0) });
    let history = Rc::new(RefCell::new(History::default()));
    if mutation == Mutation::NoSync {
        machine.disk.lie();
    }
    let (of_machine, of_history) = (machine.clone(), history.clone());
    sim.host(COORDINATOR, move || {
        let (machine, history) = (of_machine.clone(), of_history.clone());
        async move {
            serve(machine, history).await;
            Ok(())
        }
    });
    for index in 0..WORKERS {
        let pace = Pace { load: random.millis(50..1000), step: random.millis(20..250), checkpoints: true };
        sim.host(worker(index), move || async move {
            let name = worker(index);
            let stand_in = StandIn { registration: registration(&name, &format!("{name}:{PORT}")), pace, dial: dial() };
            stand_in.run(format!("{COORDINATOR}:{PORT}"), listen().await?, CancellationToken::new()).await?;
            Ok(())
        });
    }
    sim.client(CLIENT, client::run(seed, machine.clone(), history.clone()));

    let mut plan = faults::plan(seed).into_iter().peekable();
    let faults = plan.len() as u64;
    let mut downs = Downs::default();
    let mut mended = false;
    loop {
        while let Some((_, fault)) = plan.next_if(|(at, _)| *at <= sim.elapsed()) {
            history.borrow_mut().note(sim.elapsed(), format!("{fault:?}"));
            apply(&mut sim, &machine, &mut downs, fault, &mut random);
        }
        if !mended && sim.elapsed() >= faults::END {
            mended = true;
            history.borrow_mut().note(sim.elapsed(), "all is mended".into());
            mend(&mut sim, &mut downs);
        }
        downs.restart(&mut sim, &history);
        match sim.step() {
            Ok(false) => {}
            Ok(true) => break,
            Err(error) => {
                history.borrow_mut().violation(format!("the simulation ended: {error}"));
                break;
            }
        }
    }
    let simulated = sim.elapsed();
    drop(sim);
    let history = Rc::into_inner(history).map(RefCell::into_inner).unwrap_or_default();
    history.outcome(simulated, faults, machine.lives.get())
}

/// Machines that are down, and when they start again; none: not before they are told to.
#[derive(Default)]
struct Downs(BTreeMap<String, Option<Duration>>);

impl Downs {
    /// Processes that have ended by themselves are started again after a while, as an operator's tool would.
    fn restart(&mut self, sim: &mut Sim<'_>, history: &Rc<RefCell<History>>) {
        for host in hosts() {
            match self.0.get(&host) {
                None if !sim.is_host_running(host.as_str()) => {
                    history.borrow_mut().note(sim.elapsed(), format!("{host} has ended"));
                    // To turmoil a host that has ended cannot crash; what it left running ends when it starts again.
                    sim.crash(host.as_str());
                    self.0.insert(host, Some(sim.elapsed() + RESTART));
                }
                Some(Some(at)) if *at <= sim.elapsed() => {
                    self.0.remove(&host);
                    sim.bounce(host);
                }
                _ => {}
            }
        }
    }
}

fn hosts() -> impl Iterator<Item = String> {
    [COORDINATOR.to_owned()].into_iter().chain((0..WORKERS).map(worker))
}

fn apply(sim: &mut Sim<'_>, machine: &Machine, downs: &mut Downs, fault: Fault, random: &mut Random) {
    match fault {
        Fault::Crash(host) => {
            sim.crash(host.as_str());
            if host == COORDINATOR {
                machine.disk.crash(random.next());
            }
            downs.0.insert(host, None);
        }
        Fault::Start(host) => {
            if downs.0.remove(&host).is_some() {
                sim.bounce(host);
            }
        }
        Fault::Cut(a, b) => sim.partition(a, b),
        Fault::CutOneWay(a, b) => sim.partition_oneway(a, b),
        Fault::Hold(a, b) => sim.hold(a, b),
        Fault::Mend(a, b) => {
            sim.release(a.as_str(), b.as_str());
            sim.repair(a, b);
        }
        Fault::Slow(most) => sim.set_max_message_latency(Duration::from_millis(most)),
        Fault::Disk(call, nth, failure) => machine.disk.fail(call, nth, failure),
    }
}

fn mend(sim: &mut Sim<'_>, downs: &mut Downs) {
    let all: Vec<String> = hosts().chain([CLIENT.to_owned()]).collect();
    for (index, a) in all.iter().enumerate() {
        for b in &all[index + 1..] {
            sim.release(a.as_str(), b.as_str());
            sim.repair(a.as_str(), b.as_str());
        }
    }
    sim.set_max_message_latency(Duration::from_millis(NORMAL_LATENCY));
    for host in std::mem::take(&mut downs.0).into_keys() {
        sim.bounce(host);
    }
}

fn config() -> Config {
    let transformer = ComponentConfig { tp: 2, replicas: REPLICAS, ..ComponentConfig::default() };
    let model = ModelConfig {
        name: MODEL.into(),
        path: "/models/model".into(),
        max_batch: 4,
        max_jobs: 4,
        components: [("transformer".to_owned(), transformer)].into(),
        adapters: vec![],
    };
    Config {
        models: vec![model],
        identity: None,
        auth: AuthConfig::default(),
        advertise: None,
        data_dir: None,
        object_store: None,
        etcd: None,
        limits: Limits::default(),
    }
}

/// One life of the coordinator's process. It ends by itself only when its disk fails.
async fn serve(machine: Rc<Machine>, history: Rc<RefCell<History>>) {
    let life = machine.lives.get();
    machine.lives.set(life + 1);
    let place = Place::Memory(machine.objects.clone());
    let opened = Journal::open_driven(Path::new("/journal"), machine.disk.mount(), SYNC);
    let (handle, mut recovered, drive) = match opened {
        Ok(opened) => opened,
        // The disk may fail while it is opened, too.
        Err(StoreError::Io { .. }) => return,
        Err(error) => {
            history.borrow_mut().violation(format!("the journal cannot be opened: {error}"));
            return std::future::pending().await;
        }
    };
    if machine.mutation == Mutation::NoRecovery {
        recovered.jobs.clear();
    }
    let mut failures = handle.durable();
    tokio::spawn(drive);
    let config = config();
    let now = EPOCH + History::now();
    let world = World {
        context: Arc::new(Context::seeded(Random::of(machine.seed, 1000 + life).next(), now)),
        dial: dial(),
        store: (handle, recovered),
        takes_over: life > 0,
        lost: CancellationToken::new(),
        blobs: BlobStore::open_in_memory(&place, &config.limits).await.unwrap(),
        place,
        address: format!("{COORDINATOR}:{PORT}"),
    };
    let ended = Box::pin(run_in(config, world, listen().await.unwrap(), std::future::pending())).await;
    let failed = failures.borrow_and_update().failed.clone().unwrap_or_default();
    if !failed.contains("os error") {
        history.borrow_mut().violation(format!("the coordinator ended: {ended:?}; the store: {failed:?}"));
    }
}
