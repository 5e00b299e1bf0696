//! A picture as the right side of a product: a row for each element of a window, a column for each pixel.

use std::ops::Range;

use crate::conv::laid::Laid;
use crate::cpu::vectorised;

/// One picture, seen through the windows of its output pixels.
pub(super) struct Windows<'a> {
    /// `[C, H, W]`.
    pub(super) x: &'a [f32],
    pub(super) laid: Laid,
}

impl Windows<'_> {
    /// What is seen of a piece of a line, from a channel's line and column on: how many zeros, and then what of the picture; the rest is zeros,
    /// and all of it of a channel that is not there.
    #[inline(always)]
    pub(super) fn seen(&self, [channel, line, column]: [usize; 3], len: usize) -> (usize, &[f32]) {
        let Laid { input: [h, w], before: [above, before], .. } = self.laid;
        let line = line.wrapping_sub(above);
        let zeros = before.saturating_sub(column).min(len);
        let end = (w + before).saturating_sub(column).clamp(zeros, len);
        if line >= h || zeros == end {
            return (zeros, &[]);
        }
        let first = (channel * h + line) * w + column + zeros - before;
        (zeros, self.x.get(first..first + end - zeros).unwrap_or_default())
    }

    /// Those of one kernel alone.
    pub(super) fn of_phase(&self, phase: usize) -> Self {
        Self { x: self.x, laid: self.laid.of_phase(phase) }
    }
}

/// `[columns / nr][k][nr]`.
pub(super) struct Panels<'a> {
    pub(super) memory: &'a mut [f32],
    pub(super) nr: usize,
    pub(super) k: usize,
}

impl Panels<'_> {
    /// Floats from one panel to the next: a line more than a panel, or the same row of all would lie in one place of the caches.
    pub(super) const fn stride(nr: usize, k: usize) -> usize {
        nr * k + 16
    }

    /// Calls `f` with each run of the columns `to` of row `k` that lies in one panel, and where it begins among them.
    #[inline(always)]
    fn each(&mut self, k: usize, to: Range<usize>, mut f: impl FnMut(&mut [f32], usize)) {
        if to.is_empty() {
            return;
        }
        let (nr, mut at) = (self.nr, to.start);
        // One division for all panels: it takes as long as copying one.
        let (panel, mut inside) = (at / nr, at % nr);
        let apart = Self::stride(nr, self.k);
        let mut row = panel * apart + k * nr;
        while at < to.end {
            let len = (nr - inside).min(to.end - at);
            f(&mut self.memory[row + inside..][..len], at - to.start);
            (at, inside, row) = (at + len, 0, row + apart);
        }
    }
}

vectorised! {
    /// For each element `k` of `[C, size, size]` what the windows of `pixels` show there. A line of the picture is read as a whole, since
    /// those of other channels are in its way in the caches.
    pub(super) fn pack(windows: &Windows<'_>, panels: &mut Panels<'_>, pixels: Range<usize>) {
        let Laid { stride, size, output: [_, width], .. } = windows.laid;
        let whole = pixels.len().next_multiple_of(panels.nr);
        for k in 0..panels.k {
            let (channel, ky, kx) = (k / (size * size), k / size % size, k % size);
            let mut pixel = pixels.start;
            while pixel < pixels.end {
                // The pixels of one output row.
                let (row, column) = (pixel / width, pixel % width);
                let run = (width - column).min(pixels.end - pixel);
                let to = pixel - pixels.start..pixel - pixels.start + run;
                pixel += run;
                let (line, first) = (row * stride + ky, column * stride + kx);
                let seen = (run - 1) * stride + 1;
                let (zeros, line) = windows.seen([channel, line, first], seen);
                if stride != 1 {
                    panels.each(k, to, |out, at| {
                        for (i, out) in (at..).zip(out) {
                            *out = (i * stride).checked_sub(zeros).and_then(|x| line.get(x)).copied().unwrap_or(0.0);
                        }
                    });
                    continue;
                }
                let inside = to.start + zeros..to.start + zeros + line.len();
                let outside = [to.start..inside.start, inside.end..to.end];
                outside.into_iter().for_each(|zeros| panels.each(k, zeros, |out, _| out.fill(0.0)));
                panels.each(k, inside, |out, at| copy(out, &line[at..]));
            }
            panels.each(k, pixels.len()..whole, |out, _| out.fill(0.0));
        }
    }
}

/// The beginning of `from`, without a call where it is long.
#[inline(always)]
fn copy(to: &mut [f32], from: &[f32]) {
    let from = &from[..to.len()];
    let (whole, rest) = to.as_chunks_mut::<16>();
    let (from, from_rest) = from.as_chunks::<16>();
    whole.iter_mut().zip(from).for_each(|(to, from)| *to = *from);
    rest.iter_mut().zip(from_rest).for_each(|(to, from)| *to = *from);
}
