//! Where the tensors of a safetensors file are.

use super::{Stored, Tensor};
use crate::safetensors_header;

/// Every tensor of `file`, by name; what is wrong with it, for people.
pub(super) fn read(file: &[u8]) -> Result<Vec<(String, Tensor)>, String> {
    let (entries, _) = safetensors_header::entries(file)?;
    let tensors = entries.into_iter().map(|entry| {
        let tensor = Tensor { stored: Stored::Plain(entry.dtype), shape: entry.shape, start: entry.bytes.start };
        (entry.name, tensor)
    });
    Ok(tensors.collect())
}
