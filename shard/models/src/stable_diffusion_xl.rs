//! Stable Diffusion XL: how the family's components become stages.
//!
//! Follows diffusers 0.42.1, `pipeline_stable_diffusion_xl.py`, `pipeline_stable_diffusion_xl_img2img.py` and
//! `pipeline_stable_diffusion_xl_inpaint.py`: text to image, image to image and inpainting, with the sizes that the network is told of. The refiner, which goes
//! on from another model's latents, is not part of it.

use parallel::{DType, Device, Tensor, Tensors, Weights};
use serde_json::Value;

use crate::card::{Card, ComponentCard, ParameterCard, StageCard, StageKind};
use crate::clip::ClipTextConfig;
use crate::control::ControlFacts;
use crate::control::conditions::Conditions;
use crate::denoise::{DenoiseState, Denoiser};
use crate::diffusion::{self, CLIP_TOKENS, Defaults, GUIDANCE, Space};
use crate::flow;
use crate::model_dir::ModelDir;
use crate::registry::{LoadSpec, Rank};
use crate::request::{Encoder, SizeConditions};
use crate::stage::Inputs;
use crate::text_stage::{Kept, TextEncoding};
use crate::tokenizer::Tokenizer;
use crate::{Error, Payload, Request, Result};

/// The reference's classes that this file serves.
pub const CLASSES: &[&str] =
    &["StableDiffusionXLPipeline", "StableDiffusionXLImg2ImgPipeline", "StableDiffusionXLInpaintPipeline"];

const POOLED: &str = "pooled_prompt_embeds";
const NEGATIVE: &str = "negative_";
/// Numbers that the network is told of: two each of the original size, the crop and the target size.
const TIME_IDS: usize = 6;
/// Largest of them, in pixels.
const MAX_SIZE: f64 = 65_536.0;

/// The card of a Stable Diffusion XL directory.
pub fn describe(dir: &ModelDir) -> Result<Card> {
    let Parts { clips: [clip, clip_2], space, .. } = Parts::read(dir)?;
    let mut parameters = space.parameters(&Defaults { side: space.side(), guidance_scale: 5.0, strength: 0.3 });
    parameters.push(ParameterCard::field("prompt_2"));
    let sizes = ["original_size", "crops_coords_top_left", "target_size"];
    let mut told: Vec<String> = sizes.map(str::to_owned).to_vec();
    if space.unet.time_cond_proj_dim.is_none() {
        parameters.push(ParameterCard::field("negative_prompt_2"));
        told.extend(sizes.map(|name| format!("negative_{name}")));
    }
    parameters.extend(told.iter().map(|name| ParameterCard::number(name, 0.0, MAX_SIZE, 0.0).multiple(1.0).optional()));
    // The embeddings are the first hidden state, the last one is never taken.
    let most = clip.num_hidden_layers.min(clip_2.num_hidden_layers).saturating_sub(1);
    if most > 0 {
        parameters.push(ParameterCard::number("clip_skip", 0.0, most as f64, 0.0).multiple(1.0).optional());
    }
    let card = Card {
        family: "stable-diffusion-xl".into(),
        pipeline_class: dir.pipeline_class().into(),
        scheduler: space.scheduler.class().into(),
        digest: String::new(),
        components: vec![
            ComponentCard::of(dir, "text_encoder", clip.num_attention_heads, 1)?,
            ComponentCard::of(dir, "text_encoder_2", clip_2.num_attention_heads, 1)?,
            ComponentCard::of(dir, "unet", space.unet.shares(), space.unet.blocks())?,
            // One head, and small beside the rest: held whole.
            ComponentCard::of(dir, "vae", 1, 1)?,
        ],
        stages: StageCard::with_controls(
            StageCard::of_text_encoders(&["text_encoder", "text_encoder_2"], "unet"),
            StageKind::Denoise,
        ),
        parameters,
        max_pixels: flow::MAX_PIXELS,
        without_prompt: false,
    };
    card.with_defaults_of(dir)
}

/// The configurations of a directory, which fit together.
#[derive(Debug)]
struct Parts {
    clips: [ClipTextConfig; 2],
    space: Space,
    /// Whether the unconditional pass is given zeros where the job has no negative prompt.
    force_zeros_for_empty_prompt: bool,
}

