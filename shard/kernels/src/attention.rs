//! Softmax attention that streams the keys: scores live for one block of queries by one block of keys.
//!
//! For each block of keys the row's maximum, its sum and its output are carried on (online softmax, Milakov and
//! Gimelshein, <https://arxiv.org/abs/1805.02867>). Blocks of keys start at the same places whatever the queries are, so a
//! query's result does not depend on the queries beside it, the batch, or the threads.

use std::ops::Range;

use crate::gemm::micro::{MicroKernel, Takes};
use crate::gemm::{Order, Plane, Rows, SharedPlane, narrow_rows, pack_columns, pack_rows};
use crate::memory::{Output, seen};
use crate::rows::{self, Base};
use crate::{scratch, threads};

/// Floats between the rows of scores, which would otherwise be in one another's way in the caches.
const GAP: usize = 16;
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
    /// `y: [heads, queries, width]`, or `[queries, heads, width]` if they are to lie [`Self::side_by_side`]. A query whose scores are all
    /// `-inf` gets zeros. With an order of bf16, scaled queries, keys, exponentials and values are rounded to it before they are
    /// multiplied; sums, and all else, are in f32.
    pub fn run<'a>(
        &self,
        bf16: Option<Order>,
        q: Heads<'_>,
        k: Heads<'_>,
        v: Heads<'_>,
        bias: Option<Bias<'_>>,
        y: &'a mut (impl Output + ?Sized),
    ) -> &'a mut [f32] {
        self.run_on(bf16.map_or_else(MicroKernel::best, MicroKernel::bf16), q, k, v, bias, y)
    }

    fn run_on<'a>(
        &self,
        kernel: &MicroKernel,
        q: Heads<'_>,
        k: Heads<'_>,
        v: Heads<'_>,
        bias: Option<Bias<'_>>,
        y: &'a mut (impl Output + ?Sized),
    ) -> &'a mut [f32] {
        let y = y.unread();
        assert_eq!(y.len(), self.heads * self.queries * self.width);
        assert!(bias.is_none_or(|b| b.starts.len() == self.heads), "a bias for each head");
        if y.is_empty() {
            return &mut [];
        }
        // A job is a head, or a part of its queries when there are few heads: each job packs the keys for itself.
        let threads = rayon::current_num_threads();
        let of_block = queries_of_block(kernel);
        let blocks = self.queries.div_ceil(of_block);
        let parts = if self.heads >= 4 * threads { 1 } else { threads.min(blocks) };
        let per_part = blocks.div_ceil(parts) * of_block;
        let small = self.heads * self.queries * self.keys * self.width < SMALL;
        let shared = SharedPlane::of(&mut *y, if self.side_by_side { self.heads * self.width } else { self.width });
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
            let y = unsafe { shared.part(first + queries.start..first + queries.end, columns) };
            let job = Job { of: self, kernel, q: q.rows(head, self.queries), bias: bias.map(|b| (b, b.starts[head])) };
            job.run(k.rows(head, self.keys), v.rows(head, self.keys), queries, y);
        });
        #[allow(unsafe_code)] // floats from here on
        // SAFETY: every query of every head is in one of the rectangles, which their jobs write.
        unsafe {
            seen(y)
        }
    }
}

/// Queries that share one pass over the keys: whole tiles.
fn queries_of_block(kernel: &MicroKernel) -> usize {
    let queries: usize = if kernel.takes == Takes::Tiles { 128 } else { 42 };
    queries.next_multiple_of(kernel.mr)
}

/// Keys between two updates of the running maximum: a matter of the order of additions, not of the CPU.
fn keys_of_block(kernel: &MicroKernel) -> usize {
    if kernel.takes == Takes::Tiles { 256 } else { 512 }
}

/// What exponentials are of, and how much one of scores is in them. Again a matter of the order.
fn base(kernel: &MicroKernel) -> (Base, f32) {
    match kernel.takes {
        Takes::Tiles => (Base::Two, std::f32::consts::LOG2_E),
        _ if kernel.pairs() => (Base::RoughE, 1.0),
        _ => (Base::E, 1.0),
    }
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
    /// `[queries, keys of a block]`, rows [`GAP`] further apart: scores, then their exponentials.
    scores: &'a mut [f32],
    /// The exponentials, packed.
    p: &'a mut [f32],
    /// Each row's largest score so far.
    max: &'a mut [f32],
    /// Each row's sum of exponentials so far.
    sum: &'a mut [f32],
    /// `[queries, width]`: each row's output so far, not yet divided by the sum.
    output: &'a mut [f32],
}

