//! The Hunyuan-DiT transformer, versions 1.0 to 1.2 (Z. Li et al., "Hunyuan-DiT: A Powerful Multi-Resolution Diffusion Transformer with Fine-Grained
//! Chinese Understanding", <https://arxiv.org/abs/2405.08748>).
//!
//! Follows diffusers 0.42.1, `models/transformers/hunyuan_transformer_2d.py`, `HunyuanAttnProcessor2_0` of `models/attention_processor.py` and
//! `HunyuanCombinedTimestepTextSizeStyleEmbedding` of `models/embeddings.py`. It differs in the slicing alone: heads and MLP columns are divided over the
//! tensor-parallel ranks, and so are modulation, the layers of long skip connections and the embedders of text. Whole on every rank are the
//! timestep's embedder, the tables of positions and padding, `proj_out` (less than 1 % together) and the norms. What the second half of the blocks
//! takes from the first travels with the hidden states. No ControlNet's residuals are added.

use std::collections::BTreeMap;

use parallel::ops::Activation;
use parallel::{DType, Linear, Shard, Tensor, Tensors, Weights};
use serde::Deserialize;
use serde_json::{Value, json};

use crate::blocks::{BlockModel, RangeOf};
use crate::mmdit::attention::Rope;
use crate::mmdit::cross_attention::Text;
use crate::mmdit::embeddings::ParallelMlp;
use crate::mmdit::layers::{AdaLayerNorm, linear};
use crate::mmdit::patches::{PatchEmbed, unpatchify};
use crate::mmdit::{MAX_BLOCKS, MAX_WIDTH, check_fixed, check_heads, check_widths, load_if, load_range, not_held, unsupported};
use crate::{Error, Result};

mod block;
mod embeddings;

use block::HunyuanDiTBlock;
use embeddings::TimestepTextSizeStyleEmbedding;

/// What blocks of the second half take, under the index of the block that gave it.
const SKIPS: &str = "skips";

/// `config.json` of a `HunyuanDiT2DModel`.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(default)]
pub struct HunyuanDiTConfig {
    /// Side of the latents the model was trained on.
    pub sample_size: usize,
    /// Side of a patch of latents, which is one token.
    pub patch_size: usize,
    /// Latent channels.
    pub in_channels: usize,
    /// Whether the output has as many channels again, of the learned variance.
    pub learn_sigma: bool,
    /// Blocks; the second half but its first takes what the first half gave.
    pub num_layers: usize,
    /// Width of a head.
    pub attention_head_dim: usize,
    /// Heads.
    pub num_attention_heads: usize,
    /// Width of the hidden states: that of all heads.
    pub hidden_size: usize,
    /// The MLPs' width over the model's; cut to a whole number.
    pub mlp_ratio: f64,
    /// Width of `encoder_hidden_states` (BERT), to which T5's are brought.
    pub cross_attention_dim: usize,
    /// Width of `encoder_hidden_states_t5`.
    pub cross_attention_dim_t5: usize,
    /// Width of T5's states when they are pooled.
    pub pooled_projection_dim: usize,
    /// Tokens of BERT.
    pub text_len: usize,
    /// Tokens of T5.
    pub text_len_t5: usize,
    /// Whether the picture's size and a style are inputs (up to version 1.1).
    pub use_style_cond_and_image_meta_size: bool,
    /// Whatever else the file says: refused where it would change the network.
    #[serde(flatten)]
    other: BTreeMap<String, Value>,
}

impl Default for HunyuanDiTConfig {
    fn default() -> Self {
        Self {
            sample_size: 32,
            patch_size: 2,
            in_channels: 4,
            learn_sigma: true,
            num_layers: 28,
            attention_head_dim: 88,
            num_attention_heads: 16,
            hidden_size: 1152,
            mlp_ratio: 4.0,
            cross_attention_dim: 1024,
            cross_attention_dim_t5: 2048,
            pooled_projection_dim: 1024,
            text_len: 77,
            text_len_t5: 256,
            use_style_cond_and_image_meta_size: true,
            other: BTreeMap::new(),
        }
    }
}

impl HunyuanDiTConfig {
    /// `D`, the width of the hidden states.
    pub fn inner_dim(&self) -> usize {
        self.num_attention_heads * self.attention_head_dim
    }

