//! Norms and softmax over rows. Sums run in sixteen fixed lanes that are added as a tree, whatever the machine.

use std::mem::MaybeUninit;

use crate::activation::Activation;
use crate::cpu::vectorised;
use crate::gemm::narrow_rows;
use crate::memory::{Output, seen, unread};
use crate::{math, scratch, streaming, threads};

const LANES: usize = 16;
/// Floats that are passed over twice: 8 KiB.
const NEAR: usize = 2048;
/// Floats whose moments are taken at once: 16 KiB.
const AT_ONCE: usize = 4096;

/// Sum of `f(x)` in sixteen lanes, the lanes added as a balanced tree.
#[inline(always)]
fn lane_sum(x: &[f32], f: impl Fn(f32) -> f32) -> f32 {
    let mut lanes = [0f32; LANES];
    let chunks = x.chunks_exact(LANES);
    let tail = chunks.remainder();
    for chunk in chunks {
        for (lane, v) in lanes.iter_mut().zip(chunk) {
            *lane += f(*v);
        }
    }
    for (lane, v) in lanes.iter_mut().zip(tail) {
        *lane += f(*v);
    }
    sum_of_lanes(lanes)
}

/// As a balanced tree.
#[inline(always)]
fn sum_of_lanes(mut lanes: [f32; LANES]) -> f32 {
    let mut width = LANES / 2;
    while width > 0 {
        for i in 0..width {
            lanes[i] += lanes[i + width];
        }
        width /= 2;
    }
    lanes[0]
}

/// Mean and 1 / sqrt(variance + eps) of `x`, in two passes (one pass loses digits when the mean is large).
#[inline(always)]
fn moments(x: &[f32], eps: f32) -> (f32, f32) {
    let n = x.len() as f32;
    let mean = lane_sum(x, |v| v) / n;
    let variance = lane_sum(x, |v| (v - mean) * (v - mean)) / n;
    (mean, 1.0 / (variance + eps).sqrt())
}

/// `y = (x - mean) / sqrt(var + eps) * weight + bias` for each row of `width`; a missing `weight: [width]` is one, a
/// missing `bias: [width]` zero.
pub fn layer_norm<'a>(
    x: &[f32],
    y: &'a mut (impl Output + ?Sized),
    width: usize,
    weight: Option<&[f32]>,
    bias: Option<&[f32]>,
    eps: f32,
) -> &'a mut [f32] {
    let y = y.unread();
    assert_eq!(x.len(), y.len());
    assert!(weight.is_none_or(|w| w.len() == width) && bias.is_none_or(|b| b.len() == width), "one weight for each column");
    each_row(&mut *y, width, |row, y| {
        let y = normalized(&x[row * width..][..width], y, eps);
        match (weight, bias) {
            (Some(weight), Some(bias)) => scale_and_shift(y, weight, bias),
            (Some(weight), None) => scale(y, weight),
            (None, Some(bias)) => shift(y, bias),
            (None, None) => {}
        }
    });
    #[allow(unsafe_code)] // floats from here on
    // SAFETY: every row is written.
    unsafe {
        seen(y)
    }
}

/// Adaptive layer norm: `y = (x - mean) / sqrt(var + eps) * (1 + scale) + shift`. `x, y: [B, L, D]`, `shift, scale: [B, D]`;
/// `rows` is `L` and `width` `D`.
pub fn layer_norm_modulate<'a>(
    x: &[f32],
    y: &'a mut (impl Output + ?Sized),
    [rows, width]: [usize; 2],
    shift: &[f32],
    scale: &[f32],
    eps: f32,
) -> &'a mut [f32] {
    let y = y.unread();
    assert_eq!(x.len(), y.len());
    assert_eq!(shift.len(), scale.len());
    assert_eq!(scale.len() * rows, y.len(), "one scale and shift for each item");
    each_row(&mut *y, width, |row, y| {
        let item = row / rows;
        modulate(&x[row * width..][..width], &scale[item * width..][..width], &shift[item * width..][..width], eps, y);
    });
    #[allow(unsafe_code)] // floats from here on
    // SAFETY: every row is written.
    unsafe {
        seen(y)
    }
}

