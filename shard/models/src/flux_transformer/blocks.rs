//! The blocks: double-stream and single-stream.

use parallel::ops::{self, Activation};
use parallel::{ColumnParallelLinear, Part, RowParallelLinear, Tensor, Weights};

use super::FluxTransformerConfig;
use crate::Result;
use crate::mmdit::attention::{JointQkv, Order, QKV, Qkv, Rope};
use crate::mmdit::layers::{AdaLayerNorm, EPS, MLP_RATIO, column, row};
use crate::mmdit::stream::Stream;

/// `FluxTransformerBlock`: text and image have weights of their own and attend to each other.
#[derive(Debug)]
pub(super) struct FluxTransformerBlock {
    attn: JointQkv,
    image: Stream,
    text: Stream,
}

impl FluxTransformerBlock {
    pub(super) fn load(w: &Weights, config: &FluxTransformerConfig) -> Result<Self> {
        let d = config.inner_dim();
        Ok(Self {
            attn: JointQkv::load(&w.pp("attn"), config.heads(), Order::TextImage)?,
            image: Stream::load(w, d, ["norm1.linear", "attn.to_out.0", "ff"], 6)?,
            text: Stream::load(w, d, ["norm1_context.linear", "attn.to_add_out", "ff_context"], 6)?,
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
        let (of_image, of_text) = (self.image.norm1.modulation(temb)?, self.text.norm1.modulation(temb)?);
        let norm_hidden_states = Stream::norm(hidden_states, &of_image)?;
        let norm_encoder_hidden_states = Stream::norm(encoder_hidden_states, &of_text)?;
        let (attn_output, context_attn_output) =
            self.attn.attend(&norm_hidden_states, &norm_encoder_hidden_states, Some(rope), None)?;
        let hidden_states = self.image.add_attention(hidden_states, &attn_output, &of_image)?;
        let hidden_states = self.image.add_mlp(&hidden_states, &of_image)?;
        let encoder_hidden_states = self.text.add_attention(encoder_hidden_states, &context_attn_output, &of_text)?;
        Ok((self.text.add_mlp(&encoder_hidden_states, &of_text)?, hidden_states))
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
        let attn_output = self.attn.attend(&norm_hidden_states, Some(rope))?; // [B, L, D/tp]
        let mlp = Part::Activated { layer: &self.proj_mlp, x: &norm_hidden_states, activation: Activation::GeluTanh }; // [B, L, 4D/tp]
        let output = self.proj_out.forward_parts(&[Part::Tensor(&attn_output), mlp])?;
        Ok(ops::gated(hidden_states, &gate, &output)?)
    }
}
