//! `HunyuanDiTBlock`.

use parallel::linear::share;
use parallel::ops::{self, Activation};
use parallel::{ColumnParallelLinear, Linear, RowParallelLinear, Tensor, Weights};

use super::HunyuanDiTConfig;
use crate::Result;
use crate::mmdit::attention::Rope;
use crate::mmdit::cross_attention::{Attention, Text};
use crate::mmdit::layers::{AdaLayerNorm, EPS, LayerNorm, column, with_bias};

/// Attention among the tokens, to the texts, and feed-forward; before them, in the second half, a long skip connection.
#[derive(Debug)]
pub(super) struct HunyuanDiTBlock {
    skip: Option<Skip>,
    norm1: AdaLayerNormShift,
    attn1: Attention,
    norm2: LayerNorm,
    attn2: Attention,
    norm3: LayerNorm,
    ff: FeedForward,
}

impl HunyuanDiTBlock {
    /// Block `index` of the row.
    pub(super) fn load(w: &Weights, config: &HunyuanDiTConfig, index: usize) -> Result<Self> {
        let (d, heads) = (config.inner_dim(), config.num_attention_heads);
        let skip = || -> Result<Skip> {
            let norm = LayerNorm::load(&w.pp("skip_norm"), 2 * d, EPS)?;
            Ok(Skip { norm, linear: column(&w.pp("skip_linear"), 2 * d, d)? })
        };
        Ok(Self {
            skip: config.skip_of(index).map(|_| skip()).transpose()?,
            norm1: AdaLayerNormShift::load(&w.pp("norm1"), d)?,
            attn1: Attention::load_normed(&w.pp("attn1"), [d, d], heads)?,
            norm2: LayerNorm::load(&w.pp("norm2"), d, EPS)?,
            attn2: Attention::load_normed(&w.pp("attn2"), [d, config.cross_attention_dim], heads)?,
            norm3: LayerNorm::load(&w.pp("norm3"), d, EPS)?,
            ff: FeedForward::load(&w.pp("ff"), d, config.ff_inner_dim())?,
        })
    }

    /// `x: [B, L_img, D]`, in the second half `skip` like it, and `temb: [B, D]`, equal on every rank, give the new `x`, equal on every rank.
    pub(super) fn forward(
        &self,
        mut x: Tensor,
        skip: Option<&Tensor>,
        text: Text<'_>,
        temb: &Tensor,
        rope: &Rope,
    ) -> Result<Tensor> {
        if let (Some(layers), Some(skip)) = (&self.skip, skip) {
            x = layers.linear.forward_gathered(&layers.norm.forward(&ops::join(&x, skip)?)?)?; // [B, L, 2 D] -> [B, L, D]
        }
        let x = (&x + self.attn1.forward(&self.norm1.forward(&x, temb)?, None, Some(rope))?)?;
        let x = (&x + self.attn2.forward(&self.norm2.forward(&x)?, Some(text), Some(rope))?)?;
        Ok((&x + self.ff.forward(&self.norm3.forward(&x)?)?)?)
    }
}

/// A long skip connection.
#[derive(Debug)]
struct Skip {
    norm: LayerNorm,
    linear: ColumnParallelLinear,
}

/// `AdaLayerNormShift`: a layer norm, and a projection of `temb` that is added.
#[derive(Debug)]
struct AdaLayerNormShift {
    norm: LayerNorm,
    linear: AdaLayerNorm,
}

impl AdaLayerNormShift {
    fn load(w: &Weights, d: usize) -> Result<Self> {
        Ok(Self { norm: LayerNorm::load(&w.pp("norm"), d, EPS)?, linear: AdaLayerNorm::load(&w.pp("linear"), d, 1)? })
    }

    fn forward(&self, x: &Tensor, temb: &Tensor) -> Result<Tensor> {
        let [shift] = self.linear.modulation(temb)?; // [B, D]
        Ok(self.norm.forward(x)?.broadcast_add(&shift.unsqueeze(1)?)?)
    }
}

/// `FeedForward` with `gelu-approximate`, of a width that need not be a multiple of anything: ranks have as equal shares of it as can be.
#[derive(Debug)]
struct FeedForward {
    proj: Linear,
    out: RowParallelLinear,
}

impl FeedForward {
    fn load(w: &Weights, d: usize, inner: usize) -> Result<Self> {
        let (net, mine) = (w.pp("net"), share(inner, &**w.group()));
        Ok(Self {
            proj: Linear::load_rows(with_bias(&net.pp("0.proj"))?, [d, inner], &[mine])?,
            out: RowParallelLinear::load_uneven(with_bias(&net.pp(2))?, inner, d)?,
        })
    }

    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        Ok(self.out.forward(&ops::activate(&self.proj.forward(x)?, Activation::GeluTanh)?)?)
    }
}
