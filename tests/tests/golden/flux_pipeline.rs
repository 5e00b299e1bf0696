//! Whole FLUX generations, through the stages that workers run.

use candle_core::{Device, Tensor};
use models::blocks::RankGroup;
use models::denoise::Denoiser;
use models::flux::FluxDenoiser;
use models::model_dir::ModelDir;
use models::registry::{self, Limits, LoadSpec, Rank};
use models::request::{Encoder, NoiseGenerator};
use models::stage::{Inputs, Pictures, Stage, StageEvent};
use models::tokenizer::Tokenizer;
use models::{Payload, Request};
use parallel::rng::{Generator, TorchCpu};
use serde_json::Value;
use tests::golden::{Case, Outcome};

/// Normals may differ from torch's in the last bits of the logarithm; the case `rng_cpu` says by how much.
const NOISE_TOLERANCE: f64 = 2e-6;

pub(crate) fn run(case: &mut Case) -> Outcome {
    let dir = ModelDir::open(&case.folder("weights")?).map_err(text)?;
    let jobs = jobs(case)?;
    check_ids(case, &dir, &jobs)?;
    check_draws(case)?;

    let mut inputs: Vec<Inputs> = jobs.iter().map(|_| Inputs::default()).collect();
    let one_by_one = |component: &str, inputs: &mut Vec<Inputs>| -> Result<Vec<Payload>, String> {
        let mut stage = load(&dir, component)?;
        jobs.iter()
            .zip(inputs.iter_mut())
            .map(|(job, inputs)| Ok(run_stage(&mut *stage, &[(job.clone(), inputs.clone())], |_, _| Ok(()))?.remove(0)))
            .collect()
    };
    for component in ["text_encoder", "text_encoder_2"] {
        let outputs = one_by_one(component, &mut inputs)?;
        for (inputs, output) in inputs.iter_mut().zip(outputs) {
            inputs.add(output).map_err(text)?;
        }
    }
    check_embeds(case, &jobs, &inputs)?;

    if let Some(pictures) = pictures(case)? {
        inputs.iter_mut().for_each(|inputs| inputs.pictures = pictures.clone());
        let outputs = one_by_one("vae", &mut inputs)?;
        for name in ["mean", "logvar"] {
            case.check(&format!("vae_encode.call0.{name}"), outputs[0].tensors().get(&format!("image.{name}")).map_err(text)?)?;
        }
        for (inputs, output) in inputs.iter_mut().zip(outputs) {
            inputs.add(output).map_err(text)?;
        }
    }
    feed_noise(case, &jobs, &mut inputs)?;
    check_start(case, &dir, &jobs, &inputs)?;
    let latents = denoise(case, &dir, &jobs, &inputs)?;
    decode(case, &dir, &jobs, latents)
}

/// One job for each prompt of the case.
fn jobs(case: &Case) -> Result<Vec<Request>, String> {
    let list = |name: &str| match case.param(name) {
        Value::Null => Vec::new(),
        Value::Array(values) => values.iter().map(|v| v.as_str().unwrap_or_default().to_owned()).collect(),
        value => vec![value.as_str().unwrap_or_default().to_owned()],
    };
    let number = |name: &str| case.param(name).as_f64();
    let size = |name: &str| number(name).map(|v| v as usize);
    let (second, negative) = (list("prompt_2"), list("negative_prompt"));
    let job = |(i, prompt): (usize, String)| {
        Some(Request {
            prompt,
            prompt_2: second.get(i).cloned(),
            negative_prompt: negative.get(i).cloned(),
            negative_prompt_2: None,
            width: size("width")?,
            height: size("height")?,
            num_inference_steps: size("num_inference_steps")?,
            guidance_scale: number("guidance_scale"),
            true_cfg_scale: number("true_cfg_scale").unwrap_or(1.0),
            seed: case.json["generator_seed"].as_u64()?,
            num_images_per_prompt: size("num_images_per_prompt").unwrap_or(1),
            strength: number("strength"),
            max_sequence_length: size("max_sequence_length")?,
            noise_generator: NoiseGenerator::TorchCpu,
        })
    };
    list("prompt").into_iter().enumerate().map(job).collect::<Option<_>>().ok_or_else(|| "a parameter is missing".into())
}

