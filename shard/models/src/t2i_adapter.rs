//! T2I-Adapter (C. Mou et al., "T2I-Adapter: Learning Adapters to Dig out More Controllable Ability for Text-to-Image Diffusion Models",
//! <https://arxiv.org/abs/2302.08453>).
//!
//! Follows diffusers 0.42.1, `models/adapter.py`: the full adapters of Stable Diffusion 1 and XL. Convolutions are cut by output channels. It looks at
//! the picture alone, so its features are the same at every step; they are made at every step all the same, for a few hundredths of the U-Net's work,
//! rather than kept by every rank for every job.

use parallel::convolution::Placement;
use parallel::ops::Activation;
use parallel::{ColumnParallelConv2d, Tensor, Tensors, Weights};
use serde::Deserialize;

use crate::control::{Control, ControlNetwork, alone};
use crate::mmdit::{check_widths, unsupported};
use crate::unet_2d_condition::{FEATURES, gcd};
use crate::{Error, Result};

/// Side of the kernels.
const SIZE: usize = 3;
/// Most layers that are believed; published ones have 2.
const MAX_LAYERS: usize = 64;

/// `config.json` of a `T2IAdapter`.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub struct T2iAdapterConfig {
    /// Which of the reference's networks it is.
    pub adapter_type: AdapterType,
    /// Of the picture: 3, or 1 of a grey one.
    pub in_channels: usize,
    /// Of each feature, the finest first.
    pub channels: Vec<usize>,
    /// Residual blocks before each feature.
    pub num_res_blocks: usize,
    /// Pixels of the picture's side to one of the finest feature's.
    pub downscale_factor: usize,
}

/// Which of the reference's networks an adapter is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum AdapterType {
    /// Every feature is half as large as the one before.
    FullAdapter,
    /// Only the third is.
    FullAdapterXl,
}

impl Default for T2iAdapterConfig {
    fn default() -> Self {
        Self {
            adapter_type: AdapterType::FullAdapter,
            in_channels: 3,
            channels: vec![320, 640, 1280, 1280],
            num_res_blocks: 2,
            downscale_factor: 8,
        }
    }
}

impl T2iAdapterConfig {
    /// Whether this is a network at all.
    ///
    /// # Errors
    /// [`Error::Unsupported`] with the first field that cannot be.
    pub fn validate(&self) -> Result<()> {
        if ![1, 3].contains(&self.in_channels) {
            return Err(unsupported("in_channels", &self.in_channels));
        }
        let fits = match self.adapter_type {
            AdapterType::FullAdapter => (1..=8).contains(&self.channels.len()),
            AdapterType::FullAdapterXl => self.channels.len() == 4,
        };
        if !fits {
            return Err(unsupported("channels", &self.channels));
        }
        check_widths(self.channels.iter().map(|c| ("channels", *c)))?;
        if !(1..=64).contains(&self.downscale_factor) {
            return Err(unsupported("downscale_factor", &self.downscale_factor));
        }
        if self.num_res_blocks > MAX_LAYERS {
            return Err(unsupported("num_res_blocks", &self.num_res_blocks));
        }
        Ok(())
    }

    /// What goes into and out of each block, and whether the picture is halved before it.
    fn blocks(&self) -> Vec<([usize; 2], bool)> {
        let own = |i: usize| self.channels[i];
        let block = |i: usize| match (self.adapter_type, i) {
            (_, 0) | (AdapterType::FullAdapterXl, 3..) => ([own(i), own(i)], false),
            (AdapterType::FullAdapterXl, 1) => ([own(0), own(1)], false),
            (_, i) => ([own(i - 1), own(i)], true),
        };
        (0..self.channels.len()).map(block).collect()
    }

    /// Pixels of the picture's side to one of each feature.
    pub fn scales(&self) -> Vec<usize> {
        let halved = self.blocks().into_iter().scan(self.downscale_factor, |scale, (_, halves)| {
            *scale *= if halves { 2 } else { 1 };
            Some(*scale)
        });
        halved.collect()
    }

    /// The greatest number that divides the channels of every feature: over so many ranks they can be divided.
    pub fn shares(&self) -> usize {
        self.channels.iter().copied().reduce(gcd).unwrap_or(1)
    }
}

/// `T2IAdapter`, or one rank's part of it.
#[derive(Debug)]
pub struct T2iAdapter {
    conv_in: ColumnParallelConv2d,
    body: Vec<AdapterBlock>,
    config: T2iAdapterConfig,
}

