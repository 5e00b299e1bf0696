//! The FLUX.1 transformer (Black Forest Labs, <https://github.com/black-forest-labs/flux>).
//!
//! Follows diffusers 0.42.1, `models/transformers/transformer_flux.py`: its names, its order, its casts. It differs in the
//! slicing alone: heads and MLP columns are divided over the tensor-parallel ranks, and so is AdaLN modulation, which
//! diffusers' plan leaves whole on every rank (27 % of the weights). Whole on every rank are only the embedders and
//! `proj_out` (0.4 %: a gather of their outputs would cost more than it saves) and the q/k norms (one head wide).
//!
//! The row of blocks is `num_layers` double-stream blocks, then `num_single_layers` single-stream ones; a block range may
//! end anywhere in it.

use std::ops::Range;

use parallel::{DType, Linear, Tensor, Tensors, Weights};
use serde::Deserialize;

use crate::Result;
use crate::blocks::{BlockModel, RangeOf};
use crate::mmdit::attention::{Heads, Rope};
use crate::mmdit::embeddings::TimeTextEmbed;
use crate::mmdit::layers::{AdaLayerNorm, linear};
use crate::mmdit::residuals::Residuals;
use crate::mmdit::{MAX_BLOCKS, MAX_WIDTH, check_heads, check_widths, load_if, not_held, unsupported};

mod blocks;
mod controlnet;
mod pos_embed;

pub use controlnet::{FluxControlNet, FluxControlNetConfig};

use blocks::{FluxSingleTransformerBlock, FluxTransformerBlock};
use pos_embed::FluxPosEmbed;

/// Ids of a token: picture, row, column.
const AXES: usize = 3;

/// `config.json` of a `FluxTransformer2DModel`.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub struct FluxTransformerConfig {
    /// Side of a patch that the transformer itself cuts; the pipeline has packed its latents already.
    pub patch_size: usize,
    /// Channels of an image token.
    pub in_channels: usize,
    /// Channels of an output token; as `in_channels` if not given.
    pub out_channels: Option<usize>,
    /// Double-stream blocks.
    pub num_layers: usize,
    /// Single-stream blocks.
    pub num_single_layers: usize,
    /// Width of a head.
    pub attention_head_dim: usize,
    /// Heads.
    pub num_attention_heads: usize,
    /// Width of `encoder_hidden_states` (T5's).
    pub joint_attention_dim: usize,
    /// Width of `pooled_projections` (CLIP's).
    pub pooled_projection_dim: usize,
    /// Whether guidance is distilled into the model (dev) or not (schnell).
    pub guidance_embeds: bool,
    /// How the width of a head is divided over the axes of the positions.
    pub axes_dims_rope: Vec<usize>,
}

impl Default for FluxTransformerConfig {
    fn default() -> Self {
        Self {
            patch_size: 1,
            in_channels: 64,
            out_channels: None,
            num_layers: 19,
            num_single_layers: 38,
            attention_head_dim: 128,
            num_attention_heads: 24,
            joint_attention_dim: 4096,
            pooled_projection_dim: 768,
            guidance_embeds: false,
            axes_dims_rope: vec![16, 56, 56],
        }
    }
}

impl FluxTransformerConfig {
    /// `D`, the width of the hidden states.
    pub fn inner_dim(&self) -> usize {
        self.num_attention_heads * self.attention_head_dim
    }

    fn heads(&self) -> Heads {
        Heads { count: self.num_attention_heads, width: self.attention_head_dim, qk_norm: true }
    }

    /// Blocks in the row.
    pub fn blocks(&self) -> usize {
        self.num_layers + self.num_single_layers
    }

