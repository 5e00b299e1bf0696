//! Qwen-Image as a whole, with the recorded pipelines' tiny random weights: the same bits at every layout, and what is wrong
//! with a job is said by field.
#![allow(clippy::unwrap_used)] // clippy.toml allows it in tests, and takes only functions marked #[test] for tests

use std::path::{Path, PathBuf};

use models::blocks::Layout;
use models::model_dir::ModelDir;
use models::qwen_image_transformer::QwenImageTransformerConfig;
use models::registry;
use models::stage::{Inputs, StageEvent};
use models::{Error, Request};
use parallel::{DType, Device, Tensor, Tensors};
use tempfile::TempDir;
use tests::stages::{drain, sha256, with_leader};
use tests::synthetic;

const STEPS: usize = 3;
/// The job that is compared, and its neighbour.
const JOB: u64 = 0;
const NEIGHBOUR: u64 = 1;

fn golden(pipeline: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("golden").join(pipeline).join("pipeline")
}

/// The recorded pipeline with another transformer, whose eight heads can be divided by every tp.
fn eight_heads() -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    copy(&golden("qwen_txt2img"), dir.path());
    let config = QwenImageTransformerConfig {
        in_channels: 16,
        out_channels: Some(4),
        num_layers: 3,
        attention_head_dim: 8,
        num_attention_heads: 8,
        joint_attention_dim: 32,
        axes_dims_rope: vec![2, 2, 4],
        ..QwenImageTransformerConfig::default()
    };
    let json = r#"{"in_channels": 16, "out_channels": 4, "num_layers": 3, "attention_head_dim": 8, "num_attention_heads": 8,
        "joint_attention_dim": 32, "axes_dims_rope": [2, 2, 4]}"#;
    assert_eq!(serde_json::from_str::<QwenImageTransformerConfig>(json).unwrap(), config);
    std::fs::write(dir.path().join("transformer/config.json"), json).unwrap();
    synthetic::write(&dir.path().join("transformer"), &synthetic::qwen_image::transformer(&config, 7).unwrap()).unwrap();
    dir
}

fn copy(from: &Path, to: &Path) {
    for entry in std::fs::read_dir(from).unwrap() {
        let (from, to) = (entry.as_ref().unwrap().path(), to.join(entry.unwrap().file_name()));
        if from.is_dir() {
            std::fs::create_dir(&to).unwrap();
            copy(&from, &to);
        } else {
            std::fs::copy(from, to).unwrap();
        }
    }
}

fn request(key: u64) -> Request {
    let prompts = ["a red fox on a stone", "cat"];
    Request {
        prompt: prompts[key as usize].into(),
        negative_prompt: Some(" ".into()),
        true_cfg_scale: 3.0,
        width: 32,
        height: 48,
        num_inference_steps: STEPS,
        seed: key,
        ..Request::default()
    }
}

/// [`JOB`]'s embeddings, its latents after every step, and its picture, as digests; the denoiser has all of `keys` at once.
fn draw(dir: &Path, encoder: Layout, denoiser: Layout, keys: &[u64]) -> Vec<String> {
    let jobs = |inputs: Vec<Inputs>| keys.iter().zip(inputs).map(|(key, inputs)| (*key, request(*key), inputs)).collect();
    let mut inputs = vec![Inputs::default(); keys.len()];
    let (texts, _) = with_leader(dir, "text_encoder", encoder, 1, |stage| drain(stage, jobs(inputs.clone()), JOB));
    let mut digests: Vec<String> = texts[0].tensors().iter().map(|(_, embeds)| sha256(embeds)).collect();
    inputs.iter_mut().zip(texts).for_each(|(inputs, text)| inputs.add(text).unwrap());
    let (latents, steps) = with_leader(dir, "transformer", denoiser, 1, |stage| drain(stage, jobs(inputs), JOB));
    assert_eq!(steps.len(), STEPS);
    let mut inputs = Inputs::default();
    inputs.add(latents.into_iter().next().unwrap()).unwrap();
    let job = vec![(JOB, request(JOB), inputs)];
    let (pictures, _) = with_leader(dir, "vae", Layout::SOLO, 1, |stage| drain(stage, job, JOB));
    digests.extend(steps);
    digests.push(sha256(pictures[0].image().unwrap()));
    digests
}

