//! The autoencoder of Stable Diffusion, SDXL, Stable Diffusion 3 and FLUX: pictures to latents and back.
//!
//! Paper: <https://arxiv.org/abs/2112.10752>. Follows diffusers 0.42.1 `models/autoencoders/autoencoder_kl.py` and `vae.py`.
//! Differences: tiles are blended row by row, so that only two rows of them are held at once. Every rank of a group holds
//! the whole network (its attention has one head) and computes the same.

use parallel::{DType, Tensor, Weights};
use serde::Deserialize;

use crate::{Error, Result};

pub(crate) mod blocks;
mod coder;
pub(crate) mod tiling;

use blocks::Conv2d;
use coder::{Decoder, Encoder};
use tiling::Tiles;

/// Widest layer that is believed; the published ones have 512 channels.
const MAX_CHANNELS: usize = 1 << 16;
/// Most resolutions that are believed; the published ones have 4.
const MAX_RESOLUTIONS: usize = 8;

/// `config.json` of diffusers' `AutoencoderKL`.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(default)]
pub struct AutoencoderKlConfig {
    /// Of the picture.
    pub in_channels: usize,
    /// Of the decoded picture.
    pub out_channels: usize,
    /// Only `DownEncoderBlock2D`, one per resolution.
    pub down_block_types: Vec<String>,
    /// Only `UpDecoderBlock2D`, one per resolution.
    pub up_block_types: Vec<String>,
    /// Channels at each resolution, the finest first.
    pub block_out_channels: Vec<usize>,
    /// Residual blocks per resolution (the decoder has one more).
    pub layers_per_block: usize,
    /// Only `silu`.
    pub act_fn: String,
    /// Channels of the latents.
    pub latent_channels: usize,
    /// Groups of every group norm.
    pub norm_num_groups: usize,
    /// Side of a tile, in pixels.
    pub sample_size: usize,
    /// Latents times this have unit variance.
    pub scaling_factor: f64,
    /// Taken off before scaling.
    pub shift_factor: Option<f64>,
    /// Per-channel statistics that some pipelines use in place of the two factors.
    pub latents_mean: Option<Vec<f64>>,
    /// See `latents_mean`.
    pub latents_std: Option<Vec<f64>>,
    /// Whether the network overflows in half precision.
    pub force_upcast: bool,
    /// Whether a 1x1 convolution follows the encoder.
    pub use_quant_conv: bool,
    /// Whether a 1x1 convolution precedes the decoder.
    pub use_post_quant_conv: bool,
    /// Whether the middle attends.
    pub mid_block_add_attention: bool,
}

impl Default for AutoencoderKlConfig {
    fn default() -> Self {
        Self {
            in_channels: 3,
            out_channels: 3,
            down_block_types: vec!["DownEncoderBlock2D".into()],
            up_block_types: vec!["UpDecoderBlock2D".into()],
            block_out_channels: vec![64],
            layers_per_block: 1,
            act_fn: "silu".into(),
            latent_channels: 4,
            norm_num_groups: 32,
            sample_size: 32,
            scaling_factor: 0.18215,
            shift_factor: None,
            latents_mean: None,
            latents_std: None,
            force_upcast: true,
            use_quant_conv: true,
            use_post_quant_conv: true,
            mid_block_add_attention: true,
        }
    }
}

impl AutoencoderKlConfig {
    /// Pixels per latent, along a side.
    pub fn scale_factor(&self) -> usize {
        1 << (self.block_out_channels.len().clamp(1, MAX_RESOLUTIONS) - 1)
    }

    /// `(latents - shift) * scaling`: what a denoiser works on.
    pub fn scale(&self, latents: &Tensor) -> Result<Tensor> {
        let shifted = match self.shift_factor {
            Some(shift) => (latents - shift)?,
            None => latents.clone(),
        };
        Ok((shifted * self.scaling_factor)?)
    }

    /// `latents / scaling + shift`: what [`AutoencoderKl::decode`] takes.
    pub fn unscale(&self, latents: &Tensor) -> Result<Tensor> {
        let scaling = Tensor::new(self.scaling_factor as f32, latents.device())?.to_dtype(latents.dtype())?;
        let unscaled = latents.broadcast_div(&scaling)?;
        Ok(match self.shift_factor {
            Some(shift) => (unscaled + shift)?,
            None => unscaled,
        })
    }

