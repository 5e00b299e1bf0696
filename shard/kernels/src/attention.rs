//! Softmax attention that streams the keys: scores live for one block of queries by one block of keys.
//!
//! For each block of `KEYS` keys the row's maximum, its sum and its output are carried on (online softmax, Milakov and
//! Gimelshein, <https://arxiv.org/abs/1805.02867>). Blocks of keys start at the same places whatever the queries are, so a
//! query's result does not depend on the queries beside it, the batch, or the threads.

use std::ops::Range;

use crate::gemm::micro::MicroKernel;
use crate::gemm::{Order, Plane, Rows, SharedPlane, narrow_rows, pack_columns, pack_rows};
use crate::{rows, scratch, threads};

/// Keys between two updates of the running maximum.
const KEYS: usize = 128;
/// Queries that share one pass over the keys, or a few more: whole tiles.
const QUERIES: usize = 84;
/// Multiplications below which all stays on one thread.
const SMALL: usize = 1 << 19;

/// A tensor of heads: `[heads, rows, width]`, the last dimension dense.
#[derive(Clone, Copy, Debug)]
pub struct Heads<'a> {
    /// All of it, from the first head's first row on.
    pub data: &'a [f32],
    /// Elements from a head to the next.
    pub head_stride: usize,
    /// Elements from a row to the next.
    pub row_stride: usize,
}

impl<'a> Heads<'a> {
    /// `[heads, rows, width]` without gaps.
    pub fn dense(data: &'a [f32], rows: usize, width: usize) -> Self {
        Self { data, head_stride: rows * width, row_stride: width }
    }

    fn rows(&self, head: usize, rows: usize) -> Rows<'a> {
        Rows::new(&self.data[head * self.head_stride..], rows, self.row_stride)
    }
}

/// Sizes and scale of an attention.
#[derive(Clone, Copy, Debug)]
pub struct Attention {
    /// Heads, those of all items of a batch.
    pub heads: usize,
    /// Query rows of each head.
    pub queries: usize,
    /// Keys of each head.
    pub keys: usize,
    /// Width of a head.
    pub width: usize,
    /// What scores are multiplied by.
    pub scale: f32,
    /// Whether the heads of the output lie side by side: `[queries, heads, width]`.
    pub side_by_side: bool,
}

/// What is added to the scores: for each head the place of its `[queries, keys]` in `data`, whose keys are dense.
#[derive(Clone, Copy, Debug)]
pub struct Bias<'a> {
    /// All of it.
    pub data: &'a [f32],
    /// Where a head's begins; one for each head.
    pub starts: &'a [usize],
    /// Elements from a query to the next: 0 if all queries share one row (a mask of keys).
    pub query_stride: usize,
}

impl Attention {
    /// `y = softmax(scale q k^T + bias) v`. `q: [heads, queries, width]`, `k, v: [heads, keys, width]` give
    /// `y: [heads, queries, width]`, or `[queries, heads, width]` if they are to lie [`Self::side_by_side`]. A query whose scores are all `-inf` gets zeros.
    pub fn run(&self, q: Heads<'_>, k: Heads<'_>, v: Heads<'_>, bias: Option<Bias<'_>>, y: &mut [f32]) {
        self.run_on(MicroKernel::best(), q, k, v, bias, y);
    }

    /// As [`Self::run`]; scaled queries, keys, exponentials and values are rounded to bf16 before they are multiplied. Sums, and all else,
    /// are in f32.
    pub fn run_in_bf16(&self, order: Order, q: Heads<'_>, k: Heads<'_>, v: Heads<'_>, bias: Option<Bias<'_>>, y: &mut [f32]) {
        self.run_on(MicroKernel::bf16(order), q, k, v, bias, y);
    }

