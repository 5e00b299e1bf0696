//! What the families of Stable Diffusion 1, 2 and XL do alike around their U-Nets: how a job starts from noise or from a picture, guidance, the
//! step, the masked picture of inpainting, and what a job may set. Of it PixArt and Hunyuan-DiT share how a job starts from noise.
//!
//! Follows diffusers 0.42.1, `pipeline_stable_diffusion*.py`. The order of random draws is theirs: latents of the input picture first, then
//! the noise, then latents of the masked picture, then what the steps draw.

use parallel::rng::Generator;
use parallel::{Tensor, Tensors, Weights};

use crate::autoencoder_kl::{AutoencoderKl, AutoencoderKlConfig};
use crate::autoencoder_stage::AutoencoderStage;
use crate::blocks::BlockModel;
use crate::card::ParameterCard;
use crate::clip::{ClipTextConfig, ClipTextEncoder};
use crate::control::ControlFacts;
use crate::control::conditions::{self, Conditions, Pass};
use crate::denoise::{DenoiseState, Denoiser, LastStep};
use crate::engine::Engine;
use crate::error::check_fits;
use crate::flow;
use crate::image_io::PictureLimits;
use crate::model_dir::ModelDir;
use crate::registry::{LoadSpec, Rank};
use crate::request::Guidance;
use crate::scheduler::{DiffusionConfig, Run, Scheduler, StepNoise, Until};
use crate::stage::Inputs;
use crate::text_stage::{TextEncoding, TextStage};
use crate::unet_2d_condition::{UNet2DConditionConfig, UNet2DConditionModel};
use crate::{Error, Request, Result};

pub(crate) const GUIDANCE: Guidance = Guidance::Cfg;
/// Tokens each CLIP reads, always.
pub(crate) const CLIP_TOKENS: usize = 77;
pub(crate) const MAX_STEPS: usize = 500;
/// Of the waves that a guidance scale is embedded in.
const LONGEST_PERIOD: f64 = 10_000.0;

/// Where a family differs in what every job may set.
#[derive(Debug)]
pub(crate) struct Defaults {
    /// Pixels of a side when the job does not say.
    pub(crate) side: usize,
    /// Of classifier-free guidance.
    pub(crate) guidance_scale: f64,
    /// How far to go from an input picture.
    pub(crate) strength: f64,
}

/// A family's network, autoencoder and scheduler, which fit together.
#[derive(Debug)]
pub(crate) struct Space {
    pub(crate) unet: UNet2DConditionConfig,
    pub(crate) vae: AutoencoderKlConfig,
    pub(crate) scheduler: DiffusionConfig,
    pub(crate) controls: Conditions,
}

/// Loads one rank of one component: a CLIP text encoder, the U-Net or the autoencoder.
pub(crate) fn load<D: Denoiser + 'static>(
    spec: LoadSpec<'_>,
    weights: &Weights,
    denoiser: impl FnOnce(&[ControlFacts]) -> Result<D>,
    encoding: impl FnOnce(&str) -> Result<TextEncoding>,
) -> Result<Rank> {
    let LoadSpec { dir, component, group, limits, .. } = spec;
    let model: Box<dyn BlockModel> = match component {
        "text_encoder" | "text_encoder_2" => Box::new(ClipTextEncoder::load(weights, &ClipTextConfig::of(dir, component)?)?),
        "unet" => {
            let config: UNet2DConditionConfig = dir.config(component)?;
            Box::new(UNet2DConditionModel::load(weights, &config, group.range)?)
        }
        "vae" => {
            let vae = AutoencoderKl::load(weights, &dir.config::<AutoencoderKlConfig>(component)?)?;
            return Ok(Rank::Leader(Box::new(AutoencoderStage::new(vae, PictureLimits::default()).with_masked_picture())));
        }
        other => return Err(Error::ModelDir { path: dir.root().into(), reason: format!("`{other}` is no component of it") }),
    };
    Rank::of(model, group, |runner| {
        Ok(match component {
            "unet" => Box::new(Engine::new(Box::new(denoiser(runner.controls())?), runner, limits)),
            _ => Box::new(TextStage::new(encoding(component)?, runner, limits.prompt_cache_bytes)),
        })
    })
}