impl T2iAdapter {
    /// Reads what this rank holds of `w`, whose group shares every split tensor.
    pub fn load(w: &Weights, config: &T2iAdapterConfig) -> Result<Self> {
        config.validate()?;
        let (all, w) = (w, w.pp("adapter"));
        let c_in = config.in_channels * config.downscale_factor * config.downscale_factor;
        let block = |(i, (channels, halves)): (usize, ([usize; 2], bool))| {
            AdapterBlock::load(&w.pp("body").pp(i), channels, halves, config.num_res_blocks)
        };
        let adapter = Self {
            conv_in: ColumnParallelConv2d::load(&w.pp("conv_in"), [c_in, config.channels[0]], SIZE)?,
            body: config.blocks().into_iter().enumerate().map(block).collect::<Result<_>>()?,
            config: config.clone(),
        };
        all.finish()?;
        Ok(adapter)
    }

    /// `image: [B, C, height, width]` in 0..1 gives its features, `[B, C_i, H_i, W_i]`, the finest first.
    ///
    /// # Errors
    /// [`Error::Invalid`] when the sides are not multiples of the factor that the finest feature is smaller by.
    pub fn features(&self, image: &Tensor) -> Result<Vec<Tensor>> {
        let x = pixel_unshuffle(image, self.config.downscale_factor)?;
        let mut x = self.conv_in.forward_gathered(&x, Placement::same(SIZE))?;
        let mut features = Vec::with_capacity(self.body.len());
        for block in &self.body {
            x = block.forward(x)?;
            features.push(x.clone());
        }
        Ok(features)
    }
}

impl ControlNetwork for T2iAdapter {
    fn residuals(&self, _: &Tensors, controls: &[Control<'_>]) -> Result<Vec<(String, Tensor)>> {
        let control = alone(controls)?;
        let features = self.features(control.cond)?;
        Ok(features.into_iter().enumerate().map(|(i, feature)| (format!("{FEATURES}.{i}"), feature)).collect())
    }
}

/// `AdapterBlock`
#[derive(Debug)]
struct AdapterBlock {
    halves: bool,
    in_conv: Option<ColumnParallelConv2d>,
    resnets: Vec<[ColumnParallelConv2d; 2]>,
}

impl AdapterBlock {
    fn load(w: &Weights, [c_in, c_out]: [usize; 2], halves: bool, resnets: usize) -> Result<Self> {
        let resnet = |i: usize| {
            let w = w.pp("resnets").pp(i);
            let conv = |name: &str, size| ColumnParallelConv2d::load(&w.pp(name), [c_out, c_out], size);
            Ok([conv("block1", SIZE)?, conv("block2", 1)?])
        };
        let in_conv = || ColumnParallelConv2d::load(&w.pp("in_conv"), [c_in, c_out], 1);
        Ok(Self {
            halves,
            in_conv: (c_in != c_out).then(in_conv).transpose()?,
            resnets: (0..resnets).map(resnet).collect::<Result<_>>()?,
        })
    }

    fn forward(&self, mut x: Tensor) -> Result<Tensor> {
        if self.halves {
            x = halved(&x)?;
        }
        if let Some(conv) = &self.in_conv {
            x = conv.forward_gathered(&x, Placement::same(1))?;
        }
        for [block1, block2] in &self.resnets {
            let h = parallel::ops::activate(&block1.forward(&x, Placement::same(SIZE))?, Activation::Relu)?;
            let h = block1.gather(&h)?;
            x = block2.gather(&block2.forward_plus(&h, Placement::same(1), &block2.own(&x)?)?)?;
        }
        Ok(x)
    }
}

/// `[B, C, H f, W f] -> [B, C f f, H, W]`
fn pixel_unshuffle(x: &Tensor, f: usize) -> Result<Tensor> {
    let (b, c, height, width) = x.dims4()?;
    if !height.is_multiple_of(f) || !width.is_multiple_of(f) {
        return Err(Error::Invalid { field: "controls", reason: format!("{height} x {width} pixels are not multiples of {f}") });
    }
    let (h, w) = (height / f, width / f);
    let split = x.reshape((b, c, h, f, w, f))?.permute((0, 1, 3, 5, 2, 4))?;
    Ok(split.contiguous()?.reshape((b, c * f * f, h, w))?)
}

/// The mean of each 2 x 2 pixels; of an odd side's last row or column, of those that are there (`ceil_mode`).
fn halved(x: &Tensor) -> Result<Tensor> {
    let (mut x, (_, _, h, w)) = (x.clone(), x.dims4()?);
    for (dim, side) in [(2, h), (3, w)] {
        if !side.is_multiple_of(2) {
            // Twice itself, a row has the mean of itself.
            x = Tensor::cat(&[&x, &x.narrow(dim, side - 1, 1)?], dim)?;
        }
    }
    Ok(x.avg_pool2d(2)?)
}
