//! What a model is multiplied in, through real processes: a setting of the model, and the same bits whatever is lost meanwhile.

#![allow(clippy::unwrap_used)] // helpers of tests are tests

use models::image_io::{PictureLimits, decode_picture};
use parallel::Device;
use parallel::ops::Products;
use proto::v1::job_event::Kind;
use proto::v1::{JobEvent, JobSpec};
use tests::cluster::{Cluster, denoise_step, sha256};

/// Long enough to be disturbed in the middle: some seconds.
const STEPS: u32 = 120;

/// The bundled model, once for each of these ways and called as it; `cut`: what its transformer's section says.
fn models(ways: &[Products], cut: &str) -> String {
    let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../bundled/emoji").canonicalize().unwrap();
    let model = |way: &Products| {
        let named = format!("[[model]]\nname = \"{way}\"\npath = \"{}\"\nproducts = \"{way}\"\n", path.display());
        format!("{named}[model.components.transformer]\n{cut}\n")
    };
    ways.iter().map(model).collect()
}

fn job(model: Products, steps: u32) -> JobSpec {
    JobSpec {
        model: model.to_string(),
        prompt: "red heart".into(),
        num_inference_steps: Some(steps),
        seed: Some(7),
        ..JobSpec::default()
    }
}

/// Where each try of the denoising began.
fn begins(events: &[JobEvent]) -> Vec<u32> {
    let begin = |event: &JobEvent| match &event.kind {
        Some(Kind::StageStarted(started)) if started.stage == "denoise" => Some(started.resumed_step),
        _ => None,
    };
    events.iter().filter_map(begin).collect()
}

/// The ways to multiply that this machine has.
fn ways() -> Vec<Products> {
    Products::ALL.into_iter().filter(|products| products.check(&Device::Cpu).is_ok()).collect()
}

/// Whether there is more than f32 here.
fn has_bf16() -> bool {
    ways().contains(&Products::Bf16)
}

#[tokio::test]
async fn models_on_the_same_workers_are_each_multiplied_in_their_own_way() {
    let ways = ways();
    let cut = "tp = 2\ncolocate = true";
    let (mut alone, mut pixels) = (Vec::new(), Vec::new());
    for way in &ways {
        let cluster = Cluster::start(&models(&[*way], cut), &[""], None);
        let mut client = cluster.ready().await;
        let drawn = client.run(job(*way, 6)).await;
        alone.push(sha256(&drawn));
        assert_eq!(drawn.products().name(), way.to_string());
        let file = client.download(&drawn.images[0].blob_id).await;
        let said = format!("atelier:products\0{way}");
        assert!(String::from_utf8_lossy(&file).contains(&said), "{way} is in the picture's metadata");
        pixels.push(decode_picture(&file, &PictureLimits::default()).unwrap());
    }
    assert!(ways.len() < 2 || pixels[0] != pixels[1], "{} is another arithmetic than {}", ways[1], ways[0]);

    // Every model's ranks are in both processes, and work at once.
    let together = Cluster::start(&models(&ways, cut), &["", ""], None);
    let mut client = together.ready().await;
    let able: Vec<Vec<&str>> =
        client.workers().await.iter().map(|worker| worker.products().map(proto::v1::Products::name).collect()).collect();
    let expected: Vec<String> = ways.iter().map(ToString::to_string).collect();
    assert!(able.len() == 2 && able.iter().all(|able| *able == expected), "{able:?}");
    for _ in 0..3 {
        let mut running = Vec::new();
        for way in &ways {
            running.push(client.create(job(*way, 6)).await.unwrap().id);
        }
        for (id, alone) in running.iter().zip(&alone) {
            assert_eq!(sha256(&client.finish(id).await), *alone);
        }
    }
}

#[tokio::test]
async fn a_killed_ranks_job_in_bf16_goes_on_with_the_same_bits() {
    if !has_bf16() {
        return;
    }
    let models = models(&[Products::Bf16], "tp = 2\nblock_ranges = 2");
    let mut cluster = Cluster::start(&models, &["", "", "", ""], None);
    let mut client = cluster.ready().await;
    let undisturbed = sha256(&client.run(job(Products::Bf16, STEPS)).await);
    let running = client.create(job(Products::Bf16, STEPS)).await.unwrap();
    client.watch(&running.id, 0, |event| denoise_step(event).is_some_and(|step| step >= 20)).await;
    cluster.workers[2].kill();
    cluster.add_worker("");
    let done = client.finish(&running.id).await;
    assert_eq!(sha256(&done), undisturbed);
    let begins = begins(&client.follow(&running.id, 0).await);
    assert!(begins.last().is_some_and(|step| *step >= 10), "what was done is not done again: {begins:?}");
}

#[tokio::test]
async fn a_job_whose_model_is_multiplied_in_another_way_from_now_on_begins_anew() {
    if !has_bf16() {
        return;
    }
    let [wide, narrow] = [Products::F32, Products::Bf16].map(|way| {
        let models = models(&[way], "tp = 2");
        models.replace(&format!("name = \"{way}\""), "name = \"f32\"")
    });
    let mut cluster = Cluster::start(&narrow, &["", ""], None);
    let mut client = cluster.ready().await;
    let undisturbed = sha256(&client.run(job(Products::F32, STEPS)).await);
    cluster.restart_coordinator_with(&wide);
    let mut client = cluster.client().await;
    client.wait_ready().await;
    let running = client.create(job(Products::F32, STEPS)).await.unwrap();
    assert_eq!(running.products(), proto::v1::Products::F32);
    let seen = client.watch(&running.id, 0, |event| denoise_step(event).is_some_and(|step| step >= 20)).await;
    assert_eq!(begins(&seen), [0]);

    cluster.restart_coordinator_with(&narrow);
    let mut client = cluster.client().await;
    let rest = client.follow(&running.id, seen.last().unwrap().sequence).await;
    assert_eq!(begins(&rest), [0], "nothing that was done in f32 is used");
    let done = client.finish(&running.id).await;
    assert_eq!((sha256(&done), done.products()), (undisturbed, proto::v1::Products::Bf16));
}
