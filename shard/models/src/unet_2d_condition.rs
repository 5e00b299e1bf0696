//! The U-Net of Stable Diffusion 1, 2 and XL (R. Rombach et al., "High-Resolution Image Synthesis with Latent Diffusion Models",
//! <https://arxiv.org/abs/2112.10752>; D. Podell et al., "SDXL", <https://arxiv.org/abs/2307.01952>).
//!
//! Follows diffusers 0.42.1, `models/unets/unet_2d_condition.py`, `unet_2d_blocks.py`, `models/resnet.py` and
//! `models/transformers/transformer_2d.py`. It differs in the slicing alone: a rank makes its share of every convolution's output channels, of the heads
//! and of the feed-forward columns. Whole on every rank are the first and the last convolution, the timestep's embedding (1 %) and norms. The row that
//! block ranges cut is the blocks down, the middle one and the blocks up.

use parallel::convolution::Placement;
use parallel::ops::{self, Activation};
use parallel::{Conv2d, Linear, Tensor, Tensors, Weights};

use crate::blocks::{BlockModel, RangeOf};
use crate::mmdit::embeddings::{Mlp, timestep_embedding};
use crate::mmdit::{load_if, not_held};
use crate::{Error, Result};

mod blocks;
mod config;
mod controlnet;
pub(crate) mod resnet;
mod transformer_2d;
mod union;

use blocks::{Block, Conditions};
pub(crate) use config::gcd;
pub use config::{DownBlockType, OneOrMany, UNet2DConditionConfig, UpBlockType};
pub(crate) use controlnet::UNIONS;
pub use controlnet::{ControlNetConfig, ControlNetModel};
use resnet::{GroupNorm, of_time};

/// Side of the first and the last kernel.
const SIZE: usize = 3;
/// What the way up takes again, in the order in which it was put there.
const SKIPS: &str = "down_block_res_samples";
/// A ControlNet's, for each of those and for the middle.
const DOWN_RESIDUALS: &str = "down_block_additional_residuals";
const MID_RESIDUAL: &str = "mid_block_additional_residual";
/// A T2I-Adapter's, one for each block down, and another for the middle if it is of that size.
pub(crate) const FEATURES: &str = "down_intrablock_additional_residuals";

/// `UNet2DConditionModel`, or one rank's part of it.
///
/// Inputs of `embed`, in f32: `sample: [B, C, H, W]`, `timestep: [B]`, `encoder_hidden_states: [B, L, D_txt]`; of XL
/// `added_cond_kwargs.text_embeds: [B, P]` and `added_cond_kwargs.time_ids: [B, N]`; of latent consistency models
/// `timestep_cond: [B, D]`; of a ControlNet `down_block_additional_residuals.N` and `mid_block_additional_residual`; of a
/// T2I-Adapter `down_intrablock_additional_residuals.N`. Output: `sample: [B, C_out, H, W]`.
#[derive(Debug)]
pub struct UNet2DConditionModel {
    /// On the first range.
    embedders: Option<Embedders>,
    /// Of this range; the first one's index in the row is `start`.
    blocks: Vec<Block>,
    start: usize,
    /// On the last range.
    head: Option<Head>,
    config: UNet2DConditionConfig,
}

/// What comes before the blocks.
#[derive(Debug)]
struct Embedders {
    conv_in: Conv2d,
    time_embedding: Mlp,
    time_cond_proj: Option<Linear>,
    add_embedding: Option<Mlp>,
}

/// What comes after the blocks.
#[derive(Debug)]
struct Head {
    conv_norm_out: GroupNorm,
    conv_out: Conv2d,
}