    fn run_on(&self, kernel: &MicroKernel, q: Heads<'_>, k: Heads<'_>, v: Heads<'_>, bias: Option<Bias<'_>>, y: &mut [f32]) {
        assert_eq!(y.len(), self.heads * self.queries * self.width);
        assert!(bias.is_none_or(|b| b.starts.len() == self.heads), "a bias for each head");
        if y.is_empty() {
            return;
        }
        // A job is a head, or a part of its queries when there are few heads: each job packs the keys for itself.
        let threads = rayon::current_num_threads();
        let of_block = queries_of_block(kernel);
        let blocks = self.queries.div_ceil(of_block);
        let parts = if self.heads >= 4 * threads { 1 } else { threads.min(blocks) };
        let per_part = blocks.div_ceil(parts) * of_block;
        let small = self.heads * self.queries * self.keys * self.width < SMALL;
        let y = SharedPlane::of(y, if self.side_by_side { self.heads * self.width } else { self.width });
        threads::over_jobs(self.heads * parts, small, |job| {
            let (head, part) = (job / parts, job % parts);
            let queries = self.queries.min(part * per_part)..self.queries.min((part + 1) * per_part);
            let (first, columns) = if self.side_by_side {
                (0, head * self.width..(head + 1) * self.width)
            } else {
                (head * self.queries, 0..self.width)
            };
            #[allow(unsafe_code)] // threads write disjoint rectangles
            // SAFETY: every job has queries of its own, or another head.
            let y = unsafe { y.part(first + queries.start..first + queries.end, columns) };
            let job = Job { of: self, kernel, q: q.rows(head, self.queries), bias: bias.map(|b| (b, b.starts[head])) };
            job.run(k.rows(head, self.keys), v.rows(head, self.keys), queries, y);
        });
    }
}

fn queries_of_block(kernel: &MicroKernel) -> usize {
    QUERIES.next_multiple_of(kernel.mr)
}

/// Some queries of one head.
struct Job<'a> {
    of: &'a Attention,
    kernel: &'a MicroKernel,
    q: Rows<'a>,
    bias: Option<(Bias<'a>, usize)>,
}

/// What a block of queries works in.
struct Block<'a> {
    /// Scaled queries, `[queries, width]`.
    scaled: &'a mut [f32],
    /// The same, packed.
    q: &'a mut [f32],
    /// `[queries, KEYS]`: scores, then their exponentials.
    scores: &'a mut [f32],
    /// The exponentials, packed.
    p: &'a mut [f32],
    /// Each row's largest score so far.
    max: &'a mut [f32],
    /// Each row's sum of exponentials so far.
    sum: &'a mut [f32],
}

