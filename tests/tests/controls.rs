//! Control networks in a group: a job draws the same bits with them on every layout, alone and beside jobs with others or none, and after it was
//! parked; what is wrong with a control is its job's failure, not the group's.
#![allow(clippy::unwrap_used)] // clippy.toml allows it in tests, and takes only functions marked #[test] for tests

use std::path::{Path, PathBuf};

use models::blocks::Layout;
use models::control::ControlSource;
use models::control::card::{RegisteredControl, describe};
use models::model_dir::ModelDir;
use models::registry::{self, Limits};
use models::request::Control;
use models::stage::{Inputs, Pictures, Stage, StageEvent};
use models::{Error, Request};
use parallel::ops::Products;
use tests::same_bits::{JOB, Model, conditioning};
use tests::stages::{drain, sha256, with_leader, with_leader_holding};

const STEPS: usize = 4;
const LAYOUTS: [Layout; 5] =
    [Layout::SOLO, Layout::new(2, 1), Layout::new(1, 3), Layout::new(2, 2), Layout::new(2, 1).with_cfg_parallel(2)];

fn golden(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("golden").join(path)
}

fn control(name: &str, conditioning_scale: f64, [guidance_start, guidance_end]: [f64; 2]) -> Control {
    Control { name: name.into(), conditioning_scale, guidance_start, guidance_end, mode: None }
}

/// A family whose jobs have controls.
struct Case {
    dir: &'static str,
    encoders: &'static [&'static str],
    denoiser: &'static str,
    /// Each network's name, and its folder.
    networks: &'static [(&'static str, &'static str)],
    /// Whether the networks are given pictures as they are, not their latents.
    pixels: bool,
    request: fn(u64) -> Request,
}

/// A job of two passes without controls.
fn plain(key: u64) -> Request {
    let prompts = ["a red fox", "a fox on a stone", "morning light", "a watercolour"];
    Request {
        prompt: prompts[key as usize].into(),
        negative_prompt: Some("blurry, dark".into()),
        width: 64,
        height: 32,
        num_inference_steps: STEPS,
        guidance_scale: Some(4.0),
        true_cfg_scale: 3.0,
        seed: key,
        max_sequence_length: 16,
        num_images_per_prompt: if key == 1 { 2 } else { 1 },
        ..Request::default()
    }
}

/// The first with all of `all`, the second with the first in guess mode or for the first steps, the third with none.
fn with(key: u64, all: Vec<Control>, guess_mode: bool) -> Request {
    let first = all.first().cloned().map(|first| Control { conditioning_scale: -0.4, guidance_end: 0.5, ..first });
    let controls = match key {
        0 => all,
        2 => Vec::new(),
        _ => first.into_iter().collect(),
    };
    Request { guess_mode: guess_mode && key == 1, controls, ..plain(key) }
}

