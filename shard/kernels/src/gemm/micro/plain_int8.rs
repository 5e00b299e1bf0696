//! The reference of products in 8 bits, in plain Rust, on panels as AVX-512 VNNI wants them: one side without a sign.
#![allow(unsafe_code)] // the signature of a tile

use std::slice;

use half::f16;

use super::{MicroKernel, Takes, Tile};
use crate::gemm::bytes::{BLOCK, Bytes, Scales};

const MR: usize = 4;
const NR: usize = 16;
const GROUP: usize = 4;
const LANES: usize = 32;

pub(super) static KERNELS: [MicroKernel; 4] = [
    kernel::<{ Scales::Stored as usize }>(),
    kernel::<{ Scales::Nibbles as usize }>(),
    kernel::<{ Scales::Whole as usize }>(),
    kernel::<{ Scales::Halves as usize }>(),
];

const fn kernel<const SCALES: usize>() -> MicroKernel {
    let takes = Takes::Blocks(bytes(Scales::ALL[SCALES]));
    MicroKernel {
        name: "plain_int8",
        mr: MR,
        nr: NR,
        takes,
        tile: tile::<SCALES>,
        chunks: false,
        lines: None,
        places: false,
        spin,
        flops: 2 * LANES,
    }
}

const fn bytes(scales: Scales) -> Bytes {
    Bytes { group: GROUP, excess: 128, scales }
}

/// # Safety
/// The tile's pointers are good for what its documentation says.
unsafe fn tile<const SCALES: usize>(t: Tile) {
    let of = Scales::ALL[SCALES];
    let (inputs, weights, parts) = (bytes(of).input_words() * MR, bytes(of).weight_bytes(NR), of.parts());
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
            let (values, of_columns) = b.split_at(BLOCK * NR);
            let of_row = |below: usize| a[(BLOCK / GROUP + below) * MR + row];
            let float = |at: usize| f32::from_le_bytes(std::array::from_fn(|byte| of_columns[4 * at + byte]));
            let half = |at: usize| f16::from_le_bytes([of_columns[2 * at], of_columns[2 * at + 1]]).to_f32();
            let scale_of_row = f32::from_bits(of_row(0));
            for (column, c) in c.iter_mut().enumerate() {
                let group = |g: usize| {
                    let x = a[g * MR + row].to_le_bytes();
                    let w = &values[(g * NR + column) * GROUP..][..GROUP];
                    x.iter().zip(w).map(|(x, w)| i32::from(*x as i8) * i32::from(*w)).sum::<i32>()
                };
                let groups = BLOCK / GROUP / parts;
                for part in 0..parts {
                    let sum = of_row(1 + part) as i32 + (part * groups..(part + 1) * groups).map(group).sum::<i32>();
                    let at = part * NR + column;
                    let scale = if of == Scales::Stored { half(column) } else { float(at) };
                    *c = (sum as f32).mul_add(scale * scale_of_row, *c);
                    if of != Scales::Stored {
                        *c = float(parts * NR + at).mul_add(f32::from_bits(of_row(1 + parts + part)), *c);
                    }
                }
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
