//! Inputs that are laid out before they are multiplied: once for several layers, or by the layer that makes them, which then writes them nowhere else.

use std::ops::Range;

use crate::gemm::bytes::BLOCK;
use crate::gemm::micro::{MicroKernel, Takes};
use crate::gemm::packing::columns;
use crate::gemm::{Epilogue, Grid, PackedWeight, Piece, Results, Rows, SMALL, SharedPlane, pack_rows};
use crate::memory::{Output, seen, unread};
use crate::scratch::Lent;
use crate::threads;

/// `x: [M, K]`, rounded and laid out for weights of one kernel, `[M / mr][K][mr]`, chunk after chunk.
#[derive(Debug)]
pub struct PackedInputs {
    m: usize,
    k: usize,
    /// Of each chunk.
    depths: Vec<usize>,
    kernel: &'static MicroKernel,
    memory: Lent,
}

/// Where some columns of inputs come from.
#[derive(Clone, Copy, Debug)]
pub enum Source<'a> {
    /// Rows, of so many columns.
    Rows(Rows<'a>, usize),
    /// What another layer makes of its own inputs.
    Layer(Layer<'a>),
}

/// `epilogue(x W^T)`.
#[derive(Clone, Copy, Debug)]
pub struct Layer<'a> {
    /// `x`
    pub inputs: &'a PackedInputs,
    /// `W`, whose kernel is theirs.
    pub weight: &'a PackedWeight,
    /// On the way out.
    pub epilogue: Epilogue<'a>,
}

impl Source<'_> {
    fn width(&self) -> usize {
        match self {
            Self::Rows(_, width) => *width,
            Self::Layer(layer) => layer.weight.n(),
        }
    }

    fn rows(&self) -> usize {
        match self {
            Self::Rows(rows, _) => rows.count(),
            Self::Layer(layer) => layer.inputs.m,
        }
    }
}

/// Columns of one source that follow each other among the inputs.
struct Run {
    source: usize,
    pieces: Vec<Piece>,
    /// Where they are: depth before them, over all chunks.
    at: usize,
}