const SD15: Case = Case {
    dir: "sd15_txt2img/pipeline",
    encoders: &["text_encoder"],
    denoiser: "unet",
    networks: &[
        ("canny", "sd15_controlnet/controlnet"),
        ("depth", "sd15_multi_controlnet/controlnet_1"),
        ("sketch", "sd15_adapter/adapter"),
    ],
    pixels: true,
    request: |key| {
        let (canny, depth) = (control("canny", 0.8, [0.0, 1.0]), control("depth", 0.5, [0.3, 1.0]));
        with(key, vec![canny, depth, control("sketch", 0.7, [0.0, 0.6])], true)
    },
};
const SDXL: Case = Case {
    dir: "sdxl_txt2img/pipeline",
    encoders: &["text_encoder", "text_encoder_2"],
    denoiser: "unet",
    networks: &[("sketch", "sdxl_adapter/adapter"), ("canny", "sdxl_controlnet/controlnet")],
    pixels: true,
    request: |key| with(key, vec![control("canny", 0.8, [0.0, 0.8]), control("sketch", 0.7, [0.2, 1.0])], false),
};
/// Two pictures in one forward of a union network, and one alone in it.
const SDXL_UNION: Case = Case {
    networks: &[("sketch", "sdxl_adapter/adapter"), ("union", "sdxl_controlnet_union/controlnet")],
    request: |key| {
        let mode = |mode, control| Control { mode: Some(mode), ..control };
        let (edges, depth) = (mode(0, control("union", 0.8, [0.0, 1.0])), mode(3, control("union", 0.5, [0.3, 0.8])));
        with(key, vec![edges, control("sketch", 0.7, [0.2, 1.0]), depth], false)
    },
    ..SDXL
};
const FLUX: Case = Case {
    dir: "flux_dev_txt2img/pipeline",
    encoders: &["text_encoder", "text_encoder_2"],
    denoiser: "transformer",
    networks: &[("union", "flux_controlnet_union/controlnet")],
    pixels: false,
    request: |key| {
        let mode = |mode, control| Control { mode: Some(mode), ..control };
        with(key, vec![mode(2, control("union", 0.8, [0.0, 1.0])), mode(4, control("union", 0.3, [0.5, 1.0]))], false)
    },
};
const SD3: Case = Case {
    dir: "sd3_txt2img/pipeline",
    encoders: &["text_encoder", "text_encoder_2", "text_encoder_3"],
    denoiser: "transformer",
    networks: &[("canny", "sd3_controlnet/controlnet")],
    pixels: false,
    request: |key| with(key, vec![control("canny", 0.8, [0.0, 1.0])], false),
};
const QWEN_IMAGE: Case = Case {
    dir: "qwen_txt2img/pipeline",
    encoders: &["text_encoder"],
    denoiser: "transformer",
    networks: &[("canny", "qwen_controlnet/controlnet")],
    pixels: false,
    request: |key| with(key, vec![control("canny", 0.8, [0.0, 0.6]), control("canny", 0.2, [0.0, 1.0])], false),
};

impl Case {
    fn sources(&self) -> Vec<ControlSource> {
        self.networks
            .iter()
            .map(|(name, path)| ControlSource { name: (*name).into(), path: golden(path), fingerprint: String::new() })
            .collect()
    }

    fn leading<T: Send>(&self, layout: Layout, f: impl FnOnce(&mut dyn Stage) -> T + Send) -> T {
        with_leader_holding(&self.sources(), Limits::default(), &golden(self.dir), self.denoiser, layout, 1, f)
    }

    /// What the text encoders and, of control pictures, the autoencoder give the jobs.
    fn inputs(&self) -> Vec<Inputs> {
        let dir = golden(self.dir);
        let model = Model { dir: &dir, encoders: self.encoders, denoiser: self.denoiser, text_tp: 1, request: self.request };
        let mut inputs = conditioning(&model, 1, 1);
        for (key, inputs) in (0..).zip(&mut inputs) {
            let request = (self.request)(key);
            let picture = std::fs::read(golden("sd15_controlnet/image.png")).unwrap();
            let pictures = Pictures { controls: vec![picture; request.controls.len()], ..Pictures::default() };
            if request.controls.is_empty() {
                continue;
            }
            if self.pixels {
                inputs.pictures = pictures;
                continue;
            }
            let task = (0, request, Inputs { pictures, ..Inputs::default() });
            let encoded = with_leader(&dir, "vae", Layout::SOLO, 1, |stage| drain(stage, vec![task], 0).0.remove(0));
            inputs.add(encoded).unwrap();
        }
        inputs
    }

    fn job(&self, key: u64, inputs: &[Inputs]) -> (u64, Request, Inputs) {
        (key, (self.request)(key), inputs[key as usize].clone())
    }

