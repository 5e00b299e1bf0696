//! A kernel laid on a picture of twice the size, each pixel repeated: a window sees some pixels twice, whose weights are added before anything is
//! multiplied.
//!
//! Which ones depends on whether a row and a column of the output are even: four kernels, each for a quarter of the output, of 2 x 2 pixels
//! where there were 3 x 3, and so with four ninths of the products (the "sub-pixel" form of Shi et al., 2016, read backwards).

use std::ops::Range;

use crate::conv::Geometry;
use crate::conv::laid::Laid;
use crate::gemm::bf16;

/// Kernels of a doubling one: for even rows and even columns of the output, for even rows and odd columns, and so on.
pub(super) const PHASES: usize = 4;

/// Height and width of the window of each, if the doubling one's is `size`, which is odd.
pub(super) fn window(size: usize) -> usize {
    size / 2 + 1
}

/// `weight: [filters, size, size]` as [`PHASES`] kernels `[filters, window, window]`. Weights are added from the upper left on.
pub(super) fn kernels(weight: &[f32], size: usize) -> [Vec<f32>; PHASES] {
    assert!(size % 2 == 1, "a kernel that has a middle");
    let (window, padding) = (window(size), size / 2);
    // Row `at` of the window of an even or an odd output row sees a row of the picture, counted from the first that the window sees.
    let seen = |odd: usize, at: usize| (odd + at + padding % 2) / 2 - (odd + padding % 2) / 2;
    std::array::from_fn(|phase| {
        let mut sums = vec![0.0; weight.len() / (size * size) * window * window];
        for (filter, sums) in weight.chunks_exact(size * size).zip(sums.chunks_exact_mut(window * window)) {
            for (at, weight) in filter.iter().enumerate() {
                sums[seen(phase / 2, at / size) * window + seen(phase % 2, at % size)] += weight;
            }
        }
        sums
    })
}

/// Rounds `weight: [filters, size, size]` to bf16, so that each filter's sum is as exact as its smallest weight: what pixels beside each other
/// have in common, which is most of what they are, meets no other error. The largest come first, and what is lost of one is added to the next.
pub(super) fn round_together(weight: &mut [f32], size: usize) {
    let mut order: Vec<usize> = (0..size * size).collect();
    for filter in weight.chunks_exact_mut(size * size) {
        order.sort_by(|a, b| filter[*b].abs().total_cmp(&filter[*a].abs()).then(a.cmp(b)));
        let mut lost = 0.0;
        for at in &order {
            let wanted = filter[*at] + lost;
            filter[*at] = bf16::from_f32(wanted).to_f32();
            lost = wanted - filter[*at];
        }
    }
}

/// The windows of all of them on the picture before it is doubled.
pub(super) fn laid(geometry: Geometry, size: usize) -> Laid {
    assert_eq!(geometry, Geometry::same(geometry.input, size), "windows that keep the size of the doubled picture");
    let padding = size / 2;
    Laid {
        input: geometry.input,
        stride: 1,
        before: [padding.div_ceil(2); 2],
        after: padding.div_ceil(2),
        size: window(size),
        spread: padding % 2,
        output: geometry.input,
    }
}

/// The pixels of the output that `run`, of one line of the picture, becomes: in the even row of both that the line becomes (0), or in the odd one.
pub(super) fn pixels_of(run: &Range<usize>, width: usize, odd: usize) -> Range<usize> {
    let (row, column) = (run.start / width, run.start % width);
    let first = (2 * row + odd) * 2 * width + 2 * column;
    first..first + 2 * run.len()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn rounded_together_a_filter_keeps_its_sum(weight in prop::collection::vec(-1f32..1.0, 4)) {
            let mut rounded = weight.clone();
            round_together(&mut rounded, 2);
            // Half of the last place of the smallest, and what f32 loses on the way.
            let smallest = weight.iter().map(|w| f64::from(w.abs())).fold(1.0, f64::min);
            let lost = weight.iter().zip(&rounded).map(|(w, r)| f64::from(*w) - f64::from(*r)).sum::<f64>();
            prop_assert!(lost.abs() <= (smallest + 1.0 / 256.0) / 256.0, "{:?} loses {}", weight, lost);
            for (w, r) in weight.iter().zip(&rounded) {
                prop_assert_eq!(bf16::from_f32(*r).to_f32(), *r);
                prop_assert!((w - r).abs() <= 1.0 / 128.0);
            }
        }
    }
}
