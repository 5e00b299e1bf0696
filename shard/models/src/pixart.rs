//! PixArt-alpha and PixArt-Sigma: how the family's components become stages.
//!
//! Follows diffusers 0.42.1, `pipeline_pixart_alpha.py` and `pipeline_pixart_sigma.py`: text to image by one text encoder (T5, with its mask),
//! classifier-free guidance, any diffusion scheduler. The learned half of the output, the variance, is dropped. Captions are taken in lower case and
//! without white space around them; they are not cleaned of markup (`clean_caption`), and a picture has the size that the job says, not the nearest of a list
//! (`use_resolution_binning`): the reference's calls do both unless told otherwise.

use parallel::{Device, Tensor, Tensors, Weights};

use crate::autoencoder_kl::{AutoencoderKl, AutoencoderKlConfig};
use crate::autoencoder_stage::AutoencoderStage;
use crate::blocks::BlockModel;
use crate::card::{Card, ComponentCard, ParameterCard, StageCard, StageKind};
use crate::denoise::{DenoiseState, Denoiser};
use crate::diffusion::{self, GUIDANCE, MAX_STEPS};
use crate::engine::Engine;
use crate::error::check_fits;
use crate::flow;
use crate::image_io::PictureLimits;
use crate::model_dir::ModelDir;
use crate::pixart_transformer::{PixArtTransformer, PixArtTransformerConfig};
use crate::registry::{LoadSpec, Rank};
use crate::request::Encoder;
use crate::scheduler::DiffusionConfig;
use crate::stage::Inputs;
use crate::t5::{T5Config, T5Encoder};
use crate::text_stage::{Kept, TextEncoding, TextStage};
use crate::tokenizer::Tokenizer;
use crate::{Error, Payload, Request, Result};

/// The reference's classes that this file serves.
pub const CLASSES: &[&str] = &["PixArtAlphaPipeline", SIGMA];

const SIGMA: &str = "PixArtSigmaPipeline";
const COMPONENTS: [&str; 3] = ["text_encoder", "transformer", "vae"];
/// In a run of one step the reference takes what that step says of the finished picture, which is for networks trained so.
const LEAST_STEPS: usize = 2;

/// The card of a PixArt directory.
pub fn describe(dir: &ModelDir) -> Result<Card> {
    let parts = Parts::read(dir)?;
    let (t5, transformer) = (&parts.t5, &parts.transformer);
    let card = Card {
        family: "pixart".into(),
        pipeline_class: dir.pipeline_class().into(),
        scheduler: parts.scheduler.class().into(),
        digest: String::new(),
        components: vec![
            ComponentCard::of(dir, "text_encoder", t5.num_heads, t5.num_layers)?,
            ComponentCard::of(dir, "transformer", transformer.num_attention_heads, transformer.num_layers)?,
            // One head, and small beside the rest: held whole.
            ComponentCard::of(dir, "vae", 1, 1)?,
        ],
        stages: vec![
            StageCard::new("encode_text", StageKind::EncodeText, "text_encoder", &[]),
            StageCard::new("denoise", StageKind::Denoise, "transformer", &["encode_text"]),
            StageCard::new("decode", StageKind::Decode, "vae", &["denoise"]),
        ],
        parameters: parts.parameters(if dir.pipeline_class() == SIGMA { 300 } else { 120 }),
        max_pixels: flow::MAX_PIXELS,
        pixels_per_image: 0,
        without_prompt: false,
    };
    card.with_defaults_of(dir)
}

/// The configurations of a directory, which fit together.
#[derive(Debug)]
struct Parts {
    t5: T5Config,
    transformer: PixArtTransformerConfig,
    vae: AutoencoderKlConfig,
    scheduler: DiffusionConfig,
}

impl Parts {
    fn read(dir: &ModelDir) -> Result<Self> {
        let parts = Self {
            t5: dir.config("text_encoder")?,
            transformer: dir.config("transformer")?,
            vae: dir.config("vae")?,
            scheduler: DiffusionConfig::of(dir)?,
        };
        parts.check()?;
        Ok(parts)
    }