    fn check(&self) -> Result<()> {
        let resolutions = self.block_out_channels.len();
        let ok = |field: &str, good: bool, value: &dyn std::fmt::Debug| {
            let unsupported = || Error::Unsupported { field: field.to_owned(), value: format!("{value:?}") };
            if good { Ok(()) } else { Err(unsupported()) }
        };
        let all = |types: &[String], only: &str| types.len() == resolutions && types.iter().all(|t| t == only);
        let width = |c: usize| (1..=MAX_CHANNELS).contains(&c);
        let groups = self.norm_num_groups;
        ok("block_out_channels", (1..=MAX_RESOLUTIONS).contains(&resolutions), &self.block_out_channels)?;
        ok("block_out_channels", self.block_out_channels.iter().all(|c| width(*c)), &self.block_out_channels)?;
        ok("down_block_types", all(&self.down_block_types, "DownEncoderBlock2D"), &self.down_block_types)?;
        ok("up_block_types", all(&self.up_block_types, "UpDecoderBlock2D"), &self.up_block_types)?;
        ok("act_fn", self.act_fn == "silu", &self.act_fn)?;
        ok("in_channels", width(self.in_channels), &self.in_channels)?;
        ok("out_channels", width(self.out_channels), &self.out_channels)?;
        ok("latent_channels", width(self.latent_channels), &self.latent_channels)?;
        ok("layers_per_block", self.layers_per_block <= MAX_CHANNELS, &self.layers_per_block)?;
        ok("scaling_factor", self.scaling_factor.is_normal(), &self.scaling_factor)?;
        ok("norm_num_groups", groups > 0 && self.block_out_channels.iter().all(|c| c % groups == 0), &groups)
    }
}

/// The distribution of a picture's latents: independent normals.
#[derive(Clone, Debug)]
pub struct Moments {
    /// `[B, C, h, w]`; also the distribution's mode.
    pub mean: Tensor,
    /// Logarithm of the variance, within -30..20.
    pub logvar: Tensor,
}

impl Moments {
    /// Splits what the encoder gives: `[B, 2 C, h, w]`.
    pub(crate) fn of(encoded: &Tensor) -> Result<Self> {
        let channels = encoded.dim(1)? / 2;
        let encoded = encoded.to_dtype(DType::F32)?;
        let mean = encoded.narrow(1, 0, channels)?.contiguous()?;
        let logvar = encoded.narrow(1, channels, channels)?.contiguous()?.clamp(-30f32, 20f32)?;
        Ok(Self { mean, logvar })
    }

    /// Standard deviation: `[B, C, h, w]`.
    pub fn std(&self) -> Result<Tensor> {
        // By our own exponential: the host's C library must have no say in the latents (DESIGN.md, section 5).
        let logvar = self.logvar.flatten_all()?.to_vec1::<f32>()?;
        let std: Vec<f32> = logvar.into_iter().map(|v| libm::expf(0.5 * v)).collect();
        Ok(Tensor::from_vec(std, self.logvar.shape(), self.logvar.device())?)
    }

    /// A draw, given standard normal `noise: [B, C, h, w]`.
    pub fn sample(&self, noise: &Tensor) -> Result<Tensor> {
        Ok((&self.mean + (self.std()? * noise)?)?)
    }
}

/// Whether large pictures are worked on in overlapping tiles: less memory, slightly another picture.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Tiling {
    /// Never.
    #[default]
    Off,
    /// When a side is longer than `sample_size` pixels.
    On,
}

/// Is told the outputs of submodules, by the reference's names, as they are computed.
pub type Tap<'a> = &'a mut dyn FnMut(&str, &Tensor);

/// The network.
#[derive(Clone, Debug)]
pub struct AutoencoderKl {
    config: AutoencoderKlConfig,
    encoder: Encoder,
    decoder: Decoder,
    quant_conv: Option<Conv2d>,
    post_quant_conv: Option<Conv2d>,
}

