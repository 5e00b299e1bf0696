//! FLUX.1: how the family's components become stages.
//!
//! Follows diffusers' `pipeline_flux.py`, `pipeline_flux_img2img.py` and `pipeline_flux_inpaint.py` (0.42): text to image,
//! image to image and inpainting by one denoiser, distilled guidance and true classifier-free guidance. The order of random
//! draws is theirs: latents of the input picture first, then the noise.

use std::path::Path;

use parallel::Weights;
use parallel::rng::{Generator, TorchCpu, TorchCuda};
use parallel::{Device, Tensor, Tensors};

use crate::autoencoder_kl::{AutoencoderKl, AutoencoderKlConfig, Moments};
use crate::autoencoder_stage::AutoencoderStage;
use crate::block_runner::{BlockRunner, Follower};
use crate::blocks::BlockModel;
use crate::card::{Card, ComponentCard, ParameterCard, StageCard, StageKind};
use crate::clip::{ClipTextConfig, ClipTextEncoder};
use crate::denoise::{DenoiseState, Denoiser, LastStep};
use crate::engine::Engine;
use crate::flux_transformer::{FluxTransformer, FluxTransformerConfig};
use crate::image_io::PictureLimits;
use crate::model_dir::ModelDir;
use crate::registry::{LoadSpec, Rank};
use crate::request::{Encoder, Guidance, NoiseGenerator};
use crate::scheduler::{FlowMatchEulerDiscrete, FlowMatchEulerDiscreteConfig, Schedule, Scheduler};
use crate::stage::Inputs;
use crate::t5::{T5Config, T5Encoder};
use crate::text_stage::{TextEncoding, TextStage};
use crate::tokenizer::Tokenizer;
use crate::{Error, Payload, Request, Result};

/// The reference's classes that this file serves.
pub const CLASSES: &[&str] = &["FluxPipeline", "FluxImg2ImgPipeline", "FluxInpaintPipeline"];

/// Of the kind with two passes; the distilled kind is an input of the network.
const GUIDANCE: Guidance = Guidance::TrueCfg;
/// Tokens CLIP reads, always.
const CLIP_TOKENS: usize = 77;
/// Side limits of a picture, in pixels.
const MAX_SIDE: usize = 4096;
/// 2048 x 2048: what the position embedding was made for, and then some.
const MAX_PIXELS: u64 = 4 << 20;
const MAX_STEPS: usize = 500;
/// Parts that FLUX is made of, the text encoders' tokenizers beside them.
const COMPONENTS: [&str; 4] = ["text_encoder", "text_encoder_2", "transformer", "vae"];

/// The card of a FLUX directory.
pub fn describe(dir: &ModelDir) -> Result<Card> {
    let transformer: FluxTransformerConfig = dir.config("transformer")?;
    let t5: T5Config = dir.config("text_encoder_2")?;
    let clip: ClipTextConfig = dir.config("text_encoder")?;
    let vae: AutoencoderKlConfig = dir.config("vae")?;
    let scheduler = scheduler_config(dir)?;
    let component = |name: &str, heads: usize, max_block_ranges: usize| -> Result<ComponentCard> {
        let tp_options = [1, 2, 4, 8].into_iter().filter(|tp| heads.is_multiple_of(*tp)).collect();
        Ok(ComponentCard { name: name.into(), weight_bytes: dir.weight_bytes(name)?, tp_options, max_block_ranges })
    };
    let blocks = transformer.num_layers + transformer.num_single_layers;
    let card = Card {
        family: "flux".into(),
        pipeline_class: dir.pipeline_class().into(),
        scheduler: "FlowMatchEulerDiscreteScheduler".into(),
        digest: dir.digest()?,
        components: vec![
            component("text_encoder", clip.num_attention_heads, 1)?,
            component("text_encoder_2", t5.num_heads, t5.num_layers)?,
            component("transformer", transformer.num_attention_heads, blocks)?,
            // One head, and small beside the rest: held whole.
            component("vae", 1, 1)?,
        ],
        stages: stages(),
        parameters: parameters(&transformer, &scheduler, &vae),
        max_pixels: MAX_PIXELS,
    };
    card.with_defaults_of(dir)
}

