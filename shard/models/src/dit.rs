//! DiT: how the family's components become stages.
//!
//! Follows diffusers 0.42.1, `pipeline_dit.py`: a picture of a class. The job's prompt is one of the model's labels (`id2label` in its index), or the number
//! of a class; there is no text encoder, and the size is the model's. The learned half of the output, the variance, is dropped. The reference steps the
//! conditional and the unconditional half of its batch alike; here there is one. It does not scale the first noise, and steps what the network was
//! given: schedulers for which that would make a difference are refused.

use std::collections::BTreeMap;

use parallel::{Device, Tensor, Tensors, Weights};

use crate::autoencoder_kl::{AutoencoderKl, AutoencoderKlConfig};
use crate::autoencoder_stage::AutoencoderStage;
use crate::card::{Card, ComponentCard, ParameterCard, StageCard, StageKind};
use crate::denoise::{DenoiseState, Denoiser};
use crate::diffusion::{self, GUIDANCE, MAX_STEPS};
use crate::dit_transformer::{DiTTransformer, DiTTransformerConfig};
use crate::engine::Engine;
use crate::error::check_fits;
use crate::flow;
use crate::image_io::PictureLimits;
use crate::model_dir::ModelDir;
use crate::registry::{LoadSpec, Rank};
use crate::scheduler::{DiffusionConfig, Run};
use crate::stage::Inputs;
use crate::{Error, Payload, Request, Result};

/// The reference's classes that this file serves.
pub const CLASSES: &[&str] = &["DiTPipeline"];

const COMPONENTS: [&str; 2] = ["transformer", "vae"];
/// The class of no class, which the reference has written in.
const NO_CLASS: usize = 1000;
/// Schedulers that take the sample as it is, and draw nothing.
const SCHEDULERS: [&str; 2] = ["DDIMScheduler", "DPMSolverMultistepScheduler"];

/// The card of a DiT directory.
pub fn describe(dir: &ModelDir) -> Result<Card> {
    let parts = Parts::read(dir)?;
    let transformer = &parts.transformer;
    let side = parts.side();
    // No other is a multiple of it.
    let size = |name| ParameterCard::number(name, 1.0, side as f64, side as f64).multiple(side as f64);
    let card = Card {
        family: "dit".into(),
        pipeline_class: dir.pipeline_class().into(),
        scheduler: parts.scheduler.class().into(),
        digest: String::new(),
        components: vec![
            ComponentCard::of(dir, "transformer", transformer.num_attention_heads, transformer.num_layers)?,
            // One head, and small beside the rest: held whole.
            ComponentCard::of(dir, "vae", 1, 1)?,
        ],
        stages: vec![
            StageCard::new("denoise", StageKind::Denoise, "transformer", &[]),
            StageCard::new("decode", StageKind::Decode, "vae", &["denoise"]),
        ],
        parameters: vec![
            size("width"),
            size("height"),
            ParameterCard::number("num_inference_steps", parts.scheduler.least_steps() as f64, MAX_STEPS as f64, 50.0)
                .multiple(1.0),
            ParameterCard::number("num_images_per_prompt", 1.0, 10.0, 1.0).multiple(1.0),
            ParameterCard::field("noise_generator"),
            ParameterCard::number("guidance_scale", 0.0, 100.0, 4.0),
        ],
        max_pixels: flow::MAX_PIXELS,
        pixels_per_image: 0,
        without_prompt: false,
    };
    card.with_defaults_of(dir)
}

/// The configurations of a directory, which fit together.
#[derive(Debug)]
struct Parts {
    transformer: DiTTransformerConfig,
    vae: AutoencoderKlConfig,
    scheduler: DiffusionConfig,
    /// The class of each label.
    labels: BTreeMap<String, usize>,
}

impl Parts {
    fn read(dir: &ModelDir) -> Result<Self> {
        let parts = Self {
            transformer: dir.config("transformer")?,
            vae: dir.config("vae")?,
            scheduler: DiffusionConfig::of(dir)?,
            labels: labels(dir)?,
        };
        parts.check()?;
        Ok(parts)
    }

    fn check(&self) -> Result<()> {
        let Self { transformer, vae, scheduler, labels } = self;
        transformer.validate()?;
        let classes = transformer.num_embeds_ada_norm;
        check_fits("transformer: num_embeds_ada_norm", classes, classes == NO_CLASS)?;
        let last = labels.values().max().copied().unwrap_or_default();
        check_fits("model_index.json: id2label", last, last < classes)?;
        let (channels, out_channels) = (transformer.in_channels, transformer.channels_out());
        check_fits("transformer: in_channels", channels, channels == vae.latent_channels)?;
        check_fits("transformer: out_channels", out_channels, out_channels == channels || out_channels == 2 * channels)?;
        let (size, patch) = (transformer.sample_size, transformer.patch_size);
        check_fits("transformer: sample_size", size, size.is_multiple_of(patch) && self.side() <= flow::MAX_SIDE)?;
        if !SCHEDULERS.contains(&scheduler.class()) {
            return Err(Error::Unsupported { field: "scheduler (model_index.json)".into(), value: scheduler.class().into() });
        }
        diffusion::check_scaling(vae)
    }

    /// Of every picture, in pixels.
    fn side(&self) -> usize {
        self.transformer.sample_size.saturating_mul(self.vae.scale_factor())
    }

