//! Operands in 8 bits: a block of [`BLOCK`] values of K shares a scale, as in ggml's `Q8_0`. Inputs are made so for each product; weights
//! are stored so, or in blocks of fewer bits, of which each [`BLOCK`] values or each half of them have a scale, and a minimum that is taken
//! off. What such a part gives is summed in whole numbers, so it is exact; a result adds up its parts in f32, in the order of K, each times
//! the product of both scales, and then less its minimum times the sum of the part's inputs.
//!
//! **Panels** are of blocks. Of weights: `[block]([BLOCK / group][nr][group] of one byte, [nr] scales in f16)`, or instead of the scales
//! `[parts][nr] scales, [parts][nr] minima with the other sign`, in f32. Of inputs, in words of four bytes: `[block]([BLOCK / group][mr]
//! groups, [mr] scales in f32, [parts][mr] what sums begin with)`, and for weights with minima `[parts][mr] sums of inputs` in f32.

use std::ops::Range;

use rayon::prelude::*;

use crate::blocks::BlockType;
use crate::cpu::vectorised;
use crate::gemm::blocks::BlockRows;
use crate::gemm::packing::parts;
use crate::gemm::turn::{turn, turn_blocks};
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
    /// What is added to weights, to have no sign. Of [`Scales::Nibbles`] there is none to be added; all others but `Q8_0` are -32 to 31.
    pub(crate) excess: u8,
    pub(crate) scales: Scales,
}

/// What scales a block of weights.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Scales {
    /// One number in f16, as `Q8_0` stores it.
    Stored,
    /// A scale and a minimum, of numbers that are 0 to 15.
    Nibbles,
    /// A scale and a minimum.
    Whole,
    /// A scale and a minimum for each half of it.
    Halves,
}

impl Scales {
    /// All of them.
    pub(crate) const ALL: [Self; 4] = [Self::Stored, Self::Nibbles, Self::Whole, Self::Halves];

    /// Those of weights in such blocks.
    pub(crate) fn of(kind: BlockType) -> Self {
        match (kind, kind.part()) {
            (BlockType::Q8_0, _) => Self::Stored,
            (BlockType::Q4_1 | BlockType::Q4K, _) => Self::Nibbles,
            (_, BLOCK) => Self::Whole,
            _ => Self::Halves,
        }
    }

    /// Into how many parts they divide a block.
    pub(crate) const fn parts(self) -> usize {
        if matches!(self, Self::Halves) { 2 } else { 1 }
    }
}

impl Bytes {
    /// Words of a row of inputs in a block.
    pub(crate) const fn input_words(self) -> usize {
        let sums = if matches!(self.scales, Scales::Stored) { 0 } else { self.scales.parts() };
        BLOCK / self.group + 1 + self.scales.parts() + sums
    }

    /// Bytes of `nr` columns of weights in a block.
    pub(crate) const fn weight_bytes(self, nr: usize) -> usize {
        let scales = if matches!(self.scales, Scales::Stored) { 2 } else { 2 * size_of::<f32>() * self.scales.parts() };
        (BLOCK + scales) * nr
    }

    /// Some rows of a weight, which are at most `nr`, as a panel; `k` counts blocks. What stands in the places of absent rows is zero, or
    /// left as it is. `aside` has place for what [`Self::aside`] says. Only of groups of four bytes.
    pub(crate) fn make_panel(
        self,
        rows: &BlockRows,
        of: Range<usize>,
        k: Range<usize>,
        nr: usize,
        to: &mut [f32],
        aside: &mut [f32],
    ) {
        let (parts, words) = (self.scales.parts(), k.len() * BLOCK / 4);
        let (block, line) = (self.weight_bytes(nr) / size_of::<f32>(), words + 2 * k.len() * parts);
        let (scales, lines) = aside.split_at_mut(2 * k.len() * parts * nr);
        rows.each(of.clone(), k.start * BLOCK..k.end * BLOCK, nr, |at, stretch| {
            let (bytes, scales) = lines[at * line..][..line].split_at_mut(words);
            let (scales, minima) = scales.split_at_mut(k.len() * parts);
            stretch.numbers(bytemuck::cast_slice_mut(bytes), scales, minima);
        });
        if self.excess > 0 {
            for line in lines.chunks_exact_mut(line.max(1)).take(of.len()) {
                let bytes: &mut [u8] = bytemuck::cast_slice_mut(&mut line[..words]);
                bytes.iter_mut().for_each(|byte| *byte = byte.wrapping_add(self.excess));
            }
        }
        let lines = Rows::new(lines, of.len(), line);
        turn(scales, lines, 0..of.len(), (words, line - words), nr);
        turn_blocks(to, lines, 0..of.len(), (0, words), nr, block);
        let (scales, minima) = scales.split_at(k.len() * parts * nr);
        let of_blocks = scales.chunks_exact(parts * nr).zip(minima.chunks_exact(parts * nr));
        for ((scales, minima), to) in of_blocks.zip(to.chunks_exact_mut(block)) {
            let (of_scales, of_minima) = to[BLOCK / 4 * nr..].split_at_mut(parts * nr);
            of_scales.copy_from_slice(scales);
            of_minima.iter_mut().zip(minima).for_each(|(to, minimum)| *to = -minimum);
        }
    }

    /// Floats that [`Self::make_panel`] works in.
    pub(crate) const fn aside(self, blocks: usize, nr: usize) -> usize {
        blocks * nr * (BLOCK / 4 + 4 * self.scales.parts())
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
        let (block, parts) = (self.input_words() * width, self.scales.parts());
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
                    rest[at] = scale;
                    let rest = &mut rest[width..];
                    for (part, bytes) in bytes.chunks_exact(BLOCK / parts).enumerate() {
                        let sum: i32 = bytes.iter().map(|byte| i32::from(*byte)).sum();
                        rest[part * width + at] = f32::from_bits((-i32::from(self.excess) * sum) as u32);
                        if self.scales != Scales::Stored {
                            rest[(parts + part) * width + at] = sum as f32 * scale;
                        }
                    }
                }
            }
        }
    }
}

/// Whether products with `rows`, whose K is cut into `chunks`, are of whole blocks.
pub(crate) fn whole_blocks(rows: &BlockRows, chunks: &[impl AsRef<[Piece]>]) -> bool {
    let whole = |len: usize| len.is_multiple_of(BLOCK);
    rows.runs().all(|run| whole(run.start) && whole(run.end))
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
