//! Convolution in two dimensions, as a product whose right side is read from the picture while it is packed (implicit
//! im2col): weights are the rows, pixels the columns, so pictures stay `[C, H, W]`.
//!
//! Where windows lie side by side and in whole tiles, the right side is not even copied: it is read from the lines that a job's windows look at
//! (`conv/bands.rs`).
//!
//! A pixel of a channel is one chain over `[C_in, k, k]`, in that order: it depends on nothing beside its own window. In bf16 two channels go
//! together, as the halves of one: the chain is over `[C_in / 2, k, k]`, and the picture is rounded once, not for each window. In tiles of
//! bf16 32 channels go together (`conv/lines.rs`).

use std::mem::MaybeUninit;
use std::ops::Range;

use crate::activation::Activation;
use crate::conv::bands::Bands;
use crate::conv::windows::{Panels, Windows};
use crate::gemm::micro::{MicroKernel, Soon, Takes};
use crate::gemm::{K_STEP, Order, Place, Plane, Rows, SharedPlane, Sums, bf16, narrow_rows, pack_tiles};
use crate::memory::{Output, seen};
use crate::scratch::Buffer;
use crate::{rows, scratch, threads};

mod bands;
mod lines;
mod windows;

/// Pixels of a job: with `K_STEP`, 256 KiB of the second-level cache.
const PIXELS: usize = 256;
/// Channels that go past all of a job's pixels together at most: 128 KiB of weights.
const ROWS: usize = 128;
/// Multiplications below which all stays on one thread.
const SMALL: usize = 1 << 19;

/// A kernel, packed once. `weight: [C_out, C_in, k, k]`, `bias: [C_out]`.
#[derive(Clone)]
pub struct Conv2d {
    /// The `a` of the kernel's tiles: rows of `C k k`, of [`Self::deep`] channels C; in tiles of bf16 what [`lines::pack`] says.
    weight: Buffer,
    bias: Option<Vec<f32>>,
    c_in: usize,
    c_out: usize,
    size: usize,
    kernel: &'static MicroKernel,
}

/// What is done with each result.
#[derive(Clone, Copy, Debug, Default)]
pub struct Finish<'a> {
    /// Added after the bias: `[B, C_out, H', W']`, as the results are.
    pub residual: Option<&'a [f32]>,
    /// Then applied.
    pub activation: Option<Activation>,
}

impl Finish<'_> {
    /// Of results that lie one after the other, from `at` on.
    fn apply(&self, y: &mut [f32], at: usize) {
        if let Some(residual) = self.residual {
            rows::shift(y, &residual[at..][..y.len()]);
        }
        if let Some(activation) = self.activation {
            activation.apply(y);
        }
    }
}

/// Where a kernel is laid on a picture.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Geometry {
    /// Height and width of the input.
    pub input: [usize; 2],
    /// From one output pixel's window to the next's.
    pub stride: usize,
    /// Zeros above and to the left.
    pub before: usize,
    /// Zeros below and to the right.
    pub after: usize,
    /// Whether the input is first enlarged to twice its size, each pixel repeated.
    pub doubled: bool,
}

impl Geometry {
    /// Height and width of what windows are laid on, without the zeros around it.
    fn shown(&self) -> [usize; 2] {
        self.input.map(|n| if self.doubled { 2 * n } else { n })
    }

    /// Height and width of the output of a kernel of `size` by `size`.
    pub fn output(&self, size: usize) -> [usize; 2] {
        self.shown().map(|n| {
            let n = n + self.before + self.after;
            if n < size { 0 } else { (n - size) / self.stride + 1 }
        })
    }
}

impl Conv2d {
    /// Packs `weight: [c_out, c_in, size, size]`.
    pub fn pack(weight: &[f32], [c_out, c_in, size]: [usize; 3], bias: Option<&[f32]>) -> Self {
        Self::pack_for(MicroKernel::best(), weight, [c_out, c_in, size], bias)
    }

    /// As [`Self::pack`], for products in bf16: pictures are rounded to it, sums are in f32.
    pub fn pack_pairs(order: Order, weight: &[bf16], dims: [usize; 3], bias: Option<&[f32]>) -> Self {
        let weight: Vec<f32> = weight.iter().map(|w| w.to_f32()).collect();
        Self::pack_for(MicroKernel::bf16(order), &weight, dims, bias)
    }

