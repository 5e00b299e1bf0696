//! Rows of floats side by side: what a micro-kernel reads one after the other lies a row apart.
#![allow(unsafe_code)] // intrinsics on pointers

use std::ops::Range;

use crate::cpu::{self, Path};
use crate::gemm::{Piece, Rows};

/// Columns that are turned at once, and rows.
const SIDE: usize = 8;

/// A piece of at most `width` rows of `x` as `to: [len][width]`. What stands in the places of absent rows is zero, or left as it is.
pub(crate) fn turn(to: &mut [f32], x: Rows<'_>, rows: Range<usize>, piece @ (start, len): Piece, width: usize) {
    let whole = len - len % SIDE;
    turn_blocks(to, x, rows.clone(), (start, whole), width, SIDE * width);
    if rows.is_empty() || whole == len {
        return;
    }
    for (at, row) in rows.enumerate() {
        for (to, x) in to[whole * width..len * width].chunks_exact_mut(width).zip(&x.part(row, piece)[whole..]) {
            to[at] = *x;
        }
    }
}

/// As [`turn`], of `len` whole blocks of eight columns, `to: [len / 8][8][width]`, where a block begins `apart` from the one before it.
pub(crate) fn turn_blocks(to: &mut [f32], x: Rows<'_>, rows: Range<usize>, piece @ (_, len): Piece, width: usize, apart: usize) {
    if rows.is_empty() || len == 0 {
        return;
    }
    assert!(len.is_multiple_of(SIDE) && apart >= SIDE * width, "whole blocks beside each other");
    #[cfg(target_arch = "x86_64")]
    if cpu::path() != Path::Plain {
        for first in (0..width).step_by(SIDE) {
            let mut from = [None; SIDE];
            for (from, row) in from.iter_mut().zip(rows.start + first..rows.end) {
                *from = Some(x.part(row, piece));
            }
            // SAFETY: the CPU has AVX2; each row has `len` floats, and each block of `to` as many columns.
            unsafe { avx2::turn(&mut to[first..], from, len, [width, apart], SIDE.min(width - first)) };
        }
        return;
    }
    for (at, row) in rows.enumerate() {
        for (to, x) in to.chunks_mut(apart).zip(x.part(row, piece).as_chunks::<SIDE>().0) {
            to.chunks_mut(width).zip(x).for_each(|(to, x)| to[at] = *x);
        }
    }
}

#[cfg(target_arch = "x86_64")]
mod avx2 {
    use std::arch::x86_64::{
        __m256, _mm_castps_si128, _mm_movehl_ps, _mm_store_ss, _mm_storeu_ps, _mm_storeu_si64, _mm256_castps256_ps128,
        _mm256_extractf128_ps, _mm256_loadu_ps, _mm256_permute2f128_ps, _mm256_setzero_ps, _mm256_shuffle_ps, _mm256_storeu_ps,
        _mm256_unpackhi_ps, _mm256_unpacklo_ps,
    };

    use super::SIDE;

    /// The first `count` of eight rows, absent ones as zeros, as columns of `to`, `width` apart, and `apart` after each eight.
    ///
    /// # Safety
    /// The CPU has AVX2; each row has `len` floats, a multiple of eight.
    #[target_feature(enable = "avx2")]
    pub(super) unsafe fn turn(
        to: &mut [f32],
        rows: [Option<&[f32]>; SIDE],
        len: usize,
        [width, apart]: [usize; 2],
        count: usize,
    ) {
        assert!(to.len() >= (len / SIDE - 1) * apart + (SIDE - 1) * width + count, "{len} columns of {width}");
        for first in (0..len).step_by(SIDE) {
            let load = |row: Option<&[f32]>| match row {
                // SAFETY: eight floats of the row.
                Some(row) => unsafe { _mm256_loadu_ps(row.as_ptr().add(first)) },
                None => _mm256_setzero_ps(),
            };
            for (column, values) in transposed(rows.map(load)).into_iter().enumerate() {
                // SAFETY: `count` floats of that column.
                unsafe { store(to.as_mut_ptr().add(first / SIDE * apart + column * width), values, count) };
            }
        }
    }

