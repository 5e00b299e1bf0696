//! AVX-512 BF16: tiles as in f32, of pairs. An instruction adds two products to each of sixteen sums.
#![allow(unsafe_code)] // intrinsics on pointers

use std::arch::x86_64::{
    __m512, __m512bh, __m512i, _MM_HINT_ET0, _MM_HINT_T0, _MM_HINT_T1, _mm512_dpbf16_ps, _mm512_loadu_si512, _mm512_set1_epi32,
};
use std::mem::transmute;
use std::ptr;

use super::avx512::{add, load, splat, store, zero};
use super::vector::vector_kernel;
use super::{BETWEEN_FETCHES, LINE, MicroKernel, Takes, Tile};

const LANES: usize = 16;
const CHAINS: usize = 16;
/// 0.001 and 0.001.
const SMALL: f32 = f32::from_bits(0x3a83_3a83);
/// 1 and 1.
const ONE: f32 = f32::from_bits(0x3f80_3f80);
type Sums = __m512;
type Factors = __m512bh;

vector_kernel!("avx512_bf16", "avx512f,avx512bf16", Pairs, rows: [1 2 3 4 5 6 7 8 9 10 11 12 13], 14);

/// # Safety
/// Sixteen floats.
#[inline]
#[target_feature(enable = "avx512f,avx512bf16")]
unsafe fn factors(from: *const f32) -> Factors {
    // SAFETY: as promised by the caller; any bits are a vector of pairs.
    unsafe { transmute::<__m512i, __m512bh>(_mm512_loadu_si512(from.cast())) }
}

/// # Safety
/// One float.
#[inline]
#[target_feature(enable = "avx512f,avx512bf16")]
unsafe fn broadcast(from: *const f32) -> Factors {
    // SAFETY: as promised by the caller; any bits are a vector of pairs.
    unsafe { transmute::<__m512i, __m512bh>(_mm512_set1_epi32(*from.cast::<i32>())) }
}

#[inline]
#[target_feature(enable = "avx512f,avx512bf16")]
fn add_products(sums: Sums, x: Factors, y: Factors) -> Sums {
    _mm512_dpbf16_ps(sums, x, y)
}
