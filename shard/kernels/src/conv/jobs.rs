//! How an output is cut into jobs: rectangles, where windows read the picture in place and so share what they see above and below as well, or
//! runs of pixels.

use std::ops::Range;

use crate::conv::laid::Laid;
use crate::conv::{Conv2d, bands};

/// Floats of the right side of a job at most, while it has more than [`FEWEST`] pixels: 512 KiB of the second-level cache.
const MOST: usize = 1 << 17;
/// The same of what is copied for windows, which each tile's pixels read in one piece.
const MOST_COPIED: usize = 2 * MOST;
/// Pixels that a job has at least, where there are so many: all weights pass them.
const FEWEST: usize = 64;
/// Columns of a rectangle at most: results of a line are written beside each other, and what windows see beside it is little.
const COLUMNS: usize = 128;

/// The jobs of one picture: `down` by `across`, which differ by one line at most.
pub(super) struct Jobs {
    /// Height and width of the output; of runs, one line of all pixels.
    output: [usize; 2],
    down: usize,
    /// Columns of each.
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
        let (nr, threads) = (conv.kernel.nr, rayon::current_num_threads());
        let pixels = (laid.pixels() * batch).div_ceil(2 * threads).next_multiple_of(nr);
        if !in_place {
            let of_pixel = conv.deep() * laid.size * laid.size * conv.phases.len().min(2);
            return Self {
                output: [1, laid.pixels()],
                down: 1,
                columns: pixels.min((MOST_COPIED / of_pixel).max(FEWEST) / nr * nr),
            };
        }
        let fits = |columns: &usize| laid.output[1].is_multiple_of(*columns);
        let columns = (nr..=COLUMNS.min(pixels)).step_by(nr).filter(fits).last().unwrap_or(nr);
        // What windows of as many lines see, without the last one's.
        let seen =
            (MOST / (conv.deep() * bands::line(laid, columns))).saturating_sub(bands::seen(laid) - 1).max(FEWEST / columns);
        let height = laid.output[0];
        let mut jobs = Self { output: laid.output, down: height.div_ceil((pixels / columns).min(seen).max(1)), columns };
        // Few jobs: as many as keep every thread busy to the end.
        let uneven = |jobs: &Self| batch * jobs.count() < 8 * threads && !(batch * jobs.count()).is_multiple_of(threads);
        while uneven(&jobs) && jobs.down < height {
            jobs.down += 1;
        }
        jobs
    }

    /// How many there are.
    pub(super) fn count(&self) -> usize {
        self.down * self.across()
    }

    /// Most lines and columns that one has.
    pub(super) fn size(&self) -> [usize; 2] {
        [self.output[0].div_ceil(self.down), self.columns]
    }

    pub(super) fn area(&self, job: usize) -> Area {
        let [height, width] = self.output;
        let (down, column) = (job / self.across(), job % self.across() * self.columns);
        let [line, end] = [down, down + 1].map(|down| height * down / self.down);
        Area { first: line * width + column, lines: end - line, columns: self.columns.min(width - column), width }
    }

    fn across(&self) -> usize {
        self.output[1].div_ceil(self.columns)
    }
}

impl Area {
    pub(super) fn pixels(&self) -> usize {
        self.lines * self.columns
    }

    /// One of them, in the output.
    pub(super) fn pixel(&self, at: usize) -> usize {
        self.first + at / self.columns * self.width + at % self.columns
    }

    /// Some of them that follow each other, line by line of an output that is `width` wide: how many are before them, and where they are there.
    pub(super) fn runs(&self, pixels: Range<usize>, width: usize) -> impl Iterator<Item = (usize, Range<usize>)> {
        let (first, mut done) = (self.pixel(pixels.start), 0);
        std::iter::from_fn(move || {
            let (before, at) = (done, first + done);
            let len = (width - at % width).min(pixels.len() - done);
            done += len;
            (len > 0).then_some((before, at..at + len))
        })
    }
}
