//! Memory that a kernel works in, kept by each thread from call to call: no kernel allocates in steady state.

use std::cell::RefCell;

/// Aligned to a cache line, which is also the widest vector.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Line([f32; 16]);

/// Aligned floats.
#[derive(Clone, Default)]
pub(crate) struct Buffer(Vec<Line>);

impl Buffer {
    /// `len` zeros.
    pub(crate) fn zeros(len: usize) -> Self {
        Self(vec![Line([0.0; 16]); len.div_ceil(16)])
    }

    pub(crate) fn as_slice(&self) -> &[f32] {
        #[allow(unsafe_code)] // the same memory seen without its lines
        // SAFETY: a `Line` is 16 floats without padding, and the vector holds `len` of them.
        unsafe {
            std::slice::from_raw_parts(self.0.as_ptr().cast(), self.0.len() * 16)
        }
    }

    pub(crate) fn as_mut_slice(&mut self) -> &mut [f32] {
        #[allow(unsafe_code)] // the same memory seen without its lines
        // SAFETY: as above, and the borrow is exclusive.
        unsafe {
            std::slice::from_raw_parts_mut(self.0.as_mut_ptr().cast(), self.0.len() * 16)
        }
    }
}

/// Lends `N` separate pieces of this thread's memory, of at least the given lengths; what is in them is left from earlier
/// uses. `f` must neither call this again nor hand work to other threads (which could).
pub(crate) fn with<const N: usize, R>(lengths: [usize; N], f: impl FnOnce([&mut [f32]; N]) -> R) -> R {
    thread_local! {
        static MEMORY: RefCell<Buffer> = RefCell::default();
    }
    let lengths = lengths.map(|len| len.next_multiple_of(16));
    MEMORY.with_borrow_mut(|memory| {
        let total: usize = lengths.iter().sum();
        if memory.0.len() * 16 < total {
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
