//! Floats as bf16, and back.
#![allow(unsafe_code)] // intrinsics on pointers

use std::mem::MaybeUninit;

use half::bf16;

use crate::cpu::{self, vectorised};
use crate::memory::Output;

/// Floats that are narrowed at once.
const LINE: usize = 32;

/// The bits of the nearest of bf16, of two the even one, as the CPU's instruction has it: what is too small to be normal is zero.
#[inline(always)]
fn nearest(x: f32) -> u32 {
    let bits = x.to_bits();
    let nearest = bits.wrapping_add(0x7fff + (bits >> 16 & 1)) >> 16;
    let nearest = if x.is_nan() { bits >> 16 | 0x40 } else { nearest };
    if bits & 0x7f80_0000 == 0 { bits >> 16 & 0x8000 } else { nearest }
}

/// The nearest of bf16; zero for what is too small to be normal, as products take it.
pub(crate) fn narrow(from: &[f32], to: &mut [bf16]) {
    assert_eq!(from.len(), to.len(), "as many of both");
    let mut done = 0;
    #[cfg(target_arch = "x86_64")]
    if cpu::has_bf16() {
        done = from.len() - from.len() % LINE;
        // SAFETY: the CPU has it.
        unsafe { avx512::narrow(&from[..done], &mut to[..done]) };
    }
    narrow_rest(&from[done..], &mut to[done..]);
}

/// As [`narrow`], 32 floats after the other as a line of 16 pairs, which begin `apart` from each other.
pub(crate) fn narrow_lines(from: &[f32], to: &mut [f32], apart: usize) {
    let (from, rest) = from.as_chunks::<LINE>();
    assert!(rest.is_empty() && to.len() + apart >= from.len() * apart + LINE / 2, "whole lines");
    #[cfg(target_arch = "x86_64")]
    if cpu::has_bf16() {
        // SAFETY: the CPU has it.
        return unsafe { avx512::narrow_lines(from, to, apart) };
    }
    for (at, from) in from.iter().enumerate() {
        narrow_rest(from, bytemuck::cast_slice_mut(&mut to[at * apart..][..LINE / 2]));
    }
}

vectorised! {
    fn narrow_rest(from: &[f32], to: &mut [bf16]) {
        for (to, from) in to.iter_mut().zip(from) {
            *to = bf16::from_bits(nearest(*from) as u16);
        }
    }
}

/// Pairs of what lies in two rows; of zeros where there is no second.
pub(crate) fn narrow_rows(lower: &[f32], upper: Option<&[f32]>, to: &mut (impl Output + ?Sized)) {
    let to = to.unread();
    assert!(lower.len() == to.len() && upper.is_none_or(|upper| upper.len() == to.len()), "as many of both");
    #[cfg(target_arch = "x86_64")]
    if cpu::has_bf16() && cpu::has_wide_vectors() && to.len() >= LINE / 2 {
        // SAFETY: the CPU has it; as many of all, a vector at least.
        return unsafe { avx512::narrow_rows(lower, upper, to) };
    }
    narrow_short_rows(lower, upper, to);
}

vectorised! {
    fn narrow_short_rows(lower: &[f32], upper: Option<&[f32]>, to: &mut [MaybeUninit<f32>]) {
        match upper {
            Some(upper) => {
                for ((to, lower), upper) in to.iter_mut().zip(lower).zip(upper) {
                    to.write(f32::from_bits(nearest(*lower) | nearest(*upper) << 16));
                }
            }
            None => {
                for (to, lower) in to.iter_mut().zip(lower) {
                    to.write(f32::from_bits(nearest(*lower)));
                }
            }
        }
    }
}

vectorised! {
    pub(crate) fn widen(from: &[bf16], to: &mut [f32]) {
        for (to, from) in to.iter_mut().zip(from) {
            *to = f32::from_bits(u32::from(from.to_bits()) << 16);
        }
    }
}

