//! The two halves: pictures to moments, latents to pictures.

use parallel::{DType, Tensor, Weights, ops};

use super::blocks::{Conv2d, GroupNorm, MidBlock, SizeBlock};
use super::{AutoencoderKlConfig, Tap};
use crate::Result;

/// `[B, 3, H, W]` gives both moments, `[B, 2 C, H/f, W/f]`.
#[derive(Clone, Debug)]
pub(super) struct Encoder {
    conv_in: Conv2d,
    down_blocks: Vec<SizeBlock>,
    mid_block: MidBlock,
    head: Head,
}

impl Encoder {
    pub(super) fn load(w: &Weights, config: &AutoencoderKlConfig) -> Result<Self> {
        let (widths, groups) = (&config.block_out_channels, config.norm_num_groups);
        let (first, last) = ends(widths);
        let down_block = |i: usize| {
            let (w, channels) = (w.pp("down_blocks").pp(i), widths[i]);
            let block = SizeBlock::load(&w, [widths[i.saturating_sub(1)], channels], config.layers_per_block, groups)?;
            if i + 1 == widths.len() { Ok(block) } else { block.then_down(&w, channels) }
        };
        Ok(Self {
            conv_in: Conv2d::load(&w.pp("conv_in"), [config.in_channels, first], 3)?,
            down_blocks: (0..widths.len()).map(down_block).collect::<Result<_>>()?,
            mid_block: MidBlock::load(&w.pp("mid_block"), last, groups, config.mid_block_add_attention)?,
            head: Head::load(w, [last, 2 * config.latent_channels], groups)?,
        })
    }

    pub(super) fn forward(&self, image: &Tensor, tap: Tap) -> Result<Tensor> {
        let mut x = self.conv_in.forward(image)?;
        tap("encoder.conv_in", &x);
        for (i, block) in self.down_blocks.iter().enumerate() {
            x = block.forward(&x)?;
            tap(&format!("encoder.down_blocks.{i}"), &x);
        }
        let x = self.mid_block.forward(&x, "encoder.mid_block", tap)?;
        self.head.forward(&x, "encoder.conv_norm_out", tap)
    }

    /// Of the weights, and so of what flows through.
    pub(super) fn dtype(&self) -> DType {
        self.conv_in.dtype()
    }
}

/// `[B, C, h, w]` gives `[B, 3, h f, w f]`.
#[derive(Clone, Debug)]
pub(super) struct Decoder {
    conv_in: Conv2d,
    mid_block: MidBlock,
    up_blocks: Vec<SizeBlock>,
    head: Head,
}

impl Decoder {
    pub(super) fn load(w: &Weights, config: &AutoencoderKlConfig) -> Result<Self> {
        let groups = config.norm_num_groups;
        let widths: Vec<usize> = config.block_out_channels.iter().rev().copied().collect();
        let (first, last) = ends(&widths);
        let up_block = |i: usize| {
            let (w, channels) = (w.pp("up_blocks").pp(i), widths[i]);
            let block = SizeBlock::load(&w, [widths[i.saturating_sub(1)], channels], config.layers_per_block + 1, groups)?;
            if i + 1 == widths.len() { Ok(block) } else { block.then_up(&w, channels) }
        };
        Ok(Self {
            conv_in: Conv2d::load(&w.pp("conv_in"), [config.latent_channels, first], 3)?,
            mid_block: MidBlock::load(&w.pp("mid_block"), first, groups, config.mid_block_add_attention)?,
            up_blocks: (0..widths.len()).map(up_block).collect::<Result<_>>()?,
            head: Head::load(w, [last, config.out_channels], groups)?,
        })
    }

    pub(super) fn forward(&self, latents: &Tensor, tap: Tap) -> Result<Tensor> {
        let x = self.conv_in.forward(latents)?;
        tap("decoder.conv_in", &x);
        let mut x = self.mid_block.forward(&x, "decoder.mid_block", tap)?;
        for (i, block) in self.up_blocks.iter().enumerate() {
            x = block.forward(&x)?;
            tap(&format!("decoder.up_blocks.{i}"), &x);
        }
        self.head.forward(&x, "decoder.conv_norm_out", tap)
    }

    /// Of the weights, and so of what flows through.
    pub(super) fn dtype(&self) -> DType {
        self.conv_in.dtype()
    }
}

/// The last norm and convolution.
#[derive(Clone, Debug)]
struct Head {
    conv_norm_out: GroupNorm,
    conv_out: Conv2d,
}

impl Head {
    fn load(w: &Weights, [c_in, c_out]: [usize; 2], groups: usize) -> Result<Self> {
        Ok(Self {
            conv_norm_out: GroupNorm::load(&w.pp("conv_norm_out"), c_in, groups)?,
            conv_out: Conv2d::load(&w.pp("conv_out"), [c_in, c_out], 3)?,
        })
    }

    fn forward(&self, x: &Tensor, name: &str, tap: Tap) -> Result<Tensor> {
        let x = self.conv_norm_out.forward(x)?;
        tap(name, &x);
        self.conv_out.forward(&ops::silu(&x)?)
    }
}

/// The first and last of the widths, of which `AutoencoderKlConfig::check` saw at least one.
fn ends(widths: &[usize]) -> (usize, usize) {
    (widths.first().copied().unwrap_or_default(), widths.last().copied().unwrap_or_default())
}
