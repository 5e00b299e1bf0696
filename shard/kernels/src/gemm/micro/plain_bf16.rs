//! The reference of products of pairs of bf16, in plain Rust: bit for bit what the instruction does.
#![allow(unsafe_code)] // the signature of a tile

use std::slice;

use super::{MicroKernel, Tile};

const MR: usize = 4;
const NR: usize = 16;
const LANES: usize = 32;

pub(super) static KERNEL: MicroKernel = MicroKernel { name: "plain_bf16", mr: MR, nr: NR, pairs: true, tile, spin, lanes: LANES };

/// # Safety
/// The tile's pointers are good for what its documentation says.
unsafe fn tile(t: Tile) {
    // SAFETY: `k` rows of each panel, as the caller promises.
    let (a, b) = unsafe { (slice::from_raw_parts(t.a, t.k * MR), slice::from_raw_parts(t.b, t.k * NR)) };
    for row in 0..t.rows {
        // SAFETY: `rows` rows of NR results, `stride` apart; nobody else holds them.
        let c = unsafe { slice::from_raw_parts_mut(t.c.add(row * t.stride), NR) };
        let mut sums = [0f32; NR];
        if !t.fresh {
            sums.copy_from_slice(c);
        }
        for (a, b) in a.as_chunks::<MR>().0.iter().zip(b.as_chunks::<NR>().0) {
            for (sum, b) in sums.iter_mut().zip(b) {
                *sum = add_products(*sum, a[row].to_bits(), b.to_bits());
            }
        }
        c.copy_from_slice(&sums);
    }
}

/// The later of a pair first, each rounded once.
fn add_products(sum: f32, a: u32, b: u32) -> f32 {
    let (upper, lower) =
        (|pair: u32| flushed(f32::from_bits(pair & 0xffff_0000)), |pair: u32| flushed(f32::from_bits(pair << 16)));
    let sum = flushed(upper(a).mul_add(upper(b), flushed(sum)));
    flushed(lower(a).mul_add(lower(b), sum))
}

/// Zero, of the same sign, in place of what is too small to be normal.
fn flushed(x: f32) -> f32 {
    if x.is_subnormal() { 0f32.copysign(x) } else { x }
}

fn spin(rounds: usize) -> f32 {
    let (pair, mut sums) = (std::hint::black_box(0x3f80_3f80), [1f32; LANES]);
    for _ in 0..rounds {
        for sum in &mut sums {
            *sum = add_products(*sum, pair, pair);
        }
    }
    sums.iter().sum()
}
