//! `FluxAttention`: heads divided over the ranks, q and k normalised per head and rotated by position.

use parallel::{ColumnParallelLinear, DType, RowParallelLinear, Shard, Tensor, Weights, ops};

use super::FluxTransformerConfig;
use super::layers::{EPS, Rope, column, row};
use crate::Result;

/// Attention of a single-stream block, which has no output projection of its own.
#[derive(Debug)]
pub(super) struct FluxAttention {
    qkv: Projections,
}

impl FluxAttention {
    pub(super) fn load(w: &Weights, config: &FluxTransformerConfig) -> Result<Self> {
        Ok(Self { qkv: Projections::load(w, config, ["to_q", "to_k", "to_v", "norm_q", "norm_k"])? })
    }

    /// `[B, L, D]`, equal on every rank, gives this rank's heads: `[B, L, D/tp]`.
    pub(super) fn forward(&self, hidden_states: &Tensor, rope: &Rope) -> Result<Tensor> {
        let [query, key, value] = self.qkv.forward(hidden_states)?;
        attention(&query, &key, &value, rope)
    }
}

/// Attention of a double-stream block: text and image are projected apart and attend together.
#[derive(Debug)]
pub(super) struct FluxJointAttention {
    qkv: Projections,
    added_qkv: Projections,
    to_out: RowParallelLinear,
    to_add_out: RowParallelLinear,
}

impl FluxJointAttention {
    pub(super) fn load(w: &Weights, config: &FluxTransformerConfig) -> Result<Self> {
        let d = config.inner_dim();
        let added = ["add_q_proj", "add_k_proj", "add_v_proj", "norm_added_q", "norm_added_k"];
        Ok(Self {
            qkv: Projections::load(w, config, ["to_q", "to_k", "to_v", "norm_q", "norm_k"])?,
            added_qkv: Projections::load(w, config, added)?,
            to_out: row(&w.pp("to_out.0"), &[d], d)?,
            to_add_out: row(&w.pp("to_add_out"), &[d], d)?,
        })
    }

    /// `hidden_states: [B, L_img, D]` and `encoder_hidden_states: [B, L_txt, D]`, equal on every rank, give the same shapes
    /// in the same order, equal on every rank. In between, a rank holds `N/tp` heads.
    pub(super) fn forward(
        &self,
        hidden_states: &Tensor,
        encoder_hidden_states: &Tensor,
        rope: &Rope,
    ) -> Result<(Tensor, Tensor)> {
        let [query, key, value] = self.qkv.forward(hidden_states)?; // [B, N/tp, L_img, Dh]
        let [encoder_query, encoder_key, encoder_value] = self.added_qkv.forward(encoder_hidden_states)?; // [B, N/tp, L_txt, Dh]
        let query = Tensor::cat(&[encoder_query, query], 2)?;
        let key = Tensor::cat(&[encoder_key, key], 2)?;
        let value = Tensor::cat(&[encoder_value, value], 2)?;
        let joint = attention(&query, &key, &value, rope)?; // [B, L_txt + L_img, D/tp]
        let (l_txt, l_img) = (encoder_hidden_states.dim(1)?, hidden_states.dim(1)?);
        let encoder_hidden_states = joint.narrow(1, 0, l_txt)?.contiguous()?;
        let hidden_states = joint.narrow(1, l_txt, l_img)?.contiguous()?;
        Ok((self.to_out.forward(&hidden_states)?, self.to_add_out.forward(&encoder_hidden_states)?))
    }
}

/// Query, key and value of one stream, of this rank's heads.
#[derive(Debug)]
struct Projections {
    to_q: ColumnParallelLinear,
    to_k: ColumnParallelLinear,
    to_v: ColumnParallelLinear,
    /// One head wide: `[Dh]`, the same for all heads, so whole on every rank.
    norm_q: Tensor,
    norm_k: Tensor,
    /// `N/tp`
    heads: usize,
}

impl Projections {
    fn load(w: &Weights, config: &FluxTransformerConfig, [q, k, v, norm_q, norm_k]: [&str; 5]) -> Result<Self> {
        let d = config.inner_dim();
        let norm = |name: &str| w.pp(name).get("weight", &[config.attention_head_dim], Shard::Replicated);
        Ok(Self {
            to_q: column(&w.pp(q), d, d)?,
            to_k: column(&w.pp(k), d, d)?,
            to_v: column(&w.pp(v), d, d)?,
            norm_q: norm(norm_q)?,
            norm_k: norm(norm_k)?,
            heads: config.num_attention_heads / w.group().size(),
        })
    }

    /// `[B, L, D]` gives three of `[B, N/tp, L, Dh]`, q and k normalised.
    fn forward(&self, x: &Tensor) -> Result<[Tensor; 3]> {
        let query = ops::split_heads(&self.to_q.forward(x)?, self.heads)?;
        let key = ops::split_heads(&self.to_k.forward(x)?, self.heads)?;
        let value = ops::split_heads(&self.to_v.forward(x)?, self.heads)?;
        Ok([ops::rms_norm(&query, &self.norm_q, EPS)?, ops::rms_norm(&key, &self.norm_k, EPS)?, value])
    }
}

/// `[B, N/tp, L, Dh]` each gives `[B, L, D/tp]`.
fn attention(query: &Tensor, key: &Tensor, value: &Tensor, rope: &Rope) -> Result<Tensor> {
    let scale = 1.0 / (query.dim(3)? as f64).sqrt();
    let (query, key) = (rotate(query, rope)?, rotate(key, rope)?);
    Ok(ops::merge_heads(&ops::attention(&query, &key, value, scale, None)?)?)
}

/// The reference rotates in f32, whatever the type of the weights.
fn rotate(x: &Tensor, rope: &Rope) -> Result<Tensor> {
    let y = ops::rope_interleaved(&x.to_dtype(DType::F32)?, &rope.cos, &rope.sin)?;
    Ok(y.to_dtype(x.dtype())?)
}
