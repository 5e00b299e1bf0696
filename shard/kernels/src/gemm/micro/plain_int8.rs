//! The reference of products in 8 bits, in plain Rust, on panels as AVX-512 VNNI wants them: one side without a sign.
#![allow(unsafe_code)] // the signature of a tile

use std::slice;

use half::f16;

use super::{MicroKernel, Takes, Tile};
use crate::gemm::bytes::{BLOCK, Bytes};

const MR: usize = 4;
const NR: usize = 16;
const BYTES: Bytes = Bytes { group: 4, excess: 128 };
const LANES: usize = 32;

pub(super) static KERNEL: MicroKernel =
    MicroKernel { name: "plain_int8", mr: MR, nr: NR, takes: Takes::Blocks(BYTES), tile, lines: None, spin, flops: 2 * LANES };

/// # Safety
/// The tile's pointers are good for what its documentation says.
unsafe fn tile(t: Tile) {
    let (inputs, weights) = (BYTES.input_words() * MR, BYTES.weight_bytes(NR));
    // SAFETY: `k` blocks of each panel, as the caller promises; any bits are numbers of either type.
    let (a, b) = unsafe {
        (slice::from_raw_parts(t.a.cast::<u32>(), t.k * inputs), slice::from_raw_parts(t.b.cast::<u8>(), t.k * weights))
    };
    for row in 0..t.rows {
        // SAFETY: `rows` rows of NR results, `stride` apart; nobody else holds them.
        let c = unsafe { slice::from_raw_parts_mut(t.c.add(row * t.stride), NR) };
        if t.fresh {
            c.fill(0.0);
        }
        for (a, b) in a.chunks_exact(inputs).zip(b.chunks_exact(weights)) {
            let (values, scales) = b.split_at(BLOCK * NR);
            let [scale, before] = [0, 1].map(|below| a[(BLOCK / BYTES.group + below) * MR + row]);
            let (scale, before) = (f32::from_bits(scale), before as i32);
            for (column, c) in c.iter_mut().enumerate() {
                let group = |g: usize| {
                    let x = a[g * MR + row].to_le_bytes();
                    let w = &values[(g * NR + column) * BYTES.group..][..BYTES.group];
                    x.iter().zip(w).map(|(x, w)| i32::from(*x as i8) * i32::from(*w)).sum::<i32>()
                };
                let sum = before + (0..BLOCK / BYTES.group).map(group).sum::<i32>();
                let of_column = f16::from_le_bytes([scales[2 * column], scales[2 * column + 1]]).to_f32();
                *c = (sum as f32).mul_add(of_column * scale, *c);
            }
        }
    }
}

fn spin(rounds: usize) -> f32 {
    let (value, mut sums) = (std::hint::black_box(1i8), [1i32; LANES]);
    for _ in 0..rounds {
        for sum in &mut sums {
            *sum = sum.wrapping_add(i32::from(value) * i32::from(value));
        }
    }
    sums.iter().map(|sum| *sum as f32).sum()
}
