//! Hunyuan-DiT 1.0 to 1.2: how the family's components become stages.
//!
//! Follows diffusers 0.42.1, `pipeline_hunyuandit.py`: text to image by two text encoders (BERT and mT5, each with its mask) that read the same
//! prompt, classifier-free guidance, any diffusion scheduler. The learned half of the output, the variance, is dropped. A picture has the size that the job
//! says, not the nearest of a list (`use_resolution_binning`: the reference's call does that unless told otherwise). The safety checker is not part of
//! it.

use parallel::{DType, Device, Tensor, Tensors, Weights};

use crate::autoencoder_kl::{AutoencoderKl, AutoencoderKlConfig};
use crate::autoencoder_stage::AutoencoderStage;
use crate::bert::{BertConfig, BertEncoder};
use crate::blocks::BlockModel;
use crate::card::{Card, ComponentCard, ParameterCard, StageCard, StageKind};
use crate::denoise::{DenoiseState, Denoiser};
use crate::diffusion::{self, GUIDANCE, MAX_STEPS};
use crate::engine::Engine;
use crate::error::check_fits;
use crate::flow;
use crate::hunyuan_dit::{HunyuanDiT, HunyuanDiTConfig};
use crate::image_io::PictureLimits;
use crate::model_dir::ModelDir;
use crate::registry::{LoadSpec, Rank};
use crate::request::Encoder;
use crate::scheduler::DiffusionConfig;
use crate::stage::Inputs;
use crate::t5::{T5Config, T5Encoder};
use crate::text_stage::{Kept, TextEncoding, TextStage};
use crate::tokenizer::Tokenizer;
use crate::{Error, Payload, Request, Result};

mod rotary;

use rotary::rotary_pos_embed;

/// The reference's classes that this file serves.
pub const CLASSES: &[&str] = &["HunyuanDiTPipeline"];

const COMPONENTS: [&str; 4] = ["text_encoder", "text_encoder_2", "transformer", "vae"];
/// Tokens that BERT and T5 read, always.
const TOKENS: [usize; 2] = [77, 256];
/// Pixels of a picture's side to one of its latents', which the reference has written in.
const SCALE_FACTOR: usize = 8;
/// The size before it was scaled that the network is told, unless the job says another.
const ORIGINAL_SIZE: [u32; 2] = [1024, 1024];
/// Largest number of a size that it is told, in pixels.
const MAX_SIZE: f64 = 65_536.0;
/// The text encoders' states and masks, each by the network's name and the denoiser's.
const TEXTS: [(&str, &str); 4] = [
    ("encoder_hidden_states", "prompt_embeds"),
    ("text_embedding_mask", "prompt_attention_mask"),
    ("encoder_hidden_states_t5", "prompt_embeds_2"),
    ("text_embedding_mask_t5", "prompt_attention_mask_2"),
];
const ROTARY: [&str; 2] = ["image_rotary_emb.0", "image_rotary_emb.1"];

/// The card of a Hunyuan-DiT directory.
pub fn describe(dir: &ModelDir) -> Result<Card> {
    let parts = Parts::read(dir)?;
    let Parts { bert, t5, transformer, .. } = &parts;
    let card = Card {
        family: "hunyuan-dit".into(),
        pipeline_class: dir.pipeline_class().into(),
        scheduler: parts.scheduler.class().into(),
        digest: String::new(),
        components: vec![
            ComponentCard::of(dir, "text_encoder", bert.num_attention_heads, bert.num_hidden_layers)?,
            ComponentCard::of(dir, "text_encoder_2", t5.num_heads, t5.num_layers)?,
            ComponentCard::of(dir, "transformer", transformer.num_attention_heads, transformer.num_layers)?,
            // One head, and small beside the rest: held whole.
            ComponentCard::of(dir, "vae", 1, 1)?,
        ],
        stages: vec![
            StageCard::new("encode_text", StageKind::EncodeText, "text_encoder", &[]),
            StageCard::new("encode_text_2", StageKind::EncodeText, "text_encoder_2", &[]),
            StageCard::new("denoise", StageKind::Denoise, "transformer", &["encode_text", "encode_text_2"]),
            StageCard::new("decode", StageKind::Decode, "vae", &["denoise"]),
        ],
        parameters: parts.parameters(),
        max_pixels: flow::MAX_PIXELS,
        pixels_per_image: 0,
        without_prompt: false,
    };
    card.with_defaults_of(dir)
}

