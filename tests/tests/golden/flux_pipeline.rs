//! Whole FLUX generations, through the stages that workers run.

use std::os::unix::fs::symlink;

use candle_core::{Device, Tensor};
use models::autoencoder_kl::{AutoencoderKl, AutoencoderKlConfig};
use models::autoencoder_stage::AutoencoderStage;
use models::denoise::Denoiser;
use models::flux::{FluxDenoiser, kontext};
use models::image_io::PictureLimits;
use models::model_dir::ModelDir;
use models::request::{Encoder, Guidance};
use models::stage::{Inputs, Stage};
use models::tokenizer::Tokenizer;
use models::{Payload, Request};
use parallel::{DType, Solo, Weights};
use serde_json::Value;
use tests::golden::{Case, Outcome};

use crate::pipeline::{NOISE_TOLERANCE, check_draws, denoise, feed_noise, jobs, load, one_by_one, pictures, run_stage, text};

pub(crate) fn run(case: &mut Case) -> Outcome {
    let folder = as_pipeline(case)?;
    let dir = ModelDir::open(folder.path()).map_err(text)?;
    let jobs = jobs(case)?;
    check_ids(case, &dir, &jobs)?;
    check_draws(case)?;

    let mut inputs: Vec<Inputs> = jobs.iter().map(|_| Inputs::default()).collect();
    for component in ["text_encoder", "text_encoder_2"] {
        let outputs = one_by_one(&dir, component, &jobs, &inputs)?;
        for (inputs, output) in inputs.iter_mut().zip(outputs) {
            inputs.add(output).map_err(text)?;
        }
    }
    check_embeds(case, &jobs, &inputs)?;

    if let Some(pictures) = pictures(case)? {
        inputs.iter_mut().for_each(|inputs| inputs.pictures = pictures.clone());
        let outputs = encode(case, &dir, &jobs, &inputs)?;
        // The plain pipeline encodes the masked picture too, and makes no use of it.
        let pictures: &[&str] = if dir.pipeline_class() == "FluxFillPipeline" { &["image", "masked_image"] } else { &["image"] };
        for (call, picture) in pictures.iter().enumerate() {
            for moment in ["mean", "logvar"] {
                let encoded = outputs[0].tensors().get(&format!("{picture}.{moment}")).map_err(text)?;
                case.check(&format!("vae_encode.call{call}.{moment}"), encoded)?;
            }
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

/// The case's weights as a model of the case's pipeline: several pipelines were recorded with the weights of one.
fn as_pipeline(case: &Case) -> Result<tempfile::TempDir, String> {
    let (weights, folder) = (case.folder("weights")?, tempfile::tempdir().map_err(text)?);
    for entry in std::fs::read_dir(&weights).map_err(text)? {
        let path = entry.and_then(|entry| entry.path().canonicalize()).map_err(text)?;
        symlink(&path, folder.path().join(path.file_name().unwrap_or_default())).map_err(text)?;
    }
    let index = folder.path().join("model_index.json");
    let mut json: Value = serde_json::from_slice(&std::fs::read(&index).map_err(text)?).map_err(text)?;
    json["_class_name"] = case.json["pipeline_class"].clone();
    std::fs::remove_file(&index).and_then(|()| std::fs::write(&index, json.to_string())).map_err(text)?;
    Ok(folder)
}

/// The jobs' pictures, encoded as the pipeline does, or (Kontext) at their own size if the case says so.
fn encode(case: &Case, dir: &ModelDir, jobs: &[Request], inputs: &[Inputs]) -> Result<Vec<Payload>, String> {
    if case.param("_auto_resize").as_bool() != Some(false) {
        return one_by_one(dir, "vae", jobs, inputs);
    }
    let weights = Weights::open(&dir.root().join("vae"), std::sync::Arc::new(Solo), DType::F32, &Device::Cpu).map_err(text)?;
    let config: AutoencoderKlConfig = dir.config("vae").map_err(text)?;
    let vae = AutoencoderKl::load(&weights, &config).map_err(text)?;
    let mut stage: Box<dyn Stage> = Box::new(AutoencoderStage::new(vae, PictureLimits::default()).sized_by(kontext::own_size));
    let tasks = jobs.iter().cloned().zip(inputs.iter().cloned());
    run_stage(&mut *stage, &tasks.collect::<Vec<_>>(), |_, _| Ok(()))
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
        if jobs[0].cfg_scale(Guidance::TrueCfg).is_some() {
            let negative = jobs.iter().filter_map(|job| job.negative_prompt_of(encoder, Guidance::TrueCfg));
            check(case, 1, negative.map(ids).collect::<Result<_, String>>()?)?;
        }
    }
    Ok(())
}

fn check_embeds(case: &mut Case, jobs: &[Request], inputs: &[Inputs]) -> Outcome {
    for (call, prefix) in
        ["", "negative_"].into_iter().enumerate().take(if jobs[0].cfg_scale(Guidance::TrueCfg).is_some() { 2 } else { 1 })
    {
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
    for name in ["hidden_states", "timestep", "guidance", "img_ids", "txt_ids"] {
        let recorded = format!("transformer.call0.in.{name}");
        if jobs.len() == 1 && case.has(&recorded) {
            let within = if name == "hidden_states" { tolerance } else { NOISE_TOLERANCE };
            case.check_within(&recorded, first.get(name).map_err(text)?, within)?;
        }
    }
    Ok(())
}

fn decode(case: &mut Case, dir: &ModelDir, jobs: &[Request], latents: Vec<Payload>) -> Outcome {
    let config: AutoencoderKlConfig = dir.config("vae").map_err(text)?;
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
