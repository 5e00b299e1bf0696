//! The Stable Diffusion 3 and 3.5 transformer (MMDiT: P. Esser et al., "Scaling Rectified Flow Transformers for High-Resolution
//! Image Synthesis", <https://arxiv.org/abs/2403.03206>).
//!
//! Follows diffusers 0.42.1, `models/transformers/transformer_sd3.py`, and `JointTransformerBlock` of `models/attention.py`.
//! It differs in the slicing alone: heads and MLP columns are divided over the tensor-parallel ranks, and so are AdaLN modulation,
//! the patch embedding and the table of positions (up to a tenth of the weights). Whole on every rank are the embedders of
//! time and text and `proj_out` (less than 1 %: a gather of their outputs would cost more than it saves) and the q/k norms.

use parallel::{Device, Linear, Tensor, Tensors, Weights};
use serde::Deserialize;

use crate::blocks::{BlockModel, RangeOf};
use crate::mmdit::attention::Heads;
use crate::mmdit::embeddings::TimeTextEmbed;
use crate::mmdit::layers::{AdaLayerNorm, linear};
use crate::mmdit::patches::{indices, unpatchify};
use crate::mmdit::residuals::Residuals;
use crate::mmdit::{MAX_BLOCKS, MAX_WIDTH, check_heads, check_widths, load_if, load_range, not_held, unsupported};
use crate::{Error, Result};

mod block;
mod controlnet;
mod patch_embed;

use block::JointTransformerBlock;
pub use controlnet::{Sd3ControlNet, Sd3ControlNetConfig};
use patch_embed::PatchEmbed;

/// `config.json` of an `SD3Transformer2DModel`.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub struct Sd3TransformerConfig {
    /// Side of the latents the model was trained on.
    pub sample_size: usize,
    /// Side of a patch of latents, which is one token.
    pub patch_size: usize,
    /// Latent channels.
    pub in_channels: usize,
    /// Channels of the output; as `in_channels` if not given.
    pub out_channels: Option<usize>,
    /// Blocks.
    pub num_layers: usize,
    /// Width of a head.
    pub attention_head_dim: usize,
    /// Heads.
    pub num_attention_heads: usize,
    /// Width of `encoder_hidden_states`.
    pub joint_attention_dim: usize,
    /// Width they are brought to: that of the hidden states.
    pub caption_projection_dim: usize,
    /// Width of `pooled_projections`.
    pub pooled_projection_dim: usize,
    /// Side of the table of positions, in tokens.
    pub pos_embed_max_size: usize,
    /// Blocks in which the image also attends to itself alone (3.5 medium).
    pub dual_attention_layers: Vec<usize>,
    /// `rms_norm` (3.5) or none (3).
    pub qk_norm: Option<String>,
}

impl Default for Sd3TransformerConfig {
    fn default() -> Self {
        Self {
            sample_size: 128,
            patch_size: 2,
            in_channels: 16,
            out_channels: Some(16),
            num_layers: 18,
            attention_head_dim: 64,
            num_attention_heads: 18,
            joint_attention_dim: 4096,
            caption_projection_dim: 1152,
            pooled_projection_dim: 2048,
            pos_embed_max_size: 96,
            dual_attention_layers: Vec::new(),
            qk_norm: None,
        }
    }
}

impl Sd3TransformerConfig {
    /// `D`, the width of the hidden states.
    pub fn inner_dim(&self) -> usize {
        self.num_attention_heads * self.attention_head_dim
    }

    /// `C_out`
    fn channels_out(&self) -> usize {
        self.out_channels.unwrap_or(self.in_channels)
    }

    fn heads(&self) -> Heads {
        Heads { count: self.num_attention_heads, width: self.attention_head_dim, qk_norm: self.qk_norm.is_some() }
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
            ("joint_attention_dim", self.joint_attention_dim),
            ("pooled_projection_dim", self.pooled_projection_dim),
            ("pos_embed_max_size", self.pos_embed_max_size),
        ])?;
        if self.inner_dim() > MAX_WIDTH {
            return Err(unsupported("num_attention_heads", &self.num_attention_heads));
        }
        if self.caption_projection_dim != self.inner_dim() {
            return Err(unsupported("caption_projection_dim", &self.caption_projection_dim));
        }
        if !(1..=MAX_BLOCKS).contains(&self.num_layers) {
            return Err(unsupported("num_layers", &self.num_layers));
        }
        match self.qk_norm.as_deref() {
            None | Some("rms_norm") => Ok(()),
            Some(other) => Err(unsupported("qk_norm", &other)),
        }
    }

    /// Refuses blocks to leave out that are not there.
    ///
    /// # Errors
    /// [`Error::Invalid`] with the first of them.
    pub fn check_skip_layers(&self, layers: impl IntoIterator<Item = usize>) -> Result<()> {
        match layers.into_iter().find(|layer| *layer >= self.num_layers) {
            Some(layer) => Err(Error::Invalid {
                field: "skip_layers",
                reason: format!("there is no block {layer}: they are 0 to {}", self.num_layers - 1),
            }),
            None => Ok(()),
        }
    }
}

