//! One stream of a double-stream block: all that is not joint attention.

use parallel::{RowParallelLinear, Tensor, Weights, ops};

use super::layers::{AdaLayerNorm, EPS, FeedForward, row};
use crate::Result;

/// `shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp: [B, D]`.
pub(crate) type Modulation = [Tensor; 6];

/// The image's or the text's norms, output projection and feed-forward.
#[derive(Debug)]
pub(crate) struct Stream {
    pub(crate) norm1: AdaLayerNorm,
    to_out: RowParallelLinear,
    ff: FeedForward,
}

impl Stream {
    /// `names` are those of the first norm's projection, of attention's output projection and of the feed-forward. The first
    /// norm has `chunks` chunks: six, and what a family adds behind them.
    pub(crate) fn load(w: &Weights, d: usize, [norm1, to_out, ff]: [&str; 3], chunks: usize) -> Result<Self> {
        Ok(Self {
            norm1: AdaLayerNorm::load(&w.pp(norm1), d, chunks)?,
            to_out: row(&w.pp(to_out), &[d], d)?,
            ff: FeedForward::load(&w.pp(ff), d)?,
        })
    }

    /// `x: [B, L, D]`, as attention takes it.
    pub(crate) fn norm(x: &Tensor, [shift_msa, scale_msa, ..]: &Modulation) -> Result<Tensor> {
        Ok(ops::layer_norm_modulate(x, shift_msa, scale_msa, EPS)?)
    }

    /// `x: [B, L, D]` and what attention came to, `attn_output: [B, L, D/tp]` of this rank's heads, give the new `x`.
    pub(crate) fn add_attention(&self, x: &Tensor, attn_output: &Tensor, [_, _, gate_msa, ..]: &Modulation) -> Result<Tensor> {
        Ok(ops::gated(x, gate_msa, &self.to_out.forward(attn_output)?)?)
    }

    /// `x: [B, L, D]` gives the new `x`.
    pub(crate) fn add_mlp(&self, x: &Tensor, [.., shift_mlp, scale_mlp, gate_mlp]: &Modulation) -> Result<Tensor> {
        let normed = ops::layer_norm_modulate(x, shift_mlp, scale_mlp, EPS)?; // norm2
        Ok(ops::gated(x, gate_mlp, &self.ff.forward(&normed)?)?)
    }
}
