//! CLIP's text encoder: A. Radford et al., "Learning Transferable Visual Models From Natural Language Supervision",
//! <https://arxiv.org/abs/2103.00020>; with other widths OpenCLIP's bigG.
//!
//! Follows `transformers/models/clip/modeling_clip.py` (5.23.0): `CLIPTextModel` or `CLIPTextModelWithProjection`, as the model's
//! index says and else the configuration; a `text_projection` in the former's file takes no part. Difference: heads, feed-forward columns and the columns of the token embedding are
//! divided over the tensor-parallel group. A text encoder of this size is not cut into block ranges.

use parallel::ops::{self, Activation};
use parallel::{ColumnParallelLinear, DType, Device, Linear, Part, RowParallelLinear, Shard, Tensor, Tensors, Weights};
use serde::Deserialize;

use crate::blocks::BlockModel;
use crate::model_dir::ModelDir;
use crate::token_embedding::TokenEmbedding;
use crate::{Error, Result};

/// The class whose pooled output is projected.
const WITH_PROJECTION: &str = "CLIPTextModelWithProjection";
/// Configurations with this `eos_token_id` were written before it meant anything: the text ends at its highest token id.
const LEGACY_EOS: i64 = 2;

/// `config.json` of a CLIP text encoder, as published; what is not read here is ignored.
#[derive(Clone, Debug, Deserialize)]
pub struct ClipTextConfig {
    /// Tokens.
    pub vocab_size: usize,
    /// `D`.
    pub hidden_size: usize,
    /// Width between the two layers of the feed-forward part.
    pub intermediate_size: usize,
    /// Blocks.
    pub num_hidden_layers: usize,
    /// `N`.
    pub num_attention_heads: usize,
    /// Longest text.
    #[serde(default = "default_positions")]
    pub max_position_embeddings: usize,
    /// `quick_gelu` or `gelu`.
    #[serde(default = "default_activation")]
    pub hidden_act: Activation,
    /// Of the layer norms.
    #[serde(default = "default_epsilon")]
    pub layer_norm_eps: f64,
    /// Where the text ends; 2 means at the highest token id.
    #[serde(default = "default_eos")]
    pub eos_token_id: i64,
    /// Width of the projected pooled output.
    #[serde(default)]
    pub projection_dim: Option<usize>,
    /// The class the checkpoint was saved as.
    #[serde(default)]
    pub architectures: Vec<String>,
}

fn default_positions() -> usize {
    77
}

fn default_activation() -> Activation {
    Activation::QuickGelu
}

fn default_epsilon() -> f64 {
    1e-5
}

fn default_eos() -> i64 {
    LEGACY_EOS
}

/// What the encoder makes of a text.
#[derive(Clone, Debug)]
pub struct ClipOutput {
    /// After the final layer norm: `[B, L, D]`.
    pub last_hidden_state: Tensor,
    /// First the embeddings, then each block's output, before the final layer norm: `[B, L, D]` each.
    pub hidden_states: Vec<Tensor>,
    /// The last hidden state where the text ends, projected if the model has a projection: `[B, P]`.
    pub pooled: Tensor,
}

/// A CLIP text encoder, as one rank of a group holds it.
///
/// As a [`BlockModel`] it takes `input_ids: [B, L]` and gives `last_hidden_state`, `pooler_output`, `hidden_states.N` and, after the final
/// layer norm, `normed_states.N`.
#[derive(Debug)]
pub struct ClipTextEncoder {
    embeddings: Embeddings,
    layers: Vec<Layer>,
    final_layer_norm: LayerNorm,
    projection: Option<Linear>,
    eos_token_id: i64,
}

impl ClipTextEncoder {
    /// Reads this rank's part of the checkpoint whose root is `w`.
    pub fn load(w: &Weights, config: &ClipTextConfig) -> Result<Self> {
        config.check(w.group().size())?;
        // The hub's files have the prefix, those transformers 5 writes have not.
        let text = if w.contains("text_model.final_layer_norm.weight") { w.pp("text_model") } else { w.clone() };
        let layer = |i| Layer::load(&text.pp(format!("encoder.layers.{i}")), config);
        let model = Self {
            embeddings: Embeddings::load(&text.pp("embeddings"), config)?,
            layers: (0..config.num_hidden_layers).map(layer).collect::<Result<_>>()?,
            final_layer_norm: LayerNorm::load(&text.pp("final_layer_norm"), config)?,
            projection: config.projection(w)?,
            eos_token_id: config.eos_token_id,
        };
        w.finish()?;
        Ok(model)
    }