#[test]
fn latents_and_pictures_have_the_same_bits_on_every_layout_alone_and_with_a_neighbour() {
    let dir = eight_heads();
    let layout = |(tp, block_ranges)| Layout::new(tp, block_ranges);
    let expected = draw(dir.path(), Layout::SOLO, Layout::SOLO, &[JOB]);
    for (encoder, denoiser) in
        [((1, 1), (2, 1)), ((2, 1), (4, 1)), ((1, 2), (8, 1)), ((2, 2), (1, 2)), ((1, 3), (2, 3)), ((2, 3), (8, 3))]
    {
        for keys in [&[JOB][..], &[JOB, NEIGHBOUR]] {
            let digests = draw(dir.path(), layout(encoder), layout(denoiser), keys);
            assert_eq!(digests, expected, "encoder {encoder:?}, denoiser {denoiser:?}, jobs {keys:?}");
        }
    }
    // The passes, whose texts differ in length, side by side.
    let lanes = Layout::new(2, 2).with_cfg_parallel(2);
    assert_eq!(draw(dir.path(), Layout::SOLO, lanes, &[JOB, NEIGHBOUR]), expected, "{lanes}");
}

/// An editing job's inputs, made up: texts of two lengths, and the latents of a picture of another shape than the job's.
fn editing() -> Inputs {
    let mut random = synthetic::Random::new(3);
    let mut tensor = |shape: &[usize]| random.tensor(shape, 0.0, 1.0).unwrap();
    let texts = Tensors::new().with("prompt_embeds", tensor(&[1, 9, 32])).with("negative_prompt_embeds", tensor(&[1, 4, 32]));
    let picture = Tensors::new().with("image.mean", tensor(&[1, 4, 6, 10])).with("image.logvar", tensor(&[1, 4, 6, 10]));
    Inputs { conditioning: texts, image_latents: Some(picture), ..Inputs::default() }
}

#[test]
fn a_parked_editing_job_goes_on_elsewhere_with_the_same_bits() {
    let dir = golden("qwen_edit");
    let job = |inputs: Inputs| vec![(JOB, request(JOB), inputs)];
    let (_, expected) = with_leader(&dir, "transformer", Layout::SOLO, 1, |stage| drain(stage, job(editing()), JOB));
    let parked = with_leader(&dir, "transformer", Layout::new(2, 1), 1, |stage| {
        stage.start(JOB, request(JOB), editing());
        let mut parked = None;
        while parked.is_none() {
            let mut stepped = false;
            let turn = stage.turn(&mut |event| match event {
                StageEvent::Step { .. } => stepped = true,
                StageEvent::Failed { error, .. } => parked = Some(error),
                _ => {}
            });
            assert!(turn.unwrap() || parked.is_some(), "the job is not over");
            if stepped {
                stage.park(JOB);
            }
        }
        parked.unwrap()
    });
    let Error::Parked(Some(checkpoint)) = parked else { panic!("{parked}") };
    let (step, rest) = (checkpoint.step, Inputs { checkpoint: Some(*checkpoint), ..editing() });
    assert!((1..STEPS).contains(&step));
    let to = Layout::new(1, 3);
    let (_, steps) = with_leader(&dir, "transformer", to, 1, |stage| drain(stage, job(rest), JOB));
    assert_eq!(steps, expected[step..]);
}

#[test]
fn a_job_of_several_pictures_has_the_same_bits_on_every_layout() {
    let dir = golden("qwen_edit_plus");
    let mut one = request(JOB);
    one.prompt = "Picture 2 in the place of Picture 1".into();
    let mut inputs = Inputs::default();
    inputs.pictures.image = Some(std::fs::read(dir.join("../image.png")).unwrap());
    inputs.pictures.more = vec![std::fs::read(dir.join("../image_2.png")).unwrap()];
    let embeds = |layout, inputs: &Inputs| {
        let jobs = vec![(JOB, one.clone(), inputs.clone())];
        let (texts, _) = with_leader(&dir, "text_encoder", layout, 1, |stage| drain(stage, jobs, JOB));
        sha256(texts[0].tensors().get("prompt_embeds").unwrap())
    };
    let expected = embeds(Layout::SOLO, &inputs);
    for layout in [Layout::new(2, 1), Layout::new(1, 2), Layout::new(2, 2)] {
        assert_eq!(embeds(layout, &inputs), expected, "{layout}");
    }
    let mut swapped = inputs;
    let second = swapped.pictures.more.pop();
    swapped.pictures.more.extend(std::mem::replace(&mut swapped.pictures.image, second));
    assert_ne!(embeds(Layout::SOLO, &swapped), expected, "their order counts");

    let mut given = editing();
    let second = Tensor::ones((1, 4, 4, 8), DType::F32, &Device::Cpu).unwrap();
    given.image_latents.as_mut().unwrap().insert("image.1.mean", second);
    let steps = |layout| {
        let jobs = vec![(JOB, request(JOB), given.clone()), (NEIGHBOUR, request(NEIGHBOUR), editing())];
        with_leader(&dir, "transformer", layout, 1, |stage| drain(stage, jobs, JOB)).1
    };
    let expected = steps(Layout::SOLO);
    assert_eq!(expected.len(), STEPS);
    for layout in [Layout::new(2, 1), Layout::new(1, 3), Layout::new(2, 3), Layout::new(1, 2).with_cfg_parallel(2)] {
        assert_eq!(steps(layout), expected, "{layout}");
    }
}