    fn check_layouts(&self) {
        let inputs = self.inputs();
        let alone = |stage: &mut dyn Stage| drain(stage, vec![self.job(JOB, &inputs)], JOB).1;
        let batched = |stage: &mut dyn Stage| {
            let (payloads, steps) = drain(stage, (0..4).map(|key| self.job(key, &inputs)).collect(), JOB);
            let others: Vec<String> = payloads.iter().map(|p| sha256(p.tensors().get("latents").unwrap())).collect();
            (steps, others)
        };
        let expected = self.leading(Layout::SOLO, alone);
        // PNDM makes one evaluation more.
        assert!((STEPS..=STEPS + 1).contains(&expected.len()));
        // Jobs 1 and 3 are controlled too, and 2 is not.
        let others: Vec<String> = (0..4).map(|key| self.drawn(key, &inputs)).collect();
        for layout in LAYOUTS {
            assert_eq!(self.leading(layout, alone), expected, "alone, {layout}");
            assert_eq!(self.leading(layout, batched), (expected.clone(), others.clone()), "batched, {layout}");
        }
        assert_ne!(others[0], self.drawn_without(JOB, &inputs), "controls change nothing");
        self.check_parked(&inputs, &expected);
    }

    fn drawn(&self, key: u64, inputs: &[Inputs]) -> String {
        let job = self.job(key, inputs);
        self.leading(Layout::SOLO, |stage| sha256(drain(stage, vec![job], JOB).0[0].tensors().get("latents").unwrap()))
    }

    fn drawn_without(&self, key: u64, inputs: &[Inputs]) -> String {
        let (key, request, inputs) = self.job(key, inputs);
        let job = (key, Request { controls: Vec::new(), guess_mode: false, ..request }, inputs);
        self.leading(Layout::SOLO, |stage| sha256(drain(stage, vec![job], JOB).0[0].tensors().get("latents").unwrap()))
    }

    /// A job that was parked after two steps goes on elsewhere.
    fn check_parked(&self, inputs: &[Inputs], expected: &[String]) {
        let parked = self.leading(Layout::new(1, 2), |stage| {
            let (key, request, inputs) = self.job(JOB, inputs);
            stage.start(key, request, inputs);
            let (mut steps, mut end) = (0, None);
            while end.is_none() {
                stage
                    .turn(&mut |event| match event {
                        StageEvent::Step { .. } => steps += 1,
                        StageEvent::Failed { error, .. } => end = Some(error),
                        _ => {}
                    })
                    .unwrap();
                if steps == 2 && end.is_none() {
                    stage.park(key);
                }
            }
            end.unwrap()
        });
        let Error::Parked(Some(checkpoint)) = parked else { panic!("{parked}") };
        let (step, (key, request, inputs)) = (checkpoint.step, self.job(JOB, inputs));
        let rest = Inputs { checkpoint: Some(*checkpoint), ..inputs };
        let (_, steps) = self.leading(Layout::new(2, 1), |stage| drain(stage, vec![(key, request, rest)], JOB));
        assert_eq!(steps, expected[step..], "after it was parked");
    }
}

#[test]
fn u_nets_with_controls_have_the_same_bits_on_every_layout_alone_batched_and_resumed() {
    [SD15, SDXL, SDXL_UNION].iter().for_each(Case::check_layouts);
}

#[test]
fn transformers_with_controls_have_the_same_bits_on_every_layout_alone_batched_and_resumed() {
    [FLUX, SD3, QWEN_IMAGE].iter().for_each(Case::check_layouts);
}

#[test]
fn in_bf16_too() {
    Products::Bf16.scope(|| [SD15, FLUX].iter().for_each(Case::check_layouts));
}

#[test]
fn a_control_that_a_job_cannot_have_is_that_jobs_failure() {
    let inputs = FLUX.inputs();
    let failure = |change: &dyn Fn(&mut Request, &mut Inputs)| {
        let (key, mut request, mut changed) = FLUX.job(JOB, &inputs);
        change(&mut request, &mut changed);
        FLUX.leading(Layout::new(2, 1), |stage| {
            stage.start(key, request, changed);
            let (other, request, inputs) = FLUX.job(2, &inputs);
            stage.start(other, request, inputs);
            let (mut failed, mut done, mut more) = (None, 0, true);
            while more {
                let turn = stage.turn(&mut |event| match event {
                    StageEvent::Failed { key: JOB, error, .. } => failed = Some(error.to_string()),
                    StageEvent::Done { key, .. } if key == other => done += 1,
                    StageEvent::Done { key, .. } | StageEvent::Failed { key, .. } => panic!("job {key}"),
                    _ => {}
                });
                more = turn.unwrap();
            }
            assert_eq!(done, 1, "the other job is drawn");
            failed.unwrap()
        })
    };
    let of = |name: &str, mode: Option<usize>| {
        let name = name.to_owned();
        failure(&move |request: &mut Request, _: &mut Inputs| {
            request.controls = vec![Control { mode, ..control(&name, 1.0, [0.0, 1.0]) }];
        })
    };
    assert_eq!(of("nobody", None), "control `nobody`: no control network of this group has this name");
    assert_eq!(of("union", None), "control `union`: it needs a mode of 0 to 5");
    assert_eq!(of("union", Some(6)), "control `union`: it needs a mode of 0 to 5");
    let missing = failure(&|_, inputs: &mut Inputs| inputs.image_latents = None);
    assert!(missing.contains("control.0.mean"), "{missing}");
}

