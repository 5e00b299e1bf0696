//! Attention of text and image: heads divided over the ranks, q and k normalised per head and rotated by position.

use parallel::{ColumnParallelLinear, Shard, Tensor, Weights, ops};

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
        attention(&[self.project(x)?], rope, None)
    }

    /// `x: [B, L, D]`
    fn project(&self, x: &Tensor) -> Result<Projected<'_>> {
        let mut projected = ColumnParallelLinear::forward_all([&self.to_q, &self.to_k, &self.to_v], x)?;
        for y in &mut projected {
            let (b, l, d) = y.dims3()?;
            *y = y.reshape((b, l, self.heads, d / self.heads))?;
        }
        Ok(Projected { qkv: projected, norms: self.norms.as_ref() })
    }
}

/// One stream's query, key and value, and the norms of the first two that are still to come.
struct Projected<'a> {
    /// `[B, L, N/tp, Dh]`
    qkv: [Tensor; 3],
    norms: Option<&'a [Tensor; 2]>,
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
        let image = self.qkv.project(hidden_states)?;
        let text = self.added_qkv.project(encoder_hidden_states)?;
        let streams = if self.order == Order::TextImage { [text, image] } else { [image, text] };
        let joint = attention(&streams, rope, mask)?; // [B, L_txt + L_img, D/tp]
        let (l_img, l_txt) = (hidden_states.dim(1)?, encoder_hidden_states.dim(1)?);
        let (image_at, text_at) = if self.order == Order::TextImage { (l_txt, 0) } else { (0, l_img) };
        Ok((joint.narrow(1, image_at, l_img)?.contiguous()?, joint.narrow(1, text_at, l_txt)?.contiguous()?))
    }
}

/// Of all streams' tokens together, `[B, L, D/tp]`.
fn attention(streams: &[Projected<'_>], rope: Option<&Rope>, mask: Option<&Tensor>) -> Result<Tensor> {
    let joined = |i: usize| {
        let streams = streams
            .iter()
            .map(|Projected { qkv, norms }| ops::HeadStream { x: &qkv[i], norm: norms.and_then(|norms| norms.get(i)) });
        // The reference rotates in f32, whatever the type of the weights.
        let rope = rope.filter(|_| i < 2).map(|rope| [&rope.cos, &rope.sin]);
        ops::join_heads(&streams.collect::<Vec<_>>(), EPS, rope)
    };
    let value = if let [Projected { qkv: [.., value], .. }] = streams { value.clone() } else { joined(2)? };
    let (query, key) = (joined(0)?, joined(1)?);
    let scale = 1.0 / (query.dim(3)? as f64).sqrt();
    Ok(ops::attention_of_tokens(&query, &key, &value, scale, mask)?)
}