impl Job<'_> {
    fn run(&self, k: Rows<'_>, v: Rows<'_>, queries: Range<usize>, mut y: Plane<'_>) {
        let nr = self.kernel.nr;
        let (keys, width) = (self.of.keys, self.of.width);
        let at_once = keys_of_block(self.kernel);
        let [depth, keys_deep, block_deep] = [width, keys, at_once].map(|k| self.kernel.depth(k));
        let rows = queries_of_block(self.kernel);
        let packed = [
            keys.next_multiple_of(nr) * depth,
            width.next_multiple_of(nr) * keys_deep,
            rows * self.kernel.input_len(depth),
            rows * self.kernel.input_len(block_deep),
        ];
        let [packed_k, packed_v, q, p] = packed;
        let lengths = [packed_k, packed_v, rows * width, q, rows * (at_once + GAP), p, rows, rows, rows * width];
        scratch::with(lengths, |[packed_k, packed_v, scaled, q, scores, p, max, sum, output]| {
            pack_columns(packed_k, k, width, self.kernel);
            pack_values(packed_v, v, [keys, width], self.kernel);
            let mut block = Block { scaled, q, scores, p, max, sum, output };
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
        let (base, unit) = base(kernel);
        for (row, scaled) in queries.clone().zip(scaled.chunks_exact_mut(width)) {
            rows::scaled(self.q.part(row, (0, width)), self.of.scale * unit, scaled);
        }
        let apart = |depth| kernel.mr * kernel.input_len(depth);
        pack_rows(block.q, apart(depth), Rows::new(scaled, m, width), 0..m, &[(0, width)], 0..depth, kernel);
        block.max[..m].fill(f32::NEG_INFINITY);
        block.sum[..m].fill(0.0);
        let (at_once, mut output) = (keys_of_block(kernel), Plane::of(&mut block.output[..m * width], width));
        for first in (0..self.of.keys).step_by(at_once) {
            let keys = first..self.of.keys.min(first + at_once);
            let (n, row_len) = (keys.len(), at_once + GAP);
            let mut scores = Plane::of(&mut block.scores[..m * row_len], row_len).narrow(n);
            self.products(depth, block.q, &k[first * depth..], nr * depth, &mut scores, true);
            for row in 0..m {
                let scores = &mut block.scores[row * row_len..][..n];
                self.add_bias(scores, queries.start + row, keys.clone(), unit);
                let less = rows::carry(scores, &mut block.max[row], &mut block.sum[row], base);
                if less != 1.0 && first > 0 {
                    rows::multiply(output.row_mut(row), less);
                }
            }
            let deep = kernel.depth(n);
            let scores = Rows::new(&block.scores[..m * row_len], m, row_len);
            pack_rows(block.p, apart(deep), scores, 0..m, &[(0, n)], 0..deep, kernel);
            let v = &v[kernel.depth(first) * nr..];
            self.products(deep, block.p, v, nr * kernel.depth(self.of.keys), &mut output, first == 0);
        }
        if self.of.keys == 0 {
            block.output[..m * width].fill(0.0);
        }
        let factors = block.sum[..m].iter_mut();
        factors.for_each(|sum| *sum = if *sum > 0.0 || sum.is_nan() { 1.0 / *sum } else { 0.0 });
        y.copy_rows_times(Rows::new(block.output, m, width), &block.sum[..m]);
    }

    /// `c (+)= a b` for panels of `b` that are `panel` elements apart.
    fn products(&self, k: usize, a: &[f32], b: &[f32], panel: usize, c: &mut Plane<'_>, fresh: bool) {
        let (m, n, nr) = (c.rows(), c.columns(), self.kernel.nr);
        for (i, column) in (0..n).step_by(nr).enumerate() {
            let mut c = c.part(0..m, column..n.min(column + nr));
            self.kernel.run_down(k, a, &b[i * panel..], &mut c, fresh);
        }
    }

    fn add_bias(&self, scores: &mut [f32], query: usize, keys: Range<usize>, unit: f32) {
        if let Some((bias, start)) = self.bias {
            rows::shift_by(scores, &bias.data[start + query * bias.query_stride..][keys], unit);
        }
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
