//! Attention of text and image: heads divided over the ranks, q and k normalised per head and rotated by position.

use parallel::{ColumnParallelLinear, DType, Shard, Tensor, Weights, ops};

use super::layers::{EPS, column};
use crate::Result;

/// Query, key, value and the norms of the first two, of the image or of a single stream.
pub(crate) const QKV: [&str; 5] = ["to_q", "to_k", "to_v", "norm_q", "norm_k"];
/// The same of the text.
pub(crate) const ADDED_QKV: [&str; 5] = ["add_q_proj", "add_k_proj", "add_v_proj", "norm_added_q", "norm_added_k"];

/// Rotations by position, of interleaved pairs.
pub(crate) struct Rope {
    /// `[L, Dh/2]`
    pub(crate) cos: Tensor,
    /// `[L, Dh/2]`
    pub(crate) sin: Tensor,
}

/// What the attentions of a network have in common.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Heads {
    /// `N`
    pub(crate) count: usize,
    /// `Dh`
    pub(crate) width: usize,
    /// Whether query and key have an RMS norm.
    pub(crate) qk_norm: bool,
}

impl Heads {
    /// `D`
    fn inner_dim(self) -> usize {
        self.count * self.width
    }
}

/// Query, key and value of one stream, of this rank's heads.
#[derive(Debug)]
pub(crate) struct Qkv {
    to_q: ColumnParallelLinear,
    to_k: ColumnParallelLinear,
    to_v: ColumnParallelLinear,
    /// Of query and key, one head wide: `[Dh]`, the same for all heads, so whole on every rank.
    norms: Option<[Tensor; 2]>,
    /// `N/tp`
    heads: usize,
}

impl Qkv {
    pub(crate) fn load(w: &Weights, heads: Heads, [q, k, v, norm_q, norm_k]: [&str; 5]) -> Result<Self> {
        let d = heads.inner_dim();
        let norm = |name: &str| w.pp(name).get("weight", &[heads.width], Shard::Replicated);
        Ok(Self {
            to_q: column(&w.pp(q), d, d)?,
            to_k: column(&w.pp(k), d, d)?,
            to_v: column(&w.pp(v), d, d)?,
            norms: if heads.qk_norm { Some([norm(norm_q)?, norm(norm_k)?]) } else { None },
            heads: heads.count / w.group().size(),
        })
    }

    /// `[B, L, D]`, equal on every rank, gives the attention of this rank's heads within it: `[B, L, D/tp]`.
    pub(crate) fn attend(&self, x: &Tensor, rope: Option<&Rope>) -> Result<Tensor> {
        let [query, key, value] = self.project(x)?;
        attention(&query, &key, &value, rope, None)
    }

    /// `[B, L, D]` gives three of `[B, L, N/tp, Dh]`, q and k normalised.
    fn project(&self, x: &Tensor) -> Result<[Tensor; 3]> {
        let heads = |y: Tensor| -> Result<Tensor> {
            let (b, l, d) = y.dims3()?;
            Ok(y.reshape((b, l, self.heads, d / self.heads))?)
        };
        let [query, key, value] = ColumnParallelLinear::forward_all([&self.to_q, &self.to_k, &self.to_v], x)?;
        let (query, key, value) = (heads(query)?, heads(key)?, heads(value)?);
        match &self.norms {
            Some([norm_q, norm_k]) => Ok([ops::rms_norm(&query, norm_q, EPS)?, ops::rms_norm(&key, norm_k, EPS)?, value]),
            None => Ok([query, key, value]),
        }
    }
}

/// Which stream comes first where both attend together; tables of positions and masks are in this order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Order {
    /// FLUX, Qwen-Image.
    TextImage,
    /// Stable Diffusion 3.
    ImageText,
}

/// Text and image are projected apart and attend together. What follows, the output projections, is the block's.
#[derive(Debug)]
pub(crate) struct JointQkv {
    qkv: Qkv,
    added_qkv: Qkv,
    order: Order,
}

impl JointQkv {
    pub(crate) fn load(w: &Weights, heads: Heads, order: Order) -> Result<Self> {
        Ok(Self { qkv: Qkv::load(w, heads, QKV)?, added_qkv: Qkv::load(w, heads, ADDED_QKV)?, order })
    }

    /// `hidden_states: [B, L_img, D]` and `encoder_hidden_states: [B, L_txt, D]`, equal on every rank, give this rank's heads
    /// in the same order: `[B, L_img, D/tp]`, `[B, L_txt, D/tp]`. `mask` is added to the scores, `[B, 1, 1, L_txt + L_img]`.
    pub(crate) fn attend(
        &self,
        hidden_states: &Tensor,
        encoder_hidden_states: &Tensor,
        rope: Option<&Rope>,
        mask: Option<&Tensor>,
    ) -> Result<(Tensor, Tensor)> {
        let image = self.qkv.project(hidden_states)?; // [B, L_img, N/tp, Dh]
        let text = self.added_qkv.project(encoder_hidden_states)?; // [B, L_txt, N/tp, Dh]
        let (first, second) = if self.order == Order::TextImage { (text, image) } else { (image, text) };
        let join = |i: usize| Tensor::cat(&[&first[i], &second[i]], 1);
        let joint = attention(&join(0)?, &join(1)?, &join(2)?, rope, mask)?; // [B, L_txt + L_img, D/tp]
        let (l_img, l_txt) = (hidden_states.dim(1)?, encoder_hidden_states.dim(1)?);
        let (image_at, text_at) = if self.order == Order::TextImage { (l_txt, 0) } else { (0, l_img) };
        Ok((joint.narrow(1, image_at, l_img)?.contiguous()?, joint.narrow(1, text_at, l_txt)?.contiguous()?))
    }
}

/// `[B, L, N/tp, Dh]` each gives `[B, L, D/tp]`.
fn attention(query: &Tensor, key: &Tensor, value: &Tensor, rope: Option<&Rope>, mask: Option<&Tensor>) -> Result<Tensor> {
    let scale = 1.0 / (query.dim(3)? as f64).sqrt();
    Ok(match rope {
        Some(rope) => ops::attention_of_tokens(&rotate(query, rope)?, &rotate(key, rope)?, value, scale, mask)?,
        None => ops::attention_of_tokens(query, key, value, scale, mask)?,
    })
}

/// The reference rotates in f32, whatever the type of the weights.
fn rotate(x: &Tensor, rope: &Rope) -> Result<Tensor> {
    let y = ops::rope_interleaved(&x.to_dtype(DType::F32)?, &rope.cos, &rope.sin)?;
    Ok(y.to_dtype(x.dtype())?)
}
