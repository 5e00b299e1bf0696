//! FLUX.1: how the family's components become stages.
//!
//! Follows diffusers' `pipeline_flux.py`, `pipeline_flux_img2img.py` and `pipeline_flux_inpaint.py` (0.42): text to image,
//! image to image and inpainting by one denoiser, distilled guidance and true classifier-free guidance.

use std::path::Path;

use parallel::{DType, Device, Tensor, Tensors, Weights};

use crate::autoencoder_kl::{AutoencoderKl, AutoencoderKlConfig};
use crate::autoencoder_stage::AutoencoderStage;
use crate::block_runner::{BlockRunner, Follower};
use crate::blocks::BlockModel;
use crate::card::{Card, ComponentCard, ParameterCard, StageCard};
use crate::clip::{ClipTextConfig, ClipTextEncoder};
use crate::denoise::{DenoiseState, Denoiser};
use crate::engine::Engine;
use crate::flow::{self, Defaults, Latents};
use crate::flux_transformer::{FluxTransformer, FluxTransformerConfig};
use crate::image_io::PictureLimits;
use crate::model_dir::ModelDir;
use crate::packing::{pack_latents, unpack_latents};
use crate::registry::{LoadSpec, Rank};
use crate::request::{Encoder, Guidance};
use crate::scheduler::{FlowMatchEulerDiscrete, FlowMatchEulerDiscreteConfig, Schedule};
use crate::stage::Inputs;
use crate::t5::{T5Config, T5Encoder};
use crate::text_stage::{Kept, TextEncoding, TextStage};
use crate::tokenizer::Tokenizer;
use crate::{Error, Payload, Request, Result};

/// The reference's classes that this file serves.
pub const CLASSES: &[&str] = &["FluxPipeline", "FluxImg2ImgPipeline", "FluxInpaintPipeline"];

/// Of the kind with two passes; the distilled kind is an input of the network.
const GUIDANCE: Guidance = Guidance::TrueCfg;
/// Tokens CLIP reads, always.
const CLIP_TOKENS: usize = 77;
/// Parts that FLUX is made of, the text encoders' tokenizers beside them.
const COMPONENTS: [&str; 4] = ["text_encoder", "text_encoder_2", "transformer", "vae"];

/// The card of a FLUX directory.
pub fn describe(dir: &ModelDir) -> Result<Card> {
    let transformer: FluxTransformerConfig = dir.config("transformer")?;
    let t5: T5Config = dir.config("text_encoder_2")?;
    let clip: ClipTextConfig = dir.config("text_encoder")?;
    let vae: AutoencoderKlConfig = dir.config("vae")?;
    let scheduler = scheduler_config(dir)?;
    let card = Card {
        family: "flux".into(),
        pipeline_class: dir.pipeline_class().into(),
        scheduler: "FlowMatchEulerDiscreteScheduler".into(),
        digest: dir.digest()?,
        components: vec![
            ComponentCard::of(dir, "text_encoder", clip.num_attention_heads, 1)?,
            ComponentCard::of(dir, "text_encoder_2", t5.num_heads, t5.num_layers)?,
            ComponentCard::of(dir, "transformer", transformer.num_attention_heads, transformer.blocks())?,
            // One head, and small beside the rest: held whole.
            ComponentCard::of(dir, "vae", 1, 1)?,
        ],
        stages: StageCard::of_text_encoders(&["text_encoder", "text_encoder_2"]),
        parameters: parameters(&transformer, &scheduler, &vae),
        max_pixels: flow::MAX_PIXELS,
    };
    card.with_defaults_of(dir)
}

