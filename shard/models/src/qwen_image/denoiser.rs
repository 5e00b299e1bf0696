//! What Qwen-Image does around its network.

use parallel::{Device, Tensor, Tensors};

use super::{Editing, GUIDANCE};
use crate::autoencoder_kl_qwen::AutoencoderKlQwenImageConfig;
use crate::autoencoder_stage::image_name;
use crate::control::ControlFacts;
use crate::control::conditions::{self, Conditions, Pass};
use crate::denoise::{DenoiseState, Denoiser};
use crate::flow::{self, Latents};
use crate::model_dir::ModelDir;
use crate::packing::{pack_latents, unpack_latents};
use crate::qwen_image_transformer::QwenImageTransformerConfig;
use crate::scheduler::{FlowMatchEulerDiscrete, FlowMatchEulerDiscreteConfig, Schedule};
use crate::stage::Inputs;
use crate::{Error, Payload, Request, Result};

/// The conditional pass's text and the unconditional one's, `[1, L, D]` each, as long as they are.
const EMBEDS: [&str; 2] = ["prompt_embeds", "negative_prompt_embeds"];

/// Controls act on both passes alike.
const PASS: Pass = Pass { index: 0, unconditional: false };

/// Text to image, image to image, inpainting, and editing by looking at pictures.
///
/// Texts are never padded: passes whose texts differ in length, of two jobs or of one job's two branches, do not share a
/// forward. The reference pads them and hides the padding, to the same end.
#[derive(Debug)]
pub struct QwenImageDenoiser {
    editing: Option<Editing>,
    scheduler: FlowMatchEulerDiscreteConfig,
    vae: AutoencoderKlQwenImageConfig,
    controls: Conditions,
}

impl QwenImageDenoiser {
    /// From a model's configurations.
    ///
    /// # Errors
    /// [`Error::Unsupported`] when the network's tokens are not 2 x 2 of the autoencoder's latents.
    pub fn load(dir: &ModelDir) -> Result<Self> {
        let transformer: QwenImageTransformerConfig = dir.config("transformer")?;
        let vae: AutoencoderKlQwenImageConfig = dir.config("vae")?;
        for (field, channels) in [("in_channels", transformer.in_channels), ("out_channels", transformer.token_channels())] {
            if Some(channels) != vae.z_dim.checked_mul(4) {
                let value = format!("{channels} a token beside z_dim = {}", vae.z_dim);
                return Err(Error::Unsupported { field: field.into(), value });
            }
        }
        let (editing, scheduler) = (Editing::of(dir), FlowMatchEulerDiscreteConfig::of(dir)?);
        Ok(Self { editing, scheduler, vae, controls: Conditions::default() })
    }

    /// The same, for jobs that may name these control networks.
    pub fn with_controls(self, facts: &[ControlFacts]) -> Self {
        Self { controls: Conditions::new(facts), ..self }
    }

    /// The schedule of a picture of `tokens`. A job's own `shift` takes the place of the one by the picture's size and of the
    /// stretch to `shift_terminal`: the reference's with `base_shift = max_shift = ln(shift)` and `shift_terminal` null.
    fn scheduler(&self, request: &Request, tokens: usize) -> Result<FlowMatchEulerDiscrete> {
        let mut config = self.scheduler.clone();
        let mu = match request.shift {
            None => config.mu(tokens),
            Some(shift) if shift > 0.0 => {
                config.use_dynamic_shifting = true;
                config.time_shift_type = "exponential".into();
                config.shift_terminal = None;
                libm::log(shift)
            }
            Some(shift) => return Err(Error::Invalid { field: "shift", reason: format!("{shift} is not above 0") }),
        };
        let schedule = Schedule::evenly_spaced(request.num_inference_steps, Some(mu));
        flow::begin(FlowMatchEulerDiscrete::new(&config, &schedule)?, request)
    }