/// Calls `f(number, row)` for each row of `y`, which it writes. Those of a tensor that no cache holds are made aside and then written past them.
fn each_row(y: &mut [MaybeUninit<f32>], width: usize, f: impl Fn(usize, &mut [MaybeUninit<f32>]) + Sync) {
    let large = y.len() >= streaming::LARGE;
    threads::over_rows(y, width, |first, y| {
        let rows = (first..).zip(y.chunks_exact_mut(width));
        if !large {
            return rows.for_each(|(row, y)| f(row, y));
        }
        scratch::with([width], |[aside]| {
            for (row, y) in rows {
                f(row, unread(&mut aside[..width]));
                #[allow(unsafe_code)] // past the caches
                // SAFETY: settled below, before this thread is done with its rows.
                unsafe {
                    streaming::copy(&aside[..width], y);
                }
            }
        });
        streaming::settle();
    });
}

/// `y = x + gate * of`, for each item of a batch. `x, of, y: [B, L, D]`, `gate: [B, D]`; `rows` is `L` and `width` `D`.
pub fn gated<'a>(
    x: &[f32],
    gate: &[f32],
    of: &[f32],
    y: &'a mut (impl Output + ?Sized),
    [rows, width]: [usize; 2],
) -> &'a mut [f32] {
    let y = y.unread();
    assert!(x.len() == y.len() && of.len() == y.len() && gate.len() * rows == y.len(), "one gate for each item");
    threads::over_rows(&mut *y, width, |first, y| {
        for (row, y) in (first..).zip(y.chunks_exact_mut(width)) {
            let (at, item) = (row * width, row / rows);
            add_gated(&x[at..][..width], &gate[item * width..][..width], &of[at..][..width], y);
        }
    });
    #[allow(unsafe_code)] // floats from here on
    // SAFETY: every row is written.
    unsafe {
        seen(y)
    }
}

vectorised! {
    fn add_gated(x: &[f32], gate: &[f32], of: &[f32], y: &mut [MaybeUninit<f32>]) {
        for (((y, x), gate), of) in y.iter_mut().zip(x).zip(gate).zip(of) {
            y.write(*x + *of * *gate);
        }
    }
}

/// Joins rows: `y: [rows, a + b]` of `a: [rows, widths[0]]` and `b: [rows, widths[1]]`.
pub fn join<'a>([a, b]: [&[f32]; 2], widths: [usize; 2], y: &'a mut (impl Output + ?Sized)) -> &'a mut [f32] {
    let y = y.unread();
    assert_eq!(a.len() + b.len(), y.len());
    let width = widths[0] + widths[1];
    threads::over_rows(&mut *y, width, |first, y| {
        for (row, y) in (first..).zip(y.chunks_exact_mut(width)) {
            y[..widths[0]].write_copy_of_slice(&a[row * widths[0]..][..widths[0]]);
            y[widths[0]..].write_copy_of_slice(&b[row * widths[1]..][..widths[1]]);
        }
    });
    #[allow(unsafe_code)] // floats from here on
    // SAFETY: every row is written.
    unsafe {
        seen(y)
    }
}

/// `y = x / sqrt(mean(x^2) + eps) * weight` for each row of `weight.len()`.
pub fn rms_norm<'a>(x: &[f32], y: &'a mut (impl Output + ?Sized), weight: &[f32], eps: f32) -> &'a mut [f32] {
    let y = y.unread();
    assert_eq!(x.len(), y.len());
    let width = weight.len();
    threads::over_rows(&mut *y, width, |first, y| {
        for (x, y) in x[first * width..].chunks_exact(width).zip(y.chunks_exact_mut(width)) {
            rms_row(x, y, weight, eps);
        }
    });
    #[allow(unsafe_code)] // floats from here on
    // SAFETY: every row is written.
    unsafe {
        seen(y)
    }
}

/// Group norm of `x, y: [B, C, S]` with `weight, bias: [C]`, then `activation`; statistics over `C / groups` channels of one
/// item. `spatial` is `S`.
pub fn group_norm<'a>(
    x: &[f32],
    y: &'a mut (impl Output + ?Sized),
    [groups, spatial]: [usize; 2],
    affine: [&[f32]; 2],
    eps: f32,
    activation: Option<Activation>,
) -> &'a mut [f32] {
    let y = y.unread();
    assert_eq!(x.len(), y.len());
    over_groups(&mut *y, [groups, spatial, 1], affine, |group, channels, y| {
        let moments = moments_of(&x[group * y.len()..][..y.len()], eps);
        for ((x, y), affine) in x[group * y.len()..].chunks_exact(spatial).zip(y.chunks_exact_mut(spatial)).zip(channels) {
            // Bit by bit, so that it is in the first-level cache still when it is activated.
            x.chunks(NEAR).zip(y.chunks_mut(NEAR)).for_each(|(x, y)| normed(x, y, moments, affine, activation));
        }
    });
    #[allow(unsafe_code)] // floats from here on
    // SAFETY: every row is written.
    unsafe {
        seen(y)
    }
}

