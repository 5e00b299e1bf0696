//! Stable Diffusion XL: how the family's components become stages.
//!
//! Follows diffusers 0.42.1, `pipeline_stable_diffusion_xl.py`, `pipeline_stable_diffusion_xl_img2img.py` and
//! `pipeline_stable_diffusion_xl_inpaint.py`: text to image, image to image and inpainting, with the sizes that the network is told of, and the refiner, which
//! goes on from the base model's latents or from a picture.

use parallel::{DType, Device, Tensor, Tensors, Weights};
use serde_json::Value;

use crate::card::{Card, ComponentCard, ParameterCard, StageCard, StageKind};
use crate::clip::ClipTextConfig;
use crate::control::ControlFacts;
use crate::control::conditions::Conditions;
use crate::denoise::{DenoiseState, Denoiser};
use crate::diffusion::{self, CLIP_TOKENS, Defaults, GUIDANCE, Space};
use crate::flow;
use crate::model_dir::{ModelDir, REFINER};
use crate::registry::{LoadSpec, Rank};
use crate::request::{AESTHETIC_SCORE, Encoder, NEGATIVE_AESTHETIC_SCORE, SizeConditions};
use crate::stage::Inputs;
use crate::text_stage::{Kept, TextEncoding};
use crate::tokenizer::Tokenizer;
use crate::{Error, Payload, Request, Result};

/// The reference's classes that this file serves.
pub const CLASSES: &[&str] = &[TEXT_TO_IMAGE, "StableDiffusionXLImg2ImgPipeline", "StableDiffusionXLInpaintPipeline"];

const TEXT_TO_IMAGE: &str = "StableDiffusionXLPipeline";
const POOLED: &str = "pooled_prompt_embeds";
const NEGATIVE: &str = "negative_";
/// What the second encoder's outputs of `prompt` begin with, where it reads `prompt_2` for the base model.
const FOR_REFINER: &str = "refiner_";
/// Where a job leaves the base model for the refiner when it does not say.
const DENOISING_END: f64 = 0.8;
/// Largest size or crop, in pixels.
const MAX_SIZE: f64 = 65_536.0;
/// Greatest aesthetic score; those that the network learned from were 1 to 10.
const MAX_SCORE: f64 = 10.0;

/// The card of a Stable Diffusion XL directory, with its refiner's network if it has one.
pub fn describe(dir: &ModelDir) -> Result<Card> {
    let parts = Parts::read(dir)?;
    let refiner = dir.refiner().map(|refiner| Refiner::read(refiner, &parts)).transpose()?;
    let encoders = parts.clips.iter().map(|(name, _)| *name).collect::<Vec<_>>();
    let mut components = Vec::new();
    for (name, clip) in &parts.clips {
        components.push(ComponentCard::of(dir, name, clip.num_attention_heads, 1)?);
    }
    components.push(ComponentCard::of(dir, "unet", parts.space.unet.shares(), parts.space.unet.blocks())?);
    // One head, and small beside the rest: held whole.
    components.push(ComponentCard::of(dir, "vae", 1, 1)?);
    let mut stages = StageCard::with_controls(StageCard::of_text_encoders(&encoders, "unet"), StageKind::Denoise);
    if let Some(refiner) = &refiner {
        components.push(refiner.component()?);
        // Before the last one, which decodes.
        stages.insert(stages.len() - 1, StageCard::refining("refine", REFINER, &["encode_text_2", "denoise"]));
    }
    let card = Card {
        family: "stable-diffusion-xl".into(),
        pipeline_class: dir.pipeline_class().into(),
        scheduler: parts.space.scheduler.class().into(),
        digest: String::new(),
        components,
        stages,
        parameters: parts.parameters(refiner.as_ref()),
        max_pixels: flow::MAX_PIXELS,
        pixels_per_image: 0,
        without_prompt: false,
    };
    card.with_defaults_of(dir)
}

