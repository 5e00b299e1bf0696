//! How this process keeps its memory.

use rayon::prelude::*;

/// Zeros fewer than which are written by one thread.
const FEW: usize = 1 << 18;

/// As many zeros, written by all threads, as what fills them is.
pub fn zeros(len: usize) -> Vec<f32> {
    if len < FEW { vec![0.0; len] } else { rayon::iter::repeat_n(0.0, len).with_min_len(FEW / 4).collect() }
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
