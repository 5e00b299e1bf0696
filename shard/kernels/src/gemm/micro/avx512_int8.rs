//! Products in 8 bits on AVX-512 VNNI: an instruction adds four products to each of sixteen sums. It takes one side without a sign, so
//! weights are stored 128 too large, and sums begin with what that adds, taken off.
#![allow(unsafe_code)] // intrinsics on pointers

use std::arch::x86_64::{
    __m256i, __m512, __m512i, _mm256_loadu_si256, _mm512_add_epi32, _mm512_cvtepi32_ps, _mm512_cvtph_ps, _mm512_dpbusd_epi32,
    _mm512_fmadd_ps, _mm512_loadu_ps, _mm512_loadu_si512, _mm512_mul_ps, _mm512_reduce_add_epi32, _mm512_set1_epi32,
    _mm512_set1_ps, _mm512_setzero_ps, _mm512_setzero_si512, _mm512_storeu_ps,
};

use super::{MicroKernel, Takes, Tile};
use crate::gemm::bytes::{BLOCK, Bytes};

const MR: usize = 14;
const LANES: usize = 16;
const NR: usize = 2 * LANES;
const BYTES: Bytes = Bytes { group: 4, excess: 128 };
const GROUPS: usize = BLOCK / BYTES.group;
const CHAINS: usize = 16;

pub(super) static KERNEL: MicroKernel = MicroKernel {
    name: "avx512_int8",
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
            6 => rows::<6>(t),
            7 => rows::<7>(t),
            8 => rows::<8>(t),
            9 => rows::<9>(t),
            10 => rows::<10>(t),
            11 => rows::<11>(t),
            12 => rows::<12>(t),
            13 => rows::<13>(t),
            _ => rows::<MR>(t),
        }
    }
}

/// # Safety
/// As [`tile`], and `R` is the tile's number of rows.
#[target_feature(enable = "avx512f,avx512vnni")]
unsafe fn rows<const R: usize>(t: Tile) {
    // SAFETY: every pointer stays in `k` blocks of `a` and `b` and in `[R][NR]` of `c`.
    unsafe {
        let (mut a, mut b) = (t.a.cast::<i32>(), t.b.cast::<u8>());
        for block in 0..t.k {
            // Below the scales: what the excess adds.
            let excess = a.add((GROUPS + 1) * MR);
            let mut sums = [[_mm512_setzero_si512(); 2]; R];
            for (row, sum) in sums.iter_mut().enumerate() {
                *sum = [_mm512_set1_epi32(*excess.add(row)); 2];
            }
            for _ in 0..GROUPS {
                let (b0, b1) = (weights(b), weights(b.add(BYTES.group * LANES)));
                for (row, sum) in sums.iter_mut().enumerate() {
                    let x = _mm512_set1_epi32(*a.add(row));
                    sum[0] = _mm512_dpbusd_epi32(sum[0], b0, x);
                    sum[1] = _mm512_dpbusd_epi32(sum[1], b1, x);
                }
                (a, b) = (a.add(MR), b.add(BYTES.group * NR));
            }
            let scales = [halves(b), halves(b.add(2 * LANES))];
            for (row, sum) in sums.iter().enumerate() {
                let scale = _mm512_set1_ps(*a.add(row).cast::<f32>());
                for (side, sum) in sum.iter().enumerate() {
                    let c = t.c.add(row * t.stride + side * LANES);
                    let before = if t.fresh && block == 0 { _mm512_setzero_ps() } else { _mm512_loadu_ps(c) };
                    let scale = _mm512_mul_ps(scales[side], scale);
                    _mm512_storeu_ps(c, _mm512_fmadd_ps(_mm512_cvtepi32_ps(*sum), scale, before));
                }
            }
            (a, b) = (a.add(2 * MR), b.add(2 * NR));
        }
        if t.fresh && t.k == 0 {
            for at in 0..2 * R {
                _mm512_storeu_ps(t.c.add(at / 2 * t.stride + at % 2 * LANES), _mm512_setzero_ps());
            }
        }
    }
}

/// # Safety
/// 64 bytes.
#[inline]
#[target_feature(enable = "avx512f,avx512vnni")]
unsafe fn weights(from: *const u8) -> __m512i {
    // SAFETY: as promised by the caller.
    unsafe { _mm512_loadu_si512(from.cast::<__m512i>()) }
}

/// # Safety
/// Sixteen halves.
#[inline]
#[target_feature(enable = "avx512f,avx512vnni")]
unsafe fn halves(from: *const u8) -> __m512 {
    // SAFETY: as promised by the caller.
    _mm512_cvtph_ps(unsafe { _mm256_loadu_si256(from.cast::<__m256i>()) })
}

/// # Safety
/// The CPU has what the kernel is for.
#[target_feature(enable = "avx512f,avx512vnni")]
unsafe fn spin(rounds: usize) -> f32 {
    let (x, mut sums) = (_mm512_set1_epi32(std::hint::black_box(0x101_0101)), [_mm512_setzero_si512(); CHAINS]);
    for _ in 0..rounds {
        for sum in &mut sums {
            *sum = _mm512_dpbusd_epi32(*sum, x, x);
        }
    }
    let total = sums.iter().fold(_mm512_setzero_si512(), |total, sum| _mm512_add_epi32(total, *sum));
    _mm512_reduce_add_epi32(total) as f32
}
