//! The main job through real processes: the same picture on every arrangement, lost ranks, cancelled jobs, wrong input.

#![allow(clippy::unwrap_used)] // helpers of tests are tests

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use proto::v1::job_event::Kind;
use proto::v1::{CancelJobRequest, JobEvent, JobSpec, JobState};
use tests::cluster::{Client, Cluster, denoise_step, eventually, sha256, tiny_flux};
use tests::etcd::Etcd;
use tonic::Code;
use tonic_types::StatusExt;

/// A models.toml for the tiny FLUX with its transformer cut, and what else each component's section should say.
fn models(tp: usize, block_ranges: usize, colocate: bool) -> String {
    let path = tiny_flux();
    format!(
        "[[model]]\nname = \"tiny\"\npath = \"{}\"\n[model.components.transformer]\ntp = {tp}\nblock_ranges = {block_ranges}\ncolocate = {colocate}\n",
        path.display()
    )
}

fn job(steps: u32) -> JobSpec {
    JobSpec {
        model: "tiny".into(),
        prompt: "a red fox".into(),
        width: Some(48),
        height: Some(32),
        num_inference_steps: Some(steps),
        seed: Some(7),
        max_sequence_length: Some(16),
        ..Default::default()
    }
}

/// A run long enough to be disturbed in the middle: some seconds.
const STEPS: u32 = 400;

/// Where the last try of the denoising began.
fn resumed_step(events: &[JobEvent]) -> u32 {
    let mut started = events.iter().rev().filter_map(|event| match &event.kind {
        Some(Kind::StageStarted(started)) if started.stage == "denoise" => Some(started.resumed_step),
        _ => None,
    });
    started.next().unwrap()
}

fn requeue_reason(event: JobEvent) -> Option<String> {
    match event.kind {
        Some(Kind::Requeued(requeued)) => Some(requeued.reason),
        _ => None,
    }
}

fn requeue_message(event: &JobEvent) -> Option<String> {
    match &event.kind {
        Some(Kind::Requeued(requeued)) => Some(requeued.message.clone()),
        _ => None,
    }
}

#[tokio::test]
async fn the_picture_is_the_same_on_one_worker_and_on_many_with_and_without_etcd() {
    let alone = Cluster::start(&models(1, 1, false), &[""], None);
    let solo = sha256(&alone.ready().await.run(job(4)).await);
    let several = Cluster::start(&models(1, 1, false), &["", "", ""], None);
    assert_eq!(sha256(&several.ready().await.run(job(4)).await), solo, "three processes");
    let etcd = Etcd::start();
    let registered = Cluster::start(&models(1, 1, false), &["", ""], Some(&etcd.url));
    assert_eq!(sha256(&registered.ready().await.run(job(4)).await), solo, "members by etcd");
}

#[tokio::test]
async fn a_cut_transformer_draws_the_same_in_one_process_and_in_four() {
    let together = Cluster::start(&models(2, 2, true), &[""], None);
    let one = sha256(&together.ready().await.run(job(4)).await);
    let apart = Cluster::start(&models(2, 2, false), &["", "", "", ""], None);
    let mut client = apart.ready().await;
    assert_eq!(sha256(&client.run(job(4)).await), one);
    let ranks: usize = client.workers().await.iter().map(|w| w.ranks.iter().filter(|r| r.contains("transformer")).count()).sum();
    assert_eq!(ranks, 4);
}

#[tokio::test]
async fn every_step_and_stage_is_told_once_and_in_order() {
    let cluster = Cluster::start(&models(1, 1, false), &[""], None);
    let mut client = cluster.ready().await;
    let accepted = client.create(job(6)).await.unwrap();
    let events = client.watch(&accepted.id, 0, |_| false).await;
    let sequences: Vec<u64> = events.iter().map(|e| e.sequence).collect();
    assert_eq!(sequences, (1..=events.len() as u64).collect::<Vec<_>>());
    // Progress tells the newest step; a step that is over before it could be told is left out, the last one never.
    let steps: Vec<u32> = events.iter().filter_map(denoise_step).collect();
    assert!(steps.is_sorted_by(|a, b| a < b) && steps.last() == Some(&6), "{steps:?}");
    let finished = |e: &JobEvent| match &e.kind {
        Some(Kind::StageFinished(s)) => Some(s.stage.clone()),
        _ => None,
    };
    let mut stages: Vec<String> = events.iter().filter_map(finished).collect();
    // Their reports come on several streams, each when its output is handed over and kept.
    stages.sort();
    assert_eq!(stages, ["decode", "denoise", "encode_text", "encode_text_2"]);
    let rest = client.watch(&accepted.id, 5, |_| false).await;
    assert_eq!(rest.first().map(|e| e.sequence), Some(6));
    assert_eq!(rest.len(), events.len() - 5);
}

