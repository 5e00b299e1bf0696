//! Tenants beside each other, in simulated time: nobody's flood is another's wait, shares follow weights, limits hold.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

use proto::v1::RunTask;

use super::{tests::*, *};
use crate::error::Error;

/// Milliseconds that a job of 64 x 64 pixels and 4 steps takes.
const SERVICE: Millis = 1000;
/// What it costs.
const WORK: u64 = 64 * 64 * 4;
/// Jobs that run at a time.
const SLOTS: u64 = 2;
/// Jobs of each tenant that behaves.
const JOBS: usize = 500;

/// A job that somebody will ask for.
#[derive(Clone)]
struct Arrival {
    at: Millis,
    tenant: &'static str,
    steps: u32,
}

/// What became of it.
struct Served {
    tenant: &'static str,
    waited: Millis,
    work: u64,
}

/// Numbers in 0..1, the same in every run.
struct Random(u64);

impl Random {
    fn next(&mut self) -> f64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        ((self.0 >> 33) as f64 + 0.5) / (1u64 << 31) as f64
    }
}

/// Jobs at random moments, so many a second on average.
fn poisson(tenant: &'static str, per_second: f64, jobs: usize, seed: u64) -> Vec<Arrival> {
    let (mut random, mut at) = (Random(seed), 1000.0);
    let arrivals = (0..jobs).map(|_| {
        at += -random.next().ln() * 1000.0 / per_second;
        Arrival { at: at as Millis, tenant, steps: 4 }
    });
    arrivals.collect()
}

/// Jobs one after the other, so many a second.
fn steady(tenant: &'static str, per_second: f64, until: Millis) -> Vec<Arrival> {
    let jobs = (until as f64 * per_second / 1000.0) as u64;
    (1..jobs).map(|n| Arrival { at: 1000 + (n as f64 * 1000.0 / per_second) as Millis, tenant, steps: 4 }).collect()
}

fn limits(of: &[(&str, TenantLimits)]) -> Event {
    Event::Tenants(of.iter().map(|(name, limits)| ((*name).to_owned(), limits.clone())).collect())
}

fn weight(weight: u32) -> TenantLimits {
    TenantLimits { weight, ..TenantLimits::default() }
}

/// A cluster with [`SLOTS`] that takes jobs of tenants.
fn cluster(tenants: &[(&str, TenantLimits)]) -> Cluster {
    let mut cluster = Cluster::with(|model| model.max_jobs = SLOTS as u32, Limits { queued_jobs: 1 << 20, ..Limits::default() });
    for worker in ["w1", "w2"] {
        cluster.join(worker);
    }
    cluster.describe("w1");
    cluster.all_ready();
    cluster.apply(limits(tenants));
    cluster
}

fn submission(cluster: &mut Cluster, tenant: &str, steps: u32) -> Submission {
    let mut submission = cluster.submission();
    submission.tenant = tenant.to_owned();
    submission.spec.num_inference_steps = Some(steps);
    submission
}

/// Plays the arrivals until `until`, or until all is done. Gives what was served, in the order of its beginning, and how many
/// were refused.
fn play(tenants: &[(&str, TenantLimits)], mut arrivals: Vec<Arrival>, until: Millis) -> (Vec<Served>, usize) {
    arrivals.sort_by_key(|arrival| arrival.at);
    let mut cluster = cluster(tenants);
    let (mut served, mut refused) = (Vec::new(), 0);
    let mut asked: BTreeMap<String, Arrival> = BTreeMap::new();
    let mut running: BTreeMap<String, Vec<(String, RunTask)>> = BTreeMap::new();
    let mut ends: BinaryHeap<Reverse<(Millis, String)>> = BinaryHeap::new();
    let mut arrivals = arrivals.into_iter().peekable();
    loop {
        let next_end = ends.peek().map(|Reverse((at, _))| *at);
        let next_arrival = arrivals.peek().map(|arrival| arrival.at);
        let Some(now) = next_end.into_iter().chain(next_arrival).min().filter(|now| *now < until) else {
            return (served, refused);
        };
        cluster.now = now;
        if next_end == Some(now) {
            let Some(Reverse((_, job_id))) = ends.pop() else { continue };
            for task in running.remove(&job_id).unwrap_or_default().iter().rev() {
                cluster.start(task);
                cluster.finish(task);
            }
        } else if let Some(arrival) = arrivals.next() {
            let submission = submission(&mut cluster, arrival.tenant, arrival.steps);
            match cluster.submit(submission) {
                Ok(job) => drop(asked.insert(job.id, arrival)),
                Err(Error::TenantQuota { .. }) => refused += 1,
                Err(other) => panic!("{other}"),
            }
        }
        for (worker, task) in cluster.tasks() {
            let job_id = reference(&task).job_id.clone();
            let tasks = running.entry(job_id.clone()).or_default();
            tasks.push((worker, task));
            if tasks.len() == 1 {
                let Arrival { at, tenant, steps } = asked[&job_id].clone();
                served.push(Served { tenant, waited: now - at, work: WORK / 4 * u64::from(steps) });
                ends.push(Reverse((now + SERVICE * u64::from(steps) / 4, job_id)));
            }
        }
    }
}