fn stages() -> Vec<StageCard> {
    let stage = |id: &str, kind, component: &str, inputs: &[&str], with_image| StageCard {
        id: id.into(),
        kind,
        component: component.into(),
        inputs: inputs.iter().map(|i| (*i).to_owned()).collect(),
        with_image,
        with_pictures: kind == StageKind::EncodeImage,
    };
    vec![
        stage("encode_text", StageKind::EncodeText, "text_encoder", &[], false),
        stage("encode_text_2", StageKind::EncodeText, "text_encoder_2", &[], false),
        stage("encode_image", StageKind::EncodeImage, "vae", &[], true),
        stage("denoise", StageKind::Denoise, "transformer", &["encode_text", "encode_text_2", "encode_image"], false),
        stage("decode", StageKind::Decode, "vae", &["denoise"], false),
    ]
}

/// What a job may set. Defaults are the pipelines'; a checkpoint without dynamic shifting is a few-step one (schnell) unless
/// its directory says otherwise.
fn parameters(
    transformer: &FluxTransformerConfig,
    scheduler: &FlowMatchEulerDiscreteConfig,
    vae: &AutoencoderKlConfig,
) -> Vec<ParameterCard> {
    let few_steps = !transformer.guidance_embeds && !scheduler.use_dynamic_shifting && scheduler.shift == 1.0;
    let side = (vae.sample_size.max(16) as f64).min(1024.0);
    let size = |name| ParameterCard::number(name, 16.0, MAX_SIDE as f64, side).multiple(16.0);
    let mut parameters = vec![
        ParameterCard::field("prompt_2"),
        ParameterCard::field("negative_prompt"),
        ParameterCard::field("negative_prompt_2"),
        size("width"),
        size("height"),
        ParameterCard::number("num_inference_steps", 1.0, MAX_STEPS as f64, if few_steps { 4.0 } else { 28.0 }).multiple(1.0),
        ParameterCard::number("true_cfg_scale", 1.0, 20.0, 1.0),
        ParameterCard::number("num_images_per_prompt", 1.0, 10.0, 1.0).multiple(1.0),
        // Above nothing: the least strength still makes one step.
        ParameterCard::number("strength", 0.001, 1.0, 0.6),
        ParameterCard::field("image_blob_id"),
        ParameterCard::field("mask_image_blob_id"),
        ParameterCard::number("max_sequence_length", 1.0, 512.0, if few_steps { 256.0 } else { 512.0 }).multiple(1.0),
        ParameterCard::field("noise_generator"),
    ];
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
        outputs: vec![("pooler_output", "pooled_prompt_embeds")],
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
        outputs: vec![("last_hidden_state", "prompt_embeds")],
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
        let n = request.num_inference_steps;
        let config = &self.scheduler;
        let sigmas = linspace(1.0, 1.0 / n as f64, n);
        let (h, w) = self.grid(request);
        let mu = Some(config.mu(h * w));
        let scheduler = FlowMatchEulerDiscrete::new(config, &Schedule { num_inference_steps: n, sigmas: Some(sigmas), mu })?;
        match request.strength {
            None => Ok(scheduler),
            Some(strength) => {
                // int(n - min(n strength, n)), as the reference rounds.
                let begin = (n as f64 - (n as f64 * strength).min(n as f64)).max(0.0) as usize;
                scheduler.with_begin(begin)
            }
        }
    }

    /// Latents of the input picture: a draw from their distribution, scaled and packed. `[1, C, H, W] -> [1, L, 4 C]`
    fn image_latents(&self, image: &Tensors, generator: &mut Generator) -> Result<Tensor> {
        let moments = Moments { mean: image.get("image.mean")?.clone(), logvar: image.get("image.logvar")?.clone() };
        let noise = generator.randn(moments.mean.dims())?;
        pack_latents(&self.vae.scale(&moments.sample(&noise)?)?)
    }

    /// The mask at latent size, packed as the latents are: 1 where to repaint.
    fn mask(&self, mask: &Tensor) -> Result<Tensor> {
        let (_, _, height, width) = mask.dims4()?;
        let f = self.vae.scale_factor();
        // Nearest neighbour down to the latent grid picks every f-th pixel.
        let rows = Tensor::arange_step(0u32, height as u32, f as u32, mask.device())?;
        let columns = Tensor::arange_step(0u32, width as u32, f as u32, mask.device())?;
        let small = mask.index_select(&rows, 2)?.index_select(&columns, 3)?;
        pack_latents(&small.repeat((1, self.channels, 1, 1))?)
    }
}