    /// Whether this is a network at all.
    ///
    /// # Errors
    /// [`crate::Error::Unsupported`] with the first field that cannot be.
    pub fn validate(&self) -> Result<()> {
        check_widths([
            ("patch_size", self.patch_size),
            ("in_channels", self.in_channels),
            ("out_channels", self.out_channels.unwrap_or(self.in_channels)),
            ("attention_head_dim", self.attention_head_dim),
            ("num_attention_heads", self.num_attention_heads),
            ("joint_attention_dim", self.joint_attention_dim),
            ("pooled_projection_dim", self.pooled_projection_dim),
        ])?;
        if self.inner_dim() > MAX_WIDTH {
            return Err(unsupported("num_attention_heads", &self.num_attention_heads));
        }
        for (field, layers) in [("num_layers", self.num_layers), ("num_single_layers", self.num_single_layers)] {
            if layers > MAX_BLOCKS {
                return Err(unsupported(field, &layers));
            }
        }
        let axes = &self.axes_dims_rope;
        let fits = axes.iter().try_fold(0usize, |sum, dim| sum.checked_add(*dim)) == Some(self.attention_head_dim);
        if axes.len() != AXES || !fits || axes.iter().any(|dim| dim % 2 == 1) {
            return Err(unsupported("axes_dims_rope", axes));
        }
        Ok(())
    }
}

/// `FluxTransformer2DModel`, or one rank's part of it.
///
/// Inputs of `embed`, in the type of the weights but for the ids: `hidden_states: [B, L_img, C]`,
/// `encoder_hidden_states: [B, L_txt, D_txt]`, `pooled_projections: [B, P]`, `timestep: [B]` (of 0..1), `guidance: [B]` (only
/// with `guidance_embeds`), `img_ids: [L_img, 3]`, `txt_ids: [L_txt, 3]`, and of a ControlNet `controlnet_block_samples.N` and
/// `controlnet_single_block_samples.N: [B, L_img, D]`. Output: `sample: [B, L_img, C_out]`.
#[derive(Debug)]
pub struct FluxTransformer {
    /// On the first range.
    embedders: Option<Embedders>,
    /// Of this range; the first one's index in the row is `start`.
    transformer_blocks: Vec<FluxTransformerBlock>,
    single_transformer_blocks: Vec<FluxSingleTransformerBlock>,
    start: usize,
    /// On the last range.
    head: Option<Head>,
    num_layers: usize,
    /// Of the double-stream and of the single-stream blocks.
    residuals: [Residuals; 2],
}

/// What comes before the blocks.
#[derive(Debug)]
struct Embedders {
    pos_embed: FluxPosEmbed,
    guidance_embeds: bool,
    time_text_embed: TimeTextEmbed,
    context_embedder: Linear,
    x_embedder: Linear,
}

/// What comes after the blocks.
#[derive(Debug)]
struct Head {
    norm_out: AdaLayerNorm,
    proj_out: Linear,
}

impl FluxTransformer {
    /// Reads what this rank holds of `w`, whose group shares every split tensor: `range` of the row of blocks.
    pub fn load(w: &Weights, config: &FluxTransformerConfig, range: RangeOf) -> Result<Self> {
        config.validate()?;
        check_heads(w, config.num_attention_heads)?;
        let blocks = range.of(config.blocks());
        let (doubles, singles) = kinds(&blocks, config.num_layers);
        let skip_others = |name: &str, count: usize, mine: &Range<usize>| {
            (0..count).filter(|i| !mine.contains(i)).for_each(|i| w.skip(format!("{name}.{i}")));
        };
        skip_others("transformer_blocks", config.num_layers, &doubles);
        skip_others("single_transformer_blocks", config.num_single_layers, &singles);
        let before = ["time_text_embed", "context_embedder", "x_embedder"];
        let embedders = load_if(range.is_first(), w, &before, || Embedders::load(w, config))?;
        let head = load_if(range.is_last(), w, &["norm_out", "proj_out"], || Head::load(w, config))?;
        let double = |i| FluxTransformerBlock::load(&w.pp("transformer_blocks").pp(i), config);
        let single = |i| FluxSingleTransformerBlock::load(&w.pp("single_transformer_blocks").pp(i), config);
        let model = Self {
            embedders,
            transformer_blocks: doubles.map(double).collect::<Result<_>>()?,
            single_transformer_blocks: singles.map(single).collect::<Result<_>>()?,
            start: blocks.start,
            head,
            num_layers: config.num_layers,
            residuals: [
                Residuals { name: "controlnet_block_samples", blocks: config.num_layers },
                Residuals { name: "controlnet_single_block_samples", blocks: config.num_single_layers },
            ],
        };
        w.finish()?;
        Ok(model)
    }
}

