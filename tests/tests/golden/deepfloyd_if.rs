//! Whole generations of DeepFloyd IF, on pixels: there is no autoencoder.

use candle_core::Tensor;
use models::deepfloyd_if::IfDenoiser;
use models::model_dir::{ModelDir, read_json};
use models::request::{Encoder, Guidance};
use models::stage::Inputs;
use serde_json::Value;
use tests::assembled::with_text_encoder_of;
use tests::golden::{Case, Outcome};

use crate::pipeline::{
    Family, TextEncoder, add, check_draws, check_embeds, check_ids, check_start, denoise, feed_noise, jobs, one_by_one, pictures,
    start, text,
};

/// What the case of a stage that enlarges was given the text of.
const FIRST_STAGE: &str = "if_stage1_pipeline";

pub(crate) fn pipeline(case: &mut Case) -> Outcome {
    let model = with_text_encoder(case)?;
    let dir = &model.dir;
    let family = Family {
        denoiser: &IfDenoiser::load(dir).map_err(text)?,
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
        check_ids(case, dir, &family, &jobs)?;
    }
    check_draws(case)?;
    let mut inputs: Vec<Inputs> = jobs.iter().map(|_| Inputs::default()).collect();
    let texts = one_by_one(case, dir, "text_encoder", &jobs, &inputs)?;
    add(&mut inputs, texts)?;
    if let Some(pictures) = pictures(case)? {
        inputs.iter_mut().for_each(|inputs| inputs.pictures = pictures.clone());
    }
    feed_noise(case, &jobs, &mut inputs)?;
    let states = start(&family, &jobs, &inputs)?;
    check_embeds(case, &family, &states)?;
    check_start(case, &family, &states)?;
    let drawn = denoise(case, dir, "unet", &jobs, &inputs)?;
    let images = drawn.iter().map(|p| p.image().cloned().map_err(text)).collect::<Result<Vec<_>, String>>()?;
    let image = Tensor::cat(&images, 0).and_then(|image| image.permute((0, 2, 3, 1))).map_err(text)?;
    case.check("image", &image)
}

/// The case's model. One that enlarges was recorded without a text encoder, with what the first stage's gave: it gets that one, and its prompts.
fn with_text_encoder(case: &mut Case) -> Result<Model, String> {
    let weights = case.folder("weights")?;
    if ModelDir::open(&weights).map_err(text)?.component("text_encoder").is_some() {
        return Ok(Model { dir: ModelDir::open(&weights).map_err(text)?, _folder: None });
    }
    let first = case.dir.parent().ok_or("a case has no folder around it")?.join(FIRST_STAGE);
    let folder = with_text_encoder_of(&weights, &first.join("pipeline")).map_err(text)?;
    let recorded: Value = read_json(&first.join("case.json")).map_err(text)?;
    for prompt in ["prompt", "negative_prompt"] {
        case.json["params"][prompt] = recorded["params"][prompt].clone();
    }
    Ok(Model { dir: ModelDir::open(folder.path()).map_err(text)?, _folder: Some(folder) })
}

struct Model {
    dir: ModelDir,
    _folder: Option<tempfile::TempDir>,
}