    /// Encodes `input_ids: [B, L]`, L at most 77.
    pub fn forward(&self, input_ids: &Tensor) -> Result<ClipOutput> {
        let mut x = self.embeddings.forward(input_ids)?;
        let mask = causal_mask(x.dim(1)?, x.dtype(), x.device())?;
        let mut hidden_states = vec![x.clone()];
        for layer in &self.layers {
            x = layer.forward(&x, &mask)?;
            hidden_states.push(x.clone());
        }
        let last_hidden_state = self.final_layer_norm.forward(&x)?;
        let pooled = self.pool(&last_hidden_state, input_ids)?;
        Ok(ClipOutput { last_hidden_state, hidden_states, pooled })
    }

    /// The hidden state where each text ends: `[B, L, D] -> [B, P]`.
    fn pool(&self, x: &Tensor, input_ids: &Tensor) -> Result<Tensor> {
        let mut rows = Vec::new();
        for (i, ids) in input_ids.to_dtype(DType::I64)?.to_vec2::<i64>()?.iter().enumerate() {
            rows.push(x.get(i)?.get(end_of_text(ids, self.eos_token_id))?);
        }
        let pooled = Tensor::stack(&rows, 0)?;
        match &self.projection {
            Some(projection) => Ok(projection.forward(&pooled)?),
            None => Ok(pooled),
        }
    }
}

impl BlockModel for ClipTextEncoder {
    fn embed(&self, inputs: &Tensors) -> Result<Tensors> {
        Ok(Tensors::new().with("input_ids", inputs.get("input_ids")?.clone()))
    }

    fn blocks(&self, mut hidden: Tensors) -> Result<Tensors> {
        let output = self.forward(&hidden.take("input_ids")?)?;
        let mut tensors = Tensors::new().with("last_hidden_state", output.last_hidden_state).with("pooler_output", output.pooled);
        for (i, state) in output.hidden_states.into_iter().enumerate() {
            tensors.insert(format!("normed_states.{i}"), self.final_layer_norm.forward(&state)?);
            tensors.insert(format!("hidden_states.{i}"), state);
        }
        Ok(tensors)
    }

    fn output(&self, hidden: Tensors) -> Result<Tensors> {
        Ok(hidden)
    }
}

impl ClipTextConfig {
    /// Of a model's component: the class that the model's index names is what it is loaded as.
    pub fn of(dir: &ModelDir, component: &str) -> Result<Self> {
        let config: Self = dir.config(component)?;
        Ok(Self { architectures: vec![dir.require(component)?.class.1], ..config })
    }

    /// Refuses heads that cannot be divided over `tp` ranks.
    fn check(&self, tp: usize) -> Result<()> {
        let heads = self.num_attention_heads;
        if heads == 0 || !heads.is_multiple_of(tp) {
            return Err(parallel::Error::Indivisible { what: "num_attention_heads".into(), size: heads, tp }.into());
        }
        if !self.hidden_size.is_multiple_of(heads) {
            return Err(Error::Unsupported { field: "hidden_size".into(), value: self.hidden_size.to_string() });
        }
        Ok(())
    }

    /// The projection, if the class has one, whatever else is in the file.
    fn projection(&self, w: &Weights) -> Result<Option<Linear>> {
        if !self.architectures.iter().any(|class| class == WITH_PROJECTION) {
            w.skip("text_projection");
            return Ok(None);
        }
        let width = self.projection_dim.unwrap_or(self.hidden_size);
        Ok(Some(Linear::load(&w.pp("text_projection"), self.hidden_size, width)?))
    }
}

/// Where a text ends: at its first end-of-text token, which in CLIP's vocabulary is the highest id.
fn end_of_text(ids: &[i64], eos_token_id: i64) -> usize {
    let end = if eos_token_id == LEGACY_EOS { ids.iter().max().copied().unwrap_or(0) } else { eos_token_id };
    // The reference takes the first token where there is no end.
    ids.iter().position(|id| *id == end).unwrap_or(0)
}

