//! Convolution in two dimensions, as a product whose right side is read from the picture while it is packed (implicit
//! im2col): weights are the rows, pixels the columns, so pictures stay `[C, H, W]`.
//!
//! Where windows lie side by side and in whole tiles, the right side is not even copied: it is read from the lines that a job's windows look at
//! (`conv/bands.rs`). A tile of channels by pixels is made in one go, in registers: what it reads of a job's pixels is in the second-level cache.
//!
//! A pixel of a channel is one chain over `[C_in, k, k]`, in that order: it depends on nothing beside its own window. In bf16 two channels go
//! together, as the halves of one: the chain is over `[C_in / 2, k, k]`, and the picture is rounded once, not for each window. In tiles of
//! bf16 32 channels go together (`conv/lines.rs`).
//!
//! A kernel for pictures of twice the size is four smaller ones (`conv/doubling.rs`).

use std::mem::MaybeUninit;
use std::ops::Range;

use crate::conv::bands::Bands;
use crate::conv::jobs::{Area, Jobs};
use crate::conv::laid::Laid;
use crate::conv::windows::{Panels, Windows};
use crate::gemm::micro::{MicroKernel, More, Panel, Takes, WAITING};
use crate::gemm::{Order, Plane, Rows, SharedPlane, bf16, narrow_rows, pack_tiles};
use crate::memory::{Output, seen};
use crate::scratch::{Buffer, Lent};
use crate::{rows, scratch, threads};

mod bands;
mod doubling;
mod jobs;
mod laid;
mod lines;
mod windows;

/// Floats of weights that pass all of a job's pixels together, unless one tile has more: 256 KiB.
const NEAR: usize = 1 << 16;
/// Multiplications below which all stays on one thread.
const SMALL: usize = 1 << 19;

/// A kernel, packed once. `weight: [C_out, C_in, k, k]`, `bias: [C_out]`.
#[derive(Clone)]
pub struct Conv2d {
    /// One, or those of [`doubling`]. Each is the `a` of the kernel's tiles: rows of `C k k`, of [`Self::deep`] channels C; in tiles of bf16
    /// what [`lines::pack`] says.
    phases: Vec<Buffer>,
    bias: Option<Vec<f32>>,
    c_in: usize,
    c_out: usize,
    size: usize,
    kernel: &'static MicroKernel,
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
}

impl Geometry {
    /// Windows of `size` by `size` side by side, with as many zeros around as keep the size of a picture. `size` is odd.
    pub fn same(input: [usize; 2], size: usize) -> Self {
        Self { input, stride: 1, before: size / 2, after: size / 2 }
    }

    /// Height and width of the output of a kernel of `size` by `size`.
    fn output(&self, size: usize) -> [usize; 2] {
        self.input.map(|n| {
            let n = n + self.before + self.after;
            if n < size { 0 } else { (n - size) / self.stride + 1 }
        })
    }
}

impl Conv2d {
    /// Packs `weight: [c_out, c_in, size, size]`.
    pub fn pack(weight: &[f32], dims: [usize; 3], bias: Option<&[f32]>) -> Self {
        Self::pack_for(MicroKernel::best(), weight, dims, bias)
    }

    /// As [`Self::pack`], for products in bf16: pictures are rounded to it, sums are in f32.
    pub fn pack_pairs(order: Order, weight: &[bf16], dims: [usize; 3], bias: Option<&[f32]>) -> Self {
        Self::pack_for(MicroKernel::bf16(order), &widened(weight), dims, bias)
    }

    /// As [`Self::pack`], of a kernel that is laid on pictures of twice the size, each pixel repeated, so as to keep that size.
    pub fn pack_doubling(weight: &[f32], dims: [usize; 3], bias: Option<&[f32]>) -> Self {
        Self::pack_doubling_for(MicroKernel::best(), weight, dims, bias)
    }

    /// As [`Self::pack_doubling`], for products in bf16: sums of weights are rounded to it, those of a filter together.
    pub fn pack_doubling_pairs(order: Order, weight: &[bf16], dims: [usize; 3], bias: Option<&[f32]>) -> Self {
        Self::pack_doubling_for(MicroKernel::bf16(order), &widened(weight), dims, bias)
    }

    fn pack_for(kernel: &'static MicroKernel, weight: &[f32], [c_out, c_in, size]: [usize; 3], bias: Option<&[f32]>) -> Self {
        let phases = vec![pack_phase(kernel, weight, [c_out, c_in, size])];
        Self::of(kernel, phases, [c_out, c_in, size], bias)
    }

