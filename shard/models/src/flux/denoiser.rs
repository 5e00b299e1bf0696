//! What FLUX does around its network, for all of its pipelines.
//!
//! The order of random draws is the reference's: latents of the picture that the steps begin at or (Depth, Canny) that is drawn by, then the noise, then
//! (Fill) latents of the masked picture.

use parallel::rng::Generator;
use parallel::{DType, Device, Tensor, Tensors};

use super::{GUIDANCE, Kind, fill, kontext};
use crate::autoencoder_kl::{AutoencoderKlConfig, Moments};
use crate::control::ControlFacts;
use crate::control::conditions::{self, Conditions, Pass};
use crate::denoise::{DenoiseState, Denoiser};
use crate::flow::{self, Latents};
use crate::flux_transformer::FluxTransformerConfig;
use crate::model_dir::ModelDir;
use crate::packing::{pack_latents, unpack_latents};
use crate::scheduler::{FlowMatchEulerDiscrete, FlowMatchEulerDiscreteConfig, Schedule};
use crate::stage::Inputs;
use crate::{Error, Payload, Request, Result};

/// What each token has beside its own channels.
const BESIDE: &str = "beside";
/// Controls act on both passes alike.
const PASS: Pass = Pass { index: 0, unconditional: false };

/// What FLUX does around its network.
#[derive(Debug)]
pub struct FluxDenoiser {
    kind: Kind,
    guidance_embeds: bool,
    scheduler: FlowMatchEulerDiscreteConfig,
    /// Latent channels of the autoencoder; a token packs 2 x 2 of them.
    channels: usize,
    vae: AutoencoderKlConfig,
    controls: Conditions,
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
        let beside = match kind {
            Kind::Base | Kind::Kontext => 0,
            Kind::Fill => fill::channels(&vae),
            Kind::Control => latents,
        };
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
        let scheduler = FlowMatchEulerDiscreteConfig::of(dir)?;
        Ok(Self { kind, guidance_embeds, scheduler, channels: vae.latent_channels, vae, controls: Conditions::default() })
    }

    /// The same, for jobs that may name these control networks.
    pub fn with_controls(self, facts: &[ControlFacts]) -> Self {
        Self { controls: Conditions::new(facts), ..self }
    }

    /// Height and width in tokens.
    fn grid(&self, request: &Request) -> (usize, usize) {
        let side = |pixels: usize| pixels / (self.vae.scale_factor() * 2);
        (side(request.height), side(request.width))
    }

    fn scheduler(&self, request: &Request) -> Result<FlowMatchEulerDiscrete> {
        let (h, w) = self.grid(request);
        let schedule = Schedule::evenly_spaced(request.num_inference_steps, Some(self.scheduler.mu(h * w)));
        flow::begin(FlowMatchEulerDiscrete::new(&self.scheduler, &schedule)?, request)
    }

    /// What the network is given of the pictures: `[B, L, 4 C]`; with a reference picture its tokens follow, with a picture to
    /// fill in or to draw by each token has its channels beside it.
    fn hidden_states(&self, state: &DenoiseState) -> Result<Tensor> {
        let latents = &state.latents;
        if let Some(reference) = state.tensors.find("reference") {
            let reference = flow::per_picture(&pack_latents(reference)?, state.pictures())?;
            return Ok(Tensor::cat(&[latents, &reference], 1)?);
        }
        Ok(match state.tensors.find(BESIDE) {
            Some(beside) => Tensor::cat(&[latents, beside], 2)?,
            None => latents.clone(),
        })
    }

    /// The picture that is drawn by, `[B, L, 4 C]`: of its distribution each drawn picture has latents of its own. It is taken from `inputs`, so that the
    /// job starts from noise.
    fn drawn_by(&self, inputs: &mut Inputs, pictures: usize, generator: &mut Generator) -> Result<Tensor> {
        let missing = || Error::Invalid { field: "image", reason: "there is none, and this model draws by one".into() };
        let picture = inputs.image_latents.take().ok_or_else(missing)?;
        let moment = |part: &str| flow::per_picture(picture.get(&format!("image.{part}"))?, pictures);
        let moments = Moments { mean: moment("mean")?, logvar: moment("logvar")? };
        let noise = generator.randn(moments.mean.dims())?;
        pack_latents(&self.vae.scale(&moments.sample(&noise)?)?)
    }
}