/// The error that a component's stage ends a job with.
fn failure(pipeline: &str, component: &str, request: Request, inputs: Inputs) -> Error {
    with_leader(&golden(pipeline), component, Layout::SOLO, 1, |stage| {
        stage.start(JOB, request, inputs);
        let mut failure = None;
        let turn = stage.turn(&mut |event| {
            if let StageEvent::Failed { error, .. } = event {
                failure = Some(error);
            }
        });
        turn.unwrap();
        failure.unwrap()
    })
}

#[test]
fn what_is_wrong_with_an_editing_job_is_said_by_field() {
    for component in ["text_encoder", "vae", "transformer"] {
        let error = failure("qwen_edit", component, request(JOB), Inputs::default());
        assert!(matches!(error, Error::Invalid { field: "image", .. }), "{component}: {error}");
    }
    let mut inputs = Inputs::default();
    inputs.pictures.image = Some(std::fs::read(golden("qwen_edit").join("../image.png")).unwrap());
    let prompt = Request { prompt: "two pictures: <|image_pad|>".into(), ..request(JOB) };
    let error = failure("qwen_edit", "text_encoder", prompt, inputs.clone());
    assert!(matches!(error, Error::Invalid { field: "prompt", .. }), "{error}");
    let negative = Request { negative_prompt: Some("<|image_pad|>".into()), ..request(JOB) };
    let error = failure("qwen_edit", "text_encoder", negative, inputs.clone());
    assert!(matches!(error, Error::Invalid { field: "negative_prompt", .. }), "{error}");
    let long = Request { prompt: "a word or two ".repeat(1000), ..request(JOB) };
    let error = failure("qwen_edit", "text_encoder", long, inputs.clone());
    assert!(matches!(error, Error::Invalid { field: "prompt", .. }), "{error}");
    inputs.pictures.more = vec![b"none".to_vec()];
    let error = failure("qwen_edit", "text_encoder", request(JOB), inputs.clone());
    assert!(matches!(error, Error::Invalid { field: "image", .. }), "{error}");
    for component in ["text_encoder", "vae"] {
        let error = failure("qwen_edit_plus", component, request(JOB), inputs.clone());
        assert!(matches!(error, Error::Invalid { field: "more_images", .. }), "{component}: {error}");
    }
}

#[test]
fn the_cards_say_what_each_pipeline_takes() {
    let card = |pipeline: &str| registry::describe(&ModelDir::open(&golden(pipeline)).unwrap()).unwrap();
    let (draws, edits, edits_several) = (card("qwen_txt2img"), card("qwen_edit"), card("qwen_edit_plus"));
    let parameter = |card: &models::card::Card, name: &str| card.parameters.iter().find(|p| p.name == name).cloned();
    assert!(!parameter(&draws, "image_blob_id").unwrap().required && parameter(&edits, "image_blob_id").unwrap().required);
    assert_eq!(parameter(&draws, "width").unwrap().default, Some(512.0), "128 latents of 4 pixels");
    assert_eq!(parameter(&edits, "width").unwrap().default, None, "that of the picture");
    for name in ["strength", "mask_image_blob_id", "max_sequence_length"] {
        assert!(parameter(&draws, name).is_some() && parameter(&edits, name).is_none(), "{name}");
    }
    let reads_pictures = |card: &models::card::Card| card.stages.iter().any(|s| s.component == "text_encoder" && s.with_pictures);
    assert!(!reads_pictures(&draws) && reads_pictures(&edits) && reads_pictures(&edits_several));
    let several = |card: &models::card::Card| parameter(card, "more_image_blob_ids").is_some();
    assert!(!several(&draws) && !several(&edits) && several(&edits_several));
}
