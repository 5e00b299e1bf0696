//! `QwenImageTransformerBlock`: text and image have weights of their own and attend to each other.

use parallel::{RowParallelLinear, Tensor, Weights, ops};

use super::QwenImageTransformerConfig;
use crate::Result;
use crate::mmdit::attention::{JointQkv, Order, Rope};
use crate::mmdit::layers::{AdaLayerNorm, EPS, FeedForward, gated, row};

/// What is the same for all blocks of a forward.
pub(super) struct Context {
    /// `[B, D]`; with `target_tokens` `[2 B, D]`, the second half as at timestep 0.
    pub(super) temb: Tensor,
    /// Text first, then image.
    pub(super) rope: Rope,
    /// Added to the scores of the keys: `-inf` at padding. `[B, 1, 1, L_txt + L_img]`
    pub(super) bias: Option<Tensor>,
    /// With `zero_cond_t`: how many of the image tokens are the target's. Those after it are modulated by the second half.
    pub(super) target_tokens: Option<usize>,
}

#[derive(Debug)]
pub(super) struct QwenImageTransformerBlock {
    img_mod: AdaLayerNorm,
    txt_mod: AdaLayerNorm,
    attn: JointQkv,
    to_out: RowParallelLinear,
    to_add_out: RowParallelLinear,
    img_mlp: FeedForward,
    txt_mlp: FeedForward,
}

impl QwenImageTransformerBlock {
    pub(super) fn load(w: &Weights, config: &QwenImageTransformerConfig) -> Result<Self> {
        let d = config.inner_dim();
        let attn = w.pp("attn");
        Ok(Self {
            img_mod: AdaLayerNorm::load(&w.pp("img_mod.1"), d, 6)?,
            txt_mod: AdaLayerNorm::load(&w.pp("txt_mod.1"), d, 6)?,
            attn: JointQkv::load(&attn, config.heads(), Order::TextImage)?,
            to_out: row(&attn.pp("to_out.0"), &[d], d)?,
            to_add_out: row(&attn.pp("to_add_out"), &[d], d)?,
            img_mlp: FeedForward::load(&w.pp("img_mlp"), d)?,
            txt_mlp: FeedForward::load(&w.pp("txt_mlp"), d)?,
        })
    }

    /// `hidden_states: [B, L_img, D]` and `encoder_hidden_states: [B, L_txt, D]`, equal on every rank, give the new
    /// `(encoder_hidden_states, hidden_states)`, equal on every rank.
    pub(super) fn forward(
        &self,
        hidden_states: &Tensor,
        encoder_hidden_states: &Tensor,
        context: &Context,
    ) -> Result<(Tensor, Tensor)> {
        let parts = Parts::of(hidden_states, context.target_tokens)?;
        let [img_shift1, img_scale1, img_gate1, img_shift2, img_scale2, img_gate2] = self.img_mod.modulation(&context.temb)?;
        let temb = context.temb.narrow(0, 0, parts.batch)?.contiguous()?; // [B, D]
        let [txt_shift1, txt_scale1, txt_gate1, txt_shift2, txt_scale2, txt_gate2] = self.txt_mod.modulation(&temb)?;

        let img_modulated = parts.modulate(hidden_states, &img_shift1, &img_scale1)?;
        let txt_modulated = ops::layer_norm_modulate(encoder_hidden_states, &txt_shift1, &txt_scale1, EPS)?;
        let (img_attn, txt_attn) =
            self.attn.attend(&img_modulated, &txt_modulated, Some(&context.rope), context.bias.as_ref())?; // [B, L, D/tp]
        let hidden_states = parts.gated(hidden_states, &img_gate1, &self.to_out.forward(&img_attn)?)?;
        let encoder_hidden_states = gated(encoder_hidden_states, &txt_gate1, &self.to_add_out.forward(&txt_attn)?)?;

        let img_modulated2 = parts.modulate(&hidden_states, &img_shift2, &img_scale2)?;
        let hidden_states = parts.gated(&hidden_states, &img_gate2, &self.img_mlp.forward(&img_modulated2)?)?;
        let txt_modulated2 = ops::layer_norm_modulate(&encoder_hidden_states, &txt_shift2, &txt_scale2, EPS)?;
        let txt_mlp_output = self.txt_mlp.forward(&txt_modulated2)?;
        Ok((gated(&encoder_hidden_states, &txt_gate2, &txt_mlp_output)?, hidden_states))
    }
}

/// The image tokens by what modulates them: all alike, or those of the target and those of reference pictures.
struct Parts {
    batch: usize,
    /// First token, tokens, and first row of the modulation.
    parts: Vec<[usize; 3]>,
}

impl Parts {
    fn of(hidden_states: &Tensor, target_tokens: Option<usize>) -> Result<Self> {
        let (batch, tokens, _) = hidden_states.dims3()?;
        let target = target_tokens.unwrap_or(tokens);
        let parts = vec![[0, target, 0], [target, tokens - target, batch]];
        Ok(Self { batch, parts: parts.into_iter().filter(|[_, tokens, _]| *tokens > 0).collect() })
    }

    /// A norm of `x: [B, L_img, D]`, modulated.
    fn modulate(&self, x: &Tensor, shift: &Tensor, scale: &Tensor) -> Result<Tensor> {
        self.each(|[at, tokens, row]| {
            let (shift, scale) = (self.rows(shift, row)?, self.rows(scale, row)?);
            Ok(ops::layer_norm_modulate(&x.narrow(1, at, tokens)?.contiguous()?, &shift, &scale, EPS)?)
        })
    }

    /// `x + gate * y`.
    fn gated(&self, x: &Tensor, gate: &Tensor, y: &Tensor) -> Result<Tensor> {
        self.each(|[at, tokens, row]| gated(&x.narrow(1, at, tokens)?, &self.rows(gate, row)?, &y.narrow(1, at, tokens)?))
    }

    fn each(&self, part: impl Fn([usize; 3]) -> Result<Tensor>) -> Result<Tensor> {
        let parts = self.parts.iter().map(|of| part(*of)).collect::<Result<Vec<_>>>()?;
        Ok(Tensor::cat(&parts, 1)?)
    }

    /// The batch's rows of a chunk of the modulation: `[B, D]`.
    fn rows(&self, chunk: &Tensor, row: usize) -> Result<Tensor> {
        Ok(chunk.narrow(0, row, self.batch)?.contiguous()?)
    }
}
