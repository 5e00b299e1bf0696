//! The U-Nets of DeepFloyd IF, of its first stage and of those that enlarge (after C. Saharia et al., "Photorealistic Text-to-Image Diffusion Models
//! with Deep Language Understanding", <https://arxiv.org/abs/2205.11487>): on pixels, not on latents.
//!
//! Follows diffusers 0.42.1, `models/unets/unet_2d_condition.py` and `unet_2d_blocks.py` with the blocks that IF's configurations name
//! (`ResnetDownsampleBlock2D`, `SimpleCrossAttnDownBlock2D` and their kin). It is cut as the other U-Nets are: a rank makes its share of every
//! convolution's output channels and of the heads. Whole on every rank are the first and the last convolution, what embeds the text, and norms.

use parallel::convolution::Placement;
use parallel::ops::{self, Activation};
use parallel::{Conv2d, Linear, Tensor, Tensors, Weights};

use crate::blocks::{BlockModel, RangeOf};
use crate::mmdit::embeddings::{ParallelMlp, timestep_embedding};
use crate::mmdit::layers::linear;
use crate::mmdit::{load_if, not_held};
use crate::unet_2d_condition::resnet::{GroupNorm, of_time};
use crate::{Error, Result};

mod attention;
mod blocks;
mod config;
mod text_time;

use blocks::Block;
pub use config::{IfDownBlockType, IfUNetConfig, IfUpBlockType};
use text_time::TextTimeEmbedding;

/// Side of the first and the last kernel.
const SIZE: usize = 3;
/// What the way up takes again, in the order in which it was put there.
const SKIPS: &str = "down_block_res_samples";

/// A `UNet2DConditionModel` of DeepFloyd IF, or one rank's part of it.
///
/// Inputs of `embed`, in f32: `sample: [B, C, H, W]`, `timestep: [B]`, `encoder_hidden_states: [B, L, D_txt]` of T5, and of a network that enlarges
/// `class_labels: [B]`, the noise level of the picture beside the sample. Output: `sample: [B, C_out, H, W]`.
#[derive(Debug)]
pub struct IfUNet {
    /// On the first range.
    embedders: Option<Embedders>,
    /// Of this range; the first one's index in the row is `start`.
    blocks: Vec<Block>,
    /// On the last range.
    head: Option<Head>,
    config: IfUNetConfig,
}

/// What comes before the blocks.
#[derive(Debug)]
struct Embedders {
    conv_in: Conv2d,
    time_embedding: ParallelMlp,
    class_embedding: Option<ParallelMlp>,
    add_embedding: TextTimeEmbedding,
    encoder_hid_proj: Linear,
}

/// What comes after the blocks.
#[derive(Debug)]
struct Head {
    conv_norm_out: GroupNorm,
    conv_out: Conv2d,
}

impl IfUNet {
    /// Reads what this rank holds of `w`, whose group shares every split tensor: `range` of the row of blocks.
    pub fn load(w: &Weights, config: &IfUNetConfig, range: RangeOf) -> Result<Self> {
        config.validate()?;
        let (tp, shares) = (w.group().size(), config.shares());
        if !shares.is_multiple_of(tp) {
            let what = "what the heads and norm_num_groups have in common".into();
            return Err(parallel::Error::Indivisible { what, size: shares, tp }.into());
        }
        let blocks = range.of(config.blocks());
        (0..config.blocks()).filter(|i| !blocks.contains(i)).for_each(|i| w.skip(config.prefix(i)));
        let before = ["conv_in", "time_embedding", "class_embedding", "add_embedding", "encoder_hid_proj"];
        let network = Self {
            embedders: load_if(range.is_first(), w, &before, || Embedders::load(w, config))?,
            head: load_if(range.is_last(), w, &["conv_norm_out", "conv_out"], || Head::load(w, config))?,
            blocks: blocks.map(|i| Block::load(w, config, i)).collect::<Result<_>>()?,
            config: config.clone(),
        };
        w.finish()?;
        Ok(network)
    }
}

