//! Products with weights that were packed once: `y = x W^T + b`, and an activation on the way out.
//!
//! **Order of additions.** An output is one chain: its K products are added one after the other, in the order of K,
//! starting from zero. It depends on its row of `x` and its row of `W` alone: not on the rows beside it, on where N is
//! cut, or on the threads. [`linear_tree`] cuts K into chunks, each such a chain, and adds their results as a balanced
//! binary tree.
//!
//! **Blocking.** A job is a block of rows by a block of columns; its results stay in the second-level cache while K
//! passes by in steps of `K_STEP`, of which one panel of weights stays in the first-level cache.

use std::ops::Range;

use self::inputs::Product;
use self::micro::{Soon, Takes};
use crate::activation::Activation;
use crate::memory::{Output, seen};
use crate::{scratch, threads};

mod blocks;
pub(crate) mod bytes;
mod inputs;
pub mod micro;
mod narrow;
mod packing;
mod plane;
mod sums;
mod turn;

pub use blocks::BlockRows;
pub use half::bf16;
pub use micro::Order;
pub(crate) use narrow::narrow_rows;
pub use packing::{Element, PackedWeight};
pub(crate) use packing::{pack_columns, pack_rows, pack_tiles};
pub(crate) use plane::{Plane, SharedPlane};
pub(crate) use sums::{Place, Sums};
pub(crate) use turn::turn;

/// How much of K a block of weights covers: 256 x 16 floats are half of a first-level cache of 32 KiB.
pub(crate) const K_STEP: usize = 256;
/// The same of blocks: 13 KiB of 32 columns.
pub(crate) const BLOCKS_STEP: usize = 12;
/// Of tiles, in pairs: 24 KiB of weights, half of a first-level cache of 48 KiB.
pub(crate) const TILES_STEP: usize = 192;
/// Rows and columns of a job of tiles: each weight comes from memory once for as many rows.
const TILES_ROWS: usize = 384;
const TILES_COLUMNS: usize = 512;
/// Rows and columns of a job: with `K_STEP`, 192 KiB of the second-level cache, beside the results.
const ROWS: usize = 192;
const COLUMNS: usize = 1536;
/// Of a job whose chunks need memory for a tree; with fewer rows, up to twice the columns.
const TREE_ROWS: usize = 196;
const TREE_COLUMNS: usize = 512;
/// Most chunks of a [`linear_tree`].
const MAX_CHUNKS: usize = 8;
/// Multiplications below which a product stays on its thread.
const SMALL: usize = 1 << 20;

/// Rows of a matrix, `stride` elements from one's start to the next's.
#[derive(Clone, Copy, Debug)]
pub struct Rows<'a, T = f32> {
    data: &'a [T],
    count: usize,
    stride: usize,
}

impl<'a, T> Rows<'a, T> {
    /// `count` rows; the last may be shorter than `stride`.
    pub fn new(data: &'a [T], count: usize, stride: usize) -> Self {
        Self { data, count, stride }
    }

    /// How many rows there are.
    pub fn count(&self) -> usize {
        self.count
    }

    /// Some columns of a row.
    pub(crate) fn part(&self, row: usize, (start, len): Piece) -> &'a [T] {
        &self.data[row * self.stride + start..][..len]
    }
}

/// Where a run of columns starts, and how many they are.
pub type Piece = (usize, usize);

/// What is done with each result.
#[derive(Clone, Copy, Debug, Default)]
pub struct Epilogue<'a> {
    /// Added first; one for each column.
    pub bias: Option<&'a [f32]>,
    /// Then applied.
    pub activation: Option<Activation>,
}

/// `y = epilogue(x W^T)`. `x: [M, K]`, `W: [N, K]` give `y: [M, N]`.
pub fn linear<'a>(
    x: Rows<'_>,
    weight: &PackedWeight,
    epilogue: Epilogue<'_>,
    y: &'a mut (impl Output + ?Sized),
) -> &'a mut [f32] {
    linear_tree(x, &[[(0, weight.k())]], weight, epilogue, y)
}

