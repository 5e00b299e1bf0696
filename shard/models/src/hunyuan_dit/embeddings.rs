//! Embeddings of time, text, size and style.

use parallel::ops::{self, Activation};
use parallel::{ColumnParallelLinear, RowParallelLinear, Shard, Tensor, Tensors, Weights};

use super::HunyuanDiTConfig;
use crate::mmdit::embeddings::{Mlp, ParallelMlp, TIME_CHANNELS, timestep_embedding};
use crate::mmdit::layers::{column, row};
use crate::{Error, Result};

/// Heads of [`AttentionPool`].
pub(super) const POOLER_HEADS: usize = 8;
/// Numbers of `image_meta_size`: the original size, the target size, and where the one was cropped from the other.
const SIZES: usize = 6;

/// `HunyuanCombinedTimestepTextSizeStyleEmbedding`
#[derive(Debug)]
pub(super) struct TimestepTextSizeStyleEmbedding {
    timestep_embedder: Mlp,
    pooler: AttentionPool,
    /// There is one style: `[1, D]`. Up to version 1.1.
    style_embedder: Option<Tensor>,
    extra_embedder: ParallelMlp,
}

impl TimestepTextSizeStyleEmbedding {
    pub(super) fn load(w: &Weights, config: &HunyuanDiTConfig) -> Result<Self> {
        let (d, pooled) = (config.inner_dim(), config.pooled_projection_dim);
        let style = config.use_style_cond_and_image_meta_size;
        let extra = if style { pooled + SIZES * TIME_CHANNELS + d } else { pooled };
        let table = || w.get("style_embedder.weight", &[1, d], Shard::Replicated);
        Ok(Self {
            timestep_embedder: Mlp::load(&w.pp("timestep_embedder"), TIME_CHANNELS, d)?,
            pooler: AttentionPool::load(&w.pp("pooler"), config)?,
            style_embedder: style.then(table).transpose()?,
            extra_embedder: ParallelMlp::load(&w.pp("extra_embedder"), [extra, 4 * d, d], Activation::Silu)?,
        })
    }

    /// `temb: [B, D]`, on every rank.
    pub(super) fn forward(&self, inputs: &Tensors) -> Result<Tensor> {
        let text = inputs.get("encoder_hidden_states_t5")?;
        let embed = |t: &Tensor| timestep_embedding(t, TIME_CHANNELS, 1.0)?.to_dtype(text.dtype()).map_err(Error::from);
        let timesteps_emb = self.timestep_embedder.forward(&embed(inputs.get("timestep")?)?)?;
        let mut extra_cond = self.pooler.forward(text)?; // [B, P]
        if let Some(style_embedder) = &self.style_embedder {
            let image_meta_size = inputs.get("image_meta_size")?;
            let (b, sizes) = image_meta_size.dims2()?;
            let size = embed(image_meta_size)?.reshape((b, sizes * TIME_CHANNELS))?; // [B 6, 256] -> [B, 6 256]
            let style = style_embedder.index_select(inputs.get("style")?, 0)?; // [B, D]
            extra_cond = Tensor::cat(&[&extra_cond, &size, &style], 1)?;
        }
        Ok((timesteps_emb + self.extra_embedder.forward(&extra_cond)?)?)
    }
}

/// `HunyuanDiTAttentionPool`: the mean of T5's states attends to itself and to them. Its heads are divided over the ranks.
#[derive(Debug)]
struct AttentionPool {
    /// `[1 + L, D]`
    positional_embedding: Tensor,
    q_proj: ColumnParallelLinear,
    k_proj: ColumnParallelLinear,
    v_proj: ColumnParallelLinear,
    c_proj: RowParallelLinear,
    heads: usize,
}

impl AttentionPool {
    fn load(w: &Weights, config: &HunyuanDiTConfig) -> Result<Self> {
        let (d, l) = (config.cross_attention_dim_t5, config.text_len_t5);
        Ok(Self {
            positional_embedding: w.get("positional_embedding", &[1 + l, d], Shard::Replicated)?,
            q_proj: column(&w.pp("q_proj"), d, d)?,
            k_proj: column(&w.pp("k_proj"), d, d)?,
            v_proj: column(&w.pp("v_proj"), d, d)?,
            c_proj: row(&w.pp("c_proj"), &[d], config.pooled_projection_dim)?,
            heads: POOLER_HEADS / w.group().size(),
        })
    }

    /// `[B, L, D] -> [B, P]`
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let (_, l, _) = x.dims3()?;
        let places = self.positional_embedding.dim(0)?;
        if l + 1 != places {
            let reason = format!("{l} tokens, where {} have a place", places - 1);
            return Err(Error::Invalid { field: "encoder_hidden_states_t5", reason });
        }
        let x = Tensor::cat(&[&x.mean_keepdim(1)?, x], 1)?; // [B, 1 + L, D]
        let x = x.broadcast_add(&self.positional_embedding)?;
        let heads = |x: &Tensor| ops::split_heads(x, self.heads); // [B, L, D/tp] -> [B, N/tp, L, Dh]
        let q = heads(&self.q_proj.forward(&x.narrow(1, 0, 1)?.contiguous()?)?)?;
        let [k, v] = ColumnParallelLinear::forward_all([&self.k_proj, &self.v_proj], &x)?;
        let scale = 1.0 / (q.dim(3)? as f64).sqrt();
        let pooled = ops::attention(&q, &heads(&k)?, &heads(&v)?, scale, None)?;
        Ok(self.c_proj.forward(&ops::merge_heads(&pooled)?)?.squeeze(1)?)
    }
}
