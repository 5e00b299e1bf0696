//! `ResnetBlock2D`, and what changes the resolution.

use parallel::convolution::{self, Placement};
use parallel::ops::{self, Activation, Products};
use parallel::{ColumnParallelConv2d, ColumnParallelLinear, Shard, Tensor, Weights};

use super::UNet2DConditionConfig;
use crate::Result;
use crate::mmdit::layers::column;

/// Side of the kernels.
const SIZE: usize = 3;

/// Loads a layer of the timestep's embedding, of one row: it is multiplied in f32 whatever the network is, since it goes into every place of every
/// picture and costs nothing.
pub(crate) fn of_time<T>(load: impl FnOnce() -> Result<T>) -> Result<T> {
    Products::F32.scope(load)
}

/// A group norm over `[B, C, H, W]`, of all channels or of a rank's.
#[derive(Debug)]
pub(crate) struct GroupNorm {
    weight: Tensor,
    bias: Tensor,
    groups: usize,
    eps: f64,
}

impl GroupNorm {
    /// Of `channels` in `groups`: whole on every rank.
    pub(crate) fn load(w: &Weights, channels: usize, groups: usize, eps: f64) -> Result<Self> {
        Self::load_as(w, channels, groups, eps, Shard::Replicated)
    }

    /// Of this rank's channels of so many, in its groups.
    pub(crate) fn load_split(w: &Weights, channels: usize, groups: usize, eps: f64) -> Result<Self> {
        Self::load_as(w, channels, groups / w.group().size(), eps, Shard::split(0, channels))
    }

    fn load_as(w: &Weights, channels: usize, groups: usize, eps: f64, shard: Shard) -> Result<Self> {
        let get = |name| w.get(name, &[channels], shard.clone());
        Ok(Self { weight: get("weight")?, bias: get("bias")?, groups, eps })
    }

    pub(crate) fn forward(&self, x: &Tensor, activation: Option<Activation>) -> Result<Tensor> {
        Ok(ops::group_norm(x, self.groups, [&self.weight, &self.bias], self.eps, activation)?)
    }

    /// This norm and SiLU, as what comes before a convolution.
    fn with_silu(&self) -> convolution::GroupNorm<'_> {
        let affine = [&self.weight, &self.bias];
        convolution::GroupNorm { groups: self.groups, affine, eps: self.eps, activation: Some(Activation::Silu) }
    }
}

/// Two convolutions, the timestep added between them, and a way round them.
///
/// A rank makes its share of each convolution's output channels; the norm between them and the timestep's projection are of those
/// channels alone. Before the second convolution and after it the channels are gathered.
#[derive(Debug)]
pub(super) struct ResnetBlock2D {
    norm1: GroupNorm,
    conv1: ColumnParallelConv2d,
    time_emb_proj: ColumnParallelLinear,
    norm2: GroupNorm,
    conv2: ColumnParallelConv2d,
    conv_shortcut: Option<ColumnParallelConv2d>,
}

impl ResnetBlock2D {
    pub(super) fn load(w: &Weights, config: &UNet2DConditionConfig, [c_in, c_out]: [usize; 2]) -> Result<Self> {
        let (groups, eps) = (config.norm_num_groups, config.norm_eps);
        let shortcut = || ColumnParallelConv2d::load(&w.pp("conv_shortcut"), [c_in, c_out], 1);
        Ok(Self {
            norm1: GroupNorm::load(&w.pp("norm1"), c_in, groups, eps)?,
            conv1: ColumnParallelConv2d::load(&w.pp("conv1"), [c_in, c_out], SIZE)?,
            time_emb_proj: of_time(|| column(&w.pp("time_emb_proj"), config.time_embed_dim(), c_out))?,
            norm2: GroupNorm::load_split(&w.pp("norm2"), c_out, groups, eps)?,
            conv2: ColumnParallelConv2d::load(&w.pp("conv2"), [c_out, c_out], SIZE)?,
            conv_shortcut: (c_in != c_out).then(shortcut).transpose()?,
        })
    }

    /// `x: [B, C_in, H, W]` and `temb: [B, D]`, after SiLU, give `[B, C_out, H, W]`, all on every rank.
    pub(super) fn forward(&self, x: &Tensor, temb: &Tensor) -> Result<Tensor> {
        let same = Placement::same(SIZE);
        let h = self.conv1.forward_normed(x, self.norm1.with_silu(), same, None)?; // [B, C_out/tp, H, W]
        let h = ops::shift_channels(&h, &self.time_emb_proj.forward(temb)?)?;
        let residual = match &self.conv_shortcut {
            Some(conv) => conv.forward(x, Placement::same(1))?,
            None => self.conv2.own(x)?,
        };
        if self.conv2.is_whole() {
            return Ok(self.conv2.forward_normed(&h, self.norm2.with_silu(), same, Some(&residual))?);
        }
        let h = self.conv1.gather(&self.norm2.forward(&h, Some(Activation::Silu))?)?; // [B, C_out, H, W]
        Ok(self.conv2.gather(&self.conv2.forward_plus(&h, same, &residual)?)?)
    }
}

/// `Downsample2D`: half the height and width.
#[derive(Debug)]
pub(super) struct Downsample2D(ColumnParallelConv2d);

impl Downsample2D {
    pub(super) fn load(w: &Weights, channels: usize) -> Result<Self> {
        Ok(Self(ColumnParallelConv2d::load(&w.pp("conv"), [channels, channels], SIZE)?))
    }

    pub(super) fn forward(&self, x: &Tensor) -> Result<Tensor> {
        Ok(self.0.forward_gathered(x, Placement { stride: 2, before: 1, after: 1 })?)
    }
}

/// `Upsample2D`: twice the height and width.
#[derive(Debug)]
pub(super) struct Upsample2D(ColumnParallelConv2d);

impl Upsample2D {
    pub(super) fn load(w: &Weights, channels: usize) -> Result<Self> {
        Ok(Self(ColumnParallelConv2d::load_doubling(&w.pp("conv"), [channels, channels], SIZE)?))
    }

    pub(super) fn forward(&self, x: &Tensor) -> Result<Tensor> {
        Ok(self.0.forward_gathered(x, Placement::same(SIZE))?)
    }
}
