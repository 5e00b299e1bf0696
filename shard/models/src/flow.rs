//! What the flow-matching families (FLUX, Stable Diffusion 3, Qwen-Image) do alike around their networks: how a job starts from
//! noise or from a picture, the step, the masked picture of inpainting, and what a job may set.
//!
//! Follows diffusers 0.42.1, `pipeline_flux*.py`, `pipeline_stable_diffusion_3*.py` and `pipeline_qwenimage*.py`. The order of
//! random draws is theirs: latents of the input picture first, then the noise.

use parallel::rng::{Generator, TorchCpu, TorchCuda};
use parallel::{Device, Tensor, Tensors};

use crate::autoencoder_kl::Moments;
use crate::card::ParameterCard;
use crate::denoise::{DenoiseState, LastStep};
use crate::request::NoiseGenerator;
use crate::scheduler::{FlowMatchEulerDiscrete, Scheduler};
use crate::stage::Inputs;
use crate::{Request, Result};

/// Side limit of a picture, in pixels.
pub(crate) const MAX_SIDE: usize = 4096;
/// 2048 x 2048: what the position embeddings were made for, and then some.
pub(crate) const MAX_PIXELS: u64 = 4 << 20;
const MAX_STEPS: usize = 500;

/// Where a family differs in what every job may set.
#[derive(Debug)]
pub(crate) struct Defaults {
    /// Sides are multiples of this.
    pub(crate) multiple: usize,
    /// Longest side, in pixels.
    pub(crate) max_side: usize,
    /// Pixels of a side when the job does not say.
    pub(crate) side: usize,
    /// Steps when the job does not say.
    pub(crate) num_inference_steps: usize,
    /// Least steps.
    pub(crate) least_steps: usize,
    /// Tokens of the large text encoder when the job does not say.
    pub(crate) max_sequence_length: usize,
}

/// What every job may set, but for the prompts.
pub(crate) fn parameters(defaults: &Defaults) -> Vec<ParameterCard> {
    let multiple = defaults.multiple as f64;
    let size = |name| ParameterCard::number(name, multiple, defaults.max_side as f64, defaults.side as f64).multiple(multiple);
    let steps = defaults.num_inference_steps as f64;
    vec![
        size("width"),
        size("height"),
        ParameterCard::number("num_inference_steps", defaults.least_steps as f64, MAX_STEPS as f64, steps).multiple(1.0),
        ParameterCard::number("num_images_per_prompt", 1.0, 10.0, 1.0).multiple(1.0),
        // Above nothing: the least strength still makes one step.
        ParameterCard::number("strength", 0.001, 1.0, 0.6),
        ParameterCard::field("image_blob_id"),
        ParameterCard::field("mask_image_blob_id"),
        ParameterCard::number("max_sequence_length", 1.0, 512.0, defaults.max_sequence_length as f64).multiple(1.0),
        ParameterCard::field("noise_generator"),
    ]
}

/// The part of the schedule that the job's `strength` leaves.
pub(crate) fn begin(scheduler: FlowMatchEulerDiscrete, request: &Request) -> Result<FlowMatchEulerDiscrete> {
    let Some(strength) = request.strength else { return Ok(scheduler) };
    let n = request.num_inference_steps as f64;
    // int(n - min(n strength, n)), as the reference rounds.
    scheduler.with_begin((n - (n * strength).min(n)).max(0.0) as usize)
}

/// All that is random in a job comes from this.
pub(crate) fn generator(request: &Request) -> Generator {
    match request.noise_generator {
        NoiseGenerator::TorchCpu => Generator::Cpu(TorchCpu::new(request.seed)),
        NoiseGenerator::TorchCuda => Generator::Cuda(TorchCuda::new(request.seed)),
    }
}

/// How a family's latents lie.
pub(crate) struct Latents<'a> {
    /// `[C, H, W]` of one picture.
    pub(crate) shape: [usize; 3],
    /// Pixels of a picture's side to one of its latents'.
    pub(crate) scale_factor: usize,
    /// What the autoencoder gives, `[B, C, H, W]`, to what the network works on.
    pub(crate) scale: &'a dyn Fn(&Tensor) -> Result<Tensor>,
    /// `[B, C, H, W]` to the form that the network takes.
    pub(crate) pack: &'a dyn Fn(&Tensor) -> Result<Tensor>,
}