impl Denoiser for FluxDenoiser {
    fn start(&self, request: Request, inputs: Inputs) -> Result<DenoiseState> {
        let scheduler = self.scheduler(&request)?;
        let (h, w) = self.grid(&request);
        let mut generator = match request.noise_generator {
            NoiseGenerator::TorchCpu => Generator::Cpu(TorchCpu::new(request.seed)),
            NoiseGenerator::TorchCuda => Generator::Cuda(TorchCuda::new(request.seed)),
        };
        let mut tensors = inputs.conditioning;
        let start = inputs.image_latents.as_ref().map(|image| self.image_latents(image, &mut generator)).transpose()?;
        let noise = match inputs.noise {
            Some(noise) => noise,
            None => generator.randn(&[request.num_images_per_prompt, self.channels, 2 * h, 2 * w])?,
        };
        let noise = pack_latents(&noise)?;
        let latents = match &start {
            None => noise.clone(),
            Some(start) => scheduler.scale_noise(&start.broadcast_as(noise.shape())?.contiguous()?, 0, &noise)?,
        };
        if let (Some(start), Some(mask)) = (start, inputs.image_latents.as_ref().and_then(|image| image.find("mask"))) {
            tensors.insert("mask", self.mask(mask)?);
            tensors.insert("image_latents", start.broadcast_as(noise.shape())?.contiguous()?);
            tensors.insert("noise", noise);
        }
        tensors.insert("img_ids", image_ids(h, w)?);
        let text_tokens = tensors.get("prompt_embeds")?.dim(1)?;
        tensors.insert("txt_ids", Tensor::zeros((text_tokens, 3), parallel::DType::F32, &Device::Cpu)?);
        Ok(DenoiseState { request, latents, step: 0, scheduler: Box::new(scheduler), tensors, last: None })
    }

