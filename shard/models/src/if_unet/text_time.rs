//! `TextTimeEmbedding`: a text's states, pooled by attention of their mean, beside the timestep.

use parallel::{Linear, Shard, Tensor, Weights, ops};

use super::IfUNetConfig;
use crate::Result;
use crate::mmdit::layers::{LayerNorm, linear};

const EPS: f64 = 1e-5;

#[derive(Debug)]
pub(super) struct TextTimeEmbedding {
    norm1: LayerNorm,
    pool: AttentionPooling,
    proj: Linear,
    norm2: LayerNorm,
}

impl TextTimeEmbedding {
    pub(super) fn load(w: &Weights, config: &IfUNetConfig) -> Result<Self> {
        let (text, d) = (config.encoder_hid_dim, config.time_embed_dim());
        Ok(Self {
            norm1: LayerNorm::load(&w.pp("norm1"), text, EPS)?,
            pool: AttentionPooling::load(&w.pp("pool"), text, config.addition_embed_type_num_heads)?,
            proj: linear(&w.pp("proj"), text, d)?,
            norm2: LayerNorm::load(&w.pp("norm2"), d, EPS)?,
        })
    }

    /// `text: [B, L, D_txt]` gives `[B, D]`.
    pub(super) fn forward(&self, text: &Tensor) -> Result<Tensor> {
        let pooled = self.pool.forward(&self.norm1.forward(text)?)?;
        self.norm2.forward(&self.proj.forward(&pooled)?)
    }
}

#[derive(Debug)]
struct AttentionPooling {
    /// `[1, D]`
    positional_embedding: Tensor,
    q_proj: Linear,
    k_proj: Linear,
    v_proj: Linear,
    heads: usize,
}

impl AttentionPooling {
    fn load(w: &Weights, d: usize, heads: usize) -> Result<Self> {
        let project = |name| linear(&w.pp(name), d, d);
        Ok(Self {
            positional_embedding: w.get("positional_embedding", &[1, d], Shard::Replicated)?,
            q_proj: project("q_proj")?,
            k_proj: project("k_proj")?,
            v_proj: project("v_proj")?,
            heads,
        })
    }

    /// `[B, L, D]` gives `[B, D]`.
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let (b, _, d) = x.dims3()?;
        let token = x.mean_keepdim(1)?.broadcast_add(&self.positional_embedding)?; // [B, 1, D]
        let x = Tensor::cat(&[&token, x], 1)?; // [B, 1 + L, D]
        let heads = |x: &Tensor| -> Result<Tensor> {
            let (b, l, d) = x.dims3()?;
            Ok(x.reshape((b, l, self.heads, d / self.heads))?)
        };
        let q = heads(&self.q_proj.forward(&token)?)?;
        let (k, v) = (heads(&self.k_proj.forward(&x)?)?, heads(&self.v_proj.forward(&x)?)?);
        let scale = 1.0 / ((d / self.heads) as f64).sqrt();
        Ok(ops::attention_of_tokens(&q, &k, &v, scale, None)?.reshape((b, d))?)
    }
}