    /// `C_out`
    pub fn channels_out(&self) -> usize {
        if self.learn_sigma { 2 * self.in_channels } else { self.in_channels }
    }

    /// Width between the two layers of the feed-forward part.
    fn ff_inner_dim(&self) -> usize {
        (self.inner_dim() as f64 * self.mlp_ratio) as usize
    }

    /// The block whose output block `index` takes.
    fn skip_of(&self, index: usize) -> Option<usize> {
        (index > self.num_layers / 2).then(|| self.num_layers - 1 - index)
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
            ("attention_head_dim", self.attention_head_dim),
            ("num_attention_heads", self.num_attention_heads),
            ("cross_attention_dim", self.cross_attention_dim),
            ("cross_attention_dim_t5", self.cross_attention_dim_t5),
            ("pooled_projection_dim", self.pooled_projection_dim),
            ("text_len", self.text_len),
            ("text_len_t5", self.text_len_t5),
        ])?;
        if self.inner_dim() > MAX_WIDTH {
            return Err(unsupported("num_attention_heads", &self.num_attention_heads));
        }
        if self.hidden_size != self.inner_dim() {
            return Err(unsupported("hidden_size", &self.hidden_size));
        }
        // Rotated by pairs.
        if !self.attention_head_dim.is_multiple_of(2) {
            return Err(unsupported("attention_head_dim", &self.attention_head_dim));
        }
        // T5's states are pooled by as many heads, whatever the blocks have.
        if !self.cross_attention_dim_t5.is_multiple_of(embeddings::POOLER_HEADS) {
            return Err(unsupported("cross_attention_dim_t5", &self.cross_attention_dim_t5));
        }
        if !(1..=MAX_WIDTH).contains(&self.ff_inner_dim()) {
            return Err(unsupported("mlp_ratio", &self.mlp_ratio));
        }
        // In two halves.
        if !(2..=MAX_BLOCKS).contains(&self.num_layers) || !self.num_layers.is_multiple_of(2) {
            return Err(unsupported("num_layers", &self.num_layers));
        }
        check_fixed(&self.other, &[("activation_fn", json!("gelu-approximate"))])
    }
}

/// `HunyuanDiT2DModel`, or one rank's part of it.
///
/// Inputs of `embed`, in the type of the weights: `hidden_states: [B, C, H, W]`, `timestep: [B]` (of 0..1000), `encoder_hidden_states: [B, L_bert, D_bert]`
/// and `encoder_hidden_states_t5: [B, L_t5, D_t5]` with `text_embedding_mask` and `text_embedding_mask_t5` of zeros and ones, `image_rotary_emb.0` and `.1:
/// [L_img, Dh]` (cosines and sines, each twice), and up to version 1.1 `image_meta_size: [B, 6]` and `style: [B]`. Output: `sample: [B, C_out, H, W]`.
#[derive(Debug)]
pub struct HunyuanDiT {
    /// On the first range.
    embedders: Option<Embedders>,
    /// Of this range; the first one's index in the row is `start`.
    blocks: Vec<HunyuanDiTBlock>,
    start: usize,
    /// On the last range.
    head: Option<Head>,
    config: HunyuanDiTConfig,
}

/// What comes before the blocks.
#[derive(Debug)]
struct Embedders {
    pos_embed: PatchEmbed,
    time_extra_emb: TimestepTextSizeStyleEmbedding,
    text_embedder: ParallelMlp,
    /// In place of padding: `[L_bert + L_t5, D_bert]`.
    text_embedding_padding: Tensor,
}

/// What comes after the blocks.
#[derive(Debug)]
struct Head {
    norm_out: AdaLayerNorm,
    proj_out: Linear,
}

impl HunyuanDiT {
    /// Reads what this rank holds of `w`, whose group shares every split tensor: `range` of the row of blocks.
    pub fn load(w: &Weights, config: &HunyuanDiTConfig, range: RangeOf) -> Result<Self> {
        config.validate()?;
        check_heads(w, config.num_attention_heads)?;
        let before = ["pos_embed", "time_extra_emb", "text_embedder", "text_embedding_padding"];
        let embedders = load_if(range.is_first(), w, &before, || Embedders::load(w, config))?;
        let head = load_if(range.is_last(), w, &["norm_out", "proj_out"], || Head::load(w, config))?;
        let start = range.of(config.num_layers).start;
        let blocks = load_range(w, "blocks", config.num_layers, range, |w, i| HunyuanDiTBlock::load(w, config, i))?;
        w.finish()?;
        Ok(Self { embedders, blocks, start, head, config: config.clone() })
    }
}