    fn pack_doubling_for(kernel: &'static MicroKernel, weight: &[f32], dims: [usize; 3], bias: Option<&[f32]>) -> Self {
        let ([c_out, c_in, size], window) = (dims, doubling::window(dims[2]));
        let mut kernels = doubling::kernels(weight, size);
        if kernel.pairs() {
            kernels.iter_mut().for_each(|weight| doubling::round_together(weight, window));
        }
        Self::of(kernel, kernels.iter().map(|weight| pack_phase(kernel, weight, [c_out, c_in, window])).collect(), dims, bias)
    }

    fn of(kernel: &'static MicroKernel, phases: Vec<Buffer>, [c_out, c_in, size]: [usize; 3], bias: Option<&[f32]>) -> Self {
        assert!(bias.is_none_or(|b| b.len() == c_out), "one bias for each of {c_out} channels");
        Self { phases, bias: bias.map(<[f32]>::to_vec), c_in, c_out, size, kernel }
    }

    /// Output and input channels, and the kernel's size.
    pub fn dims(&self) -> [usize; 3] {
        [self.c_out, self.c_in, self.size]
    }

    /// Height and width of the output.
    pub fn output(&self, geometry: Geometry) -> [usize; 2] {
        if self.doubles() { geometry.input.map(|n| 2 * n) } else { geometry.output(self.size) }
    }

