//! What a stage needs to know of a job.

use serde::{Deserialize, Serialize};

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
    /// Pixels.
    pub width: usize,
    /// Pixels.
    pub height: usize,
    /// Denoising steps.
    pub num_inference_steps: usize,
    /// Distilled (embedded) guidance; models without the embedding have none.
    pub guidance_scale: Option<f64>,
    /// Classifier-free guidance by two passes; 1 is off.
    pub true_cfg_scale: f64,
    /// Of the noise.
    pub seed: u64,
    /// Pictures drawn from one generator.
    pub num_images_per_prompt: usize,
    /// How far to go from the input picture; only with one.
    pub strength: Option<f64>,
    /// Tokens the large text encoder reads.
    pub max_sequence_length: usize,
    /// Whose random numbers.
    pub noise_generator: NoiseGenerator,
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

impl Request {
    /// Whether the job makes two passes a step.
    pub fn do_true_cfg(&self) -> bool {
        self.true_cfg_scale > 1.0 && self.negative_prompt.is_some()
    }

    /// What a text encoder reads.
    pub fn prompt_of(&self, encoder: Encoder) -> &str {
        match encoder {
            Encoder::First => &self.prompt,
            Encoder::Second => self.prompt_2.as_deref().unwrap_or(&self.prompt),
        }
    }

    /// What a text encoder reads for the unguided half; `None` when the job is not guided so.
    pub fn negative_prompt_of(&self, encoder: Encoder) -> Option<&str> {
        let first = self.negative_prompt.as_deref().filter(|_| self.do_true_cfg())?;
        Some(match encoder {
            Encoder::First => first,
            Encoder::Second => self.negative_prompt_2.as_deref().unwrap_or(first),
        })
    }
}

/// A pipeline's text encoders, in the reference's order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Encoder {
    /// `text_encoder`, which reads `prompt`.
    First,
    /// `text_encoder_2`, which reads `prompt_2`.
    Second,
}
