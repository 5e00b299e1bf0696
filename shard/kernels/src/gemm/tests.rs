use half::bf16;
use proptest::prelude::*;

use super::micro::MicroKernel;
use super::*;
use crate::guard::Guarded;

fn values(n: usize, seed: usize) -> Vec<f32> {
    (0..n).map(|i| (((i + seed * 31) * 7919 + seed) % 1013) as f32 / 507.0 - 1.0).collect()
}

/// In f64, one chain.
fn reference(x: Rows<'_>, w: &[f32], [n, k]: [usize; 2]) -> Vec<f64> {
    let dot = |row: usize, column: usize| -> f64 {
        let x = x.part(row, (0, k));
        (0..k).map(|i| f64::from(x[i]) * f64::from(w[column * k + i])).sum()
    };
    (0..x.count()).flat_map(|row| (0..n).map(move |column| (row, column))).map(|(row, column)| dot(row, column)).collect()
}

fn close(got: &[f32], expected: &[f64]) {
    for (i, (got, expected)) in got.iter().zip(expected).enumerate() {
        assert!((f64::from(*got) - expected).abs() < 1e-4 * (1.0 + expected.abs()), "element {i} is {got}, not {expected}");
    }
}

fn product(x: Rows<'_>, weight: &PackedWeight) -> Vec<f32> {
    let mut y = vec![f32::NAN; x.count() * weight.n()];
    linear(x, weight, Epilogue::default(), &mut y);
    y
}

