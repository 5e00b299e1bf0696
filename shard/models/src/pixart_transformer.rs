//! The PixArt transformer (J. Chen et al., "PixArt-alpha: Fast Training of Diffusion Transformer for Photorealistic Text-to-Image
//! Synthesis", <https://arxiv.org/abs/2310.00426>; "PixArt-Sigma", <https://arxiv.org/abs/2403.04692>).
//!
//! Follows diffusers 0.42.1, `models/transformers/pixart_transformer_2d.py`, `BasicTransformerBlock` of `models/attention.py` with
//! `ada_norm_single`, and `AdaLayerNormSingle` of `models/normalization.py`. It differs in the slicing alone: heads and MLP columns are divided over the
//! tensor-parallel ranks, and so are the projections of latents, timestep and text. Whole on every rank are the embedders of time and size, `proj_out`
//! (less than 1 %) and the tables of scales and shifts.

use std::collections::BTreeMap;

use parallel::ops::{self, Activation};
use parallel::{ColumnParallelLinear, Linear, Shard, Tensor, Tensors, Weights};
use serde::Deserialize;
use serde_json::{Value, json};

use crate::Result;
use crate::blocks::{BlockModel, RangeOf};
use crate::mmdit::cross_attention::{Attention, Text, masked_scores};
use crate::mmdit::embeddings::{Mlp, ParallelMlp, TIME_CHANNELS, timestep_embedding};
use crate::mmdit::layers::{EPS, FeedForward, column, linear};
use crate::mmdit::patches::{PatchEmbed, Positions, unpatchify};
use crate::mmdit::{MAX_BLOCKS, MAX_WIDTH, check_fixed, check_heads, check_widths, load_if, load_range, not_held, unsupported};

/// Side of the latents of networks that are told the picture's size, if the configuration does not say it.
const SIZED: usize = 128;
/// Numbers of the picture's size: its height, its width and their ratio.
const SIZES: usize = 3;

/// `config.json` of a `PixArtTransformer2DModel`.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(default)]
pub struct PixArtTransformerConfig {
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
    /// Width of the text that blocks attend to.
    pub cross_attention_dim: Option<usize>,
    /// Width of `encoder_hidden_states`, which are brought to that of the hidden states; if not given they are attended to as they are.
    pub caption_channels: Option<usize>,
    /// Divides the places of tokens; if not given, by how often 64 goes into `sample_size`.
    pub interpolation_scale: Option<f64>,
    /// Whether the picture's size is an input; if not given, where `sample_size` is 128.
    pub use_additional_conditions: Option<bool>,
    /// Of the blocks' norms.
    pub norm_eps: f64,
    /// Whatever else the file says: refused where it would change the network.
    #[serde(flatten)]
    other: BTreeMap<String, Value>,
}

impl Default for PixArtTransformerConfig {
    fn default() -> Self {
        Self {
            sample_size: 128,
            patch_size: 2,
            in_channels: 4,
            out_channels: Some(8),
            num_layers: 28,
            attention_head_dim: 72,
            num_attention_heads: 16,
            cross_attention_dim: Some(1152),
            caption_channels: None,
            interpolation_scale: None,
            use_additional_conditions: None,
            norm_eps: 1e-6,
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
        ("double_self_attention", json!(false)),
        ("norm_elementwise_affine", json!(false)),
        ("norm_type", json!("ada_norm_single")),
        ("only_cross_attention", json!(false)),
    ]
}

impl PixArtTransformerConfig {
    /// `D`, the width of the hidden states.
    pub fn inner_dim(&self) -> usize {
        self.num_attention_heads * self.attention_head_dim
    }

    /// `C_out`
    pub fn channels_out(&self) -> usize {
        self.out_channels.unwrap_or(self.in_channels)
    }

    /// Whether `resolution` and `aspect_ratio` are inputs.
    pub fn is_told_the_size(&self) -> bool {
        self.use_additional_conditions.unwrap_or(self.sample_size == SIZED)
    }

    fn positions(&self) -> Positions {
        let by_size = (self.sample_size / 64).max(1) as f64;
        Positions {
            base_size: self.sample_size / self.patch_size,
            interpolation_scale: self.interpolation_scale.unwrap_or(by_size),
        }
    }

    /// Width of the text that blocks attend to.
    fn text_dim(&self) -> usize {
        self.cross_attention_dim.unwrap_or_default()
    }

