//! A picture as the right side of a product without a copy for each place of a window: what a job's windows look at lies in bands, the
//! lines of each channel with the zeros around them, and a row of the right side is a piece of a line.

use std::ops::Range;

use crate::conv::doubling::PHASES;
use crate::conv::laid::Laid;
use crate::conv::windows::{Windows, copy};
use crate::cpu::vectorised;
use crate::gemm::K_STEP;
use crate::gemm::micro::{MicroKernel, Places};

/// Floats of a line of the caches.
const LINE: usize = 16;

/// How bands lie: `[channel][line][column]`, of the channels of one step of K.
pub(super) struct Bands {
    /// For each element of `[channels, size, size]`.
    places: Places,
    channels: usize,
    /// Columns of the output that a job has of each of its lines.
    columns: usize,
    /// Floats from a line to the next, and from a channel to the next.
    strides: [usize; 2],
    /// From the first kernel's windows to each one's.
    shifts: [usize; PHASES],
    /// Width of the output.
    width: usize,
    /// Height and width of a window.
    size: usize,
    /// Those of all kernels' windows together.
    seen: usize,
}

impl Bands {
    /// For jobs of `pixels`, from multiples of them on. None where windows are not side by side, are of one element (which is copied once
    /// in any case), or do not come in whole tiles.
    pub(super) fn of(laid: &Laid, kernel: &MicroKernel, pixels: usize) -> Option<Self> {
        let (size, [_, width]) = (laid.size, laid.output);
        let (channels, seen) = (K_STEP / (size * size), size + laid.spread);
        let fits = laid.stride == 1 && size > 1 && channels > 0 && width.is_multiple_of(kernel.nr);
        if !fits || !kernel.reads_places() {
            return None;
        }
        let (lines, columns) = if width.is_multiple_of(pixels) {
            (1, pixels)
        } else if pixels.is_multiple_of(width) {
            (pixels / width, width)
        } else {
            ((pixels - 1).div_ceil(width) + 1, width)
        };
        // Odd multiples of a line of the caches, so that neither lines nor channels are in one another's way there.
        let odd = |floats: usize| floats.div_ceil(LINE) / 2 * 2 * LINE + LINE;
        let line = odd(columns + seen - 1);
        let channel = odd((lines + seen - 1) * line);
        let of_channel = |channel_at: usize| (0..size).flat_map(move |ky| (0..size).map(move |kx| channel_at + ky * line + kx));
        let places = Places::new((0..channels).flat_map(|at| of_channel(at * channel)).collect());
        let shifts = std::array::from_fn(|phase| {
            let [down, right] = laid.shift(phase);
            down * line + right
        });
        Some(Self { places, channels, columns, strides: [line, channel], shifts, width, size, seen })
    }

    /// Floats of all bands of a step.
    pub(super) fn len(&self) -> usize {
        self.channels * self.strides[1]
    }

    /// Elements of whole channels that are passed at once.
    pub(super) fn step(&self) -> usize {
        self.channels * self.size * self.size
    }

    /// Where rows of the right side begin, counted from [`Self::start`].
    pub(super) fn places(&self) -> &Places {
        &self.places
    }

    /// Where the window of a kernel begins of the pixel that is `at` after the `first` one of a job.
    pub(super) fn start(&self, phase: usize, first: usize, at: usize) -> usize {
        let [top, left] = self.corner(first);
        let (row, column) = ((first + at) / self.width, (first + at) % self.width);
        (row - top) * self.strides[0] + column - left + self.shifts[phase]
    }

    /// The row and the column of the output at which the bands of a job begin.
    fn corner(&self, first: usize) -> [usize; 2] {
        let whole_lines = self.columns == self.width;
        [first / self.width, if whole_lines { 0 } else { first % self.width }]
    }

    /// The bands of the channels of `k` (whole ones) that the windows of a job's `pixels` look at.
    pub(super) fn fill(&self, memory: &mut [f32], windows: &Windows<'_>, k: Range<usize>, pixels: Range<usize>) {
        let area = self.size * self.size;
        let [top, left] = self.corner(pixels.start);
        let (lines, seen) = ((pixels.end - 1) / self.width - top + self.seen, self.columns + self.seen - 1);
        for (channel, band) in (k.start / area..k.end / area).zip(memory.chunks_exact_mut(self.strides[1])) {
            for (line, to) in band.chunks_exact_mut(self.strides[0]).take(lines).enumerate() {
                fill_line(windows, [channel, top + line, left], &mut to[..seen]);
            }
        }
    }
}

vectorised! {
    /// A piece of a line that windows are laid on, from a column on.
    fn fill_line(windows: &Windows<'_>, at: [usize; 3], to: &mut [f32]) {
        let ([channel, line, column], Laid { input: [h, w], before: [above, before], .. }) = (at, windows.laid);
        let line = line.wrapping_sub(above);
        if line >= h {
            return to.fill(0.0);
        }
        let from = &windows.x[(channel * h + line) * w..][..w];
        let zeros = before.saturating_sub(column).min(to.len());
        let end = (w + before).saturating_sub(column).clamp(zeros, to.len());
        to[..zeros].fill(0.0);
        to[end..].fill(0.0);
        let (to, first) = (&mut to[zeros..end], (column + zeros).wrapping_sub(before));
        if !to.is_empty() {
            copy(to, &from[first..]);
        }
    }
}
