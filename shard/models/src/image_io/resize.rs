//! 8-bit resizes, to the bit: fixed-point weights, first along rows, then along columns.
//!
//! Follows Pillow's `src/libImaging/Resample.c` (`precompute_coeffs`, `normalize_coeffs_8bpc`, `ImagingResample*_8bpc`).
//! torch's antialiased resize of bytes (`aten/src/ATen/native/cpu/UpSampleKernelAVXAntialias.h`) is the same with fewer bits.

use std::f64::consts::PI;

/// Fraction bits of Pillow's weights: 8 for the result and 2 to overflow into.
const PRECISION_BITS: u32 = 32 - 8 - 2;
const CHANNELS: usize = 3;

/// Which inputs an output is made of, and how exactly.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Filter {
    /// Pillow's `LANCZOS`.
    Lanczos,
    /// torchvision's `BICUBIC`: Pillow's with weights of 16 bits.
    Bicubic,
}

/// Resizes rows of `R, G, B` from one (width, height) to another; neither is 0.
pub(super) fn resize(data: &[u8], [in_w, in_h]: [usize; 2], [out_w, out_h]: [usize; 2], filter: Filter) -> Vec<u8> {
    let rows = if in_w == out_w { data.to_vec() } else { along_rows(data, in_w, &Weights::new(in_w, out_w, filter)) };
    if in_h == out_h { rows } else { along_columns(&rows, out_w, &Weights::new(in_h, out_h, filter)) }
}

/// For every output position the inputs it is made of.
struct Weights {
    /// First input and the weights from there on.
    positions: Vec<(usize, Vec<i32>)>,
    /// Fraction bits of a weight.
    precision: u32,
}

impl Weights {
    fn new(in_size: usize, out_size: usize, filter: Filter) -> Self {
        let scale = in_size as f64 / out_size as f64;
        // When shrinking, the filter widens to cover all inputs.
        let filter_scale = scale.max(1.0);
        let support = filter.support() * filter_scale;
        let position = |i: usize| {
            let center = (i as f64 + 0.5) * scale;
            // The casts saturate at 0, as the reference does by hand.
            let first = (center - support + 0.5) as usize;
            let end = ((center + support + 0.5) as usize).min(in_size);
            let weight = |j: usize| filter.at((j as f64 - center + 0.5) * (1.0 / filter_scale));
            let weights: Vec<f64> = (first..end).map(weight).collect();
            let sum: f64 = weights.iter().sum();
            (first, weights.into_iter().map(|w| if sum == 0.0 { w } else { w / sum }).collect())
        };
        let exact: Vec<(usize, Vec<f64>)> = (0..out_size).map(position).collect();
        let precision = filter.precision(exact.iter().flat_map(|(_, weights)| weights).fold(0.0, |a, b| f64::max(a, *b)));
        let fix = |(first, weights): (usize, Vec<f64>)| (first, weights.into_iter().map(|w| fixed(w, precision)).collect());
        Self { positions: exact.into_iter().map(fix).collect(), precision }
    }
}

impl Filter {
    /// Half its width.
    fn support(self) -> f64 {
        match self {
            Self::Lanczos => 3.0,
            Self::Bicubic => 2.0,
        }
    }

    fn at(self, x: f64) -> f64 {
        let distance = x.abs();
        match self {
            Self::Lanczos if (-3.0..3.0).contains(&x) => sinc(x) * sinc(x / 3.0),
            Self::Bicubic if distance < 1.0 => (1.5 * distance - 2.5) * distance * distance + 1.0,
            Self::Bicubic if distance < 2.0 => (((distance - 5.0) * distance + 8.0) * distance - 4.0) * -0.5,
            _ => 0.0,
        }
    }

    /// Fraction bits of weights up to `largest`.
    fn precision(self, largest: f64) -> u32 {
        match self {
            Self::Lanczos => PRECISION_BITS,
            // As many as there is room for in 16 bits.
            Self::Bicubic => (1..PRECISION_BITS).find(|bits| fixed(largest, bits + 1) >= 1 << 15).unwrap_or(PRECISION_BITS),
        }
    }
}

fn sinc(x: f64) -> f64 {
    if x == 0.0 { 1.0 } else { libm::sin(x * PI) / (x * PI) }
}

/// Rounds half away from zero.
fn fixed(weight: f64, precision: u32) -> i32 {
    let scaled = weight * f64::from(1 << precision);
    (if weight < 0.0 { scaled - 0.5 } else { scaled + 0.5 }) as i32
}

fn along_rows(data: &[u8], in_w: usize, weights: &Weights) -> Vec<u8> {
    let precision = weights.precision;
    let mut out = Vec::with_capacity(data.len() / in_w * weights.positions.len());
    for row in data.chunks_exact(in_w * CHANNELS) {
        for (first, kernel) in &weights.positions {
            for c in 0..CHANNELS {
                let inputs = row.iter().skip(first * CHANNELS + c).step_by(CHANNELS);
                out.push(weighted(inputs, kernel, precision));
            }
        }
    }
    out
}

fn along_columns(data: &[u8], width: usize, weights: &Weights) -> Vec<u8> {
    let (row, precision) = (width * CHANNELS, weights.precision);
    let mut out = Vec::with_capacity(row * weights.positions.len());
    for (first, kernel) in &weights.positions {
        for column in 0..row {
            let inputs = data.iter().skip(first * row + column).step_by(row);
            out.push(weighted(inputs, kernel, precision));
        }
    }
    out
}

fn weighted<'a>(inputs: impl Iterator<Item = &'a u8>, weights: &[i32], precision: u32) -> u8 {
    let half = 1 << (precision - 1);
    let sum = inputs.zip(weights).fold(half, |sum: i32, (v, w)| sum.wrapping_add(i32::from(*v).wrapping_mul(*w)));
    (sum >> precision).clamp(0, 255) as u8
}