    /// Whether this is a network at all.
    ///
    /// # Errors
    /// [`Error::Unsupported`](crate::Error::Unsupported) with the first field that cannot be.
    pub fn validate(&self) -> Result<()> {
        check_widths([
            ("sample_size", self.sample_size),
            ("patch_size", self.patch_size),
            ("in_channels", self.in_channels),
            ("out_channels", self.channels_out()),
            ("attention_head_dim", self.attention_head_dim),
            ("num_attention_heads", self.num_attention_heads),
            ("cross_attention_dim", self.text_dim()),
        ])?;
        check_widths(self.caption_channels.map(|width| ("caption_channels", width)))?;
        if self.inner_dim() > MAX_WIDTH {
            return Err(unsupported("num_attention_heads", &self.num_attention_heads));
        }
        if !(1..=MAX_BLOCKS).contains(&self.num_layers) {
            return Err(unsupported("num_layers", &self.num_layers));
        }
        if self.patch_size > self.sample_size {
            return Err(unsupported("patch_size", &self.patch_size));
        }
        // Places are sines and cosines of two directions; of the size, a third of the width is for each number.
        let parts = if self.is_told_the_size() { 4 * SIZES } else { 4 };
        if !self.inner_dim().is_multiple_of(parts) {
            return Err(unsupported("attention_head_dim", &self.attention_head_dim));
        }
        if self.caption_channels.is_some() && self.text_dim() != self.inner_dim() {
            return Err(unsupported("cross_attention_dim", &self.cross_attention_dim));
        }
        if !self.positions().interpolation_scale.is_normal() {
            return Err(unsupported("interpolation_scale", &self.interpolation_scale));
        }
        check_fixed(&self.other, &fixed())
    }
}

/// `PixArtTransformer2DModel`, or one rank's part of it.
///
/// Inputs of `embed`, in the type of the weights: `hidden_states: [B, C, H, W]`, `encoder_hidden_states: [B, L_txt, D_txt]`,
/// `timestep: [B]` (of 0..1000), if padding is to be masked `encoder_attention_mask: [B, L_txt]` of zeros and ones, and of networks that are told the size
/// `added_cond_kwargs.resolution: [B, 2]` and `added_cond_kwargs.aspect_ratio: [B, 1]`. Output: `sample: [B, C_out, H, W]`.
#[derive(Debug)]
pub struct PixArtTransformer {
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
    adaln_single: AdaLayerNormSingle,
    caption_projection: Option<ParallelMlp>,
}

/// What comes after the blocks.
#[derive(Debug)]
struct Head {
    /// `[2, D]`
    scale_shift_table: Tensor,
    proj_out: Linear,
}

impl PixArtTransformer {
    /// Reads what this rank holds of `w`, whose group shares every split tensor: `range` of the row of blocks.
    pub fn load(w: &Weights, config: &PixArtTransformerConfig, range: RangeOf) -> Result<Self> {
        config.validate()?;
        check_heads(w, config.num_attention_heads)?;
        let before = ["pos_embed", "adaln_single", "caption_projection"];
        let embedders = load_if(range.is_first(), w, &before, || Embedders::load(w, config))?;
        let head = load_if(range.is_last(), w, &["scale_shift_table", "proj_out"], || Head::load(w, config))?;
        let transformer_blocks =
            load_range(w, "transformer_blocks", config.num_layers, range, |w, _| BasicTransformerBlock::load(w, config))?;
        w.finish()?;
        Ok(Self { embedders, transformer_blocks, head, patch_size: config.patch_size })
    }
}

impl Embedders {
    fn load(w: &Weights, config: &PixArtTransformerConfig) -> Result<Self> {
        let d = config.inner_dim();
        let caption = |width| ParallelMlp::load(&w.pp("caption_projection"), [width, d, d], Activation::GeluTanh);
        let patch = [config.in_channels, config.patch_size, d];
        Ok(Self {
            pos_embed: PatchEmbed::load(&w.pp("pos_embed"), patch, Some(config.positions()))?,
            adaln_single: AdaLayerNormSingle::load(&w.pp("adaln_single"), config)?,
            caption_projection: config.caption_channels.map(caption).transpose()?,
        })
    }
}

impl Head {
    fn load(w: &Weights, config: &PixArtTransformerConfig) -> Result<Self> {
        let (d, patch) = (config.inner_dim(), config.patch_size * config.patch_size);
        Ok(Self {
            scale_shift_table: w.get("scale_shift_table", &[2, d], Shard::Replicated)?,
            proj_out: linear(&w.pp("proj_out"), d, patch * config.channels_out())?,
        })
    }
}

/// Between `embed`, the ranges and `output` travel `hidden_states: [B, L_img, D]`, `encoder_hidden_states: [B, L_txt, D_txt]`, what its mask adds to
/// the scores as `encoder_attention_mask: [B, 1, 1, L_txt]`, `timestep: [B, 6, D]`, `embedded_timestep: [B, 1, D]` and `grid` (rows and columns of
/// tokens).
impl BlockModel for PixArtTransformer {
    fn embed(&self, inputs: &Tensors) -> Result<Tensors> {
        let embedders = self.embedders.as_ref().ok_or_else(|| not_held("embedders"))?;
        let (hidden_states, grid) = embedders.pos_embed.forward(inputs.get("hidden_states")?)?; // [B, L_img, D]
        let (timestep, embedded_timestep) = embedders.adaln_single.forward(inputs, &hidden_states)?;
        let text = inputs.get("encoder_hidden_states")?;
        let encoder_hidden_states = match &embedders.caption_projection {
            Some(projection) => projection.forward(text)?,
            None => text.clone(),
        };
        let mut hidden = Tensors::new();
        if let Some(mask) = inputs.find("encoder_attention_mask") {
            hidden.insert("encoder_attention_mask", masked_scores(mask, &hidden_states)?);
        }
        Ok(hidden
            .with("hidden_states", hidden_states)
            .with("encoder_hidden_states", encoder_hidden_states)
            .with("timestep", timestep)
            .with("embedded_timestep", embedded_timestep)
            .with("grid", grid))
    }

