//! BERT's encoder: J. Devlin et al., "BERT: Pre-training of Deep Bidirectional Transformers for Language Understanding",
//! <https://arxiv.org/abs/1810.04805>. Hunyuan-DiT's first text encoder.
//!
//! Follows `transformers/models/bert/modeling_bert.py` (5.23.0), `BertModel` for one text at a time: every token is of type 0. Differences:
//! heads, feed-forward columns, the columns of the token embedding and of the pooler are divided over the tensor-parallel group, and the layers can
//! be cut into ranges.

use parallel::ops::{self, Activation};
use parallel::{ColumnParallelLinear, Part, RowParallelLinear, Shard, Tensor, Tensors, Weights};
use serde::Deserialize;

use crate::blocks::{BlockModel, RangeOf};
use crate::mmdit::layers::{LayerNorm, column, row};
use crate::mmdit::{MAX_BLOCKS, check_heads, check_widths, load_if, not_held, unsupported};
use crate::t5::masked_scores;
use crate::token_embedding::TokenEmbedding;
use crate::{Error, Result};

/// `config.json` of a BERT encoder, as published; what is not read here is ignored.
#[derive(Clone, Debug, Deserialize)]
pub struct BertConfig {
    /// Tokens.
    pub vocab_size: usize,
    /// `D`.
    pub hidden_size: usize,
    /// Width between the two layers of the feed-forward part.
    pub intermediate_size: usize,
    /// Layers.
    pub num_hidden_layers: usize,
    /// `N`.
    pub num_attention_heads: usize,
    /// Longest text.
    #[serde(default = "default_positions")]
    pub max_position_embeddings: usize,
    /// Types of tokens, of which the first is used.
    #[serde(default = "default_types")]
    pub type_vocab_size: usize,
    /// Between the two layers of the feed-forward part.
    #[serde(default = "default_activation")]
    pub hidden_act: Activation,
    /// Of the layer norms.
    #[serde(default = "default_epsilon")]
    pub layer_norm_eps: f64,
    /// `absolute`: there are others, which are added to the scores.
    #[serde(default)]
    pub position_embedding_type: Option<String>,
    /// Whether a token sees those before it alone.
    #[serde(default)]
    pub is_decoder: bool,
}

fn default_positions() -> usize {
    512
}

fn default_types() -> usize {
    2
}

fn default_activation() -> Activation {
    Activation::Gelu
}

fn default_epsilon() -> f64 {
    1e-12
}

impl BertConfig {
    /// Whether this is a network that is known here.
    ///
    /// # Errors
    /// [`Error::Unsupported`] with the first field that is not.
    pub fn validate(&self) -> Result<()> {
        check_widths([
            ("vocab_size", self.vocab_size),
            ("hidden_size", self.hidden_size),
            ("intermediate_size", self.intermediate_size),
            ("num_attention_heads", self.num_attention_heads),
            ("max_position_embeddings", self.max_position_embeddings),
            ("type_vocab_size", self.type_vocab_size),
        ])?;
        if !(1..=MAX_BLOCKS).contains(&self.num_hidden_layers) {
            return Err(unsupported("num_hidden_layers", &self.num_hidden_layers));
        }
        if !self.hidden_size.is_multiple_of(self.num_attention_heads) {
            return Err(unsupported("hidden_size", &self.hidden_size));
        }
        match self.position_embedding_type.as_deref() {
            None | Some("absolute") => {}
            Some(other) => return Err(unsupported("position_embedding_type", &other)),
        }
        if self.is_decoder { Err(unsupported("is_decoder", &true)) } else { Ok(()) }
    }
}

/// A range of a BERT encoder's layers, as one rank of a group holds it.
///
/// Inputs `input_ids: [B, L]` and, if padding is to be masked, `attention_mask: [B, L]` of zeros and ones; outputs
/// `last_hidden_state: [B, L, D]`, of its type that mask, and, if the checkpoint has a pooler, `pooler_output: [B, D]`.
#[derive(Debug)]
pub struct BertEncoder {
    /// On the first range.
    embeddings: Option<Embeddings>,
    layers: Vec<Layer>,
    /// On the last range.
    pooler: Option<ColumnParallelLinear>,
    is_last: bool,
}

