//! The reference of products of tiles of bf16, in plain Rust: bit for bit what AMX does.
#![allow(unsafe_code)] // the signature of a tile

use std::slice;

use super::plain_bf16::{add_product, flushed};
use super::{MicroKernel, TILE_PAIRS, Takes, Tile};

const MR: usize = 2;
const NR: usize = 16;

pub(super) static KERNEL: MicroKernel = MicroKernel {
    name: "plain_tiles",
    mr: MR,
    nr: NR,
    takes: Takes::Tiles,
    tile,
    chunks: false,
    lines: None,
    places: false,
    spin,
    flops: 4 * TILE_PAIRS,
};

/// # Safety
/// The tile's pointers are good for what its documentation says.
unsafe fn tile(t: Tile) {
    // SAFETY: `k` pairs of each panel, as the caller promises.
    let (a, b) = unsafe { (slice::from_raw_parts(t.a, t.k * MR), slice::from_raw_parts(t.b, t.k * NR)) };
    for row in 0..t.rows {
        // SAFETY: `rows` rows of NR results, `stride` apart; nobody else holds them.
        let c = unsafe { slice::from_raw_parts_mut(t.c.add(row * t.stride), NR) };
        if t.fresh {
            c.fill(0.0);
        }
        let a = a.chunks_exact(MR * TILE_PAIRS).map(|a| &a[row * TILE_PAIRS..][..TILE_PAIRS]);
        for (a, b) in a.zip(b.chunks_exact(TILE_PAIRS * NR)) {
            for (column, c) in c.iter_mut().enumerate() {
                let pairs = a.iter().zip(b[column..].iter().step_by(NR)).map(|(a, b)| [a.to_bits(), b.to_bits()]);
                *c = add_products(*c, pairs);
            }
        }
    }
}

/// The earlier ones of the pairs are a chain, and so are the later ones; both together are added to the sum.
fn add_products(sum: f32, pairs: impl Iterator<Item = [u32; 2]>) -> f32 {
    let (mut earlier, mut later) = (0.0, 0.0);
    for pair in pairs {
        let [a, b] = pair.map(|pair| flushed(f32::from_bits(pair << 16)));
        earlier = add_product(earlier, a, b);
        let [a, b] = pair.map(|pair| flushed(f32::from_bits(pair & 0xffff_0000)));
        later = add_product(later, a, b);
    }
    flushed(flushed(sum) + flushed(earlier + later))
}

fn spin(rounds: usize) -> f32 {
    let pair = std::hint::black_box(0x3f80_3f80);
    (0..rounds).fold(1.0, |sum, _| add_products(sum, [[pair; 2]; TILE_PAIRS].into_iter()))
}
