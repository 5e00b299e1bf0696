//! `QwenImageTransformerBlock`: text and image have weights of their own and attend to each other.

use parallel::{Tensor, Weights};

use super::QwenImageTransformerConfig;
use crate::Result;
use crate::mmdit::attention::{JointQkv, Order, Rope};
use crate::mmdit::stream::{Modulation, Stream};

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
    attn: JointQkv,
    img: Stream,
    txt: Stream,
}

impl QwenImageTransformerBlock {
    pub(super) fn load(w: &Weights, config: &QwenImageTransformerConfig) -> Result<Self> {
        let d = config.inner_dim();
        Ok(Self {
            attn: JointQkv::load(&w.pp("attn"), config.heads(), Order::TextImage)?,
            img: Stream::load(w, d, ["img_mod.1", "attn.to_out.0", "img_mlp"], 6)?,
            txt: Stream::load(w, d, ["txt_mod.1", "attn.to_add_out", "txt_mlp"], 6)?,
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
        let (b, l_img, _) = hidden_states.dims3()?;
        let parts = Parts::of(&self.img.norm1.modulation(&context.temb)?, [b, l_img], context.target_tokens)?;
        let txt_mod = self.txt.norm1.modulation(&context.temb.narrow(0, 0, b)?.contiguous()?)?;

        let img_modulated = parts.each([hidden_states], |[x], modulation| Stream::norm(x, modulation))?;
        let txt_modulated = Stream::norm(encoder_hidden_states, &txt_mod)?;
        let (img_attn, txt_attn) =
            self.attn.attend(&img_modulated, &txt_modulated, Some(&context.rope), context.bias.as_ref())?; // [B, L, D/tp]
        let hidden_states =
            parts.each([hidden_states, &img_attn], |[x, attn], modulation| self.img.add_attention(x, attn, modulation))?;
        let hidden_states = parts.each([&hidden_states], |[x], modulation| self.img.add_mlp(x, modulation))?;
        let encoder_hidden_states = self.txt.add_attention(encoder_hidden_states, &txt_attn, &txt_mod)?;
        Ok((self.txt.add_mlp(&encoder_hidden_states, &txt_mod)?, hidden_states))
    }
}

/// The image tokens by what modulates them: all alike, or those of the target and those of reference pictures.
struct Parts(Vec<Part>);

struct Part {
    /// The first, and how many.
    tokens: [usize; 2],
    modulation: Modulation,
}

impl Parts {
    /// `modulation: [B, D]` each, or with `target_tokens` `[2 B, D]`.
    fn of(modulation: &Modulation, [batch, tokens]: [usize; 2], target_tokens: Option<usize>) -> Result<Self> {
        let target = target_tokens.unwrap_or(tokens);
        let halves = [(0, target, 0), (target, tokens - target, batch)];
        let part = |(first, tokens, row): (usize, usize, usize)| {
            let mut modulation = modulation.clone();
            for chunk in &mut modulation {
                *chunk = chunk.narrow(0, row, batch)?.contiguous()?;
            }
            Ok(Part { tokens: [first, tokens], modulation })
        };
        Ok(Self(halves.into_iter().filter(|(_, tokens, _)| *tokens > 0).map(part).collect::<Result<_>>()?))
    }

    /// What `f` makes of each part of `xs: [B, L_img, ..]`, side by side again.
    fn each<const N: usize>(&self, xs: [&Tensor; N], f: impl Fn([&Tensor; N], &Modulation) -> Result<Tensor>) -> Result<Tensor> {
        if let [Part { modulation, .. }] = self.0.as_slice() {
            return f(xs, modulation);
        }
        let part = |Part { tokens: [first, tokens], modulation }: &Part| {
            let mut cut = xs.map(Tensor::clone);
            for x in &mut cut {
                *x = x.narrow(1, *first, *tokens)?.contiguous()?;
            }
            f(cut.each_ref(), modulation)
        };
        Ok(Tensor::cat(&self.0.iter().map(part).collect::<Result<Vec<_>>>()?, 1)?)
    }
}