fn check_ids(case: &mut Case, dir: &ModelDir, jobs: &[Request]) -> Outcome {
    let encoders = [
        ("text_encoder", "tokenizer", Encoder::First, 77),
        ("text_encoder_2", "tokenizer_2", Encoder::Second, jobs[0].max_sequence_length),
    ];
    for (name, folder, encoder, tokens) in encoders {
        let tokenizer = Tokenizer::load(&dir.root().join(folder)).map_err(text)?;
        let ids = |prompt: &str| {
            Ok(tokenizer.encode(prompt, tokens).map_err(text)?.input_ids.into_iter().map(i64::from).collect::<Vec<_>>())
        };
        let check = |case: &mut Case, call: usize, rows: Vec<Vec<i64>>| {
            case.check_within(&format!("{name}.call{call}.input_ids"), &Tensor::new(rows, &Device::Cpu).map_err(text)?, 0.0)
        };
        check(case, 0, jobs.iter().map(|job| ids(job.prompt_of(encoder))).collect::<Result<_, String>>()?)?;
        if jobs[0].do_true_cfg() {
            let negative = jobs.iter().filter_map(|job| job.negative_prompt_of(encoder));
            check(case, 1, negative.map(ids).collect::<Result<_, String>>()?)?;
        }
    }
    Ok(())
}

/// The draws of the run, in order, from its seed.
fn check_draws(case: &mut Case) -> Outcome {
    let seed = case.json["generator_seed"].as_u64().ok_or("no generator_seed")?;
    let mut generator = Generator::Cpu(TorchCpu::new(seed));
    for name in (0..).map(|i| format!("randn{i:02}")).take_while(|name| case.has(name)).collect::<Vec<_>>() {
        let draw = generator.randn(case.tensor(&name)?.dims()).map_err(text)?;
        case.check_within(&name, &draw, NOISE_TOLERANCE)?;
    }
    Ok(())
}

fn check_embeds(case: &mut Case, jobs: &[Request], inputs: &[Inputs]) -> Outcome {
    for (call, prefix) in ["", "negative_"].into_iter().enumerate().take(if jobs[0].do_true_cfg() { 2 } else { 1 }) {
        for (value, name) in ["prompt_embeds", "pooled_prompt_embeds"].into_iter().enumerate() {
            let mut rows = Vec::new();
            for (job, inputs) in jobs.iter().zip(inputs) {
                let one = inputs.conditioning.get(&format!("{prefix}{name}")).map_err(text)?;
                rows.extend(std::iter::repeat_n(one.clone(), job.num_images_per_prompt));
            }
            case.check(&format!("encode_prompt.call{call}.{value}"), &Tensor::cat(&rows, 0).map_err(text)?)?;
        }
    }
    Ok(())
}

fn pictures(case: &Case) -> Result<Option<Pictures>, String> {
    let read = |name: &str| case.param(name).as_str().map(|file| std::fs::read(case.dir.join(file)).map_err(text)).transpose();
    let (image, mask_image) = (read("image")?, read("mask_image")?);
    Ok(image.is_some().then_some(Pictures { image, mask_image }))
}

/// Several prompts of one generator: each job gets its rows of the one draw. A single job draws for itself.
fn feed_noise(case: &Case, jobs: &[Request], inputs: &mut [Inputs]) -> Outcome {
    if jobs.len() == 1 {
        return Ok(());
    }
    let noise = case.tensor("randn00")?;
    for (i, inputs) in inputs.iter_mut().enumerate() {
        let rows = jobs[i].num_images_per_prompt;
        inputs.noise = Some(noise.narrow(0, i * rows, rows).map_err(text)?);
    }
    Ok(())
}

/// Where the denoiser starts, and what the network is given first.
fn check_start(case: &mut Case, dir: &ModelDir, jobs: &[Request], inputs: &[Inputs]) -> Outcome {
    let denoiser = FluxDenoiser::load(dir).map_err(text)?;
    let tolerance = case.tolerance("step00.prev_sample")?;
    let states = jobs.iter().zip(inputs).map(|(job, inputs)| denoiser.start(job.clone(), inputs.clone()).map_err(text));
    let states = states.collect::<Result<Vec<_>, String>>()?;
    let timesteps: Vec<f64> =
        case.json["timesteps_passed_to_step"].as_array().into_iter().flatten().filter_map(Value::as_f64).collect();
    if states[0].scheduler.timesteps().len() != timesteps.len() {
        return Err(format!("{} timesteps, expected {}", states[0].scheduler.timesteps().len(), timesteps.len()));
    }
    if let Some((got, expected)) = states[0].scheduler.timesteps().iter().zip(&timesteps).find(|(a, b)| (*a - *b).abs() > 1e-3) {
        return Err(format!("timestep {got}, expected {expected}"));
    }
    let latents: Vec<Tensor> = states.iter().map(|s| s.latents.clone()).collect();
    case.check_within("latents_init", &Tensor::cat(&latents, 0).map_err(text)?, tolerance)?;
    let first = denoiser.branches(&states[0]).map_err(text)?.remove(0);
    for name in ["timestep", "guidance", "img_ids", "txt_ids"] {
        let recorded = format!("transformer.call0.in.{name}");
        if jobs.len() == 1 && case.has(&recorded) {
            case.check_within(&recorded, first.get(name).map_err(text)?, NOISE_TOLERANCE)?;
        }
    }
    Ok(())
}