/// Every kernel of this machine.
fn kernels() -> Vec<&'static MicroKernel> {
    MicroKernel::all()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn equals_its_reference([m, n, k] in [0usize..20, 0usize..70, 0usize..600], gap in 0usize..5) {
        let (data, w) = (values(m * (k + gap), 1), values(n * k, 2));
        let x = Rows::new(&data, m, k + gap);
        let expected = reference(x, &w, [n, k]);
        for kernel in kernels() {
            close(&product(x, &f32::pack(Rows::new(&w, n, k), &[(0, k)], kernel)), &expected);
            let narrow: Vec<bf16> = w.iter().map(|v| bf16::from_f32(*v)).collect();
            let widened: Vec<f32> = narrow.iter().map(|v| v.to_f32()).collect();
            let from_bf16 = product(x, &bf16::pack(Rows::new(&narrow, n, k), &[(0, k)], kernel));
            let from_f32 = product(x, &f32::pack(Rows::new(&widened, n, k), &[(0, k)], kernel));
            prop_assert_eq!(from_bf16, from_f32);
        }
    }

    #[test]
    fn instruction_sets_with_fused_multiply_adds_give_the_same_bits([m, n, k] in [0usize..20, 0usize..70, 0usize..600]) {
        let (data, w) = (values(m * k, 1), values(n * k, 2));
        let products: Vec<Vec<f32>> = kernels()[1..]
            .iter()
            .map(|kernel| product(Rows::new(&data, m, k), &f32::pack(Rows::new(&w, n, k), &[(0, k)], kernel)))
            .collect();
        prop_assert!(products.windows(2).all(|pair| pair[0] == pair[1]));
    }

    #[test]
    fn neither_batch_nor_cut_changes_a_result([m, n, k] in [1usize..30, 2usize..60, 1usize..600], at in 0usize..1000) {
        let (data, w) = (values(m * k, 1), values(n * k, 2));
        for kernel in kernels() {
            let pack = |w: &[f32], n| f32::pack(Rows::new(w, n, k), &[(0, k)], kernel);
            let whole = product(Rows::new(&data, m, k), &pack(&w, n));
            let row = at % m;
            let alone = product(Rows::new(&data[row * k..], 1, k), &pack(&w, n));
            prop_assert_eq!(&alone[..], &whole[row * n..][..n]);
            let cut = 1 + at % (n - 1);
            for (first, count) in [(0, cut), (cut, n - cut)] {
                let part = product(Rows::new(&data, m, k), &pack(&w[first * k..], count));
                for row in 0..m {
                    prop_assert_eq!(&part[row * count..][..count], &whole[row * n + first..][..count]);
                }
            }
        }
    }

    #[test]
    fn the_tree_is_the_same_on_every_number_of_ranks([m, n] in [1usize..14, 1usize..40], widths in [0usize..70, 0usize..40]) {
        // Two parts packed in the input, as in a single block of FLUX; 8 chunks take an eighth of each.
        let parts = widths.map(|w| 8 * w);
        let k = parts[0] + parts[1];
        let (data, w) = (values(m * k, 1), values(n * k, 2));
        let pieces = |ranks: usize, rank: usize| -> Vec<[Piece; 2]> {
            let chunks = 8 / ranks;
            (rank * chunks..(rank + 1) * chunks).map(|c| [(c * widths[0], widths[0]), (parts[0] + c * widths[1], widths[1])]).collect()
        };
        for kernel in kernels() {
            let results = [1, 2, 4, 8].map(|ranks| {
                let mut level: Vec<Vec<f32>> = (0..ranks).map(|rank| {
                    let chunks = pieces(ranks, rank);
                    let weight = f32::pack(Rows::new(&w, n, k), &chunks.concat(), kernel);
                    let mut y = vec![f32::NAN; m * n];
                    linear_tree(Rows::new(&data, m, k), &chunks, &weight, Epilogue::default(), &mut y);
                    y
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
}

#[test]
fn threads_do_not_change_a_result() {
    let [m, n, k] = [200, 330, 700]; // several jobs in both directions
    let (data, w) = (values(m * k, 1), values(n * k, 2));
    let weight = PackedWeight::pack(Rows::new(&w, n, k), k);
    let chunks: Vec<[Piece; 1]> = (0..8).map(|c| [(c * k / 8, (c + 1) * k / 8 - c * k / 8)]).collect();
    let run = |threads| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        let mut tree = vec![0.0; m * n];
        pool.install(|| linear_tree(Rows::new(&data, m, k), &chunks, &weight, Epilogue::default(), &mut tree));
        (pool.install(|| product(Rows::new(&data, m, k), &weight)), tree)
    };
    let one = run(1);
    assert!(run(2) == one && run(3) == one);
    close(&one.0, &reference(Rows::new(&data, m, k), &w, [n, k]));
}

#[test]
fn the_epilogue_adds_the_bias_and_then_activates() {
    let [m, n, k] = [7, 37, 20];
    let (data, w, bias) = (values(m * k, 1), values(n * k, 2), values(n, 3));
    let weight = PackedWeight::pack(Rows::new(&w, n, k), k);
    let mut expected = product(Rows::new(&data, m, k), &weight);
    expected.chunks_mut(n).for_each(|row| row.iter_mut().zip(&bias).for_each(|(y, b)| *y += b));
    Activation::GeluTanh.apply(&mut expected);
    let mut y = vec![f32::NAN; m * n];
    let epilogue = Epilogue { bias: Some(&bias), activation: Some(Activation::GeluTanh) };
    linear(Rows::new(&data, m, k), &weight, epilogue, &mut y);
    assert_eq!(y, expected);
}

#[test]
fn nothing_outside_the_operands_is_touched() {
    for before in [false, true] {
        for [m, n, k] in [[1, 1, 1], [6, 16, 8], [7, 17, 9], [13, 50, 300]] {
            let (x, w) = (Guarded::new(&values(m * k, 1), before), Guarded::new(&values(n * k, 2), before));
            let bias = Guarded::new(&values(n, 3), before);
            let mut y = Guarded::new(&vec![0.0; m * n], before);
            for kernel in kernels() {
                let weight = f32::pack(Rows::new(w.slice(), n, k), &[(0, k)], kernel);
                let epilogue = Epilogue { bias: Some(bias.slice()), activation: Some(Activation::Silu) };
                linear(Rows::new(x.slice(), m, k), &weight, epilogue, y.slice_mut());
            }
        }
    }
}