impl UNet2DConditionModel {
    /// Reads what this rank holds of `w`, whose group shares every split tensor: `range` of the row of blocks.
    pub fn load(w: &Weights, config: &UNet2DConditionConfig, range: RangeOf) -> Result<Self> {
        config.validate()?;
        let (tp, shares) = (w.group().size(), config.shares());
        if !shares.is_multiple_of(tp) {
            let what = "what attention_head_dim and norm_num_groups have in common".into();
            return Err(parallel::Error::Indivisible { what, size: shares, tp }.into());
        }
        let blocks = range.of(config.blocks());
        let others = (0..config.blocks()).filter(|i| !blocks.contains(i));
        others.for_each(|i| w.skip(Block::prefix(config, i)));
        let before = ["conv_in", "time_embedding", "add_embedding"];
        let embedders = load_if(range.is_first(), w, &before, || Embedders::load(w, config))?;
        let head = load_if(range.is_last(), w, &["conv_norm_out", "conv_out"], || Head::load(w, config))?;
        let start = blocks.start;
        let blocks = blocks.map(|i| Block::load(w, config, i)).collect::<Result<_>>()?;
        w.finish()?;
        Ok(Self { embedders, blocks, start, head, config: config.clone() })
    }
}

impl Embedders {
    fn load(w: &Weights, config: &UNet2DConditionConfig) -> Result<Self> {
        let (c, d) = (config.block_out_channels[0], config.time_embed_dim());
        let cond_proj = |width| Linear::load(&w.pp("time_embedding.cond_proj"), width, c);
        let add = |width| of_time(|| Mlp::load(&w.pp("add_embedding"), width, d));
        let added = config.projection_class_embeddings_input_dim.filter(|_| config.has_text_time());
        Ok(Self {
            conv_in: Conv2d::load(&w.pp("conv_in"), [config.in_channels, c], SIZE)?,
            time_embedding: of_time(|| Mlp::load(&w.pp("time_embedding"), c, d))?,
            time_cond_proj: config.time_cond_proj_dim.map(cond_proj).transpose()?,
            add_embedding: added.map(add).transpose()?,
        })
    }

    /// `[B, D]`
    fn temb(&self, inputs: &Tensors, config: &UNet2DConditionConfig) -> Result<Tensor> {
        let mut t_emb = timestep_embedding(inputs.get("timestep")?, config.block_out_channels[0], 1.0)?;
        if let Some(proj) = &self.time_cond_proj {
            t_emb = (t_emb + proj.forward(inputs.get("timestep_cond")?)?)?;
        }
        let emb = self.time_embedding.forward(&t_emb)?;
        let Some(embedding) = &self.add_embedding else { return Ok(emb) };
        let text_embeds = inputs.get("added_cond_kwargs.text_embeds")?; // [B, P]
        let time_ids = inputs.get("added_cond_kwargs.time_ids")?; // [B, N]
        let each = config.addition_time_embed_dim.unwrap_or_default();
        let (b, n) = time_ids.dims2()?;
        let time_embeds = timestep_embedding(time_ids, each, 1.0)?.reshape((b, n * each))?;
        Ok((emb + embedding.forward(&Tensor::cat(&[text_embeds, &time_embeds], 1)?)?)?)
    }
}

impl Head {
    fn load(w: &Weights, config: &UNet2DConditionConfig) -> Result<Self> {
        let c = config.block_out_channels[0];
        Ok(Self {
            conv_norm_out: GroupNorm::load(&w.pp("conv_norm_out"), c, config.norm_num_groups, config.norm_eps)?,
            conv_out: Conv2d::load(&w.pp("conv_out"), [c, config.out_channels], SIZE)?,
        })
    }
}

/// Between `embed`, the ranges and `output` travel `sample: [B, C, H, W]`, `temb: [B, D]`, `encoder_hidden_states`, what the way up takes
/// again as `down_block_res_samples.N`, and what of ControlNets' and T2I-Adapters' outputs is still to be added.
impl BlockModel for UNet2DConditionModel {
    fn embed(&self, inputs: &Tensors) -> Result<Tensors> {
        let embedders = self.embedders.as_ref().ok_or_else(|| not_held("embedders"))?;
        let sample = inputs.get("sample")?;
        self.check_size(sample)?;
        let temb = embedders.temb(inputs, &self.config)?;
        let sample = embedders.conv_in.forward(sample, Placement::same(SIZE))?;
        let mut hidden = Tensors::new()
            .with(format!("{SKIPS}.0"), sample.clone())
            .with("sample", sample)
            .with("temb", temb)
            .with("encoder_hidden_states", inputs.get("encoder_hidden_states")?.clone());
        for (name, tensor) in inputs.iter().filter(|(name, _)| is_residual(name)) {
            hidden.insert(name, tensor.clone());
        }
        Ok(hidden)
    }

