//! ggml's block formats: weights of 2 to 8 bits that share scales by the block, as GGUF files hold them.
//!
//! Nothing is computed in them: a block is widened to f32, each value by the formula of the reference
//! (`dequantize_row_*` in ggml's `ggml-quants.c`), and all arithmetic is the f32 kernels'. So a quantised model gives the
//! same bits as one whose f32 weights are the widened values.

use crate::cpu::vectorised;

mod k;
mod legacy;

/// Most values of a block.
pub const MAX_BLOCK: usize = 256;

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
        match self {
            Self::Q4_0 | Self::Q4_1 | Self::Q5_0 | Self::Q5_1 | Self::Q8_0 => 32,
            Self::Q2K | Self::Q3K | Self::Q4K | Self::Q5K | Self::Q6K => MAX_BLOCK,
        }
    }

    /// Bytes of a block.
    pub fn bytes(self) -> usize {
        match self {
            Self::Q4_0 => 18,
            Self::Q4_1 => 20,
            Self::Q5_0 => 22,
            Self::Q5_1 => 24,
            Self::Q8_0 => 34,
            Self::Q2K => 84,
            Self::Q3K => 110,
            Self::Q4K => 144,
            Self::Q5K => 176,
            Self::Q6K => 210,
        }
    }

    /// Widens whole blocks: `out` has [`Self::values`] for each [`Self::bytes`] of `blocks`.
    pub fn widen(self, blocks: &[u8], out: &mut [f32]) {
        let (count, rest) = (blocks.len() / self.bytes(), blocks.len() % self.bytes());
        assert!(rest == 0 && out.len() == count * self.values(), "{} bytes of {self:?} for {} values", blocks.len(), out.len());
        widen(self, blocks, out);
    }
}

vectorised! {
    fn widen(kind: BlockType, blocks: &[u8], out: &mut [f32]) {
        match kind {
            BlockType::Q4_0 => each(blocks, out, legacy::q4_0),
            BlockType::Q4_1 => each(blocks, out, legacy::q4_1),
            BlockType::Q5_0 => each(blocks, out, legacy::q5_0),
            BlockType::Q5_1 => each(blocks, out, legacy::q5_1),
            BlockType::Q8_0 => each(blocks, out, legacy::q8_0),
            BlockType::Q2K => each(blocks, out, k::q2),
            BlockType::Q3K => each(blocks, out, k::q3),
            BlockType::Q4K => each(blocks, out, k::q4),
            BlockType::Q5K => each(blocks, out, k::q5),
            BlockType::Q6K => each(blocks, out, k::q6),
        }
    }
}

#[inline(always)]
fn each<const BYTES: usize, const VALUES: usize>(blocks: &[u8], out: &mut [f32], one: impl Fn(&[u8; BYTES], &mut [f32; VALUES])) {
    let (blocks, out) = (blocks.as_chunks::<BYTES>().0, out.as_chunks_mut::<VALUES>().0);
    for (block, out) in blocks.iter().zip(out) {
        one(block, out);
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
    #[should_panic(expected = "35 bytes of Q8_0")]
    fn half_a_block_is_refused() {
        BlockType::Q8_0.widen(&[0; 35], &mut [0.0; 32]);
    }
}
