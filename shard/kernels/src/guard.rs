//! Slices that end where memory does: a read or write past them kills the test.
#![allow(unsafe_code)] // pages without permissions are the point

use std::ptr;

/// Floats with a page that may not be touched right after (or right before) them.
pub(crate) struct Guarded {
    map: *mut libc::c_void,
    bytes: usize,
    start: *mut f32,
    len: usize,
}

impl Guarded {
    /// A copy of `values`, against the page behind them, or the page before them if `before`.
    pub(crate) fn new(values: &[f32], before: bool) -> Self {
        const PAGE: usize = 4096;
        let inner = (values.len() * 4).next_multiple_of(PAGE).max(PAGE);
        let bytes = inner + 2 * PAGE;
        // SAFETY: a fresh anonymous mapping; its first and last page lose their permissions before anyone knows of them.
        // The start lies `len` floats before the last page or at the first usable one, so all values are in usable pages.
        unsafe {
            let map = libc::mmap(
                ptr::null_mut(),
                bytes,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
                -1,
                0,
            );
            assert_ne!(map, libc::MAP_FAILED);
            assert_eq!(libc::mprotect(map, PAGE, libc::PROT_NONE), 0);
            assert_eq!(libc::mprotect(map.byte_add(PAGE + inner), PAGE, libc::PROT_NONE), 0);
            let start = map.byte_add(PAGE + if before { 0 } else { inner - values.len() * 4 }).cast::<f32>();
            ptr::copy_nonoverlapping(values.as_ptr(), start, values.len());
            Self { map, bytes, start, len: values.len() }
        }
    }

    pub(crate) fn slice(&self) -> &[f32] {
        // SAFETY: `len` floats from `start` are mapped, written, and live as long as `self`.
        unsafe { std::slice::from_raw_parts(self.start, self.len) }
    }

    pub(crate) fn slice_mut(&mut self) -> &mut [f32] {
        // SAFETY: as above, and the borrow is exclusive.
        unsafe { std::slice::from_raw_parts_mut(self.start, self.len) }
    }
}

impl Drop for Guarded {
    fn drop(&mut self) {
        // SAFETY: exactly what `new` mapped, which nobody can still borrow.
        unsafe {
            libc::munmap(self.map, self.bytes);
        }
    }
}