/// The configurations of a directory, which fit together.
#[derive(Debug)]
struct Parts {
    /// Its text encoders, by their components: both, or of a refiner the second one alone.
    clips: Vec<(&'static str, ClipTextConfig)>,
    space: Space,
    /// Whether the unconditional pass is given zeros where the job has no negative prompt.
    force_zeros_for_empty_prompt: bool,
    /// Whether it is a refiner: the network is told an aesthetic score in place of the target size.
    requires_aesthetics_score: bool,
}

impl Parts {
    fn read(dir: &ModelDir) -> Result<Self> {
        let mut clips = Vec::new();
        for name in ["text_encoder", "text_encoder_2"] {
            if name == "text_encoder_2" || dir.component(name).is_some() {
                clips.push((name, dir.config::<ClipTextConfig>(name)?));
            }
        }
        let space = diffusion::space(dir)?;
        let unsupported = |field: &str, value: String| Error::Unsupported { field: field.into(), value };
        let flag = |field: &str, default: bool| match dir.setting(field) {
            None => Ok(default),
            Some(Value::Bool(value)) => Ok(*value),
            Some(other) => Err(unsupported(&format!("model_index.json: {field}"), other.to_string())),
        };
        let requires_aesthetics_score = flag("requires_aesthetics_score", false)?;
        if requires_aesthetics_score && dir.pipeline_class() == TEXT_TO_IMAGE {
            return Err(unsupported("model_index.json: requires_aesthetics_score", format!("true of a {TEXT_TO_IMAGE}")));
        }
        let width = clips.iter().fold(0usize, |sum, (_, clip)| sum.saturating_add(clip.hidden_size));
        space.check_text(width)?;
        let parts = Self {
            clips,
            space,
            force_zeros_for_empty_prompt: flag("force_zeros_for_empty_prompt", true)?,
            requires_aesthetics_score,
        };
        let (clip_2, unet) = (parts.second(), &parts.space.unet);
        let text = clip_2.projection_dim.unwrap_or(clip_2.hidden_size);
        let told = time_ids(&Request::default(), requires_aesthetics_score)[1].len();
        if !unet.has_text_time() || unet.time_ids(text) != Some(told) {
            let value = format!("{:?}", unet.projection_class_embeddings_input_dim);
            return Err(unsupported("unet: projection_class_embeddings_input_dim", value));
        }
        Ok(parts)
    }

    /// The text encoder that gives the pooled text.
    fn second(&self) -> &ClipTextConfig {
        &self.clips[self.clips.len() - 1].1
    }

    /// Whether there is no first text encoder.
    fn has_one_encoder(&self) -> bool {
        self.clips.len() == 1
    }

    fn parameters(&self, refiner: Option<&Refiner<'_>>) -> Vec<ParameterCard> {
        let space = &self.space;
        let mut parameters = space.parameters(&Defaults { side: space.side(), guidance_scale: 5.0, strength: 0.3 });
        let guided = space.unet.time_cond_proj_dim.is_none();
        if !self.has_one_encoder() {
            parameters.push(ParameterCard::field("prompt_2"));
            parameters.extend(guided.then(|| ParameterCard::field("negative_prompt_2")));
        }
        let mut told = vec!["original_size", "crops_coords_top_left"];
        if self.requires_aesthetics_score {
            // It goes on from something, and is told no target: so it has no sizes of the unconditional pass either, which come in pairs.
            parameters.iter_mut().filter(|field| field.name == "image_blob_id").for_each(|field| field.required = true);
        } else {
            told.push("target_size");
            if guided {
                told.extend(["negative_original_size", "negative_crops_coords_top_left", "negative_target_size"]);
            }
        }
        parameters.extend(told.iter().map(|name| ParameterCard::number(name, 0.0, MAX_SIZE, 0.0).multiple(1.0).optional()));
        if refiner.is_some() {
            // Above nothing, or the base model would have no step.
            parameters.push(ParameterCard::number("denoising_end", 0.001, 1.0, DENOISING_END));
        }
        if self.requires_aesthetics_score || refiner.is_some() {
            let score = |name, default| ParameterCard::number(name, 0.0, MAX_SCORE, default);
            parameters.push(score("aesthetic_score", AESTHETIC_SCORE));
            parameters.push(score("negative_aesthetic_score", NEGATIVE_AESTHETIC_SCORE));
        }
        // The embeddings are the first hidden state, the last one is never taken.
        let most = self.clips.iter().map(|(_, clip)| clip.num_hidden_layers).min().unwrap_or_default().saturating_sub(1);
        if most > 0 {
            parameters.push(ParameterCard::number("clip_skip", 0.0, most as f64, 0.0).multiple(1.0).optional());
        }
        parameters
    }
}

/// A model that goes on with another's latents. Of its own it has the network and the scheduler: text and picture are encoded and decoded by
/// the base model's, as the reference documents it (`text_encoder_2=base.text_encoder_2, vae=base.vae`).
struct Refiner<'a> {
    dir: &'a ModelDir,
    parts: Parts,
}

