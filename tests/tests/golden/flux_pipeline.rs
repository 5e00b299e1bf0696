//! Whole FLUX generations, through the stages that workers run.

use candle_core::{Device, Tensor};
use models::denoise::Denoiser;
use models::flux::FluxDenoiser;
use models::model_dir::ModelDir;
use models::request::{Encoder, Guidance};
use models::stage::Inputs;
use models::tokenizer::Tokenizer;
use models::{Payload, Request};
use serde_json::Value;
use tests::golden::{Case, Outcome};

use crate::pipeline::{NOISE_TOLERANCE, check_draws, denoise, feed_noise, jobs, load, one_by_one, pictures, run_stage, text};

pub(crate) fn run(case: &mut Case) -> Outcome {
    let dir = ModelDir::open(&case.folder("weights")?).map_err(text)?;
    let jobs = jobs(case)?;
    check_ids(case, &dir, &jobs)?;
    check_draws(case)?;

    let mut inputs: Vec<Inputs> = jobs.iter().map(|_| Inputs::default()).collect();
    for component in ["text_encoder", "text_encoder_2"] {
        let outputs = one_by_one(case, &dir, component, &jobs, &inputs)?;
        for (inputs, output) in inputs.iter_mut().zip(outputs) {
            inputs.add(output).map_err(text)?;
        }
    }
    check_embeds(case, &jobs, &inputs)?;

    if let Some(pictures) = pictures(case)? {
        inputs.iter_mut().for_each(|inputs| inputs.pictures = pictures.clone());
        let outputs = one_by_one(case, &dir, "vae", &jobs, &inputs)?;
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
    for name in ["timestep", "guidance", "img_ids", "txt_ids"] {
        let recorded = format!("transformer.call0.in.{name}");
        if jobs.len() == 1 && case.has(&recorded) {
            case.check_within(&recorded, first.get(name).map_err(text)?, NOISE_TOLERANCE)?;
        }
    }
    Ok(())
}

fn decode(case: &mut Case, dir: &ModelDir, jobs: &[Request], latents: Vec<Payload>) -> Outcome {
    let config: models::autoencoder_kl::AutoencoderKlConfig = dir.config("vae").map_err(text)?;
    let rows = latents.iter().map(|l| l.tensors().get("latents").cloned().map_err(text)).collect::<Result<Vec<_>, String>>()?;
    let unscaled = config.unscale(&Tensor::cat(&rows, 0).map_err(text)?).map_err(text)?;
    case.check("vae_decode.in", &unscaled)?;
    let mut stage = load(case, dir, "vae")?;
    let mut images = Vec::new();
    for (job, latents) in jobs.iter().zip(latents) {
        let mut inputs = Inputs::default();
        inputs.add(latents).map_err(text)?;
        images.push(run_stage(&mut *stage, &[(job.clone(), inputs)], |_, _| Ok(()))?.remove(0).image().map_err(text)?.clone());
    }
    let image = Tensor::cat(&images, 0).and_then(|image| image.permute((0, 2, 3, 1))).map_err(text)?;
    case.check("image", &image)
}
