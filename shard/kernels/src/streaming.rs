//! What is written past the caches: of tensors that are larger than those, so that memory is not read before it is written over.
#![allow(unsafe_code)] // intrinsics on pointers, and memory that nobody has written yet

use std::mem::MaybeUninit;

/// Floats of a tensor that no cache holds until it is read: 32 MiB.
pub(crate) const LARGE: usize = 1 << 23;

/// Writes all of `to`.
///
/// # Safety
/// Before another thread reads it, this one calls [`settle`].
pub(crate) unsafe fn copy(from: &[f32], to: &mut [MaybeUninit<f32>]) {
    assert_eq!(from.len(), to.len(), "as many of both");
    let mut done = 0..0;
    #[cfg(target_arch = "x86_64")]
    if crate::cpu::path() != crate::cpu::Path::Plain {
        let outside = to.as_ptr().align_offset(avx2::ALIGNMENT).min(to.len());
        done = outside..outside + (to.len() - outside) / avx2::LANES * avx2::LANES;
        // SAFETY: the CPU has AVX2; as many of both, from an aligned place on.
        unsafe { avx2::copy(&from[done.clone()], &mut to[done.clone()]) };
    }
    for of in [0..done.start, done.end..to.len()] {
        to[of.clone()].iter_mut().zip(&from[of]).for_each(|(to, from)| *to = MaybeUninit::new(*from));
    }
}

/// Puts what went past the caches in order with other writes.
pub(crate) fn settle() {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: every CPU of this kind has it.
    unsafe {
        std::arch::x86_64::_mm_sfence();
    }
}

/// Puts `lower + upper` behind what `sum` holds, which has room for it.
pub fn append_sum(sum: &mut Vec<f32>, lower: &[f32], upper: &[f32]) {
    assert_eq!(lower.len(), upper.len(), "as many of both");
    let (before, len) = (sum.len(), lower.len());
    let room = sum.spare_capacity_mut();
    assert!(room.len() >= len, "room for {len}");
    add(lower, upper, &mut room[..len]);
    // SAFETY: they are written.
    unsafe { sum.set_len(before + len) };
}

/// Writes all of `to`.
fn add(lower: &[f32], upper: &[f32], to: &mut [MaybeUninit<f32>]) {
    #[cfg(target_arch = "x86_64")]
    if crate::cpu::path() != crate::cpu::Path::Plain {
        let outside = to.as_ptr().align_offset(avx2::ALIGNMENT).min(to.len());
        let whole = (to.len() - outside) / avx2::LANES * avx2::LANES;
        add_plainly(lower, upper, 0..outside, to);
        // SAFETY: the CPU has AVX2; as many of each, from an aligned place on.
        unsafe { avx2::add(&lower[outside..][..whole], &upper[outside..][..whole], &mut to[outside..][..whole]) };
        return add_plainly(lower, upper, outside + whole..to.len(), to);
    }
    add_plainly(lower, upper, 0..to.len(), to);
}

fn add_plainly(lower: &[f32], upper: &[f32], of: std::ops::Range<usize>, to: &mut [MaybeUninit<f32>]) {
    for ((to, lower), upper) in to[of.clone()].iter_mut().zip(&lower[of.clone()]).zip(&upper[of]) {
        to.write(lower + upper);
    }
}

#[cfg(target_arch = "x86_64")]
mod avx2 {
    use std::arch::x86_64::{_mm_sfence, _mm256_add_ps, _mm256_loadu_ps, _mm256_stream_ps};
    use std::mem::MaybeUninit;

    pub(super) const LANES: usize = 8;
    /// Bytes.
    pub(super) const ALIGNMENT: usize = 4 * LANES;

    /// # Safety
    /// The CPU has AVX2; `to` is aligned, and both have as many floats, whole vectors of them.
    #[target_feature(enable = "avx2")]
    pub(super) unsafe fn copy(from: &[f32], to: &mut [MaybeUninit<f32>]) {
        for (to, from) in to.as_chunks_mut::<LANES>().0.iter_mut().zip(from.as_chunks::<LANES>().0) {
            // SAFETY: a vector of each, and the places of `to` are aligned.
            unsafe { _mm256_stream_ps(to.as_mut_ptr().cast(), _mm256_loadu_ps(from.as_ptr())) };
        }
    }

    /// # Safety
    /// The CPU has AVX2; `to` is aligned, and all have as many floats, whole vectors of them.
    #[target_feature(enable = "avx2")]
    pub(super) unsafe fn add(lower: &[f32], upper: &[f32], to: &mut [MaybeUninit<f32>]) {
        let (lower, upper) = (lower.as_chunks::<LANES>().0, upper.as_chunks::<LANES>().0);
        for ((to, lower), upper) in to.as_chunks_mut::<LANES>().0.iter_mut().zip(lower).zip(upper) {
            // SAFETY: a vector of each, and the places of `to` are aligned.
            unsafe {
                let sum = _mm256_add_ps(_mm256_loadu_ps(lower.as_ptr()), _mm256_loadu_ps(upper.as_ptr()));
                _mm256_stream_ps(to.as_mut_ptr().cast(), sum);
            }
        }
        // What goes past the caches is in no order with other writes until here.
        _mm_sfence();
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::guard::Guarded;

    proptest! {
        #[test]
        fn a_copy_is_what_it_is_of(len in 0usize..100, at in 0usize..9, before: bool) {
            let values: Vec<f32> = (0..at + len).map(|i| i as f32).collect();
            let from = Guarded::new(&values[at..], before);
            let mut to = vec![MaybeUninit::new(0.5); at + len];
            // SAFETY: nobody else reads it.
            unsafe { copy(from.slice(), &mut to[at..]) };
            settle();
            // SAFETY: all were numbers from the beginning.
            let to: Vec<f32> = to.into_iter().map(|to| unsafe { to.assume_init() }).collect();
            prop_assert!(to[..at].iter().all(|to| *to == 0.5));
            prop_assert_eq!(&to[at..], &values[at..]);
        }

        #[test]
        fn every_float_is_the_sum_of_its_two(len in 0usize..100, begun in 0usize..20, at in 0usize..9, before: bool) {
            let value = |seed: usize| (0..at + len).map(|i| ((i * 7919 + seed) % 1013) as f32 / 7.0).collect::<Vec<_>>();
            let (lower, upper) = (Guarded::new(&value(1)[at..], before), Guarded::new(&value(2)[at..], before));
            let mut sum = Vec::with_capacity(begun + len);
            sum.resize(begun, 0.5);
            append_sum(&mut sum, lower.slice(), upper.slice());
            let expected = lower.slice().iter().zip(upper.slice()).map(|(lower, upper)| lower + upper);
            prop_assert!(sum[..begun].iter().all(|x| *x == 0.5));
            prop_assert_eq!(&sum[begun..], &expected.collect::<Vec<_>>()[..]);
        }
    }

    #[test]
    #[should_panic(expected = "room for 2")]
    fn nothing_is_written_where_there_is_no_room() {
        append_sum(&mut Vec::new(), &[1.0; 2], &[2.0; 2]);
    }
}