/// Reads a directory's network, autoencoder and scheduler.
pub(crate) fn space(dir: &ModelDir) -> Result<Space> {
    let space = Space {
        unet: dir.config("unet")?,
        vae: dir.config("vae")?,
        scheduler: DiffusionConfig::of(dir)?,
        controls: Conditions::default(),
    };
    space.check()?;
    Ok(space)
}

impl Space {
    /// Refuses parts that do not fit together.
    fn check(&self) -> Result<()> {
        self.unet.validate()?;
        let (unet, latents) = (&self.unet, self.vae.latent_channels);
        check_fits("unet: in_channels", unet.in_channels, unet.in_channels == latents || unet.in_channels == 2 * latents + 1)?;
        check_fits("unet: out_channels", unet.out_channels, unet.out_channels == latents)?;
        check_scaling(&self.vae)
    }

    /// Refuses text of another width than the network's.
    pub(crate) fn check_text(&self, width: usize) -> Result<()> {
        let unet = &self.unet;
        match (0..unet.resolutions()).map(|at| unet.cross_attention_dim.at(at)).find(|other| *other != width) {
            None => Ok(()),
            Some(other) => Err(Error::Unsupported { field: "unet: cross_attention_dim".into(), value: other.to_string() }),
        }
    }

    /// Whether the network is given a mask and a masked picture beside the latents: it is for inpainting alone.
    pub(crate) fn inpaints(&self) -> bool {
        self.unet.in_channels != self.vae.latent_channels
    }

    /// Sides are multiples of this, in pixels.
    pub(crate) fn multiple(&self) -> usize {
        self.vae.scale_factor() * self.unet.multiple()
    }

    /// Height and width of the latents.
    pub(crate) fn grid(&self, request: &Request) -> (usize, usize) {
        let f = self.vae.scale_factor();
        (request.height / f, request.width / f)
    }

    /// Pixels of a side when neither the job nor the pipeline says.
    pub(crate) fn side(&self) -> usize {
        let side = self.unet.sample_size.unwrap_or(64).saturating_mul(self.vae.scale_factor());
        (side / self.multiple()).max(1).saturating_mul(self.multiple()).min(flow::MAX_SIDE)
    }

    /// What every job may set, but for the prompts.
    pub(crate) fn parameters(&self, defaults: &Defaults) -> Vec<ParameterCard> {
        let multiple = self.multiple() as f64;
        let size = |name| ParameterCard::number(name, multiple, flow::MAX_SIDE as f64, defaults.side as f64).multiple(multiple);
        let picture = |name| {
            let field = ParameterCard::field(name);
            if self.inpaints() { field.required() } else { field }
        };
        let mut parameters = vec![
            size("width"),
            size("height"),
            ParameterCard::number("num_inference_steps", self.scheduler.least_steps() as f64, MAX_STEPS as f64, 50.0)
                .multiple(1.0),
            ParameterCard::number("num_images_per_prompt", 1.0, 10.0, 1.0).multiple(1.0),
            // `int(n strength)` steps are made: less than this leaves none of any number, and of few a job is refused when it starts.
            ParameterCard::number("strength", 1.0 / MAX_STEPS as f64, 1.0, if self.inpaints() { 1.0 } else { defaults.strength }),
            picture("image_blob_id"),
            picture("mask_image_blob_id"),
            ParameterCard::field("noise_generator"),
            ParameterCard::number("guidance_scale", 0.0, 100.0, defaults.guidance_scale),
        ];
        if self.unet.time_cond_proj_dim.is_none() {
            parameters.push(ParameterCard::field("negative_prompt"));
            parameters.push(ParameterCard::number("guidance_rescale", 0.0, 1.0, 0.0));
        }
        if self.scheduler.takes_eta() {
            parameters.push(ParameterCard::number("eta", 0.0, 1.0, 0.0));
        }
        parameters
    }

