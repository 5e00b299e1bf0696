//! The bundled model, through a cluster as README starts it, draws what diffusers draws.

use std::path::{Path, PathBuf};

use models::image_io::{PictureLimits, decode_picture, preprocess};
use proto::v1::download_blob_response::Part;
use proto::v1::{DownloadBlobRequest, JobSpec, JobState};
use tests::cluster::{Client, Cluster};

/// One level of an 8-bit picture, in the scale of -1..1, and a little for the rounding of the comparison itself.
const ONE_LEVEL: f32 = 1.0 / 127.5 + 1e-6;

fn bundled() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../bundled")
}

#[tokio::test]
async fn a_cluster_of_five_draws_diffusers_pictures_within_one_level() {
    let path = bundled().join("emoji").canonicalize().expect("the bundled model");
    let models = std::fs::read_to_string(bundled().join("models.toml")).expect("bundled/models.toml");
    let models = models.replace("path = \"emoji\"", &format!("path = \"{}\"", path.display()));
    let denoiser = "role=denoiser";
    let cluster = Cluster::start(&models, &["role=encoder", denoiser, denoiser, denoiser, denoiser], None);
    let mut client = cluster.ready().await;
    for prompt in ["red heart", "pizza on a blue background", "a strawberry on a green background"] {
        let spec = JobSpec { model: "emoji".into(), prompt: prompt.into(), seed: Some(0), ..Default::default() };
        let job = client.run(spec).await;
        assert_eq!(job.state(), JobState::Succeeded, "{prompt}: {:?}", job.failure);
        let drawn = download(&mut client, &job.images[0].blob_id).await;
        let sample = path.join("samples").join(format!("{}.png", prompt.replace(' ', "_")));
        let difference = difference(&drawn, &std::fs::read(&sample).expect("a sample of diffusers'"));
        assert!(difference <= ONE_LEVEL, "{prompt} differs by {} levels", difference * 127.5);
    }
}

async fn download(client: &mut Client, blob_id: &str) -> Vec<u8> {
    let request = DownloadBlobRequest { blob_id: blob_id.to_owned() };
    let mut stream = client.blobs.download_blob(request).await.expect("the blob is there").into_inner();
    let mut bytes = Vec::new();
    while let Some(message) = stream.message().await.expect("a whole stream") {
        if let Some(Part::Chunk(chunk)) = message.part {
            bytes.extend_from_slice(&chunk);
        }
    }
    bytes
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
