//! How windows lie on a picture.

use crate::conv::Geometry;

/// Of a kernel, or of the four of a picture of twice the size, whose windows lie beside one another's.
#[derive(Clone, Copy, Debug)]
pub(super) struct Laid {
    /// Height and width of the picture.
    pub(super) input: [usize; 2],
    /// From one output pixel's window to the next's.
    pub(super) stride: usize,
    /// Zeros above and to the left of the picture.
    pub(super) before: [usize; 2],
    /// Zeros below and to the right.
    pub(super) after: usize,
    /// Height and width of a window.
    pub(super) size: usize,
    /// How far some kernels' windows are below the others', or to the right of them.
    pub(super) spread: usize,
    /// Height and width of one kernel's output.
    pub(super) output: [usize; 2],
}

impl Laid {
    /// One kernel of `size` by `size`.
    pub(super) fn once(geometry: Geometry, size: usize) -> Self {
        let Geometry { input, stride, before, after } = geometry;
        Self { input, stride, before: [before; 2], after, size, spread: 0, output: geometry.output(size) }
    }

    /// Pixels of the output.
    pub(super) fn pixels(&self) -> usize {
        self.output.iter().product()
    }

    /// How far a kernel's windows are below and to the right of the first one's: 0 is the upper left one, then rows.
    pub(super) fn shift(&self, phase: usize) -> [usize; 2] {
        [phase / 2 * self.spread, phase % 2 * self.spread]
    }

    /// The windows of one kernel alone.
    pub(super) fn of_phase(self, phase: usize) -> Self {
        let [down, right] = self.shift(phase);
        let [above, left] = self.before;
        Self { before: [above - down, left - right], spread: 0, ..self }
    }
}
