//! The blocks: AdaLN modulation, feed-forward, double-stream and single-stream block.

use parallel::ops::{self, Activation};
use parallel::{ColumnParallelLinear, Linear, RowParallelLinear, Shard, Tensor, Weights};

use super::FluxTransformerConfig;
use super::attention::{FluxAttention, FluxJointAttention};
use crate::Result;

/// Of every norm in FLUX.
pub(super) const EPS: f64 = 1e-6;
/// The MLPs' width over the model's.
const MLP_RATIO: usize = 4;

/// Rotations by position, of interleaved pairs; text first, then image.
pub(super) struct Rope {
    /// `[L, Dh/2]`
    pub(super) cos: Tensor,
    /// `[L, Dh/2]`
    pub(super) sin: Tensor,
}

/// `FluxTransformerBlock`: text and image have weights of their own and attend to each other.
#[derive(Debug)]
pub(super) struct FluxTransformerBlock {
    norm1: AdaLayerNorm,
    norm1_context: AdaLayerNorm,
    attn: FluxJointAttention,
    ff: FeedForward,
    ff_context: FeedForward,
}

impl FluxTransformerBlock {
    pub(super) fn load(w: &Weights, config: &FluxTransformerConfig) -> Result<Self> {
        let d = config.inner_dim();
        Ok(Self {
            norm1: AdaLayerNorm::load(&w.pp("norm1"), d, 6)?,
            norm1_context: AdaLayerNorm::load(&w.pp("norm1_context"), d, 6)?,
            attn: FluxJointAttention::load(&w.pp("attn"), config)?,
            ff: FeedForward::load(&w.pp("ff"), d)?,
            ff_context: FeedForward::load(&w.pp("ff_context"), d)?,
        })
    }

    /// `hidden_states: [B, L_img, D]`, `encoder_hidden_states: [B, L_txt, D]` and `temb: [B, D]`, equal on every rank, give
    /// the new `(encoder_hidden_states, hidden_states)`, equal on every rank.
    pub(super) fn forward(
        &self,
        hidden_states: &Tensor,
        encoder_hidden_states: &Tensor,
        temb: &Tensor,
        rope: &Rope,
    ) -> Result<(Tensor, Tensor)> {
        let [shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp] = self.norm1.modulation(temb)?;
        let norm_hidden_states = self.norm1.norm(hidden_states, &shift_msa, &scale_msa)?;
        let [c_shift_msa, c_scale_msa, c_gate_msa, c_shift_mlp, c_scale_mlp, c_gate_mlp] = self.norm1_context.modulation(temb)?;
        let norm_encoder_hidden_states = self.norm1_context.norm(encoder_hidden_states, &c_shift_msa, &c_scale_msa)?;

        let (attn_output, context_attn_output) = self.attn.forward(&norm_hidden_states, &norm_encoder_hidden_states, rope)?;

        let hidden_states = gated(hidden_states, &gate_msa, &attn_output)?;
        let norm_hidden_states = ops::layer_norm_modulate(&hidden_states, &shift_mlp, &scale_mlp, EPS)?; // norm2
        let hidden_states = gated(&hidden_states, &gate_mlp, &self.ff.forward(&norm_hidden_states)?)?;

        let encoder_hidden_states = gated(encoder_hidden_states, &c_gate_msa, &context_attn_output)?;
        let norm_encoder_hidden_states = ops::layer_norm_modulate(&encoder_hidden_states, &c_shift_mlp, &c_scale_mlp, EPS)?; // norm2_context
        let context_ff_output = self.ff_context.forward(&norm_encoder_hidden_states)?;
        Ok((gated(&encoder_hidden_states, &c_gate_mlp, &context_ff_output)?, hidden_states))
    }
}

/// `FluxSingleTransformerBlock`: one stream of text and image, attention and MLP side by side.
#[derive(Debug)]
pub(super) struct FluxSingleTransformerBlock {
    norm: AdaLayerNorm,
    proj_mlp: ColumnParallelLinear,
    attn: FluxAttention,
    proj_out: RowParallelLinear,
}

impl FluxSingleTransformerBlock {
    pub(super) fn load(w: &Weights, config: &FluxTransformerConfig) -> Result<Self> {
        let d = config.inner_dim();
        Ok(Self {
            norm: AdaLayerNorm::load(&w.pp("norm"), d, 3)?,
            proj_mlp: column(&w.pp("proj_mlp"), d, MLP_RATIO * d)?,
            attn: FluxAttention::load(&w.pp("attn"), config)?,
            // Packed: a rank holds the columns of its heads and those of its part of the MLP.
            proj_out: row(&w.pp("proj_out"), &[d, MLP_RATIO * d], d)?,
        })
    }