#[tokio::test]
async fn a_killed_ranks_job_goes_on_from_its_last_saved_step_with_the_same_bits() {
    let mut cluster = Cluster::start(&models(2, 2, false), &["", "", "", ""], None);
    let mut client = cluster.ready().await;
    let undisturbed = sha256(&client.run(job(STEPS)).await);
    let running = client.create(job(STEPS)).await.unwrap();
    client.watch(&running.id, 0, |e| denoise_step(e).is_some_and(|step| step >= 50)).await;

    cluster.workers[2].kill();
    cluster.add_worker("");
    let done = client.finish(&running.id).await;
    assert_eq!(sha256(&done), undisturbed);
    // The worker may have held more than this rank, and each of its groups is lost by itself.
    assert!(done.attempt >= 2);
    assert!(resumed_step(&client.follow(&running.id, 0).await) >= 40, "what was done is not done again");
}

#[tokio::test]
async fn a_stopped_rank_is_found_by_its_silence_and_its_job_goes_on() {
    let mut cluster = Cluster::start(&models(2, 1, false), &["", ""], None);
    let mut client = cluster.ready().await;
    let undisturbed = sha256(&client.run(job(STEPS)).await);
    let running = client.create(job(STEPS)).await.unwrap();
    client.watch(&running.id, 0, |e| denoise_step(e).is_some_and(|step| step >= 50)).await;
    cluster.workers[1].signal("STOP");
    cluster.add_worker("");
    assert_eq!(sha256(&client.finish(&running.id).await), undisturbed);
}

#[tokio::test]
async fn a_running_job_goes_on_when_the_coordinator_is_killed() {
    let mut cluster = Cluster::start(&models(2, 1, false), &["", ""], None);
    let mut client = cluster.ready().await;
    let undisturbed = sha256(&client.run(job(STEPS)).await);
    let running = client.create(job(STEPS)).await.unwrap();
    let waiting = client.create(job(4)).await.unwrap();
    let seen = client.watch(&running.id, 0, |e| denoise_step(e).is_some_and(|step| step >= 50)).await;

    cluster.restart_coordinator();
    let mut client = cluster.client().await;
    let rest = client.follow(&running.id, seen.last().unwrap().sequence).await;
    let done = client.finish(&running.id).await;
    assert_eq!(sha256(&done), undisturbed);
    assert_eq!(done.attempt, 1, "the workers went on meanwhile: {rest:?}");
    let sequences: Vec<u64> = seen.iter().chain(&rest).map(|e| e.sequence).collect();
    assert!(sequences.is_sorted_by(|a, b| a < b), "no event twice");
    sha256(&client.finish(&waiting.id).await);
}

#[tokio::test]
async fn a_worker_that_is_asked_to_go_hands_its_job_over() {
    let mut cluster = Cluster::start(&models(2, 1, false), &["", ""], None);
    let mut client = cluster.ready().await;
    let undisturbed = sha256(&client.run(job(STEPS)).await);
    let running = client.create(job(STEPS)).await.unwrap();
    client.watch(&running.id, 0, |e| denoise_step(e).is_some_and(|step| step >= 50)).await;
    cluster.add_worker("");
    let asked = Instant::now();
    cluster.workers[0].signal("TERM");
    let status = cluster.workers[0].wait(Duration::from_secs(20)).expect("it exits");
    println!("it exits {:.2} s after SIGTERM", asked.elapsed().as_secs_f64());
    assert!(status.success(), "{status}");
    let done = client.finish(&running.id).await;
    assert_eq!(sha256(&done), undisturbed);
    let requeued: Vec<String> = client.follow(&running.id, 0).await.into_iter().filter_map(requeue_reason).collect();
    assert_eq!(requeued, ["DRAINED"]);
}