/// As [`group_norm`], rounded to bf16, two channels as one whose floats have both in their bits, the earlier one in the lower half:
/// `y: [B, C / 2, S]`, as convolutions in bf16 take it. Groups are of whole pairs.
pub fn group_norm_in_pairs<'a>(
    x: &[f32],
    y: &'a mut (impl Output + ?Sized),
    [groups, spatial]: [usize; 2],
    affine: [&[f32]; 2],
    eps: f32,
    activation: Option<Activation>,
) -> &'a mut [f32] {
    let y = y.unread();
    assert_eq!(x.len(), 2 * y.len());
    over_groups(&mut *y, [groups, spatial, 2], affine, |group, channels, y| {
        let x = &x[2 * group * y.len()..][..2 * y.len()];
        let moments = moments_of(x, eps);
        scratch::with([NEAR, NEAR], |[lower, upper]| {
            for (x, y) in x.chunks_exact(2 * spatial).zip(y.chunks_exact_mut(spatial)) {
                let affine = [(); 2].map(|()| channels.next().unwrap_or_default());
                for (at, y) in (0..).step_by(NEAR).zip(y.chunks_mut(NEAR)) {
                    let both = [&mut lower[..y.len()], &mut upper[..y.len()]];
                    for (channel, line) in both.into_iter().enumerate() {
                        normed(&x[channel * spatial + at..][..y.len()], unread(line), moments, affine[channel], activation);
                    }
                    narrow_rows(&lower[..y.len()], Some(&upper[..y.len()]), y);
                }
            }
        });
    });
    #[allow(unsafe_code)] // floats from here on
    // SAFETY: every row is written.
    unsafe {
        seen(y)
    }
}

/// Calls `f` with each group's number, weight and bias of its channels, and place in `y`, of which `of_each` channels make one.
fn over_groups(
    y: &mut [MaybeUninit<f32>],
    [groups, spatial, of_each]: [usize; 3],
    [weight, bias]: [&[f32]; 2],
    f: impl Fn(usize, &mut dyn Iterator<Item = [f32; 2]>, &mut [MaybeUninit<f32>]) + Sync,
) {
    assert!(weight.len() == bias.len() && groups > 0, "a weight and a bias for each channel");
    let of_group = weight.len() / groups;
    assert!(weight.len() == groups * of_group && of_group.is_multiple_of(of_each), "whole channels in each group");
    let width = of_group / of_each * spatial;
    threads::over_rows(y, width, |first, y| {
        for (group, y) in (first..).zip(y.chunks_exact_mut(width)) {
            let channels = group % groups * of_group..(group % groups + 1) * of_group;
            f(group, &mut channels.map(|channel| [weight[channel], bias[channel]]), y);
        }
    });
}

/// `(x - mean) scale weight + bias`, then `activation`.
fn normed(
    x: &[f32],
    y: &mut [MaybeUninit<f32>],
    (mean, scale): (f32, f32),
    [weight, bias]: [f32; 2],
    activation: Option<Activation>,
) {
    let of_channel = [mean, scale * weight, bias];
    if activation == Some(Activation::Silu) {
        return affine_silu(x, y, of_channel);
    }
    affine_plane(x, y, of_channel);
    if let Some(activation) = activation {
        #[allow(unsafe_code)] // floats from here on
        // SAFETY: each of them has just been written.
        activation.apply(unsafe { seen(y) });
    }
}

/// Softmax of each row of `width`, in place. A row whose entries are all `-inf` becomes zeros.
pub fn softmax(x: &mut [f32], width: usize) {
    threads::over_rows(x, width, |_, x| {
        for row in x.chunks_exact_mut(width) {
            softmax_row(row);
        }
    });
}

