//! Operands in 8 bits: a block of [`BLOCK`] values of K shares a scale, as in ggml's `Q8_0`. Weights are stored so; inputs are made so for
//! each product. What a block gives is summed in whole numbers, so it is exact; a result adds up its blocks in f32, in the order of K,
//! each times the product of both scales.
//!
//! **Panels** are of blocks. Of weights: `[block]([BLOCK / group][nr][group] of one byte, [nr] scales in f16)`. Of inputs, in words of
//! four bytes: `[block]([BLOCK / group][mr] groups, [mr] scales in f32, [mr] what sums begin with)`.

use std::ops::Range;

use rayon::prelude::*;

use crate::blocks::BlockType;
use crate::cpu::vectorised;
use crate::gemm::blocks::BlockRows;
use crate::gemm::packing::parts;
use crate::gemm::{Piece, Rows};

/// Values of K that share a scale.
pub(crate) const BLOCK: usize = 32;
/// Blocks of inputs that are gathered at once.
const GATHERED: usize = 8;
/// What a float can be multiplied with to have one in -127..=127, and is not infinite.
const LEAST: f32 = 256.0 * f32::MIN_POSITIVE;

/// How a kernel wants its bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Bytes {
    /// Neighbours in K that lie in one word of inputs: four bytes, or two numbers of 16 bits.
    pub(crate) group: usize,
    /// What is added to weights, to have no sign.
    pub(crate) excess: u8,
}

impl Bytes {
    /// Words of a row of inputs in a block.
    pub(crate) const fn input_words(self) -> usize {
        BLOCK / self.group + 2
    }

    /// Bytes of `nr` columns of weights in a block.
    pub(crate) const fn weight_bytes(self, nr: usize) -> usize {
        (BLOCK + 2) * nr
    }

    /// Rows of a weight as panels of `nr`, one after the other. Only of whole blocks: see [`whole_blocks`].
    pub(crate) fn pack_weight(self, rows: &BlockRows, nr: usize, panels: &mut [f32]) {
        let (blocks, block) = (rows.k() / BLOCK, self.weight_bytes(nr));
        if panels.is_empty() {
            return;
        }
        let panels: &mut [u8] = bytemuck::cast_slice_mut(panels);
        panels.par_chunks_exact_mut(blocks * block).enumerate().for_each(|(panel, packed)| {
            for column in 0..nr.min(rows.n() - panel * nr) {
                let stored = rows.blocks_of(panel * nr + column).as_chunks::<{ BLOCK + 2 }>().0;
                for (packed, stored) in packed.chunks_exact_mut(block).zip(stored) {
                    let (values, scales) = packed.split_at_mut(BLOCK * nr);
                    let (scale, bytes) = stored.split_at(2);
                    scales[2 * column..][..2].copy_from_slice(scale);
                    for (values, bytes) in values.chunks_exact_mut(self.group * nr).zip(bytes.chunks_exact(self.group)) {
                        let values = &mut values[self.group * column..][..self.group];
                        values.iter_mut().zip(bytes).for_each(|(to, from)| *to = from.wrapping_add(self.excess));
                    }
                }
            }
        });
    }

    /// At most `width` rows of `x` side by side; `k` counts blocks through the pieces. What stands in the places of absent rows is left
    /// as it is.
    pub(crate) fn pack_inputs(
        self,
        packed: &mut [f32],
        x: Rows<'_>,
        rows: Range<usize>,
        pieces: &[Piece],
        k: Range<usize>,
        width: usize,
    ) {
        let block = self.input_words() * width;
        let mut values = [0f32; GATHERED * BLOCK];
        for first in k.clone().step_by(GATHERED) {
            let blocks = first..k.end.min(first + GATHERED);
            let packed = &mut packed[(first - k.start) * block..][..blocks.len() * block];
            for (at, row) in rows.clone().enumerate() {
                let values = &mut values[..blocks.len() * BLOCK];
                gather(values, x, row, pieces, blocks.start * BLOCK);
                for (values, packed) in values.as_chunks::<BLOCK>().0.iter().zip(packed.chunks_exact_mut(block)) {
                    let mut bytes = [0i8; BLOCK];
                    let scale = quantise(values, &mut bytes);
                    let (words, rest) = packed.split_at_mut(BLOCK / self.group * width);
                    let to = words[at..].iter_mut().step_by(width);
                    if self.group == 2 {
                        to.zip(bytes.as_chunks::<2>().0).for_each(|(to, [lower, upper])| *to = pair(*lower, *upper));
                    } else {
                        to.zip(bytes.as_chunks::<4>().0).for_each(|(to, four)| *to = f32::from_ne_bytes(four.map(|b| b as u8)));
                    }
                    let sum: i32 = bytes.iter().map(|byte| i32::from(*byte)).sum();
                    rest[at] = scale;
                    rest[width + at] = f32::from_bits((-i32::from(self.excess) * sum) as u32);
                }
            }
        }
    }
}

/// Whether products with `rows`, whose K is cut into `chunks`, are of whole blocks that this module takes.
pub(crate) fn whole_blocks(rows: &BlockRows, chunks: &[impl AsRef<[Piece]>]) -> bool {
    let whole = |len: usize| len.is_multiple_of(BLOCK);
    rows.kind() == BlockType::Q8_0
        && rows.runs().all(|run| whole(run.start) && whole(run.end))
        && chunks.iter().all(|chunk| whole(chunk.as_ref().iter().map(|(_, len)| len).sum()))
}

/// The columns of a row from `from` on, counted through the pieces.
fn gather(values: &mut [f32], x: Rows<'_>, row: usize, pieces: &[Piece], from: usize) {
    let mut filled = 0;
    for part in parts(pieces, from..from + values.len()) {
        values[filled..][..part.1].copy_from_slice(x.part(row, part));
        filled += part.1;
    }
}

/// Two numbers of 16 bits in those of a float.
fn pair(lower: i8, upper: i8) -> f32 {
    f32::from_bits(u32::from(i16::from(lower) as u16) | u32::from(i16::from(upper) as u16) << 16)
}

vectorised! {
    /// The nearest multiples of a scale, which is returned: 127 of it are the largest. Not a number if one of them is none or infinite.
    fn quantise(x: &[f32; BLOCK], bytes: &mut [i8; BLOCK]) -> f32 {
        // Added to a small number, it leaves the nearest whole one in the lowest bits, of two the even one.
        const ROUND: f32 = 12_582_912.0;
        // As whole numbers, the bits are in the order of the floats; after the infinite ones are those that are none.
        let largest = x.iter().fold(0, |largest, x| u32::max(largest, x.to_bits() & 0x7fff_ffff));
        let largest = f32::from_bits(largest);
        if !largest.is_finite() {
            bytes.fill(0);
            return f32::NAN;
        }
        let many = if largest < LEAST { 0.0 } else { 127.0 / largest };
        for (byte, x) in bytes.iter_mut().zip(x) {
            *byte = ((x * many + ROUND).to_bits().wrapping_sub(ROUND.to_bits())) as i8;
        }
        if largest < LEAST { 0.0 } else { largest / 127.0 }
    }
}

#[cfg(test)]
mod tests;
