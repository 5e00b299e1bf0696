//! Convolution layers.

use std::fmt;
use std::sync::Arc;

use candle_core::{DType, Tensor};
use kernels::conv::{self, Geometry};

use crate::lora::{Cut, Patch, Site};
use crate::ops::host::{has_kernels, ours, read, read_as, write};
use crate::ops::{Activation, Products};
use crate::weights::{Shard, Weights};
use crate::{Error, Result, ops};

mod column;

pub use column::ColumnParallelConv2d;

/// Where the kernel is laid on the picture.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Placement {
    /// From one output pixel's window to the next's.
    pub stride: usize,
    /// Zeros above and to the left.
    pub before: usize,
    /// Zeros below and to the right.
    pub after: usize,
}

impl Placement {
    /// Windows side by side that keep the size of a picture.
    pub fn same(size: usize) -> Self {
        Self { stride: 1, before: size / 2, after: size / 2 }
    }
}

/// A square convolution with bias: whole, or some of its output channels.
#[derive(Clone)]
pub struct Conv2d {
    kernel: Kernel,
    dtype: DType,
    patch: Option<Patch>,
}

#[derive(Clone)]
enum Kernel {
    /// For ours: products in f32, or in bf16.
    Packed(Arc<conv::Conv2d>),
    /// For candle's; whether the picture is first enlarged.
    Whole { weight: Tensor, bias: Tensor, doubles: bool },
}

impl Conv2d {
    /// Reads `weight: [c_out, c_in, size, size]` and `bias: [c_out]`.
    pub fn load(w: &Weights, [c_in, c_out]: [usize; 2], size: usize) -> Result<Self> {
        Self::load_cut(w, [c_in, c_out], size, Cut::Whole, false)
    }

    /// As [`Self::load`], of a kernel that is laid on pictures enlarged to twice their size, each pixel repeated: they are not enlarged, but
    /// convolved with its sums. It takes only [`Placement::same`].
    pub fn load_doubling(w: &Weights, [c_in, c_out]: [usize; 2], size: usize) -> Result<Self> {
        Self::load_cut(w, [c_in, c_out], size, Cut::Whole, true)
    }

    /// This rank's output channels: all, or its share of them.
    fn load_cut(w: &Weights, [c_in, c_out]: [usize; 2], size: usize, cut: Cut, doubles: bool) -> Result<Self> {
        let shard = if cut == Cut::Whole { Shard::Replicated } else { Shard::split(0, c_out) };
        let weight = stored(w, &[c_out, c_in, size, size], shard.clone())?;
        let bias = w.get("bias", &[c_out], shard)?;
        let site = Site { name: w.prefix().to_owned(), d_in: c_in, d_out: c_out, kernel: Some(size), cut };
        let patch = Some(w.adapters().register(site, w.group()));
        Ok(Self { patch, ..Self::of_kind(w, weight, bias, doubles)? })
    }

    /// Reads the last frame of `weight: [c_out, c_in, size, size, size]` and `bias: [c_out]`: what a causal convolution in time
    /// and space does to a picture that has none before it. Adapters do not change it.
    pub fn load_last_frame(w: &Weights, [c_in, c_out]: [usize; 2], size: usize) -> Result<Self> {
        let last = Shard::part(2, size.saturating_sub(1)..size);
        let weight = stored(w, &[c_out, c_in, size, size, size], last)?;
        let bias = w.get("bias", &[c_out], Shard::Replicated)?;
        Self::of(w, weight.squeeze(2)?, bias)
    }

    /// Of `weight: [c_out, c_in, size, size]` and `bias: [c_out]`, which were made of what `w` holds. Adapters do not change it.
    ///
    /// # Errors
    /// When they do not have these dimensions.
    pub fn of(w: &Weights, weight: Tensor, bias: Tensor) -> Result<Self> {
        Self::of_kind(w, weight, bias, false)
    }

