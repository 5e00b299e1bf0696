//! Pairs of bf16 on AVX-512 without BF16, or with slow ones.
#![allow(unsafe_code)] // assembler and intrinsics on pointers

use std::arch::asm;
use std::arch::x86_64::{__m512, __m512i, _mm512_set1_epi32};
use std::ptr::NonNull;

use super::avx512::{self, LANES, load, store, zero};
use super::vector_pairs::{FLUSHING, pairs_kernel};
use super::{MicroKernel, Takes, Tile};

const MR: usize = 14;
const SPIN: unsafe fn(usize) -> f32 = avx512::spin;
const FLOPS: usize = avx512::KERNEL.flops;
type Sums = __m512;

pairs_kernel! {
    "avx512_pairs", "avx512f", zmm_reg,
    "vpandd {b0}, {upper}, zmmword ptr [{b} + 4 * {place}]
     vpandd {b1}, {upper}, zmmword ptr [{b} + 4 * {place} + 64]",
    "vpslld {b0}, zmmword ptr [{b} + 4 * {place}], 16
     vpslld {b1}, zmmword ptr [{b} + 4 * {place} + 64], 16",
    1 rows_1 rows_1_at 0 l0 r0;
    2 rows_2 rows_2_at 1 l1 r1;
    3 rows_3 rows_3_at 2 l2 r2;
    4 rows_4 rows_4_at 3 l3 r3;
    5 rows_5 rows_5_at 4 l4 r4;
    6 rows_6 rows_6_at 5 l5 r5;
    7 rows_7 rows_7_at 6 l6 r6;
    8 rows_8 rows_8_at 7 l7 r7;
    9 rows_9 rows_9_at 8 l8 r8;
    10 rows_10 rows_10_at 9 l9 r9;
    11 rows_11 rows_11_at 10 l10 r10;
    12 rows_12 rows_12_at 11 l11 r11;
    13 rows_13 rows_13_at 12 l12 r12;
    14 rows_14 rows_14_at 13 l13 r13;
}

#[inline]
#[target_feature(enable = "avx512f")]
fn upper() -> __m512i {
    _mm512_set1_epi32(-0x1_0000)
}
