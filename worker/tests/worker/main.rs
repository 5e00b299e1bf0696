//! A worker as its coordinator sees it: real gRPC and real TCP between ranks, with a small model.

#![allow(clippy::unwrap_used)] // clippy.toml allows it in tests, and takes only functions marked #[test] for tests

mod checkpoints;
mod coordinator;
mod drain;
mod etcd;
mod health;
mod job;
mod model;
mod resume;
mod running;
mod store;
mod succession;

use std::time::{Duration, Instant};

use proto::v1::control_request::Command;
use proto::v1::control_response::Report;
use proto::v1::put_payload_request::Part;
use proto::v1::worker_service_client::WorkerServiceClient;
use proto::v1::{
    CancelTask, Destination, ForgetJob, JobSpec, LeaveGroup, PayloadHeader, PutPayloadRequest, RunTask, StageKind, TaskRef,
    TensorHeader,
};
use tonic::Code;
use tonic_types::StatusExt;

use coordinator::{Coordinator, join, until};
use running::{Running, Waits};

/// Steps of a task that is not meant to come to its end.
const ENDLESS: u32 = 10_000;

fn spec(steps: u32) -> JobSpec {
    JobSpec {
        model: "fake".into(),
        prompt: "a secret garden".into(),
        width: Some(16),
        height: Some(8),
        num_inference_steps: Some(steps),
        seed: Some(7),
        num_images_per_prompt: Some(2),
        max_sequence_length: Some(16),
        ..JobSpec::default()
    }
}

fn task(stage: &str, group_id: &str, epoch: u64) -> TaskRef {
    TaskRef { job_id: "job-1".into(), stage: stage.into(), attempt: 1, group_id: group_id.into(), epoch }
}

fn run(task: TaskRef, steps: u32) -> RunTask {
    let kind = match task.stage.as_str() {
        "encode_text" => StageKind::EncodeText,
        "encode_image" => StageKind::EncodeImage,
        "denoise" => StageKind::Denoise,
        _ => StageKind::Decode,
    };
    RunTask {
        task: Some(task),
        kind: kind.into(),
        spec: Some(spec(steps)),
        layout: "all=tp1x1".into(),
        with_pictures: kind == StageKind::EncodeImage,
        ..RunTask::default()
    }
}

/// A header that promises four floats for `task`.
fn header(task: TaskRef) -> PayloadHeader {
    let tensors = vec![TensorHeader { name: "prompt_embeds".into(), dtype: "f32".into(), shape: vec![4] }];
    let from_stage = "encode_text".into();
    PayloadHeader { task: Some(task), from_stage, kind: "conditioning".into(), tensors, sha256: vec![0; 32].into() }
}

async fn put(worker: &Running, parts: Vec<Part>) -> tonic::Status {
    let mut client = WorkerServiceClient::connect(format!("http://{}", worker.address())).await.unwrap();
    let parts = parts.into_iter().map(|part| PutPayloadRequest { part: Some(part) });
    client.put_payload(futures::stream::iter(parts)).await.unwrap_err()
}