    fn of_kind(w: &Weights, weight: Tensor, bias: Tensor, doubles: bool) -> Result<Self> {
        let (c_out, c_in, size, _) = weight.dims4()?;
        let dtype = w.dtype();
        if doubles && has_kernels(w.device()) {
            // It is held as four kernels, of the sums that pixels of each kind meet.
            let (kernels, window) = (4, size / 2 + 1);
            let held = weight.elem_count() * weight.dtype().size_in_bytes();
            w.holds_more(held * (kernels * window * window).saturating_sub(size * size) / (size * size).max(1));
        }
        let packs = matches!(dtype, DType::F32 | DType::BF16) && has_kernels(w.device()) && !w.is_measuring();
        let kernel = if packs {
            let (dims, bias) = ([c_out, c_in, size], ops::vector(&bias)?);
            let packed = match Products::here().order() {
                Some(order) if weight.dtype() != DType::F32 => {
                    let pack = if doubles { conv::Conv2d::pack_doubling_pairs } else { conv::Conv2d::pack_pairs };
                    read_as(&weight.to_dtype(DType::BF16)?, |w| pack(order, w, dims, Some(&bias)))?
                }
                _ => {
                    let pack = if doubles { conv::Conv2d::pack_doubling } else { conv::Conv2d::pack };
                    read(&weight.to_dtype(DType::F32)?, |w| pack(w, dims, Some(&bias)))?
                }
            };
            Kernel::Packed(Arc::new(packed))
        } else {
            Kernel::Whole { weight, bias, doubles }
        };
        Ok(Self { kernel, dtype, patch: None })
    }

    /// Of an adapter: `weight: [c_out, c_in, size, size]` in f32, in which it is multiplied whatever layers are, without a bias.
    pub(crate) fn of_factor(weight: &Tensor) -> Result<Self> {
        let (c_out, c_in, size, _) = weight.dims4()?;
        let kernel = if has_kernels(weight.device()) {
            Kernel::Packed(Arc::new(read(weight, |w| conv::Conv2d::pack(w, [c_out, c_in, size], None))?))
        } else {
            let bias = Tensor::zeros(c_out, DType::F32, weight.device())?;
            Kernel::Whole { weight: weight.clone(), bias, doubles: false }
        };
        Ok(Self { kernel, dtype: DType::F32, patch: None })
    }

    /// Of what flows through.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// `[B, C_in, H, W]` gives `[B, C_out, H', W']`; of a doubling one, `H'` is `2 H`.
    ///
    /// # Errors
    /// Channels or a placement that are not this convolution's.
    pub fn forward(&self, x: &Tensor, at: Placement) -> Result<Tensor> {
        self.adapted(x, at, self.convolve(Picture::Floats(x), at, None)?)
    }

    /// As [`Self::forward`], plus `residual: [B, C_out, H', W']`, in one pass.
    pub fn forward_plus(&self, x: &Tensor, at: Placement, residual: &Tensor) -> Result<Tensor> {
        self.adapted(x, at, self.convolve(Picture::Floats(x), at, Some(residual))?)
    }

    /// As [`Self::forward`] of [`ops::group_norm`], plus a `residual` if there is one: what goes between the two is written in the bits in which it
    /// is multiplied, unless adapters have to see it.
    pub fn forward_normed(&self, x: &Tensor, norm: GroupNorm<'_>, at: Placement, residual: Option<&Tensor>) -> Result<Tensor> {
        let GroupNorm { groups, affine, eps, activation } = norm;
        match &self.kernel {
            Kernel::Packed(conv)
                if conv.takes_pairs() && ours(x) && x.dim(1)?.is_multiple_of(2 * groups) && !self.is_adapted() =>
            {
                let pairs = ops::group_norm_in_pairs(x, groups, affine, eps, activation)?;
                self.convolve(Picture::Pairs(&pairs), at, residual)
            }
            _ => {
                let x = ops::group_norm(x, groups, affine, eps, activation)?;
                self.adapted(&x, at, self.convolve(Picture::Floats(&x), at, residual)?)
            }
        }
    }

    /// Whether adapters change it now.
    fn is_adapted(&self) -> bool {
        self.patch.as_ref().is_some_and(Patch::is_active)
    }

