//! Products of bf16, in both orders.

use half::bf16;
use proptest::prelude::*;

use super::micro::MicroKernel;
use super::*;
use crate::guard::Guarded;

fn values(n: usize, seed: usize) -> Vec<f32> {
    (0..n).map(|i| (((i + seed * 31) * 7919 + seed) % 1013) as f32 / 507.0 - 1.0).collect()
}

fn weights(n: usize, seed: usize) -> Vec<bf16> {
    values(n, seed).into_iter().map(bf16::from_f32).collect()
}

fn product(x: Rows<'_>, weight: &PackedWeight, chunks: &[Vec<Piece>]) -> Vec<f32> {
    let mut y = vec![f32::NAN; x.count() * weight.n()];
    linear_tree(x, chunks, weight, Epilogue::default(), &mut y);
    y
}

fn any_order() -> impl Strategy<Value = Order> {
    prop::sample::select(Order::ALL.to_vec())
}

/// One chunk of everything.
fn whole(k: usize) -> Vec<Vec<Piece>> {
    vec![vec![(0, k)]]
}

/// In f64, of inputs that were rounded to bf16.
fn reference(x: Rows<'_>, w: &[bf16], [n, k]: [usize; 2]) -> Vec<f64> {
    let dot = |row: usize, column: usize| -> f64 {
        let x = x.part(row, (0, k));
        (0..k).map(|i| bf16::from_f32(x[i]).to_f64() * w[column * k + i].to_f64()).sum()
    };
    (0..x.count()).flat_map(|row| (0..n).map(move |column| (row, column))).map(|(row, column)| dot(row, column)).collect()
}

