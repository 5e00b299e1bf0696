//! etcd is away, and what it is asked to keep.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::{Duration, Instant};

use proto::v1::JobState;
use tests::cluster::{Client, Cluster, PATIENCE};
use tests::etcd::{Etcd, Members};

use crate::{denoise_step, long, models, row, sha256, spec};

/// Puts that a job may cost etcd.
const PUTS_PER_JOB: u64 = 3;

#[tokio::test]
async fn an_etcd_that_is_away_costs_no_job() {
    const STEPS: u32 = 400;
    let away = Duration::from_secs(if long() { 60 } else { 8 });
    let mut etcd = Etcd::start();
    let mut cluster = Cluster::start(&models(), &["", "", "", "", ""], Some(&etcd.url));
    let mut client = cluster.ready().await;
    let undisturbed = sha256(&client.run(spec(STEPS)).await);
    let mut jobs = vec![];
    for _ in 0..6 {
        jobs.push(client.create(spec(STEPS)).await.unwrap().id);
    }
    client.watch(&jobs[0], 0, |event| denoise_step(event).is_some_and(|step| step >= 20)).await;

    etcd.process.kill();
    let gone = Instant::now();
    let mut ended = 0;
    while gone.elapsed() < away {
        ended += u32::from(cluster.supervise());
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    etcd.restart();
    let back = Instant::now();
    let mut client = loop {
        ended += u32::from(cluster.supervise());
        if let Ok(mut client) = tokio::time::timeout(Duration::from_secs(1), Client::connect(&cluster.address)).await
            && client.models().await.iter().any(|model| model.ready)
        {
            break client;
        }
        assert!(back.elapsed() < PATIENCE, "nobody leads, though etcd is back");
        tokio::time::sleep(Duration::from_millis(100)).await;
    };
    let ready = back.elapsed();
    let mut tries = 0;
    for job in &jobs {
        let job = client.finish(job).await;
        assert_eq!(sha256(&job), undisturbed);
        tries = tries.max(job.attempt);
    }
    row("etcd was away (s); every job has its picture, the same bytes", away.as_secs());
    row("times that a coordinator ended and was started again", ended);
    row("time from its return until the model is ready (ms)", ready.as_millis());
    row("most tries of a job", tries);
}

#[tokio::test]
async fn a_job_costs_etcd_three_puts_at_most() {
    let jobs: u64 = if long() { 10_000 } else { 60 };
    let etcd = Etcd::start();
    let cluster = Cluster::start(&models(), &["", "", "", ""], Some(&etcd.url));
    let mut client = cluster.ready().await;
    let before = puts(&etcd.url);
    let mut created = vec![];
    for _ in 0..jobs {
        created.push(client.create(spec(4)).await.unwrap().id);
    }
    for job in &created {
        assert_eq!(client.finish(job).await.state(), JobState::Succeeded);
    }
    let puts = puts(&etcd.url) - before;
    row("jobs with etcd", jobs);
    row("puts of etcd for each (its own metrics)", format!("{:.2}", puts as f64 / jobs as f64));
    assert!(puts <= PUTS_PER_JOB * jobs, "{puts} puts for {jobs} jobs");
}

/// Of three members each in turn is out of reach, also the one that the coordinator keeps its lease with: it asks the others, and
/// goes on leading.
#[tokio::test]
async fn a_member_of_etcd_that_is_out_of_reach_changes_no_leader() {
    const STEPS: u32 = 400;
    let rounds = if long() { 10 } else { 1 };
    let etcd = Members::start().await;
    let mut cluster = Cluster::start(&models(), &["", "", "", "", ""], Some(&etcd.urls));
    let mut client = cluster.ready().await;
    let undisturbed = sha256(&client.run(spec(STEPS)).await);
    for proxy in etcd.proxies.iter().cycle().take(3 * rounds) {
        let job = client.create(spec(STEPS)).await.unwrap().id;
        client.watch(&job, 0, |event| denoise_step(event).is_some_and(|step| step >= 20)).await;
        proxy.stall(true);
        // Longer than any lease: the coordinator's has 3 s, a worker's 5.
        let cut_off = Instant::now();
        while cut_off.elapsed() < Duration::from_secs(7) {
            let job = client.create(spec(4)).await.unwrap().id;
            assert_eq!(client.finish(&job).await.attempt, 1);
        }
        let job = client.finish(&job).await;
        assert_eq!((sha256(&job), job.attempt), (undisturbed.clone(), 1));
        assert!(!cluster.supervise(), "the coordinator has ended");
        proxy.stall(false);
    }
    row("times that a member of etcd was out of reach for 7 s; the same leader, every job in its first try", 3 * rounds);
}

/// As etcd itself counts them.
fn puts(url: &str) -> u64 {
    let address = url.strip_prefix("http://").unwrap();
    let mut stream = TcpStream::connect(address).unwrap();
    write!(stream, "GET /metrics HTTP/1.0\r\nHost: {address}\r\n\r\n").unwrap();
    let mut text = String::new();
    stream.read_to_string(&mut text).unwrap();
    let names = ["etcd_mvcc_put_total ", "etcd_debugging_mvcc_put_total "];
    let value = text.lines().find_map(|line| names.iter().find_map(|name| line.strip_prefix(name)));
    value.expect("etcd counts its puts").parse::<f64>().unwrap() as u64
}
