//! A tensor's elements as little-endian bytes: what travels.

use candle_core::{CpuStorage, DType, Device, Storage, Tensor, WithDType};

use crate::{Error, Result};

/// Lends `x`'s elements, in row-major order; copies them only if they do not lie so, or on another device.
///
/// # Errors
/// [`Error::Frame`] for a type that does not travel.
pub fn lend<R>(x: &Tensor, f: impl FnOnce(&[u8]) -> R) -> Result<R> {
    let x = x.to_device(&Device::Cpu)?.contiguous()?;
    let (storage, layout) = x.storage_and_layout();
    let Storage::Cpu(storage) = &*storage else {
        return Err(Error::Frame(format!("a tensor of {:?}", x.device())));
    };
    let (start, end) = layout.contiguous_offsets().unwrap_or_default();
    Ok(match storage {
        CpuStorage::F32(data) => f(as_bytes(&data[start..end])),
        CpuStorage::F64(data) => f(as_bytes(&data[start..end])),
        CpuStorage::BF16(data) => f(as_bytes(&data[start..end])),
        CpuStorage::F16(data) => f(as_bytes(&data[start..end])),
        CpuStorage::I64(data) => f(as_bytes(&data[start..end])),
        CpuStorage::U32(data) => f(as_bytes(&data[start..end])),
        CpuStorage::U8(data) => f(&data[start..end]),
        _ => return Err(Error::Frame(format!("{:?} does not travel", x.dtype()))),
    })
}

/// Appends `x`'s elements, in row-major order, to `out`.
///
/// # Errors
/// As [`lend`].
pub fn append(x: &Tensor, out: &mut Vec<u8>) -> Result<()> {
    lend(x, |bytes| out.extend_from_slice(bytes))
}

/// The numbers' own memory.
fn as_bytes<T: WithDType>(data: &[T]) -> &[u8] {
    const { assert!(cfg!(target_endian = "little"), "what travels is little-endian") };
    #[allow(unsafe_code)] // the same memory seen as bytes
    // SAFETY: candle's types are plain numbers, without padding.
    unsafe {
        std::slice::from_raw_parts(data.as_ptr().cast(), size_of_val(data))
    }
}

/// The name a type has on the wire.
pub fn dtype_name(dtype: DType) -> &'static str {
    dtype.as_str()
}

/// The type of that name, if it travels.
pub fn dtype_of(name: &str) -> Option<DType> {
    [DType::F32, DType::BF16, DType::F16, DType::I64, DType::U32, DType::U8, DType::F64].into_iter().find(|d| d.as_str() == name)
}