/// `[1, 1, L, L]`: `-inf` where the key comes after the query.
pub(crate) fn causal_mask(length: usize, dtype: DType, device: &Device) -> Result<Tensor> {
    let score = |query: usize, key: usize| if key > query { f32::NEG_INFINITY } else { 0.0 };
    let scores: Vec<f32> = (0..length).flat_map(|query| (0..length).map(move |key| score(query, key))).collect();
    Ok(Tensor::from_vec(scores, (1, 1, length, length), device)?.to_dtype(dtype)?)
}

/// Token and position embeddings.
#[derive(Debug)]
struct Embeddings {
    token: TokenEmbedding,
    position: Tensor,
}

impl Embeddings {
    fn load(w: &Weights, config: &ClipTextConfig) -> Result<Self> {
        w.skip("position_ids"); // a buffer of 0, 1, 2, ... in older files
        let d = config.hidden_size;
        Ok(Self {
            token: TokenEmbedding::load(w, "token_embedding.weight", [config.vocab_size, d])?,
            position: w.get("position_embedding.weight", &[config.max_position_embeddings, d], Shard::Replicated)?,
        })
    }

    /// `[B, L] -> [B, L, D]`
    fn forward(&self, ids: &Tensor) -> Result<Tensor> {
        let (_, l) = ids.dims2()?;
        let longest = self.position.dim(0)?;
        if l > longest {
            return Err(Error::Invalid { field: "input_ids", reason: format!("{l} tokens are more than {longest}") });
        }
        Ok(self.token.forward(ids)?.broadcast_add(&self.position.narrow(0, 0, l)?)?)
    }
}

#[derive(Debug)]
struct LayerNorm {
    weight: Tensor,
    bias: Tensor,
    eps: f64,
}

impl LayerNorm {
    fn load(w: &Weights, config: &ClipTextConfig) -> Result<Self> {
        let get = |name| w.get(name, &[config.hidden_size], Shard::Replicated);
        Ok(Self { weight: get("weight")?, bias: get("bias")?, eps: config.layer_norm_eps })
    }

    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        Ok(ops::layer_norm(x, Some(&self.weight), Some(&self.bias), self.eps)?)
    }
}

/// `CLIPEncoderLayer`
#[derive(Debug)]
struct Layer {
    layer_norm1: LayerNorm,
    q_proj: ColumnParallelLinear,
    k_proj: ColumnParallelLinear,
    v_proj: ColumnParallelLinear,
    out_proj: RowParallelLinear,
    layer_norm2: LayerNorm,
    fc1: ColumnParallelLinear,
    fc2: RowParallelLinear,
    activation: Activation,
    heads: usize,
}

impl Layer {
    fn load(w: &Weights, config: &ClipTextConfig) -> Result<Self> {
        let (d, inner) = (config.hidden_size, config.intermediate_size);
        let attention = w.pp("self_attn");
        let project = |name| ColumnParallelLinear::load(&attention.pp(name), d, &[d]);
        Ok(Self {
            layer_norm1: LayerNorm::load(&w.pp("layer_norm1"), config)?,
            q_proj: project("q_proj")?,
            k_proj: project("k_proj")?,
            v_proj: project("v_proj")?,
            out_proj: RowParallelLinear::load(&attention.pp("out_proj"), &[d], d)?,
            layer_norm2: LayerNorm::load(&w.pp("layer_norm2"), config)?,
            fc1: ColumnParallelLinear::load(&w.pp("mlp.fc1"), d, &[inner])?,
            fc2: RowParallelLinear::load(&w.pp("mlp.fc2"), &[inner], d)?,
            activation: config.hidden_act,
            heads: config.num_attention_heads / w.group().size(),
        })
    }

    /// `x: [B, L, D]`, `mask: [1, 1, L, L]`.
    fn forward(&self, x: &Tensor, mask: &Tensor) -> Result<Tensor> {
        let x = (x + self.attention(&self.layer_norm1.forward(x)?, mask)?)?;
        let normed = self.layer_norm2.forward(&x)?;
        let mlp = Part::Activated { layer: &self.fc1, x: &normed, activation: self.activation };
        Ok((&x + self.fc2.forward_parts(&[mlp])?)?)
    }