impl AutoencoderKl {
    /// Reads the component that `w` is the root of; nothing may be left over.
    pub fn load(w: &Weights, config: &AutoencoderKlConfig) -> Result<Self> {
        config.check()?;
        let c = config.latent_channels;
        let pointwise = |name: &str, channels: usize| Conv2d::load(&w.pp(name), [channels, channels], 1);
        let network = Self {
            encoder: Encoder::load(&w.pp("encoder"), config)?,
            decoder: Decoder::load(&w.pp("decoder"), config)?,
            quant_conv: config.use_quant_conv.then(|| pointwise("quant_conv", 2 * c)).transpose()?,
            post_quant_conv: config.use_post_quant_conv.then(|| pointwise("post_quant_conv", c)).transpose()?,
            config: config.clone(),
        };
        w.finish()?;
        Ok(network)
    }

    /// `image: [B, 3, H, W]`, in -1..1, gives the distribution of `[B, C, H/f, W/f]`.
    pub fn encode(&self, image: &Tensor) -> Result<Moments> {
        self.encode_tapped(image, &mut |_, _| {})
    }

    /// Unscaled `latents: [B, C, h, w]` give `[B, 3, h f, w f]`, about -1..1.
    pub fn decode(&self, latents: &Tensor) -> Result<Tensor> {
        self.decode_tapped(latents, &mut |_, _| {})
    }

    /// [`Self::encode`] or [`Self::encode_tiled`].
    pub fn encode_with(&self, image: &Tensor, tiling: Tiling) -> Result<Moments> {
        match tiling {
            Tiling::Off => self.encode(image),
            Tiling::On => self.encode_tiled(image),
        }
    }

    /// [`Self::decode`] or [`Self::decode_tiled`].
    pub fn decode_with(&self, latents: &Tensor, tiling: Tiling) -> Result<Tensor> {
        match tiling {
            Tiling::Off => self.decode(latents),
            Tiling::On => self.decode_tiled(latents),
        }
    }

    /// As [`Self::encode`], in tiles if a side is longer than one.
    pub fn encode_tiled(&self, image: &Tensor) -> Result<Moments> {
        let tiles = self.tiles();
        if !tiles.is_larger_image(image)? {
            return self.encode(image);
        }
        Moments::of(&tiles.encode(image, |tile| self.encode_raw(tile, &mut |_, _| {}))?)
    }

    /// As [`Self::decode`], in tiles if a side is longer than one.
    pub fn decode_tiled(&self, latents: &Tensor) -> Result<Tensor> {
        let tiles = self.tiles();
        if !tiles.is_larger_latent(latents)? {
            return self.decode(latents);
        }
        tiles.decode(latents, |tile| self.decode(tile))
    }

    /// As [`Self::encode`], telling `tap` what the submodules give.
    pub fn encode_tapped(&self, image: &Tensor, tap: Tap) -> Result<Moments> {
        Moments::of(&self.encode_raw(image, tap)?)
    }

    /// As [`Self::decode`], telling `tap` what the submodules give.
    pub fn decode_tapped(&self, latents: &Tensor, tap: Tap) -> Result<Tensor> {
        let latents = latents.to_dtype(self.decoder.dtype())?;
        let z = match &self.post_quant_conv {
            Some(conv) => conv.forward(&latents)?,
            None => latents,
        };
        Ok(self.decoder.forward(&z, tap)?.to_dtype(DType::F32)?)
    }

    /// The configuration it was loaded with.
    pub fn config(&self) -> &AutoencoderKlConfig {
        &self.config
    }

    /// Pixels per latent, along a side.
    pub fn scale_factor(&self) -> usize {
        self.config.scale_factor()
    }

    fn tiles(&self) -> Tiles {
        Tiles::new(self.config.sample_size, self.scale_factor())
    }

    /// Both moments in one tensor: `[B, 2 C, h, w]`.
    fn encode_raw(&self, image: &Tensor, tap: Tap) -> Result<Tensor> {
        let encoded = self.encoder.forward(&image.to_dtype(self.encoder.dtype())?, tap)?;
        match &self.quant_conv {
            Some(conv) => conv.forward(&encoded),
            None => Ok(encoded),
        }
    }
}

#[cfg(test)]
mod tests;
