//! The bundled model, through a cluster as README starts it, draws what diffusers draws.

use std::path::{Path, PathBuf};

use models::image_io::{PictureLimits, decode_picture, preprocess};
use proto::v1::{JobSpec, JobState, Lora};
use tests::cluster::Cluster;

/// One level of an 8-bit picture, in the scale of -1..1, and a little for the rounding of the comparison itself.
const ONE_LEVEL: f32 = 1.0 / 127.5 + 1e-6;

fn bundled() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../bundled")
}

#[tokio::test]
async fn a_cluster_of_five_draws_diffusers_pictures_within_one_level() {
    let path = bundled().join("emoji").canonicalize().expect("the bundled model");
    let models = std::fs::read_to_string(bundled().join("models.toml")).expect("bundled/models.toml");
    let loras = bundled().join("loras").canonicalize().expect("the bundled adapters");
    let models = models.replace("path = \"emoji\"", &format!("path = \"{}\"", path.display()));
    let models = models.replace("path = \"loras", &format!("path = \"{}", loras.display()));
    let denoiser = "role=denoiser";
    let cluster = Cluster::start(&models, &["role=encoder", denoiser, denoiser, denoiser, denoiser], None);
    let mut client = cluster.ready().await;
    let samples = [
        ("red heart", None),
        ("pizza on a blue background", None),
        ("a strawberry on a green background", None),
        ("red heart", Some(1.0)),
        ("pizza on a blue background", Some(0.8)),
    ];
    for (prompt, mono) in samples {
        let lora = |scale| Lora { name: "mono".into(), scale: Some(scale) };
        let adapters = mono.map(lora).into_iter().collect();
        let spec = JobSpec { model: "emoji".into(), prompt: prompt.into(), seed: Some(0), loras: adapters, ..Default::default() };
        let job = client.run(spec).await;
        assert_eq!(job.state(), JobState::Succeeded, "{prompt}: {:?}", job.failure);
        let drawn = client.download(&job.images[0].blob_id).await;
        let name = prompt.replace(' ', "_");
        let sample = match mono {
            None => path.join("samples").join(format!("{name}.png")),
            Some(scale) => loras.join("samples").join(format!("mono_{name}_{scale:.1}.png")),
        };
        let difference = difference(&drawn, &std::fs::read(&sample).expect("a sample of diffusers'"));
        assert!(difference <= ONE_LEVEL, "{prompt} {mono:?} differs by {} levels", difference * 127.5);
    }
}

/// models.toml for the bundled model with its transformer cut as said.
fn cut(cut: &str) -> String {
    let path = bundled().join("emoji").canonicalize().expect("the bundled model");
    format!("[[model]]\nname = \"emoji\"\npath = \"{}\"\n[model.components.transformer]\n{cut}\n", path.display())
}

#[tokio::test]
async fn two_lanes_of_processes_draw_the_same_pixels_as_one_rank() {
    let spec = JobSpec {
        model: "emoji".into(),
        prompt: "red heart".into(),
        negative_prompt: Some("blue".into()),
        num_inference_steps: Some(6),
        seed: Some(3),
        ..Default::default()
    };
    let (mut files, mut pictures) = (Vec::new(), Vec::new());
    for (layout, workers) in [("", 1), ("cfg_parallel = 2\ncolocate = true", 1), ("cfg_parallel = 2", 2)] {
        let cluster = Cluster::start(&cut(layout), &vec![""; workers], None);
        let mut client = cluster.ready().await;
        let job = client.run(spec.clone()).await;
        assert_eq!(job.state(), JobState::Succeeded, "{layout}: {:?}", job.failure);
        let groups = client.models().await.remove(0).groups;
        let ranks = groups.iter().find(|g| g.component == "transformer").map_or(0, |g| g.worker_ids.len());
        assert_eq!(ranks, if layout.is_empty() { 1 } else { 2 }, "{layout}");
        pictures.push(client.download(&job.images[0].blob_id).await);
        files.push(job.images[0].sha256.clone());
    }
    assert_eq!(files[1], files[2], "two lanes, in one process and in two");
    // The file names its layout; its pixels do not depend on it.
    assert_ne!(files[0], files[1]);
    assert!(String::from_utf8_lossy(&pictures[1]).contains("transformer=tp1x1xcfg2"));
    let pixels = |bytes: &[u8]| decode_picture(bytes, &PictureLimits::default()).expect("a PNG");
    assert!(pixels(&pictures[0]) == pixels(&pictures[1]), "the same pixels on one rank and on two lanes");
}

/// The largest difference of two PNGs of one size, in the scale of -1..1.
fn difference(a: &[u8], b: &[u8]) -> f32 {
    let tensor = |bytes: &[u8]| {
        let picture = decode_picture(bytes, &PictureLimits::default()).expect("a PNG");
        preprocess(&picture, picture.width(), picture.height()).expect("a picture")
    };
    let difference = (tensor(a) - tensor(b)).and_then(|d| d.abs()?.max_all()?.to_scalar::<f32>());
    difference.expect("pictures of one size")
}
