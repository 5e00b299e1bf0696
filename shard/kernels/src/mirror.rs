//! Pictures with a border that mirrors them.

use std::mem::MaybeUninit;

use rayon::prelude::*;

use crate::memory::{Output, seen};

/// `x: [N, h, w]` with `by` more rows and columns on each side, mirrored at the outermost ones, which are not repeated: `y: [N, h + 2 by, w + 2 by]`.
/// `by` is less than both sides.
pub fn reflect<'a>(x: &[f32], y: &'a mut (impl Output + ?Sized), [h, w]: [usize; 2], by: usize) -> &'a mut [f32] {
    let y = y.unread();
    let (tall, wide) = (h + 2 * by, w + 2 * by);
    assert!(by < h && by < w, "a border of {by} mirrors {h} x {w}");
    assert!(x.len().is_multiple_of(h * w) && y.len() == x.len() / (h * w) * tall * wide, "as many planes");
    y.par_chunks_mut(tall * wide).zip(x.par_chunks(h * w)).for_each(|(y, x)| {
        for (row, y) in y.chunks_mut(wide).enumerate() {
            let from = mirrored(row, h, by);
            widen(&x[from * w..(from + 1) * w], y, by);
        }
    });
    #[allow(unsafe_code)]
    // SAFETY: every row of every plane was written.
    unsafe {
        seen(y)
    }
}

fn widen(x: &[f32], y: &mut [MaybeUninit<f32>], by: usize) {
    let w = x.len();
    y[by..by + w].write_copy_of_slice(x);
    for i in 0..by {
        y[i].write(x[by - i]);
        y[by + w + i].write(x[w - 2 - i]);
    }
}

/// Where row `at` of the picture with its border comes from.
fn mirrored(at: usize, side: usize, by: usize) -> usize {
    if at < by {
        by - at
    } else if at < by + side {
        at - by
    } else {
        2 * side + by - 2 - at
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_picture_is_mirrored_at_its_outermost_rows() {
        let x: Vec<f32> = (0..24).map(|i| i as f32).collect();
        let mut y = vec![0.0; 2 * 7 * 8];
        reflect(&x, y.as_mut_slice(), [3, 4], 2);
        assert_eq!(y[..8], [10.0, 9.0, 8.0, 9.0, 10.0, 11.0, 10.0, 9.0]);
        assert_eq!(y[16..24], [2.0, 1.0, 0.0, 1.0, 2.0, 3.0, 2.0, 1.0]);
        assert_eq!(y[48..56], y[16..24]);
        assert_eq!(y[56..64], y[..8].iter().map(|v| v + 12.0).collect::<Vec<_>>()[..]);
        let mut same = vec![0.0; 24];
        reflect(&x, same.as_mut_slice(), [3, 4], 0);
        assert_eq!(same, x);
    }
}
