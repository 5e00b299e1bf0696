//! What encoder and decoder are built of.

use parallel::ops::{self, Activation};
use parallel::{Shard, Tensor, Weights};

use crate::Result;
use crate::autoencoder_kl::blocks::Conv2d;

/// `QwenImageRMS_norm` over the channels of each place.
#[derive(Clone, Debug)]
pub(super) struct RmsNorm {
    gamma: Tensor,
}

impl RmsNorm {
    /// `gamma: [C, 1, 1]` where the reference works on pictures, `[C, 1, 1, 1]` where on frames.
    fn load(w: &Weights, shape: &[usize]) -> Result<Self> {
        Ok(Self { gamma: w.get("gamma", shape, Shard::Replicated)?.flatten_all()? })
    }

    pub(super) fn of_frames(w: &Weights, channels: usize) -> Result<Self> {
        Self::load(w, &[channels, 1, 1, 1])
    }

    fn of_pictures(w: &Weights, channels: usize) -> Result<Self> {
        Self::load(w, &[channels, 1, 1])
    }

    pub(super) fn forward(&self, x: &Tensor) -> Result<Tensor> {
        Ok(ops::rms_norm_channels(x, &self.gamma, None)?)
    }

    fn forward_silu(&self, x: &Tensor) -> Result<Tensor> {
        Ok(ops::rms_norm_channels(x, &self.gamma, Some(Activation::Silu))?)
    }
}

/// `QwenImageResidualBlock`: two convolutions and a way round them.
#[derive(Clone, Debug)]
pub(super) struct ResidualBlock {
    norm1: RmsNorm,
    conv1: Conv2d,
    norm2: RmsNorm,
    conv2: Conv2d,
    conv_shortcut: Option<Conv2d>,
}

impl ResidualBlock {
    pub(super) fn load(w: &Weights, [c_in, c_out]: [usize; 2]) -> Result<Self> {
        let shortcut = || Conv2d::load_last_frame(&w.pp("conv_shortcut"), [c_in, c_out], 1);
        Ok(Self {
            norm1: RmsNorm::of_frames(&w.pp("norm1"), c_in)?,
            conv1: Conv2d::load_last_frame(&w.pp("conv1"), [c_in, c_out], 3)?,
            norm2: RmsNorm::of_frames(&w.pp("norm2"), c_out)?,
            conv2: Conv2d::load_last_frame(&w.pp("conv2"), [c_out, c_out], 3)?,
            conv_shortcut: (c_in != c_out).then(shortcut).transpose()?,
        })
    }

    /// `[B, C_in, H, W]` gives `[B, C_out, H, W]`.
    pub(super) fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let h = self.conv1.forward(&self.norm1.forward_silu(x)?)?;
        let h = self.norm2.forward_silu(&h)?;
        match &self.conv_shortcut {
            Some(conv) => self.conv2.forward_plus(&h, &conv.forward(x)?),
            None => self.conv2.forward_plus(&h, x),
        }
    }
}

/// `QwenImageAttentionBlock`: one head among all places.
#[derive(Clone, Debug)]
struct AttentionBlock {
    norm: RmsNorm,
    to_qkv: Conv2d,
    proj: Conv2d,
}

impl AttentionBlock {
    fn load(w: &Weights, channels: usize) -> Result<Self> {
        Ok(Self {
            norm: RmsNorm::of_pictures(&w.pp("norm"), channels)?,
            to_qkv: Conv2d::load(&w.pp("to_qkv"), [channels, 3 * channels], 1)?,
            proj: Conv2d::load(&w.pp("proj"), [channels, channels], 1)?,
        })
    }

    /// `[B, C, H, W]` gives the same shape.
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let (b, c, height, width) = x.dims4()?;
        let qkv = self.to_qkv.forward(&self.norm.forward(x)?)?; // [B, 3 C, H, W]
        let tokens = qkv.flatten_from(2)?.transpose(1, 2)?.unsqueeze(1)?; // [B, 3 C, H W] -> [B, 1, H W, 3 C]
        let part = |i: usize| tokens.narrow(3, i * c, c)?.contiguous(); // [B, 1, H W, C]
        let attended = ops::attention(&part(0)?, &part(1)?, &part(2)?, 1.0 / (c as f64).sqrt(), None)?.squeeze(1)?;
        let attended = attended.transpose(1, 2)?.contiguous()?.reshape((b, c, height, width))?; // [B, H W, C] -> [B, C, H, W]
        self.proj.forward_plus(&attended, x)
    }
}

/// `QwenImageMidBlock`: the middle of encoder and decoder, at the coarsest resolution.
#[derive(Clone, Debug)]
pub(super) struct MidBlock {
    resnets: [ResidualBlock; 2],
    attention: AttentionBlock,
}

impl MidBlock {
    pub(super) fn load(w: &Weights, channels: usize) -> Result<Self> {
        let resnet = |i: usize| ResidualBlock::load(&w.pp("resnets").pp(i), [channels, channels]);
        Ok(Self { resnets: [resnet(0)?, resnet(1)?], attention: AttentionBlock::load(&w.pp("attentions.0"), channels)? })
    }

    pub(super) fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let x = self.attention.forward(&self.resnets[0].forward(x)?)?;
        self.resnets[1].forward(&x)
    }
}

/// `QwenImageResample`: how a resolution leads to the next.
#[derive(Clone, Debug)]
pub(super) enum Resample {
    /// Half the size (encoder).
    Down(Conv2d),
    /// Twice the size and half the channels (decoder).
    Up(Conv2d),
}

impl Resample {
    pub(super) fn down(w: &Weights, channels: usize, in_time: bool) -> Result<Self> {
        skip_time(w, in_time);
        Ok(Self::Down(Conv2d::load(&w.pp("resample.1"), [channels, channels], 3)?))
    }

    pub(super) fn up(w: &Weights, channels: usize, in_time: bool) -> Result<Self> {
        skip_time(w, in_time);
        Ok(Self::Up(Conv2d::load_upsampling(&w.pp("resample.1"), [channels, channels / 2], 3)?))
    }

    pub(super) fn forward(&self, x: &Tensor) -> Result<Tensor> {
        match self {
            Self::Down(conv) => conv.downsample(x),
            Self::Up(conv) => conv.forward(x),
        }
    }
}

/// The convolution along time begins to work at a video's second frame; a picture is the first.
fn skip_time(w: &Weights, in_time: bool) {
    if in_time {
        w.skip("time_conv");
    }
}