/// The configurations of a directory, which fit together.
#[derive(Debug)]
struct Parts {
    bert: BertConfig,
    t5: T5Config,
    transformer: HunyuanDiTConfig,
    vae: AutoencoderKlConfig,
    scheduler: DiffusionConfig,
}

impl Parts {
    fn read(dir: &ModelDir) -> Result<Self> {
        let parts = Self {
            bert: dir.config("text_encoder")?,
            t5: dir.config("text_encoder_2")?,
            transformer: dir.config("transformer")?,
            vae: dir.config("vae")?,
            scheduler: DiffusionConfig::of(dir)?,
        };
        parts.check()?;
        Ok(parts)
    }

    fn check(&self) -> Result<()> {
        let Self { bert, t5, transformer, vae, .. } = self;
        transformer.validate()?;
        bert.validate()?;
        check_fits("text_encoder: hidden_size", bert.hidden_size, bert.hidden_size == transformer.cross_attention_dim)?;
        check_fits("text_encoder_2: d_model", t5.d_model, t5.d_model == transformer.cross_attention_dim_t5)?;
        let longest = bert.max_position_embeddings;
        check_fits("text_encoder: max_position_embeddings", longest, longest >= TOKENS[0])?;
        check_fits("transformer: text_len", transformer.text_len, transformer.text_len == TOKENS[0])?;
        check_fits("transformer: text_len_t5", transformer.text_len_t5, transformer.text_len_t5 == TOKENS[1])?;
        let channels = transformer.in_channels;
        check_fits("transformer: in_channels", channels, channels == vae.latent_channels)?;
        // Half of the output is dropped, whatever it is.
        check_fits("transformer: learn_sigma", transformer.channels_out(), transformer.learn_sigma)?;
        // Positions are turned by pairs, half of them for each direction.
        let width = transformer.attention_head_dim;
        check_fits("transformer: attention_head_dim", width, width.is_multiple_of(4))?;
        check_fits("vae: block_out_channels", vae.scale_factor(), vae.scale_factor() == SCALE_FACTOR)?;
        diffusion::check_scaling(vae)
    }

    /// What a job may set. Defaults are the pipeline's.
    fn parameters(&self) -> Vec<ParameterCard> {
        let multiple = SCALE_FACTOR * self.transformer.patch_size;
        let side = self.transformer.sample_size.saturating_mul(SCALE_FACTOR);
        let side = (side / multiple).max(1).saturating_mul(multiple).min(flow::MAX_SIDE);
        let size = |name| {
            let card = ParameterCard::number(name, multiple as f64, flow::MAX_SIDE as f64, side as f64);
            card.multiple(multiple as f64)
        };
        let mut parameters = vec![
            size("width"),
            size("height"),
            ParameterCard::number("num_inference_steps", self.scheduler.least_steps() as f64, MAX_STEPS as f64, 50.0)
                .multiple(1.0),
            ParameterCard::number("num_images_per_prompt", 1.0, 10.0, 1.0).multiple(1.0),
            ParameterCard::field("noise_generator"),
            ParameterCard::field("negative_prompt"),
            ParameterCard::number("guidance_scale", 0.0, 100.0, 5.0),
            ParameterCard::number("guidance_rescale", 0.0, 1.0, 0.0),
        ];
        if self.transformer.use_style_cond_and_image_meta_size {
            let sizes = ["original_size", "crops_coords_top_left", "target_size"];
            parameters.extend(sizes.map(|name| ParameterCard::number(name, 0.0, MAX_SIZE, 0.0).multiple(1.0).optional()));
        }
        if self.scheduler.takes_eta() {
            parameters.push(ParameterCard::number("eta", 0.0, 1.0, 0.0));
        }
        parameters
    }
}

