//! The DiT transformer, for pictures of a class (W. Peebles, S. Xie, "Scalable Diffusion Models with Transformers",
//! <https://arxiv.org/abs/2212.09748>).
//!
//! Follows diffusers 0.42.1, `models/transformers/dit_transformer_2d.py`, `BasicTransformerBlock` of `models/attention.py` with
//! `ada_norm_zero`, and `CombinedTimestepLabelEmbeddings` of `models/embeddings.py`. Heads and MLP columns are divided over the tensor-parallel ranks,
//! and so are AdaLN modulation and the embedders of timestep and class, which every block has of its own; only `proj_out_2` is whole on every rank.
//! The first block's embedder is the output layers' too: it is held by the first range, and what it gives travels with the hidden states.

use std::collections::BTreeMap;

use parallel::ops::{self, Activation};
use parallel::{Linear, Tensor, Tensors, Weights};
use serde::Deserialize;
use serde_json::{Value, json};

use crate::blocks::{BlockModel, RangeOf};
use crate::mmdit::cross_attention::Attention;
use crate::mmdit::embeddings::{ParallelMlp, TIME_CHANNELS, shifted_timestep_embedding};
use crate::mmdit::layers::{AdaLayerNorm, EPS, FeedForward, linear};
use crate::mmdit::patches::{PatchEmbed, Positions, unpatchify};
use crate::mmdit::{MAX_BLOCKS, MAX_WIDTH, check_fixed, check_heads, check_widths, load_if, load_range, not_held, unsupported};
use crate::token_embedding::TokenEmbedding;
use crate::{Error, Result};

/// The embedder that the output layers use, too.
const FIRST_EMBEDDER: &str = "transformer_blocks.0.norm1.emb";

/// `config.json` of a `DiTTransformer2DModel`.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(default)]
pub struct DiTTransformerConfig {
    /// Side of the latents the model was trained on.
    pub sample_size: usize,
    /// Side of a patch of latents, which is one token.
    pub patch_size: usize,
    /// Latent channels.
    pub in_channels: usize,
    /// Channels of the output, of which the second half is the learned variance; as `in_channels` if not given.
    pub out_channels: Option<usize>,
    /// Blocks.
    pub num_layers: usize,
    /// Width of a head.
    pub attention_head_dim: usize,
    /// Heads.
    pub num_attention_heads: usize,
    /// Classes; the next number means none of them.
    pub num_embeds_ada_norm: usize,
    /// Of the norm before the feed-forward part.
    pub norm_eps: f64,
    /// Whatever else the file says: refused where it would change the network.
    #[serde(flatten)]
    other: BTreeMap<String, Value>,
}

impl Default for DiTTransformerConfig {
    fn default() -> Self {
        Self {
            sample_size: 32,
            patch_size: 2,
            in_channels: 4,
            out_channels: None,
            num_layers: 28,
            attention_head_dim: 72,
            num_attention_heads: 16,
            num_embeds_ada_norm: 1000,
            norm_eps: 1e-5,
            other: BTreeMap::new(),
        }
    }
}

