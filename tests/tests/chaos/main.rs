//! Chaos with real processes: kill -9 and SIGSTOP to coordinators and workers of the bundled model, by a clock that cares for
//! nothing. `CHAOS=long` makes the runs as long as the promises say; their figures are printed as a table.

//!
//! - `main.rs`: ranks, coordinators and workers are killed and restarted
//! - `etcd.rs`: etcd is away; what etcd is asked to keep
//! - `families.rs`: a rank of each family is killed at each step of its schedule
//! - `leaks.rs`: memory, files and checkpoints under kills
//! - `clients.rs`: many clients watch and repeat themselves meanwhile

#![allow(clippy::unwrap_used)] // helpers of tests are tests

mod clients;
mod etcd;
mod families;
mod leaks;

use std::path::Path;
use std::time::{Duration, Instant};

use proto::v1::job_event::Kind;
use proto::v1::{CreateJobRequest, GetJobRequest, Job, JobEvent, JobSpec};
use tests::cluster::{Client, Cluster, denoise_step, eventually, sha256};
use tonic::Code;

fn long() -> bool {
    std::env::var("CHAOS").is_ok_and(|size| size == "long")
}

fn row(what: &str, figure: impl std::fmt::Display) {
    println!("| {what:<62} | {figure:>16} |");
}

/// The bundled model, its transformer on four workers, all else wherever there is room.
fn models() -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../bundled/emoji");
    format!(
        "[[model]]\nname = \"emoji\"\npath = \"{}\"\n[model.components.transformer]\ntp = 2\nblock_ranges = 2\n",
        path.display()
    )
}

fn spec(steps: u32) -> JobSpec {
    let (prompt, num_inference_steps) = ("red heart".to_owned(), Some(steps));
    JobSpec { model: "emoji".into(), prompt, num_inference_steps, seed: Some(3), ..JobSpec::default() }
}

/// Milliseconds between two events.
fn millis_between(from: &JobEvent, to: &JobEvent) -> i64 {
    let at = |event: &JobEvent| {
        let time = event.time.as_ref().unwrap();
        time.seconds * 1000 + i64::from(time.nanos) / 1_000_000
    };
    at(to) - at(from)
}

/// Longest time without news of a job.
fn longest_gap(events: &[JobEvent]) -> i64 {
    events.windows(2).map(|pair| millis_between(&pair[0], &pair[1])).max().unwrap_or_default()
}

#[tokio::test]
async fn ranks_killed_at_every_step_and_stage_leave_the_picture_as_it_is() {
    const STEPS: u32 = 20;
    let mut cluster = Cluster::start(&models(), &["", "", "", "", ""], None);
    let mut client = cluster.ready().await;
    let undisturbed = sha256(&client.run(spec(STEPS)).await);
    // 0: while the text is encoded; STEPS: between the last step and the picture.
    let kills: Vec<u32> = if long() { (0..500).map(|i| i % (STEPS + 1)).collect() } else { vec![0, 1, 7, 13, STEPS] };
    let (mut gaps, mut repeated) = (vec![], vec![]);
    for (round, step) in kills.iter().copied().enumerate() {
        let job = client.create(spec(STEPS)).await.unwrap();
        let reached = |event: &JobEvent| match &event.kind {
            Some(Kind::StageStarted(_)) => step == 0,
            _ => denoise_step(event).is_some_and(|at| at >= step),
        };
        let seen = client.watch(&job.id, 0, reached).await;
        cluster.workers.remove(round % cluster.workers.len()).kill();
        cluster.add_worker("");
        let events = client.follow(&job.id, 0).await;
        assert_eq!(sha256(&client.finish(&job.id).await), undisturbed, "killed at step {step}");
        gaps.push(longest_gap(&events));
        let resumed = events.iter().rev().find_map(|event| match &event.kind {
            Some(Kind::StageStarted(started)) if started.stage == "denoise" && started.resumed_step > 0 => {
                Some(started.resumed_step)
            }
            _ => None,
        });
        let before = seen.iter().rev().find_map(denoise_step);
        repeated.extend(resumed.zip(before).map(|(resumed, before)| before.saturating_sub(resumed)));
    }
    row("ranks killed; every picture the same bytes", kills.len());
    row("longest time without news of a job, loading included (ms)", gaps.iter().max().unwrap());
    row("most steps that were told and then done again", repeated.iter().max().copied().unwrap_or_default());
}

