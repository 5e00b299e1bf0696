//! The blocks: double-stream and single-stream.

use parallel::ops::{self, Activation};
use parallel::{ColumnParallelLinear, RowParallelLinear, Tensor, Weights};

use super::FluxTransformerConfig;
use crate::Result;
use crate::mmdit::attention::{JointQkv, Order, QKV, Qkv, Rope};
use crate::mmdit::layers::{AdaLayerNorm, EPS, FeedForward, MLP_RATIO, column, gated, row};

/// `FluxTransformerBlock`: text and image have weights of their own and attend to each other.
#[derive(Debug)]
pub(super) struct FluxTransformerBlock {
    norm1: AdaLayerNorm,
    norm1_context: AdaLayerNorm,
    attn: JointQkv,
    to_out: RowParallelLinear,
    to_add_out: RowParallelLinear,
    ff: FeedForward,
    ff_context: FeedForward,
}

impl FluxTransformerBlock {
    pub(super) fn load(w: &Weights, config: &FluxTransformerConfig) -> Result<Self> {
        let d = config.inner_dim();
        Ok(Self {
            norm1: AdaLayerNorm::load(&w.pp("norm1.linear"), d, 6)?,
            norm1_context: AdaLayerNorm::load(&w.pp("norm1_context.linear"), d, 6)?,
            attn: JointQkv::load(&w.pp("attn"), config.heads(), Order::TextImage)?,
            to_out: row(&w.pp("attn.to_out.0"), &[d], d)?,
            to_add_out: row(&w.pp("attn.to_add_out"), &[d], d)?,
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
        let norm_hidden_states = ops::layer_norm_modulate(hidden_states, &shift_msa, &scale_msa, EPS)?;
        let [c_shift_msa, c_scale_msa, c_gate_msa, c_shift_mlp, c_scale_mlp, c_gate_mlp] = self.norm1_context.modulation(temb)?;
        let norm_encoder_hidden_states = ops::layer_norm_modulate(encoder_hidden_states, &c_shift_msa, &c_scale_msa, EPS)?;

        let (attn_output, context_attn_output) =
            self.attn.attend(&norm_hidden_states, &norm_encoder_hidden_states, Some(rope), None)?;

        let hidden_states = gated(hidden_states, &gate_msa, &self.to_out.forward(&attn_output)?)?;
        let norm_hidden_states = ops::layer_norm_modulate(&hidden_states, &shift_mlp, &scale_mlp, EPS)?; // norm2
        let hidden_states = gated(&hidden_states, &gate_mlp, &self.ff.forward(&norm_hidden_states)?)?;

        let encoder_hidden_states = gated(encoder_hidden_states, &c_gate_msa, &self.to_add_out.forward(&context_attn_output)?)?;
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
    attn: Qkv,
    proj_out: RowParallelLinear,
}

impl FluxSingleTransformerBlock {
    pub(super) fn load(w: &Weights, config: &FluxTransformerConfig) -> Result<Self> {
        let d = config.inner_dim();
        Ok(Self {
            norm: AdaLayerNorm::load(&w.pp("norm.linear"), d, 3)?,
            proj_mlp: column(&w.pp("proj_mlp"), d, MLP_RATIO * d)?,
            attn: Qkv::load(&w.pp("attn"), config.heads(), QKV)?,
            // Packed: a rank holds the columns of its heads and those of its part of the MLP.
            proj_out: row(&w.pp("proj_out"), &[d, MLP_RATIO * d], d)?,
        })
    }

    /// `hidden_states: [B, L_txt + L_img, D]` and `temb: [B, D]`, equal on every rank, give the new `hidden_states`.
    pub(super) fn forward(&self, hidden_states: &Tensor, temb: &Tensor, rope: &Rope) -> Result<Tensor> {
        let [shift, scale, gate] = self.norm.modulation(temb)?;
        let norm_hidden_states = ops::layer_norm_modulate(hidden_states, &shift, &scale, EPS)?;
        let mlp_hidden_states = ops::activate(&self.proj_mlp.forward(&norm_hidden_states)?, Activation::GeluTanh)?; // [B, L, 4D/tp]
        let attn_output = self.attn.attend(&norm_hidden_states, Some(rope))?; // [B, L, D/tp]
        let output = self.proj_out.forward(&Tensor::cat(&[attn_output, mlp_hidden_states], 2)?)?;
        gated(hidden_states, &gate, &output)
    }
}