fn close(got: &[f32], expected: &[f64]) {
    for (i, (got, expected)) in got.iter().zip(expected).enumerate() {
        assert!((f64::from(*got) - expected).abs() < 1e-4 * (1.0 + expected.abs()), "element {i} is {got}, not {expected}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn equals_its_reference_and_every_kernel_gives_the_same_bits([m, n, k] in [0usize..20, 0usize..70, 0usize..700], gap in 0usize..5) {
        let (data, w) = (values(m * (k + gap), 1), weights(n * k, 2));
        let x = Rows::new(&data, m, k + gap);
        let expected = reference(x, &w, [n, k]);
        let pack = |kernel| PackedWeight::pack_pairs_for(Rows::new(&w, n, k), &whole(k), kernel);
        for order in Order::ALL {
            let products: Vec<_> = MicroKernel::all_in(order).into_iter().map(|kernel| product(x, &pack(kernel), &whole(k))).collect();
            products.iter().for_each(|product| close(product, &expected));
            prop_assert!(products.iter().all(|product| *product == products[0]), "{:?}", order);
        }
    }

    #[test]
    fn any_bits_give_the_same_bits_in_every_kernel(x in prop::collection::vec(any::<u32>(), 37), w in prop::collection::vec(any::<u16>(), 37)) {
        // Infinite, tiny and absent numbers too; what a NaN looks like is nobody's business.
        let x: Vec<f32> = x.into_iter().map(f32::from_bits).collect();
        let w: Vec<bf16> = w.into_iter().map(bf16::from_bits).collect();
        for k in [1, 2, 3, 37] {
            let bits = |kernel| -> Vec<u32> {
                let weight = PackedWeight::pack_pairs_for(Rows::new(&w, 1, k), &whole(k), kernel);
                let y = product(Rows::new(&x, 1, k), &weight, &whole(k));
                y.into_iter().map(|y| if y.is_nan() { f32::NAN.to_bits() } else { y.to_bits() }).collect()
            };
            for order in Order::ALL {
                let all: Vec<_> = MicroKernel::all_in(order).into_iter().map(bits).collect();
                prop_assert!(all.iter().all(|bits| *bits == all[0]), "{:?}: {:?}", order, all);
            }
        }
    }

    #[test]
    fn rounding_is_to_the_nearest_and_even(bits in any::<u32>()) {
        let x = f32::from_bits(bits);
        let expected = bf16::from_f32(x).to_f32();
        let expected = if expected.is_subnormal() { 0.0 } else { expected };
        for order in Order::ALL {
            let weight = PackedWeight::pack_pairs(order, Rows::new(&[bf16::ONE], 1, 1), &whole(1));
            let y = product(Rows::new(&[x], 1, 1), &weight, &whole(1))[0];
            prop_assert!(y == expected || y.is_nan() && x.is_nan(), "{} gives {}", x, y);
        }
    }

    #[test]
    fn neither_batch_nor_cut_changes_a_result([m, n, k] in [1usize..70, 2usize..60, 1usize..600], at in 0usize..1000, order in any_order()) {
        let (data, w) = (values(m * k, 1), weights(n * k, 2));
        let pack = |w: &[bf16], n| PackedWeight::pack_pairs(order, Rows::new(w, n, k), &whole(k));
        let all = product(Rows::new(&data, m, k), &pack(&w, n), &whole(k));
        let row = at % m;
        prop_assert_eq!(&product(Rows::new(&data[row * k..], 1, k), &pack(&w, n), &whole(k))[..], &all[row * n..][..n]);
        let cut = 1 + at % (n - 1);
        for (first, count) in [(0, cut), (cut, n - cut)] {
            let part = product(Rows::new(&data, m, k), &pack(&w[first * k..], count), &whole(k));
            for row in 0..m {
                prop_assert_eq!(&part[row * count..][..count], &all[row * n + first..][..count]);
            }
        }
    }

    #[test]
    fn the_tree_is_the_same_on_every_number_of_ranks([m, n] in [1usize..14, 1usize..40], widths in [0usize..70, 0usize..40], order in any_order()) {
        // Chunks of an odd number of columns, in two pieces, are filled up with a zero, on every rank the same one.
        let k = 8 * (widths[0] + widths[1]);
        let (data, w) = (values(m * k, 1), weights(n * k, 2));
        let pieces = |ranks: usize, rank: usize| -> Vec<Vec<Piece>> {
            let chunks = 8 / ranks;
            (rank * chunks..(rank + 1) * chunks).map(|c| vec![(c * widths[0], widths[0]), (8 * widths[0] + c * widths[1], widths[1])]).collect()
        };
        let results = [1, 2, 4, 8].map(|ranks| {
            let mut level: Vec<Vec<f32>> = (0..ranks).map(|rank| {
                let chunks = pieces(ranks, rank);
                product(Rows::new(&data, m, k), &PackedWeight::pack_pairs(order, Rows::new(&w, n, k), &chunks), &chunks)
            }).collect();
            while level.len() > 1 {
                level = level.chunks(2).map(|p| p[0].iter().zip(&p[1]).map(|(a, b)| a + b).collect()).collect();
            }
            level.remove(0)
        });
        prop_assert!(results.iter().all(|r| *r == results[0]));
        close(&results[0], &reference(Rows::new(&data, m, k), &w, [n, k]));
    }
}

#[test]
fn what_is_rounded_up_to_the_smallest_normal_number_is_zero() {
    let power = |exponent: i32| 2f32.powi(exponent);
    // The later of the pair is 2^-126; the earlier takes 2^-150, half a unit of a number that is not normal, or less.
    for (taken, expected) in [(-150, 0.0), (-151, f32::MIN_POSITIVE), (-152, f32::MIN_POSITIVE)] {
        for sign in [1.0, -1.0] {
            let x = [-sign * power(taken / 2), sign * power(-63)];
            let w = [power(taken - taken / 2), power(-63)].map(bf16::from_f32);
            for kernel in MicroKernel::all_in(Order::Pairs) {
                let weight = PackedWeight::pack_pairs_for(Rows::new(&w, 1, 2), &whole(2), kernel);
                let y = product(Rows::new(&x, 1, 2), &weight, &whole(2))[0];
                assert_eq!(y, sign * expected, "{kernel:?}: 2^-126 less 2^{taken}");
            }
            // In tiles the same of what comes first in a pair, and in the next.
            let (x, w) = ([x[1], 0.0, x[0]], [w[1], bf16::ONE, w[0]]);
            for kernel in MicroKernel::all_in(Order::Tiles) {
                let weight = PackedWeight::pack_pairs_for(Rows::new(&w, 1, 3), &whole(3), kernel);
                let y = product(Rows::new(&x, 1, 3), &weight, &whole(3))[0];
                assert_eq!(y, sign * expected, "{kernel:?}: 2^-126 less 2^{taken}");
            }
        }
    }
}

#[test]
fn threads_do_not_change_a_result() {
    let [m, n, k] = [200, 330, 1400];
    let (data, w) = (values(m * k, 1), weights(n * k, 2));
    let chunks: Vec<Vec<Piece>> = (0..8).map(|c| vec![(c * k / 8, k / 8)]).collect();
    for order in Order::ALL {
        let weight = PackedWeight::pack_pairs(order, Rows::new(&w, n, k), &chunks);
        let run = |threads| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| product(Rows::new(&data, m, k), &weight, &chunks))
        };
        let one = run(1);
        assert!(run(2) == one && run(3) == one);
        close(&one, &reference(Rows::new(&data, m, k), &w, [n, k]));
    }
}

#[test]
fn nothing_outside_the_operands_is_touched() {
    for before in [false, true] {
        for [m, n, k] in [[1, 1, 1], [6, 16, 8], [7, 17, 9], [13, 50, 301]] {
            // The weight is packed by safe code.
            let (x, w) = (Guarded::new(&values(m * k, 1), before), weights(n * k, 2));
            let mut y = Guarded::new(&vec![0.0; m * n], before);
            for kernel in MicroKernel::all_bf16() {
                let weight = PackedWeight::pack_pairs_for(Rows::new(&w, n, k), &whole(k), kernel);
                linear(Rows::new(x.slice(), m, k), &weight, Epilogue::default(), y.slice_mut());
            }
        }
    }
}
