//! What this machine can do at most, measured: the number a kernel's speed is held against.

use std::hint::black_box;
use std::time::{Duration, Instant};

use rayon::prelude::*;

use crate::blocks::BlockType;
use crate::gemm::bytes::Scales;
use crate::gemm::micro::{MicroKernel, Order};

/// Multiplications and additions per second, in GFLOP/s, of all threads of the current pool together: chains in registers,
/// no memory.
pub fn gflops() -> f64 {
    of(MicroKernel::best())
}

/// As [`gflops`], of products in bf16.
pub fn gflops_bf16(order: Order) -> f64 {
    of(MicroKernel::bf16(order))
}

/// As [`gflops`], of products in 8 bits with weights in such blocks: operations of whole numbers.
pub fn gops_int8(kind: BlockType) -> f64 {
    of(MicroKernel::int8(Scales::of(kind)))
}

fn of(kernel: &MicroKernel) -> f64 {
    const ROUNDS: usize = 2_000_000;
    let threads = rayon::current_num_threads();
    let shortest = best_of(3, || {
        (0..threads).into_par_iter().with_max_len(1).for_each(|_| {
            black_box(kernel.spin(black_box(ROUNDS)));
        });
    });
    (threads * ROUNDS * kernel.flops_per_round()) as f64 / shortest.as_secs_f64() / 1e9
}

/// Bytes read and written per second, in GB/s, by all threads copying `bytes` (above the caches for the memory's limit).
pub fn copy_gbps(bytes: usize) -> f64 {
    let n = bytes / size_of::<f32>();
    let (from, mut to) = (vec![1f32; n], vec![0f32; n]);
    let part = n.div_ceil(rayon::current_num_threads()).max(1);
    let seconds = best_of(5, || {
        to.par_chunks_mut(part).zip(from.par_chunks(part)).for_each(|(to, from)| to.copy_from_slice(from));
        black_box(&mut to);
    });
    2.0 * bytes as f64 / seconds.as_secs_f64() / 1e9
}

/// The shortest of some runs.
pub fn best_of(runs: usize, mut f: impl FnMut()) -> Duration {
    let timed = (0..runs.max(1)).map(|_| {
        let start = Instant::now();
        f();
        start.elapsed()
    });
    timed.min().unwrap_or_default()
}
