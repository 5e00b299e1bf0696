//! DeepFloyd IF: its first stage, and those that enlarge a picture.
//!
//! Follows diffusers 0.42.1, `pipeline_if.py` and `pipeline_if_superresolution.py`: text to image on pixels by one text encoder (T5, with its mask), and the
//! same beside a picture that was enlarged and noised. There is no autoencoder: what the denoiser ends with is the picture. Captions are taken in lower case
//! and without white space around them; they are not cleaned of markup (`clean_caption`). The safety checker and the watermark are not part of it.
//! The order of random draws is the reference's: what the steps begin at, the noise of the picture beside it, then what the steps draw.

use parallel::{Device, Tensor, Tensors, Weights};
use serde_json::Value;

use crate::blocks::BlockModel;
use crate::card::{Card, ComponentCard, ParameterCard, StageCard, StageKind};
use crate::denoise::{DenoiseState, Denoiser};
use crate::diffusion::{Drawn, GUIDANCE, MAX_STEPS};
use crate::engine::Engine;
use crate::error::check_fits;
use crate::if_unet::{IfUNet, IfUNetConfig};
use crate::image_io::{self, Picture, PictureLimits};
use crate::model_dir::{ModelDir, read_json};
use crate::registry::{LoadSpec, Rank};
use crate::request::Encoder;
use crate::scheduler::{DiffusionConfig, Run};
use crate::stage::Inputs;
use crate::t5::{T5Config, T5Encoder};
use crate::text_stage::{Kept, TextEncoding, TextStage};
use crate::tokenizer::Tokenizer;
use crate::{Error, Payload, Request, Result, flow};

/// The reference's classes that this file serves.
pub const CLASSES: &[&str] = &["IFPipeline", SUPER_RESOLUTION];

const SUPER_RESOLUTION: &str = "IFSuperResolutionPipeline";
const COMPONENTS: [&str; 2] = ["text_encoder", "unet"];
/// Tokens that T5 reads, always.
const TOKENS: usize = 77;
/// Of the picture that is enlarged, when the job does not say.
const NOISE_LEVEL: f64 = 250.0;

/// The card of a DeepFloyd IF directory.
pub fn describe(dir: &ModelDir) -> Result<Card> {
    let parts = Parts::read(dir)?;
    let mut denoise = StageCard::new("denoise", StageKind::Denoise, "unet", &["encode_text"]);
    denoise.with_pictures = parts.enlarges();
    let card = Card {
        family: "deepfloyd-if".into(),
        pipeline_class: dir.pipeline_class().into(),
        scheduler: parts.scheduler.class().into(),
        digest: String::new(),
        components: vec![
            ComponentCard::of(dir, "text_encoder", parts.t5.num_heads, parts.t5.num_layers)?,
            ComponentCard::of(dir, "unet", parts.unet.shares(), parts.unet.blocks())?,
        ],
        stages: vec![StageCard::new("encode_text", StageKind::EncodeText, "text_encoder", &[]), denoise],
        parameters: parts.parameters(),
        max_pixels: parts.max_pixels(),
        pixels_per_image: 0,
        without_prompt: false,
    };
    card.with_defaults_of(dir)
}

/// The configurations of a directory, which fit together.
#[derive(Debug)]
struct Parts {
    t5: T5Config,
    unet: IfUNetConfig,
    scheduler: DiffusionConfig,
    /// By which the picture that is enlarged is noised.
    image_noising: Option<ImageNoising>,
}

/// A scheduler by which pictures are noised.
#[derive(Debug)]
struct ImageNoising {
    scheduler: DiffusionConfig,
    /// Timesteps that it has.
    levels: usize,
}