/// `SD3Transformer2DModel`, or one rank's part of it.
///
/// Inputs of `embed`, in the type of the weights: `hidden_states: [B, C, H, W]`, `encoder_hidden_states: [B, L_txt, D_txt]`,
/// `pooled_projections: [B, P]`, `timestep: [B]` (of 0..1000), of a ControlNet `block_controlnet_hidden_states.N: [B, L_img, D]`,
/// and if blocks are to be left out `skip_layers`, their indices. Output: `sample: [B, C_out, H, W]`.
#[derive(Debug)]
pub struct Sd3Transformer {
    /// On the first range.
    embedders: Option<Embedders>,
    /// Of this range; the first one's index in the row is `start`.
    transformer_blocks: Vec<JointTransformerBlock>,
    start: usize,
    /// On the last range.
    head: Option<Head>,
    /// The last block, which has no output for the text, gets none.
    residuals: Residuals,
    config: Sd3TransformerConfig,
}

/// What comes before the blocks.
#[derive(Debug)]
struct Embedders {
    pos_embed: PatchEmbed,
    time_text_embed: TimeTextEmbed,
    context_embedder: Linear,
}

/// What comes after the blocks.
#[derive(Debug)]
struct Head {
    norm_out: AdaLayerNorm,
    proj_out: Linear,
}

impl Sd3Transformer {
    /// Reads what this rank holds of `w`, whose group shares every split tensor: `range` of the row of blocks.
    pub fn load(w: &Weights, config: &Sd3TransformerConfig, range: RangeOf) -> Result<Self> {
        config.validate()?;
        check_heads(w, config.num_attention_heads)?;
        let before = ["pos_embed", "time_text_embed", "context_embedder"];
        let embedders = load_if(range.is_first(), w, &before, || Embedders::load(w, config))?;
        let head = load_if(range.is_last(), w, &["norm_out", "proj_out"], || Head::load(w, config))?;
        let model = Self {
            embedders,
            start: range.of(config.num_layers).start,
            transformer_blocks: load_range(w, "transformer_blocks", config.num_layers, range, |w, i| {
                JointTransformerBlock::load(w, config, i)
            })?,
            head,
            residuals: Residuals { name: "block_controlnet_hidden_states", blocks: config.num_layers - 1 },
            config: config.clone(),
        };
        w.finish()?;
        Ok(model)
    }
}

impl Embedders {
    fn load(w: &Weights, config: &Sd3TransformerConfig) -> Result<Self> {
        let d = config.inner_dim();
        Ok(Self {
            pos_embed: PatchEmbed::load(&w.pp("pos_embed"), config)?,
            time_text_embed: TimeTextEmbed::load(&w.pp("time_text_embed"), config.pooled_projection_dim, d, false)?,
            context_embedder: linear(&w.pp("context_embedder"), config.joint_attention_dim, d)?,
        })
    }
}

impl Head {
    fn load(w: &Weights, config: &Sd3TransformerConfig) -> Result<Self> {
        let (d, patch) = (config.inner_dim(), config.patch_size * config.patch_size);
        Ok(Self {
            norm_out: AdaLayerNorm::load(&w.pp("norm_out.linear"), d, 2)?,
            proj_out: linear(&w.pp("proj_out"), d, patch * config.channels_out())?,
        })
    }
}

