//! ggml's block formats: weights of 2 to 8 bits that share scales by the block, as GGUF files hold them.
//!
//! A block is widened to f32, each value by the formula of the reference (`dequantize_row_*` in ggml's `ggml-quants.c`), and
//! multiplied by the f32 kernels: a quantised model gives the same bits as one whose f32 weights are the widened values. Or
//! its whole numbers are multiplied in 8 bits, scales apart.

use std::hint::black_box;

use crate::cpu::vectorised;

mod k;
mod legacy;

/// Most values of a block.
pub const MAX_BLOCK: usize = 256;
/// Most of its parts.
const MOST_PARTS: usize = 16;

/// Something of a block type's [`Format`]: a constant, or a call of a function that has it as its type.
macro_rules! of_kind {
    (@each $kind:expr, $($name:ident = $format:ty),*; $constant:ident) => {
        match $kind { $(BlockType::$name => <$format as Format>::$constant,)* }
    };
    (@each $kind:expr, $($name:ident = $format:ty),*; $function:ident $arguments:tt) => {
        match $kind { $(BlockType::$name => of_kind!(@call $function, $format, $arguments),)* }
    };
    (@call $function:ident, $format:ty, $arguments:tt) => { $function::<$format> $arguments };
    ($kind:expr, Format::$constant:ident) => { of_kind!(@all $kind; $constant) };
    ($kind:expr, $function:ident $arguments:tt) => { of_kind!(@all $kind; $function $arguments) };
    (@all $kind:expr; $($what:tt)*) => {
        of_kind!(
            @each $kind,
            Q4_0 = legacy::Q4_0, Q4_1 = legacy::Q4_1, Q5_0 = legacy::Q5_0, Q5_1 = legacy::Q5_1, Q8_0 = legacy::Q8_0,
            Q2K = k::Q2, Q3K = k::Q3, Q4K = k::Q4, Q5K = k::Q5, Q6K = k::Q6;
            $($what)*
        )
    };
}

/// A block format, by ggml's name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)] // the names are all there is to say
pub enum BlockType {
    Q4_0,
    Q4_1,
    Q5_0,
    Q5_1,
    Q8_0,
    Q2K,
    Q3K,
    Q4K,
    Q5K,
    Q6K,
}

impl BlockType {
    /// All of them.
    pub const ALL: [Self; 10] =
        [Self::Q4_0, Self::Q4_1, Self::Q5_0, Self::Q5_1, Self::Q8_0, Self::Q2K, Self::Q3K, Self::Q4K, Self::Q5K, Self::Q6K];

    /// Values of a block.
    pub fn values(self) -> usize {
        of_kind!(self, Format::VALUES)
    }

    /// Bytes of a block.
    pub fn bytes(self) -> usize {
        of_kind!(self, Format::BYTES)
    }

    /// Values that share a scale: a block's, or a part of them.
    pub fn part(self) -> usize {
        of_kind!(self, Format::PART)
    }

    /// Widens whole blocks: `out` has [`Self::values`] for each [`Self::bytes`] of `blocks`.
    pub fn widen(self, blocks: &[u8], out: &mut [f32]) {
        let (count, rest) = (blocks.len() / self.bytes(), blocks.len() % self.bytes());
        assert!(rest == 0 && out.len() == count * self.values(), "{} bytes of {self:?} for {} values", blocks.len(), out.len());
        widen(self, blocks, out);
    }

    /// What whole blocks hold in whole numbers: a value is its number times the scale of its [`Self::part`], less that part's minimum.
    pub(crate) fn numbers(self, blocks: &[u8], values: &mut [i8], scales: &mut [f32], minima: &mut [f32]) {
        let (count, parts) = (blocks.len() / self.bytes(), self.values() / self.part());
        let fits = values.len() == count * self.values() && scales.len() == count * parts && minima.len() == count * parts;
        assert!(blocks.len() == count * self.bytes() && fits, "{} bytes of {self:?} for {} values", blocks.len(), values.len());
        numbers(self, blocks, values, scales, minima);
    }
}

/// How blocks are made.
trait Format {
    /// Bytes of a block.
    const BYTES: usize;
    /// Values of a block.
    const VALUES: usize;
    /// Values that share a scale.
    const PART: usize;

    /// Reads [`Self::BYTES`].
    fn read(block: &[u8], to: Numbers<'_>);
}

/// A block's whole numbers, and for each part of them a scale and a minimum, which is taken off.
struct Numbers<'a> {
    values: &'a mut [i8],
    scales: &'a mut [f32],
    /// Zeros, where there are none.
    minima: &'a mut [f32],
}

