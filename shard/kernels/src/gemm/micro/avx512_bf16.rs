//! AVX-512 BF16: tiles as in f32, of pairs. An instruction adds two products to each of sixteen sums.
#![allow(unsafe_code)] // intrinsics on pointers

use std::arch::x86_64::{
    __m512, __m512bh, __m512i, _mm512_dpbf16_ps, _mm512_loadu_ps, _mm512_loadu_si512, _mm512_set1_epi32, _mm512_set1_ps,
    _mm512_setzero_ps, _mm512_storeu_ps,
};
use std::mem::transmute;

use super::{MicroKernel, Tile};

const MR: usize = 14;
const NR: usize = 32;
/// As many as fill the units whatever an instruction's latency, and stay in registers.
const CHAINS: usize = 16;

pub(super) static KERNEL: MicroKernel =
    MicroKernel { name: "avx512_bf16", mr: MR, nr: NR, pairs: true, tile, spin, lanes: CHAINS * 16 };

/// # Safety
/// The CPU has AVX-512F and AVX-512 BF16; the tile's pointers are good for what its documentation says.
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
#[target_feature(enable = "avx512f,avx512bf16")]
unsafe fn rows<const R: usize>(t: Tile) {
    let mut sums: [[__m512; 2]; R] = [[_mm512_setzero_ps(); 2]; R];
    // SAFETY: every pointer stays in `[k][MR]` of `a`, `[k][NR]` of `b` and `[R][NR]` of `c`; a vector of pairs is any bits.
    unsafe {
        if !t.fresh {
            for (row, sum) in sums.iter_mut().enumerate() {
                let c = t.c.add(row * t.stride);
                *sum = [_mm512_loadu_ps(c), _mm512_loadu_ps(c.add(16))];
            }
        }
        let (mut a, mut b) = (t.a.cast::<i32>(), t.b.cast::<i32>());
        for _ in 0..t.k {
            let b0 = transmute::<__m512i, __m512bh>(_mm512_loadu_si512(b.cast()));
            let b1 = transmute::<__m512i, __m512bh>(_mm512_loadu_si512(b.add(16).cast()));
            for (row, sum) in sums.iter_mut().enumerate() {
                let x = transmute::<__m512i, __m512bh>(_mm512_set1_epi32(*a.add(row)));
                sum[0] = _mm512_dpbf16_ps(sum[0], x, b0);
                sum[1] = _mm512_dpbf16_ps(sum[1], x, b1);
            }
            (a, b) = (a.add(MR), b.add(NR));
        }
        for (row, sum) in sums.iter().enumerate() {
            let c = t.c.add(row * t.stride);
            _mm512_storeu_ps(c, sum[0]);
            _mm512_storeu_ps(c.add(16), sum[1]);
        }
    }
}

/// # Safety
/// The CPU has AVX-512F and AVX-512 BF16.
#[target_feature(enable = "avx512f,avx512bf16")]
unsafe fn spin(rounds: usize) -> f32 {
    // A pair of 0.001 and a pair of 1: sums grow, slowly.
    let pair = |value: f32| _mm512_set1_epi32((value.to_bits() >> 16 | value.to_bits() & 0xffff_0000) as i32);
    // SAFETY: any bits are a vector of pairs.
    let as_pairs = |bits| unsafe { transmute::<__m512i, __m512bh>(bits) };
    let (x, y) = (as_pairs(pair(std::hint::black_box(0.001))), as_pairs(pair(1.0)));
    let mut sums = [_mm512_set1_ps(1.0); CHAINS];
    for _ in 0..rounds {
        for sum in &mut sums {
            *sum = _mm512_dpbf16_ps(*sum, x, y);
        }
    }
    let mut total = 0.0;
    for sum in sums {
        let mut out = [0f32; 16];
        // SAFETY: sixteen floats.
        unsafe { _mm512_storeu_ps(out.as_mut_ptr(), sum) };
        total += out.iter().sum::<f32>();
    }
    total
}