/// Between `embed`, the ranges and `output` travel `hidden_states: [B, L_img, D]`, `encoder_hidden_states: [B, L_txt, D]`,
/// `temb: [B, D]`, `grid` (rows and columns of tokens), `skip_layers`, and the ControlNet residuals still to be added.
impl BlockModel for Sd3Transformer {
    fn embed(&self, inputs: &Tensors) -> Result<Tensors> {
        let embedders = self.embedders.as_ref().ok_or_else(|| not_held("embedders"))?;
        let (hidden_states, grid) = embedders.pos_embed.forward(inputs.get("hidden_states")?)?; // [B, L_img, D]
        let temb = embedders.time_text_embed.forward(inputs.get("timestep")?, None, inputs.get("pooled_projections")?)?; // [B, D]
        let encoder_hidden_states = embedders.context_embedder.forward(inputs.get("encoder_hidden_states")?)?; // [B, L_txt, D]
        let mut hidden = Tensors::new()
            .with("hidden_states", hidden_states)
            .with("encoder_hidden_states", encoder_hidden_states)
            .with("temb", temb)
            .with("grid", Tensor::new(&grid, &Device::Cpu)?);
        if let Some(layers) = inputs.find("skip_layers") {
            self.config.check_skip_layers(indices(layers)?)?;
            hidden.insert("skip_layers", layers.clone());
        }
        let interval_control = |residuals: usize| self.config.num_layers as f64 / residuals as f64;
        self.residuals.place(inputs, &mut hidden, |block, residuals| (block as f64 / interval_control(residuals)) as usize);
        Ok(hidden)
    }

    fn blocks(&self, mut hidden: Tensors) -> Result<Tensors> {
        let temb = hidden.get("temb")?.clone();
        let skip_layers = hidden.find("skip_layers").map_or(Ok(Vec::new()), indices)?;
        let mut hidden_states = hidden.take("hidden_states")?;
        let mut encoder_hidden_states = hidden.take("encoder_hidden_states")?;
        for (index, block) in (self.start..).zip(&self.transformer_blocks) {
            if !skip_layers.contains(&index) {
                (encoder_hidden_states, hidden_states) = block.forward(hidden_states, encoder_hidden_states, &temb)?;
            }
            // A block that is left out gets its residual all the same, as in the reference.
            hidden_states = self.residuals.add(hidden_states, &hidden, index)?;
        }
        self.residuals.drop_before(&mut hidden, self.start + self.transformer_blocks.len());
        Ok(hidden.with("hidden_states", hidden_states).with("encoder_hidden_states", encoder_hidden_states))
    }

    fn output(&self, hidden: Tensors) -> Result<Tensors> {
        let head = self.head.as_ref().ok_or_else(|| not_held("output layers"))?;
        let hidden_states = head.norm_out.continuous(hidden.get("hidden_states")?, hidden.get("temb")?)?;
        let patches = head.proj_out.forward(&hidden_states)?; // [B, L_img, p p C_out]
        let sample = unpatchify(&patches, hidden.get("grid")?, self.config.patch_size)?;
        Ok(Tensors::new().with("sample", sample))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Stable Diffusion 3 medium's.
    fn medium() -> Sd3TransformerConfig {
        Sd3TransformerConfig {
            num_layers: 24,
            num_attention_heads: 24,
            caption_projection_dim: 1536,
            pos_embed_max_size: 192,
            ..Sd3TransformerConfig::default()
        }
    }

    #[test]
    fn a_nonsensical_configuration_is_a_typed_error() {
        let good = medium();
        good.validate().unwrap();
        let check = |field: &str, config: Sd3TransformerConfig| match config.validate() {
            Err(Error::Unsupported { field: found, .. }) => assert_eq!(found, field),
            other => panic!("{field}: {other:?}"),
        };
        check("patch_size", Sd3TransformerConfig { patch_size: 0, ..good.clone() });
        check("num_attention_heads", Sd3TransformerConfig { num_attention_heads: 1 << 20, ..good.clone() });
        check("attention_head_dim", Sd3TransformerConfig { attention_head_dim: usize::MAX, ..good.clone() });
        check("num_layers", Sd3TransformerConfig { num_layers: 0, ..good.clone() });
        check("num_layers", Sd3TransformerConfig { num_layers: usize::MAX, ..good.clone() });
        check("caption_projection_dim", Sd3TransformerConfig { caption_projection_dim: 1152, ..good.clone() });
        check("pos_embed_max_size", Sd3TransformerConfig { pos_embed_max_size: 0, ..good.clone() });
        check("qk_norm", Sd3TransformerConfig { qk_norm: Some("layer_norm".into()), ..good });
    }

    #[test]
    fn a_block_to_skip_that_is_not_there_is_named() {
        medium().check_skip_layers([7, 8, 23]).unwrap();
        match medium().check_skip_layers([7, 24]) {
            Err(Error::Invalid { field: "skip_layers", reason }) => assert!(reason.contains("24"), "{reason}"),
            other => panic!("{other:?}"),
        }
    }
}
