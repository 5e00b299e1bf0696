//! The hosts, and the loop that lets time pass and things go wrong.

use std::{
    cell::{Cell, RefCell},
    collections::BTreeMap,
    rc::Rc,
    sync::Arc,
    time::Duration,
};

use coordinator::{
    stand_in::{Pace, Register, StandIn, registration},
    store::memory::MemoryDisk,
};
use object_store::memory::InMemory;
use tokio_util::sync::CancellationToken;
use turmoil::Sim;

use crate::{
    client, coordinators,
    etcd::Etcd,
    faults::{self, Fault, NORMAL_LATENCY, Random},
    history::{History, Outcome},
    net::{PORT, dial, listen},
};

/// The host of etcd.
pub(crate) const ETCD: &str = "etcd";
/// The host of whoever submits jobs.
pub(crate) const CLIENT: &str = "client";
/// How many workers there are.
pub(crate) const WORKERS: u64 = 5;
/// What the model is called.
pub(crate) const MODEL: &str = "model";
/// What a process takes to be started again when it has ended by itself.
const RESTART: Duration = Duration::from_millis(700);
/// How finely time passes.
const TICK: Duration = Duration::from_millis(2);
/// No run takes longer: it would hang.
const LONGEST: Duration = Duration::from_secs(300);

/// The host of a worker.
pub(crate) fn worker(index: u64) -> String {
    format!("worker-{index}")
}

/// Which machines there are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Shape {
    /// One coordinator, with a journal.
    Alone,
    /// Two coordinators, and etcd.
    Several,
}

impl Shape {
    /// Every other seed; some things break only in one of them.
    fn of(seed: u64, mutation: Mutation) -> Self {
        match mutation {
            Mutation::NoSync => Self::Alone,
            Mutation::NoFence => Self::Several,
            _ if seed.is_multiple_of(2) => Self::Alone,
            _ => Self::Several,
        }
    }

    /// The hosts of coordinators.
    pub(crate) fn coordinators(self) -> &'static [&'static str] {
        match self {
            Self::Alone => &["coordinator"],
            Self::Several => &["coordinator-0", "coordinator-1"],
        }
    }

    /// All hosts that can break.
    fn hosts(self) -> Vec<String> {
        let etcd = (self == Self::Several).then_some(ETCD);
        self.coordinators().iter().copied().chain(etcd).map(str::to_owned).chain((0..WORKERS).map(worker)).collect()
    }
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
    /// A coordinator that takes over does not know which requests its predecessor accepted.
    NoDedupe,
    /// A coordinator that takes over does not know which epochs were begun.
    NoEpochs,
    /// etcd takes writes of leaders that lead no more.
    NoFence,
    /// Checkpoints do not say what they were multiplied in.
    NoProducts,
}

impl Mutation {
    /// All that break something.
    pub(crate) const ALL: [Self; 6] =
        [Self::NoSync, Self::NoRecovery, Self::NoDedupe, Self::NoEpochs, Self::NoFence, Self::NoProducts];

    /// What a violation says that is found for this reason; others may follow from how it was broken.
    pub(crate) fn is_found_by(self, violation: &str) -> bool {
        match self {
            Self::NoDedupe => violation.contains("was accepted as"),
            Self::NoEpochs => violation.contains("epoch"),
            Self::NoProducts => violation.contains("its picture is"),
            _ => true,
        }
    }

    /// For another process.
    pub(crate) fn name(self) -> String {
        format!("{self:?}")
    }

    /// From another process.
    pub(crate) fn named(name: &str) -> Self {
        Self::ALL.into_iter().find(|mutation| mutation.name() == name).unwrap_or(Self::None)
    }
}

/// What outlives processes.
pub(crate) struct Machine {
    pub(crate) seed: u64,
    pub(crate) mutation: Mutation,
    /// Its journal.
    pub(crate) disk: MemoryDisk,
    /// Pictures and checkpoints.
    pub(crate) objects: Arc<InMemory>,
    /// How often a coordinator was started.
    pub(crate) lives: Cell<u64>,
    /// Of each worker's process: to be cancelled when it is to go.
    drains: RefCell<Vec<CancellationToken>>,
}