    fn check(&self) -> Result<()> {
        let Self { t5, transformer, vae, .. } = self;
        transformer.validate()?;
        let text = transformer.caption_channels.or(transformer.cross_attention_dim);
        check_fits("text_encoder: d_model", t5.d_model, text == Some(t5.d_model))?;
        let (channels, out_channels) = (transformer.in_channels, transformer.channels_out());
        check_fits("transformer: in_channels", channels, channels == vae.latent_channels)?;
        check_fits("transformer: out_channels", out_channels, out_channels == channels || out_channels == 2 * channels)?;
        diffusion::check_scaling(vae)
    }

    /// What a job may set. Defaults are the pipelines'.
    fn parameters(&self, max_sequence_length: usize) -> Vec<ParameterCard> {
        let multiple = self.vae.scale_factor() * self.transformer.patch_size;
        let side = self.transformer.sample_size.saturating_mul(self.vae.scale_factor());
        let side = (side / multiple).max(1).saturating_mul(multiple).min(flow::MAX_SIDE);
        let size = |name| {
            let card = ParameterCard::number(name, multiple as f64, flow::MAX_SIDE as f64, side as f64);
            card.multiple(multiple as f64)
        };
        let least_steps = self.scheduler.least_steps().max(LEAST_STEPS);
        let mut parameters = vec![
            size("width"),
            size("height"),
            ParameterCard::number("num_inference_steps", least_steps as f64, MAX_STEPS as f64, 20.0).multiple(1.0),
            ParameterCard::number("num_images_per_prompt", 1.0, 10.0, 1.0).multiple(1.0),
            ParameterCard::number("max_sequence_length", 1.0, 512.0, max_sequence_length as f64).multiple(1.0),
            ParameterCard::field("noise_generator"),
            ParameterCard::field("negative_prompt"),
            ParameterCard::number("guidance_scale", 0.0, 100.0, 4.5),
        ];
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
        "text_encoder" => Box::new(T5Encoder::load(weights, &dir.config::<T5Config>(component)?, range)?),
        "transformer" => {
            let config: PixArtTransformerConfig = dir.config(component)?;
            Box::new(PixArtTransformer::load(weights, &config, range)?)
        }
        "vae" => {
            let vae = AutoencoderKl::load(weights, &dir.config::<AutoencoderKlConfig>(component)?)?;
            return Ok(Rank::Leader(Box::new(AutoencoderStage::new(vae, PictureLimits::default()))));
        }
        other => return Err(Error::ModelDir { path: dir.root().into(), reason: format!("`{other}` is none of {COMPONENTS:?}") }),
    };
    Rank::of(model, group, |runner| {
        Ok(match component {
            "transformer" => Box::new(Engine::new(Box::new(PixArtDenoiser::load(dir)?), runner, limits)),
            _ => Box::new(TextStage::new(text_encoding(dir)?, runner, limits.prompt_cache_bytes)),
        })
    })
}

/// What is made of the text encoder: its states, and which of them are padding.
fn text_encoding(dir: &ModelDir) -> Result<TextEncoding> {
    Ok(TextEncoding {
        tokenizer: Tokenizer::load(&dir.root().join("tokenizer"))?.of_captions(),
        tokens: None,
        outputs: vec![
            (Kept::Output("last_hidden_state"), "prompt_embeds"),
            (Kept::Output("attention_mask"), "prompt_attention_mask"),
        ],
        with_mask: true,
        besides: None,
        encoder: Encoder::First,
        guidance: GUIDANCE,
    })
}

/// What PixArt does around its network.
#[derive(Debug)]
pub struct PixArtDenoiser {
    parts: Parts,
}

impl PixArtDenoiser {
    /// From a model's configurations.
    pub fn load(dir: &ModelDir) -> Result<Self> {
        Ok(Self { parts: Parts::read(dir)? })
    }

