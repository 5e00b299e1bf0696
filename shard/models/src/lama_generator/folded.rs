//! Convolutions with the norm after them folded in, and what is laid around pictures before them.

use parallel::{Conv2d, Device, Shard, Tensor, Weights};

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
    let weight = w.get("weight", &[c_out, c_in, size, size], Shard::Replicated)?;
    let bias = if first { norm.sum.clone() } else { norm.sum.zeros_like()? };
    Ok(Conv2d::of(w, weight.broadcast_mul(&norm.factor.reshape((c_out, 1, 1, 1))?)?, bias)?)
}

/// `ConvTranspose2d` of 3 x 3 with a stride of 2, as a convolution of what [`between_zeros`] gives: the kernel turned round, `[c_out, c_in, 3, 3]`.
pub(super) fn transposed(w: &Weights, [c_in, c_out]: [usize; 2], norm: &BatchNorm) -> Result<Conv2d> {
    let weight = w.get("weight", &[c_in, c_out, 3, 3], Shard::Replicated)?;
    let bias = w.get("bias", &[c_out], Shard::Replicated)?;
    let turned = Tensor::new(&[2u32, 1, 0], weight.device())?;
    let weight = weight.transpose(0, 1)?.contiguous()?.index_select(&turned, 2)?.index_select(&turned, 3)?;
    let weight = weight.broadcast_mul(&norm.factor.reshape((c_out, 1, 1, 1))?)?;
    Ok(Conv2d::of(w, weight, ((bias * &norm.factor)? + &norm.sum)?)?)
}

/// Twice as high and wide, each pixel with zeros after it.
pub(super) fn between_zeros(x: &Tensor) -> Result<Tensor> {
    let (b, c, h, w) = x.dims4()?;
    let x = x.reshape((b, c, h, 1, w, 1))?.pad_with_zeros(5, 0, 1)?.pad_with_zeros(3, 0, 1)?;
    Ok(x.reshape((b, c, 2 * h, 2 * w))?)
}

/// With `by` more rows and columns on each side, mirrored at the outermost ones, which are not repeated (`padding_mode="reflect"`).
pub(super) fn reflected(x: &Tensor, by: usize) -> Result<Tensor> {
    let (_, _, h, w) = x.dims4()?;
    let mirrored = |side: usize| -> Vec<u32> {
        let at = |i: usize| {
            if i < by {
                by - i
            } else if i < by + side {
                i - by
            } else {
                2 * side + by - 2 - i
            }
        };
        (0..side + 2 * by).map(|i| at(i) as u32).collect()
    };
    let index = |side: usize| Tensor::new(mirrored(side), &Device::Cpu)?.to_device(x.device());
    Ok(x.index_select(&index(h)?, 2)?.index_select(&index(w)?, 3)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_picture_is_mirrored_at_its_outermost_rows() {
        let x = Tensor::arange(0f32, 12.0, &Device::Cpu).unwrap().reshape((1, 1, 3, 4)).unwrap();
        let y = reflected(&x, 2).unwrap().squeeze(0).unwrap().squeeze(0).unwrap().to_vec2::<f32>().unwrap();
        assert_eq!(y.len(), 7);
        assert_eq!(y[0], [10.0, 9.0, 8.0, 9.0, 10.0, 11.0, 10.0, 9.0]);
        assert_eq!(y[2], [2.0, 1.0, 0.0, 1.0, 2.0, 3.0, 2.0, 1.0]);
        assert_eq!(y[6], y[2]);
        let z = between_zeros(&x).unwrap().squeeze(0).unwrap().squeeze(0).unwrap().to_vec2::<f32>().unwrap();
        assert_eq!((&z[0][..4], &z[1][..4]), (&[0.0, 0.0, 1.0, 0.0][..], &[0.0; 4][..]));
    }
}
