//! The beginning of a GGUF file (<https://github.com/ggml-org/ggml/blob/master/docs/gguf.md>).

use candle_core::quantized::GgmlDType;

/// Where tensors may begin, counted from the end of the header.
pub(crate) const ALIGNMENT: usize = 32;

/// A tensor that will follow.
#[derive(Debug)]
pub(crate) struct Tensor<'a> {
    pub(crate) name: &'a str,
    pub(crate) shape: &'a [usize],
    pub(crate) kind: GgmlDType,
}

impl Tensor<'_> {
    /// Without what follows up to the next one's beginning.
    pub(crate) fn bytes(&self) -> usize {
        self.shape.iter().product::<usize>() / self.kind.block_size() * self.kind.type_size()
    }
}

/// Everything before the tensors, each of which begins at the next multiple of [`ALIGNMENT`] after the one before it.
pub(crate) fn header<'a>(architecture: &str, tensors: impl ExactSizeIterator<Item = Tensor<'a>>) -> Vec<u8> {
    let text = |text: &str| [&(text.len() as u64).to_le_bytes()[..], text.as_bytes()].concat();
    const TEXT: u32 = 8;
    let mut header = b"GGUF".to_vec();
    header.extend(3u32.to_le_bytes());
    header.extend((tensors.len() as u64).to_le_bytes());
    header.extend(1u64.to_le_bytes());
    header.extend([text("general.architecture"), TEXT.to_le_bytes().to_vec(), text(architecture)].concat());
    let mut at = 0;
    for tensor in tensors {
        header.extend(text(tensor.name));
        header.extend((tensor.shape.len() as u32).to_le_bytes());
        tensor.shape.iter().rev().for_each(|dim| header.extend((*dim as u64).to_le_bytes()));
        header.extend(number(tensor.kind).to_le_bytes());
        header.extend((at as u64).to_le_bytes());
        at += tensor.bytes().next_multiple_of(ALIGNMENT);
    }
    header.resize(header.len().next_multiple_of(ALIGNMENT), 0);
    header
}

/// ggml's number of a type.
fn number(kind: GgmlDType) -> u32 {
    match kind {
        GgmlDType::F32 => 0,
        GgmlDType::F16 => 1,
        GgmlDType::Q4_0 => 2,
        GgmlDType::Q4_1 => 3,
        GgmlDType::Q5_0 => 6,
        GgmlDType::Q5_1 => 7,
        GgmlDType::Q8_0 => 8,
        GgmlDType::Q8_1 => 9,
        GgmlDType::Q2K => 10,
        GgmlDType::Q3K => 11,
        GgmlDType::Q4K => 12,
        GgmlDType::Q5K => 13,
        GgmlDType::Q6K => 14,
        GgmlDType::Q8K => 15,
        GgmlDType::BF16 => 30,
    }
}
