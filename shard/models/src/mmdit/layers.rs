//! AdaLN modulation, feed-forward, and linear layers that have a bias.

use parallel::ops::{self, Activation};
use parallel::{ColumnParallelLinear, Linear, Part, RowParallelLinear, Shard, Tensor, Weights};

use crate::Result;

/// Of every norm.
pub(crate) const EPS: f64 = 1e-6;
/// The MLPs' width over the model's.
pub(crate) const MLP_RATIO: usize = 4;

/// `AdaLayerNormZero` and its kin (`AdaLayerNormZeroSingle`, `SD35AdaLayerNormZeroX`, `AdaLayerNormContinuous`): a layer norm
/// without weights of its own, modulated by chunks of a projection of `temb`. They differ in how many chunks there are and in
/// their order.
///
/// The projection is divided over the ranks and gathered, as these are a quarter of all weights. Its chunks are
/// consecutive in the output, so it is cut as one part and the gather restores their order.
#[derive(Debug)]
pub(crate) struct AdaLayerNorm {
    linear: ColumnParallelLinear,
}

impl AdaLayerNorm {
    /// `w` is the projection's own place, such as `norm1.linear`.
    pub(crate) fn load(w: &Weights, d: usize, chunks: usize) -> Result<Self> {
        Ok(Self { linear: column(w, d, chunks * d)? })
    }

    /// `temb: [B, D]` gives the chunks, `[B, D]` each, on every rank.
    pub(crate) fn modulation<const CHUNKS: usize>(&self, temb: &Tensor) -> Result<[Tensor; CHUNKS]> {
        let emb = self.linear.forward_gathered(&ops::silu(temb)?)?; // [B, CHUNKS D]
        let d = emb.dim(1)? / CHUNKS;
        let mut chunks = [(); CHUNKS].map(|()| emb.clone());
        for (i, chunk) in chunks.iter_mut().enumerate() {
            *chunk = emb.narrow(1, i * d, d)?.contiguous()?;
        }
        Ok(chunks)
    }

    /// `AdaLayerNormContinuous`: two chunks, scale before shift, unlike in the blocks. `x: [B, L, D]`.
    pub(crate) fn continuous(&self, x: &Tensor, temb: &Tensor) -> Result<Tensor> {
        let [scale, shift] = self.modulation(temb)?;
        Ok(ops::layer_norm_modulate(x, &shift, &scale, EPS)?)
    }
}

/// A layer norm with weights of its own, whole on every rank.
#[derive(Debug)]
pub(crate) struct LayerNorm {
    weight: Tensor,
    bias: Tensor,
    eps: f64,
}

impl LayerNorm {
    pub(crate) fn load(w: &Weights, d: usize, eps: f64) -> Result<Self> {
        let get = |name| w.get(name, &[d], Shard::Replicated);
        Ok(Self { weight: get("weight")?, bias: get("bias")?, eps })
    }

    /// Over the last dimension.
    pub(crate) fn forward(&self, x: &Tensor) -> Result<Tensor> {
        Ok(ops::layer_norm(x, Some(&self.weight), Some(&self.bias), self.eps)?)
    }
}

/// `FeedForward` with `gelu-approximate`.
#[derive(Debug)]
pub(crate) struct FeedForward {
    proj: ColumnParallelLinear,
    out: RowParallelLinear,
}

impl FeedForward {
    pub(crate) fn load(w: &Weights, d: usize) -> Result<Self> {
        let net = w.pp("net");
        Ok(Self { proj: column(&net.pp("0.proj"), d, MLP_RATIO * d)?, out: row(&net.pp(2), &[MLP_RATIO * d], d)? })
    }

    /// `[B, L, D]` on every rank gives `[B, L, D]` on every rank; in between a rank holds `4D/tp` columns.
    pub(crate) fn forward(&self, x: &Tensor) -> Result<Tensor> {
        Ok(self.out.forward_parts(&[Part::Activated { layer: &self.proj, x, activation: Activation::GeluTanh }])?)
    }
}

/// A whole layer with bias.
pub(crate) fn linear(w: &Weights, d_in: usize, d_out: usize) -> Result<Linear> {
    Ok(Linear::load(with_bias(w)?, d_in, d_out)?)
}

/// A layer with bias whose outputs are divided over the ranks.
pub(crate) fn column(w: &Weights, d_in: usize, d_out: usize) -> Result<ColumnParallelLinear> {
    Ok(ColumnParallelLinear::load(with_bias(w)?, d_in, &[d_out])?)
}

/// A layer with bias whose inputs, of the parts `d_in`, are divided over the ranks.
pub(crate) fn row(w: &Weights, d_in: &[usize], d_out: usize) -> Result<RowParallelLinear> {
    Ok(RowParallelLinear::load(with_bias(w)?, d_in, d_out)?)
}

/// Every linear layer of these networks has a bias, and layers take a checkpoint without one for a layer without one.
pub(crate) fn with_bias(w: &Weights) -> Result<&Weights> {
    if !w.contains("bias") {
        w.get("bias", &[], Shard::Replicated)?; // a `MissingTensor` with the full name
    }
    Ok(w)
}
