//! FLUX.1: how the family's components become stages.
//!
//! Follows diffusers' `pipeline_flux.py`, `pipeline_flux_img2img.py`, `pipeline_flux_inpaint.py`, `pipeline_flux_kontext.py`,
//! `pipeline_flux_fill.py` and `pipeline_flux_control.py` (0.42): text to image, image to image, inpainting, editing by a reference picture (Kontext),
//! filling in (Fill) and drawing by depths or edges (Depth, Canny), with distilled guidance and true classifier-free guidance. [`card`] says what a job may set, [`denoiser`]
//! what is done around the network.

use std::path::Path;

use parallel::Weights;

use crate::autoencoder_kl::{AutoencoderKl, AutoencoderKlConfig};
use crate::autoencoder_stage::AutoencoderStage;
use crate::blocks::BlockModel;
use crate::clip::{ClipTextConfig, ClipTextEncoder};
use crate::engine::Engine;
use crate::flux_transformer::{FluxTransformer, FluxTransformerConfig};
use crate::image_io::PictureLimits;
use crate::model_dir::ModelDir;
use crate::registry::{LoadSpec, Rank};
use crate::request::{Encoder, Guidance};
use crate::t5::{T5Config, T5Encoder};
use crate::text_stage::{Kept, TextEncoding, TextStage};
use crate::tokenizer::Tokenizer;
use crate::{Error, Result};

pub mod card;
pub mod denoiser;
pub mod fill;
pub mod kontext;

pub use card::describe;
pub use denoiser::FluxDenoiser;

/// The reference's classes that this family serves.
pub const CLASSES: &[&str] = &["FluxPipeline", "FluxImg2ImgPipeline", "FluxInpaintPipeline", KONTEXT, FILL, CONTROL];

const KONTEXT: &str = "FluxKontextPipeline";
const FILL: &str = "FluxFillPipeline";
const CONTROL: &str = "FluxControlPipeline";

/// Of the kind with two passes; the distilled kind is an input of the network.
const GUIDANCE: Guidance = Guidance::TrueCfg;
/// Tokens CLIP reads, always.
const CLIP_TOKENS: usize = 77;
/// Parts that FLUX is made of, the text encoders' tokenizers beside them.
const COMPONENTS: [&str; 4] = ["text_encoder", "text_encoder_2", "transformer", "vae"];

/// What the network was trained to take besides the noisy picture.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    /// Nothing: a picture is where the steps begin.
    Base,
    /// A reference picture's tokens, after the target's.
    Kontext,
    /// The masked picture and its mask, beside each token.
    Fill,
    /// A picture of depths or edges, beside each token.
    Control,
}

impl Kind {
    fn of(dir: &ModelDir) -> Self {
        match dir.pipeline_class() {
            KONTEXT => Kind::Kontext,
            FILL => Kind::Fill,
            CONTROL => Kind::Control,
            _ => Kind::Base,
        }
    }
}

/// Loads one rank of one component.
pub fn load(spec: LoadSpec<'_>, weights: &Weights) -> Result<Rank> {
    let LoadSpec { dir, component, group, limits, .. } = spec;
    let range = group.range;
    let model: Box<dyn BlockModel> = match component {
        "text_encoder" => Box::new(ClipTextEncoder::load(weights, &ClipTextConfig::of(dir, component)?)?),
        "text_encoder_2" => Box::new(T5Encoder::load(weights, &dir.config::<T5Config>(component)?, range)?),
        "transformer" => Box::new(FluxTransformer::load(weights, &dir.config::<FluxTransformerConfig>(component)?, range)?),
        "vae" => {
            let vae = AutoencoderKl::load(weights, &dir.config::<AutoencoderKlConfig>(component)?)?;
            let stage = AutoencoderStage::new(vae, PictureLimits::default());
            return Ok(Rank::Leader(Box::new(match Kind::of(dir) {
                Kind::Base | Kind::Control => stage,
                Kind::Kontext => stage.sized_by(kontext::reference_size),
                Kind::Fill => stage.with_masked_picture(),
            })));
        }
        other => return Err(Error::ModelDir { path: dir.root().into(), reason: format!("`{other}` is none of {COMPONENTS:?}") }),
    };
    Rank::of(model, group, |runner| {
        Ok(match component {
            "text_encoder" => Box::new(TextStage::new(clip_encoding(dir.root())?, runner, limits.prompt_cache_bytes)),
            "text_encoder_2" => Box::new(TextStage::new(t5_encoding(dir.root())?, runner, limits.prompt_cache_bytes)),
            _ => {
                let denoiser = FluxDenoiser::load(dir)?.with_controls(runner.controls());
                Box::new(Engine::new(Box::new(denoiser), runner, limits))
            }
        })
    })
}

fn clip_encoding(dir: &Path) -> Result<TextEncoding> {
    let tokenizer = Tokenizer::load(&dir.join("tokenizer"))?;
    Ok(TextEncoding {
        tokenizer,
        tokens: Some(CLIP_TOKENS),
        outputs: vec![(Kept::Output("pooler_output"), "pooled_prompt_embeds")],
        with_mask: false,
        besides: None,
        encoder: Encoder::First,
        guidance: GUIDANCE,
    })
}

/// FLUX gives T5 no attention mask: padding takes part.
fn t5_encoding(dir: &Path) -> Result<TextEncoding> {
    let tokenizer = Tokenizer::load(&dir.join("tokenizer_2"))?;
    Ok(TextEncoding {
        tokenizer,
        tokens: None,
        outputs: vec![(Kept::Output("last_hidden_state"), "prompt_embeds")],
        with_mask: false,
        besides: None,
        encoder: Encoder::Second,
        guidance: GUIDANCE,
    })
}