impl Parts {
    fn read(dir: &ModelDir) -> Result<Self> {
        let enlarges = dir.pipeline_class() == SUPER_RESOLUTION;
        let parts = Self {
            t5: dir.config("text_encoder")?,
            unet: dir.config("unet")?,
            scheduler: DiffusionConfig::of(dir)?,
            image_noising: enlarges.then(|| image_noising(dir)).transpose()?,
        };
        let unet = &parts.unet;
        unet.validate()?;
        check_fits("text_encoder: d_model", parts.t5.d_model, parts.t5.d_model == unet.encoder_hid_dim)?;
        let beside = if enlarges { 2 } else { 1 };
        check_fits("unet: in_channels", unet.in_channels, unet.in_channels == beside * PICTURE)?;
        check_fits("unet: out_channels", unet.out_channels, unet.out_channels == 2 * PICTURE)?;
        if unet.has_noise_level() != enlarges {
            return Err(Error::Unsupported {
                field: "unet: class_embed_type".into(),
                value: format!("{:?}", unet.class_embed_type),
            });
        }
        Ok(parts)
    }

    /// Longest side: on pixels a picture of twice the side is four times the work of its finest blocks, which are as wide as those of latents elsewhere.
    fn max_side(&self) -> usize {
        self.unet.sample_size.saturating_mul(4).min(flow::MAX_SIDE)
    }

    /// Ten pictures of twice the sides that the network was trained on, at most.
    fn max_pixels(&self) -> u64 {
        let side = self.unet.sample_size.saturating_mul(2) as u64;
        side.saturating_mul(side).saturating_mul(10).min(flow::MAX_PIXELS)
    }

    fn enlarges(&self) -> bool {
        self.image_noising.is_some()
    }

    /// What a job may set. Defaults are the pipelines'.
    fn parameters(&self) -> Vec<ParameterCard> {
        let multiple = self.unet.multiple();
        let side = (self.unet.sample_size / multiple).max(1).saturating_mul(multiple).min(self.max_side());
        let size = |name| {
            let card = ParameterCard::number(name, multiple as f64, self.max_side() as f64, side as f64);
            card.multiple(multiple as f64)
        };
        let (steps, guidance) = if self.enlarges() { (50.0, 4.0) } else { (100.0, 7.0) };
        let mut parameters = vec![
            size("width"),
            size("height"),
            ParameterCard::number("num_inference_steps", self.scheduler.least_steps() as f64, MAX_STEPS as f64, steps)
                .multiple(1.0),
            ParameterCard::number("num_images_per_prompt", 1.0, 10.0, 1.0).multiple(1.0),
            ParameterCard::field("noise_generator"),
            ParameterCard::field("negative_prompt"),
            ParameterCard::number("guidance_scale", 0.0, 100.0, guidance),
        ];
        if let Some(noising) = &self.image_noising {
            parameters.push(ParameterCard::field("image_blob_id").required());
            let most = noising.levels.saturating_sub(1) as f64;
            parameters.push(ParameterCard::number("noise_level", 0.0, most, NOISE_LEVEL.min(most)).multiple(1.0));
        }
        if self.scheduler.takes_eta() {
            parameters.push(ParameterCard::number("eta", 0.0, 1.0, 0.0));
        }
        parameters
    }
}

/// Channels of a picture.
const PICTURE: usize = 3;

fn image_noising(dir: &ModelDir) -> Result<ImageNoising> {
    let component = dir.require("image_noising_scheduler")?;
    let config: Value = read_json(&component.path.join("scheduler_config.json"))?;
    let scheduler = DiffusionConfig::new(&component.class.1, &config)?;
    match scheduler.noise_levels() {
        Some(levels) => Ok(ImageNoising { scheduler, levels }),
        None => Err(Error::Unsupported { field: "image_noising_scheduler".into(), value: component.class.1 }),
    }
}