fn normalized<'a>(x: &[f32], y: &'a mut [MaybeUninit<f32>], eps: f32) -> &'a mut [f32] {
    assert_eq!(x.len(), y.len());
    normalize(x, y, eps);
    #[allow(unsafe_code)] // floats from here on
    // SAFETY: each has its number.
    unsafe {
        seen(y)
    }
}

vectorised! {
    fn normalize(x: &[f32], y: &mut [MaybeUninit<f32>], eps: f32) {
        let (mean, scale) = moments(x, eps);
        for (y, x) in y.iter_mut().zip(x) {
            y.write((*x - mean) * scale);
        }
    }
}

vectorised! {
    pub(crate) fn rms_row(x: &[f32], y: &mut [MaybeUninit<f32>], weight: &[f32], eps: f32) {
        let scale = 1.0 / (lane_sum(x, |v| v * v) / x.len() as f32 + eps).sqrt();
        for ((y, x), w) in y.iter_mut().zip(x).zip(weight) {
            y.write(*x * scale * *w);
        }
    }
}

vectorised! {
    /// As [`moments`], of many: by parts that are in the first-level cache still when they are looked at again, which are put together as
    /// Chan, Golub and LeVeque do. So memory is read once.
    fn moments_of(x: &[f32], eps: f32) -> (f32, f32) {
        let (mut count, mut mean, mut squares) = (0.0, 0.0, 0.0);
        for part in x.chunks(AT_ONCE) {
            let of_part = part.len() as f64;
            let mean_of_part = lane_sum(part, |v| v) / part.len() as f32;
            let squares_of_part = lane_sum(part, |v| (v - mean_of_part) * (v - mean_of_part));
            let (distance, all) = (f64::from(mean_of_part) - mean, count + of_part);
            mean += distance * of_part / all;
            squares += f64::from(squares_of_part) + distance * distance * count * of_part / all;
            count = all;
        }
        (mean as f32, 1.0 / ((squares / count) as f32 + eps).sqrt())
    }
}

vectorised! {
    fn affine_plane(x: &[f32], y: &mut [MaybeUninit<f32>], mean_scale_bias: [f32; 3]) {
        let [mean, scale, bias] = mean_scale_bias;
        for (y, x) in y.iter_mut().zip(x) {
            y.write((*x - mean) * scale + bias);
        }
    }
}

vectorised! {
    /// As [`affine_plane`], then SiLU.
    fn affine_silu(x: &[f32], y: &mut [MaybeUninit<f32>], mean_scale_bias: [f32; 3]) {
        let [mean, scale, bias] = mean_scale_bias;
        for (y, x) in y.iter_mut().zip(x) {
            let v = (*x - mean) * scale + bias;
            y.write(v * math::sigmoid(v));
        }
    }
}

vectorised! {
    fn scale_and_shift(y: &mut [f32], weight: &[f32], bias: &[f32]) {
        for ((y, w), b) in y.iter_mut().zip(weight).zip(bias) {
            *y = *y * *w + *b;
        }
    }
}

vectorised! {
    fn scale(y: &mut [f32], weight: &[f32]) {
        for (y, w) in y.iter_mut().zip(weight) {
            *y *= *w;
        }
    }
}

vectorised! {
    /// `y += bias`.
    pub(crate) fn shift(y: &mut [f32], bias: &[f32]) {
        for (y, b) in y.iter_mut().zip(bias) {
            *y += *b;
        }
    }
}

vectorised! {
    /// `y += unit bias`.
    pub(crate) fn shift_by(y: &mut [f32], bias: &[f32], unit: f32) {
        for (y, b) in y.iter_mut().zip(bias) {
            *y += *b * unit;
        }
    }
}

vectorised! {
    fn modulate(x: &[f32], scale: &[f32], shift: &[f32], eps: f32, y: &mut [MaybeUninit<f32>]) {
        let (mean, factor) = moments(x, eps);
        for (((y, x), scale), shift) in y.iter_mut().zip(x).zip(scale).zip(shift) {
            y.write((*x - mean) * factor * (1.0 + *scale) + *shift);
        }
    }
}

