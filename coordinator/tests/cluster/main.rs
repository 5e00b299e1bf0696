//! A whole coordinator over real sockets, with workers that only pretend to draw.
#![allow(clippy::unwrap_used)] // clippy.toml allows it in tests, and takes only functions marked #[test] for tests

mod etcd;
mod fake_worker;
mod harness;
mod room;

use proto::v1::{CancelJobRequest, CreateJobRequest, JobSpec, JobState, ListModelsRequest, ListWorkersRequest, job_event::Kind};
use tonic::Code;
use tonic_health::pb::{HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient};
use tonic_types::StatusExt;

use crate::{
    fake_worker::{FakeWorker, Pace, picture},
    harness::{Coordinator, sequences, spec, terminal},
};

#[tokio::test]
async fn a_job_goes_from_its_prompt_to_its_picture() {
    let coordinator = Coordinator::start().await;
    let _workers = [FakeWorker::start(&coordinator, "w1", Pace::Run), FakeWorker::start(&coordinator, "w2", Pace::Run)];
    coordinator.until_ready().await;
    let job = coordinator.create(spec()).await;
    assert_eq!(job.state(), JobState::Queued);
    let events = coordinator.watch(&job.id, 0).await;
    assert_eq!(sequences(&events), (1..=events.len() as u64).collect::<Vec<_>>());
    let done = terminal(&events);
    assert_eq!(done.state(), JobState::Succeeded);
    assert_eq!(coordinator.download(&done.images[0].blob_id).await, picture());
    let stages: Vec<_> = events
        .iter()
        .filter_map(|event| match &event.kind {
            Some(Kind::StageStarted(started)) => Some(started.stage.as_str()),
            _ => None,
        })
        .collect();
    assert_eq!(stages, ["encode_text", "denoise", "decode"]);
    let steps = events.iter().filter(|event| matches!(event.kind, Some(Kind::StageProgress(_)))).count();
    assert_eq!(steps, 4);
}

#[tokio::test]
async fn a_watch_resumes_after_any_event_without_gap_or_duplicate() {
    let coordinator = Coordinator::start().await;
    let _workers = [FakeWorker::start(&coordinator, "w1", Pace::Run), FakeWorker::start(&coordinator, "w2", Pace::Run)];
    coordinator.until_ready().await;
    let job = coordinator.create(spec()).await;
    let whole = coordinator.watch(&job.id, 0).await;
    for after in 0..=whole.len() {
        let rest = coordinator.watch(&job.id, after as u64).await;
        assert_eq!(rest, whole[after..], "after {after}");
    }
}

#[tokio::test]
async fn a_killed_workers_job_is_done_by_those_that_are_left() {
    let coordinator = Coordinator::start().await;
    let first = FakeWorker::start(&coordinator, "w1", Pace::HoldDenoise);
    let second = FakeWorker::start(&coordinator, "w2", Pace::HoldDenoise);
    coordinator.until_ready().await;
    let job = coordinator.create(spec()).await;
    coordinator.until_stage(&job.id, "denoise").await;
    first.set_pace(Pace::Run);
    drop(second);
    let _third = FakeWorker::start(&coordinator, "w3", Pace::Run);
    let events = coordinator.watch(&job.id, 0).await;
    let done = terminal(&events);
    assert_eq!((done.state(), done.attempt), (JobState::Succeeded, 2));
    let why = events.iter().find_map(|event| match &event.kind {
        Some(proto::v1::job_event::Kind::Requeued(requeued)) => Some(requeued.clone()),
        _ => None,
    });
    let why = why.unwrap();
    assert_eq!(why.reason, "GROUP_LOST");
    // Whichever of its groups is lost first is named: the end of its text task may not have been told yet.
    assert!(why.message.starts_with("group emoji/") && why.message.contains("worker w2 left"), "{}", why.message);
}

#[tokio::test]
async fn a_running_job_stops_when_it_is_cancelled() {
    let coordinator = Coordinator::start().await;
    let _workers = ["w1", "w2"].map(|id| FakeWorker::start(&coordinator, id, Pace::HoldDenoise));
    coordinator.until_ready().await;
    let job = coordinator.create(spec()).await;
    coordinator.until_stage(&job.id, "denoise").await;
    coordinator.jobs().cancel_job(CancelJobRequest { job_id: job.id.clone() }).await.unwrap();
    assert_eq!(terminal(&coordinator.watch(&job.id, 0).await).state(), JobState::Cancelled);
}

