//! Stable Diffusion 3 and 3.5: how the family's components become stages.
//!
//! Follows diffusers' `pipeline_stable_diffusion_3.py`, `pipeline_stable_diffusion_3_img2img.py` and
//! `pipeline_stable_diffusion_3_inpaint.py` (0.42): text to image, image to image and inpainting by one denoiser, classifier-free
//! guidance, skip-layer guidance. The large text encoder (T5) may be missing: zeros take its place, and there is no stage for it.

use parallel::{DType, Device, Tensor, Tensors, Weights};

use crate::autoencoder_kl::{AutoencoderKl, AutoencoderKlConfig};
use crate::autoencoder_stage::AutoencoderStage;
use crate::blocks::BlockModel;
use crate::card::{Card, ComponentCard, ParameterCard, StageCard, StageKind};
use crate::clip::{ClipTextConfig, ClipTextEncoder};
use crate::control::conditions::{self, Conditions, Pass};
use crate::control::kind::{ControlFacts, ControlKind};
use crate::denoise::{DenoiseState, Denoiser};
use crate::engine::Engine;
use crate::error::check_fits;
use crate::flow::{self, Defaults, Latents};
use crate::image_io::PictureLimits;
use crate::model_dir::ModelDir;
use crate::registry::{LoadSpec, Rank};
use crate::request::{Encoder, Guidance, SkipLayerGuidance};
use crate::scheduler::{FlowMatchEulerDiscrete, FlowMatchEulerDiscreteConfig, Schedule};
use crate::sd3_transformer::{Sd3Transformer, Sd3TransformerConfig};
use crate::stage::Inputs;
use crate::t5::{T5Config, T5Encoder};
use crate::text_stage::{Kept, TextEncoding, TextStage};
use crate::tokenizer::Tokenizer;
use crate::{Error, Payload, Request, Result};

/// The reference's classes that this file serves.
pub const CLASSES: &[&str] = &["StableDiffusion3Pipeline", "StableDiffusion3Img2ImgPipeline", "StableDiffusion3InpaintPipeline"];

const GUIDANCE: Guidance = Guidance::Cfg;
/// Tokens each CLIP reads, always.
const CLIP_TOKENS: usize = 77;
const COMPONENTS: [&str; 5] = ["text_encoder", "text_encoder_2", T5, "transformer", "vae"];
/// Makes a seed for the draws of control pictures' latents that no other draws have.
const CONTROL_SEED: u64 = 0x9e37_79b9_7f4a_7c15;
/// The index of skip-layer guidance's branch.
const SKIP_LAYERS_BRANCH: usize = 2;
/// The component that a directory may do without.
const T5: &str = "text_encoder_3";