vectorised! {
    /// The largest value; `-inf` of nothing. In lanes, since one chain of maxima would wait for itself.
    pub(crate) fn maximum(x: &[f32]) -> f32 {
        let mut lanes = [f32::NEG_INFINITY; LANES];
        let chunks = x.chunks_exact(LANES);
        let tail = chunks.remainder();
        for chunk in chunks {
            for (lane, v) in lanes.iter_mut().zip(chunk) {
                *lane = if *v > *lane { *v } else { *lane };
            }
        }
        lanes.iter().chain(tail).fold(f32::NEG_INFINITY, |max, v| if *v > max { *v } else { max })
    }
}

vectorised! {
    /// Replaces each `x` by `e^(x - max)` and gives their sum.
    pub(crate) fn exponentials(x: &mut [f32], max: f32) -> f32 {
        let mut lanes = [0f32; LANES];
        let (chunks, tail) = x.as_chunks_mut::<LANES>();
        for chunk in chunks {
            for (lane, v) in lanes.iter_mut().zip(chunk) {
                *v = math::exp(*v - max);
                *lane += *v;
            }
        }
        for (lane, v) in lanes.iter_mut().zip(tail) {
            *v = math::exp(*v - max);
            *lane += *v;
        }
        sum_of_lanes(lanes)
    }
}

/// Of exponentials.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Base {
    /// `e^x`, as exact as f32 is.
    E,
    /// The same, as exact as bf16 needs it.
    RoughE,
    /// `2^x`, as exact as bf16 needs it.
    Two,
}

vectorised! {
    /// Turns a row of scores into exponentials under the maximum of these and all before them, brings their sum under it too, and gives
    /// what else is to be multiplied by for that.
    pub(crate) fn carry(scores: &mut [f32], max: &mut f32, sum: &mut f32, base: Base) -> f32 {
        let of_scores = maximum(scores);
        let new = if of_scores > *max { of_scores } else { *max };
        if new == f32::NEG_INFINITY {
            scores.fill(0.0);
            return 1.0;
        }
        let less = match base {
            _ if *max == new || *max == f32::NEG_INFINITY => 1.0,
            Base::E => math::exp(*max - new),
            Base::RoughE => math::rough_exp_below(*max - new),
            Base::Two => math::exp2_below(*max - new),
        };
        *max = new;
        let more = match base {
            Base::E => exponentials(scores, new),
            Base::RoughE => rough_exponentials(scores, new),
            Base::Two => exponentials_of_two(scores, new),
        };
        *sum = *sum * less + more;
        less
    }
}

vectorised! {
    /// As [`exponentials`], as exact as bf16 needs it.
    fn rough_exponentials(x: &mut [f32], max: f32) -> f32 {
        replace_and_add(x, |v| math::rough_exp_below(v - max))
    }
}

vectorised! {
    /// The same, of two.
    fn exponentials_of_two(x: &mut [f32], max: f32) -> f32 {
        replace_and_add(x, |v| math::exp2_below(v - max))
    }
}

/// Replaces each `x` by `f(x)` and gives their sum, in twice as many lanes as [`lane_sum`].
#[inline(always)]
fn replace_and_add(x: &mut [f32], f: impl Fn(f32) -> f32) -> f32 {
    let mut lanes = [0f32; 2 * LANES];
    let (chunks, tail) = x.as_chunks_mut::<{ 2 * LANES }>();
    for chunk in chunks {
        for (lane, v) in lanes.iter_mut().zip(chunk) {
            *v = f(*v);
            *lane += *v;
        }
    }
    for (lane, v) in lanes.iter_mut().zip(tail) {
        *v = f(*v);
        *lane += *v;
    }
    let [mut sums, upper] = *lanes.as_chunks::<LANES>().0 else { unreachable!("two times {LANES}") };
    sums.iter_mut().zip(upper).for_each(|(sum, upper)| *sum += upper);
    sum_of_lanes(sums)
}

vectorised! {
    /// `y = factor x`.
    pub(crate) fn scaled(x: &[f32], factor: f32, y: &mut [f32]) {
        for (y, x) in y.iter_mut().zip(x) {
            *y = x * factor;
        }
    }
}

vectorised! {
    /// `y *= factor`.
    pub(crate) fn multiply(y: &mut [f32], factor: f32) {
        for v in y {
            *v *= factor;
        }
    }
}