/// What a worker says of networks that are not for the model, or are none.
#[test]
fn a_network_that_cannot_be_used_says_why_before_any_job_names_it() {
    let none = tempfile::tempdir().unwrap();
    let torn = tempfile::tempdir().unwrap();
    let whole = golden("sd15_controlnet/controlnet");
    std::fs::copy(whole.join("config.json"), torn.path().join("config.json")).unwrap();
    let file = "diffusion_pytorch_model.safetensors";
    let bytes = std::fs::read(whole.join(file)).unwrap();
    std::fs::write(torn.path().join(file), &bytes[..bytes.len() / 2]).unwrap();
    // As those of Stable Diffusion XL are, but for the channels that both families have in common.
    let coarse = tempfile::tempdir().unwrap();
    let config = std::fs::read_to_string(golden("sd15_adapter/adapter/config.json")).unwrap();
    std::fs::write(coarse.path().join("config.json"), config.replace("\"downscale_factor\": 8", "\"downscale_factor\": 16"))
        .unwrap();
    let networks = [
        (golden("sd15_controlnet/controlnet"), ""),
        (golden("sd15_adapter/adapter"), ""),
        (golden("sdxl_controlnet/controlnet"), "addition_embed_type"),
        (golden("flux_controlnet/controlnet"), "FluxControlNetModel with a StableDiffusionPipeline"),
        (golden("sd15_txt2img/pipeline/unet"), "UNet2DConditionModel"),
        (coarse.path().to_owned(), "adapter_type and downscale_factor"),
        (none.path().to_owned(), "config.json"),
        (torn.path().to_owned(), file),
    ];
    let registered: Vec<RegisteredControl> =
        networks.iter().map(|(path, _)| RegisteredControl { name: "canny".into(), path: path.clone() }).collect();
    let cards = describe(&ModelDir::open(&golden(SD15.dir)).unwrap(), &registered);
    for (card, (path, problem)) in cards.iter().zip(&networks) {
        assert_eq!(card.problem.is_empty(), problem.is_empty(), "{}: {}", path.display(), card.problem);
        assert!(card.problem.contains(problem), "{}: {}", path.display(), card.problem);
    }
    assert_eq!((cards[0].class.as_str(), cards[0].digest.len(), cards[0].guesses), ("ControlNetModel", 64, true));
    assert_eq!((cards[1].class.as_str(), cards[1].multiple, cards[1].guesses), ("T2IAdapter", 8, false));
    let counted = |k: usize, of: &str| cards[k].residuals.get(of).copied();
    assert_eq!((counted(0, "ControlNets").is_some(), counted(1, "T2I-Adapters")), (true, Some(3)));
}