impl Parts {
    fn read(dir: &ModelDir) -> Result<Self> {
        let clips: [ClipTextConfig; 2] = [dir.config("text_encoder")?, dir.config("text_encoder_2")?];
        let space = diffusion::space(dir)?;
        let unsupported = |field: &str, value: String| Err(Error::Unsupported { field: field.into(), value });
        let width = clips.iter().fold(0usize, |sum, clip| sum.saturating_add(clip.hidden_size));
        space.check_text(width)?;
        let text = clips[1].projection_dim.unwrap_or(clips[1].hidden_size);
        if !space.unet.has_text_time() || space.unet.time_ids(text) != Some(TIME_IDS) {
            let value = format!("{:?}", space.unet.projection_class_embeddings_input_dim);
            return unsupported("unet: projection_class_embeddings_input_dim", value);
        }
        let force_zeros_for_empty_prompt = match dir.setting("force_zeros_for_empty_prompt") {
            None | Some(Value::Bool(true)) => true,
            Some(Value::Bool(false)) => false,
            Some(other) => return unsupported("model_index.json: force_zeros_for_empty_prompt", other.to_string()),
        };
        Ok(Self { clips, space, force_zeros_for_empty_prompt })
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

/// Of both encoders the last layer but one is taken; the pooled text is the second one's.
fn text_encoding(dir: &ModelDir, component: &str) -> Result<TextEncoding> {
    let (encoder, tokenizer, outputs) = match component {
        "text_encoder" => (Encoder::First, "tokenizer", vec![(Kept::HiddenState(2), "prompt_embed")]),
        _ => {
            let outputs = vec![(Kept::HiddenState(2), "prompt_2_embed"), (Kept::Output("pooler_output"), POOLED)];
            (Encoder::Second, "tokenizer_2", outputs)
        }
    };
    let tokenizer = Tokenizer::load(&dir.root().join(tokenizer))?;
    Ok(TextEncoding { tokenizer, tokens: Some(CLIP_TOKENS), outputs, with_mask: false, encoder, guidance: GUIDANCE })
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

    /// `prompt_embeds: [1, 77, D]`, both encoders' side by side, and `pooled_prompt_embeds: [1, P]` of one pass.
    fn embeds(&self, conditioning: &Tensors, prefix: &str) -> Result<Tensors> {
        let get = |name: &str| conditioning.get(&format!("{prefix}{name}"));
        let embeds = Tensor::cat(&[get("prompt_embed")?, get("prompt_2_embed")?], 2)?;
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

/// Height and width of the original, of the crop and of the target, for the unconditional pass and for the other.
fn time_ids(request: &Request) -> [[f32; TIME_IDS]; 2] {
    let size = [request.height as u32, request.width as u32];
    let SizeConditions {
        original_size,
        crops_coords_top_left,
        target_size,
        negative_original_size,
        negative_crops_coords_top_left,
        negative_target_size,
    } = request.size_conditions;
    let row = |original: [u32; 2], crop: Option<[u32; 2]>, target: [u32; 2]| {
        let [[a, b], [c, d], [e, f]] = [original, crop.unwrap_or_default(), target].map(|pair| pair.map(|n| n as f32));
        [a, b, c, d, e, f]
    };
    let positive = row(original_size.unwrap_or(size), crops_coords_top_left, target_size.unwrap_or(size));
    let negative = match (negative_original_size, negative_target_size) {
        (Some(original), Some(target)) => row(original, negative_crops_coords_top_left, target),
        _ => positive,
    };
    [negative, positive]
}

/// `[N, 6]` of one pass of a job with N pictures. The reference repeats both passes' rows by turns, and stacks the passes one after the other: so with
/// several pictures a row is that of its place among all, whichever pass it is in.
fn time_ids_of(request: &Request, pass: usize, guided: bool) -> Result<Tensor> {
    let (rows, n) = (time_ids(request), request.num_images_per_prompt);
    let row = |picture: usize| if guided { rows[(pass * n + picture) % 2] } else { rows[1] };
    let all: Vec<f32> = (0..n).flat_map(row).collect();
    Ok(Tensor::from_vec(all, (n, TIME_IDS), &Device::Cpu)?.to_dtype(DType::F32)?)
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
        let branch = |pass: usize, prefix: &str| -> Result<Tensors> {
            let embeds = |name: &str| flow::per_picture(state.tensors.get(&format!("{prefix}{name}"))?, state.pictures());
            let inputs = self.parts.space.pass(state, pass)?;
            Ok(inputs
                .with("encoder_hidden_states", embeds("prompt_embeds")?)
                .with("added_cond_kwargs.text_embeds", embeds(POOLED)?)
                .with("added_cond_kwargs.time_ids", time_ids_of(&state.request, pass, guided)?))
        };
        if guided { Ok(vec![branch(0, NEGATIVE)?, branch(1, "")?]) } else { Ok(vec![branch(0, "")?]) }
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
        time_ids_of(request, pass, guided).unwrap().to_vec2().unwrap()
    }

    #[test]
    fn the_network_is_told_the_sizes_of_the_job_or_else_its_pictures() {
        let plain = Request { height: 48, width: 64, ..Request::default() };
        let own = vec![vec![48.0, 64.0, 0.0, 0.0, 48.0, 64.0]];
        assert_eq!((rows(&plain, 0, true), rows(&plain, 1, true), rows(&plain, 0, false)), (own.clone(), own.clone(), own));
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
        assert_eq!(rows(&told, 0, false), vec![positive.clone()], "without guidance there is one pass");
        let half = SizeConditions { negative_target_size: None, ..told.size_conditions };
        assert_eq!(rows(&Request { size_conditions: half, ..plain }, 0, true), vec![positive.clone()]);
        // The reference's rows go by turns through all pictures of both passes: with an odd number of pictures the passes differ.
        let three = Request { num_images_per_prompt: 3, ..told };
        assert_eq!(rows(&three, 0, true), [negative.clone(), positive.clone(), negative.clone()]);
        assert_eq!(rows(&three, 1, true), [positive.clone(), negative, positive]);
    }
}
