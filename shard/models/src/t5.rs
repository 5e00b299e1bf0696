//! The T5 v1.1 and mT5 encoders: C. Raffel et al., "Exploring the Limits of Transfer Learning", <https://arxiv.org/abs/1910.10683>.
//!
//! Follows `transformers/models/t5/modeling_t5.py` (5.23.0). Differences: heads and feed-forward columns are divided over the
//! tensor-parallel group, and so are the columns of the token embedding, which the reference has nothing to compare with; the
//! blocks can be cut into ranges. Every range reads block 0's `relative_attention_bias`, a few kilobytes, and makes the position
//! bias anew, rather than have `[N, L, L]` numbers travel from range to range.

use parallel::ops::{self, Activation};
use parallel::{ColumnParallelLinear, DType, RowParallelLinear, Shard, Tensor, Tensors, Weights};
use serde::Deserialize;

use crate::blocks::{BlockModel, RangeOf};
use crate::token_embedding::TokenEmbedding;
use crate::{Error, Result};

/// `config.json` of a T5 encoder, as published; what is not read here is ignored.
#[derive(Clone, Debug, Deserialize)]
pub struct T5Config {
    /// Tokens, with padding to a round number.
    pub vocab_size: usize,
    /// `D`.
    pub d_model: usize,
    /// `Dh`; `N Dh` need not be `D`.
    pub d_kv: usize,
    /// Width between the two layers of the feed-forward part.
    pub d_ff: usize,
    /// Blocks.
    pub num_layers: usize,
    /// `N`.
    pub num_heads: usize,
    /// Rows of the table of position biases.
    #[serde(default = "default_buckets")]
    pub relative_attention_num_buckets: usize,
    /// Distances from here on share the last bucket.
    #[serde(default = "default_max_distance")]
    pub relative_attention_max_distance: usize,
    /// Of the RMS norms.
    #[serde(default = "default_epsilon")]
    pub layer_norm_epsilon: f64,
    /// `gated-gelu` or `gated-silu`.
    #[serde(default = "default_feed_forward")]
    pub feed_forward_proj: String,
}

fn default_buckets() -> usize {
    32
}

fn default_max_distance() -> usize {
    128
}

fn default_epsilon() -> f64 {
    1e-6
}

fn default_feed_forward() -> String {
    // The reference's default, which v1.1 checkpoints override and this file does not have.
    "relu".to_owned()
}

/// A range of a T5 encoder's blocks, as one rank of a group holds it.
///
/// Inputs `input_ids: [B, L]` and, if padding is to be masked, `attention_mask: [B, L]` of zeros and ones; outputs
/// `last_hidden_state: [B, L, D]` and, of its type, that mask, which who attends to these states needs too. FLUX and SD3 give none.
#[derive(Debug)]
pub struct T5Encoder {
    config: T5Config,
    embedding: Option<TokenEmbedding>,
    position: PositionBias,
    blocks: Vec<Block>,
    final_layer_norm: Option<Tensor>,
}

impl T5Encoder {
    /// Reads this rank's part of the checkpoint whose root is `w`.
    pub fn load(w: &Weights, config: &T5Config, range: RangeOf) -> Result<Self> {
        config.check(w.group().size())?;
        let stack = w.pp("encoder");
        let name = if w.contains("shared.weight") { "shared.weight" } else { "encoder.embed_tokens.weight" };
        let embedding = || TokenEmbedding::load(w, name, [config.vocab_size, config.d_model]);
        let embedding = range.is_first().then(embedding).transpose()?;
        let position = PositionBias::load(&stack.pp("block.0.layer.0.SelfAttention.relative_attention_bias"), config)?;
        let mine = range.of(config.num_layers);
        let blocks = mine.clone().map(|i| Block::load(&stack.pp(format!("block.{i}")), config)).collect::<Result<_>>()?;
        let norm = || stack.get("final_layer_norm.weight", &[config.d_model], Shard::Replicated);
        let final_layer_norm = range.is_last().then(norm).transpose()?;

        // The embedding is stored under either name or both; the other ranges' tensors are theirs to read.
        w.skip("shared");
        w.skip("encoder.embed_tokens");
        stack.skip("final_layer_norm");
        for other in (0..config.num_layers).filter(|i| !mine.contains(i)) {
            stack.skip(format!("block.{other}"));
        }
        w.finish()?;
        Ok(Self { config: config.clone(), embedding, position, blocks, final_layer_norm })
    }

