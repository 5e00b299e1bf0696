//! A store of pictures that fills.

use coordinator::config::Limits;
use proto::v1::{CreateJobRequest, GetJobRequest, JobSpec, JobState};
use tonic::{Code, Status};
use tonic_types::StatusExt;

use crate::{
    fake_worker::{FakeWorker, Pace, picture_of},
    harness::{Coordinator, spec, terminal},
};

/// Pictures of 700,000 bytes: clients may bring eleven, ten of finished jobs are kept, and all of these are stored with one more beside them.
const LIMITS: fn() -> Limits = || Limits { blob_bytes: 1_000_000, total_blob_bytes: 16_000_000, ..Limits::default() };
const BROUGHT: u32 = 11;
const JOBS: u32 = 11;

fn assert_full(status: &Status) {
    assert_eq!(status.code(), Code::ResourceExhausted, "{status}");
    let details = status.get_error_details();
    assert_eq!(details.error_info().unwrap().reason, "BLOB_STORE_FULL");
    assert!(details.retry_info().is_some());
}

#[tokio::test]
async fn jobs_go_on_when_clients_have_filled_their_half_and_the_oldest_pictures_are_given_up() {
    let coordinator = Coordinator::start_in(None, LIMITS()).await;
    let _workers = ["w1", "w2"].map(|id| FakeWorker::start(&coordinator, id, Pace::Run));
    coordinator.until_ready().await;
    for width in 1000..1000 + BROUGHT {
        coordinator.upload(picture_of(width)).await.unwrap();
    }
    // What clients bring is refused before it takes room that results need.
    assert_full(&coordinator.upload(picture_of(1000 + BROUGHT)).await.unwrap_err());
    let mut jobs = vec![];
    for width in 64..64 + JOBS {
        let job = coordinator.create(JobSpec { width: Some(width), ..spec() }).await;
        let done = terminal(&coordinator.watch(&job.id, 0).await);
        assert_eq!((done.state(), done.attempt), (JobState::Succeeded, 1), "{:?}", done.failure);
        assert_eq!(coordinator.download(&done.images[0].blob_id).await, picture_of(width), "what was made last is there");
        jobs.push(job.id);
    }
    let mut dropped = vec![];
    for job_id in jobs {
        let job = coordinator.jobs().get_job(GetJobRequest { job_id }).await.unwrap().into_inner().job.unwrap();
        assert_eq!(job.state(), JobState::Succeeded);
        dropped.push(job.pictures_dropped);
    }
    assert_eq!(dropped, (0..JOBS).map(|job| job == 0).collect::<Vec<_>>());
    // All of it was used just now: for a picture that may be as large as any there is no room.
    let large = JobSpec { width: Some(2048), height: Some(2048), ..spec() };
    let request = CreateJobRequest { spec: Some(large), ..CreateJobRequest::default() };
    assert_full(&coordinator.jobs().create_job(request).await.unwrap_err());
}
