//! Weights in ggml's blocks, rows as they are stored.

use std::fmt;
use std::ops::Range;

use crate::blocks::{BlockType, MAX_BLOCK};
use crate::cpu;
use crate::gemm::narrow::narrow;
use crate::gemm::turn::turn;
use crate::gemm::{K_STEP, Rows, bf16};
use crate::memory::prefer_large_pages;

/// Most values that a step of K can touch: its own (as pairs, twice as many), and what is beside them in the blocks at its ends.
const MOST: usize = 2 * K_STEP + 2 * MAX_BLOCK;

/// `W: [N, K]`. A row is whole blocks, of which runs of values count: those that lie beside them in the first and the last block of
/// a run belong to other ranks.
#[derive(Clone)]
pub struct BlockRows {
    kind: BlockType,
    n: usize,
    k: usize,
    runs: Vec<Run>,
    /// Bytes of a row.
    stride: usize,
    data: Vec<u8>,
}

/// Values of a row that lie one after the other.
#[derive(Clone, Debug)]
struct Run {
    /// Which of the K they are.
    k: Range<usize>,
    /// The first one's place among all values of the row.
    at: usize,
}

impl BlockRows {
    /// The columns `columns` (one run after the other) of some `rows` of a weight whose rows are `stored` values long. `data` is all of
    /// it.
    pub fn of(kind: BlockType, data: &[u8], stored: usize, rows: &[Range<usize>], columns: &[Range<usize>]) -> Self {
        let (values, bytes) = (kind.values(), kind.bytes());
        assert!(stored.is_multiple_of(values), "rows of {stored} in blocks of {values}");
        let whole = stored / values * bytes;
        let (mut runs, mut k, mut blocks) = (Vec::new(), 0, Vec::new());
        let mut held = 0;
        for columns in joined(columns) {
            let (first, end) = (columns.start / values, columns.end.div_ceil(values));
            runs.push(Run { k: k..k + columns.len(), at: held * values + columns.start % values });
            k += columns.len();
            held += end - first;
            blocks.push(first * bytes..end * bytes);
        }
        let n = rows.iter().map(Range::len).sum();
        let mut copied = Vec::with_capacity(n * held * bytes);
        prefer_large_pages(copied.spare_capacity_mut());
        for row in rows.iter().cloned().flatten() {
            let row = &data[row * whole..][..whole];
            blocks.iter().for_each(|blocks| copied.extend_from_slice(&row[blocks.clone()]));
        }
        Self { kind, n, k, runs, stride: held * bytes, data: copied }
    }

    /// Bytes that the same would hold.
    pub fn bytes_of(kind: BlockType, n: usize, columns: &[Range<usize>]) -> usize {
        let blocks = |columns: &Range<usize>| columns.end.div_ceil(kind.values()) - columns.start / kind.values();
        n * joined(columns).iter().map(blocks).sum::<usize>() * kind.bytes()
    }

    /// How its blocks are made.
    pub fn kind(&self) -> BlockType {
        self.kind
    }

    /// Outputs.
    pub fn n(&self) -> usize {
        self.n
    }

    /// Inputs.
    pub fn k(&self) -> usize {
        self.k
    }

    /// Rows of whole blocks, one after the other.
    pub fn data(&self) -> &[u8] {
        &self.data
    }

    /// Those of one row.
    pub(crate) fn blocks_of(&self, row: usize) -> &[u8] {
        &self.data[row * self.stride..][..self.stride]
    }

    /// Where in a row's values the columns are.
    pub fn runs(&self) -> impl Iterator<Item = Range<usize>> {
        self.runs.iter().map(|run| run.at..run.at + run.k.len())
    }

    /// Bytes held.
    pub fn bytes(&self) -> usize {
        self.data.len()
    }

    /// What of each row lies in `k`, run by run: which of its bytes hold it, which of their values it is, and where in `k` it goes.
    fn stretches(&self, k: Range<usize>) -> impl Iterator<Item = [Range<usize>; 3]> {
        let (values, bytes) = (self.kind.values(), self.kind.bytes());
        self.runs.iter().filter_map(move |run| {
            let part = k.start.clamp(run.k.start, run.k.end)..k.end.clamp(run.k.start, run.k.end);
            if part.is_empty() {
                return None; // perhaps before `k`
            }
            let at = run.at + part.start - run.k.start;
            let (first, end) = (at / values, (at + part.len()).div_ceil(values));
            let held = at - first * values..at - first * values + part.len();
            Some([first * bytes..end * bytes, held, part.start - k.start..part.end - k.start])
        })
    }