/// Of a tenant's jobs, how long the slowest of a hundred waited.
fn p99(served: &[Served], of: impl Fn(&str) -> bool) -> Millis {
    let mut waits: Vec<Millis> = served.iter().filter(|job| of(job.tenant)).map(|job| job.waited).collect();
    waits.sort_unstable();
    waits[waits.len() * 99 / 100]
}

#[test]
fn a_tenant_at_ten_times_its_quota_makes_others_wait_a_fifth_longer_at_most() {
    // Each may use a quarter of what there is, nearly; three use four fifths of that, the fourth all or ten times as much.
    let per_second = 0.48;
    let quota = Quota { per_second: (WORK as f64 * per_second) as u64, burst: 8 * WORK };
    let limits = TenantLimits { quota: Some(quota), ..TenantLimits::default() };
    let names = ["a", "b", "c", "flood"];
    let tenants = names.map(|name| (name, limits.clone()));
    let others: Vec<Arrival> =
        names[..3].iter().zip(1..).flat_map(|(name, seed)| poisson(name, 0.8 * per_second, JOBS, seed)).collect();
    let end = others.iter().map(|arrival| arrival.at).max().unwrap();
    let with = |factor: f64| {
        let arrivals = [others.clone(), steady("flood", factor * per_second, end)].concat();
        play(&tenants, arrivals, Millis::MAX)
    };
    let ((usual, _), (flooded, refused)) = (with(1.0), with(10.0));
    let not_flood = |tenant: &str| tenant != "flood";
    let (before, after) = (p99(&usual, not_flood), p99(&flooded, not_flood));
    println!("p99 of the others' wait: {before} ms, {after} ms beside the flood; {refused} of the flood's jobs refused");
    assert!(before > SERVICE, "there is something to wait for: {before} ms");
    assert!(after * 5 <= before * 6, "{before} ms, and {after} ms beside the flood");
    let admitted = flooded.iter().filter(|job| job.tenant == "flood").count() as f64;
    let allowed = end as f64 / 1000.0 * per_second + 8.0;
    assert!(admitted <= allowed && admitted > 0.95 * allowed, "{admitted} of {allowed}");
}

#[test]
fn a_flood_without_a_quota_waits_behind_itself() {
    let names = ["a", "b", "c", "flood"];
    let tenants = names.map(|name| (name, weight(1)));
    let others: Vec<Arrival> = names[..3].iter().zip(1..).flat_map(|(name, seed)| poisson(name, 0.4, JOBS, seed)).collect();
    let end = others.iter().map(|arrival| arrival.at).max().unwrap();
    let wait = |factor: f64| {
        let arrivals = [others.clone(), steady("flood", factor * 0.48, end)].concat();
        play(&tenants, arrivals, end).0
    };
    let (usual, flooded) = (wait(1.0), wait(10.0));
    let waits = |served: &[Served]| (p99(served, |tenant| tenant != "flood"), p99(served, |tenant| tenant == "flood"));
    let ((before, _), (after, of_flood)) = (waits(&usual), waits(&flooded));
    println!("p99 of the others' wait: {before} ms, {after} ms beside the flood, whose own is {of_flood} ms");
    // No slot is ever idle now: whoever would have found one free waits until the first is.
    assert!(after * 2 <= before * 3 && of_flood > 50 * after, "{before} ms, {after} ms, {of_flood} ms");
}

