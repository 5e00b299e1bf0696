//! Whole generations of DeepFloyd IF, on pixels: there is no autoencoder.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;

use candle_core::Tensor;
use models::deepfloyd_if::IfDenoiser;
use models::model_dir::{ModelDir, read_json};
use models::request::{Encoder, Guidance};
use models::stage::Inputs;
use serde_json::Value;
use tests::golden::{Case, Outcome};

use crate::pipeline::{
    Family, TextEncoder, add, check_draws, check_embeds, check_ids, check_start, denoise, feed_noise, jobs, one_by_one, pictures,
    start, text,
};

/// What the case of a stage that enlarges was given the text of.
const FIRST_STAGE: &str = "if_stage1_pipeline";

pub(crate) fn pipeline(case: &mut Case) -> Outcome {
    let folder = with_text_encoder(case)?;
    let dir = ModelDir::open(folder.path()).map_err(text)?;
    let family = Family {
        denoiser: &IfDenoiser::load(&dir).map_err(text)?,
        guidance: Guidance::Cfg,
        encoders: vec![TextEncoder {
            component: "text_encoder",
            tokenizer: "tokenizer",
            encoder: Encoder::First,
            tokens: Some(77),
        }],
        embeds: vec![("encode_prompt.call0.0", "prompt_embeds"), ("encode_prompt.call0.1", "negative_prompt_embeds")],
        network: "unet",
        inputs: vec![("arg0", "sample"), ("class_labels", "class_labels")],
        pictures: Vec::new(),
        encode: None,
        unscale: &|pixels| Ok(pixels.clone()),
    };
    let jobs = jobs(case)?;
    if case.has("text_encoder.call0.input_ids") {
        check_ids(case, &dir, &family, &jobs)?;
    }
    check_draws(case)?;
    let mut inputs: Vec<Inputs> = jobs.iter().map(|_| Inputs::default()).collect();
    let texts = one_by_one(case, &dir, "text_encoder", &jobs, &inputs)?;
    add(&mut inputs, texts)?;
    if let Some(pictures) = pictures(case)? {
        inputs.iter_mut().for_each(|inputs| inputs.pictures = pictures.clone());
    }
    feed_noise(case, &jobs, &mut inputs)?;
    let states = start(&family, &jobs, &inputs)?;
    check_embeds(case, &family, &states)?;
    check_start(case, &family, &states)?;
    let drawn = denoise(case, &dir, "unet", &jobs, &inputs)?;
    let images = drawn.iter().map(|p| p.image().cloned().map_err(text)).collect::<Result<Vec<_>, String>>()?;
    let image = Tensor::cat(&images, 0).and_then(|image| image.permute((0, 2, 3, 1))).map_err(text)?;
    case.check("image", &image)
}

/// The case's model. One that enlarges was recorded without a text encoder, with what the first stage's gave: it gets that one.
fn with_text_encoder(case: &mut Case) -> Result<tempfile::TempDir, String> {
    let (weights, folder) = (case.folder("weights")?, tempfile::tempdir().map_err(text)?);
    let link = |from: &Path| -> Outcome {
        let from = from.canonicalize().map_err(text)?;
        symlink(&from, folder.path().join(from.file_name().unwrap_or_default())).map_err(text)
    };
    for entry in fs::read_dir(&weights).map_err(text)? {
        let entry = entry.map_err(text)?;
        if entry.file_name() != "model_index.json" {
            link(&entry.path())?;
        }
    }
    let mut index: Value = read_json(&weights.join("model_index.json")).map_err(text)?;
    if index["text_encoder"][0].is_null() {
        let first = case.dir.parent().ok_or("a case has no folder around it")?.join(FIRST_STAGE);
        let first_index: Value = read_json(&first.join("pipeline/model_index.json")).map_err(text)?;
        for part in ["text_encoder", "tokenizer"] {
            link(&first.join("pipeline").join(part))?;
            index[part] = first_index[part].clone();
        }
        let first: Value = read_json(&first.join("case.json")).map_err(text)?;
        for prompt in ["prompt", "negative_prompt"] {
            case.json["params"][prompt] = first["params"][prompt].clone();
        }
    }
    fs::write(folder.path().join("model_index.json"), index.to_string()).map_err(text)?;
    Ok(folder)
}