    #[inline]
    #[target_feature(enable = "avx2")]
    fn transposed(r: [__m256; SIDE]) -> [__m256; SIDE] {
        let pair = |a, b| [_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b)];
        let [[a0, a1], [b0, b1], [c0, c1], [d0, d1]] = [pair(r[0], r[1]), pair(r[2], r[3]), pair(r[4], r[5]), pair(r[6], r[7])];
        let four = |a, b| [_mm256_shuffle_ps::<0x44>(a, b), _mm256_shuffle_ps::<0xee>(a, b)];
        let ([u0, u1], [u2, u3]) = (four(a0, b0), four(a1, b1));
        let ([l0, l1], [l2, l3]) = (four(c0, d0), four(c1, d1));
        let (upper, lower) = ([u0, u1, u2, u3], [l0, l1, l2, l3]);
        let mut columns = [_mm256_setzero_ps(); SIDE];
        for i in 0..4 {
            columns[i] = _mm256_permute2f128_ps::<0x20>(upper[i], lower[i]);
            columns[i + 4] = _mm256_permute2f128_ps::<0x31>(upper[i], lower[i]);
        }
        columns
    }

    /// The first `count` of them, 1 to 8.
    ///
    /// # Safety
    /// `to` is good for `count` floats.
    #[inline]
    #[target_feature(enable = "avx2")]
    unsafe fn store(to: *mut f32, values: __m256, count: usize) {
        // SAFETY: as promised by the caller.
        unsafe {
            if count == SIDE {
                return _mm256_storeu_ps(to, values);
            }
            let (mut to, mut rest) = (to, _mm256_castps256_ps128(values));
            if count & 4 != 0 {
                _mm_storeu_ps(to, rest);
                (to, rest) = (to.add(4), _mm256_extractf128_ps::<1>(values));
            }
            if count & 2 != 0 {
                _mm_storeu_si64(to.cast(), _mm_castps_si128(rest));
                (to, rest) = (to.add(2), _mm_movehl_ps(rest, rest));
            }
            if count & 1 != 0 {
                _mm_store_ss(to, rest);
            }
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
        fn rows_become_columns([width, len] in [1usize..35, 0usize..40], rows in 1usize..35, [before, gap] in [0usize..4, 0usize..9], outside in any::<bool>()) {
            let (rows, stride) = (rows.min(width), before + len + gap);
            let data: Vec<f32> = (0..(rows + 1) * stride).map(|i| i as f32 + 1.0).collect();
            let mut to = Guarded::new(&vec![f32::NAN; len * width], outside);
            turn(to.slice_mut(), Rows::new(&data, rows + 1, stride), 1..rows + 1, (before, len), width);
            for (column, to) in to.slice().chunks_exact(width).enumerate() {
                for (row, to) in to.iter().enumerate() {
                    if row < rows {
                        prop_assert_eq!(*to, data[(row + 1) * stride + before + column]);
                    } else {
                        prop_assert!(*to == 0.0 || to.is_nan());
                    }
                }
            }
        }
    }

    #[test]
    fn blocks_of_columns_may_be_apart() {
        let (rows, blocks, width, apart) = (13, 3, 16, 8 * 16 + 5);
        let data: Vec<f32> = (0..rows * 8 * blocks).map(|i| i as f32 + 1.0).collect();
        let mut to = Guarded::new(&vec![f32::NAN; (blocks - 1) * apart + 8 * width], false);
        turn_blocks(to.slice_mut(), Rows::new(&data, rows, 8 * blocks), 0..rows, (0, 8 * blocks), width, apart);
        for (block, to) in to.slice().chunks(apart).enumerate() {
            for (column, to) in to[..8 * width].chunks_exact(width).enumerate() {
                (0..rows).for_each(|row| assert_eq!(to[row], data[row * 8 * blocks + block * 8 + column]));
            }
            assert!(to[8 * width..].iter().all(|x| x.is_nan()), "between blocks nothing is written");
        }
    }

    #[test]
    fn nothing_outside_the_rows_is_read() {
        for before in [false, true] {
            for [rows, len] in [[1, 8], [6, 16], [8, 9], [14, 24], [16, 7]] {
                let x = Guarded::new(&vec![1.0; rows * len], before);
                let mut to = Guarded::new(&vec![0.0; rows * len], before);
                turn(to.slice_mut(), Rows::new(x.slice(), rows, len), 0..rows, (0, len), rows);
                assert!(to.slice().iter().all(|x| *x == 1.0));
            }
        }
    }
}
