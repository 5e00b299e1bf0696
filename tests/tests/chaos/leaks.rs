//! What processes hold does not grow under load, kills, and jobs that are cancelled.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use proto::v1::{CancelJobRequest, CreateJobRequest, JobState};
use tests::cluster::{Client, Cluster, eventually};

use crate::{long, models, row, spec};

/// How often a worker is killed.
const KILL_EVERY: Duration = Duration::from_secs(5);
/// Finished jobs that are kept: soon reached, so that memory may stand still.
const KEEP_JOBS: &str = "2000";
/// Clients that draw, and those that change their mind at once.
const DRAWING: usize = 4;
const CANCELLING: usize = 2;

/// What a process holds.
#[derive(Clone, Copy, Debug)]
struct Held {
    seconds: f64,
    resident: f64,
    files: usize,
}

fn held(pid: u32, begun: Instant) -> Held {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let resident = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
    let kib: f64 = resident.trim().trim_end_matches(" kB").parse().unwrap();
    let files = std::fs::read_dir(format!("/proc/{pid}/fd")).unwrap().count();
    Held { seconds: begun.elapsed().as_secs_f64(), resident: kib / 1024.0, files }
}

/// MiB a minute, by least squares.
fn slope(samples: &[Held]) -> f64 {
    let mean = |of: fn(&Held) -> f64| samples.iter().map(of).sum::<f64>() / samples.len() as f64;
    let (time, size) = (mean(|held| held.seconds), mean(|held| held.resident));
    let over = samples.iter().map(|held| (held.seconds - time) * (held.resident - size)).sum::<f64>();
    let under = samples.iter().map(|held| (held.seconds - time).powi(2)).sum::<f64>();
    60.0 * over / under
}

fn files_below(folder: &Path) -> usize {
    let Ok(entries) = std::fs::read_dir(folder) else { return 0 };
    entries.flatten().map(|entry| if entry.path().is_dir() { files_below(&entry.path()) } else { 1 }).sum()
}

/// Draws picture after picture.
async fn draw(mut client: Client, stop: Arc<AtomicBool>, drawn: Arc<AtomicU64>) {
    while !stop.load(Ordering::Relaxed) {
        let job = client.run(spec(8)).await;
        assert_eq!(job.state(), JobState::Succeeded, "{:?}", job.failure);
        drawn.fetch_add(1, Ordering::Relaxed);
    }
}

/// Submits and cancels.
async fn cancel(mut client: Client, stop: Arc<AtomicBool>, cancelled: Arc<AtomicU64>) {
    while !stop.load(Ordering::Relaxed) {
        let request = CreateJobRequest { spec: Some(spec(8)), ..CreateJobRequest::default() };
        let job_id = client.jobs.create_job(request).await.unwrap().into_inner().job.unwrap().id;
        client.jobs.cancel_job(CancelJobRequest { job_id }).await.unwrap();
        cancelled.fetch_add(1, Ordering::Relaxed);
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_held_for_longer_than_it_is_needed() {
    let seconds = if long() { 20 * 60 } else { 20 };
    let mut cluster = Cluster::start_with(&models(), &["", "", "", ""], None, &[("ATELIER_KEEP_JOBS", KEEP_JOBS)]);
    let client = cluster.ready().await;
    let stop = Arc::new(AtomicBool::new(false));
    let [drawn, cancelled] = [(); 2].map(|()| Arc::new(AtomicU64::new(0)));
    let mut clients = tokio::task::JoinSet::new();
    (0..DRAWING).for_each(|_| drop(clients.spawn(draw(client.clone(), stop.clone(), drawn.clone()))));
    (0..CANCELLING).for_each(|_| drop(clients.spawn(cancel(client.clone(), stop.clone(), cancelled.clone()))));

    // The coordinator and the last worker live through all of it; the others are killed in turn.
    let begun = Instant::now();
    let survivors = [cluster.coordinator.0.id(), cluster.workers[3].0.id()];
    let mut samples: [Vec<Held>; 2] = Default::default();
    let mut kills = 0;
    while begun.elapsed().as_secs() < seconds {
        tokio::time::sleep(KILL_EVERY).await;
        samples.iter_mut().zip(survivors).for_each(|(samples, pid)| samples.push(held(pid, begun)));
        cluster.add_worker("");
        let last = cluster.workers.len() - 1;
        cluster.workers.swap(kills % 3, last);
        cluster.workers.pop().unwrap().kill();
        kills += 1;
    }
    stop.store(true, Ordering::Relaxed);
    while let Some(ended) = clients.join_next().await {
        ended.unwrap();
    }
    let checkpoints = cluster.data().join("objects/checkpoints");
    eventually("no checkpoint is left", async || (files_below(&checkpoints) == 0).then_some(())).await;

    row("seconds under load", begun.elapsed().as_secs());
    row("workers killed meanwhile", kills);
    row("pictures drawn", drawn.load(Ordering::Relaxed));
    row("jobs cancelled at once", cancelled.load(Ordering::Relaxed));
    for (who, samples) in ["coordinator", "surviving worker"].iter().zip(&samples) {
        // The first quarter warms up.
        let steady = &samples[samples.len() / 4..];
        let (first, last) = (steady[0], steady[steady.len() - 1]);
        row(&format!("{who}: memory at the end (MiB)"), format!("{:.1}", last.resident));
        row(&format!("{who}: growth (MiB a minute)"), format!("{:.3}", slope(steady)));
        row(&format!("{who}: open files, after warming up and at the end"), format!("{}, {}", first.files, last.files));
        if long() {
            assert!(slope(steady) < 1.0, "{who} grows: {samples:?}");
            assert!(last.files <= first.files + 16, "{who} keeps files open: {samples:?}");
        }
    }
    row("checkpoints left", 0);
}