    /// Whether the network has an unconditional pass beside the other: not if it is given the scale of guidance.
    pub(crate) fn cfg_scale(&self, request: &Request) -> Option<f64> {
        request.cfg_scale(GUIDANCE).filter(|_| self.unet.time_cond_proj_dim.is_none())
    }

    /// A job at its first step. `tensors` are what the family keeps for it.
    pub(crate) fn start(&self, request: Request, mut inputs: Inputs, mut tensors: Tensors) -> Result<DenoiseState> {
        if let Some(latents) = inputs.latents.take() {
            return self.go_on(request, latents, inputs, tensors);
        }
        self.controls.start(&request, &mut tensors, |k, facts| conditions::pixels(&request, &inputs, k, facts))?;
        let mut generator = flow::generator(&request);
        let picture = inputs.image_latents.take();
        let mask = picture.as_ref().and_then(|picture| picture.find("mask")).cloned();
        // From noise alone, though there is a picture.
        let anew = mask.is_some() && request.strength.is_none_or(|strength| strength >= 1.0);
        let (h, w) = self.grid(&request);
        let shape = [request.num_images_per_prompt, self.vae.latent_channels, h, w];
        let sample = |name: &str, generator: &mut Generator| -> Result<Option<Tensor>> {
            let Some(picture) = &picture else { return Ok(None) };
            let latents = flow::sample(picture, name, generator)?;
            Ok(Some(self.vae.scale(&latents)?.broadcast_as(&shape)?.contiguous()?))
        };
        let image_latents = if anew && self.inpaints() { None } else { sample("image", &mut generator)? };
        let noise = match inputs.noise.take() {
            Some(noise) => noise,
            None => generator.randn(&shape)?,
        };
        if let Some(mask) = mask {
            // The reference encodes the masked picture, and so draws, whether the network is given it or not.
            let masked = sample("masked_image", &mut generator)?;
            let mask = flow::at_latents(&mask, self.vae.scale_factor())?; // [1, 1, h, w]
            if self.inpaints() {
                let mask = mask.broadcast_as((shape[0], 1, h, w))?.contiguous()?;
                let masked = masked.ok_or_else(|| Error::Invalid { field: "image", reason: "there is none".into() })?;
                tensors.insert("beside", Tensor::cat(&[mask, masked], 1)?);
            } else {
                tensors.insert("mask", mask);
            }
        } else if self.inpaints() {
            return Err(Error::Invalid { field: "mask_image", reason: "this model only repaints what a mask covers".into() });
        }
        let drawn = Drawn::new(generator, std::mem::take(&mut inputs.step_noise));
        let run = Run {
            num_inference_steps: request.num_inference_steps,
            begin: self.begin(&request),
            eta: request.eta,
            ..Run::default()
        };
        let scheduler = self.scheduler.start(&run, Some(Box::new(drawn)))?;
        let latents = match &image_latents {
            Some(image_latents) if !anew => scheduler.scale_noise(image_latents, 0, &noise)?,
            _ => (&noise * scheduler.init_noise_sigma())?,
        };
        if let (Some(image_latents), true) = (image_latents, tensors.find("mask").is_some()) {
            tensors.insert("image_latents", image_latents);
            tensors.insert("noise", noise);
        }
        let scheduler = match request.denoising_end.filter(|end| *end < 1.0) {
            Some(end) => Box::new(Until::new(scheduler, self.scheduler.cutoff(end))?),
            None => scheduler,
        };
        Ok(DenoiseState { request, latents, step: 0, scheduler, tensors, last: None })
    }