    fn attention(&self, x: &Tensor, mask: &Tensor) -> Result<Tensor> {
        let heads = |x: Tensor| ops::split_heads(&x, self.heads); // [B, L, D/tp] -> [B, N/tp, L, Dh]
        let [q, k, v] = ColumnParallelLinear::forward_all([&self.q_proj, &self.k_proj, &self.v_proj], x)?;
        let (q, k, v) = (heads(q)?, heads(k)?, heads(v)?);
        let scale = 1.0 / (q.dim(3)? as f64).sqrt();
        let x = ops::attention(&q, &k, &v, scale, Some(mask))?;
        Ok(self.out_proj.forward(&ops::merge_heads(&x)?)?)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;
    use std::path::Path;
    use std::sync::Arc;

    use parallel::mesh::Mesh;
    use parallel::{Collective, InProcess, Solo};

    use super::*;

    fn config() -> ClipTextConfig {
        let json = r#"{"vocab_size": 50, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
            "num_attention_heads": 4, "projection_dim": 24, "architectures": ["CLIPTextModelWithProjection"]}"#;
        serde_json::from_str(json).unwrap()
    }

    fn write_weights(dir: &Path, prefix: &str) {
        let mut tensors = HashMap::new();
        let mut add = |name: String, shape: &[usize]| {
            tensors.insert(name, Tensor::randn(0f32, 0.3, shape, &Device::Cpu).unwrap());
        };
        add(format!("{prefix}embeddings.token_embedding.weight"), &[50, 32]);
        add(format!("{prefix}embeddings.position_embedding.weight"), &[77, 32]);
        let mut linear = |name: String, d_out: usize, d_in: usize| {
            add(format!("{name}.weight"), &[d_out, d_in]);
            add(format!("{name}.bias"), &[d_out]);
        };
        for layer in 0..2 {
            let layer = format!("{prefix}encoder.layers.{layer}");
            for name in ["q_proj", "k_proj", "v_proj", "out_proj"] {
                linear(format!("{layer}.self_attn.{name}"), 32, 32);
            }
            linear(format!("{layer}.mlp.fc1"), 64, 32);
            linear(format!("{layer}.mlp.fc2"), 32, 64);
        }
        let norms = ["encoder.layers.0.layer_norm1", "encoder.layers.0.layer_norm2", "encoder.layers.1.layer_norm1"];
        for norm in norms.into_iter().chain(["encoder.layers.1.layer_norm2", "final_layer_norm"]) {
            add(format!("{prefix}{norm}.weight"), &[32]);
            add(format!("{prefix}{norm}.bias"), &[32]);
        }
        add("text_projection.weight".into(), &[24, 32]);
        let positions = Tensor::arange(0i64, 77, &Device::Cpu).unwrap().unsqueeze(0).unwrap();
        tensors.insert(format!("{prefix}embeddings.position_ids"), positions);
        candle_core::safetensors::save(&tensors, dir.join("model.safetensors")).unwrap();
    }

    fn encode(dir: &Path, group: Arc<dyn Collective>) -> ClipOutput {
        encode_as(dir, group, &config())
    }

    fn encode_as(dir: &Path, group: Arc<dyn Collective>, config: &ClipTextConfig) -> ClipOutput {
        let w = Weights::open(dir, group, DType::F32, &Device::Cpu).unwrap();
        let ids: Vec<u32> = (0..2 * 10).map(|i| i * 7 % 50).collect();
        let ids = Tensor::from_vec(ids, (2, 10), &Device::Cpu).unwrap();
        ClipTextEncoder::load(&w, config).unwrap().forward(&ids).unwrap()
    }