    /// What every block adds to its scores between `length` positions, for this rank's heads: `[1, N/tp, L, L]`.
    pub fn position_bias(&self, length: usize) -> Result<Tensor> {
        self.position.of(length)
    }
}

impl BlockModel for T5Encoder {
    fn embed(&self, inputs: &Tensors) -> Result<Tensors> {
        let embedding = self.embedding.as_ref().ok_or(Error::Payload { stage: "t5 embedding", got: "later block range's" })?;
        let hidden = Tensors::new().with("hidden_states", embedding.forward(inputs.get("input_ids")?)?);
        Ok(match inputs.find("attention_mask") {
            Some(mask) => hidden.with("attention_mask", mask.clone()),
            None => hidden,
        })
    }

    fn blocks(&self, mut hidden: Tensors) -> Result<Tensors> {
        let mut x = hidden.take("hidden_states")?;
        if !self.blocks.is_empty() {
            let mut bias = self.position_bias(x.dim(1)?)?.to_dtype(x.dtype())?;
            if let Some(mask) = hidden.find("attention_mask") {
                bias = bias.broadcast_add(&masked_scores(mask, &x)?)?; // [1, N/tp, L, L] -> [B, N/tp, L, L]
            }
            for block in &self.blocks {
                x = block.forward(&x, &bias, self.config.layer_norm_epsilon)?;
            }
        }
        Ok(hidden.with("hidden_states", x))
    }

    fn output(&self, hidden: Tensors) -> Result<Tensors> {
        let weight =
            self.final_layer_norm.as_ref().ok_or(Error::Payload { stage: "t5 final norm", got: "earlier block range's" })?;
        let x = ops::rms_norm(hidden.get("hidden_states")?, weight, self.config.layer_norm_epsilon)?;
        let mask = hidden.find("attention_mask").map(|mask| mask.to_dtype(x.dtype())).transpose()?;
        let output = Tensors::new().with("last_hidden_state", x);
        Ok(match mask {
            Some(mask) => output.with("attention_mask", mask),
            None => output,
        })
    }
}

impl T5Config {
    /// Refuses what this file does not have, and heads that cannot be divided over `tp` ranks.
    fn check(&self, tp: usize) -> Result<()> {
        self.activation()?;
        if self.relative_attention_num_buckets < 4 {
            let value = self.relative_attention_num_buckets.to_string();
            return Err(Error::Unsupported { field: "relative_attention_num_buckets".into(), value });
        }
        if self.num_heads == 0 || !self.num_heads.is_multiple_of(tp) {
            return Err(parallel::Error::Indivisible { what: "num_heads".into(), size: self.num_heads, tp }.into());
        }
        Ok(())
    }

    fn activation(&self) -> Result<Activation> {
        match self.feed_forward_proj.as_str() {
            "gated-gelu" => Ok(Activation::GeluTanh),
            "gated-silu" => Ok(Activation::Silu),
            other => Err(Error::Unsupported { field: "feed_forward_proj".into(), value: other.to_owned() }),
        }
    }
}

/// What distance does to a score, by head: one table for all blocks.
#[derive(Debug)]
struct PositionBias {
    /// `[N/tp, buckets]`
    table: Tensor,
    buckets: usize,
    max_distance: usize,
}

impl PositionBias {
    fn load(w: &Weights, config: &T5Config) -> Result<Self> {
        let (buckets, heads) = (config.relative_attention_num_buckets, config.num_heads);
        let table = w.get("weight", &[buckets, heads], Shard::split(1, heads))?.t()?.contiguous()?;
        Ok(Self { table, buckets, max_distance: config.relative_attention_max_distance })
    }

