//! FLUX makes all again that its checkpoints leave out: the bundled model goes on from any step with the same bits, from
//! text alone and repainting a picture.

#![allow(clippy::unwrap_used)] // helpers of tests are tests

use std::path::Path;

use models::blocks::RankGroup;
use models::model_dir::ModelDir;
use models::registry::{Limits, LoadSpec, Rank, load};
use models::stage::{Inputs, Pictures, Stage, StageEvent};
use models::{Checkpoint, Payload, Request};
use parallel::{Device, Tensor, Tensors};

const STEPS: usize = 4;

fn stage(dir: &ModelDir, component: &str) -> Box<dyn Stage> {
    let spec = LoadSpec { dir, component, group: RankGroup::solo(), device: Device::Cpu, limits: Limits::default() };
    match load(spec, &mut |_| ()).unwrap() {
        Rank::Leader(stage) => stage,
        other => panic!("{other:?}"),
    }
}

/// The output, and what was done after each step.
fn run(stage: &mut dyn Stage, request: &Request, inputs: Inputs) -> (Payload, Vec<Checkpoint>) {
    let (mut done, mut checkpoints) = (None, Vec::new());
    stage.start(1, request.clone(), inputs);
    let mut on_event = |event: StageEvent<'_>| match event {
        StageEvent::Started { .. } => {}
        StageEvent::Step { state, .. } => checkpoints.extend(state.map(|state| state.checkpoint())),
        StageEvent::Done { payload, .. } => done = Some(payload),
        StageEvent::Failed { error, .. } => panic!("{error}"),
    };
    while stage.turn(&mut on_event).unwrap() {}
    (done.unwrap(), checkpoints)
}

fn request(strength: Option<f64>) -> Request {
    Request {
        prompt: "red heart".into(),
        negative_prompt: Some("blue".into()),
        num_inference_steps: STEPS,
        guidance_scale: Some(3.5),
        true_cfg_scale: 1.5,
        seed: 11,
        num_images_per_prompt: 2,
        strength,
        max_sequence_length: 64,
        ..Request::default()
    }
}

/// A PNG of 64 x 64 pixels that are not all the same.
fn png() -> Vec<u8> {
    let mut bytes = Vec::new();
    let mut encoder = png::Encoder::new(&mut bytes, 64, 64);
    encoder.set_color(png::ColorType::Rgb);
    encoder.set_depth(png::BitDepth::Eight);
    let pixels: Vec<u8> = (0..64 * 64 * 3).map(|i| (i / 37 % 256) as u8).collect();
    encoder.write_header().unwrap().write_image_data(&pixels).unwrap();
    bytes
}

fn bits(payload: &Payload) -> Vec<u32> {
    let latents = payload.tensors().get("latents").unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
    assert!(latents.iter().all(|x| x.is_finite()));
    latents.into_iter().map(f32::to_bits).collect()
}

#[test]
fn flux_goes_on_from_any_step_with_the_same_bits() {
    let dir = ModelDir::open(&Path::new(env!("CARGO_MANIFEST_DIR")).join("../../bundled/emoji")).unwrap();
    let repaint = Pictures { image: Some(png()), mask_image: Some(png()), ..Pictures::default() };
    for (request, pictures) in [(request(None), None), (request(Some(0.75)), Some(repaint))] {
        let mut inputs = Inputs::default();
        for encoder in ["text_encoder", "text_encoder_2"] {
            inputs.add(run(&mut *stage(&dir, encoder), &request, Inputs::default()).0).unwrap();
        }
        if let Some(pictures) = pictures {
            let to_encode = Inputs { pictures, ..Inputs::default() };
            inputs.add(run(&mut *stage(&dir, "vae"), &request, to_encode).0).unwrap();
        }
        let steps = if request.strength.is_some() { 3 } else { STEPS };
        goes_on_from_any_step(&dir, &request, &inputs, steps);
    }
}

/// Denoises once from the start and once from each of its checkpoints.
fn goes_on_from_any_step(dir: &ModelDir, request: &Request, inputs: &Inputs, steps: usize) {
    let (latents, checkpoints) = run(&mut *stage(dir, "transformer"), request, inputs.clone());
    assert_eq!(checkpoints.len(), steps);
    for checkpoint in checkpoints {
        let step = checkpoint.step;
        let inputs = Inputs { checkpoint: Some(checkpoint), ..inputs.clone() };
        let (resumed, rest) = run(&mut *stage(dir, "transformer"), request, inputs);
        assert_eq!(rest.first().map_or(step + 1, |next| next.step), step + 1);
        assert_eq!(bits(&resumed), bits(&latents), "strength {:?} from {step}", request.strength);
    }
}

#[test]
fn kontext_looks_at_its_picture_again_when_it_goes_on() {
    // The bundled weights as a Kontext model: it was never trained to look, but every token takes part all the same.
    let bundled = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../bundled/emoji");
    let folder = tempfile::tempdir().unwrap();
    for entry in std::fs::read_dir(&bundled).unwrap() {
        let path = entry.unwrap().path().canonicalize().unwrap();
        std::os::unix::fs::symlink(&path, folder.path().join(path.file_name().unwrap())).unwrap();
    }
    let index = std::fs::read_to_string(bundled.join("model_index.json")).unwrap();
    std::fs::remove_file(folder.path().join("model_index.json")).unwrap();
    std::fs::write(folder.path().join("model_index.json"), index.replace("FluxPipeline", "FluxKontextPipeline")).unwrap();
    let dir = ModelDir::open(folder.path()).unwrap();

    let (mut plain, request) = (Inputs::default(), request(None));
    for encoder in ["text_encoder", "text_encoder_2"] {
        plain.add(run(&mut *stage(&dir, encoder), &request, Inputs::default()).0).unwrap();
    }
    let mut latents = Tensors::new();
    for (name, value) in [("image.mean", 0.5f32), ("image.logvar", -3.0)] {
        latents.insert(name, Tensor::full(value, (1, 16, 6, 10), &Device::Cpu).unwrap());
    }
    let looking = Inputs { image_latents: Some(latents), ..plain.clone() };
    goes_on_from_any_step(&dir, &request, &looking, STEPS);
    let draw = |inputs: &Inputs| bits(&run(&mut *stage(&dir, "transformer"), &request, inputs.clone()).0);
    assert_ne!(draw(&plain), draw(&looking), "the picture has its part in what is drawn");
}
