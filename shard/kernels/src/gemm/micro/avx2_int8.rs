//! Products in 8 bits on AVX2: neighbours in K are widened to 16 bits, an instruction multiplies sixteen and adds each two of them.
#![allow(unsafe_code)] // intrinsics on pointers

use std::arch::x86_64::{
    __m128i, __m256, __m256i, _mm_loadu_si128, _mm256_add_epi32, _mm256_cvtepi8_epi16, _mm256_cvtepi32_ps, _mm256_cvtph_ps,
    _mm256_fmadd_ps, _mm256_madd_epi16, _mm256_mul_ps, _mm256_set1_epi32, _mm256_set1_ps,
};

use super::avx2::{LANES, load, store};
use super::vector_int8::vector_int8_kernel;
use super::{MicroKernel, Takes, Tile};
use crate::gemm::bytes::{BLOCK, Bytes, Scales};

const GROUP: usize = 2;
const EXCESS: u8 = 0;
const CHAINS: usize = 12;
const ONES: i32 = 0x1_0001;
type Ints = __m256i;
type Floats = __m256;

vector_int8_kernel!("avx2_int8", "avx2,fma,f16c", rows: [1 2 3 4 5], 6);

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
/// Sixteen bytes.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn weights(from: *const u8) -> Ints {
    // SAFETY: as promised by the caller.
    _mm256_cvtepi8_epi16(unsafe { _mm_loadu_si128(from.cast::<__m128i>()) })
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
fn add_products(sums: Ints, x: Ints, y: Ints) -> Ints {
    _mm256_add_epi32(sums, _mm256_madd_epi16(x, y))
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