/// Runs a seed.
pub(crate) fn run(seed: u64, mutation: Mutation) -> Outcome {
    let mut random = Random::of(seed, 0);
    let mut builder = turmoil::Builder::new();
    builder.rng_seed(seed).simulation_duration(LONGEST).tick_duration(TICK).enable_random_order();
    builder.min_message_latency(Duration::from_millis(1)).max_message_latency(Duration::from_millis(NORMAL_LATENCY));
    builder.tcp_capacity(4096);
    let mut sim = builder.build();

    let machine = Rc::new(Machine {
        seed,
        mutation,
        disk: MemoryDisk::new(),
        objects: Arc::new(InMemory::new()),
        lives: Cell::new(0),
        drains: RefCell::new((0..WORKERS).map(|_| CancellationToken::new()).collect()),
    });
    let shape = Shape::of(seed, mutation);
    let history = Rc::new(RefCell::new(History::new(shape.coordinators())));
    if mutation == Mutation::NoSync {
        machine.disk.lie();
    }
    if shape == Shape::Several {
        let etcd = Etcd::new(mutation == Mutation::NoFence);
        sim.host(ETCD, move || etcd.clone().serve());
    }
    for name in shape.coordinators().iter().copied() {
        let (of_machine, of_history) = (machine.clone(), history.clone());
        sim.host(name, move || {
            let (machine, history) = (of_machine.clone(), of_history.clone());
            async move {
                match shape {
                    Shape::Alone => coordinators::alone(name, machine, history).await,
                    Shape::Several => coordinators::one_of_several(name, machine, history).await,
                }
                Ok(())
            }
        });
    }
    for index in 0..WORKERS {
        let says_products = mutation != Mutation::NoProducts;
        let pace = Pace { load: random.millis(50..1000), step: random.millis(20..250), checkpoints: true, says_products };
        let machine = machine.clone();
        sim.host(worker(index), move || {
            let drain = CancellationToken::new();
            machine.drains.borrow_mut()[index as usize] = drain.clone();
            async move {
                let name = worker(index);
                let registration = registration(&name, &format!("{name}:{PORT}"));
                let register = match shape {
                    Shape::Alone => Register::Coordinator(format!("{}:{PORT}", shape.coordinators()[0])),
                    Shape::Several => Register::Etcd(coordinators::etcd()),
                };
                let stand_in = StandIn { registration, pace, dial: dial(), drain };
                stand_in.run(register, listen().await?, CancellationToken::new()).await?;
                Ok(())
            }
        });
    }
    sim.client(CLIENT, client::run(seed, machine.clone(), history.clone()));

    let mut plan = faults::plan(seed, shape).into_iter().peekable();
    let faults = plan.len() as u64;
    let mut downs = Downs { hosts: shape.hosts(), ..Downs::default() };
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
    let history = Rc::into_inner(history).map(RefCell::into_inner).expect("all hosts are gone");
    history.outcome(simulated, faults, machine.lives.get())
}

/// Machines that are down, and when they start again; none: not before they are told to.
#[derive(Default)]
struct Downs {
    hosts: Vec<String>,
    until: BTreeMap<String, Option<Duration>>,
}

impl Downs {
    /// Processes that have ended by themselves are started again after a while, as an operator's tool would.
    fn restart(&mut self, sim: &mut Sim<'_>, history: &Rc<RefCell<History>>) {
        for host in self.hosts.clone() {
            match self.until.get(&host) {
                None if !sim.is_host_running(host.as_str()) => {
                    history.borrow_mut().note(sim.elapsed(), format!("{host} has ended"));
                    // To turmoil a host that has ended cannot crash; what it left running ends when it starts again.
                    sim.crash(host.as_str());
                    self.until.insert(host, Some(sim.elapsed() + RESTART));
                }
                Some(Some(at)) if *at <= sim.elapsed() => {
                    self.until.remove(&host);
                    sim.bounce(host);
                }
                _ => {}
            }
        }
    }
}

fn apply(sim: &mut Sim<'_>, machine: &Machine, downs: &mut Downs, fault: Fault, random: &mut Random) {
    match fault {
        Fault::Crash(host) => {
            sim.crash(host.as_str());
            if Shape::Alone.coordinators().contains(&host.as_str()) {
                machine.disk.crash(random.next());
            }
            downs.until.insert(host, None);
        }
        Fault::Start(host) => {
            if downs.until.remove(&host).is_some() {
                sim.bounce(host);
            }
        }
        Fault::Drain(index) => machine.drains.borrow()[index as usize].cancel(),
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
    let all: Vec<String> = downs.hosts.iter().cloned().chain([CLIENT.to_owned()]).collect();
    for (index, a) in all.iter().enumerate() {
        for b in &all[index + 1..] {
            sim.release(a.as_str(), b.as_str());
            sim.repair(a.as_str(), b.as_str());
        }
    }
    sim.set_max_message_latency(Duration::from_millis(NORMAL_LATENCY));
    for host in std::mem::take(&mut downs.until).into_keys() {
        sim.bounce(host);
    }
}