#[test]
fn shares_are_within_a_twentieth_of_weights() {
    let tenants = [("a", weight(1)), ("b", weight(2)), ("c", weight(3)), ("d", weight(4))];
    // More than is served, in jobs of different sizes.
    let sizes = [4, 8, 2, 12];
    let arrivals = tenants
        .iter()
        .zip(sizes)
        .flat_map(|((tenant, _), steps)| (0..500).map(move |n| Arrival { at: 1000 + n / 10, tenant, steps }));
    let (served, _) = play(&tenants, arrivals.collect(), 1000 + 400 * SERVICE);
    let total: u64 = served.iter().map(|job| job.work).sum();
    for (tenant, limits) in &tenants {
        let mine: u64 = served.iter().filter(|job| job.tenant == *tenant).map(|job| job.work).sum();
        let share = mine as f64 / total as f64 * 10.0 / f64::from(limits.weight);
        println!("{tenant}: {share:.4} of its share");
        assert!((0.95..=1.05).contains(&share), "{tenant} has {share} of its share");
    }
}

#[test]
fn another_coordinator_knows_whose_job_each_is() {
    let mut cluster = cluster(&[]);
    for number in 0..12 {
        let tenant = if number < 8 { "much" } else { "little" };
        let submission = submission(&mut cluster, tenant, 4);
        cluster.submit(submission).unwrap();
    }
    cluster.restart(SavedSteps::new());
    for worker in ["w1", "w2"] {
        cluster.join(worker);
    }
    cluster.describe("w1");
    cluster.tick(SETTLE);
    cluster.all_ready();
    let mut order = Vec::new();
    while order.len() < 8 {
        let tasks = cluster.tasks();
        assert!(!tasks.is_empty(), "{order:?}");
        let jobs: BTreeSet<String> = tasks.iter().map(|(_, task)| reference(task).job_id.clone()).collect();
        order.extend(jobs.iter().map(|id| cluster.records[id].tenant.clone()));
        for task in tasks.iter().rev() {
            cluster.start(task);
            cluster.finish(task);
        }
    }
    let of_little = order.iter().filter(|tenant| *tenant == "little").count();
    assert_eq!(of_little, 4, "they take turns, though one came later: {order:?}");
}

#[test]
fn a_tenant_runs_and_waits_for_no_more_than_it_may() {
    let limited = TenantLimits { max_running: Some(1), max_queued: Some(2), ..TenantLimits::default() };
    let mut cluster = cluster(&[("a", limited)]);
    let ask = |cluster: &mut Cluster, tenant: &str| {
        let submission = submission(cluster, tenant, 4);
        cluster.submit(submission)
    };
    let first = ask(&mut cluster, "a").unwrap().id;
    let tasks = cluster.tasks();
    ask(&mut cluster, "a").unwrap();
    ask(&mut cluster, "a").unwrap();
    assert!(cluster.tasks().is_empty(), "there is room, but not for a second one of theirs");
    let refused = ask(&mut cluster, "a").unwrap_err();
    assert!(matches!(&refused, Error::TenantQueueFull { tenant, limit: 2 } if tenant == "a"), "{refused}");
    ask(&mut cluster, "b").unwrap();
    assert_eq!(cluster.tasks().len(), 3, "another's starts");
    for task in tasks.iter().rev() {
        cluster.start(task);
        cluster.finish(task);
    }
    assert!(cluster.state.job(&first).unwrap().finish_time.is_some());
    assert_eq!(cluster.tasks().len(), 3, "the next of theirs does");
    cluster.apply(limits(&[]));
    assert_eq!(cluster.tasks().len(), 0, "both slots are taken");
    assert!(ask(&mut cluster, "a").is_ok() && ask(&mut cluster, "a").is_ok(), "there is no limit any more");
}

