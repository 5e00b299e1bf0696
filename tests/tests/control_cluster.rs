//! Controls through real processes: named in models.toml, checked by a worker, refused by field, drawn with, and gone on with after a loss.
#![allow(clippy::unwrap_used)] // helpers of tests are tests

use std::path::{Path, PathBuf};

use proto::v1::{Control, JobSpec};
use tests::cluster::{Cluster, sha256, survives_losses, tiny_flux};
use tonic_types::StatusExt;

/// A run long enough to be disturbed in the middle.
const STEPS: u32 = 200;

fn golden(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("golden").join(path)
}

/// The tiny FLUX with its transformer cut, a network with modes, one without, and one of another family.
fn models() -> String {
    let mut text = format!(
        "[[model]]\nname = \"tiny\"\npath = \"{}\"\nmax_batch = 8\n[model.components.transformer]\ntp = 2\nblock_ranges = 2\n",
        tiny_flux().display()
    );
    for (name, path) in [
        ("union", "flux_controlnet_union/controlnet"),
        ("tile", "flux_controlnet/controlnet"),
        ("foreign", "sd15_controlnet/controlnet"),
    ] {
        text += &format!("[[control]]\nname = \"{name}\"\npath = \"{}\"\nmodels = [\"tiny\"]\n", golden(path).display());
    }
    text
}

fn job(steps: u32, controls: Vec<Control>) -> JobSpec {
    JobSpec {
        model: "tiny".into(),
        prompt: "a red fox".into(),
        width: Some(48),
        height: Some(32),
        num_inference_steps: Some(steps),
        seed: Some(7),
        max_sequence_length: Some(16),
        controls,
        ..Default::default()
    }
}

fn control(name: &str, image: &str, mode: Option<u32>) -> Control {
    Control { name: name.into(), image_blob_id: image.into(), mode, ..Control::default() }
}

#[tokio::test]
async fn a_job_with_controls_goes_on_after_a_lost_worker_and_a_lost_coordinator_with_the_same_bits() {
    let mut cluster = Cluster::start(&models(), &["", "", "", ""], None);
    let mut client = cluster.ready().await;
    let image = client.upload(std::fs::read(golden("flux_controlnet/control_image.png")).unwrap()).await;
    let spec = job(STEPS, vec![control("union", &image, Some(2))]);
    let undisturbed = sha256(&client.run(spec.clone()).await);
    assert_ne!(undisturbed, sha256(&client.run(job(STEPS, vec![])).await));
    assert_ne!(undisturbed, sha256(&client.run(job(STEPS, vec![control("union", &image, Some(3))])).await));
    survives_losses(&mut cluster, spec, &undisturbed).await;
}

#[tokio::test]
async fn controls_are_in_the_card_and_what_cannot_be_is_refused_by_field() {
    let cluster = Cluster::start(&models(), &["", "", "", ""], None);
    let mut client = cluster.ready().await;
    let card = client.models().await.remove(0).card.unwrap();
    let named = |name: &str| card.controls.iter().find(|network| network.name == name).unwrap();
    assert_eq!((named("union").modes, named("union").problem.as_str(), named("union").digest.len()), (6, "", 64));
    assert_eq!((named("tile").modes, named("tile").class.as_str()), (0, "FluxControlNetModel"));
    assert!(named("foreign").problem.contains("ControlNetModel with a FluxPipeline"), "{}", named("foreign").problem);
    let image = client.upload(std::fs::read(golden("flux_controlnet/control_image.png")).unwrap()).await;
    let nothing = "b".repeat(64);
    for (controls, field) in [
        (vec![control("nobody", &image, None)], "spec.controls[0].name"),
        (vec![control("foreign", &image, None)], "spec.controls[0].name"),
        (vec![control("../tile", &image, None)], "spec.controls[0].name"),
        (vec![control("tile", &image, None), control("union", &image, None)], "spec.controls[1].mode"),
        (vec![control("tile", &nothing, None)], "spec.controls[0].image_blob_id"),
        (vec![control("tile", "../../etc/passwd", None)], "spec.controls[0].image_blob_id"),
    ] {
        let status = client.create(job(2, controls)).await.unwrap_err();
        let details = status.get_error_details();
        let fields: Vec<&str> =
            details.bad_request().iter().flat_map(|b| b.field_violations.iter().map(|v| v.field.as_str())).collect();
        assert_eq!(fields, [field], "{status}");
    }
    // What only its bytes show is the job's failure.
    let torn = client.upload(b"no picture at all".to_vec()).await;
    let failure = client.run(job(2, vec![control("tile", &torn, None)])).await.failure.unwrap();
    assert_eq!((failure.reason.as_str(), failure.stage.as_str()), ("INVALID_IMAGE", "encode_image"), "{}", failure.message);
}