/// Loads one rank of one component.
pub fn load(spec: LoadSpec<'_>, weights: &Weights) -> Result<Rank> {
    let LoadSpec { dir, component, group, limits, .. } = spec;
    let range = group.range;
    let model: Box<dyn BlockModel> = match component {
        "text_encoder" => Box::new(T5Encoder::load(weights, &dir.config::<T5Config>(component)?, range)?),
        "unet" => Box::new(IfUNet::load(weights, &dir.config::<IfUNetConfig>(component)?, range)?),
        other => return Err(Error::ModelDir { path: dir.root().into(), reason: format!("`{other}` is none of {COMPONENTS:?}") }),
    };
    Rank::of(model, group, |runner| {
        Ok(match component {
            "unet" => Box::new(Engine::new(Box::new(IfDenoiser::load(dir)?), runner, limits)),
            _ => Box::new(TextStage::new(text_encoding(dir)?, runner, limits.prompt_cache_bytes)),
        })
    })
}

/// The network is given all of the text encoder's states, those of padding too.
fn text_encoding(dir: &ModelDir) -> Result<TextEncoding> {
    Ok(TextEncoding {
        tokenizer: Tokenizer::load(&dir.root().join("tokenizer"))?.of_captions(),
        tokens: Some(TOKENS),
        outputs: vec![(Kept::Output("last_hidden_state"), "prompt_embeds")],
        with_mask: true,
        besides: None,
        encoder: Encoder::First,
        guidance: GUIDANCE,
    })
}

/// What DeepFloyd IF does around its network.
#[derive(Debug)]
pub struct IfDenoiser {
    parts: Parts,
}

impl IfDenoiser {
    /// From a model's configurations.
    pub fn load(dir: &ModelDir) -> Result<Self> {
        Ok(Self { parts: Parts::read(dir)? })
    }
}

impl Denoiser for IfDenoiser {
    fn start(&self, request: Request, mut inputs: Inputs) -> Result<DenoiseState> {
        let mut tensors = Tensors::new();
        let names: &[&str] =
            if request.cfg_scale(GUIDANCE).is_some() { &["prompt_embeds", "negative_prompt_embeds"] } else { &["prompt_embeds"] };
        for name in names {
            tensors.insert(*name, inputs.conditioning.get(name)?.clone());
        }
        let shape = [request.num_images_per_prompt, PICTURE, request.height, request.width];
        let mut generator = flow::generator(&request);
        let noise = match inputs.noise.take() {
            Some(noise) => noise,
            None => generator.randn(&shape)?,
        };
        if let Some(noising) = &self.parts.image_noising {
            let missing = || Error::Invalid { field: "image", reason: "there is none, and this model enlarges one".into() };
            let bytes = inputs.pictures.image.as_deref().ok_or_else(missing)?;
            let picture = image_io::decode_picture(bytes, &PictureLimits::default())?;
            let enlarged = enlarged(&picture, [request.height, request.width])?.broadcast_as(&shape)?.contiguous()?;
            let noise = generator.randn(&shape)?;
            let level = request.noise_level.unwrap_or(NOISE_LEVEL as usize);
            tensors.insert("upscaled", noising.scheduler.add_noise(&enlarged, &noise, level)?);
        }
        let drawn = Drawn::new(generator, std::mem::take(&mut inputs.step_noise));
        let run = Run { num_inference_steps: request.num_inference_steps, eta: request.eta, ..Run::default() };
        let scheduler = self.parts.scheduler.start(&run, Some(Box::new(drawn)))?;
        let latents = (noise * scheduler.init_noise_sigma())?;
        Ok(DenoiseState { request, latents, step: 0, scheduler, tensors, last: None })
    }

    /// Unconditional first.
    fn branches(&self, state: &DenoiseState) -> Result<Vec<Tensors>> {
        let pictures = state.pictures();
        let timestep = state.scheduler.timesteps()[state.step] as f32;
        let upscaled = state.tensors.find("upscaled");
        let sample = match upscaled {
            Some(upscaled) => Tensor::cat(&[&state.latents, upscaled], 1)?,
            None => state.latents.clone(),
        };
        let sample = state.scheduler.scale_model_input(&sample, state.step)?;
        let branch = |name: &str| -> Result<Tensors> {
            let mut inputs = Tensors::new()
                .with("sample", sample.clone())
                .with("timestep", flow::each(timestep, pictures)?)
                .with("encoder_hidden_states", flow::per_picture(state.tensors.get(name)?, pictures)?);
            if upscaled.is_some() {
                let level = state.request.noise_level.map_or(NOISE_LEVEL as f32, |level| level as f32);
                inputs.insert("class_labels", flow::each(level, pictures)?);
            }
            Ok(inputs)
        };
        match state.request.cfg_scale(GUIDANCE) {
            None => Ok(vec![branch("prompt_embeds")?]),
            Some(_) => Ok(vec![branch("negative_prompt_embeds")?, branch("prompt_embeds")?]),
        }
    }