#[tokio::test]
async fn a_job_goes_from_worker_to_worker_and_its_pictures_to_the_coordinator() {
    let coordinator = Coordinator::start().await;
    let (a, b) = (Running::start(&coordinator).await, Running::start(&coordinator).await);
    let (mut to_a, mut to_b) = (a.control().await, b.control().await);
    to_a.send(Command::JoinGroup(join("encoder", 1, "encoder", &[&a]))).await;
    to_b.send(Command::JoinGroup(join("transformer", 1, "transformer", &[&b]))).await;
    to_a.send(Command::JoinGroup(join("vae", 3, "vae", &[&a]))).await;
    to_a.ready("encoder", 1).await;
    to_b.ready("transformer", 1).await;
    to_a.ready("vae", 3).await;

    let [encode, denoise, decode] =
        [task("encode_text", "encoder", 1), task("denoise", "transformer", 1), task("decode", "vae", 3)];
    let to = |task: &TaskRef, worker: &Running| Destination { task: Some(task.clone()), address: worker.address() };
    // Upstream first, so that payloads come before the command that claims them.
    to_a.send(Command::RunTask(RunTask { outputs: vec![to(&denoise, &b)], ..run(encode.clone(), 3) })).await;
    to_a.done(&encode).await;
    let outputs = vec![to(&decode, &a)];
    to_b.send(Command::RunTask(RunTask { inputs: vec!["encode_text".into()], outputs, ..run(denoise.clone(), 3) })).await;
    // Downstream before its input.
    let decode_run = RunTask {
        inputs: vec!["denoise".into()],
        blob_address: coordinator.address(),
        model_digest: "abc".into(),
        ..run(decode.clone(), 3)
    };
    to_a.send(Command::RunTask(decode_run)).await;
    to_b.done(&denoise).await;
    let images = to_a.done(&decode).await.images;

    let started = |report: &Report| matches!(report, Report::TaskStarted(started) if started.task.as_ref() == Some(&denoise));
    assert_eq!(to_b.seen.iter().filter(|report| started(report)).count(), 1);
    let last = to_b.seen.iter().rev().find_map(|report| match report {
        Report::TaskProgress(progress) => Some((progress.step, progress.steps)),
        _ => None,
    });
    assert_eq!(last, Some((3, 3)));
    assert_eq!(images.len(), 2);
    for image in images {
        let png = coordinator.blob(&image.blob_id);
        assert_eq!((image.width, image.height, image.byte_size), (16, 8, png.len() as u64));
        assert_eq!((image.media_type.as_str(), &image.blob_id), ("image/png", &image.sha256));
        let has = |text: &str| png.windows(text.len()).any(|window| window == text.as_bytes());
        assert!(has("atelier:seed") && has("atelier:layout") && has("atelier:model_sha256"));
        assert!(!has("secret"));
    }
    a.stop().await;
    b.stop().await;
}

#[tokio::test]
async fn a_worker_registers_and_describes_models() {
    let coordinator = Coordinator::start().await;
    let worker = Running::start(&coordinator).await;
    until("the worker is registered", || coordinator.members().contains(&worker.registration)).await;
    let mut control = worker.control().await;
    let dir = tempfile::tempdir().unwrap();
    control.describe("fake", dir.path().to_str().unwrap()).await.unwrap();
    assert!(control.describe("none", "/nowhere/at/all").await.unwrap_err().contains("/nowhere/at/all"));
    worker.stop().await;
    until("the worker has signed off", || coordinator.members().is_empty()).await;
}

#[tokio::test]
async fn a_cancelled_task_says_how_far_it_was() {
    let coordinator = Coordinator::start().await;
    let worker = Running::start(&coordinator).await;
    let mut control = worker.control().await;
    control.send(Command::JoinGroup(join("g", 1, "transformer", &[&worker]))).await;
    control.ready("g", 1).await;
    let task = task("denoise", "g", 1);
    control.send(Command::RunTask(run(task.clone(), ENDLESS))).await;
    control.stepped(&task, 2).await;
    control.send(Command::CancelTask(CancelTask { task: Some(task.clone()) })).await;
    let failed = control.failed(&task).await;
    assert_eq!(failed.reason, "CANCELLED");
    assert!(failed.step >= 2, "{failed:?}");

    let waiting = TaskRef { job_id: "job-2".into(), ..task };
    control.send(Command::RunTask(RunTask { inputs: vec!["encode_text".into()], ..run(waiting.clone(), 1) })).await;
    control.send(Command::ForgetJob(ForgetJob { job_id: "job-2".into() })).await;
    assert_eq!(control.failed(&waiting).await.reason, "CANCELLED");
    worker.stop().await;
}