impl BertEncoder {
    /// Reads this rank's part of the checkpoint whose root is `w`.
    pub fn load(w: &Weights, config: &BertConfig, range: RangeOf) -> Result<Self> {
        config.validate()?;
        check_heads(w, config.num_attention_heads)?;
        let mine = range.of(config.num_hidden_layers);
        let stack = w.pp("encoder.layer");
        let others = (0..config.num_hidden_layers).filter(|i| !mine.contains(i));
        others.for_each(|i| stack.skip(i));
        let embeddings = load_if(range.is_first(), w, &["embeddings"], || Embeddings::load(&w.pp("embeddings"), config))?;
        let has_pooler = range.is_last() && w.contains("pooler.dense.weight");
        let pooler = || column(&w.pp("pooler.dense"), config.hidden_size, config.hidden_size);
        let pooler = load_if(has_pooler, w, &["pooler"], pooler)?;
        let layers = mine.map(|i| Layer::load(&stack.pp(i), config)).collect::<Result<_>>()?;
        w.finish()?;
        Ok(Self { embeddings, layers, pooler, is_last: range.is_last() })
    }
}

impl BlockModel for BertEncoder {
    fn embed(&self, inputs: &Tensors) -> Result<Tensors> {
        let embeddings = self.embeddings.as_ref().ok_or_else(|| not_held("embeddings"))?;
        let hidden = Tensors::new().with("hidden_states", embeddings.forward(inputs.get("input_ids")?)?);
        Ok(match inputs.find("attention_mask") {
            Some(mask) => hidden.with("attention_mask", mask.clone()),
            None => hidden,
        })
    }

    fn blocks(&self, mut hidden: Tensors) -> Result<Tensors> {
        let mut x = hidden.take("hidden_states")?;
        let mask = hidden.find("attention_mask").map(|mask| masked_scores(mask, &x)).transpose()?; // [B, 1, 1, L]
        for layer in &self.layers {
            x = layer.forward(&x, mask.as_ref())?;
        }
        Ok(hidden.with("hidden_states", x))
    }

    fn output(&self, mut hidden: Tensors) -> Result<Tensors> {
        if !self.is_last {
            return Err(not_held("output layers"));
        }
        let last_hidden_state = hidden.take("hidden_states")?;
        let mut output = Tensors::new();
        if let Some(mask) = hidden.find("attention_mask") {
            output.insert("attention_mask", mask.to_dtype(last_hidden_state.dtype())?);
        }
        if let Some(pooler) = &self.pooler {
            let first = last_hidden_state.narrow(1, 0, 1)?.squeeze(1)?.contiguous()?; // [B, L, D] -> [B, D]
            output.insert("pooler_output", pooler.forward_gathered(&first)?.tanh()?);
        }
        Ok(output.with("last_hidden_state", last_hidden_state))
    }
}

/// Token, type and position embeddings.
#[derive(Debug)]
struct Embeddings {
    word: TokenEmbedding,
    /// `[1, D]`
    token_type: Tensor,
    /// `[L, D]`
    position: Tensor,
    norm: LayerNorm,
}

impl Embeddings {
    fn load(w: &Weights, config: &BertConfig) -> Result<Self> {
        w.skip("position_ids"); // a buffer of 0, 1, 2, ... in older files
        let d = config.hidden_size;
        let types = w.get("token_type_embeddings.weight", &[config.type_vocab_size, d], Shard::Replicated)?;
        Ok(Self {
            word: TokenEmbedding::load(w, "word_embeddings.weight", [config.vocab_size, d])?,
            token_type: types.narrow(0, 0, 1)?,
            position: w.get("position_embeddings.weight", &[config.max_position_embeddings, d], Shard::Replicated)?,
            norm: LayerNorm::load(&w.pp("LayerNorm"), d, config.layer_norm_eps)?,
        })
    }

