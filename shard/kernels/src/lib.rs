//! CPU kernels on plain slices, and the process's memory policy.
//!
//! Knows neither candle nor models: a kernel takes slices and sizes. Every output row is computed from its own input row
//! with a fixed order of additions, so a row's bits do not depend on the batch it is in. Transcendental functions come from
//! the `libm` crate, so that the host's C library has no say in a picture.

pub mod memory;

pub mod activation;
pub mod rows;