/// As [`linear`], but K is cut into `chunks` (1, 2, 4 or 8 of them) whose results are added as a balanced binary tree.
///
/// Each chunk lists the pieces of an `x` row it reads; all together, one after the other, they are the K of `weight`. A
/// chunk may be empty: its result is zero.
pub fn linear_tree<'a>(
    x: Rows<'_>,
    chunks: &[impl AsRef<[Piece]> + Sync],
    weight: &PackedWeight,
    epilogue: Epilogue<'_>,
    y: &'a mut (impl Output + ?Sized),
) -> &'a mut [f32] {
    let y = y.unread();
    let (m, n, k) = (x.count(), weight.n(), weight.k());
    let total: usize = chunks.iter().flat_map(|c| c.as_ref()).map(|(_, len)| len).sum();
    let right_count = chunks.len().is_power_of_two() && chunks.len() <= MAX_CHUNKS;
    assert!(right_count && total == k, "{} chunks of {total} columns for {k}", chunks.len());
    assert_eq!(y.len(), m * n, "{m} rows of {n}");
    assert!(epilogue.bias.is_none_or(|b| b.len() == n), "one bias for each of {n} columns");
    if m == 0 || n == 0 {
        return &mut [];
    }
    let grid = Grid::of(m, n, chunks.len(), weight);
    let (shared, product) = (SharedPlane::of(&mut *y, n), Product::new());
    threads::over_jobs(grid.jobs(), m * n * k < SMALL, |job| {
        let (rows, columns) = grid.job(job);
        #[allow(unsafe_code)] // threads write rectangles, which are not slices
        // SAFETY: jobs are disjoint blocks of `y`.
        let y = unsafe { shared.part(rows.clone(), columns.clone()) };
        Job { product, x, weight, rows, columns }.run(chunks, epilogue, y);
    });
    #[allow(unsafe_code)] // floats from here on
    // SAFETY: every result is in one of the blocks, which their jobs write.
    unsafe {
        seen(y)
    }
}

/// How a product is cut into jobs: `down` by `across` of them, of whole tiles, which differ by one tile at most.
struct Grid {
    m: usize,
    n: usize,
    down: usize,
    across: usize,
    mr: usize,
    nr: usize,
}

impl Grid {
    fn of(m: usize, n: usize, chunks: usize, weight: &PackedWeight) -> Self {
        let (mr, nr) = (weight.kernel().mr, weight.kernel().nr);
        // Blocks are widened again for each job down: taller and narrower ones, of the same size.
        let taller = if weight.is_in_blocks() { 3 } else { 1 };
        let (rows, columns) = match chunks {
            _ if weight.kernel().takes == Takes::Tiles => (TILES_ROWS, TILES_COLUMNS),
            1 => (ROWS, COLUMNS),
            _ => (TREE_ROWS, TREE_ROWS * TREE_COLUMNS / m.clamp(TREE_ROWS / 2, TREE_ROWS)),
        };
        let down = m.div_ceil(taller * rows).min(m.div_ceil(mr));
        let panels = n.div_ceil(nr);
        let mut across = n.div_ceil(columns / taller).min(panels);
        // Few jobs: as many as keep every thread busy to the end.
        let threads = rayon::current_num_threads();
        while down * across < 8 * threads && !(down * across).is_multiple_of(threads) && across < panels {
            across += 1;
        }
        Self { m, n, down, across, mr, nr }
    }

    fn jobs(&self) -> usize {
        self.down * self.across
    }

    fn job(&self, index: usize) -> (Range<usize>, Range<usize>) {
        let part = |of: usize, tile: usize, index: usize, count: usize| {
            let edge = |index: usize| of.min(of.div_ceil(tile) * index / count * tile);
            edge(index)..edge(index + 1)
        };
        let (down, across) = (index / self.across, index % self.across);
        (part(self.m, self.mr, down, self.down), part(self.n, self.nr, across, self.across))
    }
}

/// One block of the result.
struct Job<'a> {
    product: Product,
    x: Rows<'a>,
    weight: &'a PackedWeight,
    rows: Range<usize>,
    columns: Range<usize>,
}