/// All jobs at once in one engine.
fn denoise(case: &mut Case, dir: &ModelDir, jobs: &[Request], inputs: &[Inputs]) -> Result<Vec<Payload>, String> {
    let mut stage = load(dir, "transformer")?;
    let tasks: Vec<_> = jobs.iter().cloned().zip(inputs.iter().cloned()).collect();
    let mut steps: Vec<Vec<Tensor>> = Vec::new();
    let outputs = run_stage(&mut *stage, &tasks, |step, sample| {
        if steps.len() < step {
            steps.resize(step, Vec::new());
        }
        steps[step - 1].push(sample.clone());
        Ok(())
    })?;
    for (step, rows) in steps.iter().enumerate() {
        case.check(&format!("step{step:02}.prev_sample"), &Tensor::cat(rows, 0).map_err(text)?)?;
    }
    Ok(outputs)
}

fn decode(case: &mut Case, dir: &ModelDir, jobs: &[Request], latents: Vec<Payload>) -> Outcome {
    let config: models::autoencoder_kl::AutoencoderKlConfig = dir.config("vae").map_err(text)?;
    let rows = latents.iter().map(|l| l.tensors().get("latents").cloned().map_err(text)).collect::<Result<Vec<_>, String>>()?;
    let unscaled = config.unscale(&Tensor::cat(&rows, 0).map_err(text)?).map_err(text)?;
    case.check("vae_decode.in", &unscaled)?;
    let mut stage = load(dir, "vae")?;
    let mut images = Vec::new();
    for (job, latents) in jobs.iter().zip(latents) {
        let mut inputs = Inputs::default();
        inputs.add(latents).map_err(text)?;
        images.push(run_stage(&mut *stage, &[(job.clone(), inputs)], |_, _| Ok(()))?.remove(0).image().map_err(text)?.clone());
    }
    let image = Tensor::cat(&images, 0).and_then(|image| image.permute((0, 2, 3, 1))).map_err(text)?;
    case.check("image", &image)
}

fn load(dir: &ModelDir, component: &str) -> Result<Box<dyn Stage>, String> {
    let spec = LoadSpec { dir, component, group: RankGroup::solo(), device: Device::Cpu, limits: Limits::default() };
    match registry::load(spec, &mut |_| ()).map_err(text)? {
        Rank::Leader(stage) => Ok(stage),
        Rank::Follower(_) => Err("a group of one has a leader only".into()),
    }
}

/// Starts all tasks, takes turns until all are done, and returns their outputs in order. `on_step` sees every denoise step.
fn run_stage(
    stage: &mut dyn Stage,
    tasks: &[(Request, Inputs)],
    mut on_step: impl FnMut(usize, &Tensor) -> Outcome,
) -> Result<Vec<Payload>, String> {
    for (key, (request, inputs)) in tasks.iter().enumerate() {
        stage.start(key as u64, request.clone(), inputs.clone());
    }
    let mut done: Vec<Option<Payload>> = tasks.iter().map(|_| None).collect();
    let mut failed = None;
    while done.iter().any(Option::is_none) && failed.is_none() {
        let worked = stage.turn(&mut |event| match event {
            StageEvent::Step { step, state: Some(state), .. } => {
                if let Some(last) = &state.last {
                    failed = on_step(step, &last.prev_sample).err();
                }
            }
            StageEvent::Done { key, payload } => done[key as usize] = Some(payload),
            StageEvent::Failed { error, .. } => failed = Some(error.to_string()),
            StageEvent::Started { .. } | StageEvent::Step { .. } => {}
        });
        if !worked.map_err(text)? {
            break;
        }
    }
    match failed {
        Some(reason) => Err(reason),
        None => done.into_iter().collect::<Option<_>>().ok_or_else(|| "a task was left undone".into()),
    }
}

fn text(e: impl std::fmt::Display) -> String {
    e.to_string()
}