vectorised! {
    /// Rows of `width` pairs as two rows of floats each: of the later ones, and of the earlier ones.
    pub(crate) fn widen_pairs(pairs: &[f32], width: usize, to: &mut [f32]) {
        // By whole vectors as long as there is room for one: what they have too much is written over by what comes next.
        let done = match width {
            6..8 => widen_vectors::<8>(pairs, width, to),
            12..16 => widen_vectors::<16>(pairs, width, to),
            _ => 0,
        };
        let rows = pairs.chunks_exact(width).zip(to.chunks_exact_mut(2 * width));
        for (pairs, to) in rows.skip(done) {
            let (later, earlier) = to.split_at_mut(width);
            later.iter_mut().zip(pairs).for_each(|(to, pair)| *to = later_of(*pair));
            earlier.iter_mut().zip(pairs).for_each(|(to, pair)| *to = earlier_of(*pair));
        }
    }
}

/// How many rows it has widened.
#[inline(always)]
fn widen_vectors<const LANES: usize>(pairs: &[f32], width: usize, to: &mut [f32]) -> usize {
    let mut row = 0;
    while let (Some(from), Some(to)) = (pairs.get(row * width..), to.get_mut(2 * row * width..))
        && let Some(from) = from.first_chunk::<LANES>()
        && to.len() >= width + LANES
    {
        to[..LANES].copy_from_slice(&from.map(later_of));
        to[width..][..LANES].copy_from_slice(&from.map(earlier_of));
        row += 1;
    }
    row
}

#[inline(always)]
fn later_of(pair: f32) -> f32 {
    f32::from_bits(pair.to_bits() & 0xffff_0000)
}

#[inline(always)]
fn earlier_of(pair: f32) -> f32 {
    f32::from_bits(pair.to_bits() << 16)
}

#[cfg(target_arch = "x86_64")]
mod avx512 {
    use std::arch::x86_64::{
        __m512bh, __m512i, _mm512_cvtne2ps_pbh, _mm512_loadu_ps, _mm512_loadu_si512, _mm512_permutexvar_epi16, _mm512_setzero_ps,
        _mm512_storeu_si512,
    };
    use std::mem::{MaybeUninit, transmute};

    use half::bf16;

    use super::LINE;

    /// The first of each half of a line, then the second of each, and so on.
    static BY_TURNS: [u16; LINE] = {
        let mut places = [0; LINE];
        let mut i = 0;
        while i < LINE {
            places[i] = (i / 2 + i % 2 * (LINE / 2)) as u16;
            i += 1;
        }
        places
    };

    /// # Safety
    /// The CPU has AVX-512 BF16.
    #[target_feature(enable = "avx512f,avx512bf16")]
    pub(super) unsafe fn narrow(from: &[f32], to: &mut [bf16]) {
        for (from, to) in from.as_chunks::<LINE>().0.iter().zip(to.as_chunks_mut::<LINE>().0) {
            // SAFETY: as many of both.
            unsafe { line(from, to.as_mut_ptr()) };
        }
    }

    /// # Safety
    /// The CPU has AVX-512 BF16, and `to` a line every `apart` floats.
    #[target_feature(enable = "avx512f,avx512bf16")]
    pub(super) unsafe fn narrow_lines(from: &[[f32; LINE]], to: &mut [f32], apart: usize) {
        for (at, from) in from.iter().enumerate() {
            // SAFETY: as promised by the caller.
            unsafe { line(from, to.as_mut_ptr().add(at * apart).cast()) };
        }
    }

