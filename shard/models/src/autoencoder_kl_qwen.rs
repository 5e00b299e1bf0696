//! The autoencoder of Qwen-Image, for single pictures: that of the Wan 2.1 video model, fine-tuned.
//!
//! Paper: <https://arxiv.org/abs/2503.20314>. Follows diffusers 0.42.1 `models/autoencoders/autoencoder_kl_qwenimage.py` at one
//! frame. Differences: there is no frame dimension. A convolution that is causal in time meets one picture with the last frame
//! of its kernel, so only that frame is read and a two-dimensional convolution done; the convolutions along time alone, which
//! the reference leaves out at the first frame, are not read. Every rank of a group holds the whole network (its attention has
//! one head) and computes the same. In tiles the reference does not cut what it decoded to -1..1, and neither does this.

use parallel::{DType, Device, Tensor, Weights};
use serde::Deserialize;

use crate::autoencoder_kl::blocks::Conv2d;
use crate::autoencoder_kl::tiling::Tiles;
use crate::autoencoder_kl::{Moments, Tap, Tiling};
use crate::{Error, Result};

mod blocks;
mod coder;

use coder::{Decoder, Encoder};

/// Widest layer that is believed; the published network has 384 channels.
const MAX_CHANNELS: usize = 1 << 16;
/// Most resolutions that are believed; the published network has 4.
const MAX_RESOLUTIONS: usize = 8;
/// Most residual blocks per resolution that are believed; the published network has 2.
const MAX_RES_BLOCKS: usize = 64;
/// Side of a tile, in pixels. The next begins three quarters of it further on.
const TILE: usize = 256;

/// `config.json` of diffusers' `AutoencoderKLQwenImage`. Dropout is for training.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(default)]
pub struct AutoencoderKlQwenImageConfig {
    /// Channels at the finest resolution.
    pub base_dim: usize,
    /// Channels of the latents.
    pub z_dim: usize,
    /// Channels at each resolution over `base_dim`, the finest first.
    pub dim_mult: Vec<usize>,
    /// Residual blocks per resolution (the decoder has one more).
    pub num_res_blocks: usize,
    /// Resolutions that attend; only none.
    pub attn_scales: Vec<f64>,
    /// Which steps to a coarser resolution are also steps in time, and so have a convolution along it.
    pub temperal_downsample: Vec<bool>,
    /// Of the picture.
    pub input_channels: usize,
    /// Per channel: latents less this, over `latents_std`, are normal.
    pub latents_mean: Vec<f64>,
    /// See `latents_mean`.
    pub latents_std: Vec<f64>,
}

impl Default for AutoencoderKlQwenImageConfig {
    fn default() -> Self {
        Self {
            base_dim: 96,
            z_dim: 16,
            dim_mult: vec![1, 2, 4, 4],
            num_res_blocks: 2,
            attn_scales: Vec::new(),
            temperal_downsample: vec![false, true, true],
            input_channels: 3,
            latents_mean: vec![
                -0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508, 0.4134, -0.0715, 0.5517, -0.3632, -0.1922,
                -0.9497, 0.2503, -0.2921,
            ],
            latents_std: vec![
                2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743, 3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253,
                2.8251, 1.9160,
            ],
        }
    }
}

impl AutoencoderKlQwenImageConfig {
    /// Pixels per latent, along a side.
    pub fn scale_factor(&self) -> usize {
        1 << (self.dim_mult.len().clamp(1, MAX_RESOLUTIONS) - 1)
    }

    /// `(latents - mean) / std`, `[B, C, h, w]`: what a denoiser works on.
    pub fn scale(&self, latents: &Tensor) -> Result<Tensor> {
        let [mean, std] = self.statistics(latents)?;
        Ok(latents.broadcast_sub(&mean)?.broadcast_div(&std)?)
    }

    /// `latents std + mean`, `[B, C, h, w]`: what [`AutoencoderKlQwenImage::decode`] takes.
    pub fn unscale(&self, latents: &Tensor) -> Result<Tensor> {
        let [mean, std] = self.statistics(latents)?;
        Ok(latents.broadcast_mul(&std)?.broadcast_add(&mean)?)
    }

    /// Mean and standard deviation, `[1, C, 1, 1]` each.
    fn statistics(&self, like: &Tensor) -> Result<[Tensor; 2]> {
        let column = |values: &[f64]| -> Result<Tensor> {
            let column = Tensor::new(values, like.device())?.reshape((1, values.len(), 1, 1))?;
            Ok(column.to_dtype(like.dtype())?)
        };
        Ok([column(&self.latents_mean)?, column(&self.latents_std)?])
    }

    /// Channels at each resolution, the finest first.
    fn widths(&self) -> Vec<usize> {
        self.dim_mult.iter().map(|m| m * self.base_dim).collect()
    }