impl<'a> Refiner<'a> {
    /// Refuses what is no refiner, or not this model's.
    fn read(dir: &'a ModelDir, base: &Parts) -> Result<Self> {
        let unsupported = |field: &str, value: String| Err(Error::Unsupported { field: format!("refiner: {field}"), value });
        if !CLASSES.contains(&dir.pipeline_class()) {
            return unsupported("model_index.json: _class_name", dir.pipeline_class().into());
        }
        let parts = Parts::read(dir)?;
        if !parts.has_one_encoder() || base.has_one_encoder() {
            let path = dir.root().to_owned();
            return Err(Error::ModelDir {
                path,
                reason: "a base model has two text encoders, and its refiner `text_encoder_2` alone".into(),
            });
        }
        if parts.space.inpaints() {
            return unsupported("unet: in_channels", parts.space.unet.in_channels.to_string());
        }
        let [own, others] = [&parts, base].map(|parts| {
            let (clip, vae) = (parts.second(), &parts.space.vae);
            [
                ("text_encoder_2: hidden_size", clip.hidden_size as f64),
                ("text_encoder_2: num_hidden_layers", clip.num_hidden_layers as f64),
                ("text_encoder_2: projection_dim", clip.projection_dim.unwrap_or(clip.hidden_size) as f64),
                ("vae: latent_channels", vae.latent_channels as f64),
                ("vae: scaling_factor", vae.scaling_factor),
                ("vae: block_out_channels", vae.scale_factor() as f64),
            ]
        });
        match own.into_iter().zip(others).find(|(own, other)| own != other) {
            None => Ok(Self { dir, parts }),
            Some(((field, own), (_, other))) => unsupported(field, format!("{own}, the base model's is {other}")),
        }
    }

    fn component(&self) -> Result<ComponentCard> {
        let unet = &self.parts.space.unet;
        Ok(ComponentCard { name: REFINER.into(), ..ComponentCard::of(self.dir, "unet", unet.shares(), unet.blocks())? })
    }
}

/// Loads one rank of one component.
pub fn load(spec: LoadSpec<'_>, weights: &Weights) -> Result<Rank> {
    let dir = spec.dir;
    diffusion::load(
        spec,
        weights,
        |controls| Ok(StableDiffusionXlDenoiser::load(dir)?.with_controls(controls)),
        |component| text_encoding(dir, component),
    )
}

/// Of both encoders the last layer but one is taken; the pooled text is the second one's. Where that is the only one it reads `prompt`.
fn text_encoding(dir: &ModelDir, component: &str) -> Result<TextEncoding> {
    let (encoder, tokenizer, outputs) = match component {
        "text_encoder" => (Encoder::First, "tokenizer", vec![(Kept::HiddenState(2), "prompt_embed")]),
        _ => {
            let encoder = if dir.component("text_encoder").is_some() { Encoder::Second } else { Encoder::First };
            let outputs = vec![(Kept::HiddenState(2), "prompt_2_embed"), (Kept::Output("pooler_output"), POOLED)];
            (encoder, "tokenizer_2", outputs)
        }
    };
    let tokenizer = Tokenizer::load(&dir.root().join(tokenizer))?;
    // The reference's refiner has this encoder alone, which then reads `prompt`.
    let besides = dir.refiner().filter(|_| encoder == Encoder::Second).map(|_| (Encoder::First, FOR_REFINER));
    Ok(TextEncoding { tokenizer, tokens: Some(CLIP_TOKENS), outputs, with_mask: false, encoder, besides, guidance: GUIDANCE })
}

/// What Stable Diffusion XL does around its network.
#[derive(Debug)]
pub struct StableDiffusionXlDenoiser {
    parts: Parts,
}

impl StableDiffusionXlDenoiser {
    /// From a model's configurations.
    pub fn load(dir: &ModelDir) -> Result<Self> {
        Ok(Self { parts: Parts::read(dir)? })
    }

    /// The same, for jobs that may name these control networks.
    pub fn with_controls(mut self, facts: &[ControlFacts]) -> Self {
        self.parts.space.controls = Conditions::new(facts);
        self
    }

