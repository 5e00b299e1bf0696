//! Adapters through real processes: named in models.toml, checked by a worker, refused by field, drawn with by many jobs at once.

#![allow(clippy::unwrap_used)] // helpers of tests are tests

use std::path::Path;

use models::flux_transformer::FluxTransformerConfig;
use models::model_dir::ModelDir;
use proto::v1::{JobSpec, Lora};
use tests::cluster::{Cluster, sha256, survives_losses, tiny_flux};
use tests::synthetic;
use tonic_types::StatusExt;

/// A run long enough to be disturbed in the middle.
const STEPS: u32 = 300;

/// A models.toml for the tiny FLUX with its transformer cut, and three adapters beside it, one of them torn.
fn models(dir: &Path, colocate: bool) -> String {
    let config: FluxTransformerConfig = ModelDir::open(&tiny_flux()).unwrap().config("transformer").unwrap();
    let mut text = format!(
        "[[model]]\nname = \"tiny\"\npath = \"{}\"\nmax_batch = 8\n[model.components.transformer]\ntp = 2\nblock_ranges = 2\n\
         colocate = {colocate}\n",
        tiny_flux().display()
    );
    for (name, rank, seed) in [("pixel", 4, 1), ("outline", 2, 2), ("torn", 2, 3)] {
        let path = dir.join(format!("{name}.safetensors"));
        candle_core::safetensors::save(&synthetic::flux_lora(&config, rank, 0.3, seed).unwrap(), &path).unwrap();
        text += &format!("[[adapter]]\nname = \"{name}\"\npath = \"{}\"\nmodels = [\"tiny\"]\n", path.display());
    }
    let torn = dir.join("torn.safetensors");
    let whole = std::fs::read(&torn).unwrap();
    std::fs::write(&torn, &whole[..whole.len() - 10]).unwrap();
    text + "[adapter.defaults]\nnum_inference_steps = 2\n"
}

fn job(steps: u32, loras: &[(&str, Option<f64>)]) -> JobSpec {
    JobSpec {
        model: "tiny".into(),
        prompt: "a red fox".into(),
        width: Some(48),
        height: Some(32),
        num_inference_steps: Some(steps),
        seed: Some(7),
        max_sequence_length: Some(16),
        loras: loras.iter().map(|(name, scale)| Lora { name: (*name).into(), scale: *scale }).collect(),
        ..Default::default()
    }
}

#[tokio::test]
async fn jobs_with_different_adapters_run_together_and_each_draws_what_it_draws_alone() {
    let dir = tempfile::tempdir().unwrap();
    let cluster = Cluster::start(&models(dir.path(), false), &["", "", "", ""], None);
    let mut client = cluster.ready().await;
    let jobs = [
        job(20, &[("pixel", Some(0.8))]),
        job(20, &[("outline", None)]),
        job(20, &[("outline", Some(-0.5)), ("pixel", Some(1.5))]),
        job(20, &[]),
    ];
    let mut alone = Vec::new();
    for job in &jobs {
        alone.push(sha256(&client.run(job.clone()).await));
    }
    assert!((1..4).all(|i| !alone[..i].contains(&alone[i])), "every job draws something else: {alone:?}");
    let mut together = Vec::new();
    for job in &jobs {
        together.push(client.create(job.clone()).await.unwrap().id);
    }
    for (id, alone) in together.iter().zip(&alone) {
        assert_eq!(sha256(&client.finish(id).await), *alone);
    }
}

#[tokio::test]
async fn adapters_are_in_the_card_and_what_cannot_be_is_refused_by_field() {
    let dir = tempfile::tempdir().unwrap();
    let cluster = Cluster::start(&models(dir.path(), true), &[""], None);
    let mut client = cluster.ready().await;
    let card = client.models().await.remove(0).card.unwrap();
    let pixel = card.adapters.iter().find(|adapter| adapter.name == "pixel").unwrap();
    assert_eq!(
        (pixel.components.as_slice(), pixel.problem.as_str(), pixel.digest.len()),
        (&["transformer".to_owned()][..], "", 64)
    );
    assert!(card.adapters.iter().any(|adapter| adapter.name == "torn" && adapter.problem.contains("truncated")));
    let wrong = [
        (job(2, &[("nobody", None)]), "spec.loras[0].name"),
        (job(2, &[("pixel", None), ("../../etc/passwd", None)]), "spec.loras[1].name"),
        (job(2, &[("torn", None)]), "spec.loras[0].name"),
        (job(2, &[("pixel", Some(f64::NAN))]), "spec.loras[0].scale"),
        (job(2, &[("pixel", Some(101.0))]), "spec.loras[0].scale"),
    ];
    for (spec, field) in wrong {
        let status = client.create(spec).await.unwrap_err();
        let details = status.get_error_details();
        let fields: Vec<&str> =
            details.bad_request().iter().flat_map(|b| b.field_violations.iter().map(|v| v.field.as_str())).collect();
        assert_eq!(fields, [field], "{status}");
    }
}

#[tokio::test]
async fn a_file_that_is_gone_fails_its_job_and_the_group_lives_on() {
    let dir = tempfile::tempdir().unwrap();
    let cluster = Cluster::start(&models(dir.path(), false), &["", "", "", ""], None);
    let mut client = cluster.ready().await;
    let well = sha256(&client.run(job(10, &[("pixel", None)])).await);
    std::fs::remove_file(dir.path().join("outline.safetensors")).unwrap();
    let neighbour = client.create(job(100, &[("pixel", None)])).await.unwrap();
    let failed = client.run(job(10, &[("outline", None)])).await;
    let failure = failed.failure.unwrap();
    assert_eq!((failure.reason.as_str(), failure.stage.as_str()), ("ADAPTER_UNUSABLE", "denoise"), "{}", failure.message);
    assert!(failure.message.contains("outline"), "{}", failure.message);
    let neighbour = client.finish(&neighbour.id).await;
    sha256(&neighbour);
    assert_eq!(neighbour.attempt, 1, "no group was lost");
    assert_eq!(sha256(&client.run(job(10, &[("pixel", None)])).await), well);
}

#[tokio::test]
async fn a_job_with_adapters_goes_on_after_a_lost_worker_and_a_lost_coordinator_with_the_same_bits() {
    let dir = tempfile::tempdir().unwrap();
    let mut cluster = Cluster::start(&models(dir.path(), false), &["", "", "", ""], None);
    let mut client = cluster.ready().await;
    let spec = job(STEPS, &[("pixel", Some(0.7)), ("outline", None)]);
    let undisturbed = sha256(&client.run(spec.clone()).await);
    survives_losses(&mut cluster, spec, &undisturbed).await;
}