    fn check(&self) -> Result<()> {
        let ok = |field: &str, good: bool, value: &dyn std::fmt::Debug| {
            let unsupported = || Error::Unsupported { field: field.to_owned(), value: format!("{value:?}") };
            if good { Ok(()) } else { Err(unsupported()) }
        };
        let resolutions = self.dim_mult.len();
        let width = |c: usize| (1..=MAX_CHANNELS).contains(&c);
        // The decoder halves the channels where it doubles the size.
        let fits = |m: &usize| m.checked_mul(self.base_dim).is_some_and(|c| width(c) && c.is_multiple_of(2));
        ok("base_dim", width(self.base_dim), &self.base_dim)?;
        ok("z_dim", width(self.z_dim), &self.z_dim)?;
        ok("input_channels", width(self.input_channels), &self.input_channels)?;
        ok("dim_mult", (1..=MAX_RESOLUTIONS).contains(&resolutions) && self.dim_mult.iter().all(fits), &self.dim_mult)?;
        ok("num_res_blocks", (1..=MAX_RES_BLOCKS).contains(&self.num_res_blocks), &self.num_res_blocks)?;
        ok("attn_scales", self.attn_scales.is_empty(), &self.attn_scales)?;
        ok("temperal_downsample", self.temperal_downsample.len() + 1 == resolutions, &self.temperal_downsample)?;
        let finite = |values: &[f64]| values.len() == self.z_dim && values.iter().all(|v| v.is_finite());
        ok("latents_mean", finite(&self.latents_mean), &self.latents_mean)?;
        ok("latents_std", finite(&self.latents_std) && !self.latents_std.contains(&0.0), &self.latents_std)
    }
}

/// The network. It computes on the device its weights were read to; pictures and latents are the host's.
#[derive(Clone, Debug)]
pub struct AutoencoderKlQwenImage {
    config: AutoencoderKlQwenImageConfig,
    device: Device,
    encoder: Encoder,
    decoder: Decoder,
    quant_conv: Conv2d,
    post_quant_conv: Conv2d,
}

impl AutoencoderKlQwenImage {
    /// Reads the component that `w` is the root of; nothing may be left over.
    pub fn load(w: &Weights, config: &AutoencoderKlQwenImageConfig) -> Result<Self> {
        config.check()?;
        let pointwise = |name: &str, channels: usize| Conv2d::load_last_frame(&w.pp(name), [channels, channels], 1);
        let network = Self {
            encoder: Encoder::load(&w.pp("encoder"), config)?,
            decoder: Decoder::load(&w.pp("decoder"), config)?,
            quant_conv: pointwise("quant_conv", 2 * config.z_dim)?,
            post_quant_conv: pointwise("post_quant_conv", config.z_dim)?,
            config: config.clone(),
            device: w.device().clone(),
        };
        w.finish()?;
        Ok(network)
    }

    /// `image: [B, 3, H, W]`, in -1..1, gives the distribution of `[B, C, H/f, W/f]`. H and W are multiples of `f`.
    pub fn encode(&self, image: &Tensor) -> Result<Moments> {
        self.encode_tapped(image, &mut |_, _| {})
    }

    /// Unscaled `latents: [B, C, h, w]` give `[B, 3, h f, w f]`, in -1..1.
    pub fn decode(&self, latents: &Tensor) -> Result<Tensor> {
        self.decode_tapped(latents, &mut |_, _| {})
    }

    /// [`Self::encode`], in tiles if that is on and a side is longer than one.
    pub fn encode_with(&self, image: &Tensor, tiling: Tiling) -> Result<Moments> {
        let tiles = self.tiles();
        if tiling == Tiling::Off || !tiles.is_larger_image(image)? {
            return self.encode(image);
        }
        Moments::of(&tiles.encode(image, |tile| self.encode_raw(tile, &mut |_, _| {}))?)
    }

    /// [`Self::decode`], in tiles (and then about -1..1) if that is on and a side is longer than one.
    pub fn decode_with(&self, latents: &Tensor, tiling: Tiling) -> Result<Tensor> {
        let tiles = self.tiles();
        if tiling == Tiling::Off || !tiles.is_larger_latent(latents)? {
            return self.decode(latents);
        }
        tiles.decode(latents, |tile| self.decode_raw(tile, &mut |_, _| {}))
    }

    /// As [`Self::encode`], telling `tap` what the submodules give.
    pub fn encode_tapped(&self, image: &Tensor, tap: Tap) -> Result<Moments> {
        Moments::of(&self.encode_raw(image, tap)?)
    }

    /// As [`Self::decode`], telling `tap` what the submodules give.
    pub fn decode_tapped(&self, latents: &Tensor, tap: Tap) -> Result<Tensor> {
        Ok(self.decode_raw(latents, tap)?.clamp(-1f32, 1f32)?)
    }

    /// The configuration it was loaded with.
    pub fn config(&self) -> &AutoencoderKlQwenImageConfig {
        &self.config
    }

    fn tiles(&self) -> Tiles {
        Tiles::new(TILE, self.config.scale_factor())
    }

    /// Both moments in one tensor: `[B, 2 C, h, w]`.
    fn encode_raw(&self, image: &Tensor, tap: Tap) -> Result<Tensor> {
        let image = image.to_device(&self.device)?.to_dtype(self.encoder.dtype())?;
        let encoded = self.encoder.forward(&image, tap)?;
        let encoded = self.quant_conv.forward(&encoded)?;
        tap("quant_conv", &encoded);
        Ok(encoded.to_device(&Device::Cpu)?)
    }

    /// `[B, C, h, w]` gives `[B, 3, h f, w f]`, not yet cut to -1..1.
    fn decode_raw(&self, latents: &Tensor, tap: Tap) -> Result<Tensor> {
        let latents = latents.to_device(&self.device)?.to_dtype(self.post_quant_conv.dtype())?;
        let z = self.post_quant_conv.forward(&latents)?;
        tap("post_quant_conv", &z);
        Ok(self.decoder.forward(&z, tap)?.to_dtype(DType::F32)?.to_device(&Device::Cpu)?)
    }
}

#[cfg(test)]
mod tests;
