//! What a stage needs to know of a job.

use serde::{Deserialize, Serialize};

/// What the reference tells a refiner when nobody says.
pub const AESTHETIC_SCORE: f64 = 6.0;
/// The same, for the unconditional pass.
pub const NEGATIVE_AESTHETIC_SCORE: f64 = 2.5;

/// A job's request with every default filled in, checked by the coordinator. Names are diffusers'.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Request {
    /// What the picture should show.
    pub prompt: String,
    /// What the second text encoder reads, if not `prompt`.
    pub prompt_2: Option<String>,
    /// What it should not show; takes effect with `true_cfg_scale` > 1.
    pub negative_prompt: Option<String>,
    /// What the second text encoder reads, if not `negative_prompt`.
    pub negative_prompt_2: Option<String>,
    /// What the third text encoder reads, if not `prompt`.
    pub prompt_3: Option<String>,
    /// What the third text encoder reads, if not `negative_prompt`.
    pub negative_prompt_3: Option<String>,
    /// Pixels; 0: the model's own choice, by the picture it is given.
    pub width: usize,
    /// See `width`.
    pub height: usize,
    /// Denoising steps.
    pub num_inference_steps: usize,
    /// Distilled (embedded) guidance, or classifier-free guidance by two passes where the family has no other.
    pub guidance_scale: Option<f64>,
    /// Classifier-free guidance by two passes; 1 is off.
    pub true_cfg_scale: f64,
    /// An extra pass without some blocks, which repels.
    pub skip_layer_guidance: Option<SkipLayerGuidance>,
    /// How many of the CLIP text encoder's last layers are left out.
    pub clip_skip: Option<usize>,
    /// Shift of the flow-matching timesteps, in place of the model's own.
    pub shift: Option<f64>,
    /// How much noise DDIM's steps add, or gamma of TCD's.
    pub eta: f64,
    /// How far guidance is brought back to the conditional pass's standard deviation, 0 to 1.
    pub guidance_rescale: f64,
    /// How much of noise the picture that is enlarged gets, as a timestep.
    pub noise_level: Option<usize>,
    /// The part of the steps after which the base model hands its latents to the refiner; none: it makes all of them.
    pub denoising_end: Option<f64>,
    /// What Stable Diffusion XL's refiner is told of how good the picture is to look.
    pub aesthetic_score: f64,
    /// The same, for the unconditional pass.
    pub negative_aesthetic_score: f64,
    /// Sizes and crops that Stable Diffusion XL is told of.
    pub size_conditions: SizeConditions,
    /// Of the noise.
    pub seed: u64,
    /// Pictures drawn from one generator.
    pub num_images_per_prompt: usize,
    /// How far to go from the input picture; only with one.
    pub strength: Option<f64>,
    /// Tokens the large text encoder reads; 0 where a model does not take it.
    pub max_sequence_length: usize,
    /// Whose random numbers.
    pub noise_generator: NoiseGenerator,
    /// What the weights are changed by, each with its scale.
    pub loras: Vec<Lora>,
    /// What pictures say of the one that is drawn; several add up.
    pub controls: Vec<Control>,
    /// ControlNets act on the conditional pass alone, the more the deeper: for prompts that say little.
    pub guess_mode: bool,
}

/// A control network that takes part in a job; its picture is in the same place among [`crate::stage::Pictures::controls`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Control {
    /// Its name in the cluster.
    pub name: String,
    /// What its output is multiplied by.
    pub conditioning_scale: f64,
    /// It takes part from this part of the steps on, 0 to 1.
    pub guidance_start: f64,
    /// Up to this part of the steps, 0 to 1.
    pub guidance_end: f64,
    /// Which kind of picture it is, of a network that knows several.
    pub mode: Option<usize>,
}

/// An adapter that takes part in a job.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Lora {
    /// Its name in the cluster.
    pub name: String,
    /// How strongly it takes part.
    pub scale: f64,
}

/// Skip-layer guidance (SD3.5): besides the two passes of classifier-free guidance a third, without some blocks, which repels.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SkipLayerGuidance {
    /// The blocks that are left out.
    pub layers: Vec<usize>,
    /// How strongly it repels.
    pub scale: f64,
    /// Begins after this part of the steps.
    pub start: f64,
    /// Ends before this part of the steps.
    pub stop: f64,
}

/// What Stable Diffusion XL is told of the picture it is to imitate, each a height and a width (or a distance from the top and from the left); none:
/// the size of the picture that is drawn, not cropped. The negative ones are for the unconditional pass; none: as the others, if both sizes are
/// not given.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SizeConditions {
    /// Before it was scaled.
    pub original_size: Option<[u32; 2]>,
    /// What was cropped above and to the left.
    pub crops_coords_top_left: Option<[u32; 2]>,
    /// The size that is wanted.
    pub target_size: Option<[u32; 2]>,
    /// See `original_size`.
    pub negative_original_size: Option<[u32; 2]>,
    /// See `crops_coords_top_left`.
    pub negative_crops_coords_top_left: Option<[u32; 2]>,
    /// See `target_size`.
    pub negative_target_size: Option<[u32; 2]>,
}

