//! T5's encoder: XXL's width, any number of blocks.

use models::blocks::RangeOf;
use models::t5::{T5Config, T5Encoder};
use parallel::{Device, Tensor, Tensors, Weights};

use super::{Model, Network};

/// T5 v1.1 XXL with some of its blocks.
pub(in crate::bench) struct T5 {
    pub(in crate::bench) blocks: usize,
    pub(in crate::bench) tokens: usize,
}

/// Blocks of the whole encoder.
pub(in crate::bench) const BLOCKS: usize = 24;

impl T5 {
    fn config(&self) -> T5Config {
        T5Config {
            vocab_size: 32_128,
            d_model: 4096,
            d_kv: 64,
            d_ff: 10_240,
            num_layers: self.blocks,
            num_heads: 64,
            relative_attention_num_buckets: 32,
            relative_attention_max_distance: 128,
            layer_norm_epsilon: 1e-6,
            feed_forward_proj: "gated-gelu".to_owned(),
        }
    }
}

impl Network for T5 {
    fn shapes(&self) -> Vec<(String, Vec<usize>)> {
        let T5Config { vocab_size, d_model, d_kv, d_ff, num_heads, .. } = self.config();
        let inner = d_kv * num_heads;
        let mut shapes = vec![
            ("shared.weight".to_owned(), vec![vocab_size, d_model]),
            ("encoder.final_layer_norm.weight".to_owned(), vec![d_model]),
            ("encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight".to_owned(), vec![32, num_heads]),
        ];
        for i in 0..self.blocks {
            let layer = |name: &str, shape: Vec<usize>| (format!("encoder.block.{i}.layer.{name}.weight"), shape);
            shapes.extend(["q", "k", "v"].map(|name| layer(&format!("0.SelfAttention.{name}"), vec![inner, d_model])));
            shapes.push(layer("0.SelfAttention.o", vec![d_model, inner]));
            shapes.extend(["wi_0", "wi_1"].map(|name| layer(&format!("1.DenseReluDense.{name}"), vec![d_ff, d_model])));
            shapes.push(layer("1.DenseReluDense.wo", vec![d_model, d_ff]));
            shapes.extend(["0.layer_norm", "1.layer_norm"].map(|name| layer(name, vec![d_model])));
        }
        shapes
    }

    fn load(&self, weights: &Weights, range: RangeOf) -> models::Result<Model> {
        Ok(Model::Blocks(Box::new(T5Encoder::load(weights, &self.config(), range)?)))
    }

    fn inputs(&self) -> models::Result<Tensors> {
        let ids: Vec<u32> = (0..self.tokens).map(|i| (i * 7919 % 32_000) as u32).collect();
        Ok(Tensors::new().with("input_ids", Tensor::from_vec(ids, (1, self.tokens), &Device::Cpu)?))
    }

    fn output(&self) -> &'static str {
        "last_hidden_state"
    }

    fn flops(&self) -> f64 {
        let T5Config { d_model, d_kv, d_ff, num_heads, .. } = self.config();
        let (inner, tokens) = (d_kv * num_heads, self.tokens);
        let linears = 2 * tokens * d_model * (4 * inner + 3 * d_ff);
        let attention = 4 * tokens * tokens * inner;
        (self.blocks * (linears + attention)) as f64
    }
}
