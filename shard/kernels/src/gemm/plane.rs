//! Rectangles of floats, rows a stride apart.
//!
//! A rectangle of results may be of memory that has not been written yet: it is copied to before anything looks at it.
#![allow(unsafe_code)] // a rectangle is not a slice, and threads write disjoint ones

use std::marker::PhantomData;
use std::mem::MaybeUninit;
use std::ops::Range;

use crate::cpu::vectorised;
use crate::gemm::Rows;

/// A rectangle that is written by one owner.
pub(crate) struct Plane<'a> {
    start: *mut f32,
    stride: usize,
    rows: usize,
    columns: usize,
    of: PhantomData<&'a mut [f32]>,
}

impl<'a> Plane<'a> {
    /// All of `data`, in rows of `stride`.
    pub(crate) fn of(data: &'a mut [f32], stride: usize) -> Self {
        Self { start: data.as_mut_ptr(), stride, rows: data.len() / stride.max(1), columns: stride, of: PhantomData }
    }

    pub(crate) fn rows(&self) -> usize {
        self.rows
    }

    pub(crate) fn columns(&self) -> usize {
        self.columns
    }

    pub(crate) fn stride(&self) -> usize {
        self.stride
    }

    /// Where it starts; its rows and columns may be written through it.
    pub(crate) fn as_mut_ptr(&mut self) -> *mut f32 {
        self.start
    }

    /// A part of it.
    pub(crate) fn part(&mut self, rows: Range<usize>, columns: Range<usize>) -> Plane<'_> {
        assert!(rows.start <= rows.end && rows.end <= self.rows, "rows {rows:?} of {}", self.rows);
        assert!(columns.start <= columns.end && columns.end <= self.columns, "columns {columns:?} of {}", self.columns);
        // SAFETY: a place inside the rectangle, or its end.
        let start = if rows.is_empty() || columns.is_empty() {
            self.start
        } else {
            unsafe { self.start.add(rows.start * self.stride + columns.start) }
        };
        Plane { start, stride: self.stride, rows: rows.len(), columns: columns.len(), of: PhantomData }
    }

    /// Its first columns.
    pub(crate) fn narrow(self, columns: usize) -> Self {
        assert!(columns <= self.columns, "{columns} columns of {}", self.columns);
        Self { columns, ..self }
    }

    #[inline(always)]
    pub(crate) fn row(&self, row: usize) -> &[f32] {
        assert!(row < self.rows, "row {row} of {}", self.rows);
        // SAFETY: the row is inside the rectangle, which is borrowed with `self`.
        unsafe { std::slice::from_raw_parts(self.start.add(row * self.stride), self.columns) }
    }

    #[inline(always)]
    pub(crate) fn row_mut(&mut self, row: usize) -> &mut [f32] {
        assert!(row < self.rows, "row {row} of {}", self.rows);
        // SAFETY: as above, and the borrow is exclusive.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(row * self.stride), self.columns) }
    }

    /// As [`Self::row_mut`], of what may not have been written yet.
    #[inline(always)]
    pub(crate) fn unread_row(&mut self, row: usize) -> &mut [MaybeUninit<f32>] {
        assert!(row < self.rows, "row {row} of {}", self.rows);
        // SAFETY: the row is inside the rectangle, which is borrowed with `self` alone.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(row * self.stride).cast(), self.columns) }
    }

    /// Rows of `from`, each times its factor.
    pub(crate) fn copy_rows_times(&mut self, from: Rows<'_>, factors: &[f32]) {
        assert!(from.count() == self.rows && factors.len() == self.rows, "a factor for each row");
        copy_rows_times(self, from, factors);
    }

    /// `self = other`, of the same size, and to each row its `bias`, if there are any.
    pub(crate) fn copy_rows_plus(&mut self, other: &Plane<'_>, bias: &[f32]) {
        assert!(self.rows == other.rows && self.columns == other.columns, "rectangles of the same size");
        copy_rows_plus(self, other, bias);
    }

    /// Values of `even` and of `odd` by turns, from column `from` of theirs on, and to each row its `bias`, if there are any.
    pub(crate) fn interleave_rows_plus(&mut self, [even, odd]: [Rows<'_>; 2], from: usize, bias: &[f32]) {
        assert!(self.columns.is_multiple_of(2) && even.count() >= self.rows && odd.count() >= self.rows, "as many of both");
        interleave_rows_plus(self, [even, odd], from, bias);
    }
}

vectorised! {
    fn copy_rows_times(to: &mut Plane<'_>, from: Rows<'_>, factors: &[f32]) {
        for (row, factor) in factors.iter().enumerate() {
            let from = from.part(row, (0, to.columns));
            to.unread_row(row).iter_mut().zip(from).for_each(|(to, from)| *to = MaybeUninit::new(from * factor));
        }
    }
}

vectorised! {
    fn copy_rows_plus(to: &mut Plane<'_>, from: &Plane<'_>, bias: &[f32]) {
        for row in 0..to.rows {
            let bias = bias_of(bias, row);
            for (to, from) in to.unread_row(row).iter_mut().zip(from.row(row)) {
                *to = MaybeUninit::new(*from + bias);
            }
        }
    }
}

vectorised! {
    fn interleave_rows_plus(to: &mut Plane<'_>, by_turns: [Rows<'_>; 2], from: usize, bias: &[f32]) {
        for row in 0..to.rows {
            let bias = bias_of(bias, row);
            let [even, odd] = by_turns;
            let (even, odd) = (even.part(row, (from, to.columns / 2)), odd.part(row, (from, to.columns / 2)));
            for ((to, even), odd) in to.unread_row(row).as_chunks_mut::<2>().0.iter_mut().zip(even).zip(odd) {
                *to = [MaybeUninit::new(even + bias), MaybeUninit::new(odd + bias)];
            }
        }
    }
}

/// What is added to a row. If that is nothing, a zero keeps its sign.
#[inline(always)]
pub(crate) fn bias_of(bias: &[f32], row: usize) -> f32 {
    bias.get(row).copied().unwrap_or(-0.0)
}

/// A rectangle whose parts go to several threads.
pub(crate) struct SharedPlane<'a>(Plane<'a>);

// SAFETY: all it does is hand out parts, and whoever takes them promises that they are disjoint.
unsafe impl Sync for SharedPlane<'_> {}

impl<'a> SharedPlane<'a> {
    pub(crate) fn of(data: &'a mut [MaybeUninit<f32>], stride: usize) -> Self {
        let (start, rows) = (data.as_mut_ptr().cast(), data.len() / stride.max(1));
        Self(Plane { start, stride, rows, columns: stride, of: PhantomData })
    }

    /// A part of it.
    ///
    /// # Safety
    /// No two parts that are alive at the same time may overlap.
    pub(crate) unsafe fn part(&self, rows: Range<usize>, columns: Range<usize>) -> Plane<'a> {
        let Plane { start, stride, rows: all, columns: width, .. } = self.0;
        let mut whole = Plane { start, stride, rows: all, columns: width, of: PhantomData };
        let part = whole.part(rows, columns);
        Plane { start: part.start, stride, rows: part.rows, columns: part.columns, of: PhantomData }
    }
}