    /// `prompt_embeds: [1, 77, D]`, those of all encoders side by side, and `pooled_prompt_embeds: [1, P]` of one pass.
    fn embeds(&self, conditioning: &Tensors, prefix: &str) -> Result<Tensors> {
        let own = |name: &str| format!("{}{prefix}{name}", if self.parts.has_one_encoder() { FOR_REFINER } else { "" });
        let get = |name: &str| match conditioning.find(&own(name)) {
            Some(embeds) => Ok(embeds),
            None => conditioning.get(&format!("{prefix}{name}")),
        };
        let second = get("prompt_2_embed")?;
        let embeds = if self.parts.has_one_encoder() { second.clone() } else { Tensor::cat(&[get("prompt_embed")?, second], 2)? };
        Ok(Tensors::new().with(format!("{prefix}prompt_embeds"), embeds).with(format!("{prefix}{POOLED}"), get(POOLED)?.clone()))
    }

    /// The same of the unconditional pass, which may be zeros.
    fn negative_embeds(&self, conditioning: &Tensors, request: &Request) -> Result<Tensors> {
        let embeds = self.embeds(conditioning, NEGATIVE)?;
        if request.negative_prompt.is_some() || !self.parts.force_zeros_for_empty_prompt {
            return Ok(embeds);
        }
        let zeros = |(name, tensor): (&str, &Tensor)| Ok((name.to_owned(), tensor.zeros_like()?));
        embeds.iter().map(zeros).collect()
    }
}

/// What the network is told, for the unconditional pass and for the other: height and width of the original, of the crop, and of the target, or in
/// place of this a refiner's score. The reference's pipelines that start from a picture fill in differently what the job does not say of the unconditional pass.
fn time_ids(request: &Request, scored: bool) -> [Vec<f32>; 2] {
    let size = [request.height as u32, request.width as u32];
    let SizeConditions {
        original_size,
        crops_coords_top_left,
        target_size,
        negative_original_size,
        negative_crops_coords_top_left,
        negative_target_size,
    } = request.size_conditions;
    let pairs = |pairs: &[[u32; 2]]| pairs.iter().flatten().map(|n| *n as f32).collect::<Vec<_>>();
    let (original, crop, target) =
        (original_size.unwrap_or(size), crops_coords_top_left.unwrap_or_default(), target_size.unwrap_or(size));
    let negative_crop = negative_crops_coords_top_left.unwrap_or_default();
    if scored {
        let row = |sizes: &[[u32; 2]], score: f64| [pairs(sizes), vec![score as f32]].concat();
        let negative = [negative_original_size.unwrap_or(original), negative_crop];
        return [row(&negative, request.negative_aesthetic_score), row(&[original, crop], request.aesthetic_score)];
    }
    let positive = [original, crop, target];
    let negative = match (request.strength, negative_original_size, negative_target_size) {
        (Some(_), own, own_target) => [own.unwrap_or(original), crop, own_target.unwrap_or(target)],
        (None, Some(own), Some(own_target)) => [own, negative_crop, own_target],
        (None, ..) => positive,
    };
    [pairs(&negative), pairs(&positive)]
}

/// `[N, numbers]` of one pass of a job with N pictures. From noise the reference repeats both passes' rows by turns, and stacks the passes one after the
/// other: so with several pictures a row is that of its place among all, whichever pass it is in. From a picture each pass has its own.
fn time_ids_of(request: &Request, scored: bool, pass: usize, guided: bool) -> Result<Tensor> {
    let (rows, n) = (time_ids(request, scored), request.num_images_per_prompt);
    let by_turns = guided && !scored && request.strength.is_none();
    let row = |picture: usize| &rows[if by_turns { (pass * n + picture) % 2 } else { pass }];
    let all: Vec<f32> = (0..n).flat_map(row).copied().collect();
    Ok(Tensor::from_vec(all, (n, rows[0].len()), &Device::Cpu)?.to_dtype(DType::F32)?)
}

impl Denoiser for StableDiffusionXlDenoiser {
    fn start(&self, request: Request, inputs: Inputs) -> Result<DenoiseState> {
        let mut tensors = self.embeds(&inputs.conditioning, "")?;
        if self.parts.space.cfg_scale(&request).is_some() {
            tensors.extend(self.negative_embeds(&inputs.conditioning, &request)?);
        }
        self.parts.space.start(request, inputs, tensors)
    }