    /// `y`, made of `x`, with what adapters add.
    fn adapted(&self, x: &Tensor, at: Placement, y: Tensor) -> Result<Tensor> {
        let Some(patch) = self.patch.as_ref().filter(|patch| patch.is_active()) else { return Ok(y) };
        let doubles = match &self.kernel {
            Kernel::Packed(conv) => conv.doubles(),
            Kernel::Whole { doubles, .. } => *doubles,
        };
        // An adapter's kernel is laid on the enlarged picture itself.
        let enlarged = doubles.then(|| ops::upsample_nearest2x(x)).transpose()?;
        Ok(patch.add_convolved(enlarged.as_ref().unwrap_or(x), y, at)?.to_dtype(x.dtype())?)
    }

    fn convolve(&self, picture: Picture<'_>, at: Placement, residual: Option<&Tensor>) -> Result<Tensor> {
        let (x, of_each) = match picture {
            Picture::Floats(x) => (x, 1),
            Picture::Pairs(x) => (x, 2),
        };
        let (b, c, h, w) = x.dims4()?;
        match &self.kernel {
            Kernel::Packed(conv) => {
                let [c_out, c_in, size] = conv.dims();
                if of_each * c != c_in {
                    return Err(Error::Operands { reason: format!("{} channels into a convolution of {c_in}", of_each * c) });
                }
                let Placement { stride, before, after } = at;
                let geometry = Geometry { input: [h, w], stride, before, after };
                if conv.doubles() && geometry != Geometry::same([h, w], size) {
                    return Err(Error::Operands { reason: format!("{at:?} of a kernel that doubles a picture") });
                }
                let [out_h, out_w] = conv.output(geometry);
                let shape = (b, c_out, out_h, out_w);
                if let Some(residual) = residual.filter(|residual| residual.dims() != [b, c_out, out_h, out_w]) {
                    return Err(Error::Operands { reason: format!("{:?} to add to {shape:?}", residual.dims()) });
                }
                let run = |x: &[f32], residual: Option<&[f32]>| {
                    write(shape, |y| match picture {
                        Picture::Floats(_) => conv.run(x, geometry, residual, y),
                        Picture::Pairs(_) => conv.run_pairs(x, geometry, residual, y),
                    })
                };
                let wide = x.to_dtype(DType::F32)?;
                let y = match residual {
                    Some(residual) => read(&residual.to_dtype(DType::F32)?, |residual| read(&wide, |x| run(x, Some(residual))))??,
                    None => read(&wide, |x| run(x, None))?,
                };
                Ok(y?.to_dtype(x.dtype())?)
            }
            Kernel::Whole { weight, bias, doubles } => {
                let x = if *doubles { ops::upsample_nearest2x(x)? } else { x.clone() };
                let x = x.pad_with_zeros(3, at.before, at.after)?.pad_with_zeros(2, at.before, at.after)?;
                let y = x.conv2d(weight, 0, at.stride, 1, 1)?;
                let y = y.broadcast_add(&bias.reshape((1, bias.elem_count(), 1, 1))?)?;
                Ok(match residual {
                    Some(residual) => (y + residual)?,
                    None => y,
                })
            }
        }
    }
}

