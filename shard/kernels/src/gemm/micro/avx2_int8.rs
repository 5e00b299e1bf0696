//! Products in 8 bits on AVX2. Those of `Q8_0` have all bits: neighbours in K are widened to 16 of them, and an instruction multiplies sixteen
//! and adds each two. Others are small once they have no sign, so that an instruction multiplies 32 bytes and adds each two in 16 bits, of
//! which some more are added before they are widened: two sums of numbers below 64, eight of those below 16.
#![allow(unsafe_code)] // intrinsics on pointers

use std::arch::x86_64::{
    __m128i, __m256, __m256i, _MM_HINT_T1, _mm_loadu_si128, _mm256_add_epi16, _mm256_add_epi32, _mm256_cvtepi8_epi16,
    _mm256_cvtepi32_ps, _mm256_cvtph_ps, _mm256_fmadd_ps, _mm256_loadu_si256, _mm256_madd_epi16, _mm256_maddubs_epi16,
    _mm256_mul_ps, _mm256_set1_epi32, _mm256_set1_ps,
};

use super::avx2::{LANES, load, store};
use super::vector_int8::vector_int8_kernel;
use super::{MicroKernel, Takes, Tile};
use crate::gemm::bytes::{BLOCK, Bytes, Scales};

const CHAINS: usize = 12;
const KEPT: bool = false;
const ONES: i32 = 0x1_0001;
/// Groups of four whose products fit in 16 bits together.
const SPAN: usize = 2;
type Ints = __m256i;
type Floats = __m256;

vector_int8_kernel!("avx2_int8", "avx2,fma,f16c", rows: [1 2 3 4 5], 6);

const fn mr(scales: u8) -> usize {
    if scales == STORED { 6 } else { 4 }
}

const fn bytes(scales: u8) -> Bytes {
    let (group, excess) = match scales {
        STORED => (2, 0),
        NIBBLES => (4, 0),
        _ => (4, 32),
    };
    Bytes { group, excess, scales: Scales::ALL[scales as usize] }
}

/// # Safety
/// As many groups of the tile's panels.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn products<const R: usize, const SCALES: u8>(a: *const i32, b: *const u8, groups: usize, sums: &mut [[Ints; 2]; R]) {
    // SAFETY: as promised by the caller.
    unsafe {
        let x = |group: usize, row: usize| ints(*a.add(mr(SCALES) * group + row));
        if SCALES == STORED {
            for group in 0..groups {
                let b = b.add(2 * NR * group).cast::<__m128i>();
                let b = [_mm256_cvtepi8_epi16(_mm_loadu_si128(b)), _mm256_cvtepi8_epi16(_mm_loadu_si128(b.add(1)))];
                for (row, sum) in sums.iter_mut().enumerate() {
                    let x = x(group, row);
                    *sum = [step::<SCALES>(sum[0], x, b[0]), step::<SCALES>(sum[1], x, b[1])];
                }
            }
            return;
        }
        let b = |group: usize, side: usize| _mm256_loadu_si256(b.add(4 * NR * group + 4 * LANES * side).cast::<__m256i>());
        if SCALES == NIBBLES {
            let mut short = [[ints(0); 2]; R];
            for group in 0..groups {
                let b = [b(group, 0), b(group, 1)];
                for (row, short) in short.iter_mut().enumerate() {
                    let x = x(group, row);
                    *short = [step::<SCALES>(short[0], x, b[0]), step::<SCALES>(short[1], x, b[1])];
                }
            }
            for (sum, short) in sums.iter_mut().zip(short) {
                *sum = [widened(sum[0], short[0]), widened(sum[1], short[1])];
            }
            return;
        }
        for group in (0..groups).step_by(SPAN) {
            let (b, next) = ([b(group, 0), b(group, 1)], [b(group + 1, 0), b(group + 1, 1)]);
            for (row, sum) in sums.iter_mut().enumerate() {
                let (x, after) = (x(group, row), x(group + 1, row));
                for side in 0..2 {
                    let short = step::<SCALES>(_mm256_maddubs_epi16(b[side], x), after, next[side]);
                    sum[side] = widened(sum[side], short);
                }
            }
        }
    }
}

/// Products of 16 bits are added in 32, those of 8 bits in 16: `x` has signs there, `y` has none.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn step<const SCALES: u8>(sums: Ints, x: Ints, y: Ints) -> Ints {
    if SCALES == STORED {
        _mm256_add_epi32(sums, _mm256_madd_epi16(x, y))
    } else {
        _mm256_add_epi16(sums, _mm256_maddubs_epi16(y, x))
    }
}

/// `sums` plus each two neighbours of `short`.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn widened(sums: Ints, short: Ints) -> Ints {
    _mm256_add_epi32(sums, _mm256_madd_epi16(short, ints(ONES)))
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn ints(x: i32) -> Ints {
    _mm256_set1_epi32(x)
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn floats(x: f32) -> Floats {
    _mm256_set1_ps(x)
}

/// # Safety
/// Eight halves.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn halves(from: *const u8) -> Floats {
    // SAFETY: as promised by the caller.
    _mm256_cvtph_ps(unsafe { _mm_loadu_si128(from.cast::<__m128i>()) })
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn times(x: Floats, y: Floats) -> Floats {
    _mm256_mul_ps(x, y)
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn add_scaled(to: Floats, sums: Ints, scale: Floats) -> Floats {
    _mm256_fmadd_ps(_mm256_cvtepi32_ps(sums), scale, to)
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn add_times(to: Floats, x: Floats, y: Floats) -> Floats {
    _mm256_fmadd_ps(x, y, to)
}