impl Embedders {
    fn load(w: &Weights, config: &FluxTransformerConfig) -> Result<Self> {
        Ok(Self {
            pos_embed: FluxPosEmbed::new(&config.axes_dims_rope),
            guidance_embeds: config.guidance_embeds,
            time_text_embed: TimeTextEmbed::load(
                &w.pp("time_text_embed"),
                config.pooled_projection_dim,
                config.inner_dim(),
                config.guidance_embeds,
            )?,
            context_embedder: linear(&w.pp("context_embedder"), config.joint_attention_dim, config.inner_dim())?,
            x_embedder: linear(&w.pp("x_embedder"), config.in_channels, config.inner_dim())?,
        })
    }

    /// `temb: [B, D]`. Time and guidance are rounded to `dtype`, that of the hidden states, before they are multiplied by 1000,
    /// as in the reference.
    fn temb(&self, inputs: &Tensors, dtype: DType) -> Result<Tensor> {
        let thousandfold = |name: &str| -> Result<Tensor> { Ok((inputs.get(name)?.to_dtype(dtype)? * 1000.0)?) };
        let guidance = self.guidance_embeds.then(|| thousandfold("guidance")).transpose()?;
        self.time_text_embed.forward(&thousandfold("timestep")?, guidance.as_ref(), inputs.get("pooled_projections")?)
    }
}

impl Head {
    fn load(w: &Weights, config: &FluxTransformerConfig) -> Result<Self> {
        let out_channels = config.out_channels.unwrap_or(config.in_channels);
        Ok(Self {
            norm_out: AdaLayerNorm::load(&w.pp("norm_out.linear"), config.inner_dim(), 2)?,
            proj_out: linear(&w.pp("proj_out"), config.inner_dim(), config.patch_size * config.patch_size * out_channels)?,
        })
    }
}

/// Between `embed`, the ranges and `output` travel `hidden_states: [B, L_img, D]`, `encoder_hidden_states: [B, L_txt, D]`,
/// `temb: [B, D]`, `image_rotary_emb.cos` and `.sin: [L_txt + L_img, Dh/2]`, and the ControlNet residuals still to be added.
impl BlockModel for FluxTransformer {
    fn embed(&self, inputs: &Tensors) -> Result<Tensors> {
        let embedders = self.embedders.as_ref().ok_or_else(|| not_held("embedders"))?;
        let hidden_states = embedders.x_embedder.forward(inputs.get("hidden_states")?)?; // [B, L_img, D]
        let temb = embedders.temb(inputs, hidden_states.dtype())?; // [B, D]
        let encoder_hidden_states = embedders.context_embedder.forward(inputs.get("encoder_hidden_states")?)?; // [B, L_txt, D]
        let ids = Tensor::cat(&[inputs.get("txt_ids")?, inputs.get("img_ids")?], 0)?; // [L_txt + L_img, 3]
        let rope = embedders.pos_embed.forward(&ids)?;
        let mut hidden = Tensors::new()
            .with("hidden_states", hidden_states)
            .with("encoder_hidden_states", encoder_hidden_states)
            .with("temb", temb)
            .with("image_rotary_emb.cos", rope.cos)
            .with("image_rotary_emb.sin", rope.sin);
        for residuals in &self.residuals {
            // Every residual goes to the same number of blocks in a row, the last perhaps to fewer.
            residuals.place(inputs, &mut hidden, |block, count| block / residuals.blocks.div_ceil(count));
        }
        Ok(hidden)
    }