#[tokio::test]
async fn coordinators_killed_under_load_lose_nothing_that_was_accepted() {
    let mut cluster = Cluster::start(&models(), &["", "", "", ""], None);
    let mut client = cluster.ready().await;
    let (kills, per_life) = if long() { (200, Duration::from_secs(2)) } else { (4, Duration::from_millis(1500)) };
    let mut accepted: Vec<Job> = vec![];
    let mut away = vec![];
    for _ in 0..kills {
        let (a, b, c) = tokio::join!(submit_for(&client, per_life), submit_for(&client, per_life), submit_for(&client, per_life));
        accepted.extend([a, b, c].concat());
        cluster.restart_coordinator();
        let killed = Instant::now();
        client = cluster.client().await;
        let first = eventually("a submit is accepted again", async || submit(&mut client).await).await;
        away.push(killed.elapsed().as_millis());
        accepted.push(first);
    }
    for job in &accepted {
        let found = client.jobs.get_job(GetJobRequest { job_id: job.id.clone() }).await;
        let found = found.unwrap_or_else(|status| panic!("{} was accepted and is lost: {status}", job.id));
        assert_eq!(found.into_inner().job.unwrap().request_id, job.request_id);
    }
    let again =
        CreateJobRequest { request_id: accepted[0].request_id.clone(), spec: Some(spec(1)), ..CreateJobRequest::default() };
    let again = client.jobs.create_job(again).await.unwrap().into_inner().job.unwrap();
    assert_eq!(again.id, accepted[0].id, "the same request is the same job, across all of it");
    row("coordinators killed (kill -9)", kills);
    row("jobs accepted; all of them known at the end", accepted.len());
    row("longest time from a kill to the next accepted job (ms)", away.iter().max().unwrap());
}

/// What was accepted of one job after the other, for so long.
async fn submit_for(client: &Client, time: Duration) -> Vec<Job> {
    let (mut client, begun, mut accepted) = (client.clone(), Instant::now(), vec![]);
    while begun.elapsed() < time {
        accepted.extend(submit(&mut client).await);
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    accepted
}

/// A job, if it was accepted.
async fn submit(client: &mut Client) -> Option<Job> {
    let request_id = uuid::Uuid::new_v4().to_string();
    let request = CreateJobRequest { request_id, spec: Some(spec(1)), ..CreateJobRequest::default() };
    match tokio::time::timeout(Duration::from_secs(5), client.jobs.create_job(request)).await {
        Ok(Ok(created)) => created.into_inner().job,
        Ok(Err(status)) => {
            assert_ne!(status.code(), Code::InvalidArgument, "{status}");
            None
        }
        Err(_) => None,
    }
}

#[tokio::test]
async fn a_rolling_restart_of_all_workers_fails_no_job() {
    let mut cluster = Cluster::start(&models(), &["", "", "", "", ""], None);
    let mut client = cluster.ready().await;
    let undisturbed = sha256(&client.run(spec(20)).await);
    let rounds = if long() { 20 } else { 1 };
    let (mut jobs, mut exits) = (vec![], vec![]);
    for _ in 0..rounds * cluster.workers.len() {
        for _ in 0..2 {
            jobs.push(client.create(spec(20)).await.unwrap().id);
        }
        cluster.add_worker("");
        let mut leaving = cluster.workers.remove(0);
        let asked = Instant::now();
        leaving.signal("TERM");
        let status = leaving.wait(Duration::from_secs(30)).expect("it exits");
        assert!(status.success(), "{status}");
        exits.push(asked.elapsed().as_millis());
    }
    for job in &jobs {
        assert_eq!(sha256(&client.finish(job).await), undisturbed);
    }
    row("workers restarted one by one under load", exits.len());
    row("jobs meanwhile; all succeeded with the same bytes", jobs.len());
    row("longest time from SIGTERM to the worker's exit (ms)", exits.iter().max().unwrap());
}