    fn pack_for(kernel: &'static MicroKernel, weight: &[f32], [c_out, c_in, size]: [usize; 3], bias: Option<&[f32]>) -> Self {
        if kernel.takes == Takes::Tiles {
            let packed = lines::pack(kernel, weight, [c_out, c_in, size]);
            return Self { weight: packed, bias: bias.map(<[f32]>::to_vec), c_in, c_out, size, kernel };
        }
        let (k, deep) = (c_in * size * size, channels(kernel, c_in) * size * size);
        assert_eq!(weight.len(), c_out * k);
        assert!(bias.is_none_or(|b| b.len() == c_out), "one bias for each of {c_out} channels");
        let mut packed = Buffer::zeros(c_out.next_multiple_of(kernel.mr) * kernel.input_len(deep));
        let mut pairs = vec![0.0; if kernel.pairs() { c_out * deep } else { 0 }];
        if kernel.pairs() && k > 0 {
            let filters = weight.chunks_exact(k).zip(pairs.chunks_exact_mut(deep));
            filters.for_each(|(filter, pairs)| pair_channels(filter, [c_in, size * size], pairs));
        }
        let rows = Rows::new(if kernel.pairs() { &pairs } else { weight }, c_out, deep);
        pack_tiles(packed.as_mut_slice(), rows, deep, kernel);
        Self { weight: packed, bias: bias.map(<[f32]>::to_vec), c_in, c_out, size, kernel }
    }

    /// Output and input channels, and the kernel's size.
    pub fn dims(&self) -> [usize; 3] {
        [self.c_out, self.c_in, self.size]
    }

    /// `x: [B, C_in, H, W]` gives `y: [B, C_out, H', W']`, `H'` and `W'` from [`Geometry::output`].
    pub fn run<'a>(&self, x: &[f32], geometry: Geometry, finish: Finish<'_>, y: &'a mut (impl Output + ?Sized)) -> &'a mut [f32] {
        let y = y.unread();
        assert!(finish.residual.is_none_or(|residual| residual.len() == y.len()), "one to add to each result");
        let (pixels, area) = (geometry.output(self.size).iter().product::<usize>(), geometry.input.iter().product::<usize>());
        if y.is_empty() {
            return &mut [];
        }
        assert!(self.c_in > 0 && self.size > 0, "a kernel that looks at something");
        let batch = y.len() / (self.c_out * pixels);
        assert!(y.len() == batch * self.c_out * pixels && x.len() == batch * self.c_in * area, "pictures of the geometry's size");
        match self.kernel.takes {
            Takes::Tiles => lines::convolve(self, x, geometry, finish, y),
            Takes::Pairs | Takes::PairsByFloats => self.convolve_pairs(x, geometry, finish, y),
            _ => self.convolve(x, geometry, finish, y),
        }
        #[allow(unsafe_code)] // floats from here on
        // SAFETY: every pixel of every channel is written, whichever way it is made.
        unsafe {
            seen(y)
        }
    }

    /// As [`Self::convolve`], of channels that are paired first.
    fn convolve_pairs(&self, x: &[f32], geometry: Geometry, finish: Finish<'_>, y: &mut [MaybeUninit<f32>]) {
        let area = geometry.input.iter().product::<usize>();
        let batch = x.len() / (self.c_in * area);
        scratch::lend(batch * self.deep() * area, |pairs| {
            threads::over_rows(pairs, area, |first, pairs| {
                for (at, pairs) in (first..).zip(pairs.chunks_exact_mut(area)) {
                    let (item, channel) = (at / self.deep(), 2 * (at % self.deep()));
                    let two = &x[(item * self.c_in + channel) * area..][..area * (self.c_in - channel).min(2)];
                    pair_channels(two, [two.len() / area, area], pairs);
                }
            });
            self.convolve(pairs, geometry, finish, y);
        });
    }

    /// Channels, or pairs of them.
    fn deep(&self) -> usize {
        channels(self.kernel, self.c_in)
    }