/// The card of a Stable Diffusion 3 directory.
pub fn describe(dir: &ModelDir) -> Result<Card> {
    let parts = Parts::read(dir)?;
    let [clip, clip_2] = &parts.clips;
    let mut components = vec![
        ComponentCard::of(dir, "text_encoder", clip.num_attention_heads, 1)?,
        ComponentCard::of(dir, "text_encoder_2", clip_2.num_attention_heads, 1)?,
    ];
    if let Some(t5) = &parts.t5 {
        components.push(ComponentCard::of(dir, T5, t5.num_heads, t5.num_layers)?);
    }
    let encoders: Vec<&str> = COMPONENTS.into_iter().take(components.len()).collect();
    let transformer = &parts.transformer;
    components.push(ComponentCard::of(dir, "transformer", transformer.num_attention_heads, transformer.num_layers)?);
    // One head, and small beside the rest: held whole.
    components.push(ComponentCard::of(dir, "vae", 1, 1)?);
    let card = Card {
        family: "sd3".into(),
        pipeline_class: dir.pipeline_class().into(),
        scheduler: FlowMatchEulerDiscreteConfig::CLASS.into(),
        digest: String::new(),
        components,
        stages: StageCard::with_controls(StageCard::of_text_encoders(&encoders, "transformer"), StageKind::EncodeImage),
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
    clips: [ClipTextConfig; 2],
    t5: Option<T5Config>,
    transformer: Sd3TransformerConfig,
    vae: AutoencoderKlConfig,
    scheduler: FlowMatchEulerDiscreteConfig,
}

impl Parts {
    fn read(dir: &ModelDir) -> Result<Self> {
        let parts = Self {
            clips: [dir.config("text_encoder")?, dir.config("text_encoder_2")?],
            t5: dir.component(T5).map(|_| dir.config(T5)).transpose()?,
            transformer: dir.config("transformer")?,
            vae: dir.config("vae")?,
            scheduler: FlowMatchEulerDiscreteConfig::of(dir)?,
        };
        parts.check()?;
        Ok(parts)
    }

    fn check(&self) -> Result<()> {
        let Self { clips, t5, transformer, vae, .. } = self;
        transformer.validate()?;
        let joint = transformer.joint_attention_dim;
        // CLIP's embeddings are padded to T5's width.
        let clip_width = clips.iter().fold(0usize, |sum, clip| sum.saturating_add(clip.hidden_size));
        check_fits("text_encoder: hidden_size", clip_width, clip_width <= joint)?;
        if let Some(t5) = t5 {
            check_fits("text_encoder_3: d_model", t5.d_model, t5.d_model == joint)?;
        }
        // The wider inputs of inpainting checkpoints are not here, nor are they published.
        check_fits("transformer: in_channels", transformer.in_channels, transformer.in_channels == vae.latent_channels)?;
        let out_channels = transformer.out_channels.unwrap_or(transformer.in_channels);
        check_fits("transformer: out_channels", out_channels, out_channels == transformer.in_channels)
    }

    /// Pixels of a picture to one token, along a side.
    fn pixels_per_token(&self) -> usize {
        self.vae.scale_factor() * self.transformer.patch_size
    }

    /// What a job may set. Defaults are the pipelines'.
    fn parameters(&self) -> Vec<ParameterCard> {
        let multiple = self.pixels_per_token();
        let max_side = flow::MAX_SIDE.min(multiple.saturating_mul(self.transformer.pos_embed_max_size));
        let side = self.transformer.sample_size.saturating_mul(self.vae.scale_factor());
        let mut parameters = flow::parameters(&Defaults {
            multiple,
            max_side,
            side: (side / multiple).max(1).saturating_mul(multiple).min(max_side),
            num_inference_steps: 28,
            least_steps: self.scheduler.least_steps(),
            max_sequence_length: 256,
        });
        let fields = ["prompt_2", "prompt_3", "negative_prompt", "negative_prompt_2", "negative_prompt_3"];
        parameters.extend(fields.map(ParameterCard::field));
        parameters.push(ParameterCard::number("guidance_scale", 0.0, 100.0, 7.0));
        // The embeddings are the first hidden state, the last one is never taken.
        let most = self.clips.iter().map(|clip| clip.num_hidden_layers).min().unwrap_or(0).saturating_sub(1);
        if most > 0 {
            parameters.push(ParameterCard::number("clip_skip", 0.0, most as f64, 0.0).multiple(1.0).optional());
        }
        if !self.scheduler.use_dynamic_shifting {
            parameters.push(ParameterCard::number("shift", 0.01, 100.0, self.scheduler.shift).optional());
        }
        let last = self.transformer.num_layers - 1;
        if last > 0 {
            parameters.push(ParameterCard::number("skip_guidance_layers", 0.0, last as f64, 0.0).multiple(1.0).optional());
            parameters.push(ParameterCard::number("skip_layer_guidance_scale", 0.0, 100.0, 2.8));
            parameters.push(ParameterCard::number("skip_layer_guidance_start", 0.0, 1.0, 0.01));
            parameters.push(ParameterCard::number("skip_layer_guidance_stop", 0.0, 1.0, 0.2));
        }
        parameters
    }
}

/// Loads one rank of one component.
pub fn load(spec: LoadSpec<'_>, weights: &Weights) -> Result<Rank> {
    let LoadSpec { dir, component, group, limits, .. } = spec;
    let range = group.range;
    let model: Box<dyn BlockModel> = match component {
        "text_encoder" | "text_encoder_2" => Box::new(ClipTextEncoder::load(weights, &ClipTextConfig::of(dir, component)?)?),
        T5 => Box::new(T5Encoder::load(weights, &dir.config::<T5Config>(component)?, range)?),
        "transformer" => Box::new(Sd3Transformer::load(weights, &dir.config::<Sd3TransformerConfig>(component)?, range)?),
        "vae" => {
            let vae = AutoencoderKl::load(weights, &dir.config::<AutoencoderKlConfig>(component)?)?;
            return Ok(Rank::Leader(Box::new(AutoencoderStage::new(vae, PictureLimits::default()))));
        }
        other => return Err(Error::ModelDir { path: dir.root().into(), reason: format!("`{other}` is none of {COMPONENTS:?}") }),
    };
    Rank::of(model, group, |runner| {
        Ok(match component {
            "transformer" => {
                let denoiser = Sd3Denoiser::load(dir)?.with_controls(runner.controls());
                Box::new(Engine::new(Box::new(denoiser), runner, limits))
            }
            _ => Box::new(TextStage::new(text_encoding(dir, component)?, runner, limits.prompt_cache_bytes)),
        })
    })
}

/// What is made of a text encoder; T5 gets no attention mask, so padding takes part.
fn text_encoding(dir: &ModelDir, component: &str) -> Result<TextEncoding> {
    // Of the layers of a CLIP the last but one is taken.
    let clip = |embed, pooled| vec![(Kept::HiddenState(2), embed), (Kept::Output("pooler_output"), pooled)];
    let (encoder, tokens, outputs) = match component {
        "text_encoder" => (Encoder::First, Some(CLIP_TOKENS), clip("prompt_embed", "pooled_prompt_embed")),
        "text_encoder_2" => (Encoder::Second, Some(CLIP_TOKENS), clip("prompt_2_embed", "pooled_prompt_2_embed")),
        _ => (Encoder::Third, None, vec![(Kept::Output("last_hidden_state"), "t5_prompt_embed")]),
    };
    let tokenizer = Tokenizer::load(&dir.root().join(component.replace("text_encoder", "tokenizer")))?;
    Ok(TextEncoding { tokenizer, tokens, outputs, with_mask: false, encoder, besides: None, guidance: GUIDANCE })
}

/// What Stable Diffusion 3 does around its network.
#[derive(Debug)]
pub struct Sd3Denoiser {
    parts: Parts,
    controls: Conditions,
}

impl Sd3Denoiser {
    /// From a model's configurations.
    pub fn load(dir: &ModelDir) -> Result<Self> {
        Ok(Self { parts: Parts::read(dir)?, controls: Conditions::default() })
    }

    /// The same, for jobs that may name these control networks.
    pub fn with_controls(self, facts: &[ControlFacts]) -> Self {
        Self { controls: Conditions::new(facts), ..self }
    }

    /// The latents of control pictures, one for each picture of each of the two passes, as the reference draws them; it draws from torch's global
    /// generator, here they are drawn from one that the job's seed alone begins.
    fn start_controls(&self, request: &Request, inputs: &mut Inputs, kept: &mut Tensors) -> Result<()> {
        let encoded = conditions::take_encoded(inputs);
        let passes = if request.cfg_scale(GUIDANCE).is_some() { 2 } else { 1 };
        let rows = passes * request.num_images_per_prompt;
        let own_seed = Request { seed: request.seed ^ CONTROL_SEED, ..request.clone() };
        let mut generator = flow::generator(&own_seed);
        let (scale, shift) = (self.parts.vae.scaling_factor, self.parts.vae.shift_factor.unwrap_or_default());
        self.controls.start(request, kept, |k, facts| {
            let latents = conditions::latents(&encoded, inputs, k, rows, &mut generator)?;
            let unshifted = matches!(&facts.kind, ControlKind::Sd3(config) if config.force_zeros_for_pooled_projection);
            Ok(((latents - if unshifted { 0.0 } else { shift })? * scale)?)
        })
    }

    /// Height and width of the latents.
    fn grid(&self, request: &Request) -> (usize, usize) {
        let f = self.parts.vae.scale_factor();
        (request.height / f, request.width / f)
    }

    fn scheduler(&self, request: &Request) -> Result<FlowMatchEulerDiscrete> {
        let config = &self.parts.scheduler;
        let config = FlowMatchEulerDiscreteConfig { shift: request.shift.unwrap_or(config.shift), ..config.clone() };
        let (h, w) = self.grid(request);
        let patch = self.parts.transformer.patch_size;
        let mu = config.use_dynamic_shifting.then(|| config.mu((h / patch) * (w / patch)));
        let schedule = Schedule { num_inference_steps: request.num_inference_steps, sigmas: None, mu };
        flow::begin(FlowMatchEulerDiscrete::new(&config, &schedule)?, request)
    }

    /// The text encoders' outputs of one branch, together: `prompt_embeds: [1, 77 + L, D_txt]`, first both CLIPs side by side and
    /// zeros up to the width, then T5; `pooled_prompt_embeds: [1, P]`, both CLIPs side by side.
    fn join(&self, conditioning: &Tensors, prefix: &str, request: &Request) -> Result<[(String, Tensor); 2]> {
        let get = |name: &str| conditioning.get(&format!("{prefix}{name}"));
        let clip = Tensor::cat(&[get("prompt_embed")?, get("prompt_2_embed")?], 2)?; // [1, 77, D_clip + D_clip_2]
        let joint = self.parts.transformer.joint_attention_dim;
        let padding = joint.checked_sub(clip.dim(2)?).ok_or_else(|| Error::Invalid {
            field: "prompt_embeds",
            reason: format!("{} channels are more than {joint}", clip.dims()[2]),
        })?;
        let clip = clip.pad_with_zeros(2, 0, padding)?;
        let t5 = match &self.parts.t5 {
            Some(_) => get("t5_prompt_embed")?.clone(),
            None => Tensor::zeros((1, request.max_sequence_length, joint), DType::F32, &Device::Cpu)?,
        };
        let prompt_embeds = Tensor::cat(&[clip, t5], 1)?;
        let pooled = Tensor::cat(&[get("pooled_prompt_embed")?, get("pooled_prompt_2_embed")?], 1)?;
        Ok([(format!("{prefix}prompt_embeds"), prompt_embeds), (format!("{prefix}pooled_prompt_embeds"), pooled)])
    }

    /// Refuses skip-layer guidance that would have no effect, or of blocks that are not there.
    fn check_skip_layer_guidance(&self, request: &Request) -> Result<()> {
        let Some(guidance) = &request.skip_layer_guidance else { return Ok(()) };
        if request.cfg_scale(GUIDANCE).is_none() {
            return Err(Error::Invalid {
                field: "skip_guidance_layers",
                reason: "without classifier-free guidance (guidance_scale above 1) they have no effect".into(),
            });
        }
        self.parts.transformer.check_skip_layers(guidance.layers.iter().copied())
    }
}

fn pass(index: usize) -> Pass {
    Pass { index, unconditional: false }
}

/// The job's skip-layer guidance, if it is on at this step.
fn skip_layer_guidance(state: &DenoiseState) -> Option<&SkipLayerGuidance> {
    let (step, steps) = (state.step as f64, state.steps() as f64);
    let on = |guidance: &&SkipLayerGuidance| step > steps * guidance.start && step < steps * guidance.stop;
    state.request.skip_layer_guidance.as_ref().filter(on)
}

impl Denoiser for Sd3Denoiser {
    fn start(&self, request: Request, mut inputs: Inputs) -> Result<DenoiseState> {
        self.check_skip_layer_guidance(&request)?;
        let scheduler = self.scheduler(&request)?;
        let mut tensors: Tensors = self.join(&inputs.conditioning, "", &request)?.into_iter().collect();
        if request.cfg_scale(GUIDANCE).is_some() {
            tensors.extend(self.join(&inputs.conditioning, "negative_", &request)?.into_iter().collect());
        }
        self.start_controls(&request, &mut inputs, &mut tensors)?;
        let (h, w) = self.grid(&request);
        let space = Latents {
            shape: [self.parts.transformer.in_channels, h, w],
            scale_factor: self.parts.vae.scale_factor(),
            scale: &|latents| self.parts.vae.scale(latents),
            pack: &|latents| Ok(latents.clone()),
        };
        let latents = space.start(&request, &mut inputs, &scheduler, &mut tensors)?;
        Ok(DenoiseState { request, latents, step: 0, scheduler: Box::new(scheduler), tensors, last: None })
    }

    /// Unconditional first; then, in its steps, skip-layer guidance's.
    fn branches(&self, state: &DenoiseState) -> Result<Vec<Tensors>> {
        let pictures = state.pictures();
        let timestep = state.scheduler.timesteps()[state.step] as f32;
        let branch = |index: usize, prefix: &str| -> Result<Tensors> {
            let embeds = |name: &str| flow::per_picture(state.tensors.get(&format!("{prefix}{name}"))?, pictures);
            let mut inputs = Tensors::new()
                .with("hidden_states", state.latents.clone())
                .with("timestep", flow::each(timestep, pictures)?)
                .with("pooled_projections", embeds("pooled_prompt_embeds")?)
                .with("encoder_hidden_states", embeds("prompt_embeds")?);
            self.controls.add(state, pass(index), &mut inputs)?;
            Ok(inputs)
        };
        if state.request.cfg_scale(GUIDANCE).is_none() {
            return Ok(vec![branch(0, "")?]);
        }
        let mut branches = vec![branch(0, "negative_")?, branch(1, "")?];
        if let Some(guidance) = skip_layer_guidance(state) {
            let layers: Vec<u32> = guidance.layers.iter().map(|layer| *layer as u32).collect();
            branches.push(branch(SKIP_LAYERS_BRANCH, "")?.with("skip_layers", Tensor::new(layers, &Device::Cpu)?));
        }
        Ok(branches)
    }

    fn shared_inputs(&self) -> &'static [&'static str] {
        &["controls", "skip_layers"]
    }

    /// Branches of one picture size and one text length go together, if they leave out the same blocks.
    fn batch_key(&self, state: &DenoiseState, branch: usize) -> Vec<usize> {
        let (h, w) = self.grid(&state.request);
        let mut key = vec![h, w, state.request.max_sequence_length];
        key.extend(self.controls.key(state, pass(branch)));
        if branch == SKIP_LAYERS_BRANCH {
            key.extend(state.request.skip_layer_guidance.iter().flat_map(|guidance| &guidance.layers));
        }
        key
    }

    fn advance(&self, state: &mut DenoiseState, outputs: Vec<Tensor>) -> Result<()> {
        let scale = state.request.cfg_scale(GUIDANCE).unwrap_or(1.0);
        let model_output = match (outputs.as_slice(), skip_layer_guidance(state)) {
            ([cond], None) => cond.clone(),
            ([uncond, cond], None) => flow::guided(uncond, cond, scale)?,
            ([uncond, cond, skipped], Some(guidance)) => {
                (flow::guided(uncond, cond, scale)? + ((cond - skipped)? * guidance.scale)?)?
            }
            (other, _) => return Err(Error::Rank { reason: format!("{} branches, expected 1 to 3", other.len()) }),
        };
        flow::step(state, model_output)
    }

    fn finish(&self, state: DenoiseState) -> Result<Payload> {
        let mut latents = state.latents;
        if let (Some(_), Some(shift)) = (state.tensors.find("mask"), self.parts.vae.shift_factor) {
            // The reference's inpainting, unlike its other pipelines, decodes without the shift that the decoder adds.
            latents = (latents - shift * self.parts.vae.scaling_factor)?;
        }
        Ok(Payload::Latents(Tensors::new().with("latents", latents)))
    }
}
