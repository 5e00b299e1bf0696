//! Networks with weights in ggml's blocks, as GGUF files.

use std::collections::HashMap;
use std::path::Path;

use candle_core::quantized::{GgmlDType, QTensor, gguf_file};
use candle_core::{Device, Tensor};

/// Tensors under their names.
type Blocks = Vec<(String, QTensor)>;

/// A format that the tensor's rows are whole blocks of, the better the more they are.
fn format(tensor: &Tensor, wanted: GgmlDType) -> GgmlDType {
    let last = tensor.dims().last().copied().unwrap_or_default();
    match tensor.rank() {
        2 if last.is_multiple_of(wanted.block_size()) => wanted,
        2 if last.is_multiple_of(32) => GgmlDType::Q8_0,
        _ => GgmlDType::F32,
    }
}

/// Writes tensors under these names.
///
/// # Errors
/// When the file cannot be written.
pub fn write(path: &Path, tensors: &[(String, QTensor)]) -> candle_core::Result<()> {
    let tensors: Vec<(&str, &QTensor)> = tensors.iter().map(|(name, tensor)| (name.as_str(), tensor)).collect();
    let architecture = gguf_file::Value::String("flux".into());
    let metadata = [("general.architecture", &architecture)];
    gguf_file::write(&mut std::fs::File::create(path)?, &metadata, &tensors)
}

/// The tensors in blocks (matrices of `wanted`, where it divides their rows), and what they hold.
///
/// # Errors
/// When a tensor is not f32.
pub fn quantised(tensors: &HashMap<String, Tensor>, wanted: GgmlDType) -> candle_core::Result<(Blocks, HashMap<String, Tensor>)> {
    let mut names: Vec<&String> = tensors.keys().collect();
    names.sort();
    let block = |name: &String| Ok((name.clone(), QTensor::quantize(&tensors[name], format(&tensors[name], wanted))?));
    let blocks = names.into_iter().map(block).collect::<candle_core::Result<Blocks>>()?;
    let wide = |(name, tensor): &(String, QTensor)| Ok((name.clone(), tensor.dequantize(&Device::Cpu)?));
    let wide = blocks.iter().map(wide).collect::<candle_core::Result<_>>()?;
    Ok((blocks, wide))
}
