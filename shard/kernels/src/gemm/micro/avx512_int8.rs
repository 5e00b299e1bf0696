//! Products in 8 bits on AVX-512 VNNI: an instruction adds four products to each of sixteen sums. It takes one side without a sign, so
//! weights are stored 128 too large, and sums begin with what that adds, taken off.
#![allow(unsafe_code)] // intrinsics on pointers

use std::arch::asm;
use std::arch::x86_64::{
    __m256i, __m512, __m512i, _MM_HINT_T1, _mm256_loadu_si256, _mm512_cvtepi32_ps, _mm512_cvtph_ps, _mm512_dpbusd_epi32,
    _mm512_fmadd_ps, _mm512_loadu_si512, _mm512_mul_ps, _mm512_set1_epi32, _mm512_set1_ps,
};

use super::avx512::{LANES, load, store};
use super::vector_int8::vector_int8_kernel;
use super::{MicroKernel, Takes, Tile};
use crate::gemm::bytes::{BLOCK, Bytes, Scales};

const CHAINS: usize = 16;
const KEPT: bool = true;
const ONES: i32 = 0x101_0101;
type Ints = __m512i;
type Floats = __m512;

vector_int8_kernel!("avx512_int8", "avx512f,avx512vnni", rows: [1 2 3 4 5 6], 7);

const fn mr(_: u8) -> usize {
    7
}

const fn bytes(scales: u8) -> Bytes {
    Bytes { group: 4, excess: 128, scales: Scales::ALL[scales as usize] }
}

/// # Safety
/// As many groups of the tile's panels.
#[inline]
#[target_feature(enable = "avx512f,avx512vnni")]
unsafe fn products<const R: usize, const SCALES: u8>(a: *const i32, b: *const u8, groups: usize, sums: &mut [[Ints; 2]; R]) {
    let mut groups = groups;
    // SAFETY: nothing is done. How many there are is hidden, or groups would be unrolled and torn apart, and nothing stay in registers.
    unsafe { asm!("/* {} */", inout(reg) groups, options(pure, nomem, nostack, preserves_flags)) };
    // SAFETY: as promised by the caller.
    unsafe {
        for group in 0..groups {
            let b = b.add(4 * NR * group).cast::<__m512i>();
            let (b0, b1) = (_mm512_loadu_si512(b), _mm512_loadu_si512(b.add(1)));
            for (row, sum) in sums.iter_mut().enumerate() {
                let x = ints(*a.add(mr(SCALES) * group + row));
                *sum = [step::<SCALES>(sum[0], x, b0), step::<SCALES>(sum[1], x, b1)];
            }
        }
    }
}

/// `x` has signs, `y` has none.
#[inline]
#[target_feature(enable = "avx512f,avx512vnni")]
fn step<const SCALES: u8>(sums: Ints, x: Ints, y: Ints) -> Ints {
    _mm512_dpbusd_epi32(sums, y, x)
}

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
/// Sixteen halves.
#[inline]
#[target_feature(enable = "avx512f,avx512vnni")]
unsafe fn halves(from: *const u8) -> Floats {
    // SAFETY: as promised by the caller.
    _mm512_cvtph_ps(unsafe { _mm256_loadu_si256(from.cast::<__m256i>()) })
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
