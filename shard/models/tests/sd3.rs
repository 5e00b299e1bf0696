//! Stable Diffusion 3 around its network: with and without the large text encoder, passes that change from step to step, and
//! what a job may not ask for. On the golden pipelines, whose weights are tiny.

#![allow(clippy::unwrap_used)] // helpers of tests are tests

use std::path::{Path, PathBuf};

use models::blocks::{Layout, RankGroup};
use models::card::{Card, StageKind};
use models::denoise::Denoiser;
use models::model_dir::ModelDir;
use models::registry::{self, Limits, LoadSpec, Rank};
use models::request::SkipLayerGuidance;
use models::sd3::Sd3Denoiser;
use models::stage::{Inputs, Stage, StageEvent};
use models::{Checkpoint, Error, Payload, Request, Result};
use parallel::{Device, Tensor};

fn golden(case: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden").join(case).join("pipeline")
}

fn open(case: &str) -> ModelDir {
    ModelDir::open(&golden(case)).unwrap()
}

fn stage(dir: &ModelDir, component: &str) -> Box<dyn Stage> {
    let spec = LoadSpec { dir, component, group: RankGroup::solo(), device: Device::Cpu, limits: Limits::default() };
    match registry::load(spec, &mut |_| ()).unwrap() {
        Rank::Leader(stage) => stage,
        other => panic!("{other:?}"),
    }
}

/// The output, and what was done after each step.
fn run(stage: &mut dyn Stage, request: &Request, inputs: Inputs) -> Result<(Payload, Vec<Checkpoint>)> {
    let (mut done, mut checkpoints) = (None, Vec::new());
    stage.start(1, request.clone(), inputs);
    let mut on_event = |event: StageEvent<'_>| match event {
        StageEvent::Started { .. } => {}
        StageEvent::Step { state, .. } => checkpoints.extend(state.map(|state| state.checkpoint())),
        StageEvent::Done { payload, .. } => done = Some(Ok(payload)),
        StageEvent::Failed { error, .. } => done = Some(Err(error)),
    };
    while stage.turn(&mut on_event)? {}
    Ok((done.unwrap()?, checkpoints))
}

fn conditioning(dir: &ModelDir, request: &Request) -> Result<Inputs> {
    let mut inputs = Inputs::default();
    let encoders = dir.components().filter(|name| name.starts_with("text_encoder"));
    for encoder in encoders {
        inputs.add(run(&mut *stage(dir, encoder), request, Inputs::default())?.0)?;
    }
    Ok(inputs)
}

fn request() -> Request {
    Request {
        prompt: "a red fox".into(),
        width: 48,
        height: 32,
        num_inference_steps: 5,
        guidance_scale: Some(4.0),
        max_sequence_length: 16,
        ..Request::default()
    }
}

fn skip(layers: &[usize]) -> Option<SkipLayerGuidance> {
    Some(SkipLayerGuidance { layers: layers.to_vec(), scale: 2.0, start: 0.2, stop: 0.8 })
}

fn bits(tensor: &Tensor) -> Vec<u32> {
    tensor.flatten_all().unwrap().to_vec1::<f32>().unwrap().into_iter().map(f32::to_bits).collect()
}

fn text_stages(card: &Card) -> Vec<&str> {
    card.stages.iter().filter(|stage| stage.kind == StageKind::EncodeText).map(|stage| stage.component.as_str()).collect()
}