#[tokio::test]
async fn a_group_of_two_workers_sums_and_ends_when_one_goes() {
    let coordinator = Coordinator::start().await;
    let (a, b) = (Running::start(&coordinator).await, Running::start(&coordinator).await);
    let (mut to_a, mut to_b) = (a.control().await, b.control().await);
    for (rank, control) in [(0, &to_a), (1, &to_b)] {
        let join = proto::v1::JoinGroup { rank, ..join("pair", 4, "transformer", &[&a, &b]) };
        control.send(Command::JoinGroup(join)).await;
    }
    to_a.ready("pair", 4).await;
    to_b.ready("pair", 4).await;

    // The stage fails unless the sum over both ranks is right.
    let short = task("denoise", "pair", 4);
    to_a.send(Command::RunTask(RunTask { blob_address: coordinator.address(), ..run(short.clone(), 3) })).await;
    let failed = to_a.failed(&short).await;
    assert!(failed.message.contains("latents"), "only the hand-over fails, of latents that no blob can be: {failed:?}");
    to_a.stepped(&short, 3).await;

    let endless = TaskRef { attempt: 2, ..short };
    to_a.send(Command::RunTask(run(endless.clone(), ENDLESS))).await;
    to_a.stepped(&endless, 1).await;
    let began = Instant::now();
    b.stop().await;
    assert_eq!(to_a.lost("pair", 4).await.reason, "PEER_LOST");
    assert_eq!(to_a.failed(&endless).await.reason, "PEER_LOST");
    assert!(began.elapsed() < Duration::from_secs(5));
    assert_eq!(to_b.lost("pair", 4).await.reason, "LEFT");
    a.stop().await;
}

#[tokio::test]
async fn what_is_said_of_an_older_epoch_is_refused() {
    let coordinator = Coordinator::start().await;
    let worker = Running::start(&coordinator).await;
    let mut control = worker.control().await;
    control.send(Command::JoinGroup(join("g", 5, "transformer", &[&worker]))).await;
    control.ready("g", 5).await;
    let old = task("denoise", "g", 4);
    let refused = put(&worker, vec![Part::Header(header(old.clone()))]).await;
    assert_eq!(refused.code(), Code::FailedPrecondition);
    assert_eq!(refused.get_details_error_info().unwrap().reason, "STALE_EPOCH");
    control.send(Command::RunTask(run(old.clone(), 1))).await;
    assert_eq!(control.failed(&old).await.reason, "STALE_EPOCH");
    control.send(Command::JoinGroup(join("g", 4, "transformer", &[&worker]))).await;
    control.lost("g", 4).await;

    // A newer epoch ends the older one, and its tasks.
    let task = task("denoise", "g", 5);
    control.send(Command::RunTask(run(task.clone(), ENDLESS))).await;
    control.stepped(&task, 1).await;
    control.send(Command::JoinGroup(join("g", 6, "transformer", &[&worker]))).await;
    assert_eq!(control.lost("g", 5).await.reason, "LEFT");
    assert_eq!(control.failed(&task).await.reason, "PEER_LOST");
    control.ready("g", 6).await;
    control.send(Command::LeaveGroup(LeaveGroup { group_id: "g".into(), epoch: 6 })).await;
    assert_eq!(control.lost("g", 6).await.reason, "LEFT");
    worker.stop().await;
}

#[tokio::test]
async fn a_payload_that_is_not_whole_is_refused() {
    let coordinator = Coordinator::start().await;
    let worker = Running::start(&coordinator).await;
    let mut control = worker.control().await;
    control.send(Command::JoinGroup(join("g", 1, "transformer", &[&worker]))).await;
    control.ready("g", 1).await;
    let check = async |parts: Vec<Part>, named: &str| {
        let refused = put(&worker, parts).await;
        assert_eq!(refused.code(), Code::InvalidArgument);
        assert!(refused.message().contains(named), "`{}` does not name `{named}`", refused.message());
    };
    let header = || Part::Header(header(task("denoise", "g", 1)));
    check(vec![Part::Chunk(vec![0; 4].into())], "header").await;
    check(vec![header(), Part::Chunk(vec![0; 8].into())], "ended after 8 of 16 bytes").await;
    check(vec![header(), Part::Chunk(vec![0; 17].into())], "beyond the 16 bytes").await;
    check(vec![header(), Part::Chunk(vec![0; 16].into())], "header.sha256").await;
    worker.stop().await;
}

