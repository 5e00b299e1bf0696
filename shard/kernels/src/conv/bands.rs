//! A picture as the right side of a product without a copy for each place of a window: what a job's windows look at lies in bands, the
//! lines of each channel with the zeros around them, and a row of the right side is a piece of a line.

use crate::conv::doubling::PHASES;
use crate::conv::jobs::Area;
use crate::conv::laid::Laid;
use crate::conv::windows::Windows;
use crate::cpu;
use crate::gemm::micro::{MicroKernel, Places};
use crate::gemm::narrow_rows;

/// Floats of a line of the caches.
const LINE: usize = 16;

/// How many channels ahead of the one that is copied are fetched: they are too far apart for the CPU to foresee.
const AHEAD: usize = 6;

/// Whether pictures can be read in place: where windows are side by side, of more than one element (which is copied once in any case), and
/// come in whole tiles.
pub(super) fn fit(laid: &Laid, kernel: &MicroKernel) -> bool {
    kernel.reads_places() && laid.stride == 1 && laid.size > 1 && laid.output[1].is_multiple_of(kernel.nr)
}

/// Height and width of the windows of all kernels together.
pub(super) fn seen(laid: &Laid) -> usize {
    laid.size + laid.spread
}

/// Floats from a line of a job's bands to the next, if it has so many columns.
pub(super) fn line(laid: &Laid, columns: usize) -> usize {
    odd(columns + seen(laid) - 1)
}

/// The next odd multiple of a line of the caches, so that neither lines nor channels are in one another's way there.
fn odd(floats: usize) -> usize {
    floats.div_ceil(LINE) / 2 * 2 * LINE + LINE
}

/// How bands lie: `[channel][line][column]`, of all channels, or of pairs of them.
pub(super) struct Bands {
    /// Whether two channels of the picture are one of the bands.
    pairs: bool,
    /// For each element of `[channels, size, size]`.
    places: Places,
    channels: usize,
    /// Floats from a line to the next, and from a channel to the next.
    strides: [usize; 2],
    /// From the first kernel's windows to each one's.
    shifts: [usize; PHASES],
    /// Width of the output.
    width: usize,
    /// Height and width of all kernels' windows together.
    seen: usize,
}

impl Bands {
    /// Of so many channels, or `pairs` of the picture's, for jobs of so many lines and columns at most, where they [`fit`].
    pub(super) fn of(laid: &Laid, pairs: bool, channels: usize, [lines, columns]: [usize; 2]) -> Self {
        let (size, seen, line) = (laid.size, seen(laid), line(laid, columns));
        let channel = odd((lines + seen - 1) * line);
        let of_channel = |channel_at: usize| (0..size).flat_map(move |ky| (0..size).map(move |kx| channel_at + ky * line + kx));
        let places = Places::new((0..channels).flat_map(|at| of_channel(at * channel)).collect());
        let shifts = std::array::from_fn(|phase| {
            let [down, right] = laid.shift(phase);
            down * line + right
        });
        Self { pairs, places, channels, strides: [line, channel], shifts, width: laid.output[1], seen }
    }

    /// Floats of all bands.
    pub(super) fn len(&self) -> usize {
        self.channels * self.strides[1]
    }

    /// Where rows of the right side begin, counted from [`Self::start`].
    pub(super) fn places(&self) -> &Places {
        &self.places
    }

    /// Where the window of a kernel begins of a job's pixel `at`.
    pub(super) fn start(&self, phase: usize, area: &Area, at: usize) -> usize {
        at / area.columns * self.strides[0] + at % area.columns + self.shifts[phase]
    }

    /// What the windows of a job look at.
    pub(super) fn fill(&self, memory: &mut [f32], windows: &Windows<'_>, area: &Area) {
        let (top, left) = (area.first / self.width, area.first % self.width);
        let (lines, seen) = (area.lines + self.seen - 1, area.columns + self.seen - 1);
        let of_each = if self.pairs { 2 } else { 1 };
        for (channel, band) in memory.chunks_exact_mut(self.strides[1]).take(self.channels).enumerate() {
            for (line, to) in band.chunks_exact_mut(self.strides[0]).take(lines).enumerate() {
                let piece = |channel: usize| windows.seen([channel, top + line, left], seen);
                for soon in of_each * (channel + AHEAD)..of_each * (channel + AHEAD + 1) {
                    cpu::fetch(bytemuck::cast_slice(piece(soon).1));
                }
                let (zeros, from) = piece(of_each * channel);
                let (before, rest) = to[..seen].split_at_mut(zeros);
                let (inside, after) = rest.split_at_mut(from.len());
                before.fill(0.0);
                after.fill(0.0);
                if self.pairs {
                    let (_, upper) = piece(2 * channel + 1);
                    narrow_rows(from, (!upper.is_empty()).then_some(upper), inside);
                } else {
                    inside.copy_from_slice(from);
                }
            }
        }
    }
}