impl Embedders {
    fn load(w: &Weights, config: &HunyuanDiTConfig) -> Result<Self> {
        let (d_bert, d_t5) = (config.cross_attention_dim, config.cross_attention_dim_t5);
        let padding = [config.text_len + config.text_len_t5, d_bert];
        Ok(Self {
            pos_embed: PatchEmbed::load(&w.pp("pos_embed"), [config.in_channels, config.patch_size, config.inner_dim()], None)?,
            time_extra_emb: TimestepTextSizeStyleEmbedding::load(&w.pp("time_extra_emb"), config)?,
            text_embedder: ParallelMlp::load(&w.pp("text_embedder"), [d_t5, 4 * d_t5, d_bert], Activation::Silu)?,
            text_embedding_padding: w.get("text_embedding_padding", &padding, Shard::Replicated)?,
        })
    }

    /// Both texts one after the other, without their padding: `[B, L_bert + L_t5, D_bert]`.
    fn texts(&self, inputs: &Tensors) -> Result<Tensor> {
        let t5 = self.text_embedder.forward(inputs.get("encoder_hidden_states_t5")?)?;
        let texts = Tensor::cat(&[inputs.get("encoder_hidden_states")?, &t5], 1)?;
        let mask = [inputs.get("text_embedding_mask")?, inputs.get("text_embedding_mask_t5")?];
        let mask = Tensor::cat(&[&mask[0].to_dtype(DType::U8)?, &mask[1].to_dtype(DType::U8)?], 1)?.unsqueeze(2)?; // [B, L, 1]
        let (_, l, _) = texts.dims3()?;
        let padded = self.text_embedding_padding.dim(0)?;
        if l != padded {
            let reason = format!("{l} tokens of both texts, where {padded} have padding");
            return Err(Error::Invalid { field: "encoder_hidden_states", reason });
        }
        let padding = self.text_embedding_padding.to_dtype(texts.dtype())?.broadcast_as(texts.shape())?;
        Ok(mask.broadcast_as(texts.shape())?.where_cond(&texts, &padding)?)
    }
}

impl Head {
    fn load(w: &Weights, config: &HunyuanDiTConfig) -> Result<Self> {
        let (d, patch) = (config.inner_dim(), config.patch_size * config.patch_size);
        Ok(Self {
            norm_out: AdaLayerNorm::load(&w.pp("norm_out.linear"), d, 2)?,
            proj_out: linear(&w.pp("proj_out"), d, patch * config.channels_out())?,
        })
    }
}

/// Between `embed`, the ranges and `output` travel `hidden_states: [B, L_img, D]`, `encoder_hidden_states: [B, L_txt, D_bert]` of both texts,
/// `temb: [B, D]`, `image_rotary_emb.0` and `.1: [L_img, Dh/2]`, `grid` (rows and columns of tokens) and as `skips.N: [B, L_img, D]` what later
/// blocks take of block N.
impl BlockModel for HunyuanDiT {
    fn embed(&self, inputs: &Tensors) -> Result<Tensors> {
        let embedders = self.embedders.as_ref().ok_or_else(|| not_held("embedders"))?;
        let (hidden_states, grid) = embedders.pos_embed.forward(inputs.get("hidden_states")?)?; // [B, L_img, D]
        let temb = embedders.time_extra_emb.forward(inputs)?;
        let mut hidden = Tensors::new();
        for name in ["image_rotary_emb.0", "image_rotary_emb.1"] {
            hidden.insert(name, self.rotation(inputs.get(name)?, hidden_states.dim(1)?)?);
        }
        Ok(hidden
            .with("hidden_states", hidden_states)
            .with("encoder_hidden_states", embedders.texts(inputs)?)
            .with("temb", temb)
            .with("grid", grid))
    }