#[tokio::test]
async fn refusals_say_what_is_wrong_in_a_way_programs_understand() {
    let coordinator = Coordinator::start().await;
    let refusal = async |spec: JobSpec, request_id: &str| {
        let request = CreateJobRequest { request_id: request_id.into(), spec: Some(spec), ..CreateJobRequest::default() };
        let status = coordinator.jobs().create_job(request).await.unwrap_err();
        let details = status.get_error_details();
        let fields = details.bad_request().map(|bad| bad.field_violations.clone()).unwrap_or_default();
        let fields: Vec<String> = fields.into_iter().map(|violation| violation.field).collect();
        (status.code(), details.error_info().unwrap().reason.clone(), fields)
    };
    assert_eq!(refusal(spec(), "").await, (Code::Unavailable, "MODEL_NOT_READY".into(), vec![]));
    let _worker = FakeWorker::start(&coordinator, "w1", Pace::Run);
    coordinator.until("the card is known", async || coordinator.models().await[0].card.is_some()).await;
    let unknown = JobSpec { model: "other".into(), ..spec() };
    assert_eq!(refusal(unknown, "").await, (Code::NotFound, "MODEL_NOT_FOUND".into(), vec![]));
    let wrong = JobSpec { width: Some(1), strength: Some(0.5), image_blob_id: "0".repeat(64), ..spec() };
    let fields = ["spec.strength", "spec.image_blob_id", "spec.image_blob_id", "spec.width"].map(String::from).to_vec();
    assert_eq!(refusal(wrong, "").await, (Code::InvalidArgument, "INVALID_REQUEST".into(), fields));
    assert_eq!(refusal(spec(), "no uuid").await.2, ["request_id"]);
}

#[tokio::test]
async fn a_retried_request_is_the_same_job() {
    let coordinator = Coordinator::start().await;
    let _worker = FakeWorker::start(&coordinator, "w1", Pace::Run);
    coordinator.until("the card is known", async || coordinator.models().await[0].card.is_some()).await;
    let id = "6fa459ea-ee8a-4ca4-894e-db77e160355e";
    let request = |spec| CreateJobRequest { request_id: id.to_owned(), spec: Some(spec), ..CreateJobRequest::default() };
    let first = coordinator.jobs().create_job(request(spec())).await.unwrap().into_inner();
    let again = coordinator.jobs().create_job(request(spec())).await.unwrap().into_inner();
    assert_eq!(first.job.unwrap().id, again.job.unwrap().id);
    let other = JobSpec { seed: Some(1), ..spec() };
    let status = coordinator.jobs().create_job(request(other)).await.unwrap_err();
    assert_eq!(status.code(), Code::AlreadyExists);
}

#[tokio::test]
async fn health_tells_when_a_model_is_ready() {
    let coordinator = Coordinator::start().await;
    let health = HealthClient::new(coordinator.channel());
    let serving = async |service: &str| {
        let request = HealthCheckRequest { service: service.to_owned() };
        health.clone().check(request).await.unwrap().into_inner().status()
    };
    assert_eq!(serving("").await, ServingStatus::Serving);
    assert_eq!(serving("atelier.v1.JobService").await, ServingStatus::Serving);
    assert_eq!(serving("model/emoji").await, ServingStatus::NotServing);
    let workers = ["w1", "w2"].map(|id| FakeWorker::start(&coordinator, id, Pace::Run));
    coordinator.until("the model is served", async || serving("model/emoji").await == ServingStatus::Serving).await;
    drop(workers);
    coordinator.until("the model is gone", async || serving("model/emoji").await == ServingStatus::NotServing).await;
}

#[tokio::test]
async fn operators_see_models_groups_and_workers() {
    let coordinator = Coordinator::start().await;
    let _workers = ["w1", "w2"].map(|id| FakeWorker::start(&coordinator, id, Pace::Run));
    coordinator.until_ready().await;
    let mut cluster = coordinator.cluster();
    let models = cluster.list_models(ListModelsRequest {}).await.unwrap().into_inner().models;
    let groups: Vec<_> = models[0].groups.iter().map(|group| (group.group_id.as_str(), group.worker_ids.len())).collect();
    assert_eq!(groups, [("emoji/text_encoder/0", 1), ("emoji/transformer/0", 2), ("emoji/vae/0", 1)]);
    let workers = cluster.list_workers(ListWorkersRequest {}).await.unwrap().into_inner().workers;
    assert_eq!(workers.iter().map(|worker| worker.ranks.len()).sum::<usize>(), 4);
}

#[tokio::test]
async fn a_coordinator_that_stops_ends_its_streams_and_returns() {
    let coordinator = Coordinator::start().await;
    let _workers = ["w1", "w2"].map(|id| FakeWorker::start(&coordinator, id, Pace::HoldDenoise));
    coordinator.until_ready().await;
    let job = coordinator.create(spec()).await;
    coordinator.until_stage(&job.id, "denoise").await;
    let mut watch = coordinator.open_watch(&job.id, 0).await;
    coordinator.stop().await;
    let end = loop {
        match watch.message().await {
            Ok(Some(_)) => {}
            Ok(None) => panic!("the job is not over"),
            Err(status) => break status,
        }
    };
    assert_eq!(end.code(), Code::Unavailable);
}