impl Job<'_> {
    fn run(&self, k: Rows<'_>, v: Rows<'_>, queries: Range<usize>, mut y: Plane<'_>) {
        let nr = self.kernel.nr;
        let (keys, width) = (self.of.keys, self.of.width);
        let [depth, keys_deep, block_deep] = [width, keys, KEYS].map(|k| self.kernel.depth(k));
        let rows = queries_of_block(self.kernel);
        let packed = [keys.next_multiple_of(nr) * depth, width.next_multiple_of(nr) * keys_deep, rows * depth, rows * block_deep];
        let [packed_k, packed_v, q, p] = packed;
        let lengths = [packed_k, packed_v, rows * width, q, rows * KEYS, p, rows, rows];
        scratch::with(lengths, |[packed_k, packed_v, scaled, q, scores, p, max, sum]| {
            pack_columns(packed_k, k, width, self.kernel);
            pack_values(packed_v, v, [keys, width], self.kernel);
            let mut block = Block { scaled, q, scores, p, max, sum };
            for first in queries.clone().step_by(rows) {
                let rows = first..queries.end.min(first + rows);
                let y = y.part(first - queries.start..rows.end - queries.start, 0..width);
                self.block(&mut block, packed_k, packed_v, rows, y);
            }
        });
    }

    /// All keys for one block of queries.
    fn block(&self, block: &mut Block<'_>, k: &[f32], v: &[f32], queries: Range<usize>, mut y: Plane<'_>) {
        let (kernel, nr) = (self.kernel, self.kernel.nr);
        let (m, width, depth) = (queries.len(), self.of.width, self.kernel.depth(self.of.width));
        let scaled = &mut block.scaled[..m * width];
        for (row, scaled) in queries.clone().zip(scaled.chunks_exact_mut(width)) {
            scaled.copy_from_slice(self.q.part(row, (0, width)));
        }
        rows::multiply(scaled, self.of.scale);
        pack_rows(block.q, Rows::new(scaled, m, width), 0..m, &[(0, width)], 0..depth, kernel);
        block.max[..m].fill(f32::NEG_INFINITY);
        block.sum[..m].fill(0.0);
        (0..m).for_each(|row| y.row_mut(row).fill(0.0));
        for first in (0..self.of.keys).step_by(KEYS) {
            let keys = first..self.of.keys.min(first + KEYS);
            let n = keys.len();
            let mut scores = Plane::of(&mut block.scores[..m * n], n);
            self.products(depth, block.q, &k[first * depth..], nr * depth, &mut scores, true);
            for row in 0..m {
                let scores = &mut block.scores[row * n..][..n];
                self.add_bias(scores, queries.start + row, keys.clone());
                self.carry(scores, &mut block.max[row], &mut block.sum[row], y.row_mut(row));
            }
            let deep = kernel.depth(n);
            pack_rows(block.p, Rows::new(&block.scores[..m * n], m, n), 0..m, &[(0, n)], 0..deep, kernel);
            self.products(deep, block.p, &v[kernel.depth(first) * nr..], nr * kernel.depth(self.of.keys), &mut y, false);
        }
        for row in 0..m {
            let sum = block.sum[row];
            rows::multiply(y.row_mut(row), if sum > 0.0 || sum.is_nan() { 1.0 / sum } else { 0.0 });
        }
    }

    /// `c (+)= a b` for panels of `b` that are `panel` elements apart.
    fn products(&self, k: usize, a: &[f32], b: &[f32], panel: usize, c: &mut Plane<'_>, fresh: bool) {
        let (mr, nr) = (self.kernel.mr, self.kernel.nr);
        let (m, n) = (c.rows(), c.columns());
        for (i, column) in (0..n).step_by(nr).enumerate() {
            for row in (0..m).step_by(mr) {
                let tile = c.part(row..m.min(row + mr), column..n.min(column + nr));
                self.kernel.run(k, &a[row * k..], &b[i * panel..], tile, fresh);
            }
        }
    }

    fn add_bias(&self, scores: &mut [f32], query: usize, keys: Range<usize>) {
        if let Some((bias, start)) = self.bias {
            rows::shift(scores, &bias.data[start + query * bias.query_stride..][keys]);
        }
    }

    /// Turns a row of scores into exponentials under the row's new maximum, and brings sum and output under it too.
    fn carry(&self, scores: &mut [f32], max: &mut f32, sum: &mut f32, y: &mut [f32]) {
        let of_block = rows::maximum(scores);
        let new = if of_block > *max { of_block } else { *max };
        if new == f32::NEG_INFINITY {
            return scores.fill(0.0);
        }
        if *max != new && *max != f32::NEG_INFINITY {
            let less = rows::exponential(*max - new);
            *sum *= less;
            rows::multiply(y, less);
        }
        *max = new;
        *sum += rows::exponentials(scores, new);
    }
}

/// `v: [keys, width]` as `[width / nr][keys][nr]`, or as pairs of keys if `kernel` takes those; the last panel is filled up with zeros.
fn pack_values(packed: &mut [f32], v: Rows<'_>, [keys, width]: [usize; 2], kernel: &MicroKernel) {
    let (nr, deep) = (kernel.nr, kernel.depth(keys));
    for (panel, first) in (0..width).step_by(nr).enumerate() {
        let part = (first, nr.min(width - first));
        for (at, packed) in packed[panel * deep * nr..][..deep * nr].chunks_exact_mut(nr).enumerate() {
            let (packed, rest) = packed.split_at_mut(part.1);
            let [first, next] = if kernel.pairs() { [2 * at, 2 * at + 1] } else { [at; 2] };
            if first >= keys {
                packed.fill(0.0);
            } else if kernel.pairs() {
                narrow_rows(v.part(first, part), (next < keys).then(|| v.part(next, part)), packed);
            } else {
                packed.copy_from_slice(v.part(first, part));
            }
            rest.fill(0.0);
        }
    }
}

#[cfg(test)]
mod tests;
