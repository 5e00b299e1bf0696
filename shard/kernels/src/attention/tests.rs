use proptest::prelude::*;

use half::bf16;

use super::*;
use crate::guard::Guarded;

/// Numbers that bf16 has.
fn values(n: usize, seed: usize) -> Vec<f32> {
    (0..n).map(|i| (((i + seed * 31) * 7919 + seed) % 251) as f32 / 64.0 - 2.0).collect()
}

/// The plain formula in f64, on dense heads; `bias(head, query, key)` is added.
fn reference(of: &Attention, [q, k, v]: [&[f32]; 3], bias: impl Fn(usize, usize, usize) -> f32) -> Vec<f32> {
    let mut y = Vec::new();
    for head in 0..of.heads {
        for query in 0..of.queries {
            let at = |data: &[f32], rows: usize, row: usize, i: usize| f64::from(data[(head * rows + row) * of.width + i]);
            let score = |key| {
                let dot: f64 = (0..of.width).map(|i| at(q, of.queries, query, i) * at(k, of.keys, key, i)).sum();
                dot * f64::from(of.scale) + f64::from(bias(head, query, key))
            };
            let scores: Vec<f64> = (0..of.keys).map(score).collect();
            let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let p: Vec<f64> = scores.iter().map(|s| if max == f64::NEG_INFINITY { 0.0 } else { (s - max).exp() }).collect();
            let sum: f64 = p.iter().sum();
            let value = |i| p.iter().enumerate().map(|(key, p)| p * at(v, of.keys, key, i)).sum::<f64>();
            y.extend((0..of.width).map(|i| if sum == 0.0 { 0.0 } else { (value(i) / sum) as f32 }));
        }
    }
    y
}

/// With kernels of pairs the exponentials are rounded.
fn close(got: &[f32], expected: &[f32], kernel: &MicroKernel) {
    let tolerance = if kernel.pairs() { 8e-3 } else { 2e-5 };
    for (i, (got, expected)) in got.iter().zip(expected).enumerate() {
        assert!((got - expected).abs() < tolerance, "element {i} is {got}, not {expected}: {kernel:?}");
    }
}

fn operands(of: &Attention) -> [Vec<f32>; 3] {
    let count = |rows: usize| of.heads * rows * of.width;
    [values(count(of.queries), 1), values(count(of.keys), 2), values(count(of.keys), 3)]
}

/// Queries as a kernel has them: in powers of two they are scaled by what bf16 does not have exactly, and then rounded to it.
fn as_multiplied(of: &Attention, q: &[f32], kernel: &MicroKernel) -> Vec<f32> {
    let unit = of.scale * std::f32::consts::LOG2_E;
    let rounded = |q: &f32| bf16::from_f32(q * unit).to_f32() / unit;
    if kernel.takes == Takes::Tiles { q.iter().map(rounded).collect() } else { q.to_vec() }
}

fn run(of: &Attention, kernel: &MicroKernel, [q, k, v]: [&[f32]; 3], bias: Option<Bias<'_>>) -> Vec<f32> {
    let mut y = vec![f32::NAN; q.len()];
    let dense = |data, rows| Heads::dense(data, rows, of.width);
    of.run_on(kernel, dense(q, of.queries), dense(k, of.keys), dense(v, of.keys), bias, &mut y);
    y
}