    /// Height and width of the latents.
    fn grid(&self, request: &Request) -> (usize, usize) {
        let f = self.parts.vae.scale_factor();
        (request.height / f, request.width / f)
    }
}

impl Denoiser for PixArtDenoiser {
    fn start(&self, request: Request, mut inputs: Inputs) -> Result<DenoiseState> {
        let mut tensors = Tensors::new();
        let prefixes: &[&str] = if request.cfg_scale(GUIDANCE).is_some() { &["", "negative_"] } else { &[""] };
        for prefix in prefixes {
            for name in ["prompt_embeds", "prompt_attention_mask"] {
                let name = format!("{prefix}{name}");
                let tensor = inputs.conditioning.get(&name)?.clone();
                tensors.insert(name, tensor);
            }
        }
        let (h, w) = self.grid(&request);
        let shape = [self.parts.transformer.in_channels, h, w];
        let (scheduler, latents) = diffusion::from_noise(&self.parts.scheduler, &request, &mut inputs, shape)?;
        Ok(DenoiseState { request, latents, step: 0, scheduler, tensors, last: None })
    }

    /// Unconditional first.
    fn branches(&self, state: &DenoiseState) -> Result<Vec<Tensors>> {
        let pictures = state.pictures();
        let timestep = state.scheduler.timesteps()[state.step] as f32;
        let hidden_states = state.scheduler.scale_model_input(&state.latents, state.step)?;
        let branch = |prefix: &str| -> Result<Tensors> {
            let text = |name: &str| flow::per_picture(state.tensors.get(&format!("{prefix}{name}"))?, pictures);
            let mut inputs = Tensors::new()
                .with("hidden_states", hidden_states.clone())
                .with("timestep", flow::each(timestep, pictures)?)
                .with("encoder_hidden_states", text("prompt_embeds")?)
                .with("encoder_attention_mask", text("prompt_attention_mask")?);
            if self.parts.transformer.is_told_the_size() {
                let (height, width) = (state.request.height as f64, state.request.width as f64);
                let row = |numbers: &[f32]| flow::per_picture(&Tensor::new(numbers, &Device::Cpu)?.unsqueeze(0)?, pictures);
                inputs.insert("added_cond_kwargs.resolution", row(&[height as f32, width as f32])?); // [B, 2]
                inputs.insert("added_cond_kwargs.aspect_ratio", row(&[(height / width) as f32])?); // [B, 1]
            }
            Ok(inputs)
        };
        match state.request.cfg_scale(GUIDANCE) {
            None => Ok(vec![branch("")?]),
            Some(_) => Ok(vec![branch("negative_")?, branch("")?]),
        }
    }

    fn shared_inputs(&self) -> &'static [&'static str] {
        &[]
    }

    /// Branches of one picture size and one text length go together.
    fn batch_key(&self, state: &DenoiseState, _branch: usize) -> Vec<usize> {
        let (h, w) = self.grid(&state.request);
        vec![h, w, state.request.max_sequence_length]
    }

    fn advance(&self, state: &mut DenoiseState, outputs: Vec<Tensor>) -> Result<()> {
        let noise_pred = match outputs.as_slice() {
            [cond] => cond.clone(),
            [uncond, cond] => flow::guided(uncond, cond, state.request.cfg_scale(GUIDANCE).unwrap_or(1.0))?,
            other => return Err(Error::Rank { reason: format!("{} branches, expected 1 or 2", other.len()) }),
        };
        // What is left is the learned variance: [B, C_out, H, W] -> [B, C, H, W].
        let model_output = noise_pred.narrow(1, 0, self.parts.transformer.in_channels)?.contiguous()?;
        flow::step(state, model_output)
    }

    fn finish(&self, state: DenoiseState) -> Result<Payload> {
        Ok(Payload::Latents(Tensors::new().with("latents", state.latents)))
    }
}