    fn blocks(&self, mut hidden: Tensors) -> Result<Tensors> {
        let mut hidden_states = hidden.take("hidden_states")?;
        let text = Text { tokens: hidden.get("encoder_hidden_states")?, mask: hidden.find("encoder_attention_mask") };
        for block in &self.transformer_blocks {
            hidden_states = block.forward(&hidden_states, text, hidden.get("timestep")?)?;
        }
        Ok(hidden.with("hidden_states", hidden_states))
    }

    fn output(&self, hidden: Tensors) -> Result<Tensors> {
        let head = self.head.as_ref().ok_or_else(|| not_held("output layers"))?;
        let [shift, scale] = modulation(&head.scale_shift_table, hidden.get("embedded_timestep")?)?;
        let hidden_states = ops::layer_norm_modulate(hidden.get("hidden_states")?, &shift, &scale, EPS)?; // norm_out
        let patches = head.proj_out.forward(&hidden_states)?; // [B, L_img, p p C_out]
        Ok(Tensors::new().with("sample", unpatchify(&patches, hidden.get("grid")?, self.patch_size)?))
    }
}

/// What a table `[N, D]` and the embedded timestep, `[B, N, D]` or `[B, 1, D]`, come to: `[B, D]` each.
fn modulation<const N: usize>(table: &Tensor, timestep: &Tensor) -> Result<[Tensor; N]> {
    let sum = timestep.broadcast_add(&table.unsqueeze(0)?)?; // [B, N, D]
    let mut rows = [(); N].map(|()| sum.clone());
    for (i, row) in rows.iter_mut().enumerate() {
        *row = sum.narrow(1, i, 1)?.squeeze(1)?.contiguous()?;
    }
    Ok(rows)
}

/// `AdaLayerNormSingle`: one projection of the timestep for all blocks.
#[derive(Debug)]
struct AdaLayerNormSingle {
    timestep_embedder: Mlp,
    /// Of the picture's height and width, and of their ratio.
    size_embedders: Option<[Mlp; 2]>,
    linear: ColumnParallelLinear,
}

impl AdaLayerNormSingle {
    fn load(w: &Weights, config: &PixArtTransformerConfig) -> Result<Self> {
        let (d, emb) = (config.inner_dim(), w.pp("emb"));
        let size = |name| Mlp::load(&emb.pp(name), TIME_CHANNELS, d / SIZES);
        let sizes = || -> Result<[Mlp; 2]> { Ok([size("resolution_embedder")?, size("aspect_ratio_embedder")?]) };
        Ok(Self {
            timestep_embedder: Mlp::load(&emb.pp("timestep_embedder"), TIME_CHANNELS, d)?,
            size_embedders: config.is_told_the_size().then(sizes).transpose()?,
            linear: column(&w.pp("linear"), d, 6 * d)?,
        })
    }