    fn branches(&self, state: &DenoiseState) -> Result<Vec<Tensors>> {
        let pictures = state.pictures();
        let timestep = state.scheduler.timesteps()[state.step] as f32 / 1000.0;
        let each = |value: f32| Tensor::full(value, pictures, &Device::Cpu);
        let branch = |prefix: &str| -> Result<Tensors> {
            let embeds = |name: &str| -> Result<Tensor> {
                let one = state.tensors.get(&format!("{prefix}{name}"))?;
                let mut shape = one.dims().to_vec();
                shape[0] = pictures;
                Ok(one.broadcast_as(shape)?.contiguous()?)
            };
            let mut inputs = Tensors::new()
                .with("hidden_states", state.latents.clone())
                .with("timestep", each(timestep)?)
                .with("pooled_projections", embeds("pooled_prompt_embeds")?)
                .with("encoder_hidden_states", embeds("prompt_embeds")?)
                .with("img_ids", state.tensors.get("img_ids")?.clone())
                .with("txt_ids", state.tensors.get("txt_ids")?.clone());
            if self.guidance_embeds {
                inputs.insert("guidance", each(state.request.guidance_scale.unwrap_or(3.5) as f32)?);
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
            [cond, uncond] => (uncond + ((cond - uncond)? * state.request.true_cfg_scale)?)?,
            [cond] => cond.clone(),
            other => return Err(Error::Rank { reason: format!("{} branches, expected 1 or 2", other.len()) }),
        };
        let prev_sample = state.scheduler.step(&model_output, state.step, &state.latents)?;
        state.latents = match state.tensors.find("mask") {
            None => prev_sample.clone(),
            Some(mask) => {
                let image = state.tensors.get("image_latents")?;
                let kept = if state.step + 1 < state.steps() {
                    state.scheduler.scale_noise(image, state.step + 1, state.tensors.get("noise")?)?
                } else {
                    image.clone()
                };
                let outside = mask.affine(-1.0, 1.0)?;
                (kept.broadcast_mul(&outside)? + prev_sample.broadcast_mul(mask)?)?
            }
        };
        state.last = Some(LastStep { model_output, prev_sample });
        Ok(())
    }

    fn finish(&self, state: DenoiseState) -> Result<Payload> {
        let (h, w) = self.grid(&state.request);
        Ok(Payload::Latents(Tensors::new().with("latents", unpack_latents(&state.latents, h, w)?)))
    }
}

/// `[B, C, 2h, 2w] -> [B, h w, 4 C]`: a token holds 2 x 2 latents, in the order channel, dy, dx.
fn pack_latents(latents: &Tensor) -> Result<Tensor> {
    let (b, c, h, w) = latents.dims4()?;
    let tokens = latents.reshape((b, c, h / 2, 2, w / 2, 2))?.permute((0, 2, 4, 1, 3, 5))?; // [B, h, w, C, 2, 2]
    Ok(tokens.contiguous()?.reshape((b, h / 2 * (w / 2), c * 4))?)
}

/// `[B, h w, 4 C] -> [B, C, 2h, 2w]`.
fn unpack_latents(tokens: &Tensor, h: usize, w: usize) -> Result<Tensor> {
    let (b, _, width) = tokens.dims3()?;
    let latents = tokens.reshape((b, h, w, width / 4, 2, 2))?.permute((0, 3, 1, 4, 2, 5))?; // [B, C, h, 2, w, 2]
    Ok(latents.contiguous()?.reshape((b, width / 4, h * 2, w * 2))?)
}

/// Position of every token: (0, y, x). `[h w, 3]`
fn image_ids(h: usize, w: usize) -> Result<Tensor> {
    let ids: Vec<f32> = (0..h).flat_map(|y| (0..w).flat_map(move |x| [0.0, y as f32, x as f32])).collect();
    Ok(Tensor::from_vec(ids, (h * w, 3), &Device::Cpu)?)
}

/// numpy's `linspace(start, stop, n)`.
fn linspace(start: f64, stop: f64, n: usize) -> Vec<f64> {
    let step = (stop - start) / (n.max(2) - 1) as f64;
    (0..n).map(|i| if i > 0 && i + 1 == n { stop } else { start + i as f64 * step }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unpacking_undoes_packing() {
        let latents = Tensor::arange(0f32, 2.0 * 4.0 * 6.0 * 8.0, &Device::Cpu).unwrap().reshape((2, 4, 6, 8)).unwrap();
        let packed = pack_latents(&latents).unwrap();
        assert_eq!(packed.dims(), [2, 12, 16]);
        // The first token: channel 0's dy, dx first.
        let first = packed.to_vec3::<f32>().unwrap()[0][0][..4].to_vec();
        assert_eq!(first, [0.0, 1.0, 8.0, 9.0]);
        let back = unpack_latents(&packed, 3, 4).unwrap();
        assert_eq!(
            back.flatten_all().unwrap().to_vec1::<f32>().unwrap(),
            latents.flatten_all().unwrap().to_vec1::<f32>().unwrap()
        );
    }
}