/// What is convolved.
#[derive(Clone, Copy)]
enum Picture<'a> {
    /// `[B, C, H, W]`
    Floats(&'a Tensor),
    /// Rounded, `[B, C / 2, H, W]`: see [`ops::group_norm_in_pairs`].
    Pairs(&'a Tensor),
}

/// A group norm before a convolution: see [`ops::group_norm`].
#[derive(Clone, Copy, Debug)]
pub struct GroupNorm<'a> {
    /// How many groups of channels there are.
    pub groups: usize,
    /// Weight and bias, `[C]`.
    pub affine: [&'a Tensor; 2],
    /// Added to variances.
    pub eps: f64,
    /// What comes after it.
    pub activation: Option<Activation>,
}

/// The weight, as it is stored if it is multiplied in that.
fn stored(w: &Weights, shape: &[usize], shard: Shard) -> Result<Tensor> {
    if Products::here().narrow() && has_kernels(w.device()) {
        w.get_narrow("weight", shape, shard)
    } else {
        w.get("weight", shape, shard)
    }
}

impl fmt::Debug for Conv2d {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.kernel {
            Kernel::Packed(conv) => conv.fmt(f),
            Kernel::Whole { weight, .. } => write!(f, "Conv2d({:?})", weight.shape()),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use candle_core::Device;

    use super::*;
    use crate::Solo;

    #[test]
    fn the_last_frame_of_a_causal_kernel_is_what_one_picture_meets() {
        let random = |dims: &[usize]| Tensor::randn(0f32, 1.0, dims, &Device::Cpu).unwrap();
        let (x, weight, bias) = (random(&[2, 5, 7, 6]), random(&[4, 5, 3, 3, 3]), random(&[4]));
        let dir = tempfile::tempdir().unwrap();
        let tensors = HashMap::from([("weight".to_owned(), weight.clone()), ("bias".to_owned(), bias.clone())]);
        candle_core::safetensors::save(&tensors, dir.path().join("model.safetensors")).unwrap();
        let w = Weights::open(dir.path(), Arc::new(Solo), DType::F32, &Device::Cpu).unwrap();
        let got = Conv2d::load_last_frame(&w, [5, 4], 3).unwrap();
        assert_eq!(w.bytes_held(), 4 * (4 * 5 * 9 + 4), "the other frames are not read");
        // Causal: two frames of zeros before the picture, under the kernel's first two.
        let zeros = Tensor::zeros((2, 5, 7, 6), DType::F32, &Device::Cpu).unwrap();
        let frames = [&zeros, &zeros, &x];
        let by_frame = frames
            .iter()
            .enumerate()
            .map(|(t, x)| x.conv2d(&weight.narrow(2, t, 1).unwrap().squeeze(2).unwrap(), 1, 1, 1, 1).unwrap());
        let sum = by_frame.reduce(|a, b| (a + b).unwrap()).unwrap();
        let expected = sum.broadcast_add(&bias.reshape((1, 4, 1, 1)).unwrap()).unwrap();
        let got = got.forward(&x, Placement::same(3)).unwrap();
        let difference = (got - expected).unwrap().abs().unwrap().max_all().unwrap().to_scalar::<f32>().unwrap();
        assert!(difference < 1e-4, "differs by {difference}");
    }

    #[test]
    fn candles_convolution_and_ours_agree() {
        let random = |dims: &[usize]| Tensor::randn(0f32, 1.0, dims, &Device::Cpu).unwrap();
        let (x, weight, bias) = (random(&[2, 5, 7, 19]), random(&[6, 5, 3, 3]), random(&[6]));
        let values = ops::vector(&bias).unwrap();
        for (stride, before, after, doubles) in [(1, 1, 1, false), (2, 0, 1, false), (1, 1, 1, true)] {
            let pack = if doubles { conv::Conv2d::pack_doubling } else { conv::Conv2d::pack };
            let packed = read(&weight, |w| pack(w, [6, 5, 3], Some(&values))).unwrap();
            let ours = Conv2d { kernel: Kernel::Packed(Arc::new(packed)), dtype: DType::F32, patch: None };
            let theirs = Kernel::Whole { weight: weight.clone(), bias: bias.clone(), doubles };
            let theirs = Conv2d { kernel: theirs, dtype: DType::F32, patch: None };
            let at = Placement { stride, before, after };
            let (ours, theirs) = (ours.forward(&x, at).unwrap(), theirs.forward(&x, at).unwrap());
            let difference = (ours - theirs).unwrap().abs().unwrap().max_all().unwrap().to_scalar::<f32>().unwrap();
            assert!(difference < 1e-4, "{at:?} differs by {difference}");
        }
    }

    #[test]
    fn a_doubling_kernel_takes_no_other_placement() {
        let packed = conv::Conv2d::pack_doubling(&[1.0; 9], [1, 1, 3], None);
        let conv = Conv2d { kernel: Kernel::Packed(Arc::new(packed)), dtype: DType::F32, patch: None };
        let x = Tensor::zeros((1, 1, 4, 4), DType::F32, &Device::Cpu).unwrap();
        assert_eq!(conv.forward(&x, Placement::same(3)).unwrap().dims(), [1, 1, 8, 8]);
        let error = conv.forward(&x, Placement { stride: 2, before: 0, after: 1 }).unwrap_err();
        assert!(error.to_string().contains("doubles"), "{error}");
    }
}