vectorised! {
    fn widen(kind: BlockType, blocks: &[u8], out: &mut [f32]) {
        of_kind!(kind, widen_all(blocks, out));
    }
}

vectorised! {
    fn numbers(kind: BlockType, blocks: &[u8], values: &mut [i8], scales: &mut [f32], minima: &mut [f32]) {
        of_kind!(kind, read_all(blocks, values, scales, minima));
    }
}

#[inline(always)]
fn widen_all<F: Format>(blocks: &[u8], out: &mut [f32]) {
    let (mut values, mut scales, mut minima) = ([0; MAX_BLOCK], [0.0; MOST_PARTS], [0.0; MOST_PARTS]);
    let (values, parts) = (&mut values[..F::VALUES], F::VALUES / F::PART);
    let (scales, minima) = (&mut scales[..parts], &mut minima[..parts]);
    for (block, out) in blocks.chunks_exact(F::BYTES).zip(out.chunks_exact_mut(F::VALUES)) {
        F::read(block, Numbers { values, scales, minima });
        let parts = out.chunks_exact_mut(F::PART).zip(values.chunks_exact(F::PART));
        for ((out, values), (scale, minimum)) in parts.zip(scales.iter().zip(minima.iter())) {
            // Seen as others each time, or vectors are made across parts, and their values scattered.
            let [scale, minimum] = black_box([*scale, *minimum]);
            for (out, value) in out.iter_mut().zip(values) {
                *out = f32::from(*value) * scale - minimum;
            }
        }
    }
}

#[inline(always)]
fn read_all<F: Format>(blocks: &[u8], values: &mut [i8], scales: &mut [f32], minima: &mut [f32]) {
    let parts = F::VALUES / F::PART;
    minima.fill(0.0);
    let of_parts = scales.chunks_exact_mut(parts).zip(minima.chunks_exact_mut(parts));
    for ((block, values), (scales, minima)) in blocks.chunks_exact(F::BYTES).zip(values.chunks_exact_mut(F::VALUES)).zip(of_parts)
    {
        F::read(block, Numbers { values, scales, minima });
    }
}

/// The half-precision number at `at`.
#[inline(always)]
fn half(block: &[u8], at: usize) -> f32 {
    half::f16::from_le_bytes([block[at], block[at + 1]]).to_f32()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_block_is_widened_by_its_scale() {
        let mut block = [0u8; 34];
        block[..2].copy_from_slice(&half::f16::from_f32(0.5).to_le_bytes());
        block[2] = 3;
        block[33] = -128i8 as u8;
        let mut out = [0.0; 32];
        BlockType::Q8_0.widen(&block, &mut out);
        assert_eq!((out[0], out[1], out[31]), (1.5, 0.0, -64.0));
    }

    #[test]
    fn every_format_reads_its_whole_block_and_no_more() {
        for kind in BlockType::ALL {
            let blocks: Vec<u8> = (0..3 * kind.bytes()).map(|i| (i * 37 % 61) as u8).collect();
            let mut out = vec![f32::NAN; 3 * kind.values()];
            kind.widen(&blocks, &mut out);
            assert!(out.iter().all(|v| v.is_finite()), "{kind:?}");
            let mut alone = vec![f32::NAN; kind.values()];
            kind.widen(&blocks[kind.bytes()..2 * kind.bytes()], &mut alone);
            assert_eq!(alone, out[kind.values()..2 * kind.values()], "{kind:?}");
        }
    }

    #[test]
    fn numbers_scales_and_minima_make_the_values() {
        for kind in BlockType::ALL {
            let blocks: Vec<u8> = (0..3 * kind.bytes()).map(|i| (i * 7919 % 1013 % 60) as u8).collect();
            let (mut wide, mut values) = (vec![f32::NAN; 3 * kind.values()], vec![0; 3 * kind.values()]);
            let [mut scales, mut minima] = [0, 1].map(|_| vec![f32::NAN; 3 * kind.values() / kind.part()]);
            kind.widen(&blocks, &mut wide);
            kind.numbers(&blocks, &mut values, &mut scales, &mut minima);
            let value = |i: usize| f32::from(values[i]) * scales[i / kind.part()] - minima[i / kind.part()];
            assert_eq!((0..wide.len()).map(value).collect::<Vec<_>>(), wide, "{kind:?}");
            assert!(values.iter().any(|value| *value != 0), "{kind:?}");
        }
    }

    #[test]
    #[should_panic(expected = "35 bytes of Q8_0")]
    fn half_a_block_is_refused() {
        BlockType::Q8_0.widen(&[0; 35], &mut [0.0; 32]);
    }
}
