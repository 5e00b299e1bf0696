//! Models that work on pixels, through real processes: DeepFloyd IF stage by stage, and LaMa, which has no prompt.
#![allow(clippy::unwrap_used)] // helpers of tests are tests

use std::path::{Path, PathBuf};

use models::image_io::{PictureLimits, decode_picture, in_unit_range};
use proto::v1::JobSpec;
use tests::assembled::{lama, with_text_encoder_of};
use tests::cluster::{Client, Cluster, sha256};
use tonic_types::StatusExt;

fn golden(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("golden").join(path)
}

fn model(name: &str, path: &Path) -> String {
    format!("[[model]]\nname = \"{name}\"\npath = \"{}\"\n", path.display())
}

async fn refused(client: &mut Client, job: JobSpec) -> Vec<String> {
    let status = client.create(job).await.unwrap_err();
    let details = status.get_error_details();
    details.bad_request().iter().flat_map(|b| b.field_violations.iter().map(|v| v.field.clone())).collect()
}

/// RGB of a PNG, by rows.
fn pixels(png: &[u8]) -> (usize, usize, Vec<f32>) {
    let picture = decode_picture(png, &PictureLimits::default()).unwrap();
    let (width, height) = (picture.width(), picture.height());
    let tensor = in_unit_range(&picture, width, height).unwrap();
    (width, height, tensor.permute((0, 2, 3, 1)).unwrap().flatten_all().unwrap().to_vec1().unwrap())
}

#[tokio::test]
async fn lama_fills_in_what_the_mask_covers_and_leaves_the_rest_as_it_was() {
    let folder = lama(&golden("lama_generator/model")).unwrap();
    let cluster = Cluster::start(&model("lama", folder.path()), &[""], None);
    let mut client = cluster.ready().await;
    let [image, mask] = ["image.png", "mask_image.png"].map(|file| std::fs::read(golden("lama_generator").join(file)).unwrap());
    let job = JobSpec {
        model: "lama".into(),
        image_blob_id: client.upload(image.clone()).await,
        mask_image_blob_id: client.upload(mask.clone()).await,
        ..JobSpec::default()
    };
    let done = client.run(job.clone()).await;
    let drawn = client.download(&done.images[0].blob_id).await;
    assert_eq!(sha256(&client.run(job.clone()).await), sha256(&done), "the same bits again");
    let ((w, h, before), (mask_w, mask_h, covered), (drawn_w, drawn_h, after)) = (pixels(&image), pixels(&mask), pixels(&drawn));
    assert_eq!((drawn_w, drawn_h, mask_w, mask_h), (w, h, w, h));
    let changed = |inside: bool| {
        let pairs = before.iter().zip(&after).zip(&covered);
        pairs.filter(|((a, b), covered)| a != b && (**covered > 0.5) == inside).count()
    };
    assert_eq!(changed(false), 0);
    assert!(changed(true) > 0);

    assert_eq!(refused(&mut client, JobSpec { prompt: "a fox".into(), ..job.clone() }).await, ["spec.prompt"]);
    assert_eq!(
        refused(&mut client, JobSpec { mask_image_blob_id: String::new(), ..job.clone() }).await,
        ["spec.mask_image_blob_id"]
    );
    assert_eq!(refused(&mut client, JobSpec { num_inference_steps: Some(4), ..job.clone() }).await, ["spec.num_inference_steps"]);
    let torn = client.upload(image[..image.len() / 2].to_vec()).await;
    let failure = client.run(JobSpec { image_blob_id: torn, ..job.clone() }).await.failure.unwrap();
    assert_eq!((failure.reason.as_str(), failure.stage.as_str()), ("INVALID_IMAGE", "inpaint"));
    let nothing = client.upload(b"none".to_vec()).await;
    let failure = client.run(JobSpec { mask_image_blob_id: nothing, ..job }).await.failure.unwrap();
    assert_eq!(failure.reason, "INVALID_IMAGE");
    assert!(failure.message.contains("mask_image"), "{}", failure.message);
}

#[tokio::test]
async fn deepfloyd_if_draws_and_another_of_its_stages_enlarges() {
    let first = golden("if_stage1_pipeline/pipeline");
    let enlarging = with_text_encoder_of(&golden("if_super_resolution_pipeline/pipeline"), &first).unwrap();
    let cut = "[model.components.unet]\ntp = 2\nblock_ranges = 2\ncolocate = true\n";
    let models = format!("{}{cut}{}{cut}", model("if", &first), model("if-ii", enlarging.path()));
    let cluster = Cluster::start(&models, &["", ""], None);
    let mut client = cluster.ready().await;
    let job = JobSpec {
        model: "if".into(),
        prompt: "a red fox".into(),
        width: Some(24),
        height: Some(16),
        num_inference_steps: Some(5),
        seed: Some(7),
        ..JobSpec::default()
    };
    let small = client.run(job.clone()).await;
    let small = client.download(&small.images[0].blob_id).await;
    assert_eq!(pixels(&small).0, 24);
    let larger = JobSpec {
        model: "if-ii".into(),
        width: Some(48),
        height: Some(32),
        noise_level: Some(100),
        image_blob_id: client.upload(small).await,
        ..job.clone()
    };
    let done = client.run(larger.clone()).await;
    let drawn = client.download(&done.images[0].blob_id).await;
    assert_eq!((pixels(&drawn).0, pixels(&drawn).1), (48, 32));
    let other = client.run(JobSpec { noise_level: Some(0), ..larger.clone() }).await;
    assert_ne!(sha256(&other), sha256(&done));
    assert_eq!(refused(&mut client, JobSpec { noise_level: Some(1000), ..larger.clone() }).await, ["spec.noise_level"]);
    assert_eq!(refused(&mut client, JobSpec { image_blob_id: String::new(), ..larger }).await, ["spec.image_blob_id"]);
    assert_eq!(refused(&mut client, JobSpec { noise_level: Some(1), ..job }).await, ["spec.noise_level"]);
}