    /// Calls `f` with what of each of `rows` lies in `k` (at most what [`MOST`] allows for), and which of them it is. Has that of the row
    /// `ahead` of it near: rows are far from each other, and nothing else foresees them.
    pub(crate) fn each(&self, rows: Range<usize>, k: Range<usize>, ahead: usize, mut f: impl FnMut(usize, Stretch<'_>)) {
        for [bytes, held, of_k] in self.stretches(k) {
            for (at, row) in rows.clone().enumerate() {
                if row + ahead < self.n {
                    cpu::fetch(&self.blocks_of(row + ahead)[bytes.clone()]);
                }
                let blocks = &self.blocks_of(row)[bytes.clone()];
                f(at, Stretch { kind: self.kind, blocks, held: held.clone(), of_k: of_k.clone() });
            }
        }
    }

    /// Some K of some rows side by side, as `[k][width]`; what stands in the places of absent rows is zero, or left as it is. `aside` has
    /// place for `width` rows of them.
    pub(crate) fn widen(&self, rows: Range<usize>, k: Range<usize>, width: usize, to: &mut [f32], aside: &mut [f32]) {
        let len = k.len();
        self.each(rows.clone(), k, width, |at, stretch| stretch.widen(&mut aside[at * len..][..len]));
        turn(to, Rows::new(aside, rows.len(), len), 0..rows.len(), (0, len), width);
    }

    /// As [`Self::widen`], of the nearest pairs of bf16: `k` is one chunk's, and `to` is filled up with zeros.
    pub(crate) fn pair(&self, rows: Range<usize>, k: Range<usize>, width: usize, to: &mut [f32], aside: &mut [f32]) {
        let (mut wide, len) = ([0f32; 2 * K_STEP], to.len() / width.max(1));
        for (row, line) in rows.clone().zip(aside.chunks_exact_mut(len.max(1))) {
            let (wide, pairs) = (&mut wide[..k.len()], bytemuck::cast_slice_mut(line));
            self.each(row..row + 1, k.clone(), width, |_, stretch| stretch.widen(wide));
            narrow(wide, &mut pairs[..k.len()]);
            pairs[k.len()..].fill(bf16::ZERO);
        }
        turn(to, Rows::new(aside, rows.len(), len), 0..rows.len(), (0, len), width);
    }
}

/// Blocks of one row that lie one after the other, of which some values are meant.
pub(crate) struct Stretch<'a> {
    kind: BlockType,
    blocks: &'a [u8],
    /// Which of their values.
    held: Range<usize>,
    /// Where they go.
    of_k: Range<usize>,
}

impl Stretch<'_> {
    /// The values, into those of all K.
    fn widen(&self, to: &mut [f32]) {
        let (len, to) = (self.values(), &mut to[self.of_k.clone()]);
        if self.held == (0..len) {
            self.kind.widen(self.blocks, to);
        } else {
            let mut wide = [0f32; MOST];
            self.kind.widen(self.blocks, &mut wide[..len]);
            to.copy_from_slice(&wide[self.held.clone()]);
        }
    }

    /// The same in whole numbers: of whole parts.
    pub(crate) fn numbers(&self, values: &mut [i8], scales: &mut [f32], minima: &mut [f32]) {
        let (part, len) = (self.kind.part(), self.values());
        let parts_of = |values: &Range<usize>| values.start / part..values.end / part;
        let (values, parts) = (&mut values[self.of_k.clone()], parts_of(&self.of_k));
        let (scales, minima) = (&mut scales[parts.clone()], &mut minima[parts]);
        if self.held == (0..len) {
            self.kind.numbers(self.blocks, values, scales, minima);
        } else {
            let (mut all, mut all_scales, mut all_minima) = ([0; MOST], [0f32; MOST / 16], [0f32; MOST / 16]);
            let of_all = len / part;
            self.kind.numbers(self.blocks, &mut all[..len], &mut all_scales[..of_all], &mut all_minima[..of_all]);
            let parts = parts_of(&self.held);
            values.copy_from_slice(&all[self.held.clone()]);
            scales.copy_from_slice(&all_scales[parts.clone()]);
            minima.copy_from_slice(&all_minima[parts]);
        }
    }

    /// How many values the blocks hold.
    fn values(&self) -> usize {
        self.blocks.len() / self.kind.bytes() * self.kind.values()
    }
}

