//! Results that grow, tile by tile.

use std::mem::MaybeUninit;
use std::ops::Range;

use crate::cpu::vectorised;
use crate::gemm::Plane;
use crate::gemm::micro::{MAX_TILE, MicroKernel};
use crate::rows;

/// The sums of one job that are not complete: for each depth of its tree tile by tile, and a tile in one piece. In the result, rows of a
/// tile are often a power of two apart, and so in one another's way in the first-level cache.
pub(crate) struct Sums<'a> {
    rows: usize,
    /// First a tile that is passing, then the depths.
    memory: &'a mut [f32],
    /// Floats of a depth.
    level: usize,
    kernel: &'static MicroKernel,
}

/// Where the sums of a tile are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Place {
    /// Those that wait, or grow in several steps.
    Depth(usize),
    /// Those that are merged before the next tile is begun.
    Passing,
}

impl<'a> Sums<'a> {
    /// Floats before the depths.
    pub(crate) const PASSING: usize = MAX_TILE;

    /// Of a block of `rows` rows, each depth of which has `level` floats.
    pub(crate) fn new(memory: &'a mut [f32], rows: usize, level: usize, kernel: &'static MicroKernel) -> Self {
        Self { rows, memory, level, kernel }
    }

    /// At most `mr` rows and `nr` columns, from multiples of these on.
    pub(crate) fn tile(&mut self, place: Place, rows: Range<usize>, columns: Range<usize>) -> Plane<'_> {
        let at = self.start(place, &rows, &columns);
        Plane::of(&mut self.memory[at..][..rows.len() * self.kernel.nr], self.kernel.nr).narrow(columns.len())
    }

    /// Adds a tile to the one at a depth below it: earlier chunks on the left.
    pub(crate) fn merge(&mut self, place: Place, below: usize, rows: Range<usize>, columns: Range<usize>) {
        let at = self.start(place, &rows, &columns);
        let below = self.start(Place::Depth(below), &rows, &columns);
        let (len, (first, second)) = (rows.len() * self.kernel.nr, self.memory.split_at_mut(at.max(below)));
        let (own, below) = if at < below { (&mut first[at..], second) } else { (second, &mut first[below..]) };
        // In one piece, with what stands in the places of absent columns.
        rows::shift(&mut below[..len], &own[..len]);
    }

    /// Puts the complete sums where they belong: to each row `more` is added, if there is any. `done` gets it while it is near.
    pub(crate) fn write(&self, y: &mut Plane<'_>, more: Option<&[f32]>, done: impl Fn(&mut [f32])) {
        let (nr, panel) = (self.kernel.nr, self.kernel.nr * self.rows.next_multiple_of(self.kernel.mr));
        for row in 0..self.rows {
            join_plus(&self.memory[Self::PASSING + row * nr..], [nr, panel], more, y.unread_row(row));
            done(y.row_mut(row));
        }
    }

    fn start(&self, place: Place, rows: &Range<usize>, columns: &Range<usize>) -> usize {
        let Place::Depth(depth) = place else { return 0 };
        Self::PASSING
            + depth * self.level
            + rows.start * self.kernel.nr
            + columns.start * self.rows.next_multiple_of(self.kernel.mr)
    }
}

vectorised! {
    /// Pieces of `len`, `apart` from each other, one after the other; to all of them together `more` is added.
    fn join_plus(from: &[f32], len_apart: [usize; 2], more: Option<&[f32]>, to: &mut [MaybeUninit<f32>]) {
        let [len, apart] = len_apart;
        assert!(more.is_none_or(|more| more.len() == to.len()), "as many more");
        let pieces = (0..).step_by(apart).zip(to.chunks_mut(len));
        let Some(more) = more else {
            return pieces.for_each(|(at, to)| {
                to.iter_mut().zip(&from[at..]).for_each(|(to, from)| *to = MaybeUninit::new(*from));
            });
        };
        for ((at, to), more) in pieces.zip(more.chunks(len)) {
            to.iter_mut().zip(&from[at..]).zip(more).for_each(|((to, from), more)| *to = MaybeUninit::new(from + more));
        }
    }
}
