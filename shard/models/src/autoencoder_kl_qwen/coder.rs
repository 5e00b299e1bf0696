//! The two halves: pictures to moments, latents to pictures.

use parallel::{DType, Tensor, Weights, ops};

use super::AutoencoderKlQwenImageConfig;
use super::blocks::{MidBlock, Resample, ResidualBlock, RmsNorm};
use crate::Result;
use crate::autoencoder_kl::Tap;
use crate::autoencoder_kl::blocks::Conv2d;

/// `QwenImageEncoder3d`: `[B, 3, H, W]` gives both moments, `[B, 2 C, H/f, W/f]`.
#[derive(Clone, Debug)]
pub(super) struct Encoder {
    conv_in: Conv2d,
    down_blocks: Vec<DownLayer>,
    mid_block: MidBlock,
    head: Head,
}

/// The encoder's blocks lie in one list, without levels.
#[derive(Clone, Debug)]
enum DownLayer {
    Residual(ResidualBlock),
    Resample(Resample),
}

impl Encoder {
    pub(super) fn load(w: &Weights, config: &AutoencoderKlQwenImageConfig) -> Result<Self> {
        let widths = config.widths();
        let mut down_blocks = Vec::new();
        let mut channels = config.base_dim;
        for (i, width) in widths.iter().enumerate() {
            for _ in 0..config.num_res_blocks {
                let w = w.pp("down_blocks").pp(down_blocks.len());
                down_blocks.push(DownLayer::Residual(ResidualBlock::load(&w, [channels, *width])?));
                channels = *width;
            }
            if let Some(in_time) = config.temperal_downsample.get(i) {
                let w = w.pp("down_blocks").pp(down_blocks.len());
                down_blocks.push(DownLayer::Resample(Resample::down(&w, channels, *in_time)?));
            }
        }
        Ok(Self {
            conv_in: Conv2d::load_last_frame(&w.pp("conv_in"), [config.input_channels, config.base_dim], 3)?,
            down_blocks,
            mid_block: MidBlock::load(&w.pp("mid_block"), channels)?,
            head: Head::load(w, [channels, 2 * config.z_dim])?,
        })
    }

    pub(super) fn forward(&self, image: &Tensor, tap: Tap) -> Result<Tensor> {
        let mut x = self.conv_in.forward(image)?;
        tap("encoder.conv_in", &x);
        for layer in &self.down_blocks {
            x = match layer {
                DownLayer::Residual(block) => block.forward(&x)?,
                DownLayer::Resample(resample) => resample.forward(&x)?,
            };
        }
        let x = self.mid_block.forward(&x)?;
        tap("encoder.mid_block", &x);
        self.head.forward(&x, "encoder.norm_out", tap)
    }

    /// Of the weights, and so of what flows through.
    pub(super) fn dtype(&self) -> DType {
        self.conv_in.dtype()
    }
}

/// `QwenImageDecoder3d`: `[B, C, h, w]` gives `[B, 3, h f, w f]`.
#[derive(Clone, Debug)]
pub(super) struct Decoder {
    conv_in: Conv2d,
    mid_block: MidBlock,
    up_blocks: Vec<UpBlock>,
    head: Head,
}

/// `QwenImageUpBlock`: one resolution, then twice the size unless it is the last.
#[derive(Clone, Debug)]
struct UpBlock {
    resnets: Vec<ResidualBlock>,
    upsampler: Option<Resample>,
}

impl Decoder {
    pub(super) fn load(w: &Weights, config: &AutoencoderKlQwenImageConfig) -> Result<Self> {
        let widths: Vec<usize> = config.widths().into_iter().rev().collect();
        let in_time: Vec<bool> = config.temperal_downsample.iter().rev().copied().collect();
        let first = widths.first().copied().unwrap_or_default(); // `check` saw at least one
        let mut channels = first;
        let mut up_blocks = Vec::new();
        for (i, width) in widths.iter().enumerate() {
            let w = w.pp("up_blocks").pp(i);
            let mut resnets = Vec::new();
            for j in 0..config.num_res_blocks + 1 {
                resnets.push(ResidualBlock::load(&w.pp("resnets").pp(j), [channels, *width])?);
                channels = *width;
            }
            let up = |in_time: &bool| Resample::up(&w.pp("upsamplers.0"), channels, *in_time);
            let upsampler = in_time.get(i).map(up).transpose()?;
            if upsampler.is_some() {
                channels /= 2;
            }
            up_blocks.push(UpBlock { resnets, upsampler });
        }
        Ok(Self {
            conv_in: Conv2d::load_last_frame(&w.pp("conv_in"), [config.z_dim, first], 3)?,
            mid_block: MidBlock::load(&w.pp("mid_block"), first)?,
            up_blocks,
            head: Head::load(w, [channels, config.input_channels])?,
        })
    }

    pub(super) fn forward(&self, latents: &Tensor, tap: Tap) -> Result<Tensor> {
        let x = self.conv_in.forward(latents)?;
        let mut x = self.mid_block.forward(&x)?;
        tap("decoder.mid_block", &x);
        for (i, block) in self.up_blocks.iter().enumerate() {
            x = block.forward(x)?;
            tap(&format!("decoder.up_blocks.{i}"), &x);
        }
        self.head.forward(&x, "decoder.norm_out", tap)
    }
}

impl UpBlock {
    fn forward(&self, mut x: Tensor) -> Result<Tensor> {
        for resnet in &self.resnets {
            x = resnet.forward(&x)?;
        }
        match &self.upsampler {
            Some(upsampler) => upsampler.forward(&x),
            None => Ok(x),
        }
    }
}

/// The last norm and convolution.
#[derive(Clone, Debug)]
struct Head {
    norm_out: RmsNorm,
    conv_out: Conv2d,
}

impl Head {
    fn load(w: &Weights, [c_in, c_out]: [usize; 2]) -> Result<Self> {
        Ok(Self {
            norm_out: RmsNorm::of_frames(&w.pp("norm_out"), c_in)?,
            conv_out: Conv2d::load_last_frame(&w.pp("conv_out"), [c_in, c_out], 3)?,
        })
    }

    fn forward(&self, x: &Tensor, name: &str, tap: Tap) -> Result<Tensor> {
        let x = self.norm_out.forward(x)?;
        tap(name, &x);
        self.conv_out.forward(&ops::silu(&x)?)
    }
}