    /// Unconditional first.
    fn branches(&self, state: &DenoiseState) -> Result<Vec<Tensors>> {
        let guided = self.parts.space.cfg_scale(&state.request).is_some();
        let scored = self.parts.requires_aesthetics_score;
        let branch = |pass: usize, row: usize, prefix: &str| -> Result<Tensors> {
            let embeds = |name: &str| flow::per_picture(state.tensors.get(&format!("{prefix}{name}"))?, state.pictures());
            let inputs = self.parts.space.pass(state, pass)?;
            Ok(inputs
                .with("encoder_hidden_states", embeds("prompt_embeds")?)
                .with("added_cond_kwargs.text_embeds", embeds(POOLED)?)
                .with("added_cond_kwargs.time_ids", time_ids_of(&state.request, scored, row, guided)?))
        };
        if guided { Ok(vec![branch(0, 0, NEGATIVE)?, branch(1, 1, "")?]) } else { Ok(vec![branch(0, 1, "")?]) }
    }

    fn shared_inputs(&self) -> &'static [&'static str] {
        &["controls"]
    }

    fn batch_key(&self, state: &DenoiseState, branch: usize) -> Vec<usize> {
        self.parts.space.batch_key(state, branch)
    }

    fn advance(&self, state: &mut DenoiseState, outputs: Vec<Tensor>) -> Result<()> {
        self.parts.space.advance(state, &outputs)
    }

    fn finish(&self, state: DenoiseState) -> Result<Payload> {
        Ok(Payload::Latents(Tensors::new().with("latents", state.latents)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rows(request: &Request, pass: usize, guided: bool) -> Vec<Vec<f32>> {
        time_ids_of(request, false, pass, guided).unwrap().to_vec2().unwrap()
    }

    #[test]
    fn a_refiner_is_told_scores_in_place_of_the_target() {
        let request = Request { height: 48, width: 64, num_images_per_prompt: 2, aesthetic_score: 7.5, ..Request::default() };
        let rows = |pass| time_ids_of(&request, true, pass, true).unwrap().to_vec2::<f32>().unwrap();
        assert_eq!(rows(0), vec![vec![48.0, 64.0, 0.0, 0.0, 2.5]; 2]);
        assert_eq!(rows(1), vec![vec![48.0, 64.0, 0.0, 0.0, 7.5]; 2]);
    }

    #[test]
    fn the_network_is_told_the_sizes_of_the_job_or_else_its_pictures() {
        let plain = Request { height: 48, width: 64, ..Request::default() };
        let own = vec![vec![48.0, 64.0, 0.0, 0.0, 48.0, 64.0]];
        assert_eq!((rows(&plain, 0, true), rows(&plain, 1, true), rows(&plain, 1, false)), (own.clone(), own.clone(), own));
        // As the recorded case `sdxl_micro_conditioning` has them: both sizes of the unconditional pass, or none.
        let size_conditions = SizeConditions {
            original_size: Some([512, 640]),
            crops_coords_top_left: Some([12, 34]),
            target_size: Some([1024, 768]),
            negative_original_size: Some([256, 256]),
            negative_crops_coords_top_left: Some([1, 2]),
            negative_target_size: Some([300, 200]),
        };
        let (negative, positive) = (vec![256.0, 256.0, 1.0, 2.0, 300.0, 200.0], vec![512.0, 640.0, 12.0, 34.0, 1024.0, 768.0]);
        let told = Request { size_conditions, ..plain.clone() };
        assert_eq!((rows(&told, 0, true), rows(&told, 1, true)), (vec![negative.clone()], vec![positive.clone()]));
        assert_eq!(rows(&told, 1, false), vec![positive.clone()], "without guidance there is one pass");
        let half = SizeConditions { negative_target_size: None, ..told.size_conditions };
        assert_eq!(rows(&Request { size_conditions: half, ..plain }, 0, true), vec![positive.clone()]);
        // The reference's rows go by turns through all pictures of both passes: with an odd number of pictures the passes differ.
        let three = Request { num_images_per_prompt: 3, ..told };
        assert_eq!(rows(&three, 0, true), [negative.clone(), positive.clone(), negative.clone()]);
        assert_eq!(rows(&three, 1, true), [positive.clone(), negative, positive.clone()]);
        // From a picture each pass has its own, and the unconditional one the other's crop.
        let from_picture = Request { strength: Some(0.5), ..three };
        let own = vec![256.0, 256.0, 12.0, 34.0, 300.0, 200.0];
        assert_eq!(rows(&from_picture, 0, true), vec![own; 3]);
        assert_eq!(rows(&from_picture, 1, true), vec![positive; 3]);
    }
}
