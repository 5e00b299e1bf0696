//! Norms over the channels of each place, where channels are planes, and what is added to each channel.

use std::mem::MaybeUninit;

use crate::activation::Activation;
use crate::cpu::vectorised;
use crate::gemm::{Plane, SharedPlane};
use crate::memory::{Output, seen};
use crate::{scratch, threads};

/// Places whose lengths are summed together: a few lines of every channel's plane.
const PLACES: usize = 512;
/// Elements below which all stays on one thread.
const SMALL: usize = 1 << 15;
/// Channels shorter than this (all zero, in effect) are divided by it.
pub const LEAST_LENGTH: f32 = 1e-12;

/// `y = x / max(|x|, LEAST_LENGTH) sqrt(C) weight`, then `activation`, where `|x|` is the length of a place's channels.
/// `x, y: [B, C, S]`, `weight: [C]`; `places` is `S`. A length is one sum in the order of the channels.
pub fn rms_norm<'a>(
    x: &[f32],
    y: &'a mut (impl Output + ?Sized),
    [channels, places]: [usize; 2],
    weight: &[f32],
    activation: Option<Activation>,
) -> &'a mut [f32] {
    let y = y.unread();
    assert_eq!(x.len(), y.len());
    assert_eq!(weight.len(), channels, "one weight for each channel");
    let item = channels * places;
    if x.is_empty() {
        return &mut [];
    }
    assert!(item > 0 && x.len().is_multiple_of(item), "whole items");
    let blocks = places.div_ceil(PLACES);
    let small = x.len() < SMALL;
    let items = x.len() / item;
    let shared = SharedPlane::of(&mut *y, places);
    threads::over_jobs(items * blocks, small, |job| {
        let (item_index, block) = (job / blocks, job % blocks);
        let columns = block * PLACES..places.min((block + 1) * PLACES);
        #[allow(unsafe_code)] // threads write disjoint places
        // SAFETY: every job has an item's rows and places of its own.
        let mut y = unsafe { shared.part(item_index * channels..(item_index + 1) * channels, columns.clone()) };
        let plane = |c: usize| &x[item_index * item + c * places..][columns.clone()];
        scratch::with([columns.len()], |[scale]| {
            let scale = &mut scale[..columns.len()];
            scale.fill(0.0);
            (0..channels).for_each(|c| add_squares(scale, plane(c)));
            invert(scale, (channels as f32).sqrt());
            for (c, weight) in weight.iter().enumerate() {
                write_row(&mut y, c, plane(c), scale, *weight, activation);
            }
        });
    });
    #[allow(unsafe_code)] // floats from here on
    // SAFETY: every channel of every place is written.
    unsafe {
        seen(y)
    }
}

/// `y = x + by`, a number for each channel of each item. `x, y: [B, C, S]`, `by: [B, C]`; `places` is `S`.
pub fn shift<'a>(x: &[f32], y: &'a mut (impl Output + ?Sized), places: usize, by: &[f32]) -> &'a mut [f32] {
    let y = y.unread();
    assert!(x.len() == y.len() && by.len() * places == y.len(), "a number for each channel");
    threads::over_rows(&mut *y, places, |first, y| {
        for (channel, y) in (first..).zip(y.chunks_exact_mut(places)) {
            add_to_all(&x[channel * places..][..places], y, by[channel]);
        }
    });
    #[allow(unsafe_code)] // floats from here on
    // SAFETY: every channel is written.
    unsafe {
        seen(y)
    }
}

vectorised! {
    fn add_to_all(x: &[f32], y: &mut [MaybeUninit<f32>], by: f32) {
        for (y, x) in y.iter_mut().zip(x) {
            y.write(*x + by);
        }
    }
}

fn write_row(y: &mut Plane<'_>, row: usize, x: &[f32], scale: &[f32], weight: f32, activation: Option<Activation>) {
    scaled(x, y.unread_row(row), scale, weight);
    if let Some(activation) = activation {
        activation.apply(y.row_mut(row));
    }
}

vectorised! {
    fn add_squares(sum: &mut [f32], x: &[f32]) {
        for (sum, x) in sum.iter_mut().zip(x) {
            *sum += *x * *x;
        }
    }
}

vectorised! {
    /// Sums of squares to what their channels are multiplied by.
    fn invert(sums: &mut [f32], root: f32) {
        for v in sums {
            let length = v.sqrt();
            *v = root / if length < LEAST_LENGTH { LEAST_LENGTH } else { length };
        }
    }
}

vectorised! {
    fn scaled(x: &[f32], y: &mut [MaybeUninit<f32>], scale: &[f32], weight: f32) {
        for ((y, x), scale) in y.iter_mut().zip(x).zip(scale) {
            y.write(*x * *scale * weight);
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn values(count: usize) -> Vec<f32> {
        (0..count).map(|i| ((i * 7919 + 13) % 1009) as f32 / 500.0 - 1.0).collect()
    }

    fn norm(x: &[f32], dims: [usize; 2], weight: &[f32], activation: Option<Activation>) -> Vec<f32> {
        let mut y = vec![f32::NAN; x.len()];
        rms_norm(x, &mut y, dims, weight, activation);
        y
    }

    proptest! {
        #[test]
        fn equals_the_formula(batch in 0usize..3, channels in 1usize..20, places in 1usize..1100) {
            let (x, weight) = (values(batch * channels * places), values(channels));
            let y = norm(&x, [channels, places], &weight, None);
            for (i, y) in y.iter().enumerate() {
                let (item, c, place) = (i / places / channels, i / places % channels, i % places);
                let at = |c: usize| f64::from(x[(item * channels + c) * places + place]);
                let mean = (0..channels).map(|c| at(c) * at(c)).sum::<f64>() / channels as f64;
                let expected = if mean == 0.0 { 0.0 } else { at(c) / mean.sqrt() * f64::from(weight[c]) };
                prop_assert!((f64::from(*y) - expected).abs() < 1e-5, "{y}, not {expected}");
            }
            let mut with_silu = y;
            Activation::Silu.apply(&mut with_silu);
            prop_assert_eq!(norm(&x, [channels, places], &weight, Some(Activation::Silu)), with_silu);
        }
    }

    #[test]
    fn a_place_without_a_signal_stays_zero() {
        assert_eq!(norm(&[0.0; 6], [3, 2], &[1.0, 2.0, 3.0], None), [0.0; 6]);
    }

    #[test]
    fn neither_neighbours_nor_threads_change_an_item() {
        let (channels, places) = (7, 3000);
        let (x, weight) = (values(2 * channels * places), values(channels));
        let two = rayon::ThreadPoolBuilder::new().num_threads(2).build().unwrap();
        let both = two.install(|| norm(&x, [channels, places], &weight, None));
        let alone: Vec<f32> = x.chunks(channels * places).flat_map(|x| norm(x, [channels, places], &weight, None)).collect();
        assert_eq!(both, alone);
    }
}