    fn blocks(&self, mut hidden: Tensors) -> Result<Tensors> {
        let temb = ops::silu(hidden.get("temb")?)?;
        let text = hidden.get("encoder_hidden_states")?.clone();
        let given = Conditions { temb: &temb, text: &text };
        let mut skips = take_list(&mut hidden, SKIPS)?;
        let mut sample = hidden.take("sample")?;
        for (index, block) in (self.start..).zip(&self.blocks) {
            sample = match block {
                Block::Down(block) => {
                    let features = hidden.take(&format!("{FEATURES}.{index}")).ok();
                    block.forward(sample, &given, features.as_ref(), &mut skips)?
                }
                Block::Mid(block) => self.middle(block.forward(&sample, &given)?, &mut hidden, &mut skips)?,
                Block::Up(block) => block.forward(sample, &given, &mut skips)?,
            };
        }
        for (i, skip) in skips.into_iter().enumerate() {
            hidden.insert(format!("{SKIPS}.{i}"), skip);
        }
        Ok(hidden.with("sample", sample))
    }

    fn output(&self, hidden: Tensors) -> Result<Tensors> {
        let head = self.head.as_ref().ok_or_else(|| not_held("output layers"))?;
        let normed = head.conv_norm_out.forward(hidden.get("sample")?, Some(Activation::Silu))?;
        Ok(Tensors::new().with("sample", head.conv_out.forward(&normed, Placement::same(SIZE))?))
    }
}

impl UNet2DConditionModel {
    /// What is added between the way down and the way up.
    fn middle(&self, mut sample: Tensor, hidden: &mut Tensors, skips: &mut [Tensor]) -> Result<Tensor> {
        let features = hidden.take(&format!("{FEATURES}.{}", self.config.resolutions())).ok();
        if let Some(features) = features.filter(|features| features.dims() == sample.dims()) {
            sample = (sample + features)?;
        }
        let residuals = take_list(hidden, DOWN_RESIDUALS)?;
        if !residuals.is_empty() && residuals.len() != skips.len() {
            let reason = format!("{} for {} of the network's", residuals.len(), skips.len());
            return Err(Error::Invalid { field: DOWN_RESIDUALS, reason });
        }
        for (skip, residual) in skips.iter_mut().zip(residuals) {
            *skip = (&*skip + residual)?;
        }
        if let Ok(residual) = hidden.take(MID_RESIDUAL) {
            sample = (sample + residual)?;
        }
        Ok(sample)
    }

    /// Every resolution is half of the one before.
    fn check_size(&self, sample: &Tensor) -> Result<()> {
        let (_, _, h, w) = sample.dims4()?;
        let multiple = self.config.multiple();
        if h.is_multiple_of(multiple) && w.is_multiple_of(multiple) {
            return Ok(());
        }
        Err(Error::Invalid { field: "sample", reason: format!("{h} x {w} latents are not multiples of {multiple}") })
    }
}

fn is_residual(name: &str) -> bool {
    [DOWN_RESIDUALS, FEATURES, MID_RESIDUAL].iter().any(|kind| name.starts_with(kind))
}

/// Takes `name.0`, `name.1`, ... out.
fn take_list(hidden: &mut Tensors, name: &str) -> Result<Vec<Tensor>> {
    let list = hidden.list(name);
    (0..list.len()).try_for_each(|i| hidden.take(&format!("{name}.{i}")).map(drop))?;
    Ok(list)
}
