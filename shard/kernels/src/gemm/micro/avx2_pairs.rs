//! Pairs of bf16 on AVX2, which has no instruction for them.
#![allow(unsafe_code)] // assembler and intrinsics on pointers

use std::arch::asm;
use std::arch::x86_64::{__m256, _mm256_castsi256_ps, _mm256_set1_epi32};
use std::ptr::NonNull;

use super::avx2::{self, LANES, load, store, zero};
use super::vector_pairs::{FLUSHING, pairs_kernel};
use super::{MicroKernel, Takes, Tile};

const MR: usize = 6;
const SPIN: unsafe fn(usize) -> f32 = avx2::spin;
const FLOPS: usize = avx2::KERNEL.flops;
type Sums = __m256;

pairs_kernel! {
    "avx2_pairs", "avx2,fma", ymm_reg,
    "vandps {b0}, {upper}, ymmword ptr [{b} + 4 * {place}]
     vandps {b1}, {upper}, ymmword ptr [{b} + 4 * {place} + 32]",
    "vmovdqu {b0}, ymmword ptr [{b} + 4 * {place}]
     vmovdqu {b1}, ymmword ptr [{b} + 4 * {place} + 32]
     vpslld {b0}, {b0}, 16
     vpslld {b1}, {b1}, 16",
    1 rows_1 rows_1_at 0 l0 r0;
    2 rows_2 rows_2_at 1 l1 r1;
    3 rows_3 rows_3_at 2 l2 r2;
    4 rows_4 rows_4_at 3 l3 r3;
    5 rows_5 rows_5_at 4 l4 r4;
    6 rows_6 rows_6_at 5 l5 r5;
}

#[inline]
#[target_feature(enable = "avx2,fma")]
fn upper() -> __m256 {
    _mm256_castsi256_ps(_mm256_set1_epi32(-0x1_0000))
}