impl Denoiser for FluxDenoiser {
    fn start(&self, request: Request, mut inputs: Inputs) -> Result<DenoiseState> {
        let scheduler = self.scheduler(&request)?;
        let (h, w) = self.grid(&request);
        let mut tensors = std::mem::take(&mut inputs.conditioning);
        let mut generator = flow::generator(&request);
        let space = Latents {
            shape: [self.channels, 2 * h, 2 * w],
            scale_factor: self.vae.scale_factor(),
            scale: &|latents| self.vae.scale(latents),
            pack: &pack_latents,
        };
        let controls = conditions::take_encoded(&mut inputs);
        self.controls.start(&request, &mut tensors, |k, _| {
            let latents = conditions::latents(&controls, &inputs, k, request.num_images_per_prompt, &mut generator)?;
            pack_latents(&self.vae.scale(&latents)?)
        })?;
        // Kontext's picture is looked at, and Fill's mask too: neither is blended in.
        let reference = if self.kind == Kind::Kontext { inputs.image_latents.take() } else { None };
        let filled = if self.kind == Kind::Fill { Some(take_mask(&mut inputs)?) } else { None };
        if self.kind == Kind::Control {
            tensors.insert(BESIDE, self.drawn_by(&mut inputs, request.num_images_per_prompt, &mut generator)?);
        }
        let latents = space.start_with(&request, &mut inputs, &scheduler, &mut tensors, &mut generator)?;
        let mut img_ids = image_ids(0, h, w)?;
        if let Some(picture) = reference {
            let reference = self.vae.scale(picture.get("image.mean")?)?;
            img_ids = Tensor::cat(&[img_ids, kontext::reference_ids(&reference)?], 0)?;
            tensors.insert("reference", reference);
        }
        if let Some((picture, mask)) = filled {
            let masked = space.image_latents(&picture, "masked_image", &mut generator)?;
            let mask = fill::pack_mask(&mask, self.vae.scale_factor())?;
            let beside = Tensor::cat(&[masked, mask], 2)?;
            tensors.insert(BESIDE, flow::per_picture(&beside, request.num_images_per_prompt)?);
        }
        tensors.insert("img_ids", img_ids);
        let text_tokens = tensors.get("prompt_embeds")?.dim(1)?;
        tensors.insert("txt_ids", Tensor::zeros((text_tokens, 3), DType::F32, &Device::Cpu)?);
        Ok(DenoiseState { request, latents, step: 0, scheduler: Box::new(scheduler), tensors, last: None })
    }

    fn branches(&self, state: &DenoiseState) -> Result<Vec<Tensors>> {
        let pictures = state.pictures();
        let timestep = state.scheduler.timesteps()[state.step] as f32 / 1000.0;
        let hidden_states = self.hidden_states(state)?;
        let guidance = || flow::each(state.request.guidance_scale.unwrap_or(3.5) as f32, pictures);
        let branch = |prefix: &str| -> Result<Tensors> {
            let embeds_of = |prefix: &str, name: &str| -> Result<Tensor> {
                flow::per_picture(state.tensors.get(&format!("{prefix}{name}"))?, pictures)
            };
            let embeds = |name: &str| embeds_of(prefix, name);
            let mut inputs = Tensors::new()
                .with("hidden_states", hidden_states.clone())
                .with("timestep", flow::each(timestep, pictures)?)
                .with("pooled_projections", embeds("pooled_prompt_embeds")?)
                .with("encoder_hidden_states", embeds("prompt_embeds")?)
                .with("img_ids", state.tensors.get("img_ids")?.clone())
                .with("txt_ids", state.tensors.get("txt_ids")?.clone());
            if self.guidance_embeds {
                inputs.insert("guidance", guidance()?);
            }
            // What a control network says of the conditional pass is added in both, as in the reference.
            if self.controls.add(state, PASS, &mut inputs)? {
                inputs.insert("controls.pass.guidance", guidance()?);
                inputs.insert("controls.pass.pooled_projections", embeds_of("", "pooled_prompt_embeds")?);
                inputs.insert("controls.pass.encoder_hidden_states", embeds_of("", "prompt_embeds")?);
            }
            Ok(inputs)
        };
        match state.request.cfg_scale(GUIDANCE) {
            Some(_) => Ok(vec![branch("")?, branch("negative_")?]),
            None => Ok(vec![branch("")?]),
        }
    }

    fn shared_inputs(&self) -> &'static [&'static str] {
        &["controls", "img_ids", "txt_ids"]
    }

    /// Jobs of one picture size, one text length and, if they have one, one size of reference picture go together.
    fn batch_key(&self, state: &DenoiseState, _branch: usize) -> Vec<usize> {
        let (h, w) = self.grid(&state.request);
        let reference = state.tensors.find("reference").map(|reference| &reference.dims()[2..]);
        let controls = self.controls.key(state, PASS);
        [&[h, w, state.request.max_sequence_length], reference.unwrap_or_default(), &controls].concat()
    }

    fn advance(&self, state: &mut DenoiseState, outputs: Vec<Tensor>) -> Result<()> {
        // A reference picture's tokens are looked at, not stepped.
        let tokens = state.latents.dim(1)?;
        let outputs = outputs.iter().map(|output| Ok(output.narrow(1, 0, tokens)?.contiguous()?)).collect::<Result<Vec<_>>>()?;
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

/// The picture to fill in and, taken out of it, the mask.
fn take_mask(inputs: &mut Inputs) -> Result<(Tensors, Tensor)> {
    let missing = || Error::Invalid { field: "image", reason: "there is none".into() };
    let picture = inputs.image_latents.as_mut().ok_or_else(missing)?;
    let mask = picture.take("mask")?;
    Ok((picture.clone(), mask))
}

/// Position of every token: (picture, y, x), where the target is picture 0. `[h w, 3]`
pub(super) fn image_ids(picture: usize, h: usize, w: usize) -> Result<Tensor> {
    let ids: Vec<f32> = (0..h).flat_map(|y| (0..w).flat_map(move |x| [picture as f32, y as f32, x as f32])).collect();
    Ok(Tensor::from_vec(ids, (h * w, 3), &Device::Cpu)?)
}