    /// `hidden_states: [B, L_txt + L_img, D]` and `temb: [B, D]`, equal on every rank, give the new `hidden_states`.
    pub(super) fn forward(&self, hidden_states: &Tensor, temb: &Tensor, rope: &Rope) -> Result<Tensor> {
        let [shift, scale, gate] = self.norm.modulation(temb)?;
        let norm_hidden_states = self.norm.norm(hidden_states, &shift, &scale)?;
        let mlp_hidden_states = ops::activate(&self.proj_mlp.forward(&norm_hidden_states)?, Activation::GeluTanh)?; // [B, L, 4D/tp]
        let attn_output = self.attn.forward(&norm_hidden_states, rope)?; // [B, L, D/tp]
        let output = self.proj_out.forward(&Tensor::cat(&[attn_output, mlp_hidden_states], 2)?)?;
        gated(hidden_states, &gate, &output)
    }
}

/// `AdaLayerNormZero`, `AdaLayerNormZeroSingle` and `AdaLayerNormContinuous`: a layer norm without weights of its own,
/// modulated by chunks of a projection of `temb`. They differ in how many chunks there are and in their order.
///
/// The projection is divided over the ranks and gathered, as these are a quarter of all weights. Its chunks are
/// consecutive in the output, so it is cut as one part and the gather restores their order.
#[derive(Debug)]
pub(super) struct AdaLayerNorm {
    linear: ColumnParallelLinear,
}

impl AdaLayerNorm {
    pub(super) fn load(w: &Weights, d: usize, chunks: usize) -> Result<Self> {
        Ok(Self { linear: column(&w.pp("linear"), d, chunks * d)? })
    }

    /// `temb: [B, D]` gives the chunks, `[B, D]` each, on every rank.
    pub(super) fn modulation<const CHUNKS: usize>(&self, temb: &Tensor) -> Result<[Tensor; CHUNKS]> {
        let emb = self.linear.forward_gathered(&ops::silu(temb)?)?; // [B, CHUNKS D]
        let d = emb.dim(1)? / CHUNKS;
        let mut chunks = [(); CHUNKS].map(|()| emb.clone());
        for (i, chunk) in chunks.iter_mut().enumerate() {
            *chunk = emb.narrow(1, i * d, d)?.contiguous()?;
        }
        Ok(chunks)
    }

    pub(super) fn norm(&self, x: &Tensor, shift: &Tensor, scale: &Tensor) -> Result<Tensor> {
        Ok(ops::layer_norm_modulate(x, shift, scale, EPS)?)
    }
}

/// `FeedForward` with `gelu-approximate`.
#[derive(Debug)]
struct FeedForward {
    proj: ColumnParallelLinear,
    out: RowParallelLinear,
}

impl FeedForward {
    fn load(w: &Weights, d: usize) -> Result<Self> {
        let net = w.pp("net");
        Ok(Self { proj: column(&net.pp("0.proj"), d, MLP_RATIO * d)?, out: row(&net.pp(2), &[MLP_RATIO * d], d)? })
    }

    /// `[B, L, D]` on every rank gives `[B, L, D]` on every rank; in between a rank holds `4D/tp` columns.
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        Ok(self.out.forward(&ops::activate(&self.proj.forward(x)?, Activation::GeluTanh)?)?)
    }
}

/// `x + gate * y`. `x, y: [B, L, D]`, `gate: [B, D]`.
fn gated(x: &Tensor, gate: &Tensor, y: &Tensor) -> Result<Tensor> {
    Ok((x + y.broadcast_mul(&gate.unsqueeze(1)?)?)?)
}

pub(super) fn linear(w: &Weights, d_in: usize, d_out: usize) -> Result<Linear> {
    Ok(Linear::load(with_bias(w)?, d_in, d_out)?)
}

pub(super) fn column(w: &Weights, d_in: usize, d_out: usize) -> Result<ColumnParallelLinear> {
    Ok(ColumnParallelLinear::load(with_bias(w)?, d_in, &[d_out])?)
}

pub(super) fn row(w: &Weights, d_in: &[usize], d_out: usize) -> Result<RowParallelLinear> {
    Ok(RowParallelLinear::load(with_bias(w)?, d_in, d_out)?)
}

/// Every linear layer of FLUX has a bias, and layers take a checkpoint without one for a layer without one.
fn with_bias(w: &Weights) -> Result<&Weights> {
    if !w.contains("bias") {
        w.get("bias", &[], Shard::Replicated)?; // a `MissingTensor` with the full name
    }
    Ok(w)
}
