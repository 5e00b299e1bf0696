//! The blocks of the row: down to coarser resolutions, the middle, and up again.

use parallel::{Tensor, Weights};

use super::config::{DownBlockType, UNet2DConditionConfig, UpBlockType};
use super::resnet::{Downsample2D, ResnetBlock2D, Upsample2D};
use super::transformer_2d::Transformer2D;
use super::{Error, Result};

/// A block of the row.
#[derive(Debug)]
pub(super) enum Block {
    Down(DownBlock),
    Mid(Box<MidBlock>),
    Up(UpBlock),
}

/// What blocks are given alike.
pub(super) struct Conditions<'a> {
    /// The timestep's embedding, after SiLU: `[B, D]`.
    pub(super) temb: &'a Tensor,
    /// `encoder_hidden_states: [B, L, D_txt]`.
    pub(super) text: &'a Tensor,
}

impl Block {
    /// Block `index` of the row.
    pub(super) fn load(w: &Weights, config: &UNet2DConditionConfig, index: usize) -> Result<Self> {
        let n = config.resolutions();
        Ok(match index.checked_sub(n) {
            None => Self::Down(DownBlock::load(&w.pp("down_blocks").pp(index), config, index)?),
            Some(0) => Self::Mid(Box::new(MidBlock::load(&w.pp("mid_block"), config)?)),
            Some(up) => Self::Up(UpBlock::load(&w.pp("up_blocks").pp(up - 1), config, up - 1)?),
        })
    }

    /// Where the tensors of block `index` of the row are.
    pub(super) fn prefix(config: &UNet2DConditionConfig, index: usize) -> String {
        let n = config.resolutions();
        match index.checked_sub(n) {
            None => format!("down_blocks.{index}"),
            Some(0) => "mid_block".to_owned(),
            Some(up) => format!("up_blocks.{}", up - 1),
        }
    }
}

/// `DownBlock2D` and `CrossAttnDownBlock2D`.
#[derive(Debug)]
pub(super) struct DownBlock {
    resnets: Vec<ResnetBlock2D>,
    /// One after each of the residual blocks, or none.
    attentions: Vec<Transformer2D>,
    downsampler: Option<Downsample2D>,
}

impl DownBlock {
    fn load(w: &Weights, config: &UNet2DConditionConfig, at: usize) -> Result<Self> {
        let widths = &config.block_out_channels;
        let (c_in, c) = (widths[at.saturating_sub(1)], widths[at]);
        let attends = config.down_block_types[at] == DownBlockType::CrossAttnDownBlock2D;
        let resnet = |i: usize| ResnetBlock2D::load(&w.pp("resnets").pp(i), config, [if i == 0 { c_in } else { c }, c]);
        let attention = |i: usize| Transformer2D::load(&w.pp("attentions").pp(i), config, at);
        let downsampler = || Downsample2D::load(&w.pp("downsamplers.0"), c);
        Ok(Self {
            resnets: (0..config.layers_per_block).map(resnet).collect::<Result<_>>()?,
            attentions: (0..config.layers_per_block).filter(|_| attends).map(attention).collect::<Result<_>>()?,
            downsampler: (at + 1 < widths.len()).then(downsampler).transpose()?,
        })
    }

    /// `x: [B, C_in, H, W]` gives `[B, C, H/2, W/2]`, or of the last block that of full size. What the way up takes again is put on `skips`.
    ///
    /// `features` of a T2I-Adapter are added after the last transformer block, or after a block without any.
    pub(super) fn forward(
        &self,
        mut x: Tensor,
        given: &Conditions<'_>,
        features: Option<&Tensor>,
        skips: &mut Vec<Tensor>,
    ) -> Result<Tensor> {
        let last = self.resnets.len() - 1;
        for (i, resnet) in self.resnets.iter().enumerate() {
            x = resnet.forward(&x, given.temb)?;
            if let Some(attention) = self.attentions.get(i) {
                x = attention.forward(&x, given.text)?;
                if let Some(features) = features.filter(|_| i == last) {
                    x = (x + features)?;
                }
            }
            skips.push(x.clone());
        }
        if let Some(downsampler) = &self.downsampler {
            x = downsampler.forward(&x)?;
            skips.push(x.clone());
        }
        if let Some(features) = features.filter(|_| self.attentions.is_empty()) {
            // The reference adds in place: to what the way up takes, too.
            x = (x + features)?;
            skips.pop();
            skips.push(x.clone());
        }
        Ok(x)
    }
}

