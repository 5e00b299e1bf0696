//! Rotary positions.

use std::mem::MaybeUninit;

use crate::cpu::vectorised;
use crate::memory::{Output, seen};
use crate::threads;

/// Rotates pairs that lie half a head apart, `x0` in the first half and its `x1` at the same place of the second:
/// `(x0, x1) -> (x0 cos - x1 sin, x1 cos + x0 sin)`. `x, y: [B, N, L, Dh]`, `cos, sin: [L, Dh/2]`, or `[B, L, Dh/2]` with one table for each
/// item; `dims` are `N`, `L` and `Dh`. For pairs beside each other see [`crate::heads`].
pub fn rope_halves<'a>(
    x: &[f32],
    y: &'a mut (impl Output + ?Sized),
    [heads, tokens, width]: [usize; 3],
    cos: &[f32],
    sin: &[f32],
) -> &'a mut [f32] {
    let y = y.unread();
    assert_eq!(x.len(), y.len());
    assert_eq!(cos.len(), sin.len());
    assert!(width.is_multiple_of(2), "pairs in {width}");
    let half = width / 2;
    let item = heads * tokens * width;
    if x.is_empty() {
        return &mut [];
    }
    let tables = cos.len() / (tokens * half);
    assert!(cos.len() == tables * tokens * half && (tables == 1 || tables * item == x.len()), "a table for all or for each");
    threads::over_rows(&mut *y, width, |first, y| {
        for (row, y) in (first..).zip(y.chunks_exact_mut(width)) {
            let table = if tables == 1 { 0 } else { row / (heads * tokens) };
            let at = (table * tokens + row % tokens) * half;
            rotate_halves(&x[row * width..][..width], y, &cos[at..][..half], &sin[at..][..half]);
        }
    });
    #[allow(unsafe_code)] // floats from here on
    // SAFETY: every head of every token is written.
    unsafe {
        seen(y)
    }
}

vectorised! {
    /// One head of one token, of interleaved pairs.
    pub(crate) fn rotate(x: &[f32], y: &mut [MaybeUninit<f32>], cos: &[f32], sin: &[f32]) {
        for (((x, y), cos), sin) in x.as_chunks::<2>().0.iter().zip(y.as_chunks_mut::<2>().0).zip(cos).zip(sin) {
            *y = [x[0] * *cos - x[1] * *sin, x[1] * *cos + x[0] * *sin].map(MaybeUninit::new);
        }
    }
}

vectorised! {
    fn rotate_halves(x: &[f32], y: &mut [MaybeUninit<f32>], cos: &[f32], sin: &[f32]) {
        let half = cos.len();
        let ((x0, x1), (y0, y1)) = (x.split_at(half), y.split_at_mut(half));
        for (((((y0, y1), x0), x1), cos), sin) in y0.iter_mut().zip(y1).zip(x0).zip(x1).zip(cos).zip(sin) {
            y0.write(*x0 * *cos - *x1 * *sin);
            y1.write(*x1 * *cos + *x0 * *sin);
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn equals_the_formula([batch, heads, tokens, half] in [0usize..3, 1usize..3, 1usize..5, 1usize..20], own: bool) {
            let width = 2 * half;
            let x: Vec<f32> = (0..batch * heads * tokens * width).map(|i| (i % 17) as f32 - 8.0).collect();
            let angles: Vec<f32> = (0..if own { batch } else { 1 } * tokens * half).map(|i| i as f32 * 0.37).collect();
            let (cos, sin): (Vec<f32>, Vec<f32>) = angles.iter().map(|a| (a.cos(), a.sin())).unzip();
            let mut y = vec![f32::NAN; x.len()];
            rope_halves(&x, &mut y, [heads, tokens, width], &cos, &sin);
            for (i, y) in y.iter().enumerate() {
                let (row, column) = (i / width, i % width);
                let table = if own { row / (heads * tokens) } else { 0 };
                let at = (table * tokens + row % tokens) * half + column % half;
                let other = if column < half { -x[i + half] } else { x[i - half] };
                prop_assert_eq!(*y, x[i] * cos[at] + other * sin[at]);
            }
        }
    }
}