    /// A job that another model has left, at the part of the denoising that its `denoising_end` says: `denoising_start` of the reference. What its steps draw
    /// is drawn with the next seed, since the other model has drawn with the job's own.
    fn go_on(&self, request: Request, latents: Tensor, inputs: Inputs, tensors: Tensors) -> Result<DenoiseState> {
        let invalid = |reason: String| Error::Invalid { field: "denoising_end", reason };
        let part =
            request.denoising_end.ok_or_else(|| invalid("there are latents to go on with, and nobody says from where".into()))?;
        let (h, w) = self.grid(&request);
        let shape = [request.num_images_per_prompt, self.vae.latent_channels, h, w];
        if latents.dims() != shape {
            let reason = format!("latents of {:?}, expected {shape:?}", latents.dims());
            return Err(Error::Invalid { field: "latents", reason });
        }
        let generator = flow::generator(&Request { seed: request.seed.wrapping_add(1), ..request.clone() });
        let drawn = || Box::new(Drawn::new(generator.clone(), inputs.step_noise.clone()));
        let run = Run { num_inference_steps: request.num_inference_steps, eta: request.eta, ..Run::default() };
        let (whole, cutoff) = (self.scheduler.start(&run, Some(drawn()))?, self.scheduler.cutoff(part));
        let mut left = whole.timesteps().iter().filter(|timestep| **timestep < cutoff).count();
        // Each step of two evaluations but the first has them at one timestep: an even number of them begins between the two.
        if self.scheduler.order() == 2 && left % 2 == 0 {
            left += 1;
        }
        if left == 0 {
            return Err(invalid(format!("it leaves no step of {} to go on with", whole.timesteps().len())));
        }
        let begin = whole.timesteps().len().saturating_sub(left);
        let scheduler = self.scheduler.start(&Run { begin, ..run }, Some(drawn()))?;
        Ok(DenoiseState { request, latents, step: 0, scheduler, tensors, last: None })
    }

    /// Evaluations that the job's `strength` leaves out, as the reference rounds: `n - min(int(n strength), n)` steps.
    fn begin(&self, request: &Request) -> usize {
        let Some(strength) = request.strength else { return 0 };
        let n = request.num_inference_steps;
        (n - ((n as f64 * strength) as usize).min(n)) * self.scheduler.order()
    }

    /// The network's inputs of the pass of this index (the unconditional one first): `sample`, `timestep`, the guidance scale if it takes that,
    /// and the job's controls.
    pub(crate) fn pass(&self, state: &DenoiseState, index: usize) -> Result<Tensors> {
        let pictures = state.pictures();
        let mut sample = state.scheduler.scale_model_input(&state.latents, state.step)?;
        if let Some(beside) = state.tensors.find("beside") {
            sample = Tensor::cat(&[&sample, beside], 1)?;
        }
        let timestep = state.scheduler.timesteps()[state.step] as f32;
        let mut inputs = Tensors::new().with("sample", sample).with("timestep", flow::each(timestep, pictures)?);
        if let Some(width) = self.unet.time_cond_proj_dim {
            let scale = state.request.guidance_scale.unwrap_or_default() - 1.0;
            inputs.insert("timestep_cond", guidance_scale_embedding(scale, width, pictures)?);
        }
        self.controls.add(state, self.control_pass(state, index), &mut inputs)?;
        Ok(inputs)
    }

    fn control_pass(&self, state: &DenoiseState, index: usize) -> Pass {
        Pass { index, unconditional: index == 0 && self.cfg_scale(&state.request).is_some() }
    }

    /// Passes over pictures of one size go together if the same controls take part: texts are all of one length.
    pub(crate) fn batch_key(&self, state: &DenoiseState, index: usize) -> Vec<usize> {
        let (h, w) = self.grid(&state.request);
        let controls = self.controls.key(state, self.control_pass(state, index));
        [h, w].into_iter().chain(controls).collect()
    }

    /// Guidance, the scheduler's step, and outside a mask the input picture noised to the next timestep.
    pub(crate) fn advance(&self, state: &mut DenoiseState, outputs: &[Tensor]) -> Result<()> {
        let model_output = match outputs {
            [cond] => cond.clone(),
            [uncond, cond] => {
                let guided = flow::guided(uncond, cond, self.cfg_scale(&state.request).unwrap_or(1.0))?;
                rescaled(guided, cond, state.request.guidance_rescale)?
            }
            other => return Err(Error::Rank { reason: format!("{} branches, expected 1 or 2", other.len()) }),
        };
        let prev_sample = state.scheduler.step(&model_output, state.step, &state.latents)?;
        state.latents = flow::outside_mask(state, &prev_sample)?;
        state.last = Some(LastStep { model_output, prev_sample });
        Ok(())
    }
}