/// Loads one rank of one component.
pub fn load(spec: LoadSpec<'_>, weights: &Weights) -> Result<Rank> {
    let LoadSpec { dir, component, group, limits, .. } = spec;
    let range = group.range;
    let model: Box<dyn BlockModel> = match component {
        "text_encoder" => Box::new(BertEncoder::load(weights, &dir.config::<BertConfig>(component)?, range)?),
        "text_encoder_2" => Box::new(T5Encoder::load(weights, &dir.config::<T5Config>(component)?, range)?),
        "transformer" => Box::new(HunyuanDiT::load(weights, &dir.config::<HunyuanDiTConfig>(component)?, range)?),
        "vae" => {
            let vae = AutoencoderKl::load(weights, &dir.config::<AutoencoderKlConfig>(component)?)?;
            return Ok(Rank::Leader(Box::new(AutoencoderStage::new(vae, PictureLimits::default()))));
        }
        other => return Err(Error::ModelDir { path: dir.root().into(), reason: format!("`{other}` is none of {COMPONENTS:?}") }),
    };
    Rank::of(model, group, |runner| {
        Ok(match component {
            "transformer" => Box::new(Engine::new(Box::new(HunyuanDenoiser::load(dir)?), runner, limits)),
            _ => Box::new(TextStage::new(text_encoding(dir, component)?, runner, limits.prompt_cache_bytes)),
        })
    })
}

/// What is made of a text encoder: its states, and which of them are padding.
fn text_encoding(dir: &ModelDir, component: &str) -> Result<TextEncoding> {
    let (tokens, embeds, mask) = match component {
        "text_encoder" => (TOKENS[0], "prompt_embeds", "prompt_attention_mask"),
        _ => (TOKENS[1], "prompt_embeds_2", "prompt_attention_mask_2"),
    };
    Ok(TextEncoding {
        tokenizer: Tokenizer::load(&dir.root().join(component.replace("text_encoder", "tokenizer")))?,
        tokens: Some(tokens),
        outputs: vec![(Kept::Output("last_hidden_state"), embeds), (Kept::Output("attention_mask"), mask)],
        with_mask: true,
        besides: None,
        encoder: Encoder::First, // both read the same prompt
        guidance: GUIDANCE,
    })
}

/// What Hunyuan-DiT does around its network.
#[derive(Debug)]
pub struct HunyuanDenoiser {
    parts: Parts,
}

impl HunyuanDenoiser {
    /// From a model's configurations.
    pub fn load(dir: &ModelDir) -> Result<Self> {
        Ok(Self { parts: Parts::read(dir)? })
    }
}

/// Height and width of the latents.
fn grid(request: &Request) -> [usize; 2] {
    [request.height / SCALE_FACTOR, request.width / SCALE_FACTOR]
}

/// `image_meta_size: [1, 6]`: the size before it was scaled, the size that is wanted, and what was cropped above and to the left.
fn image_meta_size(request: &Request) -> Result<Tensor> {
    let sizes = &request.size_conditions;
    let size = [request.height as u32, request.width as u32];
    let all = [
        sizes.original_size.unwrap_or(ORIGINAL_SIZE),
        sizes.target_size.unwrap_or(size),
        sizes.crops_coords_top_left.unwrap_or_default(),
    ];
    let row: Vec<f32> = all.into_iter().flatten().map(|n| n as f32).collect();
    Ok(Tensor::from_vec(row, (1, 6), &Device::Cpu)?)
}

