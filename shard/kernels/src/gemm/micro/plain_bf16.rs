//! The reference of products of pairs of bf16, in plain Rust: bit for bit what the instruction does.
#![allow(unsafe_code)] // the signature of a tile

use std::slice;

use super::{MicroKernel, Takes, Tile};

const MR: usize = 4;
const NR: usize = 16;
const LANES: usize = 32;

pub(super) static KERNEL: MicroKernel = MicroKernel {
    name: "plain_bf16",
    mr: MR,
    nr: NR,
    takes: Takes::Pairs,
    tile,
    chunks: false,
    lines: None,
    places: false,
    spin,
    flops: 4 * LANES,
};

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
    let sum = add_product(flushed(sum), upper(a), upper(b));
    add_product(sum, lower(a), lower(b))
}

/// A result is too small if it is so once rounded, as though exponents had no end: what is just below the smallest normal number can be
/// rounded up to it all the same, and is zero then.
pub(super) fn add_product(sum: f32, a: f32, b: f32) -> f32 {
    let y = a.mul_add(b, sum);
    if y.abs() == f32::MIN_POSITIVE {
        let exact = f64::from(a) * f64::from(b) + f64::from(sum);
        let rounded_to_it = f64::from(f32::MIN_POSITIVE) * (1.0 - f64::from(f32::EPSILON) / 4.0);
        return if exact.abs() < rounded_to_it { 0f32.copysign(y) } else { y };
    }
    flushed(y)
}

/// Zero, of the same sign, in place of what is too small to be normal.
pub(super) fn flushed(x: f32) -> f32 {
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
