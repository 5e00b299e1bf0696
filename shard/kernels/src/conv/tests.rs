use proptest::prelude::*;

use super::*;
use crate::guard::Guarded;

/// Numbers that bf16 has.
fn values(n: usize, seed: usize) -> Vec<f32> {
    (0..n).map(|i| (((i + seed * 31) * 7919 + seed) % 251) as f32 / 128.0 - 1.0).collect()
}

/// The definition, in f64.
fn reference(x: &[f32], w: &[f32], bias: &[f32], [c_out, c_in, size]: [usize; 3], g: Geometry) -> Vec<f32> {
    let ([h, width], [out_h, out_w]) = (g.input, g.output(size));
    let at = |item: usize, c: usize, y: usize, x_: usize| {
        let inside = (g.before..g.before + h).contains(&y) && (g.before..g.before + width).contains(&x_);
        if inside { f64::from(x[((item * c_in + c) * h + y - g.before) * width + x_ - g.before]) } else { 0.0 }
    };
    let mut y = Vec::new();
    for item in 0..x.len() / (c_in * h * width) {
        for (o, bias) in bias.iter().enumerate().take(c_out) {
            for (row, column) in (0..out_h).flat_map(|r| (0..out_w).map(move |c| (r, c))) {
                let mut sum = f64::from(*bias);
                for (i, w) in w[o * c_in * size * size..][..c_in * size * size].iter().enumerate() {
                    let (c, ky, kx) = (i / (size * size), i / size % size, i % size);
                    sum += f64::from(*w) * at(item, c, row * g.stride + ky, column * g.stride + kx);
                }
                y.push(sum as f32);
            }
        }
    }
    y
}

/// `x` with each pixel repeated in both directions.
fn doubled(x: &[f32], width: usize) -> Vec<f32> {
    let wide = |line: &[f32]| line.iter().flat_map(|x| [*x; 2]).collect::<Vec<_>>();
    x.chunks_exact(width).flat_map(|line| [wide(line), wide(line)].concat()).collect()
}

fn run(conv: &Conv2d, x: &[f32], g: Geometry) -> Vec<f32> {
    let batch = x.len() / (conv.c_in * g.input.iter().product::<usize>());
    let mut y = vec![f32::NAN; batch * conv.c_out * conv.output(g).iter().product::<usize>()];
    conv.run(x, g, None, &mut y);
    y
}

fn kernels() -> Vec<&'static MicroKernel> {
    MicroKernel::all().into_iter().chain(MicroKernel::all_bf16()).collect()
}

