//! The text model's layers, and the feed-forward part that the vision tower shares.

use parallel::linear::share;
use parallel::{Linear, RowParallelLinear, Shard, Tensor, Weights, ops};

use super::config::{ACTIVATION, Qwen25VlConfig};
use super::heads::HeadShare;
use super::positions::Rope;
use crate::Result;
use crate::autoencoder_kl::Tap;

/// `Qwen2_5_VLDecoderLayer`: attention and a gated feed-forward part, each with its norm before and its residual around.
#[derive(Debug)]
pub(super) struct DecoderLayer {
    input_layernorm: Tensor,
    self_attn: Attention,
    post_attention_layernorm: Tensor,
    mlp: Mlp,
    eps: f64,
}

impl DecoderLayer {
    pub(super) fn load(w: &Weights, config: &Qwen25VlConfig) -> Result<Self> {
        let d = config.hidden_size;
        let norm = |name: &str| w.pp(name).get("weight", &[d], Shard::Replicated);
        Ok(Self {
            input_layernorm: norm("input_layernorm")?,
            self_attn: Attention::load(&w.pp("self_attn"), config)?,
            post_attention_layernorm: norm("post_attention_layernorm")?,
            mlp: Mlp::load(&w.pp("mlp"), [d, config.intermediate_size])?,
            eps: config.rms_norm_eps,
        })
    }

    /// `x: [B, L, D]` and `mask: [1 or B, 1, L, L]`, equal on every rank, give the new `x`, equal on every rank.
    pub(super) fn forward(&self, x: &Tensor, mask: &Tensor, rope: &Rope, tap: Tap) -> Result<Tensor> {
        let attended = self.self_attn.forward(&ops::rms_norm(x, &self.input_layernorm, self.eps)?, mask, rope)?;
        tap("self_attn.0", &attended);
        let x = (x + attended)?;
        let y = self.mlp.forward(&ops::rms_norm(&x, &self.post_attention_layernorm, self.eps)?)?;
        tap("mlp", &y);
        Ok((x + y)?)
    }
}

/// `Qwen2_5_VLAttention`: several heads of queries for one of keys and values.
#[derive(Debug)]
struct Attention {
    q_proj: Linear,
    k_proj: Linear,
    v_proj: Linear,
    o_proj: RowParallelLinear,
    heads: HeadShare,
    scale: f64,
}

impl Attention {
    fn load(w: &Weights, config: &Qwen25VlConfig) -> Result<Self> {
        let (d, width) = (config.hidden_size, config.head_dim());
        let heads = HeadShare::new([config.num_attention_heads, config.num_key_value_heads, width], &**w.group());
        let kv = config.num_key_value_heads * width;
        let project = |name: &str, d_out: usize, rows| {
            Ok::<_, crate::Error>(Linear::load_rows(with_bias(&w.pp(name))?, [d, d_out], &[rows])?)
        };
        Ok(Self {
            q_proj: project("q_proj", d, heads.query_rows(0))?,
            k_proj: project("k_proj", kv, heads.kv_rows(0))?,
            v_proj: project("v_proj", kv, heads.kv_rows(0))?,
            o_proj: RowParallelLinear::load(&w.pp("o_proj"), &[d], d)?,
            heads,
            scale: 1.0 / (width as f64).sqrt(),
        })
    }

    fn forward(&self, x: &Tensor, mask: &Tensor, rope: &Rope) -> Result<Tensor> {
        let q = rope.turn(&self.heads.split_queries(&self.q_proj.forward(x)?)?)?; // [B, N here, L, Dh]
        let k = rope.turn(&self.heads.split_kv(&self.k_proj.forward(x)?)?)?; // [B, N_kv here, L, Dh]
        let v = self.heads.split_kv(&self.v_proj.forward(x)?)?;
        let (k, v) = (self.heads.spread(&k)?, self.heads.spread(&v)?); // [B, N here, L, Dh]
        let attended = ops::attention(&q, &k, &v, self.scale, Some(mask))?;
        Ok(self.o_proj.forward(&self.heads.merge(&attended)?)?)
    }
}

/// `down_proj(silu(gate_proj x) * up_proj x)`, its columns divided over the ranks as evenly as can be: the published vision tower
/// has 3420.
#[derive(Debug)]
pub(super) struct Mlp {
    gate_proj: Linear,
    up_proj: Linear,
    down_proj: RowParallelLinear,
}

impl Mlp {
    /// With biases where the checkpoint has them.
    pub(super) fn load(w: &Weights, [d, inner]: [usize; 2]) -> Result<Self> {
        let mine = [share(inner, &**w.group())];
        Ok(Self {
            gate_proj: Linear::load_rows(&w.pp("gate_proj"), [d, inner], &mine)?,
            up_proj: Linear::load_rows(&w.pp("up_proj"), [d, inner], &mine)?,
            down_proj: RowParallelLinear::load_uneven(&w.pp("down_proj"), inner, d)?,
        })
    }

    /// As [`Self::load`], with biases.
    pub(super) fn load_biased(w: &Weights, sizes: [usize; 2]) -> Result<Self> {
        for name in ["gate_proj", "up_proj", "down_proj"] {
            with_bias(&w.pp(name))?;
        }
        Self::load(w, sizes)
    }

    /// `[.., D]` on every rank gives `[.., D]` on every rank.
    pub(super) fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let gate = ops::activate(&self.gate_proj.forward(x)?, ACTIVATION)?;
        Ok(self.down_proj.forward(&(gate * self.up_proj.forward(x)?)?)?)
    }
}

/// `w`, if it has a bias: a layer takes a checkpoint without one for a layer without one.
pub(super) fn with_bias(w: &Weights) -> Result<&Weights> {
    if !w.contains("bias") {
        w.get("bias", &[], Shard::Replicated)?; // a `MissingTensor` with the full name
    }
    Ok(w)
}