    fn blocks(&self, mut hidden: Tensors) -> Result<Tensors> {
        let temb = hidden.get("temb")?.clone();
        let rope = Rope { cos: hidden.get("image_rotary_emb.cos")?.clone(), sin: hidden.get("image_rotary_emb.sin")?.clone() };
        let mut hidden_states = hidden.take("hidden_states")?;
        let mut encoder_hidden_states = hidden.take("encoder_hidden_states")?;
        let [of_doubles, of_singles] = &self.residuals;
        for (index, block) in (self.start..).zip(&self.transformer_blocks) {
            (encoder_hidden_states, hidden_states) = block.forward(&hidden_states, &encoder_hidden_states, &temb, &rope)?;
            hidden_states = of_doubles.add(hidden_states, &hidden, index)?;
        }
        if !self.single_transformer_blocks.is_empty() {
            let (l_txt, l_img) = (encoder_hidden_states.dim(1)?, hidden_states.dim(1)?);
            let mut stream = Tensor::cat(&[&encoder_hidden_states, &hidden_states], 1)?; // [B, L_txt + L_img, D]
            for (index, block) in (self.start.saturating_sub(self.num_layers)..).zip(&self.single_transformer_blocks) {
                stream = block.forward(&stream, &temb, &rope)?;
                if let Some(residual) = of_singles.of(&hidden, index) {
                    stream = (stream + residual.pad_with_zeros(1, l_txt, 0)?)?;
                }
            }
            encoder_hidden_states = stream.narrow(1, 0, l_txt)?.contiguous()?;
            hidden_states = stream.narrow(1, l_txt, l_img)?.contiguous()?;
        }
        let end = self.start + self.transformer_blocks.len() + self.single_transformer_blocks.len();
        of_doubles.drop_before(&mut hidden, end);
        of_singles.drop_before(&mut hidden, end.saturating_sub(self.num_layers));
        Ok(hidden.with("hidden_states", hidden_states).with("encoder_hidden_states", encoder_hidden_states))
    }

    fn output(&self, hidden: Tensors) -> Result<Tensors> {
        let head = self.head.as_ref().ok_or_else(|| not_held("output layers"))?;
        let (hidden_states, temb) = (hidden.get("hidden_states")?, hidden.get("temb")?);
        let hidden_states = head.norm_out.continuous(hidden_states, temb)?;
        Ok(Tensors::new().with("sample", head.proj_out.forward(&hidden_states)?))
    }
}

/// The double-stream and the single-stream blocks of a range, each counted from its first.
fn kinds(blocks: &Range<usize>, num_layers: usize) -> (Range<usize>, Range<usize>) {
    let doubles = blocks.start.min(num_layers)..blocks.end.min(num_layers);
    let singles = blocks.start.saturating_sub(num_layers)..blocks.end.saturating_sub(num_layers);
    (doubles, singles)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Error;

    #[test]
    fn a_nonsensical_configuration_is_a_typed_error() {
        let good = FluxTransformerConfig::default();
        good.validate().unwrap();
        let check = |field: &str, config: FluxTransformerConfig| match config.validate() {
            Err(Error::Unsupported { field: found, .. }) => assert_eq!(found, field),
            other => panic!("{field}: {other:?}"),
        };
        check("num_attention_heads", FluxTransformerConfig { num_attention_heads: 0, ..good.clone() });
        check("num_attention_heads", FluxTransformerConfig { num_attention_heads: 1 << 20, ..good.clone() });
        check("attention_head_dim", FluxTransformerConfig { attention_head_dim: usize::MAX, ..good.clone() });
        check("num_layers", FluxTransformerConfig { num_layers: usize::MAX, ..good.clone() });
        for axes in [vec![16, 56], vec![16, 56, 54], vec![15, 57, 56], vec![usize::MAX, 56, 56]] {
            check("axes_dims_rope", FluxTransformerConfig { axes_dims_rope: axes, ..good.clone() });
        }
    }
}