/// What must not be said otherwise.
fn fixed() -> [(&'static str, Value); 7] {
    [
        ("activation_fn", json!("gelu-approximate")),
        ("attention_bias", json!(true)),
        ("attention_type", json!("default")),
        ("cross_attention_dim", json!(null)),
        ("double_self_attention", json!(false)),
        ("norm_elementwise_affine", json!(false)),
        ("norm_type", json!("ada_norm_zero")),
    ]
}

impl DiTTransformerConfig {
    /// `D`, the width of the hidden states.
    pub fn inner_dim(&self) -> usize {
        self.num_attention_heads * self.attention_head_dim
    }

    /// `C_out`
    pub fn channels_out(&self) -> usize {
        self.out_channels.unwrap_or(self.in_channels)
    }

    /// Whether this is a network at all.
    ///
    /// # Errors
    /// [`Error::Unsupported`] with the first field that cannot be.
    pub fn validate(&self) -> Result<()> {
        check_widths([
            ("sample_size", self.sample_size),
            ("patch_size", self.patch_size),
            ("in_channels", self.in_channels),
            ("out_channels", self.channels_out()),
            ("attention_head_dim", self.attention_head_dim),
            ("num_attention_heads", self.num_attention_heads),
            ("num_embeds_ada_norm", self.num_embeds_ada_norm),
        ])?;
        if self.inner_dim() > MAX_WIDTH {
            return Err(unsupported("num_attention_heads", &self.num_attention_heads));
        }
        if !(1..=MAX_BLOCKS).contains(&self.num_layers) {
            return Err(unsupported("num_layers", &self.num_layers));
        }
        if self.patch_size > self.sample_size {
            return Err(unsupported("patch_size", &self.patch_size));
        }
        // Places are sines and cosines of two directions.
        if !self.inner_dim().is_multiple_of(4) {
            return Err(unsupported("attention_head_dim", &self.attention_head_dim));
        }
        check_fixed(&self.other, &fixed())
    }
}

/// `DiTTransformer2DModel`, or one rank's part of it.
///
/// Inputs of `embed`, in the type of the weights: `hidden_states: [B, C, H, H]`, `timestep: [B]` (of 0..1000), `class_labels: [B]`. Output:
/// `sample: [B, C_out, H, H]`.
#[derive(Debug)]
pub struct DiTTransformer {
    /// On the first range.
    embedders: Option<Embedders>,
    /// Of this range.
    transformer_blocks: Vec<BasicTransformerBlock>,
    /// On the last range.
    head: Option<Head>,
    patch_size: usize,
}

/// What comes before the blocks.
#[derive(Debug)]
struct Embedders {
    pos_embed: PatchEmbed,
    emb: TimestepLabelEmbeddings,
}

/// What comes after the blocks.
#[derive(Debug)]
struct Head {
    proj_out_1: AdaLayerNorm,
    proj_out_2: Linear,
}

impl DiTTransformer {
    /// Reads what this rank holds of `w`, whose group shares every split tensor: `range` of the row of blocks.
    pub fn load(w: &Weights, config: &DiTTransformerConfig, range: RangeOf) -> Result<Self> {
        config.validate()?;
        check_heads(w, config.num_attention_heads)?;
        let before = ["pos_embed", FIRST_EMBEDDER];
        let embedders = load_if(range.is_first(), w, &before, || Embedders::load(w, config))?;
        let head = load_if(range.is_last(), w, &["proj_out_1", "proj_out_2"], || Head::load(w, config))?;
        let transformer_blocks =
            load_range(w, "transformer_blocks", config.num_layers, range, |w, i| BasicTransformerBlock::load(w, config, i))?;
        w.finish()?;
        Ok(Self { embedders, transformer_blocks, head, patch_size: config.patch_size })
    }
}

impl Embedders {
    fn load(w: &Weights, config: &DiTTransformerConfig) -> Result<Self> {
        let patch = [config.in_channels, config.patch_size, config.inner_dim()];
        let positions = Positions { base_size: config.sample_size / config.patch_size, interpolation_scale: 1.0 };
        Ok(Self {
            pos_embed: PatchEmbed::load(&w.pp("pos_embed"), patch, Some(positions))?,
            emb: TimestepLabelEmbeddings::load(&w.pp(FIRST_EMBEDDER), config)?,
        })
    }
}

impl Head {
    fn load(w: &Weights, config: &DiTTransformerConfig) -> Result<Self> {
        let (d, patch) = (config.inner_dim(), config.patch_size * config.patch_size);
        Ok(Self {
            proj_out_1: AdaLayerNorm::load(&w.pp("proj_out_1"), d, 2)?,
            proj_out_2: linear(&w.pp("proj_out_2"), d, patch * config.channels_out())?,
        })
    }
}

/// Between `embed`, the ranges and `output` travel `hidden_states: [B, L, D]`, `timestep: [B]`, `class_labels: [B]`, the first block's
/// `conditioning: [B, D]` and `grid` (rows and columns of tokens).
impl BlockModel for DiTTransformer {
    fn embed(&self, inputs: &Tensors) -> Result<Tensors> {
        let embedders = self.embedders.as_ref().ok_or_else(|| not_held("embedders"))?;
        let (latents, timestep, class_labels) =
            (inputs.get("hidden_states")?, inputs.get("timestep")?, inputs.get("class_labels")?);
        let (_, _, height, width) = latents.dims4()?;
        if height != width {
            // The reference takes them for a square.
            let reason = format!("{height} x {width} latents are not a square");
            return Err(Error::Invalid { field: "hidden_states", reason });
        }
        let (hidden_states, grid) = embedders.pos_embed.forward(latents)?;
        let conditioning = embedders.emb.forward(timestep, class_labels)?;
        Ok(Tensors::new()
            .with("hidden_states", hidden_states)
            .with("conditioning", conditioning)
            .with("timestep", timestep.clone())
            .with("class_labels", class_labels.clone())
            .with("grid", grid))
    }

    fn blocks(&self, mut hidden: Tensors) -> Result<Tensors> {
        let mut hidden_states = hidden.take("hidden_states")?;
        for block in &self.transformer_blocks {
            hidden_states = match &block.emb {
                None => block.forward(&hidden_states, hidden.get("conditioning")?)?,
                Some(emb) => {
                    let conditioning = emb.forward(hidden.get("timestep")?, hidden.get("class_labels")?)?;
                    block.forward(&hidden_states, &conditioning)?
                }
            };
        }
        Ok(hidden.with("hidden_states", hidden_states))
    }

    fn output(&self, hidden: Tensors) -> Result<Tensors> {
        let head = self.head.as_ref().ok_or_else(|| not_held("output layers"))?;
        let [shift, scale] = head.proj_out_1.modulation(hidden.get("conditioning")?)?;
        let hidden_states = ops::layer_norm_modulate(hidden.get("hidden_states")?, &shift, &scale, EPS)?; // norm_out
        let patches = head.proj_out_2.forward(&hidden_states)?; // [B, L, p p C_out]
        Ok(Tensors::new().with("sample", unpatchify(&patches, hidden.get("grid")?, self.patch_size)?))
    }
}

/// `CombinedTimestepLabelEmbeddings`
#[derive(Debug)]
struct TimestepLabelEmbeddings {
    timestep_embedder: ParallelMlp,
    class_embedder: TokenEmbedding,
}

impl TimestepLabelEmbeddings {
    fn load(w: &Weights, config: &DiTTransformerConfig) -> Result<Self> {
        let (d, classes) = (config.inner_dim(), config.num_embeds_ada_norm + 1);
        Ok(Self {
            timestep_embedder: ParallelMlp::load(&w.pp("timestep_embedder"), [TIME_CHANNELS, d, d], Activation::Silu)?,
            class_embedder: TokenEmbedding::load(&w.pp("class_embedder"), "embedding_table.weight", [classes, d])?,
        })
    }

    /// `[B]` and `[B]` give `[B, D]`.
    fn forward(&self, timestep: &Tensor, class_labels: &Tensor) -> Result<Tensor> {
        let class = self.class_embedder.forward(&class_labels.unsqueeze(1)?)?.squeeze(1)?;
        let timesteps_proj = shifted_timestep_embedding(timestep)?.to_dtype(class.dtype())?;
        Ok((self.timestep_embedder.forward(&timesteps_proj)? + class)?)
    }
}

/// `BasicTransformerBlock` with `ada_norm_zero`: attention among the tokens, and feed-forward.
#[derive(Debug)]
struct BasicTransformerBlock {
    /// `None` of the first block.
    emb: Option<TimestepLabelEmbeddings>,
    norm1: AdaLayerNorm,
    attn1: Attention,
    ff: FeedForward,
    /// Of the norm before the feed-forward part.
    eps: f64,
}

impl BasicTransformerBlock {
    /// Block `index` of the row.
    fn load(w: &Weights, config: &DiTTransformerConfig, index: usize) -> Result<Self> {
        let (d, norm1) = (config.inner_dim(), w.pp("norm1"));
        let emb = || TimestepLabelEmbeddings::load(&norm1.pp("emb"), config);
        Ok(Self {
            emb: (index > 0).then(emb).transpose()?,
            norm1: AdaLayerNorm::load(&norm1.pp("linear"), d, 6)?,
            attn1: Attention::load(&w.pp("attn1"), [d, d], config.num_attention_heads)?,
            ff: FeedForward::load(&w.pp("ff"), d)?,
            eps: config.norm_eps,
        })
    }

    /// `x: [B, L, D]` and `conditioning: [B, D]`, equal on every rank, give the new `x`, equal on every rank.
    fn forward(&self, x: &Tensor, conditioning: &Tensor) -> Result<Tensor> {
        let [shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp] = self.norm1.modulation(conditioning)?;
        let normed = ops::layer_norm_modulate(x, &shift_msa, &scale_msa, EPS)?;
        let x = ops::gated(x, &gate_msa, &self.attn1.forward(&normed, None, None)?)?;
        let normed = ops::layer_norm_modulate(&x, &shift_mlp, &scale_mlp, self.eps)?; // norm3
        Ok(ops::gated(&x, &gate_mlp, &self.ff.forward(&normed)?)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_supported_is_refused_by_its_name() {
        let published = json!({ "out_channels": 8, "num_embeds_ada_norm": 1000, "norm_num_groups": 32, "dropout": 0.0 });
        let of = |json: &Value| serde_json::from_value::<DiTTransformerConfig>(json.clone()).unwrap();
        of(&published).validate().unwrap();
        for (field, value) in [
            ("norm_type", json!("ada_norm_single")),
            ("cross_attention_dim", json!(1024)),
            ("attention_bias", json!(false)),
            ("activation_fn", json!("geglu")),
            ("norm_elementwise_affine", json!(true)),
            ("patch_size", json!(64)),
            ("num_layers", json!(0)),
            ("attention_head_dim", json!(usize::MAX)),
            ("num_attention_heads", json!(0)),
            ("num_embeds_ada_norm", json!(usize::MAX)),
        ] {
            let mut config = published.clone();
            config[field] = value;
            match of(&config).validate() {
                Err(Error::Unsupported { field: found, .. }) => assert_eq!(found, field),
                other => panic!("{field}: {other:?}"),
            }
        }
    }
}