impl Embedders {
    fn load(w: &Weights, config: &IfUNetConfig) -> Result<Self> {
        let (c, d) = (config.block_out_channels[0], config.time_embed_dim());
        let of_numbers = |name| of_time(|| ParallelMlp::load(&w.pp(name), [c, d, d], Activation::Gelu));
        Ok(Self {
            conv_in: Conv2d::load(&w.pp("conv_in"), [config.in_channels, c], SIZE)?,
            time_embedding: of_numbers("time_embedding")?,
            class_embedding: config.has_noise_level().then(|| of_numbers("class_embedding")).transpose()?,
            add_embedding: TextTimeEmbedding::load(&w.pp("add_embedding"), config)?,
            encoder_hid_proj: linear(&w.pp("encoder_hid_proj"), config.encoder_hid_dim, config.cross_attention_dim)?,
        })
    }

    /// `[B, D]`
    fn temb(&self, inputs: &Tensors, config: &IfUNetConfig) -> Result<Tensor> {
        let numbers = |name: &str| timestep_embedding(inputs.get(name)?, config.block_out_channels[0], 1.0);
        let mut emb = self.time_embedding.forward(&numbers("timestep")?)?;
        if let Some(embedding) = &self.class_embedding {
            emb = (emb + embedding.forward(&numbers("class_labels")?)?)?;
        }
        let emb = (emb + self.add_embedding.forward(inputs.get("encoder_hidden_states")?)?)?;
        Ok(if config.activates_time() { ops::activate(&emb, Activation::Gelu)? } else { emb })
    }
}

impl Head {
    fn load(w: &Weights, config: &IfUNetConfig) -> Result<Self> {
        let c = config.block_out_channels[0];
        Ok(Self {
            conv_norm_out: GroupNorm::load(&w.pp("conv_norm_out"), c, config.norm_num_groups, config.norm_eps)?,
            conv_out: Conv2d::load(&w.pp("conv_out"), [c, config.out_channels], SIZE)?,
        })
    }
}

/// Between `embed`, the ranges and `output` travel `sample: [B, C, H, W]`, `temb: [B, D]`, `encoder_hidden_states: [B, L, D_cross]` and what the way up
/// takes again, as `down_block_res_samples.N`.
impl BlockModel for IfUNet {
    fn embed(&self, inputs: &Tensors) -> Result<Tensors> {
        let embedders = self.embedders.as_ref().ok_or_else(|| not_held("embedders"))?;
        let sample = inputs.get("sample")?;
        let (_, _, h, w) = sample.dims4()?;
        let multiple = self.config.multiple();
        if !h.is_multiple_of(multiple) || !w.is_multiple_of(multiple) {
            return Err(Error::Invalid { field: "sample", reason: format!("{h} x {w} pixels are not multiples of {multiple}") });
        }
        let temb = embedders.temb(inputs, &self.config)?;
        let sample = embedders.conv_in.forward(sample, Placement::same(SIZE))?;
        let text = embedders.encoder_hid_proj.forward(inputs.get("encoder_hidden_states")?)?;
        Ok(Tensors::new()
            .with(format!("{SKIPS}.0"), sample.clone())
            .with("sample", sample)
            .with("temb", temb)
            .with("encoder_hidden_states", text))
    }

    fn blocks(&self, mut hidden: Tensors) -> Result<Tensors> {
        let (mut temb, text) = (hidden.get("temb")?.clone(), hidden.get("encoder_hidden_states")?.clone());
        if !self.config.resnet_skip_time_act {
            temb = ops::activate(&temb, Activation::Gelu)?; // once for all residual blocks, which would do it each
        }
        let mut skips = hidden.list(SKIPS);
        (0..skips.len()).try_for_each(|i| hidden.take(&format!("{SKIPS}.{i}")).map(drop))?;
        let mut sample = hidden.take("sample")?;
        for block in &self.blocks {
            sample = block.forward(sample, &temb, &text, &mut skips)?;
        }
        for (i, skip) in skips.into_iter().enumerate() {
            hidden.insert(format!("{SKIPS}.{i}"), skip);
        }
        Ok(hidden.with("sample", sample))
    }

    fn output(&self, hidden: Tensors) -> Result<Tensors> {
        let head = self.head.as_ref().ok_or_else(|| not_held("output layers"))?;
        let normed = head.conv_norm_out.forward(hidden.get("sample")?, Some(Activation::Gelu))?;
        Ok(Tensors::new().with("sample", head.conv_out.forward(&normed, Placement::same(SIZE))?))
    }
}