impl PackedInputs {
    /// The inputs of a product with `weight` over such `chunks`: columns of `sources`, which lie side by side. `None` if they cannot be laid
    /// out before they are multiplied, or not column by column; then nothing has been done.
    ///
    /// # Panics
    /// When sources have different numbers of rows, or `chunks` are not what `weight` was packed for.
    pub fn of(sources: &[Source<'_>], chunks: &[impl AsRef<[Piece]>], weight: &PackedWeight) -> Option<Self> {
        let (kernel, m) = (weight.kernel(), sources.first()?.rows());
        assert!(sources.iter().all(|source| source.rows() == m), "as many rows of each source");
        let runs = runs(sources, chunks, kernel)?;
        let starts = |(index, source)| starts(index, source, &runs, kernel);
        let starts: Vec<Vec<usize>> = sources.iter().enumerate().map(starts).collect::<Option<_>>()?;
        let mut inputs = Self::unwritten(m, chunks, weight);
        for (index, (source, starts)) in sources.iter().zip(starts).enumerate() {
            match source {
                Source::Rows(rows, _) => inputs.lay(*rows, &runs.iter().filter(|run| run.source == index).collect::<Vec<_>>()),
                Source::Layer(layer) => layer.write(&mut inputs, &starts),
            }
        }
        Some(inputs)
    }

    /// Those of one source, whose kernel is not for tiles.
    pub(super) fn of_rows(x: Rows<'_>, chunks: &[impl AsRef<[Piece]>], weight: &PackedWeight) -> Self {
        let mut inputs = Self::unwritten(x.count(), chunks, weight);
        let mut at = 0;
        let runs: Vec<Run> = chunks
            .iter()
            .zip(&inputs.depths)
            .map(|(chunk, depth)| {
                at += depth;
                Run { source: 0, pieces: chunk.as_ref().to_vec(), at: at - depth }
            })
            .collect();
        inputs.lay(x, &runs.iter().collect::<Vec<_>>());
        inputs
    }

    fn unwritten(m: usize, chunks: &[impl AsRef<[Piece]>], weight: &PackedWeight) -> Self {
        let kernel = weight.kernel();
        let depths: Vec<usize> = chunks.iter().map(|chunk| kernel.depth(columns(chunk.as_ref()))).collect();
        assert_eq!(depths.iter().sum::<usize>(), weight.depth(), "the weight's chunks");
        let memory = Lent::of(m.next_multiple_of(kernel.mr) * kernel.input_len(weight.depth()));
        Self { m, k: weight.k(), depths, kernel, memory }
    }

    /// Floats of a tile.
    fn of_tile(&self) -> usize {
        self.kernel.mr * self.kernel.input_len(self.depths.iter().sum())
    }

    /// Lays out some columns of `rows`, on all threads.
    fn lay(&mut self, rows: Rows<'_>, runs: &[&Run]) {
        let (kernel, of_tile) = (self.kernel, self.of_tile());
        threads::over_rows(self.memory.as_mut_slice(), of_tile, |first, memory| {
            for (tile, memory) in (first..).zip(memory.chunks_exact_mut(of_tile)) {
                let of_tile = tile * kernel.mr..rows.count().min((tile + 1) * kernel.mr);
                for Run { pieces, at, .. } in runs {
                    let (to, depth) = (&mut memory[kernel.mr * kernel.input_len(*at)..], kernel.depth(columns(pieces)));
                    pack_rows(to, 0, rows, of_tile.clone(), pieces, 0..depth, kernel);
                }
            }
        });
    }

    /// Whether a product with `weight` can be of them: it has their kernel, and as many columns. That its chunks are theirs is up to the caller.
    pub fn fit(&self, weight: &PackedWeight) -> bool {
        std::ptr::eq(self.kernel, weight.kernel()) && self.k == weight.k() && self.depths.iter().sum::<usize>() == weight.depth()
    }

    /// `y = epilogue(x W^T)`, of a weight that they [`Self::fit`]: as [`crate::gemm::linear_tree`] of the same inputs.
    pub fn linear<'a>(&self, weight: &PackedWeight, epilogue: Epilogue<'_>, y: &'a mut (impl Output + ?Sized)) -> &'a mut [f32] {
        let (y, n) = (y.unread(), weight.n());
        assert_eq!(y.len(), self.m * n, "{} rows of {n}", self.m);
        if y.is_empty() {
            return &mut [];
        }
        let shared = SharedPlane::of(&mut *y, n);
        self.over_blocks(weight, epilogue, |rows, columns| {
            #[allow(unsafe_code)] // threads write rectangles, which are not slices
            // SAFETY: jobs are disjoint blocks of `y`.
            Results::Rows(unsafe { shared.part(rows, columns) })
        });
        #[allow(unsafe_code)] // floats from here on
        // SAFETY: every result is in one of the blocks, which their jobs write.
        unsafe {
            seen(y)
        }
    }

    fn over_blocks<'r>(
        &self,
        weight: &PackedWeight,
        epilogue: Epilogue<'_>,
        results: impl Fn(Range<usize>, Range<usize>) -> Results<'r> + Sync,
    ) {
        assert!(self.fit(weight), "{:?} of {} columns into {weight:?}", self.kernel, self.k);
        assert!(epilogue.bias.is_none_or(|b| b.len() == weight.n()), "one bias for each of {} columns", weight.n());
        let grid = Grid::of(self.m, weight.n(), weight);
        let of_row = self.kernel.input_len(weight.depth());
        threads::over_jobs_in_order(grid.jobs(), self.m * weight.n() * self.k < SMALL, |job| {
            let block = grid.block(job, weight);
            let inputs = &self.memory.as_slice()[block.rows.start * of_row..];
            block.multiply(inputs, &self.depths, epilogue, results(block.rows.clone(), block.columns.clone()));
        });
    }
}