/// Refuses an autoencoder whose latents are scaled by more than a factor: the reference multiplies by that alone, or in XL by the others as well.
pub(crate) fn check_scaling(vae: &AutoencoderKlConfig) -> Result<()> {
    for (field, given) in [("vae: latents_mean", &vae.latents_mean), ("vae: latents_std", &vae.latents_std)] {
        if let Some(values) = given {
            return Err(Error::Unsupported { field: field.into(), value: format!("{values:?}") });
        }
    }
    match vae.shift_factor {
        None => Ok(()),
        Some(shift) => Err(Error::Unsupported { field: "vae: shift_factor".into(), value: shift.to_string() }),
    }
}

/// A job's scheduler, and the noise it starts from where it has no picture: `[C, H, W]` for each of those it draws.
pub(crate) fn from_noise(
    config: &DiffusionConfig,
    request: &Request,
    inputs: &mut Inputs,
    [c, h, w]: [usize; 3],
) -> Result<(Box<dyn Scheduler>, Tensor)> {
    let mut generator = flow::generator(request);
    let noise = match inputs.noise.take() {
        Some(noise) => noise,
        None => generator.randn(&[request.num_images_per_prompt, c, h, w])?,
    };
    let drawn = Drawn::new(generator, std::mem::take(&mut inputs.step_noise));
    let run = Run { num_inference_steps: request.num_inference_steps, eta: request.eta, ..Run::default() };
    let scheduler = config.start(&run, Some(Box::new(drawn)))?;
    let latents = (noise * scheduler.init_noise_sigma())?;
    Ok((scheduler, latents))
}

/// `rescale_noise_cfg` (S. Lin et al., <https://arxiv.org/abs/2305.08891>, section 3.4): brings the guided output back to the standard deviation of
/// the conditional one, by a part.
pub(crate) fn rescaled(guided: Tensor, cond: &Tensor, part: f64) -> Result<Tensor> {
    if part <= 0.0 {
        return Ok(guided);
    }
    let ratio = (deviation(cond)? / deviation(&guided)?)?; // [B, 1, 1, 1]
    let rescaled = guided.broadcast_mul(&ratio)?;
    Ok(((rescaled * part)? + (guided * (1.0 - part))?)?)
}

/// The standard deviation of each item, unbiased as torch's: `[B, ..] -> [B, 1, ..]`.
fn deviation(x: &Tensor) -> Result<Tensor> {
    let mut column = vec![1; x.rank()];
    column[0] = x.dim(0)?;
    let flat = x.flatten_from(1)?;
    let n = flat.dim(1)? as f64;
    let centred = flat.broadcast_sub(&flat.mean_keepdim(1)?)?;
    let variance = (centred.sqr()?.sum_keepdim(1)? / (n - 1.0))?;
    Ok(variance.sqrt()?.reshape(column)?)
}

/// `get_guidance_scale_embedding`: sines and cosines of the scale, `[pictures, width]`.
fn guidance_scale_embedding(scale: f64, width: usize, pictures: usize) -> Result<Tensor> {
    let half = width / 2;
    let step = libm::log(LONGEST_PERIOD) as f32 / (half as f32 - 1.0);
    let frequency = |i: usize| libm::exp(f64::from(i as f32 * -step)) as f32;
    let angles: Vec<f64> = (0..half).map(|i| f64::from(scale as f32 * 1000.0 * frequency(i))).collect();
    let waves = angles.iter().map(|angle| libm::sin(*angle)).chain(angles.iter().map(|angle| libm::cos(*angle)));
    let mut row: Vec<f32> = waves.map(|wave| wave as f32).collect();
    row.resize(width, 0.0);
    flow::per_picture(&Tensor::from_vec(row, (1, width), &parallel::Device::Cpu)?, pictures)
}

