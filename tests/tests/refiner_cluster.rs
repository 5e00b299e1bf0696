//! Stable Diffusion XL's base model and its refiner in one job, through real processes: the picture is the reference's, whatever the cut and whoever is lost.
#![allow(clippy::unwrap_used)] // helpers of tests are tests

use std::path::{Path, PathBuf};

use models::image_io::{PictureLimits, decode_picture, in_unit_range};
use proto::v1::{JobSpec, Lora};
use tests::cluster::{Client, Cluster, eventually, sha256, survives_losses_in};
use tonic_types::StatusExt;

/// A run long enough to be disturbed in its second half.
const STEPS: u32 = 400;

fn golden(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("golden").join(path)
}

/// The base model and a refiner in these folders, as models.toml has them.
fn model(name: &str, base: &Path, refiner: &Path, components: &str) -> String {
    let (base, refiner) = (base.display(), refiner.display());
    format!("[[model]]\nname = \"{name}\"\npath = \"{base}\"\nrefiner = \"{refiner}\"\n{components}")
}

/// The golden ones.
fn refined(name: &str, components: &str) -> String {
    model(name, &golden("sdxl_txt2img/pipeline"), &golden("sdxl_refiner/pipeline"), components)
}

fn job(model: &str) -> JobSpec {
    JobSpec {
        model: model.into(),
        prompt: "a red fox sitting on a mossy stone".into(),
        width: Some(48),
        height: Some(64),
        num_inference_steps: Some(10),
        seed: Some(7),
        ..JobSpec::default()
    }
}