/// What a kernel makes is `expected`, the same alone as in a batch, and with a residual as it is told.
fn agrees(conv: &Conv2d, x: &[f32], batch: usize, g: Geometry, expected: &[f32]) -> Result<(), TestCaseError> {
    let y = run(conv, x, g);
    prop_assert_eq!(y.len(), expected.len());
    for (y, expected) in y.iter().zip(expected) {
        prop_assert!((y - expected).abs() < 1e-4, "{:?}: {} is not {}", conv, y, expected);
    }
    let item = x.len() / batch;
    let alone: Vec<f32> = x.chunks(item).flat_map(|x| run(conv, x, g)).collect();
    prop_assert_eq!(&alone, &y);
    if conv.takes_pairs() {
        let area = g.input.iter().product::<usize>();
        let mut pairs = vec![f32::NAN; batch * conv.deep() * area];
        for (x, pairs) in x.chunks(item).zip(pairs.chunks_mut(conv.deep() * area)) {
            pair_channels(x, [conv.c_in, area], pairs);
        }
        let mut of_pairs = vec![f32::NAN; y.len()];
        conv.run_pairs(&pairs, g, None, &mut of_pairs);
        prop_assert_eq!(&of_pairs, &y);
    }
    let (residual, mut with) = (values(y.len(), 5), vec![f32::NAN; y.len()]);
    conv.run(x, g, Some(&residual), &mut with);
    let expected: Vec<f32> = y.iter().zip(&residual).map(|(y, residual)| y + residual).collect();
    prop_assert_eq!(with, expected);
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn equals_the_definition(
        [c_out, c_in, size] in [1usize..10, 1usize..40, 1usize..4],
        input in [1usize..12, 1usize..24],
        [batch, stride, before, after] in [1usize..3, 1usize..3, 0usize..2, 0usize..2],
    ) {
        let g = Geometry { input, stride, before, after };
        let (x, w, bias) = (values(batch * c_in * input[0] * input[1], 1), values(c_out * c_in * size * size, 2), values(c_out, 3));
        let expected = reference(&x, &w, &bias, [c_out, c_in, size], g);
        for kernel in kernels() {
            agrees(&Conv2d::pack_for(kernel, &w, [c_out, c_in, size], Some(&bias)), &x, batch, g, &expected)?;
        }
    }

    #[test]
    fn a_doubling_kernel_equals_the_definition_on_the_doubled_picture(
        [c_out, c_in, half] in [1usize..10, 1usize..40, 0usize..4],
        [height, width, batch] in [1usize..12, 1usize..24, 1usize..3],
        whole: bool,
    ) {
        let (size, input) = (2 * half + 1, [height, if whole { 32 } else { width }]);
        // Few bits, so that sums of weights are in bf16 what they are in f64.
        let few = |n: usize, seed: usize| values(n, seed).iter().map(|w| (w * 16.0).round() / 16.0).collect::<Vec<f32>>();
        let (x, w, bias) = (values(batch * c_in * input[0] * input[1], 1), few(c_out * c_in * size * size, 2), values(c_out, 3));
        let large = Geometry::same(input.map(|n| 2 * n), size);
        let expected = reference(&doubled(&x, input[1]), &w, &bias, [c_out, c_in, size], large);
        for kernel in kernels() {
            let conv = Conv2d::pack_doubling_for(kernel, &w, [c_out, c_in, size], Some(&bias));
            agrees(&conv, &x, batch, Geometry::same(input, size), &expected)?;
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    /// Pictures in whole tiles are read where they lie, others are copied for their windows: of a picture with one more column of zeros,
    /// which is what stands there anyway, all but the last results are the same.
    #[test]
    fn reading_in_place_changes_no_bit(
        [c_out, c_in] in [1usize..40, 1usize..70],
        [height, tiles, size, batch] in [1usize..8, 1usize..10, 2usize..4, 1usize..3],
        before in 0usize..2,
    ) {
        for kernel in kernels() {
            let Some(width) = (tiles * kernel.nr + size - 1).checked_sub(2 * before) else {
                continue;
            };
            let narrow = Geometry { input: [height + size, width], stride: 1, before, after: before };
            let pack = || Conv2d::pack_for(kernel, &values(c_out * c_in * size * size, 2), [c_out, c_in, size], Some(&values(c_out, 3)));
            in_place_as_in_panels(&pack(), [batch, c_in], narrow, |g| Laid::once(g, size))?;
        }
    }

    #[test]
    fn reading_in_place_changes_no_bit_of_a_doubled_picture(
        [c_out, c_in] in [1usize..40, 1usize..70],
        [height, tiles, half, batch] in [1usize..8, 1usize..10, 1usize..4, 1usize..3],
    ) {
        for kernel in kernels() {
            let (size, input) = (2 * half + 1, [height, tiles * kernel.nr]);
            let w = values(c_out * c_in * size * size, 2);
            let conv = Conv2d::pack_doubling_for(kernel, &w, [c_out, c_in, size], Some(&values(c_out, 3)));
            in_place_as_in_panels(&conv, [batch, c_in], Geometry::same(input, size), |g| doubling::laid(g, size))?;
        }
    }
}

/// Results of whole tiles are those of a picture that is wider by a column of zeros, which has none.
fn in_place_as_in_panels(
    conv: &Conv2d,
    [batch, c_in]: [usize; 2],
    narrow: Geometry,
    laid: impl Fn(Geometry) -> Laid,
) -> Result<(), TestCaseError> {
    let ([height, width], kernel) = (narrow.input, conv.kernel);
    let wide = Geometry { input: [height, width + 1], ..narrow };
    let reads = matches!(kernel.takes, Takes::Floats | Takes::Pairs | Takes::PairsByFloats) && kernel.reads_places();
    prop_assert_eq!(bands::fit(&laid(narrow), kernel), reads);
    prop_assert!(!bands::fit(&laid(wide), kernel));
    let x = values(batch * c_in * height * width, 1);
    let more: Vec<f32> = x.chunks_exact(width).flat_map(|line| line.iter().copied().chain([0.0])).collect();
    let (y, expected) = (run(conv, &x, narrow), run(conv, &more, wide));
    let ([_, n], [_, of_more]) = (conv.output(narrow), conv.output(wide));
    // Without zeros beside it, the last window that both have may be another's.
    for (y, expected) in y.chunks_exact(n).zip(expected.chunks_exact(of_more)) {
        prop_assert_eq!(y, &expected[..n]);
    }
    Ok(())
}

#[test]
fn in_bf16_the_picture_is_rounded_and_nothing_else() {
    let g = Geometry { input: [9, 11], stride: 1, before: 1, after: 1 };
    let x: Vec<f32> = values(5 * 99, 1).iter().map(|x| x * 1.001).collect();
    let rounded: Vec<f32> = x.iter().map(|x| bf16::from_f32(*x).to_f32()).collect();
    let narrow: Vec<bf16> = values(7 * 45, 2).into_iter().map(bf16::from_f32).collect();
    for order in Order::ALL {
        let conv = Conv2d::pack_pairs(order, &narrow, [7, 5, 3], None);
        assert_eq!(run(&conv, &x, g), run(&conv, &rounded, g));
        assert_ne!(run(&Conv2d::pack(&values(7 * 45, 2), [7, 5, 3], None), &x, g), run(&conv, &x, g));
    }
}

#[test]
fn threads_do_not_change_a_result() {
    let g = Geometry { input: [30, 37], stride: 1, before: 1, after: 1 };
    let conv = Conv2d::pack(&values(13 * 40 * 9, 1), [13, 40, 3], None);
    let x = values(2 * 40 * 30 * 37, 2);
    let on = |threads| rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap().install(|| run(&conv, &x, g));
    assert!(on(1) == on(2) && on(1) == on(3));
}

#[test]
fn nothing_outside_the_operands_is_touched() {
    for before in [false, true] {
        for (stride, doubling) in [(1, false), (2, false), (1, true)] {
            for width in [19, 64] {
                let g = Geometry { input: [5, width], stride, before: 1, after: 1 };
                let x = Guarded::new(&values(3 * 5 * width, 1), before);
                for kernel in kernels() {
                    let pack = if doubling { Conv2d::pack_doubling_for } else { Conv2d::pack_for };
                    let conv = pack(kernel, &values(7 * 27, 2), [7, 3, 3], None);
                    let mut y = Guarded::new(&vec![0.0; 7 * conv.output(g).iter().product::<usize>()], before);
                    let residual = values(y.slice().len(), 3);
                    for residual in [None, Some(&*residual)] {
                        conv.run(x.slice(), g, residual, y.slice_mut());
                    }
                }
            }
        }
    }
}