#[tokio::test]
async fn the_next_coordinator_takes_over_by_etcd() {
    let etcd = Etcd::start();
    let mut cluster = Cluster::start(&models(2, 1, false), &["", ""], Some(&etcd.url));
    let mut client = cluster.ready().await;
    let undisturbed = sha256(&client.run(job(STEPS)).await);
    let (_other, address) = cluster.add_coordinator();
    let running = client.create(job(STEPS)).await.unwrap();
    client.watch(&running.id, 0, |e| denoise_step(e).is_some_and(|step| step >= 50)).await;
    let killed = Instant::now();
    cluster.coordinator.kill();
    let mut client = Client::connect(&address).await;
    client.wait_ready().await;
    println!("another coordinator serves {:.1} s after its leader was killed", killed.elapsed().as_secs_f64());
    assert_eq!(sha256(&client.finish(&running.id).await), undisturbed);
}

#[tokio::test]
async fn a_cancelled_job_stops_and_its_neighbour_goes_on() {
    let cluster = Cluster::start(&models(2, 1, true), &[""], None);
    let mut client = cluster.ready().await;
    let neighbour = client.create(job(60)).await.unwrap();
    let victim = client.create(job(500)).await.unwrap();
    client.watch(&victim.id, 0, |e| denoise_step(e).is_some_and(|step| step >= 2)).await;
    client.jobs.cancel_job(CancelJobRequest { job_id: victim.id.clone() }).await.unwrap();
    assert_eq!(client.finish(&victim.id).await.state(), JobState::Cancelled);
    sha256(&client.finish(&neighbour.id).await);
}

#[tokio::test]
async fn wrong_input_is_refused_by_field_and_costs_nothing() {
    let cluster = Cluster::start(&models(1, 1, false), &[""], None);
    let mut client = cluster.ready().await;
    let refused = async |client: &mut tests::cluster::Client, spec: JobSpec| {
        let status = client.create(spec).await.unwrap_err();
        let details = status.get_error_details();
        let fields: Vec<String> =
            details.bad_request().iter().flat_map(|b| b.field_violations.iter().map(|v| v.field.clone())).collect();
        (status.code(), details.error_info().map(|i| i.reason.clone()).unwrap_or_default(), fields)
    };
    let names = |fields: &[String], field: &str| fields.iter().any(|f| f.ends_with(field));

    let (code, reason, _) = refused(&mut client, JobSpec { model: "nobody".into(), ..job(4) }).await;
    assert_eq!((code, reason.as_str()), (Code::NotFound, "MODEL_NOT_FOUND"));
    let wrong = [
        (JobSpec { num_inference_steps: Some(0), ..job(4) }, "num_inference_steps"),
        (JobSpec { width: Some(50), ..job(4) }, "width"),
        (JobSpec { width: Some(31_632), height: Some(31_632), ..job(4) }, "width"),
        (JobSpec { strength: Some(0.5), ..job(4) }, "strength"),
        (JobSpec { prompt: String::new(), ..job(4) }, "prompt"),
        (JobSpec { prompt: "x".repeat(40_000), ..job(4) }, "prompt"),
        (JobSpec { true_cfg_scale: Some(f64::NAN), ..job(4) }, "true_cfg_scale"),
        (JobSpec { image_blob_id: "../../etc/passwd".into(), ..job(4) }, "image_blob_id"),
    ];
    for (spec, field) in wrong {
        let (code, reason, fields) = refused(&mut client, spec).await;
        assert_eq!(code, Code::InvalidArgument, "{field}: {reason}");
        assert!(!reason.is_empty() && names(&fields, field), "{field}: {reason} {fields:?}");
    }
    sha256(&client.run(job(4)).await);
}

#[tokio::test]
async fn a_layout_or_checkpoint_that_cannot_be_served_is_the_models_problem() {
    let thin = Cluster::start(&models(8, 1, true), &[""], None);
    let mut client = thin.client().await;
    let problem = eventually("the layout's problem", async || {
        let models = client.models().await;
        models.first().map(|m| m.problem.clone()).filter(|p| p.contains("tp"))
    })
    .await;
    assert!(problem.contains("transformer"), "{problem}");

    let copy = tempfile::tempdir().unwrap();
    let model = copied(copy.path());
    let weights = model.join("transformer/diffusion_pytorch_model.safetensors");
    let bytes = std::fs::read(&weights).unwrap();
    std::fs::write(&weights, &bytes[..bytes.len() - 100]).unwrap();
    let text = format!("[[model]]\nname = \"torn\"\npath = \"{}\"\n", model.display());
    let torn = Cluster::start(&text, &[""], None);
    let mut client = torn.client().await;
    let problem = eventually("the torn checkpoint's problem", async || {
        let models = client.models().await;
        models.first().map(|m| m.problem.clone()).filter(|p| p.contains("safetensors"))
    })
    .await;
    assert!(problem.contains("truncated"), "{problem}");
}