fn kernels() -> Vec<&'static MicroKernel> {
    MicroKernel::all().into_iter().chain(MicroKernel::all_bf16()).collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn equals_the_formula([heads, queries, keys] in [0usize..4, 0usize..120, 0usize..300], width in prop::sample::select(vec![1, 7, 8, 64, 72, 88])) {
        let of = Attention { heads, queries, keys, width, scale: 0.125, side_by_side: false };
        let [q, k, v] = operands(&of);
        for kernel in kernels() {
            let expected = reference(&of, [&as_multiplied(&of, &q, kernel), &k, &v], |_, _, _| 0.0);
            close(&run(&of, kernel, [&q, &k, &v], None), &expected, kernel);
        }
    }

    #[test]
    fn bias_and_mask_are_added([heads, queries, keys] in [1usize..4, 1usize..20, 1usize..300], masked in 0usize..300) {
        let of = Attention { heads, queries, keys, width: 8, scale: 0.25, side_by_side: false };
        let [q, k, v] = operands(&of);
        let bias = values(heads * queries * keys, 4);
        let starts: Vec<usize> = (0..heads).map(|h| h * queries * keys).collect();
        let mask: Vec<f32> = (0..keys).map(|key| if key < masked { f32::NEG_INFINITY } else { 0.0 }).collect();
        for kernel in kernels() {
            let biased = run(&of, kernel, [&q, &k, &v], Some(Bias { data: &bias, starts: &starts, query_stride: keys }));
            let seen = as_multiplied(&of, &q, kernel);
            close(&biased, &reference(&of, [&seen, &k, &v], |h, q, k| bias[(h * queries + q) * keys + k]), kernel);
            let one = Bias { data: &mask, starts: &vec![0; heads], query_stride: 0 };
            close(&run(&of, kernel, [&q, &k, &v], Some(one)), &reference(&of, [&seen, &k, &v], |_, _, k| mask[k]), kernel);
        }
    }

    #[test]
    fn a_query_does_not_depend_on_its_neighbours([queries, keys] in [1usize..210, 1usize..300], at in 0usize..1000) {
        let of = Attention { heads: 2, queries, keys, width: 24, scale: 0.2, side_by_side: false };
        let [q, k, v] = operands(&of);
        for kernel in kernels() {
            let together = run(&of, kernel, [&q, &k, &v], None);
            let (row, keys) = (at % queries, keys * 24);
            let alone = Attention { heads: 1, queries: 1, ..of };
            let alone = run(&alone, kernel, [&q[(queries + row) * 24..][..24], &k[keys..], &v[keys..]], None);
            prop_assert_eq!(&alone[..], &together[(queries + row) * 24..][..24]);
        }
    }
}

#[test]
fn every_kernel_of_an_order_has_the_same_bits() {
    let of = Attention { heads: 2, queries: 100, keys: 301, width: 71, scale: 0.3, side_by_side: false };
    let [q, k, v] = operands(&of);
    for order in Order::ALL {
        let all: Vec<_> = MicroKernel::all_in(order).iter().map(|kernel| run(&of, kernel, [&q, &k, &v], None)).collect();
        assert!(all.iter().all(|one| *one == all[0]), "{order:?}");
    }
}

#[test]
fn heads_may_lie_side_by_side() {
    // [L, N, Dh], as a projection leaves them.
    let of = Attention { heads: 3, queries: 50, keys: 50, width: 20, scale: 0.2, side_by_side: false };
    let [q, k, v] = operands(&of);
    let interleave = |x: &[f32]| -> Vec<f32> {
        (0..50).flat_map(|row| (0..3).map(move |head| (head * 50 + row) * 20)).flat_map(|at| x[at..at + 20].to_vec()).collect()
    };
    let (iq, ik, iv) = (interleave(&q), interleave(&k), interleave(&v));
    let heads = |data| Heads { data, head_stride: 20, row_stride: 60 };
    let mut y = vec![f32::NAN; q.len()];
    of.run(None, heads(&iq), heads(&ik), heads(&iv), None, &mut y);
    let expected = run(&of, MicroKernel::best(), [&q, &k, &v], None);
    assert_eq!(y, expected);
    let of = Attention { side_by_side: true, ..of };
    of.run(None, heads(&iq), heads(&ik), heads(&iv), None, &mut y);
    assert_eq!(y, interleave(&expected));
}

#[test]
fn threads_do_not_change_a_result() {
    for heads in [1, 3, 9] {
        let of = Attention { heads, queries: 300, keys: 200, width: 40, scale: 0.2, side_by_side: false };
        let [q, k, v] = operands(&of);
        let on = |threads| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| run(&of, MicroKernel::best(), [&q, &k, &v], None))
        };
        assert!(on(1) == on(2) && on(1) == on(3));
    }
}

#[test]
fn nothing_outside_the_operands_is_touched() {
    for before in [false, true] {
        for [queries, keys, width] in [[1, 1, 1], [7, 17, 9], [100, 130, 72]] {
            let of = Attention { heads: 1, queries, keys, width, scale: 1.0, side_by_side: false };
            let [q, k, v] = operands(&of).map(|x| Guarded::new(&x, before));
            let mut y = Guarded::new(&vec![0.0; queries * width], before);
            let dense = |x, rows| Heads::dense(x, rows, width);
            for kernel in kernels() {
                of.run_on(kernel, dense(q.slice(), queries), dense(k.slice(), keys), dense(v.slice(), keys), None, y.slice_mut());
            }
        }
    }
}