/// What a job may set. Defaults are the pipelines'; a checkpoint without dynamic shifting is a few-step one (schnell) unless
/// its directory says otherwise.
fn parameters(
    transformer: &FluxTransformerConfig,
    scheduler: &FlowMatchEulerDiscreteConfig,
    vae: &AutoencoderKlConfig,
) -> Vec<ParameterCard> {
    let few_steps = !transformer.guidance_embeds && !scheduler.use_dynamic_shifting && scheduler.shift == 1.0;
    let mut parameters = flow::parameters(&Defaults {
        multiple: 16,
        max_side: flow::MAX_SIDE,
        side: vae.sample_size.clamp(16, 1024),
        num_inference_steps: if few_steps { 4 } else { 28 },
        max_sequence_length: if few_steps { 256 } else { 512 },
    });
    parameters.extend(["prompt_2", "negative_prompt", "negative_prompt_2"].map(ParameterCard::field));
    parameters.push(ParameterCard::number("true_cfg_scale", 1.0, 20.0, 1.0));
    if transformer.guidance_embeds {
        parameters.push(ParameterCard::number("guidance_scale", 0.0, 100.0, 3.5));
    }
    parameters
}

/// Loads one rank of one component.
pub fn load(spec: LoadSpec<'_>, weights: &Weights) -> Result<Rank> {
    let LoadSpec { dir, component, group, limits, .. } = spec;
    let range = group.range;
    let model: Box<dyn BlockModel> = match component {
        "text_encoder" => Box::new(ClipTextEncoder::load(weights, &dir.config::<ClipTextConfig>(component)?)?),
        "text_encoder_2" => Box::new(T5Encoder::load(weights, &dir.config::<T5Config>(component)?, range)?),
        "transformer" => Box::new(FluxTransformer::load(weights, &dir.config::<FluxTransformerConfig>(component)?, range)?),
        "vae" => {
            let vae = AutoencoderKl::load(weights, &dir.config::<AutoencoderKlConfig>(component)?)?;
            return Ok(Rank::Leader(Box::new(AutoencoderStage::new(vae, PictureLimits::default()))));
        }
        other => return Err(Error::ModelDir { path: dir.root().into(), reason: format!("`{other}` is none of {COMPONENTS:?}") }),
    };
    if !group.is_leader() {
        return Ok(Rank::Follower(Follower::new(model, group)));
    }
    let runner = BlockRunner::new(model, group);
    Ok(Rank::Leader(match component {
        "text_encoder" => Box::new(TextStage::new(clip_encoding(dir.root())?, runner, limits.prompt_cache_bytes)),
        "text_encoder_2" => Box::new(TextStage::new(t5_encoding(dir.root())?, runner, limits.prompt_cache_bytes)),
        _ => Box::new(Engine::new(Box::new(FluxDenoiser::load(dir)?), runner, limits)),
    }))
}

fn clip_encoding(dir: &Path) -> Result<TextEncoding> {
    let tokenizer = Tokenizer::load(&dir.join("tokenizer"))?;
    Ok(TextEncoding {
        tokenizer,
        tokens: Some(CLIP_TOKENS),
        outputs: vec![(Kept::Output("pooler_output"), "pooled_prompt_embeds")],
        with_mask: false,
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
        encoder: Encoder::Second,
        guidance: GUIDANCE,
    })
}

fn scheduler_config(dir: &ModelDir) -> Result<FlowMatchEulerDiscreteConfig> {
    dir.scheduler_config()
}

/// What FLUX does around its network.
#[derive(Debug)]
pub struct FluxDenoiser {
    guidance_embeds: bool,
    scheduler: FlowMatchEulerDiscreteConfig,
    /// Latent channels of the autoencoder; a token packs 2 x 2 of them.
    channels: usize,
    vae: AutoencoderKlConfig,
}

impl FluxDenoiser {
    /// From a model's configurations.
    pub fn load(dir: &ModelDir) -> Result<Self> {
        let transformer: FluxTransformerConfig = dir.config("transformer")?;
        Ok(Self {
            guidance_embeds: transformer.guidance_embeds,
            scheduler: scheduler_config(dir)?,
            channels: transformer.in_channels / 4,
            vae: dir.config("vae")?,
        })
    }

    /// Height and width in tokens.
    fn grid(&self, request: &Request) -> (usize, usize) {
        let side = |pixels: usize| pixels / (self.vae.scale_factor() * 2);
        (side(request.height), side(request.width))
    }