    /// `[B, 6, D]` and `[B, 1, D]`, of the type of `like`.
    fn forward(&self, inputs: &Tensors, like: &Tensor) -> Result<(Tensor, Tensor)> {
        let embed = |t: &Tensor, embedder: &Mlp| -> Result<Tensor> {
            let b = t.dim(0)?;
            let emb = embedder.forward(&timestep_embedding(t, TIME_CHANNELS, 1.0)?.to_dtype(like.dtype())?)?;
            Ok(emb.reshape((b, ()))?) // [B N, D'] -> [B, N D']
        };
        let mut emb = embed(inputs.get("timestep")?, &self.timestep_embedder)?;
        if let Some([resolution, aspect_ratio]) = &self.size_embedders {
            let resolution = embed(inputs.get("added_cond_kwargs.resolution")?, resolution)?;
            let aspect_ratio = embed(inputs.get("added_cond_kwargs.aspect_ratio")?, aspect_ratio)?;
            emb = (emb + Tensor::cat(&[&resolution, &aspect_ratio], 1)?)?;
        }
        let (b, d) = emb.dims2()?;
        let timestep = self.linear.forward_gathered(&ops::silu(&emb)?)?.reshape((b, 6, d))?; // [B, 6 D] -> [B, 6, D]
        Ok((timestep, emb.reshape((b, 1, d))?))
    }
}

/// `BasicTransformerBlock` with `ada_norm_single`: attention among the tokens, to the text, and feed-forward.
#[derive(Debug)]
struct BasicTransformerBlock {
    /// `[6, D]`
    scale_shift_table: Tensor,
    attn1: Attention,
    attn2: Attention,
    ff: FeedForward,
    eps: f64,
}

impl BasicTransformerBlock {
    fn load(w: &Weights, config: &PixArtTransformerConfig) -> Result<Self> {
        let (d, heads) = (config.inner_dim(), config.num_attention_heads);
        Ok(Self {
            scale_shift_table: w.get("scale_shift_table", &[6, d], Shard::Replicated)?,
            attn1: Attention::load(&w.pp("attn1"), [d, d], heads)?,
            attn2: Attention::load(&w.pp("attn2"), [d, config.text_dim()], heads)?,
            ff: FeedForward::load(&w.pp("ff"), d)?,
            eps: config.norm_eps,
        })
    }

    /// `x: [B, L_img, D]` and `timestep: [B, 6, D]`, equal on every rank, give the new `x`, equal on every rank.
    fn forward(&self, x: &Tensor, text: Text<'_>, timestep: &Tensor) -> Result<Tensor> {
        let [shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp] = modulation(&self.scale_shift_table, timestep)?;
        let normed = ops::layer_norm_modulate(x, &shift_msa, &scale_msa, self.eps)?; // norm1
        let x = ops::gated(x, &gate_msa, &self.attn1.forward(&normed, None, None)?)?;
        let x = (&x + self.attn2.forward(&x, Some(text), None)?)?; // without a norm
        let normed = ops::layer_norm_modulate(&x, &shift_mlp, &scale_mlp, self.eps)?; // norm2
        Ok(ops::gated(&x, &gate_mlp, &self.ff.forward(&normed)?)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Error;

    #[test]
    fn what_is_not_supported_is_refused_by_its_name() {
        let published = json!({ "caption_channels": 4096, "num_embeds_ada_norm": 1000, "norm_num_groups": 32, "norm_eps": 1e-6 });
        let of = |json: &Value| serde_json::from_value::<PixArtTransformerConfig>(json.clone()).unwrap();
        of(&published).validate().unwrap();
        for (field, value) in [
            ("norm_type", json!("ada_norm_zero")),
            ("attention_type", json!("gated")),
            ("attention_bias", json!(false)),
            ("activation_fn", json!("geglu")),
            ("patch_size", json!(0)),
            ("patch_size", json!(256)),
            ("num_layers", json!(usize::MAX)),
            ("attention_head_dim", json!(71)),
            ("num_attention_heads", json!(1 << 20)),
            ("cross_attention_dim", json!(4096)),
            ("cross_attention_dim", json!(null)),
            ("caption_channels", json!(0)),
            ("interpolation_scale", json!(0)),
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