/// Configurations that no checkpoint has: each is refused by its field, before anything is read or made room for.
#[test]
fn a_network_whose_configuration_cannot_be_is_refused_by_its_field() {
    let dir = ModelDir::open(&golden(SD15.dir)).unwrap();
    let problem = |config: &str| {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("config.json"), config).unwrap();
        let registered = [RegisteredControl { name: "canny".into(), path: folder.path().to_owned() }];
        describe(&dir, &registered).remove(0).problem
    };
    for (config, field) in [
        ("{", "config.json"),
        ("[]", "config.json"),
        (r#"{"_class_name": 7}"#, "_class_name"),
        (r#"{"_class_name": "ControlNetModel", "block_out_channels": []}"#, "block_out_channels"),
        (r#"{"_class_name": "ControlNetModel", "block_out_channels": [18446744073709551615]}"#, "block_out_channels"),
        (r#"{"_class_name": "ControlNetModel", "layers_per_block": 1000000000}"#, "layers_per_block"),
        (
            r#"{"_class_name": "ControlNetModel", "conditioning_embedding_out_channels": []}"#,
            "conditioning_embedding_out_channels",
        ),
        (
            r#"{"_class_name": "ControlNetModel", "conditioning_embedding_out_channels": [0]}"#,
            "conditioning_embedding_out_channels",
        ),
        (r#"{"_class_name": "ControlNetModel", "conditioning_channels": 1}"#, "conditioning_channels"),
        (r#"{"_class_name": "ControlNetModel", "global_pool_conditions": true}"#, "global_pool_conditions"),
        (r#"{"_class_name": "ControlNetModel", "controlnet_conditioning_channel_order": "gbr"}"#, "channel_order"),
        (r#"{"_class_name": "ControlNetUnionModel", "addition_time_embed_dim": 256, "num_control_type": 0}"#, "num_control_type"),
        (r#"{"_class_name": "ControlNetUnionModel", "num_proj_channel": 64}"#, "num_proj_channel"),
        (r#"{"_class_name": "ControlNetUnionModel", "num_trans_layer": 1000000000}"#, "num_trans_layer"),
        (r#"{"_class_name": "ControlNetUnionModel"}"#, "addition_time_embed_dim"),
        (r#"{"_class_name": "T2IAdapter", "adapter_type": "light_adapter"}"#, "light_adapter"),
        (r#"{"_class_name": "T2IAdapter", "channels": [], "adapter_type": "full_adapter"}"#, "channels"),
        (r#"{"_class_name": "T2IAdapter", "downscale_factor": 1000000}"#, "downscale_factor"),
        (r#"{"_class_name": "T2IAdapter", "num_res_blocks": 1000000000}"#, "num_res_blocks"),
        (r#"{"_class_name": "FluxControlNetModel", "num_layers": 1000000000}"#, "num_layers"),
        (r#"{"_class_name": "FluxControlNetModel", "conditioning_embedding_channels": 16}"#, "conditioning_embedding_channels"),
        (r#"{"_class_name": "SD3ControlNetModel", "joint_attention_dim": null}"#, "joint_attention_dim"),
        (r#"{"_class_name": "SD3ControlNetModel", "use_pos_embed": false}"#, "use_pos_embed"),
        (r#"{"_class_name": "QwenImageControlNetModel", "extra_condition_channels": 4}"#, "extra_condition_channels"),
    ] {
        let problem = problem(config);
        assert!(problem.contains(field), "{config}: {problem:?}");
    }
}

/// A rank of the first block range holds its share of them, and no other rank any.
#[test]
fn a_rank_holds_its_share_of_control_networks() {
    let dir = ModelDir::open(&golden(FLUX.dir)).unwrap();
    let held = |layout: Layout| -> Vec<(u64, u64)> {
        let alone = registry::measure(&dir, "transformer", layout).unwrap();
        let with = registry::measure_with(&dir, "transformer", &FLUX.sources(), layout).unwrap();
        alone
            .iter()
            .zip(&with)
            .map(|(alone, with)| (with.held_bytes - alone.held_bytes, with.read_bytes - alone.read_bytes))
            .collect()
    };
    let whole = held(Layout::SOLO)[0];
    assert!(whole.0 >= whole.1 && whole.1 > 150_000, "{whole:?}");
    let ranks = held(Layout::new(2, 2));
    assert_eq!(ranks[2..], [(0, 0); 2]);
    // So small, embedders and norms, which every rank holds whole, are a quarter of it.
    assert!(ranks[..2].iter().all(|(held, _)| *held < whole.0 * 7 / 10 && *held > whole.0 / 2), "{ranks:?} of {whole:?}");
}