    /// `x: [B, C_in, H, W]` gives `y: [B, C_out, H', W']`, `H'` and `W'` from [`Self::output`]. A doubling kernel takes only
    /// [`Geometry::same`]. If there is a `residual`, of the size of `y`, it is added after the bias.
    pub fn run<'a>(
        &self,
        x: &[f32],
        geometry: Geometry,
        residual: Option<&[f32]>,
        y: &'a mut (impl Output + ?Sized),
    ) -> &'a mut [f32] {
        self.run_on([self.c_in, x.len()], geometry, residual, y.unread(), |laid, y| match self.kernel.takes {
            Takes::Tiles => lines::convolve(self, x, laid, residual, y),
            Takes::Pairs | Takes::PairsByFloats if !bands::fit(&laid, self.kernel) => self.convolve_pairs(x, laid, residual, y),
            _ => self.convolve(x, self.kernel.pairs(), laid, residual, y),
        })
    }

    /// Whether pictures can be paired before they are convolved.
    pub fn takes_pairs(&self) -> bool {
        matches!(self.kernel.takes, Takes::Pairs | Takes::PairsByFloats)
    }

    /// As [`Self::run`], of a picture whose channels are [paired](crate::rows::group_norm_in_pairs): `x: [B, C_in / 2, H, W]`.
    ///
    /// # Panics
    /// When it does not [take](Self::takes_pairs) such.
    pub fn run_pairs<'a>(
        &self,
        x: &[f32],
        geometry: Geometry,
        residual: Option<&[f32]>,
        y: &'a mut (impl Output + ?Sized),
    ) -> &'a mut [f32] {
        assert!(self.takes_pairs(), "pairs of channels into {self:?}");
        let convolve = |laid, y: &mut [MaybeUninit<f32>]| self.convolve(x, false, laid, residual, y);
        self.run_on([self.deep(), x.len()], geometry, residual, y.unread(), convolve)
    }

    /// Has `convolve` write all of `y`, from a picture of `floats` in `channels` that is checked before.
    fn run_on<'a>(
        &self,
        [channels, floats]: [usize; 2],
        geometry: Geometry,
        residual: Option<&[f32]>,
        y: &'a mut [MaybeUninit<f32>],
        convolve: impl FnOnce(Laid, &mut [MaybeUninit<f32>]),
    ) -> &'a mut [f32] {
        assert!(residual.is_none_or(|residual| residual.len() == y.len()), "one to add to each result");
        let (pixels, area) = (self.output(geometry).iter().product::<usize>(), geometry.input.iter().product::<usize>());
        if y.is_empty() {
            return &mut [];
        }
        assert!(self.c_in > 0 && self.size > 0, "a kernel that looks at something");
        let batch = y.len() / (self.c_out * pixels);
        assert!(y.len() == batch * self.c_out * pixels && floats == batch * channels * area, "pictures of the geometry's size");
        let laid = if self.doubles() { doubling::laid(geometry, self.size) } else { Laid::once(geometry, self.size) };
        convolve(laid, y);
        #[allow(unsafe_code)] // floats from here on
        // SAFETY: every pixel of every channel is written, whichever way it is made.
        unsafe {
            seen(y)
        }
    }

    /// As [`Self::convolve`], of channels that are paired first.
    fn convolve_pairs(&self, x: &[f32], laid: Laid, residual: Option<&[f32]>, y: &mut [MaybeUninit<f32>]) {
        let area = laid.input.iter().product::<usize>();
        let batch = x.len() / (self.c_in * area);
        let mut lent = Lent::of(batch * self.deep() * area);
        threads::over_rows(lent.as_mut_slice(), area, |first, pairs| {
            for (at, pairs) in (first..).zip(pairs.chunks_exact_mut(area)) {
                let (item, channel) = (at / self.deep(), 2 * (at % self.deep()));
                let two = &x[(item * self.c_in + channel) * area..][..area * (self.c_in - channel).min(2)];
                pair_channels(two, [two.len() / area, area], pairs);
            }
        });
        self.convolve(lent.as_slice(), false, laid, residual, y);
    }

    /// Whether it is for pictures of twice the size.
    pub fn doubles(&self) -> bool {
        self.phases.len() > 1
    }

    /// Channels, or pairs of them.
    fn deep(&self) -> usize {
        channels(self.kernel, self.c_in)
    }

    /// Whether one thread is as fast as several, where they have to be woken.
    fn is_small(&self, results: usize) -> bool {
        results * self.c_in * self.size * self.size < SMALL
    }

    /// `x: [B, C, H, W]`, of [`Self::deep`] channels C, or of all of them if these are to be paired where they are read in place.
    fn convolve(&self, x: &[f32], in_floats: bool, laid: Laid, residual: Option<&[f32]>, y: &mut [MaybeUninit<f32>]) {
        let all = laid.pixels() * self.phases.len();
        let (batch, small) = (y.len() / (self.c_out * all), self.is_small(y.len()));
        let (in_place, input) = (bands::fit(&laid, self.kernel), x.len() / batch);
        let jobs = Jobs::of(&laid, self, batch, in_place);
        let bands = in_place.then(|| Bands::of(&laid, in_floats, self.deep(), jobs.size()));
        let y = SharedPlane::of(y, all);
        threads::over_jobs(batch * jobs.count(), small, |job| {
            let (item, area) = (job / jobs.count(), jobs.area(job % jobs.count()));
            let windows = Windows { x: &x[item * input..][..input], laid };
            let residual = residual.map(|residual| &residual[item * self.c_out * all..][..self.c_out * all]);
            self.job(&windows, bands.as_ref(), area, residual, |pixels| {
                #[allow(unsafe_code)] // threads write rectangles, which are not slices
                // SAFETY: every job has its own pixels of its own picture, and asks for those of one run at a time.
                unsafe {
                    y.part(item * self.c_out..(item + 1) * self.c_out, pixels)
                }
            });
        });
    }

    /// `y` lends all channels of the given pixels of the output; `residual` is of the whole picture.
    fn job<'y>(
        &self,
        windows: &Windows<'_>,
        bands: Option<&Bands>,
        area: Area,
        residual: Option<&[f32]>,
        y: impl Fn(Range<usize>) -> Plane<'y>,
    ) {
        let (kernel, nr, width) = (self.kernel, self.kernel.nr, windows.laid.output[1]);
        let (m, n, k) = (self.c_out, area.pixels(), self.deep() * windows.laid.size * windows.laid.size);
        let (height, all) = (tile_height(kernel, m), windows.laid.pixels() * self.phases.len());
        let (apart, panels) = (Panels::stride(nr, k), n.div_ceil(nr) * Panels::stride(nr, k));
        // Phases for even and for odd columns go together: their results lie by turns.
        let together = self.phases.len().min(2);
        let right = bands.map_or(together * panels, Bands::len);
        // Tiles whose weights stay near while a job's pixels pass, and so are made in one call.
        let of_tile = kernel.mr * kernel.input_len(k);
        let block = (NEAR / of_tile).clamp(1, m.div_ceil(height)) * height;
        scratch::with([right, block * nr, block * nr, WAITING], |[right, even, odd, waiting]| {
            if let Some(bands) = bands {
                bands.fill(right, windows, &area);
            }
            for (pass, phases) in self.phases.chunks(together).enumerate() {
                let first = pass * together;
                if bands.is_none() {
                    for (phase, memory) in (first..).zip(right.chunks_exact_mut(panels).take(together)) {
                        let pixels = area.first..area.first + n;
                        windows::pack(&windows.of_phase(phase), &mut Panels { memory, nr, k }, pixels);
                    }
                }
                for row in (0..m).step_by(block) {
                    let rows = row..m.min(row + block);
                    let bias = self.bias.as_ref().map(|bias| &bias[rows.clone()]);
                    for column in (0..n).step_by(nr) {
                        let columns = column..n.min(column + nr);
                        let mut product = |at: usize, c: &mut Plane<'_>, more: More<'_>| {
                            let weight = &phases[at].as_slice()[row / height * of_tile..];
                            let panel = match bands {
                                Some(bands) => Panel::at(&right[bands.start(first + at, &area, column)..], bands.places()),
                                None => Panel::from(&right[at * panels + column / nr * apart..]),
                            };
                            kernel.run_chunks((&[k], height), (weight, panel), waiting, c, more, &[]);
                        };
                        if !self.doubles() {
                            let pixels = area.pixel(column)..area.pixel(column) + columns.len();
                            let more = residual.map(|of| Rows::new(&of[row * all + pixels.start..], rows.len(), all));
                            product(0, &mut y(pixels).part(rows.clone(), 0..columns.len()), More { bias, rows: more });
                            continue;
                        }
                        let tiles = [&mut *even, &mut *odd].map(|tile| &mut tile[..rows.len() * nr]);
                        for (at, tile) in tiles.into_iter().enumerate() {
                            product(at, &mut Plane::of(tile, nr).narrow(columns.len()), More::default());
                        }
                        let by_turns = [&*even, &*odd].map(|tile| Rows::new(tile, rows.len(), nr));
                        for (at, run) in area.runs(columns, width) {
                            let pixels = doubling::pixels_of(&run, width, pass);
                            let mut y = y(pixels.clone());
                            let mut y = y.part(rows.clone(), 0..pixels.len());
                            y.interleave_rows_plus(by_turns, at, bias.unwrap_or_default());
                            add_rows(&mut y, |channel| residual.map(|of| &of[(row + channel) * all..][pixels.clone()]));
                        }
                    }
                }
            }
        });
    }
}