/// The job of a test or an example: a square of 64 pixels, one step, no guidance.
impl Default for Request {
    fn default() -> Self {
        Self {
            prompt: String::new(),
            prompt_2: None,
            negative_prompt: None,
            negative_prompt_2: None,
            prompt_3: None,
            negative_prompt_3: None,
            width: 64,
            height: 64,
            num_inference_steps: 1,
            guidance_scale: None,
            true_cfg_scale: 1.0,
            skip_layer_guidance: None,
            clip_skip: None,
            shift: None,
            eta: 0.0,
            guidance_rescale: 0.0,
            noise_level: None,
            denoising_end: None,
            aesthetic_score: AESTHETIC_SCORE,
            negative_aesthetic_score: NEGATIVE_AESTHETIC_SCORE,
            size_conditions: SizeConditions::default(),
            seed: 0,
            num_images_per_prompt: 1,
            strength: None,
            max_sequence_length: 512,
            noise_generator: NoiseGenerator::TorchCpu,
            loras: Vec::new(),
            controls: Vec::new(),
            guess_mode: false,
        }
    }
}

/// Whose random numbers the noise is made of.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum NoiseGenerator {
    /// `torch.Generator("cpu")`: MT19937.
    #[default]
    TorchCpu,
    /// `torch.Generator("cuda")`: Philox.
    TorchCuda,
}

/// How a family does classifier-free guidance, where the conditional pass has an unconditional one beside it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Guidance {
    /// By `true_cfg_scale`, and only with a negative prompt (FLUX, Qwen-Image).
    TrueCfg,
    /// By `guidance_scale`; the negative prompt is empty unless given (SD3).
    Cfg,
}

impl Request {
    /// The scale of classifier-free guidance; `None`: the job makes one pass a step.
    pub fn cfg_scale(&self, guidance: Guidance) -> Option<f64> {
        let scale = match guidance {
            Guidance::TrueCfg => self.negative_prompt.as_ref().map(|_| self.true_cfg_scale),
            Guidance::Cfg => self.guidance_scale,
        };
        scale.filter(|scale| *scale > 1.0)
    }

    /// What a text encoder reads.
    pub fn prompt_of(&self, encoder: Encoder) -> &str {
        let own = match encoder {
            Encoder::First => None,
            Encoder::Second => self.prompt_2.as_deref(),
            Encoder::Third => self.prompt_3.as_deref(),
        };
        said(own).unwrap_or(&self.prompt)
    }

    /// What a text encoder reads for the unconditional pass; `None` when there is none.
    pub fn negative_prompt_of(&self, encoder: Encoder, guidance: Guidance) -> Option<&str> {
        self.cfg_scale(guidance)?;
        let own = match encoder {
            Encoder::First => None,
            Encoder::Second => self.negative_prompt_2.as_deref(),
            Encoder::Third => self.negative_prompt_3.as_deref(),
        };
        Some(said(own).or(self.negative_prompt.as_deref()).unwrap_or_default())
    }
}

/// An encoder's own text, unless it is empty: the reference says `prompt_2 or prompt`.
fn said(own: Option<&str>) -> Option<&str> {
    own.filter(|text| !text.is_empty())
}

/// A pipeline's text encoders, in the reference's order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Encoder {
    /// `text_encoder`, which reads `prompt`.
    First,
    /// `text_encoder_2`, which reads `prompt_2`.
    Second,
    /// `text_encoder_3`, which reads `prompt_3`.
    Third,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_empty_prompt_of_another_text_encoder_is_none() {
        let request = Request {
            prompt: "a red fox".into(),
            prompt_2: Some(String::new()),
            prompt_3: Some("in the snow".into()),
            negative_prompt: Some("blur".into()),
            negative_prompt_2: Some("noise".into()),
            negative_prompt_3: Some(String::new()),
            true_cfg_scale: 2.0,
            ..Request::default()
        };
        let prompts = [Encoder::First, Encoder::Second, Encoder::Third].map(|encoder| request.prompt_of(encoder));
        assert_eq!(prompts, ["a red fox", "a red fox", "in the snow"]);
        let negative = |encoder| request.negative_prompt_of(encoder, Guidance::TrueCfg).unwrap();
        assert_eq!([Encoder::First, Encoder::Second, Encoder::Third].map(negative), ["blur", "noise", "blur"]);
    }

    #[test]
    fn an_empty_negative_prompt_is_one() {
        let request = Request { negative_prompt: Some(String::new()), true_cfg_scale: 2.0, ..Request::default() };
        assert_eq!(request.negative_prompt_of(Encoder::Second, Guidance::TrueCfg), Some(""));
    }
}
