//! The coordinator and a cluster of workers on one simulated clock and network, with whatever can go wrong going wrong, by
//! seed.
//!
//! ```text
//! cargo test --release -p tests --test simulation                        300 seeds
//! SIM_SEEDS=10000 cargo test --release -p tests --test simulation        as many as you like
//! SIM_SEEDS=1 SIM_FIRST=17 SIM_SHOW=1 cargo test ...                     one of them, with its history
//! ```
//!
//! A seed is one run: a coordinator with its journal on a disk in memory (even seeds) or two coordinators and an etcd (odd ones),
//! five workers that stand in for real ones, and a client with a dozen jobs, some of them urgent, some with a deadline. Until
//! [`faults::END`] machines crash and come back, clocks are wrong, workers are drained, links break, hold and slow down, the
//! disk fails, and models.toml changes; then all is repaired, and every job must be over within 60 simulated seconds.
//!
//! - `net.rs`: tonic over the simulated network
//! - `cluster.rs`: the hosts, and the loop that lets time pass and things go wrong
//! - `coordinators.rs`: the lives of coordinators
//! - `etcd.rs`: the etcd that stands in for the real one
//! - `faults.rs`: what goes wrong when, by seed
//! - `client.rs`: the jobs, by seed, and whoever submits, watches, polls and cancels them
//! - `history.rs`: what was seen, and what must be true of it

#![allow(clippy::unwrap_used)] // helpers of tests are tests

mod client;
mod cluster;
mod coordinators;
mod etcd;
mod faults;
mod history;
mod net;

use std::{
    env,
    process::Command,
    sync::atomic::{AtomicU64, Ordering},
    thread,
    time::Instant,
};

use crate::{
    cluster::{Mutation, run},
    history::Outcome,
};

/// Each takes some tenths of a second of one core.
const SEEDS: u64 = 300;
/// Seeds that are run twice.
const REPLAYED: u64 = 5;
/// Tells a process that runs a seed what to break.
const MUTATION: &str = "SIM_MUTATION";
/// Within so many seeds whatever is broken is found.
const FOUND_WITHIN: u64 = 200;
/// What a process that runs a seed says before its outcome.
const OUTCOME: &str = "OUTCOME ";

fn number(name: &str, default: u64) -> u64 {
    env::var(name).map_or(default, |text| text.parse().unwrap_or_else(|_| panic!("{name} must be a number")))
}

/// Runs a seed in a process of its own: the order in which tokio ends the tasks of a runtime depends on how many tasks the
/// process had before.
fn run_apart(seed: u64, mutation: Mutation) -> Outcome {
    let mut command = Command::new(env::current_exe().unwrap());
    command.args(["--exact", "one_seed", "--ignored", "--nocapture"]).env("SIM_FIRST", seed.to_string());
    command.env(MUTATION, mutation.name());
    let output = command.output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let outcome = text.lines().find_map(|line| line.split_once(OUTCOME)).and_then(|(_, json)| Outcome::from_json(json));
    outcome.unwrap_or_else(|| panic!("seed {seed} came to nothing: {text}{}", String::from_utf8_lossy(&output.stderr)))
}

#[test]
#[ignore = "the other tests run it, in processes of their own"]
fn one_seed() {
    println!("{OUTCOME}{}", run(number("SIM_FIRST", 0), Mutation::named(&env::var(MUTATION).unwrap_or_default())).to_json());
}

/// Runs seeds on all cores; what each came to, by seed.
fn run_all(first: u64, seeds: u64) -> Vec<(u64, Outcome)> {
    let next = AtomicU64::new(first);
    let cores = thread::available_parallelism().map_or(1, usize::from);
    let work = || {
        let mut outcomes = Vec::new();
        loop {
            let seed = next.fetch_add(1, Ordering::Relaxed);
            if seed >= first + seeds {
                return outcomes;
            }
            outcomes.push((seed, run_apart(seed, Mutation::None)));
        }
    };
    let mut outcomes: Vec<_> = thread::scope(|scope| {
        let threads: Vec<_> = (0..cores).map(|_| scope.spawn(work)).collect();
        threads.into_iter().flat_map(|thread| thread.join().unwrap()).collect()
    });
    outcomes.sort_by_key(|(seed, _)| *seed);
    outcomes
}

#[test]
fn nothing_that_was_accepted_is_lost_whatever_breaks() {
    let (first, seeds) = (number("SIM_FIRST", 0), number("SIM_SEEDS", SEEDS));
    let start = Instant::now();
    let outcomes = run_all(first, seeds);
    let mut failed = 0;
    for (seed, outcome) in &outcomes {
        if env::var_os("SIM_SHOW").is_some() {
            outcome.history.iter().for_each(|line| println!("{line}"));
        }
        if !outcome.violations.is_empty() {
            failed += 1;
            println!("seed {seed}: {:#?}\n  SIM_SEEDS=1 SIM_FIRST={seed} SIM_SHOW=1 replays it", outcome.violations);
        }
    }
    let sum = |of: fn(&Outcome) -> u64| outcomes.iter().map(|(_, outcome)| of(outcome)).sum::<u64>();
    println!(
        "{seeds} seeds in {:.1} s, {} simulated seconds, {} jobs accepted, {} succeeded, {} faults, {} coordinators, {failed} failed",
        start.elapsed().as_secs_f64(),
        sum(|outcome| outcome.simulated.as_secs()),
        sum(|outcome| outcome.accepted),
        sum(|outcome| outcome.succeeded),
        sum(|outcome| outcome.faults),
        sum(|outcome| outcome.lives),
    );
    assert_eq!(failed, 0, "seeds failed");
}

#[test]
fn a_seed_runs_the_same_way_again() {
    let first = number("SIM_FIRST", 0);
    for seed in first..first + REPLAYED {
        let [once, again] = [run_apart(seed, Mutation::None), run_apart(seed, Mutation::None)];
        let differs = once.history.iter().zip(&again.history).find(|(a, b)| a != b);
        assert_eq!(differs, None, "seed {seed}");
        assert_eq!(once.hash(), again.hash(), "seed {seed}");
    }
    assert_ne!(run_apart(first, Mutation::None).hash(), run_apart(first + 1, Mutation::None).hash());
}

/// A checker that finds nothing is worth nothing: what must hold is broken on purpose.
#[test]
fn what_is_broken_on_purpose_is_found() {
    for mutation in Mutation::ALL {
        let found = (0..FOUND_WITHIN).find_map(|seed| {
            let mut violations = run_apart(seed, mutation).violations.into_iter();
            Some((seed, violations.find(|violation| mutation.is_found_by(violation))?))
        });
        let (seed, violation) = found.unwrap_or_else(|| panic!("{mutation:?} was not found"));
        println!("{mutation:?} is found by seed {seed}: {violation}");
    }
}
