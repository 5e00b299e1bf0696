//! A job of tiles of bf16, whose operands have to be near: its results stay in the second-level cache while K passes by in steps, of which one
//! panel of weights stays in the first-level cache.

use std::mem::MaybeUninit;
use std::ops::Range;

use crate::gemm::inputs::{self, Product};
use crate::gemm::packing::pack_rows;
use crate::gemm::{Block, Epilogue, Grid, K_STEP, PackedWeight, Piece, Place, Plane, Rows, SMALL, SharedPlane, Sums};
use crate::memory::seen;
use crate::{scratch, threads};

/// As [`gemm::linear_tree`], with results.
pub(super) fn linear_tree<'a>(
    x: Rows<'_>,
    chunks: &[impl AsRef<[Piece]> + Sync],
    weight: &PackedWeight,
    epilogue: Epilogue<'_>,
    y: &'a mut [MaybeUninit<f32>],
) -> &'a mut [f32] {
    let (m, n) = (x.count(), weight.n());
    let grid = Grid::of(m, n, weight);
    let (shared, product) = (SharedPlane::of(&mut *y, n), Product::new());
    threads::over_jobs(grid.jobs(), m * n * weight.k() < SMALL, |job| {
        let block = grid.block(job, weight);
        #[allow(unsafe_code)] // threads write rectangles, which are not slices
        // SAFETY: jobs are disjoint blocks of `y`.
        let y = unsafe { shared.part(block.rows.clone(), block.columns.clone()) };
        Job { product, x, block }.run(chunks, epilogue, y);
    });
    #[allow(unsafe_code)] // floats from here on
    // SAFETY: every result is in one of the blocks, which their jobs write.
    unsafe {
        seen(y)
    }
}

/// A block of the result, and its inputs.
struct Job<'a> {
    product: Product,
    x: Rows<'a>,
    block: Block<'a>,
}

impl Job<'_> {
    fn run(&self, chunks: &[impl AsRef<[Piece]>], epilogue: Epilogue<'_>, mut y: Plane<'_>) {
        let Block { weight, rows, columns } = &self.block;
        let (kernel, m, n) = (weight.kernel(), rows.len(), columns.len());
        let tall = m.next_multiple_of(kernel.mr);
        inputs::with(self.product, rows.start, tall * kernel.input_len(weight.depth()), |inputs, packed| {
            // The sums that grow, and one for each level of the tree that waits for its neighbour.
            let depths = 1 + chunks.len().trailing_zeros() as usize;
            let level = tall * n.next_multiple_of(kernel.nr);
            let [panel, aside] = weight.buffer(K_STEP);
            scratch::with([panel, aside, Sums::PASSING + depths * level], |[b, aside, memory]| {
                let mut sums = Sums::new(memory, m, level, kernel);
                for step in self.block.steps(chunks) {
                    let at = |depth| tall * kernel.input_len(depth);
                    let a = &mut inputs[at(step.k.start)..at(step.k.end)];
                    if !packed {
                        let (apart, k) = (kernel.mr * kernel.input_len(step.k.len()), step.k_of_chunk.clone());
                        pack_rows(a, apart, self.x, rows.clone(), step.pieces, k, kernel);
                    }
                    self.block.step(&step, a, [b, aside], &mut sums);
                }
                let bias = epilogue.bias.map(|bias| &bias[columns.clone()]);
                let activate = |y: &mut [f32]| epilogue.activation.iter().for_each(|activation| activation.apply(y));
                sums.write(&mut y, bias, activate);
            });
        });
    }
}

impl Block<'_> {
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
                let tile = sums.tile(step.place(), rows.clone(), columns.clone());
                kernel.run(k, &a[row * kernel.input_len(k)..], panel, tile, step.fresh, ahead.next().unwrap_or_default());
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