    fn blocks(&self, mut hidden: Tensors) -> Result<Tensors> {
        let mut hidden_states = hidden.take("hidden_states")?;
        let temb = hidden.get("temb")?.clone();
        let encoder_hidden_states = hidden.get("encoder_hidden_states")?.clone();
        let text = Text { tokens: &encoder_hidden_states, mask: None };
        let rope = Rope { cos: hidden.get("image_rotary_emb.0")?.clone(), sin: hidden.get("image_rotary_emb.1")?.clone() };
        for (index, block) in (self.start..).zip(&self.blocks) {
            let skip = self.config.skip_of(index).map(|from| hidden.take(&format!("{SKIPS}.{from}"))).transpose()?;
            hidden_states = block.forward(hidden_states, skip.as_ref(), text, &temb, &rope)?;
            // The last blocks of the first half are not taken again.
            if index + 1 < self.config.num_layers / 2 {
                hidden.insert(format!("{SKIPS}.{index}"), hidden_states.clone());
            }
        }
        Ok(hidden.with("hidden_states", hidden_states))
    }

    fn output(&self, hidden: Tensors) -> Result<Tensors> {
        let head = self.head.as_ref().ok_or_else(|| not_held("output layers"))?;
        let hidden_states = head.norm_out.continuous(hidden.get("hidden_states")?, hidden.get("temb")?)?;
        let patches = head.proj_out.forward(&hidden_states)?; // [B, L_img, p p C_out]
        Ok(Tensors::new().with("sample", unpatchify(&patches, hidden.get("grid")?, self.config.patch_size)?))
    }
}

impl HunyuanDiT {
    /// Cosines or sines of `tokens`, without their repetition: `[L, Dh] -> [L, Dh/2]`, in f32.
    fn rotation(&self, table: &Tensor, tokens: usize) -> Result<Tensor> {
        let (l, width) = table.dims2()?;
        if (l, width) != (tokens, self.config.attention_head_dim) {
            let reason = format!("{l} x {width} for {tokens} tokens of heads {} wide", self.config.attention_head_dim);
            return Err(Error::Invalid { field: "image_rotary_emb", reason });
        }
        let pairs = table.to_dtype(DType::F32)?.reshape((l, width / 2, 2))?;
        Ok(pairs.narrow(2, 0, 1)?.squeeze(2)?.contiguous()?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(json: &Value) -> HunyuanDiTConfig {
        serde_json::from_value(json.clone()).unwrap()
    }

    /// Version 1.2's, in short.
    fn published() -> Value {
        json!({ "num_layers": 40, "hidden_size": 1408, "mlp_ratio": 4.3637, "use_style_cond_and_image_meta_size": false,
            "norm_type": "layer_norm", "activation_fn": "gelu-approximate", "sample_size": 128 })
    }

    #[test]
    fn the_second_half_takes_what_the_first_gave_last_first() {
        let config = of(&published());
        config.validate().unwrap();
        assert_eq!(config.ff_inner_dim(), 6144);
        let skips: Vec<_> = (0..40).filter_map(|index| config.skip_of(index)).collect();
        assert_eq!(skips, (0..19).rev().collect::<Vec<_>>());
    }

    #[test]
    fn what_is_not_supported_is_refused_by_its_name() {
        for (field, value) in [
            ("activation_fn", json!("geglu")),
            ("hidden_size", json!(1152)),
            ("num_layers", json!(39)),
            ("num_layers", json!(0)),
            ("mlp_ratio", json!(-1.0)),
            ("mlp_ratio", json!(1e300)),
            ("patch_size", json!(0)),
            ("num_attention_heads", json!(1 << 20)),
            ("cross_attention_dim_t5", json!(2049)),
            ("text_len_t5", json!(usize::MAX)),
        ] {
            let mut config = published();
            config[field] = value;
            match of(&config).validate() {
                Err(Error::Unsupported { field: found, .. }) => assert_eq!(found, field),
                other => panic!("{field}: {other:?}"),
            }
        }
        let odd = json!({ "attention_head_dim": 87, "hidden_size": 16 * 87 });
        assert!(matches!(of(&odd).validate(), Err(Error::Unsupported { field, .. }) if field == "attention_head_dim"));
    }
}
