//! Products with weights that were packed once: `y = x W^T + b`, and an activation on the way out.
//!
//! **Order of additions.** An output is one chain: its K products are added one after the other, in the order of K,
//! starting from zero. It depends on its row of `x` and its row of `W` alone: not on the rows beside it, on where N is
//! cut, or on the threads. [`linear_tree`] cuts K into chunks, each such a chain, and adds their results as a balanced
//! binary tree.
//!
//! **Blocking.** A job is a block of rows by a block of columns. A tile of it is made in one go, all of K, in registers: what it reads comes
//! from the second-level cache, or from the third, at a few bytes in a cycle, which the CPU foresees. Inputs are laid out for that before
//! (`gemm/packed.rs`). Tiles of bf16 read too much for it (`gemm/blocked.rs`).

use std::ops::Range;

use self::micro::{More, Takes, WAITING};
use crate::activation::Activation;
use crate::memory::{Output, in_parts};
use crate::scratch;

mod blocked;
mod blocks;
pub(crate) mod bytes;
mod inputs;
pub mod micro;
mod narrow;
mod packed;
mod packing;
mod pairs;
mod plane;
mod sums;
mod turn;

pub use blocks::BlockRows;
pub use half::bf16;
pub use micro::Order;
pub(crate) use narrow::narrow_rows;
pub use packed::{Layer, PackedInputs, Source};
pub use packing::{Element, PackedWeight};
pub(crate) use packing::{pack_columns, pack_rows, pack_tiles};
pub(crate) use plane::{Plane, SharedPlane};
use sums::{Place, Sums};
pub(crate) use turn::turn;

/// How much of K is made at once of weights that are not stored as they are multiplied.
pub(crate) const K_STEP: usize = 256;
/// Of tiles, in pairs: 24 KiB of weights, half of a first-level cache of 48 KiB.
pub(crate) const TILES_STEP: usize = 192;
/// Rows and columns of a job of tiles: each weight comes from memory once for as many rows.
const TILES_ROWS: usize = 384;
const TILES_COLUMNS: usize = 512;
/// Of others; with fewer rows, up to twice the columns.
const ROWS: usize = 392;
const COLUMNS: usize = 256;
/// Of those whose weights are in blocks.
const BLOCKS_ROWS: usize = 588;
const BLOCKS_COLUMNS: usize = 170;
/// Most floats of the inputs of [`ROWS`] in 8 bits of which [`BLOCKS_ROWS`] are still read as fast as they are multiplied.
const NEAR: usize = 1 << 20;
/// Most chunks of a [`linear_tree`].
const MAX_CHUNKS: usize = 8;
/// Floats of inputs that are laid out at once: 64 MiB.
const AT_ONCE: usize = 16 << 20;
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

    /// Some of them.
    fn rows(&self, rows: Range<usize>) -> Self {
        Self { data: &self.data[rows.start * self.stride..], count: rows.len(), stride: self.stride }
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
    if weight.kernel().takes == Takes::Tiles {
        return blocked::linear_tree(x, chunks, weight, epilogue, y);
    }
    let of_row = weight.kernel().input_len(weight.depth());
    let at_once = (AT_ONCE / of_row.max(1)).max(ROWS);
    in_parts(y, at_once * n, |part, y| {
        let x = x.rows(part * at_once..m.min((part + 1) * at_once));
        PackedInputs::of_rows(x, chunks, weight).linear(weight, epilogue, y)
    })
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
    fn of(m: usize, n: usize, weight: &PackedWeight) -> Self {
        let (mr, nr) = (weight.kernel().mr, weight.kernel().nr);
        // Blocks are widened again for each job down: taller and narrower ones. In 8 bits, unless that is too much to be near.
        let near = weight.kernel().blocks().is_none() || ROWS * weight.kernel().input_len(weight.depth()) <= NEAR;
        let (rows, columns) = match weight.kernel().takes {
            Takes::Tiles => (TILES_ROWS, TILES_COLUMNS),
            _ if weight.is_in_blocks() && near => (BLOCKS_ROWS, BLOCKS_COLUMNS),
            _ => (ROWS, COLUMNS),
        };
        let columns = if weight.kernel().takes == Takes::Tiles { columns } else { rows * columns / m.clamp(rows / 2, rows) };
        let down = m.div_ceil(rows).min(m.div_ceil(mr));
        let panels = n.div_ceil(nr);
        let mut across = n.div_ceil(columns).min(panels);
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

    fn block<'a>(&self, index: usize, weight: &'a PackedWeight) -> Block<'a> {
        let part = |of: usize, tile: usize, index: usize, count: usize| {
            let edge = |index: usize| of.min(of.div_ceil(tile) * index / count * tile);
            edge(index)..edge(index + 1)
        };
        let (down, across) = (index / self.across, index % self.across);
        let (rows, columns) = (part(self.m, self.mr, down, self.down), part(self.n, self.nr, across, self.across));
        Block { weight, rows, columns }
    }
}

/// One block of the result.
struct Block<'a> {
    weight: &'a PackedWeight,
    rows: Range<usize>,
    columns: Range<usize>,
}

/// Where a block's results go.
enum Results<'a> {
    /// There they stay.
    Rows(Plane<'a>),
    /// To what the next layer multiplies.
    Inputs(&'a packed::Part<'a>),
}

impl Block<'_> {
    /// `inputs` are those of its rows, of chunks of such depths.
    fn multiply(&self, inputs: &[f32], depths: &[usize], epilogue: Epilogue<'_>, mut results: Results<'_>) {
        let (kernel, depth) = (self.weight.kernel(), self.weight.depth());
        let (m, n, nr) = (self.rows.len(), self.columns.len(), kernel.nr);
        let [panel, aside] = self.weight.buffer(depth);
        scratch::with([panel, aside, WAITING, m * nr], |[panel, aside, waiting, tile]| {
            for column in (0..n).step_by(nr) {
                let columns = column..n.min(column + nr);
                let at = (self.columns.start + column) / nr;
                let panel = self.weight.whole_panel(at, depths, [panel, aside]);
                let bias = epilogue.bias.map(|bias| Rows::new(&bias[self.columns.start + column..], m, 0));
                let more = More { bias: None, rows: bias };
                let ahead = self.weight.ahead(at + 1, 0..depth);
                let mut product = |c: &mut Plane<'_>| {
                    kernel.run_chunks((depths, kernel.mr), (inputs, panel.into()), waiting, c, more, ahead);
                };
                match &mut results {
                    Results::Rows(y) => {
                        let mut y = y.part(0..m, columns);
                        product(&mut y);
                        if let Some(activation) = epilogue.activation {
                            (0..m).for_each(|row| activation.apply(y.row_mut(row)));
                        }
                    }
                    Results::Inputs(next) => {
                        product(&mut Plane::of(&mut tile[..m * nr], nr));
                        epilogue.activation.iter().for_each(|activation| activation.apply(&mut tile[..m * nr]));
                        next.put(at, Rows::new(tile, m, nr), self.rows.start);
                    }
                }
            }
        });
    }
}

#[cfg(test)]
mod bf16_tests;
#[cfg(test)]
mod tests;