    fn of(&self, length: usize) -> Result<Tensor> {
        // A bucket depends on the distance from query to key only, so `2 L - 1` logarithms do.
        let by_distance: Vec<u32> = (0..2 * length).map(|i| self.bucket(i as i64 - length as i64)).collect();
        let buckets: Vec<u32> =
            (0..length).flat_map(|query| by_distance[length - query..].iter().take(length).copied()).collect();
        let buckets = Tensor::from_vec(buckets, length * length, self.table.device())?;
        let heads = self.table.dim(0)?;
        Ok(self.table.index_select(&buckets, 1)?.reshape((1, heads, length, length))?) // [N/tp, L L] -> [1, N/tp, L, L]
    }

    /// The bucket of a key at `distance` behind (or, negative, before) its query. Half of the buckets are for either side; of
    /// these half are for one distance each, the others for ranges that grow as the logarithm.
    fn bucket(&self, distance: i64) -> u32 {
        let side = self.buckets / 2;
        let exact = side / 2;
        let first = if distance > 0 { side } else { 0 };
        let distance = distance.unsigned_abs() as usize;
        let bucket = if distance < exact {
            distance
        } else {
            let along = libm::logf(distance as f32 / exact as f32) / libm::log(self.max_distance as f64 / exact as f64) as f32;
            (exact + (along * (side - exact) as f32) as usize).min(side - 1)
        };
        (first + bucket) as u32
    }
}

/// Zero where `mask: [B, L]` is one and the lowest number where it is zero, for all heads and queries: `[B, 1, 1, L]`.
pub(crate) fn masked_scores(mask: &Tensor, x: &Tensor) -> Result<Tensor> {
    let lowest = match x.dtype() {
        DType::F16 => -65_504.0,
        DType::BF16 => -3.389_531_389_251_535_5e38,
        _ => f64::from(f32::MIN),
    };
    let (b, l) = mask.dims2()?;
    let hidden = mask.to_device(x.device())?.to_dtype(DType::F32)?.affine(-1.0, 1.0)?;
    Ok(hidden.affine(lowest, 0.0)?.to_dtype(x.dtype())?.reshape((b, 1, 1, l))?)
}

/// Self-attention and a gated feed-forward part, each with its norm before and its residual around.
#[derive(Debug)]
struct Block {
    attention_norm: Tensor,
    attention: Attention,
    feed_forward_norm: Tensor,
    feed_forward: FeedForward,
}

impl Block {
    fn load(w: &Weights, config: &T5Config) -> Result<Self> {
        let norm = |layer: usize| w.get(&format!("layer.{layer}.layer_norm.weight"), &[config.d_model], Shard::Replicated);
        Ok(Self {
            attention_norm: norm(0)?,
            attention: Attention::load(&w.pp("layer.0.SelfAttention"), config)?,
            feed_forward_norm: norm(1)?,
            feed_forward: FeedForward::load(&w.pp("layer.1.DenseReluDense"), config)?,
        })
    }

    /// `x: [B, L, D]`, `bias: [1 or B, N/tp, L, L]`.
    fn forward(&self, x: &Tensor, bias: &Tensor, eps: f64) -> Result<Tensor> {
        let x = (x + self.attention.forward(&ops::rms_norm(x, &self.attention_norm, eps)?, bias)?)?;
        Ok((&x + self.feed_forward.forward(&ops::rms_norm(&x, &self.feed_forward_norm, eps)?)?)?)
    }
}

/// Attention without the customary 1 / sqrt(Dh): T5 has it in its initialisation.
#[derive(Debug)]
struct Attention {
    q: ColumnParallelLinear,
    k: ColumnParallelLinear,
    v: ColumnParallelLinear,
    o: RowParallelLinear,
    heads: usize,
}

impl Attention {
    fn load(w: &Weights, config: &T5Config) -> Result<Self> {
        let inner = config.num_heads * config.d_kv;
        let project = |name| ColumnParallelLinear::load(&w.pp(name), config.d_model, &[inner]);
        Ok(Self {
            q: project("q")?,
            k: project("k")?,
            v: project("v")?,
            o: RowParallelLinear::load(&w.pp("o"), &[inner], config.d_model)?,
            heads: config.num_heads / w.group().size(),
        })
    }

