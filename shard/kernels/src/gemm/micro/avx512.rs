//! AVX-512: 14 rows by two vectors of 16, 28 chains in registers. Each result is the same chain of fused multiply-adds as on AVX2, so the bits
//! are the same.
#![allow(unsafe_code)] // intrinsics on pointers

use std::arch::x86_64::{
    __m512, _MM_HINT_ET0, _MM_HINT_T0, _MM_HINT_T1, _mm512_add_ps, _mm512_fmadd_ps, _mm512_loadu_ps, _mm512_set1_ps,
    _mm512_setzero_ps, _mm512_storeu_ps,
};
use std::ptr;

use super::vector::vector_kernel;
use super::{BETWEEN_FETCHES, LINE, MicroKernel, Takes, Tile};

pub(super) const LANES: usize = 16;
const CHAINS: usize = 16;
const SMALL: f32 = 0.001;
const ONE: f32 = 1.0;
type Sums = __m512;
type Factors = __m512;

vector_kernel!("avx512", "avx512f", Floats, rows: [1 2 3 4 5 6 7 8 9 10 11 12 13], 14);

#[inline]
#[target_feature(enable = "avx512f")]
pub(super) fn zero() -> __m512 {
    _mm512_setzero_ps()
}

/// # Safety
/// Sixteen floats.
#[inline]
#[target_feature(enable = "avx512f")]
pub(super) unsafe fn load(from: *const f32) -> __m512 {
    // SAFETY: as promised by the caller.
    unsafe { _mm512_loadu_ps(from) }
}

/// # Safety
/// Sixteen floats, held by nobody else.
#[inline]
#[target_feature(enable = "avx512f")]
pub(super) unsafe fn store(to: *mut f32, sums: __m512) {
    // SAFETY: as promised by the caller.
    unsafe { _mm512_storeu_ps(to, sums) }
}

/// # Safety
/// One float.
#[inline]
#[target_feature(enable = "avx512f")]
pub(super) unsafe fn splat(from: *const f32) -> __m512 {
    // SAFETY: as promised by the caller.
    unsafe { _mm512_set1_ps(*from) }
}

#[inline]
#[target_feature(enable = "avx512f")]
pub(super) fn add(x: __m512, y: __m512) -> __m512 {
    _mm512_add_ps(x, y)
}

/// # Safety
/// Sixteen floats.
#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn factors(from: *const f32) -> Factors {
    // SAFETY: as promised by the caller.
    unsafe { load(from) }
}

/// # Safety
/// One float.
#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn broadcast(from: *const f32) -> Factors {
    // SAFETY: as promised by the caller.
    unsafe { splat(from) }
}

#[inline]
#[target_feature(enable = "avx512f")]
fn add_products(sums: Sums, x: Factors, y: Factors) -> Sums {
    _mm512_fmadd_ps(x, y, sums)
}
