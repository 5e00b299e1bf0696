//! CPU kernels on plain slices, and the process's memory policy.
//!
//! Knows neither candle nor models: a kernel takes slices and sizes. Every output row is computed from its own input row
//! with a fixed order of additions, so a row's bits depend neither on the batch it is in nor on the number of threads.
//! Transcendental functions are our own ([`math`]), so that the host's C library has no say in a picture.
//!
//! **Paths.** [`cpu::path`] is found once. What is written in plain Rust and compiled for each ([`activation`], [`rows`],
//! [`channels`], [`heads`], [`rope`]) gives the same bits on every path; the products ([`gemm`], [`attention`], [`conv`]) use fused
//! multiply-adds where there are any, and differ between paths in the last bits. Another instruction set is one more
//! [`gemm::micro::MicroKernel`]; nothing else knows what the machine can do.

pub mod blocks;
pub mod conv;
pub mod cpu;
pub mod math;
pub mod memory;

pub mod activation;
pub mod attention;
pub mod channels;
pub mod fourier;

pub mod gemm;
pub mod heads;
pub mod limit;
pub mod mirror;

pub mod rope;
pub mod rows;
pub mod streaming;

mod scratch;
mod threads;

#[cfg(test)]
mod guard;