    fn scheduler(&self, request: &Request) -> Result<FlowMatchEulerDiscrete> {
        let config = &self.scheduler;
        let (h, w) = self.grid(request);
        let schedule = Schedule::evenly_spaced(request.num_inference_steps, Some(config.mu(h * w)));
        flow::begin(FlowMatchEulerDiscrete::new(config, &schedule)?, request)
    }
}

impl Denoiser for FluxDenoiser {
    fn start(&self, request: Request, mut inputs: Inputs) -> Result<DenoiseState> {
        let scheduler = self.scheduler(&request)?;
        let (h, w) = self.grid(&request);
        let mut tensors = std::mem::take(&mut inputs.conditioning);
        let space = Latents {
            shape: [self.channels, 2 * h, 2 * w],
            scale_factor: self.vae.scale_factor(),
            scale: &|latents| self.vae.scale(latents),
            pack: &pack_latents,
        };
        let latents = space.start(&request, &mut inputs, &scheduler, &mut tensors)?;
        tensors.insert("img_ids", image_ids(h, w)?);
        let text_tokens = tensors.get("prompt_embeds")?.dim(1)?;
        tensors.insert("txt_ids", Tensor::zeros((text_tokens, 3), DType::F32, &Device::Cpu)?);
        Ok(DenoiseState { request, latents, step: 0, scheduler: Box::new(scheduler), tensors, last: None })
    }

    fn branches(&self, state: &DenoiseState) -> Result<Vec<Tensors>> {
        let pictures = state.pictures();
        let timestep = state.scheduler.timesteps()[state.step] as f32 / 1000.0;
        let branch = |prefix: &str| -> Result<Tensors> {
            let embeds = |name: &str| flow::per_picture(state.tensors.get(&format!("{prefix}{name}"))?, pictures);
            let mut inputs = Tensors::new()
                .with("hidden_states", state.latents.clone())
                .with("timestep", flow::each(timestep, pictures)?)
                .with("pooled_projections", embeds("pooled_prompt_embeds")?)
                .with("encoder_hidden_states", embeds("prompt_embeds")?)
                .with("img_ids", state.tensors.get("img_ids")?.clone())
                .with("txt_ids", state.tensors.get("txt_ids")?.clone());
            if self.guidance_embeds {
                inputs.insert("guidance", flow::each(state.request.guidance_scale.unwrap_or(3.5) as f32, pictures)?);
            }
            Ok(inputs)
        };
        match state.request.cfg_scale(GUIDANCE) {
            Some(_) => Ok(vec![branch("")?, branch("negative_")?]),
            None => Ok(vec![branch("")?]),
        }
    }

    fn shared_inputs(&self) -> &'static [&'static str] {
        &["img_ids", "txt_ids"]
    }

    /// Jobs of one picture size and one text length go together.
    fn batch_key(&self, state: &DenoiseState, _branch: usize) -> Vec<usize> {
        let (h, w) = self.grid(&state.request);
        vec![h, w, state.request.max_sequence_length]
    }

    fn advance(&self, state: &mut DenoiseState, outputs: Vec<Tensor>) -> Result<()> {
        let model_output = match outputs.as_slice() {
            [cond, uncond] => flow::guided(uncond, cond, state.request.true_cfg_scale)?,
            [cond] => cond.clone(),
            other => return Err(Error::Rank { reason: format!("{} branches, expected 1 or 2", other.len()) }),
        };
        flow::step(state, model_output)
    }

    fn finish(&self, state: DenoiseState) -> Result<Payload> {
        let (h, w) = self.grid(&state.request);
        Ok(Payload::Latents(Tensors::new().with("latents", unpack_latents(&state.latents, h, w)?)))
    }
}

/// Position of every token: (0, y, x). `[h w, 3]`
fn image_ids(h: usize, w: usize) -> Result<Tensor> {
    let ids: Vec<f32> = (0..h).flat_map(|y| (0..w).flat_map(move |x| [0.0, y as f32, x as f32])).collect();
    Ok(Tensor::from_vec(ids, (h * w, 3), &Device::Cpu)?)
}
