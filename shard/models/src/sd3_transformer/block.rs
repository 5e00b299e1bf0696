//! `JointTransformerBlock`.

use parallel::{RowParallelLinear, Tensor, Weights, ops};

use super::Sd3TransformerConfig;
use crate::Result;
use crate::mmdit::attention::{JointQkv, Order, QKV, Qkv};
use crate::mmdit::layers::{AdaLayerNorm, EPS, row};
use crate::mmdit::stream::Stream;

/// Text and image have weights of their own and attend to each other.
#[derive(Debug)]
pub(super) struct JointTransformerBlock {
    attn: JointQkv,
    attn2: Option<Attention>,
    image: Stream,
    text: Text,
}

/// The text's part of a block.
#[derive(Debug)]
enum Text {
    Whole(Box<Stream>),
    /// `context_pre_only`, in the last block: the text is attended to and goes no further.
    PreOnly(AdaLayerNorm),
}

/// The image's attention to itself alone, with an output projection of its own.
#[derive(Debug)]
struct Attention {
    qkv: Qkv,
    to_out: RowParallelLinear,
}

impl JointTransformerBlock {
    /// Block `index` of the row.
    pub(super) fn load(w: &Weights, config: &Sd3TransformerConfig, index: usize) -> Result<Self> {
        let (d, heads) = (config.inner_dim(), config.heads());
        let dual = config.dual_attention_layers.contains(&index);
        let attn2 = || -> Result<Attention> {
            let w = w.pp("attn2");
            Ok(Attention { qkv: Qkv::load(&w, heads, QKV)?, to_out: row(&w.pp("to_out.0"), &[d], d)? })
        };
        let context_pre_only = index + 1 == config.num_layers;
        let text = ["norm1_context.linear", "attn.to_add_out", "ff_context"];
        Ok(Self {
            attn: JointQkv::load(&w.pp("attn"), heads, Order::ImageText)?,
            attn2: if dual { Some(attn2()?) } else { None },
            image: Stream::load(w, d, ["norm1.linear", "attn.to_out.0", "ff"], if dual { 9 } else { 6 })?,
            text: if context_pre_only {
                Text::PreOnly(AdaLayerNorm::load(&w.pp(text[0]), d, 2)?)
            } else {
                Text::Whole(Box::new(Stream::load(w, d, text, 6)?))
            },
        })
    }

    /// `hidden_states: [B, L_img, D]`, `encoder_hidden_states: [B, L_txt, D]` and `temb: [B, D]`, equal on every rank, give
    /// the new `(encoder_hidden_states, hidden_states)`, equal on every rank. The last block leaves the text as it is.
    pub(super) fn forward(
        &self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: &Tensor,
    ) -> Result<(Tensor, Tensor)> {
        let (of_image, attn2) = match &self.attn2 {
            None => (self.image.norm1.modulation(temb)?, None),
            Some(attn2) => {
                let [shift, scale, gate, shift_mlp, scale_mlp, gate_mlp, shift_msa2, scale_msa2, gate_msa2] =
                    self.image.norm1.modulation(temb)?;
                let norm_hidden_states2 = ops::layer_norm_modulate(&hidden_states, &shift_msa2, &scale_msa2, EPS)?;
                ([shift, scale, gate, shift_mlp, scale_mlp, gate_mlp], Some((attn2, norm_hidden_states2, gate_msa2)))
            }
        };
        let norm_hidden_states = Stream::norm(&hidden_states, &of_image)?;
        let (norm_encoder_hidden_states, text) = match &self.text {
            Text::PreOnly(norm1_context) => (norm1_context.continuous(&encoder_hidden_states, temb)?, None),
            Text::Whole(text) => {
                let of_text = text.norm1.modulation(temb)?;
                (Stream::norm(&encoder_hidden_states, &of_text)?, Some((text, of_text)))
            }
        };
        let (attn_output, context_attn_output) =
            self.attn.attend(&norm_hidden_states, &norm_encoder_hidden_states, None, None)?;

        let mut hidden_states = self.image.add_attention(&hidden_states, &attn_output, &of_image)?;
        if let Some((attn2, norm_hidden_states2, gate_msa2)) = attn2 {
            let attn_output2 = attn2.to_out.forward(&attn2.qkv.attend(&norm_hidden_states2, None)?)?;
            hidden_states = ops::gated(&hidden_states, &gate_msa2, &attn_output2)?;
        }
        let hidden_states = self.image.add_mlp(&hidden_states, &of_image)?;

        let Some((text, of_text)) = text else { return Ok((encoder_hidden_states, hidden_states)) };
        let encoder_hidden_states = text.add_attention(&encoder_hidden_states, &context_attn_output, &of_text)?;
        Ok((text.add_mlp(&encoder_hidden_states, &of_text)?, hidden_states))
    }
}