    /// Latents of the pictures that are edited, `[1, C, H, W]` each: the mode of their distribution. They are taken from `inputs`, so that
    /// the job starts from noise.
    fn references(&self, inputs: &mut Inputs) -> Result<Vec<Tensor>> {
        if self.editing.is_none() {
            return Ok(Vec::new());
        }
        let missing = || Error::Invalid { field: "image", reason: "there is none, and this model edits one".into() };
        let pictures = inputs.image_latents.take().ok_or_else(missing)?;
        let means = (0..).map_while(|k| pictures.find(&format!("{}.mean", image_name(k))));
        let references = means.map(|mean| self.vae.scale(mean)).collect::<Result<Vec<_>>>()?;
        if references.is_empty() { Err(missing()) } else { Ok(references) }
    }

    /// Rows and columns of the drawn picture in tokens. A side that the job does not name is the last reference picture's.
    fn grid(&self, request: &Request, reference: Option<&Tensor>) -> Result<[usize; 2]> {
        let token = 2 * self.vae.scale_factor(); // pixels
        let own = reference.map(grid_of).transpose()?.unwrap_or_default();
        let side = |field: &'static str, pixels: usize, own: usize| match if pixels == 0 { own } else { pixels / token } {
            0 => Err(Error::Invalid { field, reason: format!("{pixels} is less than the {token} pixels of a token") }),
            tokens => Ok(tokens),
        };
        let (height, width) = (side("height", request.height, own[0])?, side("width", request.width, own[1])?);
        // Of sizes that a job does not name, the coordinator cannot say this.
        let pixels = [height, token, width, token].into_iter().try_fold(request.num_images_per_prompt, usize::checked_mul);
        if pixels.is_none_or(|pixels| pixels as u64 > flow::MAX_PIXELS) {
            let reason = format!(
                "{} pictures of {} x {}: at most {} pixels in all",
                request.num_images_per_prompt,
                width.saturating_mul(token),
                height.saturating_mul(token),
                flow::MAX_PIXELS
            );
            return Err(Error::Invalid { field: "num_images_per_prompt", reason });
        }
        Ok([height, width])
    }
}

impl Denoiser for QwenImageDenoiser {
    fn start(&self, request: Request, mut inputs: Inputs) -> Result<DenoiseState> {
        let references = self.references(&mut inputs)?;
        let [height, width] = self.grid(&request, references.last())?;
        let scheduler = self.scheduler(&request, height * width)?;
        let mut tensors = std::mem::take(&mut inputs.conditioning);
        let space = Latents {
            shape: [self.vae.z_dim, 2 * height, 2 * width],
            scale_factor: self.vae.scale_factor(),
            scale: &|latents| self.vae.scale(latents),
            pack: &pack_latents,
        };
        let mut generator = flow::generator(&request);
        let controls = conditions::take_encoded(&mut inputs);
        self.controls.start(&request, &mut tensors, |k, _| {
            let latents = conditions::latents(&controls, &inputs, k, request.num_images_per_prompt, &mut generator)?;
            pack_latents(&self.vae.scale(&latents)?)
        })?;
        let latents = space.start_with(&request, &mut inputs, &scheduler, &mut tensors, &mut generator)?;
        let mut shapes = vec![vec![1, height as u32, width as u32]];
        let mut packed = Vec::with_capacity(references.len());
        for reference in &references {
            let [height, width] = grid_of(reference)?;
            shapes.push(vec![1, height as u32, width as u32]);
            packed.push(pack_latents(reference)?);
        }
        if !packed.is_empty() {
            tensors.insert("reference_latents", Tensor::cat(&packed, 1)?); // [1, L_references, 4 C]
        }
        tensors.insert("img_shapes", Tensor::new(shapes, &Device::Cpu)?);
        Ok(DenoiseState { request, latents, step: 0, scheduler: Box::new(scheduler), tensors, last: None })
    }

