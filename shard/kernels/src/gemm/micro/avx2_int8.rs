//! Products in 8 bits on AVX2: neighbours in K are widened to 16 bits, an instruction multiplies sixteen and adds each two of them.
#![allow(unsafe_code)] // intrinsics on pointers

use std::arch::x86_64::{
    __m128i, __m256, __m256i, _mm_loadu_si128, _mm256_add_epi32, _mm256_cvtepi8_epi16, _mm256_cvtepi32_ps, _mm256_cvtph_ps,
    _mm256_fmadd_ps, _mm256_loadu_ps, _mm256_madd_epi16, _mm256_mul_ps, _mm256_set1_epi32, _mm256_set1_ps, _mm256_setzero_ps,
    _mm256_setzero_si256, _mm256_storeu_ps,
};

use super::{MicroKernel, Takes, Tile};
use crate::gemm::bytes::{BLOCK, Bytes};

const MR: usize = 6;
const LANES: usize = 8;
const NR: usize = 2 * LANES;
const BYTES: Bytes = Bytes { group: 2, excess: 0 };
const GROUPS: usize = BLOCK / BYTES.group;
const CHAINS: usize = 12;

pub(super) static KERNEL: MicroKernel = MicroKernel {
    name: "avx2_int8",
    mr: MR,
    nr: NR,
    takes: Takes::Blocks(BYTES),
    tile,
    lines: None,
    spin,
    flops: 2 * BYTES.group * LANES * CHAINS,
};

/// # Safety
/// The CPU has what the kernel is for; the tile's pointers are good for what its documentation says.
unsafe fn tile(t: Tile) {
    // SAFETY: as promised by the caller.
    unsafe {
        match t.rows {
            1 => rows::<1>(t),
            2 => rows::<2>(t),
            3 => rows::<3>(t),
            4 => rows::<4>(t),
            5 => rows::<5>(t),
            _ => rows::<MR>(t),
        }
    }
}

/// # Safety
/// As [`tile`], and `R` is the tile's number of rows.
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn rows<const R: usize>(t: Tile) {
    // SAFETY: every pointer stays in `k` blocks of `a` and `b` and in `[R][NR]` of `c`.
    unsafe {
        let (mut a, mut b) = (t.a.cast::<i32>(), t.b.cast::<u8>());
        for block in 0..t.k {
            let mut sums = [[_mm256_setzero_si256(); 2]; R];
            for _ in 0..GROUPS {
                let (b0, b1) = (wide(b), wide(b.add(NR)));
                for (row, sum) in sums.iter_mut().enumerate() {
                    let x = _mm256_set1_epi32(*a.add(row));
                    sum[0] = add_products(sum[0], x, b0);
                    sum[1] = add_products(sum[1], x, b1);
                }
                (a, b) = (a.add(MR), b.add(BYTES.group * NR));
            }
            let scales = [halves(b), halves(b.add(2 * LANES))];
            for (row, sum) in sums.iter().enumerate() {
                let scale = _mm256_set1_ps(*a.add(row).cast::<f32>());
                for (side, sum) in sum.iter().enumerate() {
                    let c = t.c.add(row * t.stride + side * LANES);
                    let before = if t.fresh && block == 0 { _mm256_setzero_ps() } else { _mm256_loadu_ps(c) };
                    let scale = _mm256_mul_ps(scales[side], scale);
                    _mm256_storeu_ps(c, _mm256_fmadd_ps(_mm256_cvtepi32_ps(*sum), scale, before));
                }
            }
            (a, b) = (a.add(2 * MR), b.add(2 * NR));
        }
        if t.fresh && t.k == 0 {
            for at in 0..2 * R {
                _mm256_storeu_ps(t.c.add(at / 2 * t.stride + at % 2 * LANES), _mm256_setzero_ps());
            }
        }
    }
}

/// # Safety
/// Sixteen bytes.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn wide(from: *const u8) -> __m256i {
    // SAFETY: as promised by the caller.
    _mm256_cvtepi8_epi16(unsafe { _mm_loadu_si128(from.cast::<__m128i>()) })
}

/// # Safety
/// Eight halves.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn halves(from: *const u8) -> __m256 {
    // SAFETY: as promised by the caller.
    _mm256_cvtph_ps(unsafe { _mm_loadu_si128(from.cast::<__m128i>()) })
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn add_products(sums: __m256i, x: __m256i, y: __m256i) -> __m256i {
    _mm256_add_epi32(sums, _mm256_madd_epi16(x, y))
}

/// # Safety
/// The CPU has what the kernel is for.
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn spin(rounds: usize) -> f32 {
    let (x, mut sums) = (_mm256_set1_epi32(std::hint::black_box(0x1_0001)), [_mm256_setzero_si256(); CHAINS]);
    for _ in 0..rounds {
        for sum in &mut sums {
            // What an instruction gives depends on the one before it, or all of them would be one.
            *sum = add_products(*sum, x, *sum);
        }
    }
    let total = sums.iter().fold(_mm256_setzero_si256(), |total, sum| _mm256_add_epi32(total, *sum));
    let mut out = [0f32; LANES];
    // SAFETY: eight floats.
    unsafe { _mm256_storeu_ps(out.as_mut_ptr(), _mm256_cvtepi32_ps(total)) };
    out.iter().sum()
}
