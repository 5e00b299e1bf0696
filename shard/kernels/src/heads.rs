//! Heads of several streams of tokens, made ready for attention in one pass: normed, rotated, and put one stream after the other.

use std::mem::MaybeUninit;

use crate::memory::{Output, seen, unread};
use crate::rope::rotate;
use crate::rows::rms_row;
use crate::{scratch, threads};

/// Tokens whose heads have a norm of their own.
#[derive(Clone, Copy, Debug)]
pub struct Stream<'a> {
    /// `[B, tokens, heads, width]`
    pub x: &'a [f32],
    /// How many there are in each item of the batch.
    pub tokens: usize,
    /// The weight of an RMS norm of each head, `[width]`.
    pub norm: Option<&'a [f32]>,
}

/// The streams' heads, `y: [B, L, heads, width]`, L tokens of all streams. With a `rope` of cosines and sines, `[L, width / 2]` each or one
/// such table for each item, interleaved pairs are rotated: `(x0, x1) -> (x0 cos - x1 sin, x1 cos + x0 sin)`.
pub fn join<'a>(
    streams: &[Stream<'_>],
    y: &'a mut (impl Output + ?Sized),
    [heads, width]: [usize; 2],
    eps: f32,
    rope: Option<[&[f32]; 2]>,
) -> &'a mut [f32] {
    let y = y.unread();
    let (tokens, of_token) = (streams.iter().map(|stream| stream.tokens).sum::<usize>(), heads * width);
    if y.is_empty() {
        return &mut [];
    }
    let batch = y.len() / (tokens * of_token);
    assert!(y.len() == batch * tokens * of_token, "whole items of {tokens} tokens");
    for stream in streams {
        assert_eq!(stream.x.len(), batch * stream.tokens * of_token, "as many items of each stream");
        assert!(stream.norm.is_none_or(|weight| weight.len() == width), "a weight for each of {width}");
    }
    let table = tokens * (width / 2);
    if let Some([cos, sin]) = rope {
        assert!(width.is_multiple_of(2) && cos.len() == sin.len(), "pairs in {width}");
        assert!(cos.len() == table || cos.len() == batch * table, "a table for all or for each");
    }
    threads::over_rows(&mut *y, of_token, |first, y| {
        scratch::with([width], |[aside]| {
            for (row, y) in (first..).zip(y.chunks_exact_mut(of_token)) {
                let (item, token) = (row / tokens, row % tokens);
                let (stream, at) = find(streams, token);
                let rope = rope.map(|tables| {
                    let of_item = if tables[0].len() == table { 0 } else { item * table };
                    tables.map(|table| &table[of_item + token * (width / 2)..][..width / 2])
                });
                let x = &stream.x[(item * stream.tokens + at) * of_token..][..of_token];
                for (x, y) in x.chunks_exact(width).zip(y.chunks_exact_mut(width)) {
                    head(x, y, &mut aside[..width], stream.norm.map(|weight| (weight, eps)), rope);
                }
            }
        });
    });
    #[allow(unsafe_code)] // floats from here on
    // SAFETY: every head of every token is written.
    unsafe {
        seen(y)
    }
}

/// The stream of a token, and its place there.
fn find<'s, 'a>(streams: &'s [Stream<'a>], token: usize) -> (&'s Stream<'a>, usize) {
    let mut before = 0;
    let found = streams.iter().find(|stream| {
        before += stream.tokens;
        token < before
    });
    let Some(stream) = found else { panic!("token {token} of {before}") };
    (stream, token + stream.tokens - before)
}

fn head(x: &[f32], y: &mut [MaybeUninit<f32>], aside: &mut [f32], norm: Option<(&[f32], f32)>, rope: Option<[&[f32]; 2]>) {
    match (norm, rope) {
        (None, None) => {
            y.write_copy_of_slice(x);
        }
        (Some((weight, eps)), None) => rms_row(x, y, weight, eps),
        (None, Some([cos, sin])) => rotate(x, y, cos, sin),
        (Some((weight, eps)), Some([cos, sin])) => {
            rms_row(x, unread(aside), weight, eps);
            rotate(aside, y, cos, sin);
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::rows::rms_norm;

    fn values(n: usize, seed: usize) -> Vec<f32> {
        (0..n).map(|i| (((i + seed * 31) * 7919 + seed) % 1013) as f32 / 507.0 - 1.0).collect()
    }

    proptest! {
        #[test]
        fn streams_are_normed_rotated_and_joined(
            [batch, heads, half] in [1usize..4, 1usize..4, 1usize..20],
            tokens in prop::collection::vec(0usize..5, 1..4),
            [own, turned]: [bool; 2],
        ) {
            let (width, all) = (2 * half, tokens.iter().sum::<usize>());
            let tables = all * half * if own { batch } else { 1 };
            let (cos, sin): (Vec<f32>, Vec<f32>) = values(tables, 1).iter().map(|a| (a.cos(), a.sin())).unzip();
            let weight = values(width, 2);
            let xs: Vec<Vec<f32>> = tokens.iter().enumerate().map(|(i, n)| values(batch * n * heads * width, 3 + i)).collect();
            // Every second stream has a norm.
            let norm = |i: usize| i.is_multiple_of(2).then_some(weight.as_slice());
            let streams: Vec<Stream<'_>> =
                (0..xs.len()).map(|i| Stream { x: &xs[i], tokens: tokens[i], norm: norm(i) }).collect();
            let mut y = vec![f32::NAN; batch * all * heads * width];
            join(&streams, &mut y, [heads, width], 1e-6, turned.then_some([&cos, &sin]));
            let mut expected = Vec::new();
            for item in 0..batch {
                for (i, (x, n)) in xs.iter().zip(&tokens).enumerate() {
                    let x = &x[item * n * heads * width..][..n * heads * width];
                    let mut normed = x.to_vec();
                    if norm(i).is_some() {
                        rms_norm(x, &mut normed, &weight, 1e-6);
                    }
                    expected.extend(normed);
                }
            }
            for (i, y) in y.iter().enumerate() {
                let (row, column) = (i / width, i % width);
                let at = ((if own { row / (heads * all) } else { 0 }) * all + row / heads % all) * half + column / 2;
                let other = if column % 2 == 0 { -expected[i ^ 1] } else { expected[i ^ 1] };
                let expected = if turned { expected[i] * cos[at] + other * sin[at] } else { expected[i] };
                prop_assert_eq!(*y, expected);
            }
        }
    }
}