/// RGB of a PNG.
fn pixels(png: &[u8]) -> Vec<f32> {
    let picture = decode_picture(png, &PictureLimits::default()).unwrap();
    in_unit_range(&picture, picture.width(), picture.height()).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

async fn draw(client: &mut Client, spec: JobSpec) -> Vec<f32> {
    let done = client.run(spec).await;
    pixels(&client.download(&done.images[0].blob_id).await)
}

/// The largest from a picture that the reference drew.
fn difference(drawn: &[f32], reference: &str) -> f32 {
    let reference = pixels(&std::fs::read(golden(reference)).unwrap());
    assert_eq!(drawn.len(), reference.len());
    drawn.iter().zip(&reference).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}

#[tokio::test]
async fn the_picture_is_the_references_on_any_cut() {
    let cut = "[model.components.unet]\ntp = 2\nblock_ranges = 2\ncolocate = true\n\
        [model.components.refiner]\ntp = 2\nblock_ranges = 3\ncfg_parallel = 2\ncolocate = true\n";
    let adapter = golden("lora_sdxl_diffusers/lora.safetensors");
    let adapter = format!("[[adapter]]\nname = \"style\"\npath = \"{}\"\nmodels = [\"whole\", \"cut\"]\n", adapter.display());
    let cluster = Cluster::start(&(refined("whole", "") + &refined("cut", cut) + &adapter), &["", ""], None);
    let mut client = cluster.ready().await;
    let whole = draw(&mut client, job("whole")).await;
    // `base(denoising_end=0.8, output_type="latent")`, then `refiner(image=latents, denoising_start=0.8)`, which has the base model's
    // `text_encoder_2` and `vae`, by diffusers 0.42.1 in float32.
    let most = difference(&whole, "sdxl_refiner/base_and_refiner.png");
    assert!(most < 1.5 / 255.0, "{most}");
    assert_eq!(draw(&mut client, job("cut")).await, whole);

    // The same with an adapter, which is the base model's, and with prompts of their own for the base model's second encoder, which
    // the refiner is not told: there that encoder reads `prompt`.
    let spec = |model: &str| JobSpec {
        prompt_2: Some("watercolour".into()),
        negative_prompt: Some("dull".into()),
        negative_prompt_2: Some("noisy".into()),
        guidance_scale: Some(5.0),
        denoising_end: Some(0.6),
        loras: vec![Lora { name: "style".into(), scale: Some(0.8) }],
        ..job(model)
    };
    let whole = draw(&mut client, spec("whole")).await;
    let most = difference(&whole, "sdxl_refiner/two_prompts_and_adapter.png");
    assert!(most < 1.5 / 255.0, "{most}");
    assert_eq!(draw(&mut client, spec("cut")).await, whole);

    let two = JobSpec { num_images_per_prompt: Some(2), ..job("cut") };
    let (both, alone) = (client.run(two).await, client.run(JobSpec { denoising_end: Some(1.0), ..job("cut") }).await);
    assert_eq!(both.images.len(), 2);
    let without = pixels(&client.download(&alone.images[0].blob_id).await);
    assert_ne!(without, whole, "without the refiner it is another picture");
    assert_ne!(draw(&mut client, JobSpec { aesthetic_score: Some(1.0), ..job("cut") }).await, whole);
}

#[tokio::test]
async fn a_job_that_the_refiner_has_goes_on_after_a_lost_worker_and_a_lost_coordinator_with_the_same_bits() {
    let cut = "[model.components.refiner]\ntp = 2\nworkers = { role = \"refiner\" }\n";
    let mut cluster = Cluster::start(&refined("sdxl", cut), &["", "", "role=refiner", "role=refiner"], None);
    let mut client = cluster.ready().await;
    let spec = JobSpec { num_inference_steps: Some(STEPS), denoising_end: Some(0.5), ..job("sdxl") };
    let undisturbed = sha256(&client.run(spec.clone()).await);
    survives_losses_in("refine", "role=refiner", &mut cluster, spec, &undisturbed).await;
}

#[tokio::test]
async fn what_a_refiner_cannot_do_is_refused_by_field_and_what_is_none_by_its_folder() {
    let alone = format!("[[model]]\nname = \"refiner\"\npath = \"{}\"\n", golden("sdxl_refiner/pipeline").display());
    let models = refined("sdxl", "") + &alone;
    let cluster = Cluster::start(&models, &[""], None);
    let mut client = cluster.ready().await;
    let image = client.upload(std::fs::read(golden("sdxl_img2img/image.png")).unwrap()).await;
    let masked = JobSpec { image_blob_id: image.clone(), mask_image_blob_id: image.clone(), ..job("sdxl") };
    for (spec, field) in [
        (JobSpec { denoising_end: Some(1.5), ..job("sdxl") }, "spec.denoising_end"),
        (JobSpec { denoising_end: Some(f64::NAN), ..job("sdxl") }, "spec.denoising_end"),
        (JobSpec { negative_aesthetic_score: Some(11.0), ..job("sdxl") }, "spec.negative_aesthetic_score"),
        (masked.clone(), "spec.mask_image_blob_id"),
        (job("refiner"), "spec.image_blob_id"),
        (JobSpec { image_blob_id: image.clone(), denoising_end: Some(0.5), ..job("refiner") }, "spec.denoising_end"),
    ] {
        let status = client.create(spec).await.unwrap_err();
        let details = status.get_error_details();
        let fields: Vec<&str> =
            details.bad_request().iter().flat_map(|b| b.field_violations.iter().map(|v| v.field.as_str())).collect();
        assert_eq!(fields, [field], "{status}");
    }
    client.run(JobSpec { denoising_end: Some(1.0), ..masked }).await;
    client.run(JobSpec { image_blob_id: image, strength: Some(0.5), ..job("refiner") }).await;
    // What only the schedule shows is the job's failure, before anything is computed.
    for (end, idle) in [(0.01, "base model"), (0.999, "refiner")] {
        let failure = client.run(JobSpec { denoising_end: Some(end), ..job("sdxl") }).await.failure.unwrap();
        assert_eq!((failure.reason.as_str(), failure.stage.as_str()), ("INVALID_REQUEST", "denoise"), "{}", failure.message);
        assert!(failure.message.contains("denoising_end") && failure.message.contains(idle), "{}", failure.message);
    }
}

#[tokio::test]
async fn a_folder_that_is_no_refiner_of_the_model_is_the_models_problem() {
    let [base, flux, refiner] = ["sdxl_txt2img/pipeline", "flux_schnell_txt2img/pipeline", "sdxl_refiner/pipeline"].map(golden);
    let models = model("of-flux", &flux, &refiner, "")
        + &model("no-refiner", &base, &base, "")
        + &model("torn", &base, &base.join("unet"), "");
    let cluster = Cluster::start(&models, &[""], None);
    let mut client = cluster.client().await;
    for (name, problem) in [("of-flux", "refiner"), ("no-refiner", "text_encoder"), ("torn", "model_index.json")] {
        let said = eventually("the model's problem", async || {
            let models = client.models().await;
            // Before, it is that no worker has read it.
            models.into_iter().find(|model| model.name == name && model.problem.starts_with("worker ")).map(|model| model.problem)
        });
        let said = said.await;
        assert!(said.contains(problem), "{name}: {said}");
    }
}