    fn shared_inputs(&self) -> &'static [&'static str] {
        &[]
    }

    /// Branches of one picture size go together: texts are all of one length.
    fn batch_key(&self, state: &DenoiseState, _branch: usize) -> Vec<usize> {
        vec![state.request.height, state.request.width]
    }

    /// Guidance is of the noise; its variance is the conditional pass's.
    fn advance(&self, state: &mut DenoiseState, outputs: Vec<Tensor>) -> Result<()> {
        let part = |output: &Tensor, at: usize| output.narrow(1, at * PICTURE, PICTURE)?.contiguous();
        let (cond, noise) = match outputs.as_slice() {
            [cond] => (cond, part(cond, 0)?),
            [uncond, cond] => {
                let scale = state.request.cfg_scale(GUIDANCE).unwrap_or(1.0);
                (cond, flow::guided(&part(uncond, 0)?, &part(cond, 0)?, scale)?)
            }
            other => return Err(Error::Rank { reason: format!("{} branches, expected 1 or 2", other.len()) }),
        };
        let learned = self.parts.scheduler.takes_variance();
        let model_output = if learned { Tensor::cat(&[noise, part(cond, 1)?], 1)? } else { noise };
        flow::step(state, model_output)
    }

    fn finish(&self, state: DenoiseState) -> Result<Payload> {
        Ok(Payload::Image(Tensors::new().with("image", image_io::denormalize(&state.latents)?)))
    }
}

/// A picture at another size, `[1, 3, height, width]` in -1..1: bilinear, corners on corners, as torch's `interpolate` with `align_corners`.
fn enlarged(picture: &Picture, [height, width]: [usize; 2]) -> Result<Tensor> {
    let (rows, columns) = (places(picture.height(), height), places(picture.width(), width));
    let mut values = Vec::with_capacity(PICTURE * height * width);
    for channel in 0..PICTURE {
        let at = |y: usize, x: usize| f32::from(picture.pixel(y, x)[channel]) / 127.5 - 1.0;
        for (top, bottom, down) in &rows {
            for (left, right, along) in &columns {
                let between = |y: usize| at(y, *left) * (1.0 - along) + at(y, *right) * along;
                values.push(between(*top) * (1.0 - down) + between(*bottom) * down);
            }
        }
    }
    Ok(Tensor::from_vec(values, (1, PICTURE, height, width), &Device::Cpu)?)
}

/// For each of `to` places on a side of `from`, the two that it lies between, and how far from the first.
fn places(from: usize, to: usize) -> Vec<(usize, usize, f32)> {
    let step = if to > 1 { (from - 1) as f32 / (to - 1) as f32 } else { 0.0 };
    let place = |i: usize| {
        let at = step * i as f32;
        let first = (at as usize).min(from - 1);
        (first, (first + 1).min(from - 1), at - first as f32)
    };
    (0..to).map(place).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_side_is_enlarged_with_corners_on_corners() {
        assert_eq!(places(3, 5), [(0, 1, 0.0), (0, 1, 0.5), (1, 2, 0.0), (1, 2, 0.5), (2, 2, 0.0)]);
        assert_eq!(places(1, 2), [(0, 0, 0.0), (0, 0, 0.0)]);
        assert_eq!(places(5, 1), [(0, 1, 0.0)]);
    }
}
