//! Embeddings of time, guidance and pooled text.

use parallel::ops::{self, Activation};
use parallel::{ColumnParallelLinear, DType, Linear, Part, RowParallelLinear, Tensor, Weights};

use super::layers::{column, linear, row};
use crate::Result;

/// Channels of the sinusoidal embedding.
pub(crate) const TIME_CHANNELS: usize = 256;
/// Longest period of the sinusoids.
const MAX_PERIOD: f64 = 10_000.0;
/// The frequencies of [`TIME_CHANNELS`] that torch's f32 `exp` on the CPU rounds up although the f32 below is nearer (by 0.02 of a step).
/// Angles reach 1000 and more: at guidance 4 one such step moves a sine by 1e-4 and `temb` by 1e-5.
const ROUNDED_UP: [usize; 2] = [12, 106];
/// The same of [`shifted_timestep_embedding`], rounded down.
const SHIFTED_ROUNDED_DOWN: [usize; 1] = [4];

/// `CombinedTimestepGuidanceTextProjEmbeddings`, or without guidance `CombinedTimestepTextProjEmbeddings`.
#[derive(Debug)]
pub(crate) struct TimeTextEmbed {
    timestep_embedder: Mlp,
    guidance_embedder: Option<Mlp>,
    text_embedder: Mlp,
}

impl TimeTextEmbed {
    /// For a pooled text of `pooled` channels and hidden states of `d`.
    pub(crate) fn load(w: &Weights, pooled: usize, d: usize, guidance_embeds: bool) -> Result<Self> {
        let guidance = || Mlp::load(&w.pp("guidance_embedder"), TIME_CHANNELS, d);
        Ok(Self {
            timestep_embedder: Mlp::load(&w.pp("timestep_embedder"), TIME_CHANNELS, d)?,
            guidance_embedder: guidance_embeds.then(guidance).transpose()?,
            text_embedder: Mlp::load(&w.pp("text_embedder"), pooled, d)?,
        })
    }

    /// `timestep, guidance: [B]`, of 0..1000, and `pooled_projections: [B, P]` give `temb: [B, D]`.
    pub(crate) fn forward(&self, timestep: &Tensor, guidance: Option<&Tensor>, pooled_projections: &Tensor) -> Result<Tensor> {
        let embed = |t: &Tensor, embedder: &Mlp| -> Result<Tensor> {
            embedder.forward(&timestep_embedding(t, TIME_CHANNELS, 1.0)?.to_dtype(pooled_projections.dtype())?)
        };
        let mut time_guidance_emb = embed(timestep, &self.timestep_embedder)?;
        if let (Some(embedder), Some(guidance)) = (&self.guidance_embedder, guidance) {
            time_guidance_emb = (time_guidance_emb + embed(guidance, embedder)?)?;
        }
        Ok((time_guidance_emb + self.text_embedder.forward(pooled_projections)?)?)
    }
}

/// `TimestepEmbedding` and `PixArtAlphaTextProjection`: two layers with SiLU between.
#[derive(Debug)]
pub(crate) struct Mlp {
    linear_1: Linear,
    linear_2: Linear,
}

impl Mlp {
    pub(crate) fn load(w: &Weights, d_in: usize, d: usize) -> Result<Self> {
        Ok(Self { linear_1: linear(&w.pp("linear_1"), d_in, d)?, linear_2: linear(&w.pp("linear_2"), d, d)? })
    }

    pub(crate) fn forward(&self, x: &Tensor) -> Result<Tensor> {
        Ok(self.linear_2.forward(&ops::silu(&self.linear_1.forward(x)?)?)?)
    }
}

/// [`Mlp`] where it is large: what is between its layers is divided over the ranks.
#[derive(Debug)]
pub(crate) struct ParallelMlp {
    linear_1: ColumnParallelLinear,
    linear_2: RowParallelLinear,
    activation: Activation,
}

impl ParallelMlp {
    /// Of `d_in` channels to `inner` and on to `d`.
    pub(crate) fn load(w: &Weights, [d_in, inner, d]: [usize; 3], activation: Activation) -> Result<Self> {
        let (linear_1, linear_2) = (column(&w.pp("linear_1"), d_in, inner)?, row(&w.pp("linear_2"), &[inner], d)?);
        Ok(Self { linear_1, linear_2, activation })
    }

    /// `[.., D_in]` on every rank gives `[.., D]` on every rank.
    pub(crate) fn forward(&self, x: &Tensor) -> Result<Tensor> {
        Ok(self.linear_2.forward_parts(&[Part::Activated { layer: &self.linear_1, x, activation: self.activation }])?)
    }
}

/// `get_timestep_embedding` with `flip_sin_to_cos` and no shift: `[B]` gives `[B, channels]` in f32, cosines first. The angles are
/// multiplied by `scale`. `channels` is even.
///
/// The reference's frequencies and angles are f32; at t = 1000 their rounding shows, so it is repeated here.
pub(crate) fn timestep_embedding(t: &Tensor, channels: usize, scale: f32) -> Result<Tensor> {
    let mut freqs = frequencies(channels / 2, channels / 2);
    if channels == TIME_CHANNELS {
        ROUNDED_UP.iter().for_each(|i| freqs[*i] = freqs[*i].next_up());
    }
    cosines_and_sines(t, &freqs, scale)
}

/// As [`timestep_embedding`] of [`TIME_CHANNELS`], with a `downscale_freq_shift` of 1 (DiT).
pub(crate) fn shifted_timestep_embedding(t: &Tensor) -> Result<Tensor> {
    let half = TIME_CHANNELS / 2;
    let mut freqs = frequencies(half, half - 1);
    SHIFTED_ROUNDED_DOWN.iter().for_each(|i| freqs[*i] = freqs[*i].next_down());
    cosines_and_sines(t, &freqs, 1.0)
}

/// The first of them is 1, and the one at `last` would be that of the longest period.
fn frequencies(count: usize, last: usize) -> Vec<f32> {
    let exponent = |i: usize| -(MAX_PERIOD.ln() as f32) * i as f32 / last as f32;
    (0..count).map(|i| libm::exp(f64::from(exponent(i))) as f32).collect()
}

fn cosines_and_sines(t: &Tensor, freqs: &[f32], scale: f32) -> Result<Tensor> {
    let mut emb = Vec::new();
    for t in t.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>()? {
        emb.extend(freqs.iter().map(|freq| libm::cos(f64::from(scale * (t * freq))) as f32));
        emb.extend(freqs.iter().map(|freq| libm::sin(f64::from(scale * (t * freq))) as f32));
    }
    Ok(Tensor::from_vec(emb, (t.elem_count(), 2 * freqs.len()), t.device())?)
}
