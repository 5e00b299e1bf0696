//! What FLUX does around its network, for all of its pipelines.
//!
//! The order of random draws is the reference's: latents of the picture that the steps begin at, then the noise, then (Fill)
//! latents of the masked picture.

use parallel::rng::{Generator, TorchCpu, TorchCuda};
use parallel::{Device, Tensor, Tensors};

use super::tokens::{image_ids, pack_latents, unpack_latents};
use super::{GUIDANCE, Kind, fill, kontext};
use crate::autoencoder_kl::{AutoencoderKlConfig, Moments};
use crate::denoise::{DenoiseState, Denoiser, LastStep};
use crate::flux_transformer::FluxTransformerConfig;
use crate::model_dir::ModelDir;
use crate::request::NoiseGenerator;
use crate::scheduler::{FlowMatchEulerDiscrete, FlowMatchEulerDiscreteConfig, Schedule, Scheduler};
use crate::stage::Inputs;
use crate::{Error, Payload, Request, Result};

/// What FLUX does around its network.
#[derive(Debug)]
pub struct FluxDenoiser {
    kind: Kind,
    guidance_embeds: bool,
    scheduler: FlowMatchEulerDiscreteConfig,
    /// Latent channels of the autoencoder; a token packs 2 x 2 of them.
    channels: usize,
    vae: AutoencoderKlConfig,
}

