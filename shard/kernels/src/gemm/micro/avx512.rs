//! AVX-512: 14 rows by two vectors of 16, 28 chains in registers. Each result is the same chain of fused multiply-adds as on AVX2, so the bits
//! are the same.
#![allow(unsafe_code)] // intrinsics on pointers

use std::arch::x86_64::{__m512, _mm512_fmadd_ps, _mm512_loadu_ps, _mm512_set1_ps, _mm512_setzero_ps, _mm512_storeu_ps};

use super::{MicroKernel, Tile};

const MR: usize = 14;
const NR: usize = 32;
/// As many as fill the units whatever a multiply-add's latency, and stay in registers.
const CHAINS: usize = 16;

pub(super) static KERNEL: MicroKernel =
    MicroKernel { name: "avx512", mr: MR, nr: NR, pairs: false, tile, spin, lanes: CHAINS * 16 };

/// # Safety
/// The CPU has AVX-512F; the tile's pointers are good for what its documentation says.
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
#[target_feature(enable = "avx512f")]
unsafe fn rows<const R: usize>(t: Tile) {
    let mut sums: [[__m512; 2]; R] = [[_mm512_setzero_ps(); 2]; R];
    // SAFETY: every pointer stays in `[k][MR]` of `a`, `[k][NR]` of `b` and `[R][NR]` of `c`.
    unsafe {
        if !t.fresh {
            for (row, sum) in sums.iter_mut().enumerate() {
                let c = t.c.add(row * t.stride);
                *sum = [_mm512_loadu_ps(c), _mm512_loadu_ps(c.add(16))];
            }
        }
        let (mut a, mut b) = (t.a, t.b);
        for _ in 0..t.k {
            let (b0, b1) = (_mm512_loadu_ps(b), _mm512_loadu_ps(b.add(16)));
            for (row, sum) in sums.iter_mut().enumerate() {
                let x = _mm512_set1_ps(*a.add(row));
                sum[0] = _mm512_fmadd_ps(x, b0, sum[0]);
                sum[1] = _mm512_fmadd_ps(x, b1, sum[1]);
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
/// The CPU has AVX-512F.
#[target_feature(enable = "avx512f")]
unsafe fn spin(rounds: usize) -> f32 {
    let (factor, less) = (_mm512_set1_ps(std::hint::black_box(0.999)), _mm512_set1_ps(0.001));
    let mut sums = [_mm512_set1_ps(1.0); CHAINS];
    for _ in 0..rounds {
        for sum in &mut sums {
            *sum = _mm512_fmadd_ps(*sum, factor, less);
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