/// What steps draw: what was given in place of it, or normals of the job's generator, where it stands when the first step begins.
#[derive(Debug)]
pub(crate) struct Drawn {
    given: Vec<Tensor>,
    first: Generator,
    generator: Generator,
    /// Draws that `generator` has made.
    made: usize,
}

impl Drawn {
    pub(crate) fn new(generator: Generator, given: Vec<Tensor>) -> Self {
        Self { given, first: generator.clone(), generator, made: 0 }
    }
}

impl StepNoise for Drawn {
    fn draw(&mut self, step: usize, shape: &[usize]) -> Result<Tensor> {
        if !self.given.is_empty() {
            let missing = || Error::Invalid { field: "noise", reason: format!("there is none for draw {step}") };
            return self.given.get(step).cloned().ok_or_else(missing);
        }
        // A resumed run makes the draws of the steps that it does not make again.
        if step < self.made {
            (self.generator, self.made) = (self.first.clone(), 0);
        }
        while self.made < step {
            self.generator.randn(shape)?;
            self.made += 1;
        }
        self.made += 1;
        Ok(self.generator.randn(shape)?)
    }
}

#[cfg(test)]
mod tests {
    use parallel::Device;

    use super::*;

    fn values(tensor: &Tensor) -> Vec<f32> {
        tensor.flatten_all().unwrap().to_vec1().unwrap()
    }

    #[test]
    fn a_guidance_scale_is_embedded_as_the_reference_does() {
        // get_guidance_scale_embedding(tensor([6.5]), embedding_dim=8)
        let expected =
            [-0.044_784_74, 0.110_189_155, 0.991_123_26, 0.605_186_34, -0.998_996_7, 0.993_910_6, 0.132_946_03, 0.796_083_87];
        let embedding = guidance_scale_embedding(6.5, 8, 2).unwrap();
        assert_eq!(embedding.dims(), [2, 8]);
        // Angles are up to 6,500: the last digit of a frequency is one of 4e-4 of a turn.
        assert!(values(&embedding)[..8].iter().zip(expected).all(|(a, b)| (a - b).abs() < 1e-3), "{embedding:?}");
    }

    #[test]
    fn guidance_is_brought_back_to_the_conditional_pass_deviation() {
        let tensor = |values: &[f32]| Tensor::from_slice(values, (1, 4), &Device::Cpu).unwrap();
        let (guided, cond) = (tensor(&[0.0, 2.0, 4.0, 6.0]), tensor(&[0.0, 1.0, 2.0, 3.0]));
        assert_eq!(values(&rescaled(guided.clone(), &cond, 0.0).unwrap()), [0.0, 2.0, 4.0, 6.0]);
        assert_eq!(values(&rescaled(guided.clone(), &cond, 1.0).unwrap()), [0.0, 1.0, 2.0, 3.0]);
        assert_eq!(values(&rescaled(guided, &cond, 0.5).unwrap()), [0.0, 1.5, 3.0, 4.5]);
    }

    #[test]
    fn a_resumed_run_draws_what_the_steps_before_it_left() {
        let drawn = || Drawn::new(Generator::cpu(7), Vec::new());
        let mut straight = drawn();
        let all: Vec<Vec<f32>> = (0..4).map(|step| values(&straight.draw(step, &[2, 9]).unwrap())).collect();
        for first in 0..4 {
            let mut resumed = drawn();
            for (step, expected) in all.iter().enumerate().skip(first) {
                assert_eq!(&values(&resumed.draw(step, &[2, 9]).unwrap()), expected, "step {step} from {first}");
            }
        }
        // A step that is drawn again, whatever was drawn since.
        assert_eq!(values(&straight.draw(1, &[2, 9]).unwrap()), all[1]);
        let given = Tensor::ones((2, 9), parallel::DType::F32, &Device::Cpu).unwrap();
        let mut given = Drawn::new(Generator::cpu(7), vec![given]);
        assert_eq!(values(&given.draw(0, &[2, 9]).unwrap()), [1.0; 18]);
        assert!(given.draw(1, &[2, 9]).is_err());
    }
}
