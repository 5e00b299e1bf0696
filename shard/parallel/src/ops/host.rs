//! Tensors of the CPU as slices, and back.

use std::mem::MaybeUninit;
use std::sync::OnceLock;

use candle_core::{DType, Device, Layout, Storage, Tensor, WithDType};

use crate::{Error, Result};

/// Whether our own kernels take this tensor.
pub(crate) fn ours(x: &Tensor) -> bool {
    x.dtype() == DType::F32 && has_kernels(x.device())
}

/// Whether there are kernels of ours for `device`: for the CPU, unless `ATELIER_KERNELS=candle` is in the environment. Then the CPU
/// computes by candle's operations, as every other device does: so what a GPU is asked to do is held to the golden cases on a
/// machine without one.
pub fn has_kernels(device: &Device) -> bool {
    static TURNED_OFF: OnceLock<bool> = OnceLock::new();
    let turned_off = || std::env::var("ATELIER_KERNELS").is_ok_and(|kernels| kernels == "candle");
    matches!(device, Device::Cpu) && !TURNED_OFF.get_or_init(turned_off)
}

/// Lends the elements of an f32 tensor of the CPU, in order; copies only if they do not lie so.
pub(crate) fn read<R>(x: &Tensor, f: impl FnOnce(&[f32]) -> R) -> Result<R> {
    read_as(x, f)
}

/// As [`read`], of another type.
pub(crate) fn read_as<T: WithDType, R>(x: &Tensor, f: impl FnOnce(&[T]) -> R) -> Result<R> {
    let x = x.contiguous()?;
    let (storage, layout) = x.storage_and_layout();
    Ok(f(elements(&storage, layout)?))
}

/// Of a contiguous tensor of the CPU.
fn elements<'s, T: WithDType>(storage: &'s Storage, layout: &Layout) -> Result<&'s [T]> {
    let Storage::Cpu(storage) = storage else {
        return Err(Error::Operands { reason: format!("for the CPU a tensor of {:?}", storage.device()) });
    };
    let (start, end) = layout.contiguous_offsets().unwrap_or_default();
    Ok(&storage.as_slice::<T>()?[start..end])
}

/// Lends the elements of several f32 tensors of the CPU, as [`read`] does of one.
pub(crate) fn read_all<R>(xs: &[&Tensor], f: impl FnOnce(&[&[f32]]) -> R) -> Result<R> {
    let xs = xs.iter().map(|x| x.contiguous()).collect::<Result<Vec<_>, _>>()?;
    let held: Vec<_> = xs.iter().map(Tensor::storage_and_layout).collect();
    let slices = held.iter().map(|(storage, layout)| elements(storage, layout)).collect::<Result<Vec<_>>>()?;
    Ok(f(&slices))
}

/// A fresh tensor of `shape` that `f` writes.
pub(crate) fn write(
    shape: impl Into<candle_core::Shape>,
    f: impl FnOnce(&mut [MaybeUninit<f32>]) -> &mut [f32],
) -> Result<Tensor> {
    let shape = shape.into();
    let data = kernels::memory::written(shape.elem_count(), f);
    Ok(Tensor::from_vec(data, shape, &Device::Cpu)?)
}

/// A fresh tensor of `x`'s shape that `f` writes from `x`.
pub(crate) fn produce(x: &Tensor, f: impl for<'y> FnOnce(&[f32], &'y mut [MaybeUninit<f32>]) -> &'y mut [f32]) -> Result<Tensor> {
    read(x, |data| write(x.shape(), |y| f(data, y)))?
}

/// A fresh tensor of `x`'s shape, its data `x`'s after `f`.
pub(crate) fn map(x: &Tensor, f: impl FnOnce(&mut [f32])) -> Result<Tensor> {
    let mut data = read(x, <[f32]>::to_vec)?;
    f(&mut data);
    Ok(Tensor::from_vec(data, x.shape(), x.device())?)
}
