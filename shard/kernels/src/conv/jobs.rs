//! How an output is cut into jobs: rectangles, where windows read the picture in place and so share what they see above and below as well, or
//! runs of pixels.

use std::ops::Range;

use crate::conv::Conv2d;
use crate::conv::laid::Laid;

/// Sums of a job at most, while it has more than [`FEWEST`] pixels: 512 KiB of the second-level cache.
const SUMS: usize = 1 << 17;
/// Pixels that a job has at most and at least, where there are so many.
const MOST: usize = 256;
const FEWEST: usize = 64;
/// Columns of a rectangle at most: results of a line are written in one go, and what windows see beside it is little.
const COLUMNS: usize = 128;

/// The jobs of one picture.
pub(super) struct Jobs {
    /// Height and width of the output; of runs, one line of all pixels.
    output: [usize; 2],
    /// Those of each job.
    lines: usize,
    columns: usize,
}

/// The pixels of one job.
#[derive(Clone, Copy, Debug)]
pub(super) struct Area {
    /// The upper left one.
    pub(super) first: usize,
    pub(super) lines: usize,
    /// Of each line.
    pub(super) columns: usize,
    /// From a line to the next.
    width: usize,
}

impl Jobs {
    /// Whole panels of `conv`'s kernel, and enough jobs for every thread.
    pub(super) fn of(laid: &Laid, conv: &Conv2d, batch: usize, in_place: bool) -> Self {
        let nr = conv.kernel.nr;
        let most = (SUMS / (conv.phases.len() * conv.c_out)).clamp(FEWEST, MOST) / nr * nr;
        let even = (laid.pixels() * batch).div_ceil(2 * rayon::current_num_threads()).next_multiple_of(nr);
        let pixels = even.min(most.max(nr));
        if !in_place {
            return Self { output: [1, laid.pixels()], lines: 1, columns: pixels };
        }
        let fits = |columns: &usize| laid.output[1].is_multiple_of(*columns);
        let columns = (nr..=COLUMNS.min(pixels)).step_by(nr).filter(fits).last().unwrap_or(nr);
        Self { output: laid.output, lines: (pixels / columns).clamp(1, laid.output[0]), columns }
    }

    /// How many there are.
    pub(super) fn count(&self) -> usize {
        self.output[0].div_ceil(self.lines) * self.across()
    }

    /// Lines and columns of each that is not at the edge.
    pub(super) fn size(&self) -> [usize; 2] {
        [self.lines, self.columns]
    }

    pub(super) fn area(&self, job: usize) -> Area {
        let [height, width] = self.output;
        let (line, column) = (job / self.across() * self.lines, job % self.across() * self.columns);
        let (lines, columns) = (self.lines.min(height - line), self.columns.min(width - column));
        Area { first: line * width + column, lines, columns, width }
    }

    fn across(&self) -> usize {
        self.output[1].div_ceil(self.columns)
    }
}

impl Area {
    pub(super) fn pixels(&self) -> usize {
        self.lines * self.columns
    }

    /// Pixels that follow each other, and how many of the job's are before them.
    pub(super) fn runs(self) -> impl Iterator<Item = (usize, Range<usize>)> {
        (0..self.lines).map(move |line| {
            let first = self.first + line * self.width;
            (line * self.columns, first..first + self.columns)
        })
    }
}
