//! Results that grow, tile by tile.

use std::mem::MaybeUninit;
use std::ops::Range;

use crate::cpu::vectorised;
use crate::gemm::micro::{MAX_TILE, MicroKernel};
use crate::gemm::plane::bias_of;
use crate::gemm::{Plane, Rows};
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

    /// At most `mr` rows and `nr` columns, from multiples of these on, and what lies behind them: the next tile down.
    pub(crate) fn tile(&mut self, place: Place, rows: Range<usize>, columns: Range<usize>) -> (Plane<'_>, &[f32]) {
        let at = self.start(place, &rows, &columns);
        let (tile, next) = self.memory[at..].split_at_mut(rows.len() * self.kernel.nr);
        (Plane::of(tile, self.kernel.nr).narrow(columns.len()), &next[..next.len().min(self.kernel.mr * self.kernel.nr)])
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

    /// Puts the complete sums of columns from `column` on where they belong: to each row its `bias` is added, if there are any, and then what
    /// `more` has for it; `done` gets it while it is near.
    pub(crate) fn write<'r>(
        &self,
        column: usize,
        y: &mut Plane<'_>,
        bias: &[f32],
        more: impl Fn(usize) -> Option<&'r [f32]>,
        done: impl Fn(&mut [f32]),
    ) {
        let (nr, panel) = (self.kernel.nr, self.kernel.nr * self.rows.next_multiple_of(self.kernel.mr));
        let first = self.start(Place::Depth(0), &(0..0), &(column..column));
        for row in 0..self.rows {
            join_plus(&self.memory[first + row * nr..], [nr, panel], bias_of(bias, row), more(row), y.unread_row(row));
            done(y.row_mut(row));
        }
    }

    /// The complete sums of all rows at a depth, of the columns of one panel from `column` on.
    pub(crate) fn panel(&self, depth: usize, column: usize) -> Rows<'_> {
        let at = self.start(Place::Depth(depth), &(0..0), &(column..column));
        Rows::new(&self.memory[at..], self.rows, self.kernel.nr)
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
    /// Pieces of `len`, `apart` from each other, one after the other; to all of them `bias` is added, and then `more`.
    fn join_plus(from: &[f32], len_apart: [usize; 2], bias: f32, more: Option<&[f32]>, to: &mut [MaybeUninit<f32>]) {
        let [len, apart] = len_apart;
        assert!(more.is_none_or(|more| more.len() == to.len()), "as many more");
        let pieces = (0..).step_by(apart).zip(to.chunks_mut(len));
        let Some(more) = more else {
            return pieces.for_each(|(at, to)| {
                to.iter_mut().zip(&from[at..]).for_each(|(to, from)| *to = MaybeUninit::new(from + bias));
            });
        };
        for ((at, to), more) in pieces.zip(more.chunks(len)) {
            to.iter_mut().zip(&from[at..]).zip(more).for_each(|((to, from), more)| *to = MaybeUninit::new(from + bias + more));
        }
    }
}
