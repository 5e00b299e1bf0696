//! Stable Diffusion 1 and 2: how the family's components become stages.
//!
//! Follows diffusers 0.42.1, `pipeline_stable_diffusion.py`, `pipeline_stable_diffusion_img2img.py` and `pipeline_stable_diffusion_inpaint.py`: text to
//! image, image to image and inpainting, by networks of 4 channels and by those of 9. The safety checker is not part of it.

use parallel::{Tensor, Tensors, Weights};

use crate::card::{Card, ComponentCard, ParameterCard, StageCard, StageKind};
use crate::clip::ClipTextConfig;
use crate::control::ControlFacts;
use crate::control::conditions::Conditions;
use crate::denoise::{DenoiseState, Denoiser};
use crate::diffusion::{self, CLIP_TOKENS, Defaults, GUIDANCE, Space};
use crate::flow;
use crate::model_dir::ModelDir;
use crate::registry::{LoadSpec, Rank};
use crate::request::Encoder;
use crate::stage::Inputs;
use crate::text_stage::{Kept, TextEncoding};
use crate::tokenizer::Tokenizer;
use crate::{Error, Payload, Request, Result};

/// The reference's classes that this file serves.
pub const CLASSES: &[&str] = &["StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline", "StableDiffusionInpaintPipeline"];

/// The card of a Stable Diffusion directory.
pub fn describe(dir: &ModelDir) -> Result<Card> {
    let Parts { clip, space } = Parts::read(dir)?;
    let mut parameters = space.parameters(&Defaults { side: space.side(), guidance_scale: 7.5, strength: 0.8 });
    if clip.num_hidden_layers > 0 {
        parameters.push(ParameterCard::number("clip_skip", 0.0, clip.num_hidden_layers as f64, 0.0).multiple(1.0).optional());
    }
    let card = Card {
        family: "stable-diffusion".into(),
        pipeline_class: dir.pipeline_class().into(),
        scheduler: space.scheduler.class().into(),
        digest: String::new(),
        components: vec![
            ComponentCard::of(dir, "text_encoder", clip.num_attention_heads, 1)?,
            ComponentCard::of(dir, "unet", space.unet.shares(), space.unet.blocks())?,
            // One head, and small beside the rest: held whole.
            ComponentCard::of(dir, "vae", 1, 1)?,
        ],
        stages: StageCard::with_controls(StageCard::of_text_encoders(&["text_encoder"], "unet"), StageKind::Denoise),
        parameters,
        max_pixels: flow::MAX_PIXELS,
        pixels_per_image: 0,
        without_prompt: false,
    };
    card.with_defaults_of(dir)
}

/// The configurations of a directory, which fit together.
#[derive(Debug)]
struct Parts {
    clip: ClipTextConfig,
    space: Space,
}

impl Parts {
    fn read(dir: &ModelDir) -> Result<Self> {
        let clip: ClipTextConfig = dir.config("text_encoder")?;
        let space = diffusion::space(dir)?;
        space.check_text(clip.hidden_size)?;
        match &space.unet.addition_embed_type {
            None => Ok(Self { clip, space }),
            Some(other) => Err(Error::Unsupported { field: "unet: addition_embed_type".into(), value: other.clone() }),
        }
    }
}

/// Loads one rank of one component.
pub fn load(spec: LoadSpec<'_>, weights: &Weights) -> Result<Rank> {
    let dir = spec.dir;
    diffusion::load(
        spec,
        weights,
        |controls| Ok(StableDiffusionDenoiser::load(dir)?.with_controls(controls)),
        |_| text_encoding(dir),
    )
}

fn text_encoding(dir: &ModelDir) -> Result<TextEncoding> {
    Ok(TextEncoding {
        tokenizer: Tokenizer::load(&dir.root().join("tokenizer"))?,
        tokens: Some(CLIP_TOKENS),
        outputs: vec![(Kept::NormedState(1), "prompt_embeds")],
        with_mask: false,
        besides: None,
        encoder: Encoder::First,
        guidance: GUIDANCE,
    })
}

/// What Stable Diffusion does around its network.
#[derive(Debug)]
pub struct StableDiffusionDenoiser {
    space: Space,
}

impl StableDiffusionDenoiser {
    /// From a model's configurations.
    pub fn load(dir: &ModelDir) -> Result<Self> {
        Ok(Self { space: Parts::read(dir)?.space })
    }

    /// The same, for jobs that may name these control networks.
    pub fn with_controls(mut self, facts: &[ControlFacts]) -> Self {
        self.space.controls = Conditions::new(facts);
        self
    }
}

impl Denoiser for StableDiffusionDenoiser {
    fn start(&self, request: Request, inputs: Inputs) -> Result<DenoiseState> {
        let mut tensors = Tensors::new().with("prompt_embeds", inputs.conditioning.get("prompt_embeds")?.clone());
        if self.space.cfg_scale(&request).is_some() {
            let negative = "negative_prompt_embeds";
            tensors.insert(negative, inputs.conditioning.get(negative)?.clone());
        }
        self.space.start(request, inputs, tensors)
    }

    /// Unconditional first.
    fn branches(&self, state: &DenoiseState) -> Result<Vec<Tensors>> {
        let branch = |index: usize, name: &str| -> Result<Tensors> {
            let embeds = flow::per_picture(state.tensors.get(name)?, state.pictures())?;
            Ok(self.space.pass(state, index)?.with("encoder_hidden_states", embeds))
        };
        Ok(match self.space.cfg_scale(&state.request) {
            Some(_) => vec![branch(0, "negative_prompt_embeds")?, branch(1, "prompt_embeds")?],
            None => vec![branch(0, "prompt_embeds")?],
        })
    }

    fn shared_inputs(&self) -> &'static [&'static str] {
        &["controls"]
    }

    fn batch_key(&self, state: &DenoiseState, branch: usize) -> Vec<usize> {
        self.space.batch_key(state, branch)
    }

    fn advance(&self, state: &mut DenoiseState, outputs: Vec<Tensor>) -> Result<()> {
        self.space.advance(state, &outputs)
    }

    fn finish(&self, state: DenoiseState) -> Result<Payload> {
        Ok(Payload::Latents(Tensors::new().with("latents", state.latents)))
    }
}