    /// # Safety
    /// The CPU has AVX-512 BF16 and BW; all have as many floats, a vector of them at least.
    #[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
    pub(super) unsafe fn narrow_rows(lower: &[f32], upper: Option<&[f32]>, to: &mut [MaybeUninit<f32>]) {
        const LANES: usize = LINE / 2;
        // SAFETY: a vector of each, the last of which may begin in the one before it; any bits are a vector of whole numbers.
        unsafe {
            let by_turns = _mm512_loadu_si512(BY_TURNS.as_ptr().cast());
            let last = to.len() - LANES;
            for at in (0..to.len()).step_by(LANES).map(|at| at.min(last)) {
                let upper = upper.map_or(_mm512_setzero_ps(), |upper| _mm512_loadu_ps(upper.as_ptr().add(at)));
                let both = _mm512_cvtne2ps_pbh(upper, _mm512_loadu_ps(lower.as_ptr().add(at)));
                let pairs = _mm512_permutexvar_epi16(by_turns, transmute::<__m512bh, __m512i>(both));
                _mm512_storeu_si512(to.as_mut_ptr().add(at).cast(), pairs);
            }
        }
    }

    /// # Safety
    /// The CPU has AVX-512 BF16; `to` has place for a line.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bf16")]
    unsafe fn line(from: &[f32; LINE], to: *mut bf16) {
        // SAFETY: half a line each time; any bits are a vector of whole numbers.
        unsafe {
            let (lower, upper) = (_mm512_loadu_ps(from.as_ptr()), _mm512_loadu_ps(from[LINE / 2..].as_ptr()));
            let both = transmute::<__m512bh, __m512i>(_mm512_cvtne2ps_pbh(upper, lower));
            _mm512_storeu_si512(to.cast(), both);
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::guard::Guarded;

    proptest! {
        #[test]
        fn pairs_become_two_rows(width in 1usize..20, rows in 0usize..9) {
            let pairs: Vec<f32> = (0..width * rows).map(|i| f32::from_bits((i as u32 * 7919) << 16 | (i as u32 * 31 + 1) & 0xffff)).collect();
            let mut to = vec![f32::NAN; 2 * width * rows];
            widen_pairs(&pairs, width, &mut to);
            for (i, pair) in pairs.iter().enumerate() {
                let (at, halves) = (i / width * 2 * width + i % width, [pair.to_bits() >> 16, pair.to_bits() & 0xffff]);
                prop_assert_eq!([to[at], to[at + width]].map(f32::to_bits), halves.map(|half| half << 16));
            }
        }

        #[test]
        fn every_float_becomes_the_nearest(bits in prop::collection::vec(any::<u32>(), 0..100), before in any::<bool>()) {
            let x: Vec<f32> = bits.into_iter().map(f32::from_bits).collect();
            let from = Guarded::new(&x, before);
            let mut to = vec![bf16::ONE; x.len()];
            narrow(from.slice(), &mut to);
            let mut in_plain = vec![bf16::ONE; x.len()];
            narrow_rest(&x, &mut in_plain);
            let bits = |x: &[bf16]| x.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
            prop_assert_eq!(bits(&to), bits(&in_plain));
            for (x, to) in x.into_iter().zip(to) {
                let expected = if x.is_subnormal() { bf16::from_f32(0f32.copysign(x)) } else { bf16::from_f32(x) };
                prop_assert_eq!(to.to_bits(), expected.to_bits(), "{} is {}", x, to);
            }
        }

        #[test]
        fn two_rows_become_pairs(bits in prop::collection::vec(any::<[u32; 2]>(), 0..100), alone: bool, before: bool) {
            let row = |at: usize| Guarded::new(&bits.iter().map(|two| f32::from_bits(two[at])).collect::<Vec<_>>(), before);
            let (lower, upper) = (row(0), row(1));
            let mut to = Guarded::new(&vec![f32::NAN; bits.len()], before);
            narrow_rows(lower.slice(), (!alone).then_some(upper.slice()), to.slice_mut());
            for (to, [lower, upper]) in to.slice().iter().zip(bits) {
                let upper = if alone { 0 } else { upper };
                prop_assert_eq!(to.to_bits(), nearest(f32::from_bits(lower)) | nearest(f32::from_bits(upper)) << 16);
            }
        }
    }
}