impl Denoiser for HunyuanDenoiser {
    fn start(&self, request: Request, mut inputs: Inputs) -> Result<DenoiseState> {
        let mut tensors = Tensors::new();
        let prefixes: &[&str] = if request.cfg_scale(GUIDANCE).is_some() { &["", "negative_"] } else { &[""] };
        for name in prefixes.iter().flat_map(|prefix| TEXTS.map(|(_, name)| format!("{prefix}{name}"))) {
            let tensor = inputs.conditioning.get(&name)?.clone();
            tensors.insert(name, tensor);
        }
        let transformer = &self.parts.transformer;
        let [h, w] = grid(&request);
        let tables =
            rotary_pos_embed(transformer.attention_head_dim, [h, w].map(|n| n / transformer.patch_size), transformer.patch_size)?;
        ROTARY.into_iter().zip(tables).for_each(|(name, table)| tensors.insert(name, table));
        let shape = [transformer.in_channels, h, w];
        let (scheduler, latents) = diffusion::from_noise(&self.parts.scheduler, &request, &mut inputs, shape)?;
        Ok(DenoiseState { request, latents, step: 0, scheduler, tensors, last: None })
    }

    /// Unconditional first.
    fn branches(&self, state: &DenoiseState) -> Result<Vec<Tensors>> {
        let pictures = state.pictures();
        let timestep = state.scheduler.timesteps()[state.step] as f32;
        let hidden_states = state.scheduler.scale_model_input(&state.latents, state.step)?;
        let branch = |prefix: &str| -> Result<Tensors> {
            let mut inputs =
                Tensors::new().with("hidden_states", hidden_states.clone()).with("timestep", flow::each(timestep, pictures)?);
            for (name, kept) in TEXTS {
                inputs.insert(name, flow::per_picture(state.tensors.get(&format!("{prefix}{kept}"))?, pictures)?);
            }
            for name in ROTARY {
                inputs.insert(name, state.tensors.get(name)?.clone());
            }
            if self.parts.transformer.use_style_cond_and_image_meta_size {
                inputs.insert("image_meta_size", flow::per_picture(&image_meta_size(&state.request)?, pictures)?);
                inputs.insert("style", Tensor::zeros(pictures, DType::U32, &Device::Cpu)?);
            }
            Ok(inputs)
        };
        match state.request.cfg_scale(GUIDANCE) {
            None => Ok(vec![branch("")?]),
            Some(_) => Ok(vec![branch("negative_")?, branch("")?]),
        }
    }

    fn shared_inputs(&self) -> &'static [&'static str] {
        &ROTARY
    }

    /// Branches of one picture size go together: texts are all of one length.
    fn batch_key(&self, state: &DenoiseState, _branch: usize) -> Vec<usize> {
        grid(&state.request).to_vec()
    }

    fn advance(&self, state: &mut DenoiseState, outputs: Vec<Tensor>) -> Result<()> {
        // What is left is the learned variance: [B, 2 C, H, W] -> [B, C, H, W].
        let mean =
            |output: &Tensor| -> Result<Tensor> { Ok(output.narrow(1, 0, self.parts.transformer.in_channels)?.contiguous()?) };
        let model_output = match outputs.as_slice() {
            [cond] => mean(cond)?,
            [uncond, cond] => {
                let (uncond, cond) = (mean(uncond)?, mean(cond)?);
                let guided = flow::guided(&uncond, &cond, state.request.cfg_scale(GUIDANCE).unwrap_or(1.0))?;
                diffusion::rescaled(guided, &cond, state.request.guidance_rescale)?
            }
            other => return Err(Error::Rank { reason: format!("{} branches, expected 1 or 2", other.len()) }),
        };
        flow::step(state, model_output)
    }

    fn finish(&self, state: DenoiseState) -> Result<Payload> {
        Ok(Payload::Latents(Tensors::new().with("latents", state.latents)))
    }
}