impl Job<'_> {
    fn run(&self, chunks: &[impl AsRef<[Piece]>], epilogue: Epilogue<'_>, mut y: Plane<'_>) {
        let kernel = self.weight.kernel();
        let (m, n) = (self.rows.len(), self.columns.len());
        let tall = m.next_multiple_of(kernel.mr);
        inputs::with(self.product, self.rows.start, tall * kernel.input_len(self.weight.depth()), |inputs, packed| {
            // The sums that grow, and one for each level of the tree that waits for its neighbour.
            let depths = 1 + chunks.len().trailing_zeros() as usize;
            let level = tall * n.next_multiple_of(kernel.nr);
            let [panel, aside] = self.weight.buffer();
            scratch::with([panel, aside, Sums::PASSING + depths * level], |[b, aside, memory]| {
                let mut sums = Sums::new(memory, m, level, kernel);
                for step in self.steps(chunks) {
                    let at = |depth| tall * kernel.input_len(depth);
                    let a = &mut inputs[at(step.k.start)..at(step.k.end)];
                    if !packed {
                        pack_rows(a, self.x, self.rows.clone(), step.pieces, step.k_of_chunk.clone(), kernel);
                    }
                    self.step(&step, a, [b, aside], &mut sums);
                }
                let bias = epilogue.bias.map(|bias| &bias[self.columns.clone()]);
                let activate = |y: &mut [f32]| epilogue.activation.iter().for_each(|activation| activation.apply(y));
                sums.write(0, &mut y, &[], |_| bias, activate);
            });
        });
    }

    /// One at least for each chunk, in order.
    fn steps<'c>(&self, chunks: &'c [impl AsRef<[Piece]>]) -> impl Iterator<Item = Step<'c>> {
        let (weight, mut start) = (self.weight, 0);
        chunks.iter().enumerate().flat_map(move |(i, chunk)| {
            let pieces = chunk.as_ref();
            let len = weight.kernel().depth(pieces.iter().map(|(_, len)| len).sum());
            let (chunk_start, step) = (start, weight.step(len).max(1));
            start += len;
            (0..len.max(1)).step_by(step).map(move |done| {
                let k = done..len.min(done + step);
                Step {
                    pieces,
                    k: chunk_start + k.start..chunk_start + k.end,
                    fresh: done == 0,
                    depth: i.count_ones() as usize,
                    merges: if k.end == len { i.trailing_ones() as usize } else { 0 },
                    k_of_chunk: k,
                }
            })
        })
    }

    /// Adds the products of one step to the sums at its depth, and merges those with the ones below that they complete.
    fn step(&self, step: &Step<'_>, a: &[f32], [b, aside]: [&mut [f32]; 2], sums: &mut Sums<'_>) {
        let kernel = self.weight.kernel();
        let (m, n, k) = (self.rows.len(), self.columns.len(), step.k.len());
        for column in (0..n).step_by(kernel.nr) {
            let columns = column..n.min(column + kernel.nr);
            let at = (self.columns.start + column) / kernel.nr;
            let panel = self.weight.panel(at, step.k.clone(), [b, aside]);
            let mut ahead = self.weight.ahead(at + 1, step.k.clone()).chunks(kernel.share_of_panel(k, m));
            for row in (0..m).step_by(kernel.mr) {
                let rows = row..m.min(row + kernel.mr);
                let (tile, next) = sums.tile(step.place(), rows.clone(), columns.clone());
                let soon = Soon { panel: ahead.next().unwrap_or_default(), sums: next };
                kernel.run(k, &a[row * kernel.input_len(k)..], panel, tile, step.fresh, soon);
                if step.merges > 0 {
                    sums.merge(step.place(), step.depth - 1, rows.clone(), columns.clone());
                }
                for depth in (step.depth - step.merges + 1..step.depth).rev() {
                    sums.merge(Place::Depth(depth), depth - 1, rows.clone(), columns.clone());
                }
            }
        }
    }
}

/// A part of a chunk's columns.
struct Step<'a> {
    /// The chunk's.
    pieces: &'a [Piece],
    /// Counted from the chunk's first.
    k_of_chunk: Range<usize>,
    /// Counted from the product's first.
    k: Range<usize>,
    /// Whether the chunk starts here, from zero.
    fresh: bool,
    /// Sums of earlier chunks that wait.
    depth: usize,
    /// How many of them the chunk completes, if it ends here.
    merges: usize,
}

impl Step<'_> {
    fn place(&self) -> Place {
        if self.fresh && self.merges > 0 { Place::Passing } else { Place::Depth(self.depth) }
    }
}

#[cfg(test)]
mod bf16_tests;
#[cfg(test)]
mod tests;
