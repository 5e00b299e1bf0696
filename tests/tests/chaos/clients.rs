//! Many clients at once, and a coordinator that is killed under them.

use std::collections::BTreeMap;

use proto::v1::job_event::Kind;
use proto::v1::{CreateJobRequest, JobEvent, ListJobsRequest};
use tests::cluster::{Client, Cluster, PATIENCE};
use tokio::task::JoinSet;

use crate::{long, models, row, sha256, spec};

/// Of one client. What was told before the kill is not told again, and all that follows comes in order.
async fn follow(mut client: Client, job_id: String) -> Vec<JobEvent> {
    client.follow(&job_id, 0).await
}

#[tokio::test]
async fn watchers_go_on_where_they_were_when_the_coordinator_is_replaced() {
    let watchers = if long() { 1000 } else { 200 };
    let mut cluster = Cluster::start(&models(), &["", "", "", ""], None);
    let mut client = cluster.ready().await;
    let undisturbed = sha256(&client.run(spec(200)).await);
    let mut jobs = vec![];
    for _ in 0..4 {
        jobs.push(client.create(spec(200)).await.unwrap().id);
    }
    let mut following = JoinSet::new();
    for watcher in 0..watchers {
        following.spawn(follow(client.clone(), jobs[watcher % jobs.len()].clone()));
    }
    client.watch(&jobs[0], 0, |event| crate::denoise_step(event).is_some_and(|step| step >= 20)).await;
    cluster.restart_coordinator();
    let mut events = 0;
    while let Some(followed) = tokio::time::timeout(PATIENCE * 2, following.join_next()).await.expect("watchers end") {
        let followed = followed.unwrap();
        assert!(followed.windows(2).all(|pair| pair[0].sequence < pair[1].sequence), "an event was told twice, or late");
        let ends: Vec<_> = followed.iter().filter_map(over).collect();
        assert!(matches!(ends.as_slice(), [sha] if *sha == undisturbed), "the end is told once: {ends:?}");
        events += followed.len();
    }
    row("streams that were open when the coordinator was killed", watchers);
    row("events they were told; none twice, none out of order", events);
}

/// The picture, of the event that tells of it.
fn over(event: &JobEvent) -> Option<String> {
    match &event.kind {
        Some(Kind::StateChanged(job)) if job.finish_time.is_some() => Some(sha256(job)),
        _ => None,
    }
}

#[tokio::test]
async fn a_request_that_is_repeated_across_a_kill_is_one_job() {
    const CLIENTS: usize = 64;
    let requests = if long() { 10_000 } else { 512 };
    let mut cluster = Cluster::start(&models(), &[], None);
    let client = cluster.client().await;
    // A coordinator takes jobs for a model only once a worker has told what it takes.
    cluster.add_worker("");
    let known = async || client.clone().models().await.iter().all(|model| model.card.is_some()).then_some(());
    tests::cluster::eventually("the model is known", known).await;
    let ids: Vec<String> = (0..requests).map(|_| uuid::Uuid::new_v4().to_string()).collect();
    // Each id twice, by different clients, the second half of them after the kill.
    let mut submitting = JoinSet::new();
    for index in 0..CLIENTS {
        let mine: Vec<String> = ids.iter().skip(index % (CLIENTS / 2)).step_by(CLIENTS / 2).cloned().collect();
        submitting.spawn(submit_all(client.clone(), mine));
    }
    let accepted = async || {
        let request = ListJobsRequest { page_size: 1000, ..ListJobsRequest::default() };
        let listed = client.clone().jobs.list_jobs(request).await.ok()?.into_inner().jobs;
        (listed.len() >= requests.min(1000) / 2).then_some(())
    };
    tests::cluster::eventually("half of them are accepted", accepted).await;
    cluster.restart_coordinator();
    let mut jobs: BTreeMap<String, String> = BTreeMap::new();
    let mut answers = 0;
    while let Some(given) = tokio::time::timeout(PATIENCE * 4, submitting.join_next()).await.expect("clients end") {
        for (request, job) in given.unwrap() {
            answers += 1;
            let first = jobs.entry(request.clone()).or_insert_with(|| job.clone());
            assert_eq!(*first, job, "request {request} is two jobs");
        }
    }
    assert_eq!((jobs.len(), answers), (requests, 2 * requests));
    row("requests, each submitted twice by racing clients across a kill", requests);
    row("jobs that came of them", jobs.values().collect::<std::collections::BTreeSet<_>>().len());
}

/// Submits until each is accepted; what each came to.
async fn submit_all(mut client: Client, requests: Vec<String>) -> Vec<(String, String)> {
    let mut jobs = Vec::new();
    for request_id in requests {
        let request = CreateJobRequest { request_id: request_id.clone(), spec: Some(spec(1)), ..CreateJobRequest::default() };
        let deadline = tokio::time::Instant::now() + PATIENCE;
        let job = loop {
            match client.jobs.create_job(request.clone()).await {
                Ok(created) => break created.into_inner().job.unwrap(),
                Err(status) => assert!(tokio::time::Instant::now() < deadline, "{request_id} is not accepted: {status}"),
            }
            tokio::time::sleep(std::time::Duration::from_millis(50)).await;
        };
        jobs.push((request_id, job.id));
    }
    jobs
}
