//! Memory that a kernel works in, kept by each thread from call to call: no kernel allocates in steady state.

use std::cell::RefCell;

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
    static LENT: RefCell<Buffer> = RefCell::default();
}

/// Most floats that [`lend`] keeps for the next use, 64 MiB: what is larger had better be others' in between.
const MOST_KEPT: usize = 16 << 20;

/// Lends a piece of this thread's memory, of `len`; what is in it is left from earlier uses. Unlike what [`with`] lends, it may be
/// worked on by other threads too.
pub(crate) fn lend<R>(len: usize, f: impl FnOnce(&mut [f32]) -> R) -> R {
    let mut memory = LENT.take();
    if memory.len < len {
        memory = Buffer::zeros(len);
    }
    let result = f(&mut memory.as_mut_slice()[..len]);
    if memory.len <= MOST_KEPT {
        LENT.set(memory);
    }
    result
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
