//! Products in 8 bits on AVX-512 VNNI: an instruction adds four products to each of sixteen sums. It takes one side without a sign, so
//! weights are stored 128 too large, and sums begin with what that adds, taken off.
#![allow(unsafe_code)] // intrinsics on pointers

use std::arch::x86_64::{
    __m256i, __m512, __m512i, _mm256_loadu_si256, _mm512_cvtepi32_ps, _mm512_cvtph_ps, _mm512_dpbusd_epi32, _mm512_fmadd_ps,
    _mm512_loadu_si512, _mm512_mul_ps, _mm512_set1_epi32, _mm512_set1_ps,
};

use super::avx512::{LANES, load, store};
use super::vector_int8::vector_int8_kernel;
use super::{MicroKernel, Takes, Tile};
use crate::gemm::bytes::{BLOCK, Bytes, Scales};

const GROUP: usize = 4;
const EXCESS: u8 = 128;
const CHAINS: usize = 16;
const ONES: i32 = 0x101_0101;
type Ints = __m512i;
type Floats = __m512;

vector_int8_kernel!("avx512_int8", "avx512f,avx512vnni", rows: [1 2 3 4 5 6 7 8 9 10 11 12 13], 14);

#[inline]
#[target_feature(enable = "avx512f,avx512vnni")]
fn ints(x: i32) -> Ints {
    _mm512_set1_epi32(x)
}

#[inline]
#[target_feature(enable = "avx512f,avx512vnni")]
fn floats(x: f32) -> Floats {
    _mm512_set1_ps(x)
}

/// # Safety
/// 64 bytes.
#[inline]
#[target_feature(enable = "avx512f,avx512vnni")]
unsafe fn weights(from: *const u8) -> Ints {
    // SAFETY: as promised by the caller.
    unsafe { _mm512_loadu_si512(from.cast::<__m512i>()) }
}

/// # Safety
/// Sixteen halves.
#[inline]
#[target_feature(enable = "avx512f,avx512vnni")]
unsafe fn halves(from: *const u8) -> Floats {
    // SAFETY: as promised by the caller.
    _mm512_cvtph_ps(unsafe { _mm256_loadu_si256(from.cast::<__m256i>()) })
}

/// `x` has signs, `y` has none.
#[inline]
#[target_feature(enable = "avx512f,avx512vnni")]
fn add_products(sums: Ints, x: Ints, y: Ints) -> Ints {
    _mm512_dpbusd_epi32(sums, y, x)
}

#[inline]
#[target_feature(enable = "avx512f,avx512vnni")]
fn times(x: Floats, y: Floats) -> Floats {
    _mm512_mul_ps(x, y)
}

#[inline]
#[target_feature(enable = "avx512f,avx512vnni")]
fn add_scaled(to: Floats, sums: Ints, scale: Floats) -> Floats {
    _mm512_fmadd_ps(_mm512_cvtepi32_ps(sums), scale, to)
}

#[inline]
#[target_feature(enable = "avx512f,avx512vnni")]
fn add_times(to: Floats, x: Floats, y: Floats) -> Floats {
    _mm512_fmadd_ps(x, y, to)
}