    #[test]
    fn every_tp_gives_the_same_embeddings_with_and_without_the_prefix() {
        for prefix in ["text_model.", ""] {
            let dir = tempfile::tempdir().unwrap();
            write_weights(dir.path(), prefix);
            let expected = encode(dir.path(), Arc::new(Solo));
            for tp in [2, 4] {
                // Kept until all are done: a link that is dropped tells the others that its rank is lost.
                let links: Vec<Arc<InProcess>> = InProcess::group(tp).into_iter().map(Arc::new).collect();
                let got: Vec<ClipOutput> = std::thread::scope(|scope| {
                    let start = |link: &Arc<InProcess>| {
                        let (path, group) = (dir.path(), Arc::new(Mesh::whole(link.clone())));
                        scope.spawn(move || encode(path, group))
                    };
                    let ranks: Vec<_> = links.iter().map(start).collect();
                    ranks.into_iter().map(|rank| rank.join().unwrap()).collect()
                });
                for got in got {
                    close(&got.pooled, &expected.pooled);
                    close(&got.last_hidden_state, &expected.last_hidden_state);
                }
            }
        }
    }

    fn close(a: &Tensor, b: &Tensor) {
        let error = (a - b).unwrap().abs().unwrap().max_all().unwrap().to_scalar::<f32>().unwrap();
        assert!(error < 1e-5, "{error}");
    }

    #[test]
    fn a_text_ends_at_its_highest_or_its_first_end_token() {
        assert_eq!(end_of_text(&[5, 9, 3, 9, 0], LEGACY_EOS), 1);
        assert_eq!(end_of_text(&[5, 9, 3, 9, 0], 3), 2);
        assert_eq!(end_of_text(&[5, 9, 3, 9, 0], 7), 0);
    }

    #[test]
    fn a_class_without_projection_takes_no_part_of_one_that_is_in_its_file() {
        let dir = tempfile::tempdir().unwrap();
        write_weights(dir.path(), "text_model.");
        for architectures in [vec!["CLIPTextModel".to_owned()], vec![]] {
            let plain = ClipTextConfig { architectures, ..config() };
            let output = encode_as(dir.path(), Arc::new(Solo), &plain);
            let (_, tokens, width) = output.last_hidden_state.dims3().unwrap();
            let rows = output.last_hidden_state.reshape((2 * tokens, width)).unwrap().to_vec2::<f32>().unwrap();
            for pooled in output.pooled.to_vec2::<f32>().unwrap() {
                assert!(rows.contains(&pooled), "it is one of the hidden states");
            }
        }
        assert_eq!(encode(dir.path(), Arc::new(Solo)).pooled.dims(), [2, 24]);
    }

    #[test]
    fn what_the_index_names_is_what_a_text_encoder_is_loaded_as() {
        let dir = tempfile::tempdir().unwrap();
        let index = r#"{"_class_name": "FluxPipeline", "text_encoder": ["transformers", "CLIPTextModel"]}"#;
        std::fs::write(dir.path().join("model_index.json"), index).unwrap();
        std::fs::create_dir(dir.path().join("text_encoder")).unwrap();
        let config = r#"{"vocab_size": 50, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
            "num_attention_heads": 4, "architectures": ["CLIPModel"]}"#;
        std::fs::write(dir.path().join("text_encoder/config.json"), config).unwrap();
        let config = ClipTextConfig::of(&ModelDir::open(dir.path()).unwrap(), "text_encoder").unwrap();
        assert_eq!(config.architectures, ["CLIPTextModel"]);
    }

    #[test]
    fn a_class_with_projection_needs_one() {
        let dir = tempfile::tempdir().unwrap();
        write_weights(dir.path(), "text_model.");
        let path = dir.path().join("model.safetensors");
        let mut tensors = candle_core::safetensors::load(&path, &Device::Cpu).unwrap();
        tensors.remove("text_projection.weight");
        candle_core::safetensors::save(&tensors, &path).unwrap();
        let w = Weights::open(dir.path(), Arc::new(Solo), DType::F32, &Device::Cpu).unwrap();
        let error = ClipTextEncoder::load(&w, &config()).unwrap_err();
        assert!(matches!(error, Error::Parallel(parallel::Error::MissingTensor { .. })), "{error}");
    }

    #[test]
    fn a_text_longer_than_the_position_table_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        write_weights(dir.path(), "text_model.");
        let w = Weights::open(dir.path(), Arc::new(Solo), DType::F32, &Device::Cpu).unwrap();
        let model = ClipTextEncoder::load(&w, &config()).unwrap();
        let ids = Tensor::zeros((1, 78), DType::U32, &Device::Cpu).unwrap();
        assert!(matches!(model.forward(&ids), Err(Error::Invalid { .. })));
    }
}
