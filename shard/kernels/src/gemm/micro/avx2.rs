//! AVX2 with fused multiply-add: 6 rows by two vectors of 8, twelve chains in registers.
#![allow(unsafe_code)] // intrinsics on pointers

use std::arch::x86_64::{
    __m256, _mm256_broadcast_ss, _mm256_fmadd_ps, _mm256_loadu_ps, _mm256_set1_ps, _mm256_setzero_ps, _mm256_storeu_ps,
};

use super::{MicroKernel, Tile};

const MR: usize = 6;
const NR: usize = 16;

pub(super) static KERNEL: MicroKernel = MicroKernel { name: "avx2", mr: MR, nr: NR, pairs: false, tile, spin, lanes: 12 * 8 };

/// # Safety
/// The CPU has AVX2 and FMA; the tile's pointers are good for what its documentation says.
unsafe fn tile(t: Tile) {
    // SAFETY: as promised by the caller.
    unsafe {
        match t.rows {
            1 => rows::<1>(t),
            2 => rows::<2>(t),
            3 => rows::<3>(t),
            4 => rows::<4>(t),
            5 => rows::<5>(t),
            _ => rows::<MR>(t),
        }
    }
}

/// # Safety
/// As [`tile`], and `R` is the tile's number of rows.
#[target_feature(enable = "avx2,fma")]
unsafe fn rows<const R: usize>(t: Tile) {
    let mut sums: [[__m256; 2]; R] = [[_mm256_setzero_ps(); 2]; R];
    // SAFETY: every pointer stays in `[k][MR]` of `a`, `[k][NR]` of `b` and `[R][NR]` of `c`.
    unsafe {
        if !t.fresh {
            for (row, sum) in sums.iter_mut().enumerate() {
                let c = t.c.add(row * t.stride);
                *sum = [_mm256_loadu_ps(c), _mm256_loadu_ps(c.add(8))];
            }
        }
        let (mut a, mut b) = (t.a, t.b);
        for _ in 0..t.k {
            let (b0, b1) = (_mm256_loadu_ps(b), _mm256_loadu_ps(b.add(8)));
            for (row, sum) in sums.iter_mut().enumerate() {
                let x = _mm256_broadcast_ss(&*a.add(row));
                sum[0] = _mm256_fmadd_ps(x, b0, sum[0]);
                sum[1] = _mm256_fmadd_ps(x, b1, sum[1]);
            }
            (a, b) = (a.add(MR), b.add(NR));
        }
        for (row, sum) in sums.iter().enumerate() {
            let c = t.c.add(row * t.stride);
            _mm256_storeu_ps(c, sum[0]);
            _mm256_storeu_ps(c.add(8), sum[1]);
        }
    }
}

#[target_feature(enable = "avx2,fma")]
fn spin(rounds: usize) -> f32 {
    let (factor, less) = (_mm256_set1_ps(std::hint::black_box(0.999)), _mm256_set1_ps(0.001));
    let mut sums = [_mm256_set1_ps(1.0); 12];
    for _ in 0..rounds {
        for sum in &mut sums {
            *sum = _mm256_fmadd_ps(*sum, factor, less);
        }
    }
    let mut lanes = [0f32; 8];
    for sum in sums {
        let mut out = [0f32; 8];
        // SAFETY: eight floats.
        unsafe { _mm256_storeu_ps(out.as_mut_ptr(), sum) };
        lanes.iter_mut().zip(out).for_each(|(lane, v)| *lane += v);
    }
    lanes.iter().sum()
}