/// `UNetMidBlock2DCrossAttn`
#[derive(Debug)]
pub(super) struct MidBlock {
    resnets: [ResnetBlock2D; 2],
    attention: Transformer2D,
}

impl MidBlock {
    fn load(w: &Weights, config: &UNet2DConditionConfig) -> Result<Self> {
        let coarsest = config.resolutions() - 1;
        let c = config.block_out_channels[coarsest];
        let resnet = |i: usize| ResnetBlock2D::load(&w.pp("resnets").pp(i), config, [c, c]);
        let attention = Transformer2D::load(&w.pp("attentions.0"), config, coarsest)?;
        Ok(Self { resnets: [resnet(0)?, resnet(1)?], attention })
    }

    pub(super) fn forward(&self, x: &Tensor, given: &Conditions<'_>) -> Result<Tensor> {
        let [before, after] = &self.resnets;
        after.forward(&self.attention.forward(&before.forward(x, given.temb)?, given.text)?, given.temb)
    }
}

/// `UpBlock2D` and `CrossAttnUpBlock2D`.
#[derive(Debug)]
pub(super) struct UpBlock {
    resnets: Vec<ResnetBlock2D>,
    attentions: Vec<Transformer2D>,
    upsampler: Option<Upsample2D>,
}

impl UpBlock {
    /// The `up`-th on the way up.
    fn load(w: &Weights, config: &UNet2DConditionConfig, up: usize) -> Result<Self> {
        let widths = &config.block_out_channels;
        let at = widths.len() - 1 - up; // its resolution
        let (c, c_before, finer) = (widths[at], widths[(at + 1).min(widths.len() - 1)], widths[at.saturating_sub(1)]);
        let layers = config.layers_per_block + 1;
        let attends = config.up_block_types[up] == UpBlockType::CrossAttnUpBlock2D;
        let resnet = |i: usize| {
            let skip = if i + 1 == layers { finer } else { c };
            let before = if i == 0 { c_before } else { c };
            ResnetBlock2D::load(&w.pp("resnets").pp(i), config, [before + skip, c])
        };
        let attention = |i: usize| Transformer2D::load(&w.pp("attentions").pp(i), config, at);
        let upsampler = || Upsample2D::load(&w.pp("upsamplers.0"), c);
        Ok(Self {
            resnets: (0..layers).map(resnet).collect::<Result<_>>()?,
            attentions: (0..layers).filter(|_| attends).map(attention).collect::<Result<_>>()?,
            upsampler: (at > 0).then(upsampler).transpose()?,
        })
    }

    /// `x: [B, C_before, H, W]` gives `[B, C, 2H, 2W]`, or of the last block that of the same size. Takes from the end of `skips`.
    pub(super) fn forward(&self, mut x: Tensor, given: &Conditions<'_>, skips: &mut Vec<Tensor>) -> Result<Tensor> {
        for (i, resnet) in self.resnets.iter().enumerate() {
            let skip = skips.pop().ok_or_else(|| Error::Invalid {
                field: "down_block_res_samples",
                reason: "there are fewer than the way up takes".into(),
            })?;
            x = resnet.forward(&Tensor::cat(&[&x, &skip], 1)?, given.temb)?;
            if let Some(attention) = self.attentions.get(i) {
                x = attention.forward(&x, given.text)?;
            }
        }
        match &self.upsampler {
            Some(upsampler) => upsampler.forward(&x),
            None => Ok(x),
        }
    }
}
