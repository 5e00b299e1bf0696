//! Qwen-Image, Qwen-Image-Edit and Qwen-Image-Edit-Plus (2509, 2511): how the family's components become stages.
//!
//! Follows diffusers 0.42.1 `pipelines/qwenimage/`: `pipeline_qwenimage.py`, `pipeline_qwenimage_img2img.py`,
//! `pipeline_qwenimage_inpaint.py`, `pipeline_qwenimage_edit.py` and `pipeline_qwenimage_edit_plus.py`, by one denoiser. Guidance is by two passes, with a negative
//! prompt only, and keeps the length of every token. The order of random draws is the reference's: latents of the input picture
//! first, then the noise; editing takes the mode of the picture's latents and draws the noise alone.
//!
//! An editing job that names no `width` or `height` gets that side of the (last) picture brought to about one megapixel, as in the
//! reference; `max_sequence_length`, which the reference ignores there, it may not set.

use parallel::Weights;

use crate::autoencoder_kl_qwen::{AutoencoderKlQwenImage, AutoencoderKlQwenImageConfig};
use crate::autoencoder_stage::AutoencoderStage;
use crate::blocks::BlockModel;
use crate::card::{Card, ComponentCard, ParameterCard, StageCard, StageKind};
use crate::engine::Engine;
use crate::flow::{self, Defaults};
use crate::image_io::PictureLimits;
use crate::model_dir::ModelDir;
use crate::qwen_image_transformer::{QwenImageTransformer, QwenImageTransformerConfig};
use crate::qwen2_5_vl::{Qwen25VlConfig, Qwen25VlModel};
use crate::registry::{LoadSpec, Rank};
use crate::request::Guidance;
use crate::scheduler::FlowMatchEulerDiscreteConfig;
use crate::{Error, Result};

mod denoiser;
mod edit;
mod prompt;

pub use denoiser::QwenImageDenoiser;
pub use edit::Editing;
#[cfg(test)]
pub(crate) use edit::WORKING_AREA;
pub use prompt::PromptStage;

/// The reference's classes that this file serves.
pub const CLASSES: &[&str] =
    &["QwenImagePipeline", "QwenImageImg2ImgPipeline", "QwenImageInpaintPipeline", edit::ONE, edit::SEVERAL];

const GUIDANCE: Guidance = Guidance::TrueCfg;
/// Tokens of a prompt that are ever read; the reference's own limit.
const MAX_PROMPT_TOKENS: usize = 1024;
/// Latents of a picture's side when the job does not say.
const SAMPLE_SIZE: usize = 128;
/// Parts that the family is made of, the tokenizer or processor beside them.
const COMPONENTS: [&str; 3] = ["text_encoder", "transformer", "vae"];

/// The card of a Qwen-Image directory.
pub fn describe(dir: &ModelDir) -> Result<Card> {
    let transformer: QwenImageTransformerConfig = dir.config("transformer")?;
    let text_encoder: Qwen25VlConfig = dir.config("text_encoder")?;
    let vae: AutoencoderKlQwenImageConfig = dir.config("vae")?;
    let scheduler = FlowMatchEulerDiscreteConfig::of(dir)?;
    QwenImageDenoiser::load(dir)?;
    let editing = Editing::of(dir);
    let stages = StageCard::of_text_encoders(&["text_encoder"], "transformer");
    let mut stages = StageCard::with_controls(stages, StageKind::EncodeImage);
    for stage in stages.iter_mut().filter(|stage| stage.component == "text_encoder") {
        stage.with_pictures = editing.is_some();
    }
    let card = Card {
        family: "qwen-image".into(),
        pipeline_class: dir.pipeline_class().into(),
        scheduler: FlowMatchEulerDiscreteConfig::CLASS.into(),
        digest: String::new(),
        components: vec![
            ComponentCard::of(dir, "text_encoder", text_encoder.tp_divisor(), text_encoder.num_hidden_layers)?,
            ComponentCard::of(dir, "transformer", transformer.num_attention_heads, transformer.num_layers)?,
            // One head, and small beside the rest: held whole.
            ComponentCard::of(dir, "vae", 1, 1)?,
        ],
        stages,
        parameters: parameters(&vae, &scheduler, editing),
        max_pixels: flow::MAX_PIXELS + editing.map_or(0, |editing| editing.most() * edit::WORKING_AREA as u64),
        pixels_per_image: editing.map_or(0, |_| edit::WORKING_AREA as u64),
        without_prompt: false,
    };
    card.with_defaults_of(dir)
}