    fn forward(&self, x: &Tensor, bias: &Tensor) -> Result<Tensor> {
        let heads = |x: Tensor| ops::split_heads(&x, self.heads); // [B, L, (N Dh)/tp] -> [B, N/tp, L, Dh]
        let [q, k, v] = ColumnParallelLinear::forward_all([&self.q, &self.k, &self.v], x)?;
        let (q, k, v) = (heads(q)?, heads(k)?, heads(v)?);
        let x = ops::attention(&q, &k, &v, 1.0, Some(bias))?;
        Ok(self.o.forward(&ops::merge_heads(&x)?)?)
    }
}

/// `wo(act(wi_0 x) * wi_1 x)`
#[derive(Debug)]
struct FeedForward {
    gate: ColumnParallelLinear,
    up: ColumnParallelLinear,
    down: RowParallelLinear,
    activation: Activation,
}

impl FeedForward {
    fn load(w: &Weights, config: &T5Config) -> Result<Self> {
        Ok(Self {
            gate: ColumnParallelLinear::load(&w.pp("wi_0"), config.d_model, &[config.d_ff])?,
            up: ColumnParallelLinear::load(&w.pp("wi_1"), config.d_model, &[config.d_ff])?,
            down: RowParallelLinear::load(&w.pp("wo"), &[config.d_ff], config.d_model)?,
            activation: config.activation()?,
        })
    }

    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let [gate, up] = ColumnParallelLinear::forward_all([&self.gate, &self.up], x)?;
        Ok(self.down.forward(&(ops::activate(&gate, self.activation)? * up)?)?)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;
    use std::path::Path;
    use std::sync::Arc;
    use std::sync::atomic::Ordering;

    use parallel::{Device, InProcess, Solo};

    use super::*;
    use crate::blocks::{Layout, RankGroup, recv_tensors, send_tensors};

