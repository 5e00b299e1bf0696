//! The reference, in plain Rust: a product is rounded before it is added.
#![allow(unsafe_code)] // the signature of a tile

use std::slice;

use super::{MicroKernel, Takes, Tile};

const MR: usize = 4;
const NR: usize = 16;
const LANES: usize = 32;

pub(super) static KERNEL: MicroKernel = MicroKernel {
    name: "plain",
    mr: MR,
    nr: NR,
    takes: Takes::Floats,
    tile,
    chunks: false,
    lines: None,
    places: false,
    spin,
    flops: 2 * LANES,
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
                *sum += a[row] * b;
            }
        }
        c.copy_from_slice(&sums);
    }
}

fn spin(rounds: usize) -> f32 {
    let (factor, mut sums) = (std::hint::black_box(0.999_f32), [1f32; LANES]);
    for _ in 0..rounds {
        for sum in &mut sums {
            *sum = *sum * factor + 0.001;
        }
    }
    sums.iter().sum()
}
