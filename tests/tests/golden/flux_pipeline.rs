//! Whole FLUX generations, through the stages that workers run.

use std::os::unix::fs::symlink;

use models::autoencoder_kl::{AutoencoderKl, AutoencoderKlConfig};
use models::autoencoder_stage::AutoencoderStage;
use models::flux::{FluxDenoiser, kontext};
use models::image_io::PictureLimits;
use models::model_dir::ModelDir;
use models::request::{Encoder, Guidance};
use models::stage::Inputs;
use models::{Payload, Request};
use parallel::{DType, Device, Solo, Weights};
use serde_json::Value;
use tests::golden::{Case, Outcome};

use crate::controlled;
use crate::pipeline::{Family, TextEncoder, generation, run_stage, text};

pub(crate) fn run(case: &mut Case) -> Outcome {
    let folder = as_pipeline(case)?;
    let dir = ModelDir::open(folder.path()).map_err(text)?;
    let vae: AutoencoderKlConfig = dir.config("vae").map_err(text)?;
    let own_size = |jobs: &[Request], inputs: &[Inputs]| encode_at_own_size(&dir, jobs, inputs);
    let family = Family {
        denoiser: &FluxDenoiser::load(&dir).map_err(text)?.with_controls(&controlled::facts(case, &dir)?),
        guidance: Guidance::TrueCfg,
        encoders: vec![
            TextEncoder { component: "text_encoder", tokenizer: "tokenizer", encoder: Encoder::First, tokens: Some(77) },
            TextEncoder { component: "text_encoder_2", tokenizer: "tokenizer_2", encoder: Encoder::Second, tokens: None },
        ],
        embeds: vec![
            ("encode_prompt.call0.0", "prompt_embeds"),
            ("encode_prompt.call0.1", "pooled_prompt_embeds"),
            ("encode_prompt.call1.0", "negative_prompt_embeds"),
            ("encode_prompt.call1.1", "negative_pooled_prompt_embeds"),
        ],
        network: "transformer",
        inputs: vec!["hidden_states", "timestep", "guidance", "img_ids", "txt_ids"]
            .into_iter()
            .map(|name| (name, name))
            .collect(),
        // The plain inpainting pipeline encodes the masked picture too, and makes no use of it.
        pictures: match dir.pipeline_class() {
            _ if controlled::is_controlled(case) => vec!["control.0"],
            "FluxFillPipeline" => vec!["image", "masked_image"],
            _ => vec!["image"],
        },
        encode: if case.param("_auto_resize").as_bool() == Some(false) { Some(&own_size) } else { None },
        unscale: &|latents| vae.unscale(latents),
    };
    generation(case, &dir, &family)
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
    // A pipeline with control networks is the model's own.
    json["_class_name"] = case.json["pipeline_class"].as_str().unwrap_or_default().replace("ControlNet", "").into();
    std::fs::remove_file(&index).and_then(|()| std::fs::write(&index, json.to_string())).map_err(text)?;
    Ok(folder)
}

/// Kontext's pictures at their own size.
fn encode_at_own_size(dir: &ModelDir, jobs: &[Request], inputs: &[Inputs]) -> Result<Vec<Payload>, String> {
    let weights = Weights::open(&dir.root().join("vae"), std::sync::Arc::new(Solo), DType::F32, &Device::Cpu).map_err(text)?;
    let config: AutoencoderKlConfig = dir.config("vae").map_err(text)?;
    let vae = AutoencoderKl::load(&weights, &config).map_err(text)?;
    let mut stage = AutoencoderStage::new(vae, PictureLimits::default()).sized_by(kontext::own_size);
    let tasks: Vec<_> = jobs.iter().cloned().zip(inputs.iter().cloned()).collect();
    run_stage(&mut stage, &tasks, |_, _| ())
}
