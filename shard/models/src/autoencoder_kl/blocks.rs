//! What encoder and decoder are built of.

use parallel::convolution::{self, Placement};
use parallel::ops::{self, Activation};
use parallel::{DType, Linear, Shard, Tensor, Weights};

use crate::Result;

/// Of every norm of this network.
const NORM_EPS: f64 = 1e-6;

/// A square convolution that keeps the size: `[B, C_in, H, W]` gives `[B, C_out, H, W]`.
#[derive(Clone, Debug)]
pub(crate) struct Conv2d {
    conv: parallel::Conv2d,
    size: usize,
}

impl Conv2d {
    pub(crate) fn load(w: &Weights, channels: [usize; 2], size: usize) -> Result<Self> {
        Ok(Self { conv: parallel::Conv2d::load(w, channels, size)?, size })
    }

    /// Doubles the size, by repeating pixels before they are convolved: `[B, C_in, H, W]` gives `[B, C_out, 2 H, 2 W]`.
    pub(crate) fn load_upsampling(w: &Weights, channels: [usize; 2], size: usize) -> Result<Self> {
        Ok(Self { conv: parallel::Conv2d::load_doubling(w, channels, size)?, size })
    }

    /// What a cubic kernel, causal in time, does to a single frame.
    pub(crate) fn load_last_frame(w: &Weights, channels: [usize; 2], size: usize) -> Result<Self> {
        Ok(Self { conv: parallel::Conv2d::load_last_frame(w, channels, size)?, size })
    }

    pub(crate) fn dtype(&self) -> DType {
        self.conv.dtype()
    }

    pub(crate) fn forward(&self, x: &Tensor) -> Result<Tensor> {
        Ok(self.conv.forward(x, Placement::same(self.size))?)
    }

    /// As [`Self::forward`], plus `residual: [B, C_out, H, W]`.
    pub(crate) fn forward_plus(&self, x: &Tensor, residual: &Tensor) -> Result<Tensor> {
        Ok(self.conv.forward_plus(x, Placement::same(self.size), residual)?)
    }

    /// Halves the size: stride 2, padded on the right and below only.
    pub(crate) fn downsample(&self, x: &Tensor) -> Result<Tensor> {
        Ok(self.conv.forward(x, Placement { stride: 2, before: 0, after: 1 })?)
    }
}

/// Group norm over `[B, C, ..]`.
#[derive(Clone, Debug)]
pub(super) struct GroupNorm {
    weight: Tensor,
    bias: Tensor,
    groups: usize,
}

impl GroupNorm {
    pub(super) fn load(w: &Weights, channels: usize, groups: usize) -> Result<Self> {
        let get = |name: &str| w.get(name, &[channels], Shard::Replicated);
        Ok(Self { weight: get("weight")?, bias: get("bias")?, groups })
    }

    pub(super) fn forward(&self, x: &Tensor) -> Result<Tensor> {
        Ok(ops::group_norm(x, self.groups, [&self.weight, &self.bias], NORM_EPS, None)?)
    }

    /// This norm, then SiLU and `conv`, plus a `residual: [B, C_out, H, W]` if there is one.
    fn then(&self, conv: &Conv2d, x: &Tensor, residual: Option<&Tensor>) -> Result<Tensor> {
        let affine = [&self.weight, &self.bias];
        let norm = convolution::GroupNorm { groups: self.groups, affine, eps: NORM_EPS, activation: Some(Activation::Silu) };
        Ok(conv.conv.forward_normed(x, norm, Placement::same(conv.size), residual)?)
    }
}

/// Two convolutions and a way round them.
#[derive(Clone, Debug)]
pub(super) struct ResnetBlock {
    norm1: GroupNorm,
    conv1: Conv2d,
    norm2: GroupNorm,
    conv2: Conv2d,
    conv_shortcut: Option<Conv2d>,
}

impl ResnetBlock {
    pub(super) fn load(w: &Weights, [c_in, c_out]: [usize; 2], groups: usize) -> Result<Self> {
        let shortcut = || Conv2d::load(&w.pp("conv_shortcut"), [c_in, c_out], 1);
        Ok(Self {
            norm1: GroupNorm::load(&w.pp("norm1"), c_in, groups)?,
            conv1: Conv2d::load(&w.pp("conv1"), [c_in, c_out], 3)?,
            norm2: GroupNorm::load(&w.pp("norm2"), c_out, groups)?,
            conv2: Conv2d::load(&w.pp("conv2"), [c_out, c_out], 3)?,
            conv_shortcut: (c_in != c_out).then(shortcut).transpose()?,
        })
    }

    /// `[B, C_in, H, W]` gives `[B, C_out, H, W]`.
    pub(super) fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let h = self.norm1.then(&self.conv1, x, None)?;
        let shortcut = self.conv_shortcut.as_ref().map(|conv| conv.forward(x)).transpose()?;
        self.norm2.then(&self.conv2, &h, Some(shortcut.as_ref().unwrap_or(x)))
    }
}

