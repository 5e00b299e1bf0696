//! Rows of floats side by side as pairs of bf16, in one pass: what a micro-kernel of pairs reads one after the other lies a row apart.
#![allow(unsafe_code)] // intrinsics on pointers

use std::ops::Range;

#[cfg(target_arch = "x86_64")]
use crate::cpu;
use crate::gemm::{Piece, Rows};

/// Floats of a row that are turned at once, and rows.
pub(crate) const LINE: usize = 32;
const ROWS: usize = 16;

/// The first columns of a piece of at most `width` rows of `x`, whole lines of them, as `to: [columns / 2][width]`: how many columns that is,
/// none where the CPU has no instruction for it. What stands in the places of absent rows is zero, or left as it is.
pub(crate) fn turn_lines(to: &mut [f32], x: Rows<'_>, rows: Range<usize>, piece: Piece, width: usize) -> usize {
    #[cfg(target_arch = "x86_64")]
    if cpu::has_bf16() && cpu::has_wide_vectors() {
        let len = piece.1 - piece.1 % LINE;
        assert!(rows.len() <= width && to.len() >= len / 2 * width, "{len} columns of {} rows in {}", rows.len(), to.len());
        if rows.is_empty() || len == 0 {
            return len;
        }
        for first in (0..width).step_by(ROWS) {
            let mut from = [None; ROWS];
            for (from, row) in from.iter_mut().zip(rows.start + first..rows.end) {
                *from = Some(&x.part(row, piece)[..len]);
            }
            // SAFETY: the CPU has it; each row has `len` floats, whole lines, and `to` has half as many columns, `width` apart.
            unsafe { avx512::turn(&mut to[first..], &from, len, width, ROWS.min(width - first)) };
        }
        return len;
    }
    let _ = (to, x, rows, piece, width);
    0
}

#[cfg(target_arch = "x86_64")]
mod avx512 {
    use std::arch::x86_64::{
        __m512, __m512bh, _mm512_castpd_ps, _mm512_castps_pd, _mm512_cvtne2ps_pbh, _mm512_loadu_ps, _mm512_mask_storeu_ps,
        _mm512_setzero_ps, _mm512_shuffle_f32x4, _mm512_storeu_ps, _mm512_unpackhi_pd, _mm512_unpackhi_ps, _mm512_unpacklo_pd,
        _mm512_unpacklo_ps,
    };
    use std::mem::transmute;

    use super::{LINE, ROWS};

    /// The first `count` of sixteen rows, absent ones as zeros, as columns of pairs, `width` apart.
    ///
    /// # Safety
    /// The CPU has AVX-512 BF16; each row has `len` floats, whole lines, and `to` has room for half as many columns of `count`.
    #[target_feature(enable = "avx512f,avx512bf16")]
    pub(super) unsafe fn turn(to: &mut [f32], rows: &[Option<&[f32]>; ROWS], len: usize, width: usize, count: usize) {
        let last = (1u16 << (count - 1) << 1).wrapping_sub(1);
        for first in (0..len).step_by(LINE) {
            let mut lines = [_mm512_setzero_ps(); ROWS];
            for (line, row) in lines.iter_mut().zip(rows) {
                if let Some(row) = row {
                    // SAFETY: a line of the row; any bits are a vector of floats.
                    unsafe {
                        let from = row.as_ptr().add(first);
                        let pairs = _mm512_cvtne2ps_pbh(_mm512_loadu_ps(from.add(LINE / 2)), _mm512_loadu_ps(from));
                        *line = transmute::<__m512bh, __m512>(pairs);
                    }
                }
            }
            let columns = transposed(lines);
            let to = to[first / 2 * width..].as_mut_ptr();
            for (at, column) in columns.into_iter().enumerate() {
                // SAFETY: what a column has too much is written over by those after it, of the same line; where there are none, it has nothing too much.
                unsafe {
                    let to = to.add(at * width);
                    if count == ROWS || width == count && at * width + ROWS <= ROWS * width {
                        _mm512_storeu_ps(to, column);
                    } else {
                        _mm512_mask_storeu_ps(to, last, column);
                    }
                }
            }
        }
    }

    #[inline]
    #[target_feature(enable = "avx512f")]
    fn transposed(r: [__m512; ROWS]) -> [__m512; ROWS] {
        let mut two = [_mm512_setzero_ps(); ROWS];
        for i in 0..8 {
            two[2 * i] = _mm512_unpacklo_ps(r[2 * i], r[2 * i + 1]);
            two[2 * i + 1] = _mm512_unpackhi_ps(r[2 * i], r[2 * i + 1]);
        }
        // Of rows 4 i to 4 i + 3: columns 0, 1, 2, 3 of each quarter.
        let mut four = [_mm512_setzero_ps(); ROWS];
        for i in 0..4 {
            for half in 0..2 {
                let (a, b) = (_mm512_castps_pd(two[4 * i + half]), _mm512_castps_pd(two[4 * i + 2 + half]));
                four[4 * i + 2 * half] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, b));
                four[4 * i + 2 * half + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, b));
            }
        }
        let mut columns = [_mm512_setzero_ps(); ROWS];
        for c in 0..4 {
            let (a, b) = (four[c], four[4 + c]);
            let (even, odd) = (_mm512_shuffle_f32x4::<0x88>(a, b), _mm512_shuffle_f32x4::<0xdd>(a, b));
            let (a, b) = (four[8 + c], four[12 + c]);
            let (later_even, later_odd) = (_mm512_shuffle_f32x4::<0x88>(a, b), _mm512_shuffle_f32x4::<0xdd>(a, b));
            columns[c] = _mm512_shuffle_f32x4::<0x88>(even, later_even);
            columns[4 + c] = _mm512_shuffle_f32x4::<0x88>(odd, later_odd);
            columns[8 + c] = _mm512_shuffle_f32x4::<0xdd>(even, later_even);
            columns[12 + c] = _mm512_shuffle_f32x4::<0xdd>(odd, later_odd);
        }
        columns
    }
}

#[cfg(test)]
mod tests {
    use half::bf16;
    use proptest::prelude::*;

    use super::*;
    use crate::gemm::narrow::narrow;
    use crate::guard::Guarded;

    proptest! {
        #[test]
        fn lines_become_columns_of_pairs(width in 1usize..35, len in 0usize..140, rows in 0usize..35, gap in 0usize..9, outside: bool) {
            let (rows, stride) = (rows.min(width), len + gap);
            let data: Vec<f32> = (0..(rows + 1) * stride).map(|i| (i * 7919 % 1013) as f32 / 7.0).collect();
            let from = Guarded::new(&data, outside);
            let mut to = Guarded::new(&vec![f32::NAN; len / 2 * width], outside);
            let done = turn_lines(to.slice_mut(), Rows::new(from.slice(), rows + 1, stride), 1..rows + 1, (0, len), width);
            prop_assert!(done == 0 || done == len - len % LINE);
            for (pair, to) in to.slice().chunks_exact(width).take(done / 2).enumerate() {
                for (row, to) in to.iter().take(rows).enumerate() {
                    let mut both = [bf16::ZERO; 2];
                    narrow(&data[(row + 1) * stride + 2 * pair..][..2], &mut both);
                    prop_assert_eq!(to.to_bits(), u32::from(both[0].to_bits()) | u32::from(both[1].to_bits()) << 16);
                }
            }
            prop_assert!(to.slice()[done / 2 * width..].iter().all(|to| to.is_nan()));
        }
    }
}