/// Adds to each row of results what there is for it.
fn add_rows<'r>(y: &mut Plane<'_>, more: impl Fn(usize) -> Option<&'r [f32]>) {
    for row in 0..y.rows() {
        if let Some(more) = more(row) {
            rows::shift(y.row_mut(row), more);
        }
    }
}

/// Channels of a tile: of all as many as of the next, or a last one of two would take as long as of six.
fn tile_height(kernel: &MicroKernel, c_out: usize) -> usize {
    c_out.div_ceil(c_out.div_ceil(kernel.mr).max(1)).max(1)
}

fn widened(weight: &[bf16]) -> Vec<f32> {
    weight.iter().map(|w| w.to_f32()).collect()
}

/// `weight: [c_out, c_in, size, size]` as [`Conv2d::phases`] says.
fn pack_phase(kernel: &'static MicroKernel, weight: &[f32], [c_out, c_in, size]: [usize; 3]) -> Buffer {
    if kernel.takes == Takes::Tiles {
        return lines::pack(kernel, weight, [c_out, c_in, size]);
    }
    let (k, deep) = (c_in * size * size, channels(kernel, c_in) * size * size);
    assert_eq!(weight.len(), c_out * k);
    let height = tile_height(kernel, c_out);
    let mut packed = Buffer::zeros(c_out.div_ceil(height) * kernel.input_len(kernel.mr * deep));
    let mut pairs = vec![0.0; if kernel.pairs() { c_out * deep } else { 0 }];
    if kernel.pairs() && k > 0 {
        let filters = weight.chunks_exact(k).zip(pairs.chunks_exact_mut(deep));
        filters.for_each(|(filter, pairs)| pair_channels(filter, [c_in, size * size], pairs));
    }
    let rows = Rows::new(if kernel.pairs() { &pairs } else { weight }, c_out, deep);
    pack_tiles(packed.as_mut_slice(), rows, deep, height, kernel);
    packed
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

impl std::fmt::Debug for Conv2d {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let name = if self.doubles() { "doubling Conv2d" } else { "Conv2d" };
        write!(f, "{name}([{}, {}, {size}, {size}], {:?})", self.c_out, self.c_in, self.kernel, size = self.size)
    }
}

#[cfg(test)]
mod tests;