fn softmax_row(row: &mut [f32]) {
    let max = maximum(row);
    if max == f32::NEG_INFINITY {
        return row.fill(0.0);
    }
    let sum = exponentials(row, max);
    multiply(row, 1.0 / sum);
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// `rows` rows of `width` pseudo-random values about `centre`.
    fn values(rows: usize, width: usize, centre: f32) -> Vec<f32> {
        (0..rows * width).map(|i| ((i * 7919 + 13) % 1009) as f32 / 500.0 - 1.0 + centre).collect()
    }

    /// Norm of one row in f64.
    fn reference(row: &[f32], eps: f64) -> Vec<f64> {
        let n = row.len() as f64;
        let mean = row.iter().map(|v| f64::from(*v)).sum::<f64>() / n;
        let variance = row.iter().map(|v| (f64::from(*v) - mean).powi(2)).sum::<f64>() / n;
        row.iter().map(|v| (f64::from(*v) - mean) / (variance + eps).sqrt()).collect()
    }

    fn close(got: &[f32], expected: impl IntoIterator<Item = f64>) {
        for (i, (got, expected)) in got.iter().zip(expected).enumerate() {
            let error = (f64::from(*got) - expected).abs();
            assert!(error <= 2e-5 * (1.0 + expected.abs()), "element {i} is {got}, not {expected}");
        }
    }

    #[test]
    fn moments_of_many_parts_keep_their_digits() {
        for count in [AT_ONCE, AT_ONCE + 1, 5 * AT_ONCE + 77] {
            // Far from zero, and further on than at the beginning.
            let x: Vec<f32> =
                values(1, count, 1.0).iter().enumerate().map(|(i, v)| v + 300.0 + i as f32 / count as f32).collect();
            let wide = || x.iter().map(|v| f64::from(*v));
            let mean = wide().sum::<f64>() / count as f64;
            let variance = wide().map(|v| (v - mean).powi(2)).sum::<f64>() / count as f64;
            let (of_mean, of_scale) = moments_of(&x, 1e-6);
            assert!((f64::from(of_mean) / mean - 1.0).abs() < 1e-6, "{of_mean}, not {mean}");
            assert!((f64::from(of_scale) * (variance + 1e-6).sqrt() - 1.0).abs() < 1e-5, "{of_scale} for {variance}");
        }
    }

    proptest! {
        #[test]
        fn layer_norms_equal_their_reference(rows in 0usize..5, width in 1usize..70, centre in -3f32..3.0) {
            let x = values(rows, width, centre);
            let (weight, bias) = (values(1, width, 1.0), values(1, width, 0.3));
            let mut y = vec![f32::NAN; x.len()];
            let expected = |f: &dyn Fn(f64, usize) -> f64| {
                x.chunks(width).flat_map(|row| reference(row, 1e-3).into_iter().enumerate().map(|(i, v)| f(v, i)).collect::<Vec<_>>()).collect::<Vec<_>>()
            };
            layer_norm(&x, &mut y, width, None, None, 1e-3);
            close(&y, expected(&|v, _| v));
            layer_norm(&x, &mut y, width, Some(&weight), Some(&bias), 1e-3);
            close(&y, expected(&|v, i| v * f64::from(weight[i]) + f64::from(bias[i])));
            layer_norm(&x, &mut y, width, Some(&weight), None, 1e-3);
            close(&y, expected(&|v, i| v * f64::from(weight[i])));
            if rows > 0 {
                layer_norm_modulate(&x, &mut y, [rows, width], &bias, &weight, 1e-3);
                close(&y, expected(&|v, i| v * (1.0 + f64::from(weight[i])) + f64::from(bias[i])));
            }
        }

        #[test]
        fn rms_norm_and_softmax_equal_their_references(rows in 0usize..5, width in 1usize..70) {
            let x = values(rows, width, 0.2);
            let weight = values(1, width, 1.0);
            let mut y = vec![f32::NAN; x.len()];
            rms_norm(&x, &mut y, &weight, 1e-6);
            close(&y, x.chunks(width).flat_map(|row| {
                let mean = row.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>() / width as f64;
                row.iter().zip(&weight).map(move |(v, w)| f64::from(*v) / (mean + 1e-6).sqrt() * f64::from(*w)).collect::<Vec<_>>()
            }));
            let mut y = x.clone();
            softmax(&mut y, width);
            close(&y, x.chunks(width).flat_map(|row| {
                let sum: f64 = row.iter().map(|v| f64::from(*v).exp()).sum();
                row.iter().map(move |v| f64::from(*v).exp() / sum).collect::<Vec<_>>()
            }));
        }

        #[test]
        fn group_norm_equals_its_reference(batch in 0usize..3, groups in 1usize..4, per_group in 1usize..5, spatial in 1usize..40) {
            let channels = groups * per_group;
            let x = values(batch * channels, spatial, 0.5);
            let (weight, bias) = (values(1, channels, 1.0), values(1, channels, 0.3));
            let mut y = vec![f32::NAN; x.len()];
            group_norm(&x, &mut y, [groups, spatial], [&weight, &bias], 1e-3, None);
            let normal = x.chunks(per_group * spatial).flat_map(|group| reference(group, 1e-3));
            let affine = |(i, v): (usize, f64)| v * f64::from(weight[i / spatial % channels]) + f64::from(bias[i / spatial % channels]);
            close(&y, normal.enumerate().map(affine));
            let mut with_silu = vec![f32::NAN; x.len()];
            group_norm(&x, &mut with_silu, [groups, spatial], [&weight, &bias], 1e-3, Some(Activation::Silu));
            Activation::Silu.apply(&mut y);
            prop_assert_eq!(&y, &with_silu);
            for activation in [None, Some(Activation::Silu), Some(Activation::Gelu)].into_iter().filter(|_| per_group % 2 == 0) {
                let mut expected = vec![f32::NAN; x.len()];
                group_norm(&x, &mut expected, [groups, spatial], [&weight, &bias], 1e-3, activation);
                let mut pairs = vec![f32::NAN; x.len() / 2];
                group_norm_in_pairs(&x, &mut pairs, [groups, spatial], [&weight, &bias], 1e-3, activation);
                for (pairs, two) in pairs.chunks(spatial).zip(expected.chunks(2 * spatial)) {
                    let mut both = vec![f32::NAN; spatial];
                    narrow_rows(&two[..spatial], Some(&two[spatial..]), &mut both);
                    prop_assert!(pairs.iter().zip(&both).all(|(pair, both)| pair.to_bits() == both.to_bits()));
                }
            }
        }
    }

    #[test]
    fn a_masked_row_becomes_zeros() {
        let mut masked = [f32::NEG_INFINITY; 5];
        softmax(&mut masked, 5);
        assert_eq!(masked, [0.0; 5]);
        let mut partly = [f32::NEG_INFINITY, 1.0, f32::NEG_INFINITY];
        softmax(&mut partly, 3);
        assert_eq!(partly, [0.0, 1.0, 0.0]);
    }

    #[test]
    fn neither_neighbours_nor_threads_change_a_row() {
        let (rows, width) = (200, 333); // over what one thread takes alone
        let x = values(rows, width, 0.1);
        let weight = values(1, width, 1.0);
        let (mut all, mut alone, mut soft) = (vec![0.0; x.len()], vec![0.0; x.len()], x.clone());
        let two = rayon::ThreadPoolBuilder::new().num_threads(2).build().unwrap();
        let run = |all: &mut [f32], soft: &mut [f32]| {
            rms_norm(&x, all, &weight, 1e-6);
            softmax(soft, width);
        };
        two.install(|| run(&mut all, &mut soft));
        for (x, y) in x.chunks(width).zip(alone.chunks_mut(width)) {
            rms_norm(x, y, &weight, 1e-6);
        }
        assert_eq!(all, alone);
        let mut soft_alone = x.clone();
        soft_alone.chunks_mut(width).for_each(|row| softmax(row, width));
        assert_eq!(soft, soft_alone);
    }

    #[test]
    fn rows_of_a_large_tensor_are_as_those_of_a_small_one() {
        let width = 1003; // rows begin anywhere in a line of the caches
        let rows = streaming::LARGE.div_ceil(width);
        let (x, scale, shift) = (values(rows, width, 0.4), values(1, width, 1.0), values(1, width, 0.3));
        let mut y = vec![f32::NAN; x.len()];
        let mut alone = vec![f32::NAN; width];
        layer_norm_modulate(&x, &mut y, [rows, width], &shift, &scale, 1e-5);
        for (x, y) in x.chunks_exact(width).zip(y.chunks_exact(width)) {
            layer_norm_modulate(x, &mut alone, [1, width], &shift, &scale, 1e-5);
            assert_eq!(y, alone);
        }
    }
}