    /// `x: [B, C, H, W]`, of [`Self::deep`] channels C.
    fn convolve(&self, x: &[f32], geometry: Geometry, finish: Finish<'_>, y: &mut [MaybeUninit<f32>]) {
        let pixels = geometry.output(self.size).iter().product::<usize>();
        let input = self.deep() * geometry.input.iter().product::<usize>();
        let batch = y.len() / (self.c_out * pixels);
        let per_job = jobs_of(pixels, batch, self.kernel.nr);
        let blocks = pixels.div_ceil(per_job);
        let small = y.len() * self.c_in * self.size * self.size < SMALL;
        let y = SharedPlane::of(y, pixels);
        let bands = Bands::of(geometry, self.size, self.kernel, per_job);
        threads::over_jobs(batch * blocks, small, |job| {
            let (item, block) = (job / blocks, job % blocks);
            let columns = block * per_job..pixels.min((block + 1) * per_job);
            #[allow(unsafe_code)] // threads write rectangles, which are not slices
            // SAFETY: every job has its own pixels of its own picture.
            let y = unsafe { y.part(item * self.c_out..(item + 1) * self.c_out, columns.clone()) };
            let windows = Windows { x: &x[item * input..][..input], geometry, size: self.size };
            let first = item * self.c_out * pixels + columns.start;
            self.job(&windows, bands.as_ref(), columns, |channel, row| finish.apply(row, first + channel * pixels), y);
        });
    }

    fn job(
        &self,
        windows: &Windows<'_>,
        bands: Option<&Bands>,
        pixels: Range<usize>,
        finish: impl Fn(usize, &mut [f32]),
        mut y: Plane<'_>,
    ) {
        let (mr, nr) = (self.kernel.mr, self.kernel.nr);
        let (m, n, k_all) = (self.c_out, pixels.len(), self.deep() * self.size * self.size);
        let level = m.next_multiple_of(mr) * n.next_multiple_of(nr);
        let right = bands.map_or(n.div_ceil(nr) * Panels::stride(nr), Bands::len);
        scratch::with([right, Sums::PASSING + level], |[right, memory]| {
            let mut sums = Sums::new(memory, m, level, self.kernel);
            for first in (0..k_all).step_by(bands.map_or(K_STEP, Bands::step)) {
                let k = first..k_all.min(first + bands.map_or(K_STEP, Bands::step));
                match bands {
                    Some(bands) => bands.fill(right, windows, k.clone(), pixels.clone()),
                    None => windows::pack(windows, &mut Panels { memory: right, nr }, k.clone(), pixels.clone()),
                }
                for block in (0..m).step_by(ROWS / mr * mr) {
                    let block = block..m.min(block + ROWS / mr * mr);
                    for (panel, column) in (0..n).step_by(nr).enumerate() {
                        let columns = column..n.min(column + nr);
                        let right = &right[bands.map_or(panel * Panels::stride(nr), |bands| bands.start(pixels.start, column))..];
                        for row in block.clone().step_by(mr) {
                            let rows = row..block.end.min(row + mr);
                            let weight = &self.weight.as_slice()[self.kernel.input_len(row * k_all + first * mr)..];
                            let (tile, sums) = sums.tile(Place::Depth(0), rows, columns.clone());
                            let (fresh, soon) = (first == 0, Soon { sums, ..Soon::default() });
                            match bands {
                                Some(bands) => self.kernel.run_at(k.len(), weight, (right, bands.places()), tile, fresh, soon),
                                None => self.kernel.run(k.len(), weight, right, tile, fresh, soon),
                            }
                        }
                    }
                }
            }
            sums.write(&mut y, |channel, row| {
                if let Some(bias) = &self.bias {
                    row.iter_mut().for_each(|y| *y += bias[channel]);
                }
                finish(channel, row);
            });
        });
    }
}

/// Channels, or pairs of them.
fn channels(kernel: &MicroKernel, channels: usize) -> usize {
    if kernel.pairs() { channels.div_ceil(2) } else { channels }
}

/// `x: [channels, area]` as pairs of channels, the last one beside zeros if it has no neighbour.
fn pair_channels(x: &[f32], [channels, area]: [usize; 2], pairs: &mut [f32]) {
    let channel = |channel: usize| &x[channel * area..][..area];
    for (at, pairs) in pairs.chunks_exact_mut(area).enumerate() {
        let next = 2 * at + 1;
        narrow_rows(channel(2 * at), (next < channels).then(|| channel(next)), pairs);
    }
}

/// Pixels of each job: whole panels, and enough jobs for every thread.
fn jobs_of(pixels: usize, batch: usize, nr: usize) -> usize {
    let threads = rayon::current_num_threads();
    let even = (pixels * batch).div_ceil(2 * threads).next_multiple_of(nr);
    even.min(PIXELS)
}

impl std::fmt::Debug for Conv2d {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Conv2d([{}, {}, {size}, {size}], {:?})", self.c_out, self.c_in, self.kernel, size = self.size)
    }
}

#[cfg(test)]
mod tests;
