//! How this process keeps its memory.

use std::mem::MaybeUninit;

use rayon::prelude::*;

/// Zeros fewer than which are written by one thread.
const FEW: usize = 1 << 18;

/// As many zeros, written by all threads, as what fills them is.
pub fn zeros(len: usize) -> Vec<f32> {
    if len < FEW { vec![0.0; len] } else { rayon::iter::repeat_n(0.0, len).with_min_len(FEW / 4).collect() }
}

/// Floats that a kernel writes, all of them, and reads only what it has written: they need not have been written before.
pub trait Output: sealed::Unread {}

impl<T: sealed::Unread + ?Sized> Output for T {}

/// Nobody else may ask for it: what is written there must be floats.
mod sealed {
    use std::mem::MaybeUninit;

    pub trait Unread {
        /// The same, as what nothing is known of.
        fn unread(&mut self) -> &mut [MaybeUninit<f32>];
    }
}

impl sealed::Unread for [MaybeUninit<f32>] {
    fn unread(&mut self) -> &mut [MaybeUninit<f32>] {
        self
    }
}

impl sealed::Unread for [f32] {
    #[allow(unsafe_code)] // floats that are written are floats that may be written
    fn unread(&mut self) -> &mut [MaybeUninit<f32>] {
        // SAFETY: of the same layout; kernels write floats alone.
        unsafe { std::slice::from_raw_parts_mut(self.as_mut_ptr().cast(), self.len()) }
    }
}

impl sealed::Unread for Vec<f32> {
    fn unread(&mut self) -> &mut [MaybeUninit<f32>] {
        self.as_mut_slice().unread()
    }
}

/// Floats as what is to be written.
pub(crate) fn unread(floats: &mut [f32]) -> &mut [MaybeUninit<f32>] {
    sealed::Unread::unread(floats)
}

/// As many floats as `f` writes, which it shows by giving them back: memory is not passed twice, as it is for [`zeros`].
#[allow(unsafe_code)] // memory that nobody has written yet
pub fn written(len: usize, f: impl FnOnce(&mut [MaybeUninit<f32>]) -> &mut [f32]) -> Vec<f32> {
    let mut floats = Vec::with_capacity(len);
    prefer_large_pages(floats.spare_capacity_mut());
    all(&mut floats.spare_capacity_mut()[..len], f);
    // SAFETY: they are floats, or nobody could have given them as such.
    unsafe { floats.set_len(len) };
    floats
}

/// Has `f` write parts of `size`, one after the other; it is told which one it is given, and gives it back.
///
/// # Panics
/// When it gives back something else.
#[allow(unsafe_code)] // as above
pub fn in_parts(
    y: &mut [MaybeUninit<f32>],
    size: usize,
    mut f: impl FnMut(usize, &mut [MaybeUninit<f32>]) -> &mut [f32],
) -> &mut [f32] {
    for (at, part) in y.chunks_mut(size.max(1)).enumerate() {
        all(part, |part| f(at, part));
    }
    // SAFETY: every part was given back as floats.
    unsafe { seen(y) }
}

/// Sees to it that `f` gives back what it is given.
fn all(fresh: &mut [MaybeUninit<f32>], f: impl FnOnce(&mut [MaybeUninit<f32>]) -> &mut [f32]) {
    let (start, len) = (fresh.as_ptr().addr(), fresh.len());
    let written = f(fresh);
    assert!(written.len() == len && (len == 0 || written.as_ptr().addr() == start), "{} of {len} floats", written.len());
}

/// What is written.
///
/// # Safety
/// All of it is.
#[allow(unsafe_code)] // as above
pub(crate) unsafe fn seen(floats: &mut [MaybeUninit<f32>]) -> &mut [f32] {
    // SAFETY: as promised by the caller.
    unsafe { std::slice::from_raw_parts_mut(floats.as_mut_ptr().cast(), floats.len()) }
}

/// Asks for large pages where memory of some size is going to be: a walk through it crosses fewer of them, each of which is a wait. Linux gives
/// them for the asking where it is set to (`madvise`, or `always`), where the memory has not been touched, and as far as there are any.
pub(crate) fn prefer_large_pages<T>(memory: &[T]) {
    #[cfg(target_os = "linux")]
    {
        const LARGE: usize = 2 << 20;
        let (start, end) = (memory.as_ptr().addr(), memory.as_ptr().addr() + size_of_val(memory));
        let (first, last) = (start.next_multiple_of(LARGE), end / LARGE * LARGE);
        if first < last {
            let place = memory.as_ptr().cast::<libc::c_void>().cast_mut().wrapping_byte_add(first - start);
            #[allow(unsafe_code)] // a system call
            // SAFETY: it changes nothing that a program can see; the range lies inside `memory`.
            unsafe {
                libc::madvise(place, last - first, libc::MADV_HUGEPAGE);
            }
        }
    }
    #[cfg(not(target_os = "linux"))]
    let _ = memory;
}

/// Keeps freed pages instead of handing them back to the kernel.
///
/// glibc unmaps every freed block over 32 MiB at the latest, so each large activation would fault its pages in again: an
/// f32 addition of 4608 x 3072 takes 18 ms so and 2.3 ms with pages reused. And a thread's own arena takes no block over 64 MiB,
/// as large activations are: so all threads share one. Call once, at the start of `main`.
pub fn keep_freed_pages() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    #[allow(unsafe_code)] // a C call
    // SAFETY: mallopt only sets parameters of the allocator; it is called before other threads are started.
    unsafe {
        libc::mallopt(libc::M_MMAP_THRESHOLD, i32::MAX);
        libc::mallopt(libc::M_ARENA_MAX, 1);
        libc::mallopt(libc::M_TRIM_THRESHOLD, i32::MAX);
        libc::mallopt(libc::M_TOP_PAD, 64 << 20);
    }
}
