//! What flows between stages.

use parallel::{Tensor, Tensors};

use crate::{Error, Result};

/// What flows between stages, by kind.
#[derive(Clone, Debug)]
pub enum Payload {
    /// From a text encoder: `prompt_embeds: [1, L, D]` or `pooled_prompt_embeds: [1, P]`, and the same with the prefix
    /// `negative_` when the job is guided.
    Conditioning(Tensors),
    /// From the autoencoder's encoder: of each input picture the distribution of its latents (`image.mean`, `image.logvar`:
    /// `[1, C, H, W]`; `masked_image.*` and `mask: [1, 1, height, width]` when inpainting). The denoiser draws from it, so that
    /// all randomness of a job is in one place.
    ImageLatents(Tensors),
    /// From the denoiser: `latents: [B, C, H, W]`, ready for the decoder's own scaling.
    Latents(Tensors),
    /// From the decoder: `image: [B, 3, height, width]`, f32 in 0..1.
    Image(Tensors),
}

impl Payload {
    /// The kind's name on the wire.
    pub fn kind(&self) -> &'static str {
        match self {
            Payload::Conditioning(_) => "conditioning",
            Payload::ImageLatents(_) => "image_latents",
            Payload::Latents(_) => "latents",
            Payload::Image(_) => "image",
        }
    }

    /// A payload from its kind's name and its tensors; `None` for an unknown kind.
    pub fn from_parts(kind: &str, tensors: Tensors) -> Option<Self> {
        Some(match kind {
            "conditioning" => Payload::Conditioning(tensors),
            "image_latents" => Payload::ImageLatents(tensors),
            "latents" => Payload::Latents(tensors),
            "image" => Payload::Image(tensors),
            _ => return None,
        })
    }

    /// Its tensors.
    pub fn tensors(&self) -> &Tensors {
        match self {
            Payload::Conditioning(t) | Payload::ImageLatents(t) | Payload::Latents(t) | Payload::Image(t) => t,
        }
    }

    /// The decoded pictures, if that is what this is.
    pub fn image(&self) -> Result<&Tensor> {
        match self {
            Payload::Image(t) => Ok(t.get("image")?),
            other => Err(Error::Payload { stage: "output", got: other.kind() }),
        }
    }
}