#[tokio::test]
async fn a_component_that_cannot_be_loaded_is_told() {
    let coordinator = Coordinator::start().await;
    let worker = Running::start(&coordinator).await;
    let mut control = worker.control().await;
    control.send(Command::JoinGroup(join("g", 1, "broken", &[&worker]))).await;
    assert_eq!(control.lost("g", 1).await.reason, "LOAD_FAILED");
    control.send(Command::JoinGroup(join("g", 2, "panics", &[&worker]))).await;
    assert_eq!(control.lost("g", 2).await.reason, "INTERNAL");
    let unknown = proto::v1::JoinGroup { products: 99, ..join("g", 3, "transformer", &[&worker]) };
    control.send(Command::JoinGroup(unknown)).await;
    let lost = control.lost("g", 3).await;
    let expected = ("LOAD_FAILED", "products: 99 is none that this worker knows");
    assert_eq!((lost.reason.as_str(), lost.message.as_str()), expected, "not silently in another way");
    control.send(Command::JoinGroup(join("g", 4, "transformer", &[&worker]))).await;
    control.ready("g", 4).await;
    let incomplete = task("denoise", "g", 4);
    let spec = JobSpec { seed: None, ..spec(1) };
    control.send(Command::RunTask(RunTask { spec: Some(spec), ..run(incomplete.clone(), 1) })).await;
    let failed = control.failed(&incomplete).await;
    assert_eq!((failed.reason.as_str(), failed.message.as_str()), ("INVALID_REQUEST", "seed: is missing"));
    worker.stop().await;
}

#[tokio::test]
async fn a_picture_is_taken_in_only_if_it_is_what_its_id_says() {
    let coordinator = Coordinator::start().await;
    let worker = Running::start(&coordinator).await;
    let mut control = worker.control().await;
    control.send(Command::JoinGroup(join("g", 1, "vae", &[&worker]))).await;
    control.ready("g", 1).await;
    // sha256 of "abc".
    let abc = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";
    let encode = |attempt: u32, blob_id: &str| {
        let task = TaskRef { attempt, ..task("encode_image", "g", 1) };
        // Nobody starts the task it goes to; that it is held is enough.
        let outputs = vec![Destination { task: Some(task.clone()), address: worker.address() }];
        let spec = JobSpec { image_blob_id: blob_id.into(), ..spec(1) };
        let run = RunTask { spec: Some(spec), outputs, blob_address: coordinator.address(), ..run(task.clone(), 1) };
        (task, Command::RunTask(run))
    };
    let (missing, command) = encode(1, abc);
    control.send(command).await;
    assert_eq!(control.failed(&missing).await.reason, "INVALID_IMAGE");
    coordinator.store(abc, b"abd");
    let (other, command) = encode(2, abc);
    control.send(command).await;
    let failed = control.failed(&other).await;
    assert!(failed.reason == "INVALID_IMAGE" && failed.message.contains("sha256"), "{failed:?}");
    coordinator.store(abc, b"abc");
    let (right, command) = encode(3, abc);
    control.send(command).await;
    control.done(&right).await;
    worker.stop().await;
}

#[tokio::test]
async fn a_coordinator_that_does_not_come_back_leaves_no_groups_behind() {
    let coordinator = Coordinator::start().await;
    let waits = Waits { orphan: Duration::from_millis(300), ..Waits::default() };
    let worker = Running::waiting(&coordinator, waits).await;
    let mut control = worker.control().await;
    control.send(Command::JoinGroup(join("g", 1, "transformer", &[&worker]))).await;
    control.ready("g", 1).await;
    drop(control);
    let stale = || async {
        let refused = put(&worker, vec![Part::Header(header(task("denoise", "g", 1)))]).await;
        refused.code() == Code::FailedPrecondition
    };
    let deadline = Instant::now() + coordinator::PATIENCE;
    while !stale().await {
        assert!(Instant::now() < deadline, "the group is still held");
    }
    worker.stop().await;
}
