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
    let doubling = if g.doubled { 2 } else { 1 };
    let at = |item: usize, c: usize, y: usize, x_: usize| {
        let inside = (g.before..g.before + doubling * h).contains(&y) && (g.before..g.before + doubling * width).contains(&x_);
        let place = |v: usize| (v - g.before) / doubling;
        if inside { f64::from(x[((item * c_in + c) * h + place(y)) * width + place(x_)]) } else { 0.0 }
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

fn run(conv: &Conv2d, x: &[f32], g: Geometry) -> Vec<f32> {
    let batch = x.len() / (conv.c_in * g.input.iter().product::<usize>());
    let mut y = vec![f32::NAN; batch * conv.c_out * g.output(conv.size).iter().product::<usize>()];
    conv.run(x, g, Finish::default(), &mut y);
    y
}

fn kernels() -> Vec<&'static MicroKernel> {
    MicroKernel::all().into_iter().chain(MicroKernel::all_bf16()).collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn equals_the_definition(
        [c_out, c_in, size] in [1usize..10, 1usize..40, 1usize..4],
        input in [1usize..12, 1usize..24],
        [batch, stride, before, after] in [1usize..3, 1usize..3, 0usize..2, 0usize..2],
        doubled: bool,
    ) {
        let g = Geometry { input, stride, before, after, doubled };
        let (x, w, bias) = (values(batch * c_in * input[0] * input[1], 1), values(c_out * c_in * size * size, 2), values(c_out, 3));
        let expected = reference(&x, &w, &bias, [c_out, c_in, size], g);
        for kernel in kernels() {
            let conv = Conv2d::pack_for(kernel, &w, [c_out, c_in, size], Some(&bias));
            let y = run(&conv, &x, g);
            prop_assert_eq!(y.len(), expected.len());
            for (y, expected) in y.iter().zip(&expected) {
                prop_assert!((y - expected).abs() < 1e-4, "{} is not {}", y, expected);
            }
            let item = x.len() / batch;
            let alone: Vec<f32> = x.chunks(item).flat_map(|x| run(&conv, x, g)).collect();
            prop_assert_eq!(&alone, &y);
            let (residual, mut finished) = (values(y.len(), 5), vec![f32::NAN; y.len()]);
            let finish = Finish { residual: Some(&residual), activation: Some(Activation::Silu) };
            conv.run(&x, g, finish, &mut finished);
            let mut expected: Vec<f32> = y.iter().zip(&residual).map(|(y, residual)| y + residual).collect();
            Activation::Silu.apply(&mut expected);
            prop_assert_eq!(finished, expected);
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
        doubled: bool,
    ) {
        for kernel in kernels() {
            let scale = if doubled { 2 } else { 1 };
            let Some(shown) = (tiles * kernel.nr + size - 1).checked_sub(2 * before).filter(|width| width.is_multiple_of(scale)) else {
                continue;
            };
            let (width, height) = (shown / scale, height + size);
            let narrow = Geometry { input: [height, width], stride: 1, before, after: before, doubled };
            let wide = Geometry { input: [height, width + 1], ..narrow };
            let reads = matches!(kernel.takes, Takes::Floats | Takes::Pairs | Takes::PairsByFloats) && kernel.reads_places();
            prop_assert_eq!(Bands::of(narrow, size, kernel, 256).is_some(), reads);
            prop_assert!(Bands::of(wide, size, kernel, 256).is_none());
            let x = values(batch * c_in * height * width, 1);
            let more: Vec<f32> = x.chunks_exact(width).flat_map(|line| line.iter().copied().chain([0.0])).collect();
            let conv = Conv2d::pack_for(kernel, &values(c_out * c_in * size * size, 2), [c_out, c_in, size], Some(&values(c_out, 3)));
            let (y, expected) = (run(&conv, &x, narrow), run(&conv, &more, wide));
            let ([_, n], [_, of_more]) = (narrow.output(size), wide.output(size));
            // Without zeros beside it, the last window that both have may be another's.
            for (y, expected) in y.chunks_exact(n).zip(expected.chunks_exact(of_more)) {
                prop_assert_eq!(y, &expected[..n]);
            }
        }
    }
}

#[test]
fn in_bf16_the_picture_is_rounded_and_nothing_else() {
    let g = Geometry { input: [9, 11], stride: 1, before: 1, after: 1, doubled: false };
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
    let g = Geometry { input: [30, 37], stride: 1, before: 1, after: 1, doubled: false };
    let conv = Conv2d::pack(&values(13 * 40 * 9, 1), [13, 40, 3], None);
    let x = values(2 * 40 * 30 * 37, 2);
    let on = |threads| rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap().install(|| run(&conv, &x, g));
    assert!(on(1) == on(2) && on(1) == on(3));
}

#[test]
fn nothing_outside_the_operands_is_touched() {
    for before in [false, true] {
        for (stride, doubled) in [(1, false), (2, false), (1, true)] {
            for width in [19, 64] {
                let g = Geometry { input: [5, width], stride, before: 1, after: 1, doubled };
                let x = Guarded::new(&values(3 * 5 * width, 1), before);
                let mut y = Guarded::new(&vec![0.0; 7 * g.output(3).iter().product::<usize>()], before);
                for kernel in kernels() {
                    let (conv, residual) =
                        (Conv2d::pack_for(kernel, &values(7 * 27, 2), [7, 3, 3], None), values(y.slice().len(), 3));
                    for residual in [None, Some(&*residual)] {
                        conv.run(x.slice(), g, Finish { residual, activation: None }, y.slice_mut());
                    }
                }
            }
        }
    }
}
