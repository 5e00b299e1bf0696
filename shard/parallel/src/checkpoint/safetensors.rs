//! Where the tensors of a safetensors file are.

use candle_core::DType;
use safetensors::{Dtype, SafeTensors};

use super::{Stored, Tensor};
use crate::safetensors_header::{self, LENGTH_BYTES, MAX_TENSORS};

/// Every tensor of `file`, by name; what is wrong with it, for people.
pub(super) fn read(file: &[u8]) -> Result<Vec<(String, Tensor)>, String> {
    let length = safetensors_header::length(file, file.len() as u64)?;
    safetensors_header::check(&file[LENGTH_BYTES..LENGTH_BYTES + length])?;
    let tensors = SafeTensors::deserialize(file).map_err(|e| format!("{e}; it may be truncated"))?;
    if tensors.len() > MAX_TENSORS {
        return Err(format!("it holds more than {MAX_TENSORS} tensors"));
    }
    let base = file.as_ptr() as usize;
    let tensor = |(name, view): (&str, safetensors::tensor::TensorView<'_>)| {
        let dtype = dtype(view.dtype()).ok_or_else(|| format!("tensor `{name}` has the unsupported type {:?}", view.dtype()))?;
        let start = view.data().as_ptr() as usize - base;
        Ok((name.to_owned(), Tensor { stored: Stored::Plain(dtype), shape: view.shape().to_vec(), start }))
    };
    tensors.iter().map(tensor).collect()
}

fn dtype(dtype: Dtype) -> Option<DType> {
    Some(match dtype {
        Dtype::F64 => DType::F64,
        Dtype::F32 => DType::F32,
        Dtype::F16 => DType::F16,
        Dtype::BF16 => DType::BF16,
        Dtype::I64 => DType::I64,
        Dtype::U32 => DType::U32,
        Dtype::U8 => DType::U8,
        _ => return None,
    })
}