    /// `[B, L] -> [B, L, D]`
    fn forward(&self, ids: &Tensor) -> Result<Tensor> {
        let (_, l) = ids.dims2()?;
        let longest = self.position.dim(0)?;
        if l > longest {
            return Err(Error::Invalid { field: "input_ids", reason: format!("{l} tokens are more than {longest}") });
        }
        let x = self.word.forward(ids)?.broadcast_add(&self.token_type)?;
        self.norm.forward(&x.broadcast_add(&self.position.narrow(0, 0, l)?)?)
    }
}

/// `BertLayer`: attention and feed-forward, each with its residual around and its norm after.
#[derive(Debug)]
struct Layer {
    query: ColumnParallelLinear,
    key: ColumnParallelLinear,
    value: ColumnParallelLinear,
    attention_output: RowParallelLinear,
    attention_norm: LayerNorm,
    intermediate: ColumnParallelLinear,
    output: RowParallelLinear,
    output_norm: LayerNorm,
    activation: Activation,
    /// `N/tp`
    heads: usize,
}

impl Layer {
    fn load(w: &Weights, config: &BertConfig) -> Result<Self> {
        let (d, inner, eps) = (config.hidden_size, config.intermediate_size, config.layer_norm_eps);
        let attention = w.pp("attention");
        let project = |name| column(&attention.pp("self").pp(name), d, d);
        Ok(Self {
            query: project("query")?,
            key: project("key")?,
            value: project("value")?,
            attention_output: row(&attention.pp("output.dense"), &[d], d)?,
            attention_norm: LayerNorm::load(&attention.pp("output.LayerNorm"), d, eps)?,
            intermediate: column(&w.pp("intermediate.dense"), d, inner)?,
            output: row(&w.pp("output.dense"), &[inner], d)?,
            output_norm: LayerNorm::load(&w.pp("output.LayerNorm"), d, eps)?,
            activation: config.hidden_act,
            heads: config.num_attention_heads / w.group().size(),
        })
    }

    /// `x: [B, L, D]`, `mask: [B, 1, 1, L]`.
    fn forward(&self, x: &Tensor, mask: Option<&Tensor>) -> Result<Tensor> {
        let heads = |x: Tensor| ops::split_heads(&x, self.heads); // [B, L, D/tp] -> [B, N/tp, L, Dh]
        let [q, k, v] = ColumnParallelLinear::forward_all([&self.query, &self.key, &self.value], x)?;
        let (q, k, v) = (heads(q)?, heads(k)?, heads(v)?);
        let scale = 1.0 / (q.dim(3)? as f64).sqrt();
        let attended = ops::merge_heads(&ops::attention(&q, &k, &v, scale, mask)?)?;
        let x = self.attention_norm.forward(&(self.attention_output.forward(&attended)? + x)?)?;
        let mlp = Part::Activated { layer: &self.intermediate, x: &x, activation: self.activation };
        self.output_norm.forward(&(self.output.forward_parts(&[mlp])? + &x)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_supported_is_refused_by_its_name() {
        let published = serde_json::json!({ "vocab_size": 47020, "hidden_size": 1024, "intermediate_size": 4096,
            "num_hidden_layers": 24, "num_attention_heads": 16, "hidden_act": "gelu", "type_vocab_size": 2 });
        let of = |json: serde_json::Value| serde_json::from_value::<BertConfig>(json).unwrap();
        of(published.clone()).validate().unwrap();
        for (field, value) in [
            ("position_embedding_type", serde_json::json!("relative_key")),
            ("is_decoder", serde_json::json!(true)),
            ("hidden_size", serde_json::json!(1025)),
            ("num_hidden_layers", serde_json::json!(0)),
            ("num_attention_heads", serde_json::json!(0)),
        ] {
            let mut config = published.clone();
            config[field] = value;
            match of(config).validate() {
                Err(Error::Unsupported { field: found, .. }) => assert_eq!(found, field),
                other => panic!("{field}: {other:?}"),
            }
        }
    }
}