#[test]
fn a_directory_without_the_large_text_encoder_has_no_component_and_no_stage_for_it() {
    let (with, without) = (registry::describe(&open("sd3_txt2img")).unwrap(), registry::describe(&open("sd35_txt2img")).unwrap());
    assert_eq!(text_stages(&with), ["text_encoder", "text_encoder_2", "text_encoder_3"]);
    assert_eq!(text_stages(&without), ["text_encoder", "text_encoder_2"]);
    for card in [with, without] {
        let names: Vec<&str> = card.components.iter().map(|component| component.name.as_str()).collect();
        assert_eq!(names.len(), text_stages(&card).len() + 2);
        assert!(card.stages.iter().all(|stage| names.contains(&stage.component.as_str())));
        let parameter = |name: &str| card.parameters.iter().find(|parameter| parameter.name == name).unwrap();
        // The smaller of the two CLIPs has two blocks.
        assert_eq!((parameter("skip_guidance_layers").maximum, parameter("clip_skip").maximum), (2.0, 1.0));
        assert_eq!(
            (parameter("width").multiple_of, parameter("width").maximum),
            (4.0, 96.0),
            "24 positions of 2 x 2 latents of 2 pixels"
        );
    }
}

#[test]
fn what_each_rank_needs_is_counted_without_reading() {
    let dir = open("sd3_txt2img");
    let layout = Layout::new(2, 3);
    let needs = registry::measure(&dir, "transformer", layout).unwrap();
    assert_eq!(needs.len(), 6);
    let whole = &registry::measure(&dir, "transformer", Layout::SOLO).unwrap()[0];
    assert!(needs.iter().all(|need| need.read_bytes * 2 < whole.read_bytes), "{needs:?} of {whole:?}");
}

#[test]
fn parts_that_do_not_fit_together_are_named() {
    for (component, from, to, field) in [
        ("transformer", "\"joint_attention_dim\": 40", "\"joint_attention_dim\": 31", "text_encoder: hidden_size"),
        ("transformer", "\"joint_attention_dim\": 40", "\"joint_attention_dim\": 48", "text_encoder_3: d_model"),
        ("transformer", "\"in_channels\": 16", "\"in_channels\": 33", "transformer: in_channels"),
        ("transformer", "\"out_channels\": 16", "\"out_channels\": 8", "transformer: out_channels"),
        ("transformer", "\"patch_size\": 2", "\"patch_size\": 0", "patch_size"),
    ] {
        let dir = tempfile::tempdir().unwrap();
        copy(&golden("sd3_txt2img"), dir.path());
        let path = dir.path().join(component).join("config.json");
        let config = std::fs::read_to_string(&path).unwrap();
        assert!(config.contains(from), "{config}");
        std::fs::write(&path, config.replace(from, to)).unwrap();
        match registry::describe(&ModelDir::open(dir.path()).unwrap()) {
            Err(Error::Unsupported { field: found, .. }) => assert_eq!(found, field),
            other => panic!("{field}: {other:?}"),
        }
    }
}

fn copy(from: &Path, to: &Path) {
    for entry in std::fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let to = to.join(entry.file_name());
        if entry.path().is_dir() {
            std::fs::create_dir(&to).unwrap();
            copy(&entry.path(), &to);
        } else {
            std::fs::copy(entry.path(), &to).unwrap();
        }
    }
}

#[test]
fn skip_layer_guidance_adds_a_pass_in_its_steps_alone() {
    let dir = open("sd3_txt2img");
    let request = Request { skip_layer_guidance: skip(&[1]), ..request() };
    let denoiser = Sd3Denoiser::load(&dir).unwrap();
    let mut state = denoiser.start(request.clone(), conditioning(&dir, &request).unwrap()).unwrap();
    let mut passes = Vec::new();
    for step in 0..5 {
        state.step = step;
        passes.push(denoiser.branches(&state).unwrap().len());
    }
    // More than a fifth of five steps, less than four fifths.
    assert_eq!(passes, [2, 2, 3, 3, 2]);
    let alone = Request { guidance_scale: Some(1.0), ..self::request() };
    let state = denoiser.start(alone.clone(), conditioning(&dir, &alone).unwrap()).unwrap();
    assert_eq!(denoiser.branches(&state).unwrap().len(), 1);
}