impl fmt::Debug for BlockRows {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "BlockRows([{}, {}] {:?})", self.n, self.k, self.kind)
    }
}

/// Runs that go on where the one before them ends are one.
fn joined(columns: &[Range<usize>]) -> Vec<Range<usize>> {
    let mut joined: Vec<Range<usize>> = Vec::new();
    for columns in columns.iter().filter(|columns| !columns.is_empty()) {
        match joined.last_mut() {
            Some(last) if last.end == columns.start => last.end = columns.end,
            _ => joined.push(columns.clone()),
        }
    }
    joined
}

#[cfg(test)]
#[allow(clippy::single_range_in_vec_init)] // lists of ranges are meant
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::gemm::micro::{MicroKernel, Order};
    use crate::gemm::{Epilogue, PackedWeight, Piece, Rows, linear_tree};

    /// `n` rows of `stored` values, as blocks and widened.
    fn weight(kind: BlockType, n: usize, stored: usize) -> (Vec<u8>, Vec<f32>) {
        let count = n * stored / kind.values();
        // Scales stand where they stand: bytes below 60 are small numbers as halves.
        let data: Vec<u8> = (0..count * kind.bytes()).map(|i| (i * 7919 % 1013 % 60) as u8).collect();
        let mut wide = vec![0.0; n * stored];
        kind.widen(&data, &mut wide);
        (data, wide)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        /// A product with blocks has the bits of the product with what they hold, however rows and columns are cut.
        #[test]
        fn blocks_are_their_widened_values(
            kind in 0..BlockType::ALL.len(),
            [m, n] in [0usize..9, 1usize..40],
            blocks in 1usize..4,
            cuts in prop::array::uniform4(0.0f64..1.0),
            first_row in 0usize..40,
        ) {
            let kind = BlockType::ALL[kind];
            let stored = 8 / (256 / kind.values()).min(8) * blocks * kind.values();
            let (data, wide) = weight(kind, n, stored);
            let mut cuts = cuts.map(|cut| (cut * stored as f64) as usize);
            cuts.sort_unstable();
            let columns = [cuts[2]..cuts[3], cuts[0]..cuts[1]];
            let (first_row, k) = (first_row % n, columns.iter().map(Range::len).sum::<usize>());
            let rows = [first_row..n, 0..first_row];

            let packed = PackedWeight::from(BlockRows::of(kind, &data, stored, &rows, &columns));
            prop_assert_eq!((packed.n(), packed.k()), (n, k));
            prop_assert_eq!(packed.bytes(), BlockRows::bytes_of(kind, n, &columns));
            let turned = [&wide[first_row * stored..], &wide[..first_row * stored]].concat();
            let pieces: Vec<Piece> = columns.iter().map(|c| (c.start, c.len())).collect();
            let whole = PackedWeight::pack_pieces(Rows::new(&turned, n, stored), &pieces);

            let x: Vec<f32> = (0..m * k).map(|i| (i * 31 % 17) as f32 / 8.0 - 1.0).collect();
            let product = |weight: &PackedWeight| {
                let mut y = vec![f32::NAN; m * n];
                let chunks = [[(0, k / 3)], [(k / 3, k - k / 3)]];
                linear_tree(Rows::new(&x, m, k), &chunks, weight, Epilogue::default(), &mut y);
                y
            };
            prop_assert_eq!(product(&packed), product(&whole));

            // In bf16: of what they hold, rounded.
            let chunks = [[(0, k / 3)], [(k / 3, k - k / 3)]];
            let (pieces, turned) = (&pieces, &turned);
            let columns = |row: usize| pieces.iter().flat_map(move |(at, len)| turned[row * stored + at..][..*len].to_vec());
            let rounded: Vec<_> = (0..n).flat_map(columns).map(half::bf16::from_f32).collect();
            for order in Order::ALL {
                let whole = PackedWeight::pack_pairs(order, Rows::new(&rounded, n, k), &chunks);
                for kernel in MicroKernel::all_in(order) {
                    let packed = BlockRows::of(kind, &data, stored, &rows, &[cuts[2]..cuts[3], cuts[0]..cuts[1]]);
                    let packed = PackedWeight::pairs_of_blocks_for(packed, &chunks, kernel);
                    prop_assert_eq!(product(&packed), product(&whole), "{:?}", kernel);
                }
            }
        }
    }
}