impl FluxDenoiser {
    /// From a model's configurations.
    ///
    /// # Errors
    /// When the network's channels are not those that its pipeline gives it.
    pub fn load(dir: &ModelDir) -> Result<Self> {
        let (kind, transformer): (_, FluxTransformerConfig) = (Kind::of(dir), dir.config("transformer")?);
        let vae: AutoencoderKlConfig = dir.config("vae")?;
        let latents = 4 * vae.latent_channels;
        let beside = if kind == Kind::Fill { fill::channels(&vae) } else { 0 };
        let out_channels = transformer.out_channels.unwrap_or(transformer.in_channels);
        for (field, found, expected) in
            [("in_channels", transformer.in_channels, latents + beside), ("out_channels", out_channels, latents)]
        {
            if found != expected {
                let value = format!("{found} ({expected} in a {})", dir.pipeline_class());
                return Err(Error::Unsupported { field: format!("transformer: {field}"), value });
            }
        }
        let guidance_embeds = transformer.guidance_embeds;
        Ok(Self { kind, guidance_embeds, scheduler: dir.scheduler_config()?, channels: vae.latent_channels, vae })
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

    /// Latents of a picture, by the name it was encoded under: a draw from their distribution, scaled and packed.
    /// `[1, C, H, W] -> [1, L, 4 C]`
    fn image_latents(&self, image: &Tensors, name: &str, generator: &mut Generator) -> Result<Tensor> {
        let moment = |part: &str| image.get(&format!("{name}.{part}")).cloned();
        let moments = Moments { mean: moment("mean")?, logvar: moment("logvar")? };
        let noise = generator.randn(moments.mean.dims())?;
        pack_latents(&self.vae.scale(&moments.sample(&noise)?)?)
    }

    /// What the network is given of the pictures: `[B, L, 4 C]`; with a reference picture its tokens follow, with a picture to
    /// fill in each token has its channels beside it.
    fn hidden_states(&self, state: &DenoiseState) -> Result<Tensor> {
        let latents = &state.latents;
        if let Some(reference) = state.tensors.find("reference") {
            let reference = pack_latents(reference)?;
            let (_, tokens, channels) = reference.dims3()?;
            let reference = reference.broadcast_as((state.pictures(), tokens, channels))?.contiguous()?;
            return Ok(Tensor::cat(&[latents, &reference], 1)?);
        }
        Ok(match state.tensors.find("masked_image") {
            Some(masked) => Tensor::cat(&[latents, masked], 2)?,
            None => latents.clone(),
        })
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
        let image = inputs.image_latents;
        // Where the steps begin, if they begin at a picture. Kontext's is looked at instead.
        let start = match (&image, self.kind) {
            (Some(image), Kind::Base | Kind::Fill) => Some(self.image_latents(image, "image", &mut generator)?),
            (None, Kind::Fill) => return Err(Error::Invalid { field: "image", reason: "there is none".into() }),
            (_, Kind::Kontext) | (None, Kind::Base) => None,
        };
        let noise = match inputs.noise {
            Some(noise) => noise,
            None => generator.randn(&[request.num_images_per_prompt, self.channels, 2 * h, 2 * w])?,
        };
        let noise = pack_latents(&noise)?;
        let each = |one: &Tensor| -> Result<Tensor> {
            let (_, tokens, channels) = one.dims3()?;
            Ok(one.broadcast_as((request.num_images_per_prompt, tokens, channels))?.contiguous()?)
        };
        let latents = match &start {
            None => noise.clone(),
            Some(start) => scheduler.scale_noise(&each(start)?, 0, &noise)?,
        };
        let mut img_ids = image_ids(0, h, w)?;
        match (self.kind, image, start) {
            (Kind::Base, Some(image), Some(start)) => {
                if let Some(mask) = image.find("mask") {
                    tensors.insert("mask", self.mask(mask)?);
                    tensors.insert("image_latents", each(&start)?);
                    tensors.insert("noise", noise);
                }
            }
            (Kind::Kontext, Some(image), _) => {
                let reference = self.vae.scale(image.get("image.mean")?)?;
                let ids = kontext::reference_ids(&reference)?;
                img_ids = Tensor::cat(&[img_ids, ids], 0)?;
                tensors.insert("reference", reference);
            }
            (Kind::Fill, Some(image), _) => {
                let masked = self.image_latents(&image, "masked_image", &mut generator)?;
                let mask = fill::pack_mask(image.get("mask")?, self.vae.scale_factor())?;
                tensors.insert("masked_image", each(&Tensor::cat(&[masked, mask], 2)?)?);
            }
            _ => {}
        }
        tensors.insert("img_ids", img_ids);
        let text_tokens = tensors.get("prompt_embeds")?.dim(1)?;
        tensors.insert("txt_ids", Tensor::zeros((text_tokens, 3), parallel::DType::F32, &Device::Cpu)?);
        Ok(DenoiseState { request, latents, step: 0, scheduler: Box::new(scheduler), tensors, last: None })
    }

    fn branches(&self, state: &DenoiseState) -> Result<Vec<Tensors>> {
        let pictures = state.pictures();
        let timestep = state.scheduler.timesteps()[state.step] as f32 / 1000.0;
        let each = |value: f32| Tensor::full(value, pictures, &Device::Cpu);
        let hidden_states = self.hidden_states(state)?;
        let branch = |prefix: &str| -> Result<Tensors> {
            let embeds = |name: &str| -> Result<Tensor> {
                let one = state.tensors.get(&format!("{prefix}{name}"))?;
                let mut shape = one.dims().to_vec();
                shape[0] = pictures;
                Ok(one.broadcast_as(shape)?.contiguous()?)
            };
            let mut inputs = Tensors::new()
                .with("hidden_states", hidden_states.clone())
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

    /// Jobs of one picture size, one text length and, if they have one, one size of reference picture go together.
    fn batch_key(&self, state: &DenoiseState, _branch: usize) -> Vec<usize> {
        let (h, w) = self.grid(&state.request);
        let reference = state.tensors.find("reference").map(|reference| &reference.dims()[2..]);
        [&[h, w, state.request.max_sequence_length], reference.unwrap_or_default()].concat()
    }

    fn advance(&self, state: &mut DenoiseState, outputs: Vec<Tensor>) -> Result<()> {
        // A reference picture's tokens are looked at, not stepped.
        let tokens = state.latents.dim(1)?;
        let outputs = outputs.iter().map(|output| Ok(output.narrow(1, 0, tokens)?.contiguous()?)).collect::<Result<Vec<_>>>()?;
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

/// numpy's `linspace(start, stop, n)`.
fn linspace(start: f64, stop: f64, n: usize) -> Vec<f64> {
    let step = (stop - start) / (n.max(2) - 1) as f64;
    (0..n).map(|i| if i > 0 && i + 1 == n { stop } else { start + i as f64 * step }).collect()
}