/// What a job may set. Defaults are the pipelines'.
fn parameters(
    vae: &AutoencoderKlQwenImageConfig,
    scheduler: &FlowMatchEulerDiscreteConfig,
    editing: Option<Editing>,
) -> Vec<ParameterCard> {
    let edits = editing.is_some();
    let mut parameters = flow::parameters(&Defaults {
        multiple: 2 * vae.scale_factor(),
        max_side: flow::MAX_SIDE,
        side: SAMPLE_SIZE * vae.scale_factor(),
        num_inference_steps: 50,
        least_steps: scheduler.least_steps(),
        max_sequence_length: 512,
    });
    parameters.push(ParameterCard::field("negative_prompt"));
    parameters.push(ParameterCard::number("true_cfg_scale", 1.0, 20.0, 4.0));
    parameters.push(ParameterCard::number("shift", 0.01, 100.0, 1.0).optional());
    if edits {
        parameters.retain(|p| !["strength", "mask_image_blob_id", "max_sequence_length"].contains(&p.name.as_str()));
    }
    if editing.is_some_and(|editing| editing.several) {
        parameters.push(ParameterCard::field("more_image_blob_ids"));
    }
    for parameter in &mut parameters {
        match parameter.name.as_str() {
            "width" | "height" if edits => *parameter = parameter.clone().optional(),
            "image_blob_id" if edits => *parameter = parameter.clone().required(),
            "max_sequence_length" => parameter.maximum = MAX_PROMPT_TOKENS as f64,
            _ => {}
        }
    }
    parameters
}

/// Loads one rank of one component.
pub fn load(spec: LoadSpec<'_>, weights: &Weights) -> Result<Rank> {
    let editing = Editing::of(spec.dir);
    load_with(spec, weights, editing)
}

/// As [`load`], looking at pictures as `editing` says.
pub fn load_with(spec: LoadSpec<'_>, weights: &Weights, editing: Option<Editing>) -> Result<Rank> {
    let LoadSpec { dir, component, group, limits, .. } = spec;
    let range = group.range;
    let model: Box<dyn BlockModel> = match component {
        "text_encoder" => {
            let config: Qwen25VlConfig = dir.config(component)?;
            // Who sees no pictures needs no eyes.
            let load = if editing.is_some() { Qwen25VlModel::load } else { Qwen25VlModel::load_text };
            Box::new(load(weights, &config, range)?)
        }
        "transformer" => {
            Box::new(QwenImageTransformer::load(weights, &dir.config::<QwenImageTransformerConfig>(component)?, range)?)
        }
        "vae" => {
            let vae = AutoencoderKlQwenImage::load(weights, &dir.config::<AutoencoderKlQwenImageConfig>(component)?)?;
            let stage = AutoencoderStage::new(vae, PictureLimits::default());
            return Ok(Rank::Leader(Box::new(match editing {
                Some(Editing { encoded, .. }) => stage.sized_by(move |_, picture, _| edit::working_size(picture, encoded)),
                None => stage,
            })));
        }
        other => return Err(Error::ModelDir { path: dir.root().into(), reason: format!("`{other}` is none of {COMPONENTS:?}") }),
    };
    Rank::of(model, group, |runner| {
        Ok(match component {
            "text_encoder" => Box::new(PromptStage::load(dir, runner, limits.prompt_cache_bytes, editing)?),
            _ => {
                let denoiser = QwenImageDenoiser::load(dir)?.with_controls(runner.controls());
                Box::new(Engine::new(Box::new(denoiser), runner, limits))
            }
        })
    })
}
