//! DeepFloyd IF, whose steps draw noise of a variance that the network learned, and whose last stage is the denoiser.

use std::path::{Path, PathBuf};

use models::Request;
use models::blocks::Layout;
use models::stage::{Inputs, Pictures, Stage};
use tests::assembled::with_text_encoder_of;
use tests::same_bits::{JOB, Model, conditioning, drain, with_leader};
use tests::stages::sha256;

/// The golden networks have four heads and four groups.
const LAYOUTS: [Layout; 6] = [
    Layout::new(2, 1),
    Layout::new(4, 1),
    Layout::new(1, 2),
    Layout::new(1, 3),
    Layout::new(2, 3),
    Layout::new(2, 1).with_cfg_parallel(2),
];

fn golden(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("golden").join(path)
}

/// Four steps of two passes, but for the third's, which is without guidance.
fn request(key: u64) -> Request {
    let prompts = ["a red fox", "a fox on a stone", "morning light", "a watercolour"];
    Request {
        prompt: prompts[key as usize].into(),
        width: 24,
        height: 16,
        num_inference_steps: 4,
        guidance_scale: Some(if key == 2 { 1.0 } else { 4.0 }),
        noise_level: Some(100 + 50 * key as usize),
        seed: key,
        num_images_per_prompt: if key == 1 { 2 } else { 1 },
        ..Request::default()
    }
}

/// The latents of [`JOB`] after every step, and every job's picture; once alone and once among all.
fn draw(model: &Model<'_>, inputs: &[Inputs], layout: Layout) -> [Vec<String>; 2] {
    with_leader(model, "unet", layout, 1, |stage: &mut dyn Stage| {
        [1, inputs.len()].map(|jobs| {
            let (payloads, steps) = drain(model, stage, (0..).zip(inputs[..jobs].iter().cloned()).collect());
            let pictures = payloads.iter().map(|payload| sha256(payload.image().unwrap()));
            steps.into_iter().chain(pictures.take(1)).collect()
        })
    })
}

fn check(dir: &Path, picture: Option<Vec<u8>>) {
    let model = Model { dir, encoders: &["text_encoder"], denoiser: "unet", text_tp: 1, request };
    let mut inputs = conditioning(&model, 1, 1);
    inputs.iter_mut().for_each(|inputs| inputs.pictures = Pictures { image: picture.clone(), ..Pictures::default() });
    let [expected, batched] = draw(&model, &inputs, Layout::SOLO);
    assert_eq!((expected.len(), &batched), (5, &expected));
    for layout in LAYOUTS {
        assert_eq!(draw(&model, &inputs, layout), [expected.clone(), expected.clone()], "{layout}");
    }
    assert_eq!(JOB, 0, "the job that is alone");
}

#[test]
fn deepfloyd_if_has_the_same_bits_on_every_layout_alone_and_batched() {
    let first = golden("if_stage1_pipeline/pipeline");
    check(&first, None);
    let enlarging = with_text_encoder_of(&golden("if_super_resolution_pipeline/pipeline"), &first).unwrap();
    check(enlarging.path(), Some(std::fs::read(golden("if_super_resolution_pipeline/image.png")).unwrap()));
}