/// The tiny FLUX in a folder of the test's own.
fn copied(folder: &Path) -> PathBuf {
    assert!(std::process::Command::new("cp").arg("-r").arg(tiny_flux()).arg(folder).status().unwrap().success());
    folder.join("pipeline")
}

#[tokio::test]
async fn ranks_whose_files_are_not_those_that_were_described_do_not_join_and_do_when_they_are_again() {
    let copy = tempfile::tempdir().unwrap();
    let model = copied(copy.path());
    let text = models(2, 1, false).replace(&tiny_flux().display().to_string(), &model.display().to_string());
    let mut cluster = Cluster::start(&text, &["", ""], None);
    let mut client = cluster.ready().await;
    let undisturbed = sha256(&client.run(job(4)).await);

    let weights = model.join("transformer/diffusion_pytorch_model.safetensors");
    let before = std::fs::read(&weights).unwrap();
    let other = [&before[..before.len() - 2], &[0x80, 0x3f]].concat(); // one weight is another: a checkpoint as good as any
    assert_ne!(before, other);
    std::fs::write(&weights, other).unwrap();
    cluster.workers[0].kill();
    cluster.add_worker("");
    let problem = eventually("the problem is seen", async || {
        let models = client.models().await;
        models.first().map(|m| m.problem.clone()).filter(|p| p.contains("LOAD_FAILED"))
    });
    let problem = problem.await;
    assert!(problem.contains("another `transformer`") && problem.contains(model.to_str().unwrap()), "{problem}");

    std::fs::write(&weights, before).unwrap();
    client.wait_ready().await;
    assert_eq!(sha256(&client.run(job(4)).await), undisturbed);
}

/// The epoch of each group of the only model.
async fn epochs(client: &mut Client) -> Vec<u64> {
    client.models().await[0].groups.iter().map(|group| group.epoch).collect()
}

#[tokio::test]
async fn a_control_stream_that_is_cut_costs_no_step_and_no_epoch() {
    let mut cluster = Cluster::start(&models(1, 1, false), &[], None);
    let proxy = cluster.add_worker_behind_proxy("").await;
    let mut client = cluster.ready().await;
    let undisturbed = sha256(&client.run(job(STEPS)).await);
    let before = epochs(&mut client).await;
    let running = client.create(job(STEPS)).await.unwrap();
    for step in [30, 100, 200] {
        client.watch(&running.id, 0, |e| denoise_step(e).is_some_and(|at| at >= step)).await;
        proxy.cut();
    }
    let events = client.follow(&running.id, 0).await;
    assert!(!events.iter().any(|e| matches!(e.kind, Some(Kind::Requeued(_)))), "it went on where it was");
    assert_eq!(sha256(&client.finish(&running.id).await), undisturbed);
    assert_eq!(epochs(&mut client).await, before, "no weights were read again");
}

#[tokio::test]
async fn a_worker_behind_a_dead_route_loses_its_jobs_to_another_with_the_same_bits() {
    let mut cluster = Cluster::start(&models(1, 1, false), &[], None);
    let proxy = cluster.add_worker_behind_proxy("").await;
    let mut client = cluster.ready().await;
    let undisturbed = sha256(&client.run(job(STEPS)).await);
    cluster.add_worker("");
    eventually("the second worker is there", async || (client.clone().workers().await.len() == 2).then_some(())).await;
    let running = client.create(job(STEPS)).await.unwrap();
    client.watch(&running.id, 0, |e| denoise_step(e).is_some_and(|step| step >= 30)).await;
    proxy.stall(true);
    let events = client.follow(&running.id, 0).await;
    // By its silence or by the steps it does not make, whichever is seen first; and its last states are of use to the other.
    let causes: Vec<String> = events.iter().filter_map(requeue_message).collect();
    assert!(matches!(causes.as_slice(), [cause] if cause.contains("was lost")), "{causes:?}");
    assert_eq!(sha256(&client.finish(&running.id).await), undisturbed);
}
