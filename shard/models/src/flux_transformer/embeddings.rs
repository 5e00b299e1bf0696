//! Embeddings of time, guidance, pooled text and position.

use parallel::{DType, Linear, Tensor, Tensors, Weights, ops};

use super::FluxTransformerConfig;
use super::layers::{Rope, linear};
use crate::{Error, Result};

/// Channels of the sinusoidal embedding.
const TIME_CHANNELS: usize = 256;
/// Longest period of the sinusoids, and the base of the rotary frequencies.
const MAX_PERIOD: f64 = 10_000.0;
/// The frequencies of time that torch's f32 `exp` on the CPU rounds up although the f32 below is nearer (by 0.02 of a step).
/// Angles reach 1000 and more: at guidance 4 one such step moves a sine by 1e-4 and `temb` by 1e-5.
const ROUNDED_UP: [usize; 2] = [12, 106];

/// `CombinedTimestepGuidanceTextProjEmbeddings`, or without guidance `CombinedTimestepTextProjEmbeddings`.
#[derive(Debug)]
pub(super) struct TimeTextEmbed {
    timestep_embedder: Mlp,
    guidance_embedder: Option<Mlp>,
    text_embedder: Mlp,
}

impl TimeTextEmbed {
    pub(super) fn load(w: &Weights, config: &FluxTransformerConfig) -> Result<Self> {
        let d = config.inner_dim();
        let guidance = || Mlp::load(&w.pp("guidance_embedder"), TIME_CHANNELS, d);
        Ok(Self {
            timestep_embedder: Mlp::load(&w.pp("timestep_embedder"), TIME_CHANNELS, d)?,
            guidance_embedder: config.guidance_embeds.then(guidance).transpose()?,
            text_embedder: Mlp::load(&w.pp("text_embedder"), config.pooled_projection_dim, d)?,
        })
    }

    /// `timestep, guidance: [B]` and `pooled_projections: [B, P]` give `temb: [B, D]`. Time and guidance are rounded to
    /// `dtype`, that of the hidden states, before they are multiplied by 1000, as in the reference.
    pub(super) fn forward(&self, inputs: &Tensors, dtype: DType) -> Result<Tensor> {
        let pooled_projections = inputs.get("pooled_projections")?;
        let embed = |name: &str, embedder: &Mlp| -> Result<Tensor> {
            let t = (inputs.get(name)?.to_dtype(dtype)? * 1000.0)?;
            embedder.forward(&timestep_embedding(&t)?.to_dtype(pooled_projections.dtype())?)
        };
        let mut time_guidance_emb = embed("timestep", &self.timestep_embedder)?;
        if let Some(embedder) = &self.guidance_embedder {
            time_guidance_emb = (time_guidance_emb + embed("guidance", embedder)?)?;
        }
        Ok((time_guidance_emb + self.text_embedder.forward(pooled_projections)?)?)
    }
}

/// `TimestepEmbedding` and `PixArtAlphaTextProjection`: two layers with SiLU between.
#[derive(Debug)]
struct Mlp {
    linear_1: Linear,
    linear_2: Linear,
}

impl Mlp {
    fn load(w: &Weights, d_in: usize, d: usize) -> Result<Self> {
        Ok(Self { linear_1: linear(&w.pp("linear_1"), d_in, d)?, linear_2: linear(&w.pp("linear_2"), d, d)? })
    }

    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        Ok(self.linear_2.forward(&ops::silu(&self.linear_1.forward(x)?)?)?)
    }
}

/// `get_timestep_embedding` with `flip_sin_to_cos` and no shift: `[B]` gives `[B, 256]` in f32, cosines first.
///
/// The reference's frequencies and angles are f32; at t = 1000 their rounding shows, so it is repeated here.
fn timestep_embedding(t: &Tensor) -> Result<Tensor> {
    let half = TIME_CHANNELS / 2;
    let exponent = |i: usize| -(MAX_PERIOD.ln() as f32) * i as f32 / half as f32;
    let mut freqs: Vec<f32> = (0..half).map(|i| libm::exp(f64::from(exponent(i))) as f32).collect();
    ROUNDED_UP.iter().for_each(|i| freqs[*i] = freqs[*i].next_up());
    let mut emb = Vec::new();
    for t in t.to_dtype(DType::F32)?.to_vec1::<f32>()? {
        emb.extend(freqs.iter().map(|freq| libm::cos(f64::from(t * freq)) as f32));
        emb.extend(freqs.iter().map(|freq| libm::sin(f64::from(t * freq)) as f32));
    }
    let b = emb.len() / TIME_CHANNELS;
    Ok(Tensor::from_vec(emb, (b, TIME_CHANNELS), t.device())?)
}

/// `FluxPosEmbed`: rotations by the ids of a token, one slice of a head per axis. In f64, as the reference.
#[derive(Debug)]
pub(super) struct FluxPosEmbed {
    /// Per axis.
    freqs: Vec<Vec<f64>>,
}

impl FluxPosEmbed {
    pub(super) fn new(axes_dim: &[usize]) -> Self {
        let freq = |i: usize, dim: usize| 1.0 / libm::pow(MAX_PERIOD, (2 * i) as f64 / dim as f64);
        Self { freqs: axes_dim.iter().map(|dim| (0..dim / 2).map(|i| freq(i, *dim)).collect()).collect() }
    }

    /// `ids: [L, 3]` gives tables of `[L, Dh/2]`, f32.
    pub(super) fn forward(&self, ids: &Tensor) -> Result<Rope> {
        let (l, axes) = ids.dims2()?;
        if axes != self.freqs.len() {
            return Err(Error::Invalid {
                field: "img_ids",
                reason: format!("{axes} ids per token, expected {}", self.freqs.len()),
            });
        }
        let (mut cos, mut sin) = (Vec::new(), Vec::new());
        for ids in ids.to_dtype(DType::F32)?.to_vec2::<f32>()? {
            for (pos, freqs) in ids.into_iter().zip(&self.freqs) {
                cos.extend(freqs.iter().map(|freq| libm::cos(f64::from(pos) * freq) as f32));
                sin.extend(freqs.iter().map(|freq| libm::sin(f64::from(pos) * freq) as f32));
            }
        }
        let width = self.freqs.iter().map(Vec::len).sum::<usize>(); // Dh/2
        Ok(Rope { cos: Tensor::from_vec(cos, (l, width), ids.device())?, sin: Tensor::from_vec(sin, (l, width), ids.device())? })
    }
}
