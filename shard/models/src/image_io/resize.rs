//! Pillow's 8-bit Lanczos resize, to the bit: fixed-point weights, first along rows, then along columns.
//!
//! Follows `src/libImaging/Resample.c` (`precompute_coeffs`, `normalize_coeffs_8bpc`, `ImagingResample*_8bpc`).

use std::f64::consts::PI;

/// Half the filter's width.
const LANCZOS_SUPPORT: f64 = 3.0;
/// Fraction bits of a weight: 8 for the result and 2 to overflow into.
const PRECISION_BITS: u32 = 32 - 8 - 2;
const CHANNELS: usize = 3;

/// Resizes rows of `R, G, B` from one (width, height) to another; neither is 0.
pub(super) fn lanczos(data: &[u8], [in_w, in_h]: [usize; 2], [out_w, out_h]: [usize; 2]) -> Vec<u8> {
    let rows = if in_w == out_w { data.to_vec() } else { along_rows(data, in_w, &Weights::new(in_w, out_w)) };
    if in_h == out_h { rows } else { along_columns(&rows, out_w, &Weights::new(in_h, out_h)) }
}

/// For every output position the inputs it is made of.
struct Weights {
    /// First input and the weights from there on.
    positions: Vec<(usize, Vec<i32>)>,
}

impl Weights {
    fn new(in_size: usize, out_size: usize) -> Self {
        let scale = in_size as f64 / out_size as f64;
        // When shrinking, the filter widens to cover all inputs.
        let filter_scale = scale.max(1.0);
        let support = LANCZOS_SUPPORT * filter_scale;
        let position = |i: usize| {
            let center = (i as f64 + 0.5) * scale;
            // The casts saturate at 0, as the reference does by hand.
            let first = (center - support + 0.5) as usize;
            let end = ((center + support + 0.5) as usize).min(in_size);
            let weight = |j: usize| filter((j as f64 - center + 0.5) * (1.0 / filter_scale));
            let weights: Vec<f64> = (first..end).map(weight).collect();
            let sum: f64 = weights.iter().sum();
            (first, weights.into_iter().map(|w| fixed(if sum == 0.0 { w } else { w / sum })).collect())
        };
        Self { positions: (0..out_size).map(position).collect() }
    }
}

fn filter(x: f64) -> f64 {
    if (-LANCZOS_SUPPORT..LANCZOS_SUPPORT).contains(&x) { sinc(x) * sinc(x / LANCZOS_SUPPORT) } else { 0.0 }
}

fn sinc(x: f64) -> f64 {
    if x == 0.0 { 1.0 } else { libm::sin(x * PI) / (x * PI) }
}

/// Rounds half away from zero.
fn fixed(weight: f64) -> i32 {
    let scaled = weight * f64::from(1 << PRECISION_BITS);
    (if weight < 0.0 { scaled - 0.5 } else { scaled + 0.5 }) as i32
}

fn along_rows(data: &[u8], in_w: usize, weights: &Weights) -> Vec<u8> {
    let mut out = Vec::with_capacity(data.len() / in_w * weights.positions.len());
    for row in data.chunks_exact(in_w * CHANNELS) {
        for (first, weights) in &weights.positions {
            for c in 0..CHANNELS {
                let inputs = row.iter().skip(first * CHANNELS + c).step_by(CHANNELS);
                out.push(weighted(inputs, weights));
            }
        }
    }
    out
}

fn along_columns(data: &[u8], width: usize, weights: &Weights) -> Vec<u8> {
    let row = width * CHANNELS;
    let mut out = Vec::with_capacity(row * weights.positions.len());
    for (first, weights) in &weights.positions {
        for column in 0..row {
            let inputs = data.iter().skip(first * row + column).step_by(row);
            out.push(weighted(inputs, weights));
        }
    }
    out
}

fn weighted<'a>(inputs: impl Iterator<Item = &'a u8>, weights: &[i32]) -> u8 {
    let half = 1 << (PRECISION_BITS - 1);
    let sum = inputs.zip(weights).fold(half, |sum: i32, (v, w)| sum.wrapping_add(i32::from(*v).wrapping_mul(*w)));
    (sum >> PRECISION_BITS).clamp(0, 255) as u8
}
