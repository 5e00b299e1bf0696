//! Stable Diffusion 1 and XL: whole generations through the stages that workers run. Cases: `sd15_*`, `sdxl_*`.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;

use candle_core::Tensor;
use models::autoencoder_kl::AutoencoderKlConfig;
use models::model_dir::{ModelDir, read_json};
use models::request::{Encoder, Guidance};
use models::stable_diffusion::StableDiffusionDenoiser;
use models::stable_diffusion_xl::StableDiffusionXlDenoiser;
use models::stage::Inputs;
use serde_json::Value;
use tests::golden::{Case, Outcome};

use crate::controlled;
use crate::pipeline::{BASE_LATENTS, Family, TextEncoder, add, generation, jobs, one_by_one, text};

pub(crate) fn pipeline(case: &mut Case) -> Outcome {
    let model = Model::of(case)?;
    let (dir, vae) = (&model.dir, &model.vae);
    let family = Family {
        denoiser: &StableDiffusionDenoiser::load(dir).map_err(text)?.with_controls(&controlled::facts(case, dir)?),
        guidance: Guidance::Cfg,
        encoders: vec![clip("text_encoder", "tokenizer", Encoder::First)],
        embeds: vec![("encode_prompt.call0.0", "prompt_embeds"), ("encode_prompt.call0.1", "negative_prompt_embeds")],
        network: "unet",
        inputs: vec![("arg0", "sample")],
        pictures: pictures(case),
        encode: None,
        unscale: &|latents| vae.unscale(latents),
    };
    generation(case, dir, &family)
}

pub(crate) fn xl(case: &mut Case) -> Outcome {
    if case.has(BASE_LATENTS) {
        let (latents, tolerance) = base(case)?;
        case.check_within(BASE_LATENTS, &latents, tolerance)?;
    }
    let model = Model::of(case)?;
    let (dir, vae) = (&model.dir, &model.vae);
    let family = Family {
        denoiser: &StableDiffusionXlDenoiser::load(dir).map_err(text)?.with_controls(&controlled::facts(case, dir)?),
        guidance: Guidance::Cfg,
        encoders: xl_encoders(dir),
        embeds: vec![
            ("encode_prompt.call0.0", "prompt_embeds"),
            ("encode_prompt.call0.1", "negative_prompt_embeds"),
            ("encode_prompt.call0.2", "pooled_prompt_embeds"),
            ("encode_prompt.call0.3", "negative_pooled_prompt_embeds"),
        ],
        network: "unet",
        inputs: vec![("arg0", "sample"), ("added_cond_kwargs.time_ids", "added_cond_kwargs.time_ids")],
        // Of the masked picture nothing is made by a network of 4 channels, and its tolerance is none: XL's autoencoder stayed in float32
        // where the reference was run in float64 to measure it.
        pictures: pictures(case).into_iter().filter(|picture| *picture == "image").collect(),
        encode: None,
        unscale: &|latents: &Tensor| vae.unscale(latents),
    };
    generation(case, dir, &family)
}

/// A refiner has the second one alone, which reads the first one's prompt.
fn xl_encoders(dir: &ModelDir) -> Vec<TextEncoder> {
    let both = vec![clip("text_encoder", "tokenizer", Encoder::First), clip("text_encoder_2", "tokenizer_2", Encoder::Second)];
    let alone = vec![clip("text_encoder_2", "tokenizer_2", Encoder::First)];
    if dir.component("text_encoder").is_some() { both } else { alone }
}

/// What the case's base model leaves of the job to its refiner, and how far that may be from the recording. To the refiner's case it is an input, given alike to
/// the runs in float32 and float64: its entry there (an error of 0) says nothing of a run that makes it. The base model's own case measured such a run, so
/// its tolerance for the latents after a step holds.
fn base(case: &Case) -> Result<(Tensor, f64), String> {
    let mut base = Case::open(&case.dir)?;
    for (key, of_base) in [("weights", "base_weights"), ("params", "base_params"), ("generator_seed", "base_generator_seed")] {
        base.json[key] = case.json[of_base].clone();
    }
    let (dir, jobs) = (Model::of(&base)?, jobs(&base)?);
    let mut inputs = vec![Inputs::default(); jobs.len()];
    for TextEncoder { component, .. } in xl_encoders(&dir.dir) {
        let outputs = one_by_one(&base, &dir.dir, component, &jobs, &inputs)?;
        add(&mut inputs, outputs)?;
    }
    let latents = one_by_one(&base, &dir.dir, "unet", &jobs, &inputs)?;
    let latents = latents[0].tensors().get("latents").cloned().map_err(text)?;
    let weights = base.folder("weights")?;
    let own = Case::open(weights.parent().ok_or("the base model is of no case")?)?;
    Ok((latents, own.tolerance("step00.prev_sample")?))
}

/// Each CLIP reads 77 tokens, always.
fn clip(component: &'static str, tokenizer: &'static str, encoder: Encoder) -> TextEncoder {
    TextEncoder { component, tokenizer, encoder, tokens: Some(77) }
}

/// What the reference encodes: of a picture to repaint from noise by a network that is given the rest of it, only that rest.
fn pictures(case: &Case) -> Vec<&'static str> {
    match (case.has("vae_encode.call0.mean"), case.has("vae_encode.call1.mean"), case.param("mask_image")) {
        (false, ..) => vec![],
        (true, false, Value::Null) => vec!["image"],
        (true, false, _) => vec!["masked_image"],
        (true, true, _) => vec!["image", "masked_image"],
    }
}

/// The case's model with the case's own scheduler: several share the weights of one.
struct Model {
    dir: ModelDir,
    vae: AutoencoderKlConfig,
    _folder: tempfile::TempDir,
}

impl Model {
    fn of(case: &Case) -> Result<Self, String> {
        let (weights, folder) = (case.folder("weights")?, tempfile::tempdir().map_err(text)?);
        let weights = weights.canonicalize().map_err(text)?;
        for entry in fs::read_dir(&weights).map_err(text)? {
            let entry = entry.map_err(text)?;
            if entry.file_name() != "scheduler" && entry.file_name() != "model_index.json" {
                symlink(entry.path(), folder.path().join(entry.file_name())).map_err(text)?;
            }
        }
        let (class, mut config) = (&case.json["scheduler"]["class"], case.json["scheduler"]["config"].clone());
        config["_class_name"] = class.clone();
        let mut index: Value = read_json(&weights.join("model_index.json")).map_err(text)?;
        index["scheduler"][1] = class.clone();
        fs::create_dir(folder.path().join("scheduler")).map_err(text)?;
        write(&folder.path().join("scheduler/scheduler_config.json"), &config)?;
        write(&folder.path().join("model_index.json"), &index)?;
        let dir = ModelDir::open(folder.path()).map_err(text)?;
        let vae = dir.config("vae").map_err(text)?;
        Ok(Self { dir, vae, _folder: folder })
    }
}

fn write(path: &Path, json: &Value) -> Outcome {
    fs::write(path, json.to_string()).map_err(text)
}
