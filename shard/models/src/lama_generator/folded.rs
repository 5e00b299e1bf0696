//! Convolutions with the norm after them folded in, and those that double a picture.

use parallel::convolution::Placement;
use parallel::ops::{self, Activation};
use parallel::{Conv2d, Shard, Tensor, Weights};

use crate::Result;

/// Of every norm.
const EPS: f64 = 1e-5;

/// `BatchNorm2d` with fixed statistics: a factor and a sum for each channel.
#[derive(Debug)]
pub(super) struct BatchNorm {
    factor: Tensor,
    sum: Tensor,
}

impl BatchNorm {
    pub(super) fn load(w: &Weights, channels: usize) -> Result<Self> {
        let get = |name| w.get(name, &[channels], Shard::Replicated);
        let (weight, bias, mean, variance) = (get("weight")?, get("bias")?, get("running_mean")?, get("running_var")?);
        w.skip("num_batches_tracked");
        let factor = (weight / (variance + EPS)?.sqrt()?)?;
        let sum = (bias - (mean * &factor)?)?;
        Ok(Self { factor, sum })
    }
}

/// A convolution without a bias, `[c_out, c_in, size, size]`, and a norm's factors; the norm's sums too if it is the `first` of those that it is
/// after. `c_in` and `c_out` are at least 1.
pub(super) fn convolution(w: &Weights, [c_in, c_out]: [usize; 2], size: usize, norm: &BatchNorm, first: bool) -> Result<Conv2d> {
    let bias = if first { norm.sum.clone() } else { norm.sum.zeros_like()? };
    Ok(Conv2d::of(w, weight(w, [c_in, c_out], size, norm)?, bias)?)
}

/// Two of the same picture in one, whose outputs are side by side, each with its norm.
pub(super) fn both(w: [&Weights; 2], c_in: usize, c_out: [usize; 2], size: usize, norms: [&BatchNorm; 2]) -> Result<Conv2d> {
    let part = |i: usize| weight(w[i], [c_in, c_out[i]], size, norms[i]);
    Ok(Conv2d::of(w[0], Tensor::cat(&[part(0)?, part(1)?], 0)?, Tensor::cat(&[&norms[0].sum, &norms[1].sum], 0)?)?)
}

fn weight(w: &Weights, [c_in, c_out]: [usize; 2], size: usize, norm: &BatchNorm) -> Result<Tensor> {
    let weight = w.get("weight", &[c_out, c_in, size, size], Shard::Replicated)?;
    Ok(weight.broadcast_mul(&norm.factor.reshape((c_out, 1, 1, 1))?)?)
}

/// `ConvTranspose2d` of 3 x 3 with a stride of 2, as a convolution of 2 x 2 that gives the four pixels which each becomes: every even row is made of one
/// row of the kernel, every odd one of the two others, and columns likewise.
#[derive(Debug)]
pub(super) struct Doubling(Conv2d);

impl Doubling {
    /// Of `weight: [c_in, c_out, 3, 3]` and `bias: [c_out]`.
    pub(super) fn load(w: &Weights, [c_in, c_out]: [usize; 2], norm: &BatchNorm) -> Result<Self> {
        let weight = w.get("weight", &[c_in, c_out, 3, 3], Shard::Replicated)?;
        let bias = w.get("bias", &[c_out], Shard::Replicated)?;
        let weight = weight.transpose(0, 1)?.broadcast_mul(&norm.factor.reshape((c_out, 1, 1, 1))?)?;
        // The row of the kernel that lies on a pixel and on the next one; 3 is a row of zeros.
        let rows = Tensor::new(&[[1u32, 3], [2, 0]], weight.device())?.flatten_all()?;
        let taps = weight.pad_with_zeros(2, 0, 1)?.pad_with_zeros(3, 0, 1)?; // [c_out, c_in, 4, 4]
        let taps = taps.contiguous()?.index_select(&rows, 2)?.index_select(&rows, 3)?; // [c_out, c_in, (a, dy), (b, dx)]
        let taps = taps.reshape((c_out, c_in, 2, 2, 2, 2))?.permute((0, 2, 4, 1, 3, 5))?; // [c_out, a, b, c_in, dy, dx]
        let bias = ((bias * &norm.factor)? + &norm.sum)?.reshape((c_out, 1))?.broadcast_as((c_out, 4))?;
        let taps = taps.contiguous()?.reshape((4 * c_out, c_in, 2, 2))?;
        Ok(Self(Conv2d::of(w, taps, bias.contiguous()?.flatten_all()?)?))
    }

    /// `[B, C_in, H, W]` gives `[B, C_out, 2 H, 2 W]`, none of it below zero.
    pub(super) fn forward_relu(&self, x: &Tensor) -> Result<Tensor> {
        let (b, _, h, w) = x.dims4()?;
        let y = self.0.forward(x, Placement { stride: 1, before: 0, after: 1 })?;
        let y = ops::activate(&y, Activation::Relu)?; // [B, 4 C_out, H, W]
        let c = y.dim(1)? / 4;
        let y = y.reshape((b * c, 2, 2, h, w))?.permute((0, 3, 1, 4, 2))?;
        Ok(y.contiguous()?.reshape((b, c, 2 * h, 2 * w))?)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;
    use std::sync::Arc;

    use parallel::{DType, Device, Solo};

    use super::*;

    #[test]
    fn a_doubling_is_the_transposed_convolution() {
        let normal = |shape: &[usize]| Tensor::randn(0f32, 1.0, shape, &Device::Cpu).unwrap();
        let (weight, bias, x) = (normal(&[3, 2, 3, 3]), normal(&[2]), normal(&[1, 3, 4, 5]));
        let ones = |value: f32| Tensor::full(value, 2, &Device::Cpu).unwrap();
        let norm = BatchNorm { factor: ones(1.5), sum: ones(0.25) };
        let dir = tempfile::tempdir().unwrap();
        let tensors = HashMap::from([("weight".to_owned(), weight.clone()), ("bias".to_owned(), bias.clone())]);
        candle_core::safetensors::save(&tensors, dir.path().join("model.safetensors")).unwrap();
        let w = Weights::open(dir.path(), Arc::new(Solo), DType::F32, &Device::Cpu).unwrap();
        let got = Doubling::load(&w, [3, 2], &norm).unwrap().forward_relu(&x).unwrap();
        let plain = x.conv_transpose2d(&weight, 1, 1, 2, 1).unwrap().broadcast_add(&bias.reshape((1, 2, 1, 1)).unwrap()).unwrap();
        let expected = plain.affine(1.5, 0.25).unwrap().relu().unwrap();
        assert_eq!(got.dims(), [1, 2, 8, 10]);
        let error = (got - expected).unwrap().abs().unwrap().max_all().unwrap().to_scalar::<f32>().unwrap();
        assert!(error < 1e-5, "{error}");
    }
}
