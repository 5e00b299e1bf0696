//! A convolution whose output channels are divided over the ranks.
//!
//! A pixel of a channel is one chain over all input channels, whoever makes it: so the bits do not depend on how many ranks there are, and
//! what is between two convolutions is gathered, not summed.

use std::fmt;
use std::sync::Arc;

use candle_core::Tensor;

use super::{Conv2d, GroupNorm, Placement};
use crate::collective::Collective;
use crate::lora::Cut;
use crate::weights::Weights;
use crate::{Error, Result};

/// A square convolution with bias. A rank holds `C_out/tp` of its output channels, and takes all input channels.
#[derive(Clone)]
pub struct ColumnParallelConv2d {
    conv: Conv2d,
    group: Arc<dyn Collective>,
}

impl ColumnParallelConv2d {
    /// Reads this rank's part of `weight: [c_out, c_in, size, size]` and `bias: [c_out]`.
    ///
    /// # Errors
    /// [`Error::Indivisible`] when the ranks cannot share the channels equally.
    pub fn load(w: &Weights, channels: [usize; 2], size: usize) -> Result<Self> {
        Self::load_as(w, channels, size, false)
    }

    /// As [`Self::load`], of a kernel that is laid on enlarged pictures: see [`Conv2d::load_doubling`].
    pub fn load_doubling(w: &Weights, channels: [usize; 2], size: usize) -> Result<Self> {
        Self::load_as(w, channels, size, true)
    }

    fn load_as(w: &Weights, [c_in, c_out]: [usize; 2], size: usize, doubles: bool) -> Result<Self> {
        let (group, tp) = (w.group().clone(), w.group().size());
        if !c_out.is_multiple_of(tp) {
            return Err(Error::Indivisible { what: format!("{}: channels", w.prefix()), size: c_out, tp });
        }
        let conv = Conv2d::load_cut(w, [c_in, c_out], size, Cut::Outputs(vec![c_out]), doubles)?;
        Ok(Self { conv, group })
    }

    /// `x: [B, C_in, H, W]`, equal on every rank, gives this rank's `[B, C_out/tp, H', W']`.
    pub fn forward(&self, x: &Tensor, at: Placement) -> Result<Tensor> {
        self.conv.forward(x, at)
    }

    /// As [`Self::forward`], plus this rank's channels of a residual, in one pass.
    pub fn forward_plus(&self, x: &Tensor, at: Placement, residual: &Tensor) -> Result<Tensor> {
        self.conv.forward_plus(x, at, residual)
    }

    /// As [`Self::forward`] of a group norm of `x`, plus this rank's channels of a residual if there is one: see [`Conv2d::forward_normed`].
    pub fn forward_normed(&self, x: &Tensor, norm: GroupNorm<'_>, at: Placement, residual: Option<&Tensor>) -> Result<Tensor> {
        self.conv.forward_normed(x, norm, at, residual)
    }

    /// As [`Self::forward`], then gathered: `[B, C_out, H', W']` on every rank.
    pub fn forward_gathered(&self, x: &Tensor, at: Placement) -> Result<Tensor> {
        self.gather(&self.forward(x, at)?)
    }

    /// All ranks' channels, `[B, C, H, W]`, of this one's `[B, C/tp, H, W]`.
    pub fn gather(&self, y: &Tensor) -> Result<Tensor> {
        self.group.all_gather(y, 1)
    }

    /// This rank's channels of `[B, C, H, W]`.
    pub fn own(&self, x: &Tensor) -> Result<Tensor> {
        let own = x.dim(1)? / self.group.size();
        Ok(x.narrow(1, self.group.rank() * own, own)?.contiguous()?)
    }

    /// Whether it has all channels.
    pub fn is_whole(&self) -> bool {
        self.group.size() == 1
    }
}

impl fmt::Debug for ColumnParallelConv2d {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ColumnParallel{:?}, rank {} of {}", self.conv, self.group.rank(), self.group.size())
    }
}