/// Attention of one head among all positions.
#[derive(Clone, Debug)]
pub(super) struct Attention {
    group_norm: GroupNorm,
    to_q: Linear,
    to_k: Linear,
    to_v: Linear,
    to_out: Linear,
}

impl Attention {
    pub(super) fn load(w: &Weights, channels: usize, groups: usize) -> Result<Self> {
        // Checkpoints from before diffusers 0.15 have the names on the right.
        let either = |new: &str, old: &str| {
            let name = if w.contains(&format!("{new}.weight")) { new } else { old };
            Linear::load(&w.pp(name), channels, channels)
        };
        Ok(Self {
            group_norm: GroupNorm::load(&w.pp("group_norm"), channels, groups)?,
            to_q: either("to_q", "query")?,
            to_k: either("to_k", "key")?,
            to_v: either("to_v", "value")?,
            to_out: either("to_out.0", "proj_attn")?,
        })
    }

    /// `[B, C, H, W]` gives the same shape.
    pub(super) fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let (b, c, height, width) = x.dims4()?;
        let normed = self.group_norm.forward(x)?;
        let tokens = normed.flatten_from(2)?.transpose(1, 2)?.contiguous()?; // [B, C, H, W] -> [B, H W, C]
        let one_head = |linear: &Linear| Ok::<_, crate::Error>(linear.forward(&tokens)?.unsqueeze(1)?); // [B, 1, H W, C]
        let (q, k, v) = (one_head(&self.to_q)?, one_head(&self.to_k)?, one_head(&self.to_v)?);
        let attended = ops::attention(&q, &k, &v, 1.0 / (c as f64).sqrt(), None)?.squeeze(1)?;
        let out = self.to_out.forward(&attended)?;
        let out = out.transpose(1, 2)?.contiguous()?.reshape((b, c, height, width))?; // [B, H W, C] -> [B, C, H, W]
        Ok((out + x)?)
    }
}

/// The middle of encoder and decoder, at the coarsest resolution.
#[derive(Clone, Debug)]
pub(super) struct MidBlock {
    pub(super) resnets: [ResnetBlock; 2],
    pub(super) attention: Option<Attention>,
}

impl MidBlock {
    pub(super) fn load(w: &Weights, channels: usize, groups: usize, attends: bool) -> Result<Self> {
        let resnet = |i: usize| ResnetBlock::load(&w.pp("resnets").pp(i), [channels, channels], groups);
        let attention = || Attention::load(&w.pp("attentions.0"), channels, groups);
        Ok(Self { resnets: [resnet(0)?, resnet(1)?], attention: attends.then(attention).transpose()? })
    }

    /// `name` is this block's own.
    pub(super) fn forward(&self, x: &Tensor, name: &str, tap: super::Tap) -> Result<Tensor> {
        let mut x = self.resnets[0].forward(x)?;
        tap(&format!("{name}.resnets.0"), &x);
        if let Some(attention) = &self.attention {
            x = attention.forward(&x)?;
            tap(&format!("{name}.attentions.0"), &x);
        }
        let x = self.resnets[1].forward(&x)?;
        tap(name, &x);
        Ok(x)
    }
}

/// One resolution: residual blocks, then a change of size unless it is the last.
#[derive(Clone, Debug)]
pub(super) struct SizeBlock {
    resnets: Vec<ResnetBlock>,
    resize: Option<Resize>,
}

/// How a resolution leads to the next.
#[derive(Clone, Debug)]
pub(super) enum Resize {
    /// Half the size (encoder).
    Down(Conv2d),
    /// Twice the size (decoder).
    Up(Conv2d),
}

impl SizeBlock {
    pub(super) fn load(w: &Weights, [c_in, c_out]: [usize; 2], layers: usize, groups: usize) -> Result<Self> {
        let resnet = |i: usize| ResnetBlock::load(&w.pp("resnets").pp(i), [if i == 0 { c_in } else { c_out }, c_out], groups);
        Ok(Self { resnets: (0..layers).map(resnet).collect::<Result<_>>()?, resize: None })
    }

    /// The same, followed by half the size.
    pub(super) fn then_down(mut self, w: &Weights, channels: usize) -> Result<Self> {
        self.resize = Some(Resize::Down(Conv2d::load(&w.pp("downsamplers.0.conv"), [channels, channels], 3)?));
        Ok(self)
    }

    /// The same, followed by twice the size.
    pub(super) fn then_up(mut self, w: &Weights, channels: usize) -> Result<Self> {
        self.resize = Some(Resize::Up(Conv2d::load_upsampling(&w.pp("upsamplers.0.conv"), [channels, channels], 3)?));
        Ok(self)
    }

    pub(super) fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let mut x = x.clone();
        for resnet in &self.resnets {
            x = resnet.forward(&x)?;
        }
        match &self.resize {
            None => Ok(x),
            Some(Resize::Down(conv)) => conv.downsample(&x),
            Some(Resize::Up(conv)) => conv.forward(&x),
        }
    }
}