#[test]
fn a_request_id_is_its_tenants_alone() {
    let mut cluster = cluster(&[]);
    let mine = submission(&mut cluster, "a", 4);
    let first = cluster.submit(mine.clone()).unwrap();
    let theirs = Submission { tenant: "b".into(), job_id: "other".into(), ..mine.clone() };
    assert_eq!(cluster.submit(theirs).unwrap().id, "other");
    assert_eq!(cluster.submit(Submission { job_id: "again".into(), ..mine }).unwrap().id, first.id);
    assert!(cluster.state.check_owner("a", &first.id).is_ok());
    assert!(matches!(cluster.state.check_owner("b", &first.id), Err(Error::JobNotFound(_))));
    let operator = Viewer { tenant: "operations", is_operator: true };
    let seen = cluster.state.job_seen_by(operator, &first.id).unwrap();
    assert_eq!((seen.tenant.as_str(), seen.spec.unwrap().prompt.as_str()), ("a", ""), "everybody's jobs, without prompts");
    assert_eq!(cluster.state.job_seen_by("a", &first.id).unwrap().spec.unwrap().prompt, "a red car");
    let listed = |tenant: &str| cluster.state.jobs(tenant, 10, "").unwrap().0.into_iter().map(|job| job.id).collect::<Vec<_>>();
    assert_eq!((listed("a"), listed("b"), listed("")), (vec![first.id], vec!["other".to_owned()], vec![]));
}

#[test]
fn a_full_queue_refuses_the_tenant_that_filled_it_and_no_other() {
    let limits = Limits { queued_jobs: 100, ..Limits::default() };
    let mut cluster = Cluster::with(|_| {}, limits);
    cluster.join("w1");
    cluster.describe("w1");
    let mut send = |tenant: &str| {
        let submission = Submission { tenant: tenant.into(), ..cluster.submission() };
        cluster.submit(submission).map(drop)
    };
    for _ in 0..100 {
        send("flood").unwrap();
    }
    assert!(matches!(send("flood"), Err(Error::QueueFull(100))));
    for _ in 0..50 {
        send("quiet").unwrap();
    }
    assert!(matches!(send("quiet"), Err(Error::QueueFull(100))), "its share of two");
}

#[test]
fn a_flood_makes_nobody_elses_deadline_unreachable() {
    let mut cluster = cluster(&[]);
    let send = |cluster: &mut Cluster, tenant: &str, timeout: Option<Millis>| {
        let submission = Submission { tenant: tenant.into(), timeout, ..cluster.submission() };
        cluster.submit(submission).map(drop)
    };
    send(&mut cluster, "flood", None).unwrap();
    cluster.tick(SERVICE);
    cluster.tasks().iter().rev().for_each(|task| cluster.finish(task));
    for _ in 0..100 {
        send(&mut cluster, "flood", None).unwrap();
    }
    let hasty = Some(3 * SERVICE);
    assert!(matches!(send(&mut cluster, "flood", hasty), Err(Error::DeadlineUnreachable { .. })));
    send(&mut cluster, "quiet", hasty).unwrap();
}

#[test]
fn replicas_shorten_the_time_a_job_is_expected_to_take() {
    let predicted = |replicas: u32| {
        let change = |model: &mut ModelConfig| {
            model.max_jobs = 1;
            for component in ["text_encoder", "transformer", "vae"] {
                let layout = model.components.get(component).cloned().unwrap_or_default();
                model.components.insert(component.into(), crate::models_file::ComponentConfig { tp: 1, replicas, ..layout });
            }
        };
        let mut cluster = Cluster::with(change, Limits::default());
        (0..replicas).for_each(|worker| cluster.join(&format!("w{worker}")));
        cluster.describe("w0");
        cluster.all_ready();
        cluster.new_job();
        cluster.tick(SERVICE);
        cluster.tasks().iter().rev().for_each(|task| cluster.finish(task));
        for _ in 0..replicas + 8 {
            cluster.new_job();
        }
        let hasty = Submission { timeout: Some(1), ..cluster.submission() };
        match cluster.submit(hasty) {
            Err(Error::DeadlineUnreachable { predicted, .. }) => predicted,
            other => panic!("{other:?}"),
        }
    };
    assert_eq!((predicted(1), predicted(4)), (9 * SERVICE, 3 * SERVICE));
}
