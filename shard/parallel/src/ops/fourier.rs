//! Fourier transforms of pictures, on the CPU wherever the tensors are: they are a small part of what has them.

use candle_core::{Device, Tensor};
use kernels::fourier::Planes;

use super::host::read;
use crate::{Error, Result};

/// `rfft2` with `norm="ortho"`: `x: [B, C, H, W]` gives `[B, 2 C, H, W/2 + 1]`, of each channel the real part and then the imaginary one.
pub fn rfft2(x: &Tensor) -> Result<Tensor> {
    let (b, c, h, w) = x.dims4()?;
    if h == 0 || w == 0 {
        return Err(Error::Operands { reason: format!("a spectrum of {h} x {w}") });
    }
    let planes = Planes::new([h, w]);
    let y = read(&x.to_device(&Device::Cpu)?, |x| planes.forward(x))?;
    Ok(Tensor::from_vec(y, (b, 2 * c, h, planes.columns()), &Device::Cpu)?.to_device(x.device())?)
}

/// `irfft2` with `norm="ortho"`: `y: [B, 2 C, H, W/2 + 1]` as [`rfft2`] gives it leads back to `[B, C, H, W]`.
pub fn irfft2(y: &Tensor, width: usize) -> Result<Tensor> {
    let (b, parts, h, columns) = y.dims4()?;
    if h == 0 || width == 0 || columns != width / 2 + 1 || !parts.is_multiple_of(2) {
        return Err(Error::Operands { reason: format!("{parts} parts of a spectrum of {h} x {columns} for a width of {width}") });
    }
    let x = read(&y.to_device(&Device::Cpu)?, |y| Planes::new([h, width]).back(y))?;
    Ok(Tensor::from_vec(x, (b, parts / 2, h, width), &Device::Cpu)?.to_device(y.device())?)
}