#[test]
fn a_job_goes_on_from_any_step_with_the_same_bits_though_its_passes_change() {
    let dir = open("sd3_txt2img");
    let request = Request { skip_layer_guidance: skip(&[1]), ..request() };
    let inputs = conditioning(&dir, &request).unwrap();
    let mut transformer = stage(&dir, "transformer");
    let (whole, checkpoints) = run(&mut *transformer, &request, inputs.clone()).unwrap();
    let expected = bits(whole.tensors().get("latents").unwrap());
    let plain = Request { skip_layer_guidance: None, ..request.clone() };
    let (plain, _) = run(&mut *transformer, &plain, inputs.clone()).unwrap();
    assert!(bits(plain.tensors().get("latents").unwrap()) != expected, "skip-layer guidance does something");
    assert_eq!(checkpoints.len(), 5);
    for checkpoint in checkpoints {
        let step = checkpoint.step;
        let inputs = Inputs { checkpoint: Some(checkpoint), ..inputs.clone() };
        let (resumed, _) = run(&mut *transformer, &request, inputs).unwrap();
        assert!(bits(resumed.tensors().get("latents").unwrap()) == expected, "from step {step}");
    }
}

#[test]
fn skip_layer_guidance_without_effect_or_of_missing_blocks_is_refused() {
    let dir = open("sd3_txt2img");
    let denoiser = Sd3Denoiser::load(&dir).unwrap();
    for (request, field) in [
        (Request { skip_layer_guidance: skip(&[1]), guidance_scale: Some(1.0), ..request() }, "skip_guidance_layers"),
        (Request { skip_layer_guidance: skip(&[1, 3]), ..request() }, "skip_layers"),
    ] {
        match denoiser.start(request.clone(), conditioning(&dir, &request).unwrap()) {
            Err(Error::Invalid { field: found, .. }) => assert_eq!(found, field),
            other => panic!("{field}: {other:?}"),
        }
    }
}

#[test]
fn clip_skip_changes_the_prompts_embeddings_and_not_the_negative_ones() {
    let dir = open("sd3_txt2img");
    let plain = conditioning(&dir, &request()).unwrap().conditioning;
    let skipped = conditioning(&dir, &Request { clip_skip: Some(1), ..request() }).unwrap().conditioning;
    for (name, tensor) in plain.iter() {
        let same = bits(tensor) == bits(skipped.get(name).unwrap());
        assert_eq!(same, !["prompt_embed", "prompt_2_embed"].contains(&name), "{name}");
    }
    match conditioning(&dir, &Request { clip_skip: Some(9), ..request() }) {
        Err(Error::Invalid { field: "clip_skip", .. }) => {}
        other => panic!("{other:?}"),
    }
}

#[test]
fn one_stage_keeps_a_prompts_embeddings_apart_by_clip_skip() {
    let dir = open("sd3_txt2img");
    let mut encoder = stage(&dir, "text_encoder");
    let mut embed = |clip_skip| {
        let request = Request { clip_skip, ..request() };
        let (payload, _) = run(&mut *encoder, &request, Inputs::default()).unwrap();
        bits(payload.tensors().get("prompt_embed").unwrap())
    };
    let (plain, skipped) = (embed(None), embed(Some(1)));
    assert!(plain != skipped);
    assert!(embed(None) == plain && embed(Some(0)) == plain && embed(Some(1)) == skipped);
}

#[test]
fn a_jobs_shift_takes_the_place_of_the_schedulers() {
    let dir = open("sd3_txt2img");
    let denoiser = Sd3Denoiser::load(&dir).unwrap();
    let inputs = conditioning(&dir, &request()).unwrap();
    let timesteps = |shift| {
        let state = denoiser.start(Request { shift, ..request() }, inputs.clone()).unwrap();
        state.scheduler.timesteps().to_vec()
    };
    assert_eq!(timesteps(None), timesteps(Some(3.0)));
    // Without a shift they are even: from 1000 to 1.
    let even = [1000.0, 750.25, 500.5, 250.75, 1.0];
    assert!(timesteps(Some(1.0)).iter().zip(even).all(|(t, even)| (t - even).abs() < 1e-3), "{:?}", timesteps(Some(1.0)));
}
