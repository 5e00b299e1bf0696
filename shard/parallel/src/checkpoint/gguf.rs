//! Where the tensors of a GGUF file are (<https://github.com/ggml-org/ggml/blob/master/docs/gguf.md>).

use std::io::Cursor;

use candle_core::DType;
use candle_core::quantized::GgmlDType;
use candle_core::quantized::gguf_file::Content;
use kernels::blocks::BlockType;

use super::{Stored, Tensor};
use crate::safetensors_header::MAX_TENSORS;

/// Longest header that is read: one of a language model holds its vocabulary, a few megabytes of it.
const MAX_HEADER_BYTES: usize = 32 << 20;

/// Every tensor of `file`, by name; what is wrong with it, for people.
pub(super) fn read(file: &[u8]) -> Result<Vec<(String, Tensor)>, String> {
    let header = &file[..file.len().min(MAX_HEADER_BYTES)];
    let content = Content::read(&mut Cursor::new(header)).map_err(|e| format!("{e}; it may be truncated"))?;
    if content.tensor_infos.len() > MAX_TENSORS {
        return Err(format!("it holds more than {MAX_TENSORS} tensors"));
    }
    let tensor = |(name, info): (&String, &candle_core::quantized::gguf_file::TensorInfo)| {
        let stored =
            stored(info.ggml_dtype).ok_or_else(|| format!("tensor `{name}` has the unsupported type {:?}", info.ggml_dtype))?;
        let shape = info.shape.dims().to_vec();
        let last = shape.last().copied().unwrap_or(1);
        if let Stored::Blocks(kind) = stored
            && !last.is_multiple_of(kind.values())
        {
            return Err(format!("tensor `{name}` has rows of {last}, which are no blocks of {}", kind.values()));
        }
        let elements = shape.iter().try_fold(1usize, |product, dim| product.checked_mul(*dim));
        let start = content.tensor_data_offset.checked_add(info.offset).and_then(|start| usize::try_from(start).ok());
        let end = elements.and_then(|elements| start?.checked_add(stored.bytes(elements)));
        match (start, end) {
            (Some(start), Some(end)) if end <= file.len() => Ok((name.clone(), Tensor { stored, shape, start })),
            _ => Err(format!("tensor `{name}` goes beyond the file; it may be truncated")),
        }
    };
    content.tensor_infos.iter().map(tensor).collect()
}

fn stored(dtype: GgmlDType) -> Option<Stored> {
    Some(match dtype {
        GgmlDType::F32 => Stored::Plain(DType::F32),
        GgmlDType::F16 => Stored::Plain(DType::F16),
        GgmlDType::BF16 => Stored::Plain(DType::BF16),
        GgmlDType::Q4_0 => Stored::Blocks(BlockType::Q4_0),
        GgmlDType::Q4_1 => Stored::Blocks(BlockType::Q4_1),
        GgmlDType::Q5_0 => Stored::Blocks(BlockType::Q5_0),
        GgmlDType::Q5_1 => Stored::Blocks(BlockType::Q5_1),
        GgmlDType::Q8_0 => Stored::Blocks(BlockType::Q8_0),
        GgmlDType::Q2K => Stored::Blocks(BlockType::Q2K),
        GgmlDType::Q3K => Stored::Blocks(BlockType::Q3K),
        GgmlDType::Q4K => Stored::Blocks(BlockType::Q4K),
        GgmlDType::Q5K => Stored::Blocks(BlockType::Q5K),
        GgmlDType::Q6K => Stored::Blocks(BlockType::Q6K),
        _ => return None, // formats of activations
    })
}

/// candle's name of a block format.
pub(crate) fn candles(kind: BlockType) -> GgmlDType {
    match kind {
        BlockType::Q4_0 => GgmlDType::Q4_0,
        BlockType::Q4_1 => GgmlDType::Q4_1,
        BlockType::Q5_0 => GgmlDType::Q5_0,
        BlockType::Q5_1 => GgmlDType::Q5_1,
        BlockType::Q8_0 => GgmlDType::Q8_0,
        BlockType::Q2K => GgmlDType::Q2K,
        BlockType::Q3K => GgmlDType::Q3K,
        BlockType::Q4K => GgmlDType::Q4K,
        BlockType::Q5K => GgmlDType::Q5K,
        BlockType::Q6K => GgmlDType::Q6K,
    }
}
