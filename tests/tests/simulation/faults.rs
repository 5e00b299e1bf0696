//! What goes wrong when, by seed.

use std::{ops::Range, time::Duration};

use coordinator::store::memory::{Call, Failure};

use crate::cluster::{CLIENT, ETCD, Shape, WORKERS, worker};

/// Nothing goes wrong before: the first card is known by then.
const BEGIN: u64 = 2_000;
/// Nothing goes wrong after.
pub(crate) const END: Duration = Duration::from_secs(30);
/// How long something stays broken, in milliseconds.
const BROKEN: Range<u64> = 50..8_000;
/// How long a leader hears nothing of etcd, in milliseconds, to lose its lease.
const LEASE_LOST: Range<u64> = 3_500..8_000;

/// Something that happens to the cluster.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Fault {
    /// The machine stops: what was not synced is lost.
    Crash(String),
    /// And starts again.
    Start(String),
    /// A worker is asked to go; its process is started again when it has ended.
    Drain(u64),
    /// Nothing gets through between two, either way.
    Cut(String, String),
    /// Nothing gets through from one to the other.
    CutOneWay(String, String),
    /// What two say waits.
    Hold(String, String),
    /// All is well between them again; what waited is delivered.
    Mend(String, String),
    /// From now on messages take up to so many milliseconds.
    Slow(u64),
    /// A call to the coordinator's disk fails.
    Disk(Call, u64, Failure),
}

/// SplitMix64.
#[derive(Debug, Clone)]
pub(crate) struct Random(pub(crate) u64);

impl Random {
    /// For one purpose of a run.
    pub(crate) fn of(seed: u64, purpose: u64) -> Self {
        let mut random = Self(seed ^ purpose.wrapping_mul(0xd6e8_feb8_6659_fd93));
        random.0 = random.next();
        random
    }

    /// Any number.
    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// One of them.
    pub(crate) fn within(&mut self, range: Range<u64>) -> u64 {
        range.start + self.next() % (range.end - range.start)
    }

    /// True once in `n` times.
    pub(crate) fn once_in(&mut self, n: u64) -> bool {
        self.next().is_multiple_of(n)
    }

    /// A time.
    pub(crate) fn millis(&mut self, range: Range<u64>) -> Duration {
        Duration::from_millis(self.within(range))
    }
}

/// What goes wrong in a run, in order.
pub(crate) fn plan(seed: u64, shape: Shape) -> Vec<(Duration, Fault)> {
    let mut random = Random::of(seed, 1);
    let end = END.as_millis() as u64;
    let mut plan = Vec::new();
    for _ in 0..random.within(1..16) {
        let at = random.within(BEGIN..end - 1);
        let (mut fault, mut mended) = draw(&mut random, shape);
        let mut broken = BROKEN;
        if matches!(fault, Fault::Hold(..)) && shape == Shape::Several && random.once_in(2) {
            // What a leader writes comes so late that another leads.
            let (a, b) = (any_coordinator(&mut random, shape), ETCD.to_owned());
            (fault, mended) = (Fault::Hold(a.clone(), b.clone()), Some(Fault::Mend(a, b)));
            broken = LEASE_LOST;
        }
        let until = (at + random.within(broken)).min(end);
        plan.push((Duration::from_millis(at), fault));
        plan.extend(mended.map(|mended| (Duration::from_millis(until), mended)));
    }
    plan.sort_by_key(|(at, _)| *at);
    plan
}

/// A fault and what ends it, if it does not end by itself.
fn draw(random: &mut Random, shape: Shape) -> (Fault, Option<Fault>) {
    match random.within(0..18) {
        0..5 => {
            let coordinator = any_coordinator(random, shape);
            (Fault::Crash(coordinator.clone()), Some(Fault::Start(coordinator)))
        }
        5..8 => {
            let worker = worker(random.within(0..WORKERS));
            (Fault::Crash(worker.clone()), Some(Fault::Start(worker)))
        }
        8..10 => {
            let (a, b) = pair(random, shape);
            (Fault::Cut(a.clone(), b.clone()), Some(Fault::Mend(a, b)))
        }
        10 => {
            let (a, b) = pair(random, shape);
            (Fault::CutOneWay(a.clone(), b.clone()), Some(Fault::Mend(a, b)))
        }
        11..14 => {
            let (a, b) = pair(random, shape);
            (Fault::Hold(a.clone(), b.clone()), Some(Fault::Mend(a, b)))
        }
        14 => (Fault::Drain(random.within(0..WORKERS)), None),
        15 => (Fault::Slow(random.within(10..300)), Some(Fault::Slow(NORMAL_LATENCY))),
        _ if shape == Shape::Several => (Fault::Crash(ETCD.into()), Some(Fault::Start(ETCD.into()))),
        _ => {
            let call = if random.once_in(2) { Call::Sync } else { Call::Append };
            let failure = if random.once_in(2) { Failure::Broken } else { Failure::Full };
            (Fault::Disk(call, random.within(0..20), failure), None)
        }
    }
}

/// Most milliseconds that a message takes when all is well.
pub(crate) const NORMAL_LATENCY: u64 = 10;

fn any_coordinator(random: &mut Random, shape: Shape) -> String {
    let names = shape.coordinators();
    names[random.within(0..names.len() as u64) as usize].to_owned()
}

fn pair(random: &mut Random, shape: Shape) -> (String, String) {
    let name = |random: &mut Random| match random.within(0..10) {
        0..4 => any_coordinator(random, shape),
        4 => CLIENT.to_owned(),
        5..8 if shape == Shape::Several => ETCD.to_owned(),
        _ => worker(random.within(0..WORKERS)),
    };
    loop {
        let (a, b) = (name(random), name(random));
        if a != b {
            return (a, b);
        }
    }
}