    fn branches(&self, state: &DenoiseState) -> Result<Vec<Tensors>> {
        let pictures = state.pictures();
        let timestep = state.scheduler.timesteps()[state.step] as f32 / 1000.0;
        let hidden_states = match state.tensors.find("reference_latents") {
            // The target first: [B, L_target + L_references, 4 C]
            Some(reference) => Tensor::cat(&[&state.latents, &flow::per_picture(reference, pictures)?], 1)?,
            None => state.latents.clone(),
        };
        let text = |embeds: &str| flow::per_picture(state.tensors.get(embeds)?, pictures);
        let branch = |embeds: &str| -> Result<Tensors> {
            let mut inputs = Tensors::new()
                .with("hidden_states", hidden_states.clone())
                .with("timestep", flow::each(timestep, pictures)?)
                .with("encoder_hidden_states", text(embeds)?)
                .with("img_shapes", state.tensors.get("img_shapes")?.clone());
            // What a control network says of the conditional pass is added in both, as in the reference.
            if self.controls.add(state, PASS, &mut inputs)? {
                inputs.insert("controls.pass.encoder_hidden_states", text(EMBEDS[0])?);
            }
            Ok(inputs)
        };
        let branches = if state.request.cfg_scale(GUIDANCE).is_some() { &EMBEDS[..] } else { &EMBEDS[..1] };
        branches.iter().map(|embeds| branch(embeds)).collect()
    }

    fn shared_inputs(&self) -> &'static [&'static str] {
        &["controls", "img_shapes"]
    }

    /// Passes over pictures of the same sizes with texts of the same length go together.
    fn batch_key(&self, state: &DenoiseState, branch: usize) -> Vec<usize> {
        let text_tokens = |branch: usize| {
            let embeds = EMBEDS.get(branch).and_then(|name| state.tensors.find(name));
            embeds.and_then(|embeds| embeds.dims().get(1).copied()).unwrap_or(0)
        };
        let of_controls = if self.controls.take_part(state, PASS) { text_tokens(0) } else { 0 };
        let shapes = state.tensors.find("img_shapes").and_then(|shapes| shapes.to_vec2::<u32>().ok()).unwrap_or_default();
        let sides = shapes.into_iter().flatten().map(|side| side as usize);
        let controls = self.controls.key(state, PASS);
        [text_tokens(branch), of_controls].into_iter().chain(controls).chain(sides).collect()
    }

    fn advance(&self, state: &mut DenoiseState, outputs: Vec<Tensor>) -> Result<()> {
        // What the network says of reference tokens is not used.
        let target_tokens = state.latents.dim(1)?;
        let target = outputs.iter().map(|output| Ok(output.narrow(1, 0, target_tokens)?.contiguous()?));
        let model_output = match target.collect::<Result<Vec<_>>>()?.as_slice() {
            [cond, uncond] => guided_at_the_norm_of(cond, uncond, state.request.true_cfg_scale)?,
            [cond] => cond.clone(),
            other => return Err(Error::Rank { reason: format!("{} branches, expected 1 or 2", other.len()) }),
        };
        flow::step(state, model_output)
    }

    fn finish(&self, state: DenoiseState) -> Result<Payload> {
        let shapes = state.tensors.get("img_shapes")?.to_vec2::<u32>()?;
        let [_, height, width] = shapes.first().and_then(|shape| shape.first_chunk().copied()).unwrap_or_default();
        let latents = unpack_latents(&state.latents, height as usize, width as usize)?;
        Ok(Payload::Latents(Tensors::new().with("latents", latents)))
    }
}

/// Rows and columns of `latents: [1, C, H, W]` in tokens.
fn grid_of(latents: &Tensor) -> Result<[usize; 2]> {
    let (_, _, height, width) = latents.dims4()?;
    Ok([height / 2, width / 2])
}

/// Classifier-free guidance after which every token is as long as in `cond`. `[B, L, 4 C]` each.
fn guided_at_the_norm_of(cond: &Tensor, uncond: &Tensor, scale: f64) -> Result<Tensor> {
    let combined = flow::guided(uncond, cond, scale)?;
    let norm = |x: &Tensor| x.sqr()?.sum_keepdim(2)?.sqrt();
    Ok(combined.broadcast_mul(&(norm(cond)? / norm(&combined)?)?)?)
}

#[cfg(test)]
mod tests;