/// Which columns come from where. `None` if some would begin inside what the kernel takes as one, or inside a panel of their layer.
fn runs(sources: &[Source<'_>], chunks: &[impl AsRef<[Piece]>], kernel: &MicroKernel) -> Option<Vec<Run>> {
    let unit = match kernel.takes {
        Takes::Floats => 1,
        Takes::Pairs | Takes::PairsByFloats => 2,
        Takes::Blocks(_) => BLOCK,
        Takes::Tiles => return None,
    };
    let mut runs: Vec<Run> = Vec::new();
    let mut of_chunk = 0;
    for chunk in chunks {
        let (mut width, mut run): (usize, Option<Run>) = (0, None);
        for (start, len) in chunk.as_ref().iter().copied().filter(|(_, len)| *len > 0) {
            let mut before = 0;
            let source = sources.iter().position(|source| {
                before += source.width();
                start < before
            })?;
            let start = start + sources[source].width() - before;
            let whole = |kernel: &MicroKernel| {
                [start, len].iter().all(|edge| edge.is_multiple_of(kernel.nr)) && kernel.nr.is_multiple_of(unit)
            };
            let fits = match sources[source] {
                Source::Rows(..) => true,
                Source::Layer(layer) => {
                    whole(kernel) && layer.weight.n().is_multiple_of(kernel.nr) && layer.inputs.fit(layer.weight)
                }
            };
            if start + len > sources[source].width() || !fits {
                return None;
            }
            match run.as_mut().filter(|run| run.source == source) {
                Some(run) => run.pieces.push((start, len)),
                None if width.is_multiple_of(unit) => {
                    let next = Run { source, pieces: vec![(start, len)], at: of_chunk + kernel.depth(width) };
                    runs.extend(run.replace(next));
                }
                None => return None,
            }
            width += len;
        }
        runs.extend(run);
        of_chunk += kernel.depth(width);
    }
    Some(runs)
}

/// Where each panel of a layer goes: the depth before it. `None` if one goes nowhere, or to several places.
fn starts(index: usize, source: &Source<'_>, runs: &[Run], kernel: &MicroKernel) -> Option<Vec<usize>> {
    let Source::Layer(layer) = source else { return Some(Vec::new()) };
    let (mut starts, mut left) = (vec![None; layer.weight.n() / kernel.nr], layer.weight.n() / kernel.nr);
    for Run { pieces, at, .. } in runs.iter().filter(|run| run.source == index) {
        let panels = pieces.iter().flat_map(|(start, len)| start / kernel.nr..(start + len) / kernel.nr);
        for (i, panel) in panels.enumerate() {
            starts[panel] = Some(at + i * kernel.depth(kernel.nr));
            left = left.checked_sub(1)?;
        }
    }
    starts.into_iter().collect()
}

impl Layer<'_> {
    /// Writes its results among `inputs`, each panel from its depth in `starts` on.
    fn write(&self, inputs: &mut PackedInputs, starts: &[usize]) {
        let of_tile = inputs.of_tile();
        if inputs.memory.as_slice().is_empty() {
            return;
        }
        let tiles = SharedPlane::of(unread(inputs.memory.as_mut_slice()), of_tile);
        let part = Part { kernel: self.weight.kernel(), tiles, starts };
        self.inputs.over_blocks(self.weight, self.epilogue, |_, _| Results::Inputs(&part));
    }
}

/// A layer's columns among the inputs of another.
pub(super) struct Part<'a> {
    kernel: &'static MicroKernel,
    /// A row for each tile.
    tiles: SharedPlane<'a>,
    /// Where each panel goes: the depth before it.
    starts: &'a [usize],
}

impl Part<'_> {
    /// Takes in a panel of results, of the rows from `first` on. No other thread puts any of the same.
    pub(super) fn put(&self, panel: usize, results: Rows<'_>, first: usize) {
        let (kernel, depth) = (self.kernel, self.kernel.depth(self.kernel.nr));
        let start = kernel.mr * kernel.input_len(self.starts[panel]);
        for row in (0..results.count()).step_by(kernel.mr) {
            let (tile, columns) = ((first + row) / kernel.mr, start..start + kernel.mr * kernel.input_len(depth));
            #[allow(unsafe_code)] // threads write rectangles, which are not slices
            // SAFETY: jobs have panels of their own, or rows of whole tiles.
            let mut to = unsafe { self.tiles.part(tile..tile + 1, columns) };
            let rows = row..results.count().min(row + kernel.mr);
            pack_rows(to.row_mut(0), 0, results, rows, &[(0, kernel.nr)], 0..depth, kernel);
        }
    }
}

#[cfg(test)]
mod tests;
