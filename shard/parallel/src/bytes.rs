//! A tensor's elements as little-endian bytes: what travels.

use candle_core::{DType, Tensor};

use crate::{Error, Result};

/// Appends `x`'s elements, in row-major order, to `out`.
pub fn append(x: &Tensor, out: &mut Vec<u8>) -> Result<()> {
    let x = x.flatten_all()?;
    match x.dtype() {
        DType::F32 => x.to_vec1::<f32>()?.iter().for_each(|v| out.extend(v.to_le_bytes())),
        DType::F64 => x.to_vec1::<f64>()?.iter().for_each(|v| out.extend(v.to_le_bytes())),
        DType::BF16 => x.to_vec1::<half::bf16>()?.iter().for_each(|v| out.extend(v.to_le_bytes())),
        DType::F16 => x.to_vec1::<half::f16>()?.iter().for_each(|v| out.extend(v.to_le_bytes())),
        DType::I64 => x.to_vec1::<i64>()?.iter().for_each(|v| out.extend(v.to_le_bytes())),
        DType::U32 => x.to_vec1::<u32>()?.iter().for_each(|v| out.extend(v.to_le_bytes())),
        DType::U8 => out.extend(x.to_vec1::<u8>()?),
        other => return Err(Error::Frame(format!("{other:?} does not travel"))),
    }
    Ok(())
}

/// The name a type has on the wire.
pub fn dtype_name(dtype: DType) -> &'static str {
    dtype.as_str()
}

/// The type of that name, if it travels.
pub fn dtype_of(name: &str) -> Option<DType> {
    [DType::F32, DType::BF16, DType::F16, DType::I64, DType::U32, DType::U8, DType::F64].into_iter().find(|d| d.as_str() == name)
}
