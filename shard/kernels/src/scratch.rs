//! Memory that a kernel works in, kept by each thread from call to call: no kernel allocates in steady state.

use std::cell::RefCell;
use std::fmt;

use crate::memory::prefer_large_pages;

/// Floats of a cache line, which is also the widest vector.
const LINE: usize = 16;

/// Floats that start with a cache line, in memory that is asked for as any other is, a little longer.
#[derive(Default)]
pub(crate) struct Buffer {
    /// Up to a line longer than what is used of it.
    memory: Vec<f32>,
    start: usize,
    len: usize,
}

impl Buffer {
    /// `len` zeros.
    pub(crate) fn zeros(len: usize) -> Self {
        let memory = vec![0.0; len + LINE - 1];
        prefer_large_pages(&memory);
        let start = memory.as_ptr().align_offset(size_of::<[f32; LINE]>()).min(LINE - 1);
        Self { memory, start, len }
    }

    pub(crate) fn len(&self) -> usize {
        self.len
    }

    pub(crate) fn as_slice(&self) -> &[f32] {
        &self.memory[self.start..][..self.len]
    }

    pub(crate) fn as_mut_slice(&mut self) -> &mut [f32] {
        &mut self.memory[self.start..][..self.len]
    }
}

impl Clone for Buffer {
    fn clone(&self) -> Self {
        let mut copy = Self::zeros(self.len);
        copy.as_mut_slice().copy_from_slice(self.as_slice());
        copy
    }
}

thread_local! {
    static MEMORY: RefCell<Buffer> = RefCell::default();
    static LENT: RefCell<Vec<Buffer>> = const { RefCell::new(Vec::new()) };
}

/// Most floats of a piece that is kept for the next use, 160 MiB: what is larger had better be others' in between.
const MOST_KEPT: usize = 40 << 20;
/// Most pieces that are kept.
const PIECES_KEPT: usize = 2;

/// A piece of this thread's memory; what is in it is left from earlier uses. Unlike what [`with`] lends, it may be worked on by other threads too.
pub(crate) struct Lent {
    memory: Buffer,
    len: usize,
}

impl Lent {
    /// Of `len` floats.
    pub(crate) fn of(len: usize) -> Self {
        let kept = LENT.with_borrow_mut(|kept| {
            kept.sort_by_key(Buffer::len);
            // Too small ones make way.
            kept.iter().position(|memory| memory.len >= len).or(kept.len().checked_sub(1)).map(|at| kept.swap_remove(at))
        });
        let memory = kept.filter(|memory| memory.len >= len).unwrap_or_else(|| Buffer::zeros(len));
        Self { memory, len }
    }

    pub(crate) fn as_slice(&self) -> &[f32] {
        &self.memory.as_slice()[..self.len]
    }

    pub(crate) fn as_mut_slice(&mut self) -> &mut [f32] {
        &mut self.memory.as_mut_slice()[..self.len]
    }
}

impl fmt::Debug for Lent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} floats", self.len)
    }
}

impl Drop for Lent {
    fn drop(&mut self) {
        let memory = std::mem::take(&mut self.memory);
        // A thread that ends keeps nothing.
        let _ = LENT.try_with(|kept| {
            let mut kept = kept.borrow_mut();
            if memory.len <= MOST_KEPT && kept.len() < PIECES_KEPT {
                kept.push(memory);
            }
        });
    }
}

/// Lends `N` separate pieces of this thread's memory, of at least the given lengths; what is in them is left from earlier
/// uses. `f` must neither call this again nor hand work to other threads (which could).
pub(crate) fn with<const N: usize, R>(lengths: [usize; N], f: impl FnOnce([&mut [f32]; N]) -> R) -> R {
    let lengths = lengths.map(|len| len.next_multiple_of(LINE));
    MEMORY.with_borrow_mut(|memory| {
        let total: usize = lengths.iter().sum();
        if memory.len < total {
            *memory = Buffer::zeros(total);
        }
        let mut rest = memory.as_mut_slice();
        f(lengths.map(|len| {
            let (piece, after) = std::mem::take(&mut rest).split_at_mut(len);
            rest = after;
            piece
        }))
    })
}
