//! AVX2 with fused multiply-add: 6 rows by two vectors of 8, twelve chains in registers.
#![allow(unsafe_code)] // intrinsics on pointers

use std::arch::x86_64::{
    __m256, _MM_HINT_ET0, _MM_HINT_T0, _MM_HINT_T1, _mm256_add_ps, _mm256_broadcast_ss, _mm256_fmadd_ps, _mm256_loadu_ps,
    _mm256_setzero_ps, _mm256_storeu_ps,
};
use std::ptr;

use super::vector::vector_kernel;
use super::{BETWEEN_FETCHES, LINE, MicroKernel, Takes, Tile};

pub(super) const LANES: usize = 8;
const CHAINS: usize = 12;
const SMALL: f32 = 0.001;
const ONE: f32 = 1.0;
type Sums = __m256;
type Factors = __m256;

vector_kernel!("avx2", "avx2,fma", Floats, rows: [1 2 3 4 5], 6);

#[inline]
#[target_feature(enable = "avx2,fma")]
pub(super) fn zero() -> Sums {
    _mm256_setzero_ps()
}

/// # Safety
/// Eight floats.
#[inline]
#[target_feature(enable = "avx2,fma")]
pub(super) unsafe fn load(from: *const f32) -> Sums {
    // SAFETY: as promised by the caller.
    unsafe { _mm256_loadu_ps(from) }
}

/// # Safety
/// Eight floats, held by nobody else.
#[inline]
#[target_feature(enable = "avx2,fma")]
pub(super) unsafe fn store(to: *mut f32, sums: Sums) {
    // SAFETY: as promised by the caller.
    unsafe { _mm256_storeu_ps(to, sums) }
}

/// # Safety
/// One float.
#[inline]
#[target_feature(enable = "avx2,fma")]
unsafe fn splat(from: *const f32) -> Sums {
    // SAFETY: as promised by the caller.
    unsafe { _mm256_broadcast_ss(&*from) }
}

#[inline]
#[target_feature(enable = "avx2,fma")]
fn add(x: Sums, y: Sums) -> Sums {
    _mm256_add_ps(x, y)
}

/// # Safety
/// Eight floats.
#[inline]
#[target_feature(enable = "avx2,fma")]
unsafe fn factors(from: *const f32) -> Factors {
    // SAFETY: as promised by the caller.
    unsafe { load(from) }
}

/// # Safety
/// One float.
#[inline]
#[target_feature(enable = "avx2,fma")]
unsafe fn broadcast(from: *const f32) -> Factors {
    // SAFETY: as promised by the caller.
    unsafe { splat(from) }
}

#[inline]
#[target_feature(enable = "avx2,fma")]
fn add_products(sums: Sums, x: Factors, y: Factors) -> Sums {
    _mm256_fmadd_ps(x, y, sums)
}