    /// What a job's prompt names.
    fn class(&self, prompt: &str) -> Result<usize> {
        let prompt = prompt.trim();
        let number = || prompt.parse().ok().filter(|class| *class < NO_CLASS);
        self.labels.get(prompt).copied().or_else(number).ok_or_else(|| Error::Invalid {
            field: "prompt",
            reason: format!("it is none of the model's {} labels, nor the number of a class below {NO_CLASS}", self.labels.len()),
        })
    }
}

/// What `id2label` says: a class has several labels with commas between.
fn labels(dir: &ModelDir) -> Result<BTreeMap<String, usize>> {
    let mut labels = BTreeMap::new();
    let Some(id2label) = dir.setting("id2label").filter(|setting| !setting.is_null()) else { return Ok(labels) };
    let bad = || Error::Unsupported { field: "model_index.json: id2label".into(), value: "no map of numbers to labels".into() };
    for (class, of_class) in id2label.as_object().ok_or_else(bad)? {
        let (class, of_class) = (class.parse().map_err(|_| bad())?, of_class.as_str().ok_or_else(bad)?);
        labels.extend(of_class.split(',').map(|label| (label.trim().to_owned(), class)));
    }
    Ok(labels)
}

/// Loads one rank of one component.
pub fn load(spec: LoadSpec<'_>, weights: &Weights) -> Result<Rank> {
    let LoadSpec { dir, component, group, limits, .. } = spec;
    match component {
        "transformer" => {
            let config: DiTTransformerConfig = dir.config(component)?;
            let model = Box::new(DiTTransformer::load(weights, &config, group.range)?);
            Rank::of(model, group, |runner| Ok(Box::new(Engine::new(Box::new(DiTDenoiser::load(dir)?), runner, limits))))
        }
        "vae" => {
            let vae = AutoencoderKl::load(weights, &dir.config::<AutoencoderKlConfig>(component)?)?;
            Ok(Rank::Leader(Box::new(AutoencoderStage::new(vae, PictureLimits::default()))))
        }
        other => Err(Error::ModelDir { path: dir.root().into(), reason: format!("`{other}` is none of {COMPONENTS:?}") }),
    }
}

/// What DiT does around its network.
#[derive(Debug)]
pub struct DiTDenoiser {
    parts: Parts,
}

impl DiTDenoiser {
    /// From a model's configurations.
    pub fn load(dir: &ModelDir) -> Result<Self> {
        Ok(Self { parts: Parts::read(dir)? })
    }
}

impl Denoiser for DiTDenoiser {
    fn start(&self, request: Request, mut inputs: Inputs) -> Result<DenoiseState> {
        let class = self.parts.class(&request.prompt)?;
        let run = Run { num_inference_steps: request.num_inference_steps, ..Run::default() };
        let scheduler = self.parts.scheduler.start(&run, None)?;
        let (channels, side) = (self.parts.transformer.in_channels, self.parts.transformer.sample_size);
        let latents = match inputs.noise.take() {
            Some(noise) => noise,
            None => flow::generator(&request).randn(&[request.num_images_per_prompt, channels, side, side])?,
        };
        let tensors = Tensors::new().with("class_labels", Tensor::new(&[class as u32], &Device::Cpu)?);
        Ok(DenoiseState { request, latents, step: 0, scheduler, tensors, last: None })
    }

    /// Conditional first.
    fn branches(&self, state: &DenoiseState) -> Result<Vec<Tensors>> {
        let pictures = state.pictures();
        let timestep = state.scheduler.timesteps()[state.step] as f32;
        let branch = |class: &Tensor| -> Result<Tensors> {
            Ok(Tensors::new()
                .with("hidden_states", state.latents.clone())
                .with("timestep", flow::each(timestep, pictures)?)
                .with("class_labels", flow::per_picture(class, pictures)?))
        };
        let mut branches = vec![branch(state.tensors.get("class_labels")?)?];
        if state.request.cfg_scale(GUIDANCE).is_some() {
            branches.push(branch(&Tensor::new(&[NO_CLASS as u32], &Device::Cpu)?)?);
        }
        Ok(branches)
    }

    fn shared_inputs(&self) -> &'static [&'static str] {
        &[]
    }

    /// All branches go together: pictures are of one size.
    fn batch_key(&self, _state: &DenoiseState, _branch: usize) -> Vec<usize> {
        Vec::new()
    }

    fn advance(&self, state: &mut DenoiseState, outputs: Vec<Tensor>) -> Result<()> {
        let noise_pred = match outputs.as_slice() {
            [cond] => cond.clone(),
            [cond, uncond] => flow::guided(uncond, cond, state.request.cfg_scale(GUIDANCE).unwrap_or(1.0))?,
            other => return Err(Error::Rank { reason: format!("{} branches, expected 1 or 2", other.len()) }),
        };
        // What is left is the learned variance: [B, C_out, H, W] -> [B, C, H, W].
        flow::step(state, noise_pred.narrow(1, 0, self.parts.transformer.in_channels)?.contiguous()?)
    }

    fn finish(&self, state: DenoiseState) -> Result<Payload> {
        Ok(Payload::Latents(Tensors::new().with("latents", state.latents)))
    }
}