impl Latents<'_> {
    /// What a job starts from, packed: noise, or with an input picture that picture noised to the first timestep. With a mask,
    /// `kept` gets what [`step`] then needs.
    pub(crate) fn start(
        &self,
        request: &Request,
        inputs: &mut Inputs,
        scheduler: &dyn Scheduler,
        kept: &mut Tensors,
    ) -> Result<Tensor> {
        self.start_with(request, inputs, scheduler, kept, &mut generator(request))
    }

    /// The same, for a family that draws more afterwards.
    pub(crate) fn start_with(
        &self,
        request: &Request,
        inputs: &mut Inputs,
        scheduler: &dyn Scheduler,
        kept: &mut Tensors,
        generator: &mut Generator,
    ) -> Result<Tensor> {
        let picture = inputs.image_latents.take();
        let image_latents = picture.as_ref().map(|picture| self.image_latents(picture, "image", generator)).transpose()?;
        let [c, h, w] = self.shape;
        let noise = match inputs.noise.take() {
            Some(noise) => noise,
            None => generator.randn(&[request.num_images_per_prompt, c, h, w])?,
        };
        let noise = (self.pack)(&noise)?;
        let Some(image_latents) = image_latents else { return Ok(noise) };
        let image_latents = image_latents.broadcast_as(noise.shape())?.contiguous()?;
        let latents = scheduler.scale_noise(&image_latents, 0, &noise)?;
        if let Some(mask) = picture.as_ref().and_then(|picture| picture.find("mask")) {
            kept.insert("mask", self.mask(mask)?);
            kept.insert("image_latents", image_latents);
            kept.insert("noise", noise);
        }
        Ok(latents)
    }

    /// Latents of a picture, by the name it was encoded under: a draw from their distribution, scaled and packed.
    pub(crate) fn image_latents(&self, picture: &Tensors, name: &str, generator: &mut Generator) -> Result<Tensor> {
        (self.pack)(&(self.scale)(&sample(picture, name, generator)?)?)
    }

    /// `[1, 1, height, width]` at latent size, packed as the latents are: 1 where to repaint.
    fn mask(&self, mask: &Tensor) -> Result<Tensor> {
        (self.pack)(&at_latents(mask, self.scale_factor)?.repeat((1, self.shape[0], 1, 1))?)
    }
}

/// A draw from the distribution of a picture's latents, by the name it was encoded under: `[1, C, H, W]`, not scaled.
pub(crate) fn sample(picture: &Tensors, name: &str, generator: &mut Generator) -> Result<Tensor> {
    let moment = |part: &str| picture.get(&format!("{name}.{part}")).cloned();
    let moments = Moments { mean: moment("mean")?, logvar: moment("logvar")? };
    let noise = generator.randn(moments.mean.dims())?;
    moments.sample(&noise)
}

/// A mask at latent size: `[1, 1, h f, w f] -> [1, 1, h, w]`. Nearest neighbour picks the first pixel of every window.
pub(crate) fn at_latents(mask: &Tensor, scale_factor: usize) -> Result<Tensor> {
    let (_, _, height, width) = mask.dims4()?;
    let rows = Tensor::arange_step(0u32, height as u32, scale_factor as u32, mask.device())?;
    let columns = Tensor::arange_step(0u32, width as u32, scale_factor as u32, mask.device())?;
    Ok(mask.index_select(&rows, 2)?.index_select(&columns, 3)?)
}

/// The scheduler's step by `model_output`; outside a mask the input picture, noised to the next timestep, takes its place.
pub(crate) fn step(state: &mut DenoiseState, model_output: Tensor) -> Result<()> {
    let prev_sample = state.scheduler.step(&model_output, state.step, &state.latents)?;
    state.latents = outside_mask(state, &prev_sample)?;
    state.last = Some(LastStep { model_output, prev_sample });
    Ok(())
}

/// `prev_sample`, and outside a mask, if there is one, the input picture noised to the next timestep.
pub(crate) fn outside_mask(state: &DenoiseState, prev_sample: &Tensor) -> Result<Tensor> {
    let Some(mask) = state.tensors.find("mask") else { return Ok(prev_sample.clone()) };
    let image = state.tensors.get("image_latents")?;
    let kept = if state.step + 1 < state.steps() {
        state.scheduler.scale_noise(image, state.step + 1, state.tensors.get("noise")?)?
    } else {
        image.clone()
    };
    let outside = mask.affine(-1.0, 1.0)?;
    Ok((kept.broadcast_mul(&outside)? + prev_sample.broadcast_mul(mask)?)?)
}

/// `uncond + scale (cond - uncond)`: classifier-free guidance.
pub(crate) fn guided(uncond: &Tensor, cond: &Tensor, scale: f64) -> Result<Tensor> {
    Ok((uncond + ((cond - uncond)? * scale)?)?)
}

/// One prompt's embeddings for each of a job's pictures: `[1, ..] -> [N, ..]`.
pub(crate) fn per_picture(embeds: &Tensor, pictures: usize) -> Result<Tensor> {
    let mut shape = embeds.dims().to_vec();
    shape[0] = pictures;
    Ok(embeds.broadcast_as(shape)?.contiguous()?)
}

/// One number for each of a job's pictures: `[N]`.
pub(crate) fn each(value: f32, pictures: usize) -> Result<Tensor> {
    Ok(Tensor::full(value, pictures, &Device::Cpu)?)
}