    fn config() -> T5Config {
        let json = r#"{"vocab_size": 50, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 3, "num_heads": 4,
            "feed_forward_proj": "gated-gelu", "dropout_rate": 0.1}"#;
        serde_json::from_str(json).unwrap()
    }

    fn write_weights(dir: &Path) {
        let mut tensors = HashMap::new();
        let mut add = |name: String, shape: &[usize]| {
            let scale = 1.0 / (shape[shape.len() - 1] as f32).sqrt();
            tensors.insert(name, Tensor::randn(0f32, scale, shape, &Device::Cpu).unwrap());
        };
        add("shared.weight".into(), &[50, 32]);
        add("encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight".into(), &[32, 4]);
        for block in 0..3 {
            for name in ["q", "k", "v", "o"] {
                add(format!("encoder.block.{block}.layer.0.SelfAttention.{name}.weight"), &[32, 32]);
            }
            for (name, shape) in [("wi_0", [64, 32]), ("wi_1", [64, 32]), ("wo", [32, 64])] {
                add(format!("encoder.block.{block}.layer.1.DenseReluDense.{name}.weight"), &shape);
            }
            for layer in 0..2 {
                add(format!("encoder.block.{block}.layer.{layer}.layer_norm.weight"), &[32]);
            }
        }
        add("encoder.final_layer_norm.weight".into(), &[32]);
        let copy = tensors["shared.weight"].clone();
        tensors.insert("encoder.embed_tokens.weight".into(), copy);
        candle_core::safetensors::save(&tensors, dir.join("model.safetensors")).unwrap();
    }

    fn inputs() -> Tensors {
        let ids: Vec<u32> = (0..2 * 20).map(|i| i * 7 % 50).collect();
        let mask: Vec<u32> = (0..2 * 20).map(|i| u32::from(i < 33)).collect();
        let tensor = |v: Vec<u32>| Tensor::from_vec(v, (2, 20), &Device::Cpu).unwrap();
        Tensors::new().with("input_ids", tensor(ids)).with("attention_mask", tensor(mask))
    }

    /// One rank's part of an encoding: its output if it holds the end of the row, and the bytes it read.
    fn encode(dir: &Path, group: &RankGroup) -> Result<(Option<Tensor>, u64)> {
        let w = Weights::open(dir, group.tensor.clone(), DType::F32, &Device::Cpu)?;
        let model = T5Encoder::load(&w, &config(), group.range)?;
        let bytes = w.bytes_read().load(Ordering::Relaxed);
        let hidden = if group.range.is_first() {
            model.embed(&inputs())?
        } else {
            recv_tensors(group.whole(), group.previous())?.unwrap()
        };
        let hidden = model.blocks(hidden)?;
        if group.range.is_last() {
            return Ok((Some(model.output(hidden)?.take("last_hidden_state")?), bytes));
        }
        send_tensors(group.whole(), &Ok(hidden), group.next())?;
        Ok((None, bytes))
    }

    fn run(dir: &Path, layout: Layout) -> Vec<(Option<Tensor>, u64)> {
        // Kept until all are done: a link that is dropped tells the others that its rank is lost.
        let links: Vec<Arc<InProcess>> = InProcess::group(layout.ranks()).into_iter().map(Arc::new).collect();
        std::thread::scope(|scope| {
            let start = |link: &Arc<InProcess>| {
                let group = RankGroup::new(link.clone(), layout).unwrap();
                scope.spawn(move || encode(dir, &group).unwrap())
            };
            let ranks: Vec<_> = links.iter().map(start).collect();
            ranks.into_iter().map(|rank| rank.join().unwrap()).collect()
        })
    }

    #[test]
    fn every_layout_gives_the_same_embeddings_and_reads_each_byte_about_once() {
        let dir = tempfile::tempdir().unwrap();
        write_weights(dir.path());
        let (expected, whole) = encode(dir.path(), &RankGroup::solo()).unwrap();
        let expected = expected.unwrap();
        for (tp, block_ranges) in [(2, 1), (4, 1), (1, 2), (1, 3), (2, 2), (4, 2)] {
            let ranks = run(dir.path(), Layout::new(tp, block_ranges));
            for got in ranks.iter().filter_map(|(x, _)| x.as_ref()) {
                let error = (got - &expected).unwrap().abs().unwrap().max_all().unwrap().to_scalar::<f32>().unwrap();
                assert!(error < 1e-5, "tp {tp} x {block_ranges}: {error}");
            }
            // Norms (seven of 32 numbers) are on every rank, the table of position biases on every range.
            let total: u64 = ranks.iter().map(|(_, bytes)| bytes).sum();
            let twice = (7 * 32 * 4 * (tp - 1) + 32 * 4 * 4 * (block_ranges - 1)) as u64;
            assert_eq!(total, whole + twice, "tp {tp} x {block_ranges}");
            assert!(ranks.iter().all(|(_, bytes)| *bytes < whole), "tp {tp} x {block_ranges}");
        }
    }

    #[test]
    fn heads_that_cannot_be_divided_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        write_weights(dir.path());
        let end = InProcess::group(8).remove(0);
        let group = RankGroup::new(Arc::new(end), Layout::new(8, 1)).unwrap();
        let w = Weights::open(dir.path(), group.tensor.clone(), DType::F32, &Device::Cpu).unwrap();
        let error = T5Encoder::load(&w, &config(), RangeOf::WHOLE).unwrap_err();
        let Error::Parallel(parallel::Error::Indivisible { what, size: 4, tp: 8 }) = error else { panic!("{error}") };
        assert_eq!(what, "num_heads");
    }

    #[test]
    fn other_feed_forward_parts_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        write_weights(dir.path());
        let w = Weights::open(dir.path(), Arc::new(Solo), DType::F32, &Device::Cpu).unwrap();
        let plain = T5Config { feed_forward_proj: "relu".into(), ..config() };
        let error = T5Encoder::load(&w, &plain, RangeOf::WHOLE).unwrap_err();
        assert!(matches!(&error, Error::Unsupported { field, .. } if field == "feed_forward_proj"), "{error}");
    }

    #[test]
    fn a_token_beyond_the_vocabulary_is_an_error() {
        let dir = tempfile::tempdir().unwrap();
        write_weights(dir.path());
        let w = Weights::open(dir.path(), Arc::new(Solo), DType::F32, &Device::Cpu).unwrap();
        let model = T5Encoder::load(&w, &config(), RangeOf::WHOLE).unwrap();
        let ids = Tensor::new(&[[3u32, 50]], &Device::Cpu).unwrap();
        assert!(model.embed(&Tensors::new().with("input_ids", ids)).is_err());
    }
}
