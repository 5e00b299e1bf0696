//! Attention of the image's tokens to themselves or to a text's, with an output projection: heads divided over the ranks.

use parallel::{ColumnParallelLinear, RowParallelLinear, Tensor, Weights, ops};

use super::attention::Rope;
use super::layers::{EPS, LayerNorm, column, row};
use crate::Result;

/// What a text's hidden tokens have added to their scores.
const MASKED: f64 = -10_000.0;

/// `Attention`, of this rank's heads.
#[derive(Debug)]
pub(crate) struct Attention {
    to_q: ColumnParallelLinear,
    to_k: ColumnParallelLinear,
    to_v: ColumnParallelLinear,
    to_out: RowParallelLinear,
    /// Of query and key, one head wide.
    norms: Option<[LayerNorm; 2]>,
    /// `N/tp`
    heads: usize,
}

/// What is attended to besides oneself.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Text<'a> {
    /// `[B, L_txt, D_txt]`
    pub(crate) tokens: &'a Tensor,
    /// Added to the scores: `[B, 1, 1, L_txt]`.
    pub(crate) mask: Option<&'a Tensor>,
}

impl Attention {
    /// Of tokens of width `d` to those of width `d_keys`, without norms.
    pub(crate) fn load(w: &Weights, [d, d_keys]: [usize; 2], heads: usize) -> Result<Self> {
        Ok(Self {
            to_q: column(&w.pp("to_q"), d, d)?,
            to_k: column(&w.pp("to_k"), d_keys, d)?,
            to_v: column(&w.pp("to_v"), d_keys, d)?,
            to_out: row(&w.pp("to_out.0"), &[d], d)?,
            norms: None,
            heads: heads / w.group().size(),
        })
    }

    /// As [`Self::load`], with a layer norm of every head of query and key.
    pub(crate) fn load_normed(w: &Weights, [d, d_keys]: [usize; 2], heads: usize) -> Result<Self> {
        let norm = |name| LayerNorm::load(&w.pp(name), d / heads, EPS);
        let norms = Some([norm("norm_q")?, norm("norm_k")?]);
        Ok(Self { norms, ..Self::load(w, [d, d_keys], heads)? })
    }

    /// `x: [B, L, D]` attends to `text`, or to itself. `rope` rotates what is of `x`.
    pub(crate) fn forward(&self, x: &Tensor, text: Option<Text<'_>>, rope: Option<&Rope>) -> Result<Tensor> {
        let [q, k, v] = match text {
            None => ColumnParallelLinear::forward_all([&self.to_q, &self.to_k, &self.to_v], x)?,
            Some(text) => {
                let [k, v] = ColumnParallelLinear::forward_all([&self.to_k, &self.to_v], text.tokens)?;
                [self.to_q.forward(x)?, k, v]
            }
        };
        let (mut q, mut k, v) = (self.split(&q)?, self.split(&k)?, self.split(&v)?);
        if let Some([norm_q, norm_k]) = &self.norms {
            (q, k) = (norm_q.forward(&q)?, norm_k.forward(&k)?);
        }
        if let Some(Rope { cos, sin }) = rope {
            let rotated = |x: &Tensor| ops::join_heads(&[ops::HeadStream { x, norm: None }], EPS, Some([cos, sin]));
            q = rotated(&q)?;
            k = if text.is_none() { rotated(&k)? } else { k };
        }
        let scale = 1.0 / (q.dim(3)? as f64).sqrt();
        let mask = text.and_then(|text| text.mask);
        Ok(self.to_out.forward(&ops::attention_of_tokens(&q, &k, &v, scale, mask)?)?)
    }

    /// `[B, L, D/tp] -> [B, L, N/tp, Dh]`
    fn split(&self, x: &Tensor) -> Result<Tensor> {
        let (b, l, d) = x.dims3()?;
        Ok(x.reshape((b, l, self.heads, d / self.heads))?)
    }
}

/// What a text's mask of zeros and ones, `[B, L]`, adds to the scores: `[B, 1, 1, L]`, of the type of `x`.
pub(crate) fn masked_scores(mask: &Tensor, x: &Tensor) -> Result<Tensor> {
    let (b, l) = mask.dims2()?;
    Ok(mask.to_dtype(x.dtype())?.affine(-MASKED, MASKED)?.reshape((b, 1, 1, l))?) // 1 - mask, times the number
}
