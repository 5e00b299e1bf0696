//! Products in 8 bits.
#![allow(clippy::single_range_in_vec_init)] // lists of ranges are meant

use half::f16;
use proptest::prelude::*;

use super::*;
use crate::gemm::micro::MicroKernel;
use crate::gemm::{Epilogue, PackedWeight, linear_tree};
use crate::guard::Guarded;

fn values(n: usize, seed: usize) -> Vec<f32> {
    (0..n).map(|i| (((i + seed * 31) * 7919 + seed) % 1013) as f32 / 507.0 - 1.0).collect()
}

/// Where a block's numbers in f16 are.
fn halves_of(kind: BlockType) -> &'static [usize] {
    match kind {
        BlockType::Q4_0 | BlockType::Q5_0 | BlockType::Q8_0 => &[0],
        BlockType::Q4_1 | BlockType::Q5_1 | BlockType::Q4K | BlockType::Q5K => &[0, 2],
        BlockType::Q2K => &[80, 82],
        BlockType::Q3K => &[108],
        BlockType::Q6K => &[208],
    }
}

/// How much of K is whole blocks of every kind.
const WHOLE: usize = 256;

/// `n` rows of `k` values in blocks, every byte among them and scales and minima of either sign, and the same in f64.
fn weights(kind: BlockType, n: usize, k: usize) -> (BlockRows, Vec<f64>) {
    let mut data: Vec<u8> = (0..n * k / kind.values() * kind.bytes()).map(|i| (i * 7919 % 1013 % 256) as u8).collect();
    for (block, data) in data.chunks_exact_mut(kind.bytes()).enumerate() {
        for at in halves_of(kind) {
            let half = f16::from_f32((((block + 3 * at) * 37 % 101) as f32 - 50.0) / 4096.0 / (WHOLE / kind.part()) as f32);
            data[*at..][..2].copy_from_slice(&half.to_le_bytes());
        }
    }
    let mut wide = vec![0.0; n * k];
    kind.widen(&data, &mut wide);
    (BlockRows::of(kind, &data, k, &[0..n], &[0..k]), wide.into_iter().map(f64::from).collect())
}

fn kernels(kind: BlockType) -> Vec<&'static MicroKernel> {
    MicroKernel::all_int8(Scales::of(kind))
}

fn pack(rows: &BlockRows, chunks: &[Vec<Piece>], kernel: &'static MicroKernel) -> PackedWeight {
    PackedWeight::bytes_of_blocks_for(rows.clone(), chunks, kernel).unwrap()
}

fn pack_here(rows: &BlockRows, chunks: &[Vec<Piece>]) -> PackedWeight {
    PackedWeight::bytes_of_blocks(rows.clone(), chunks).unwrap()
}

fn product(x: Rows<'_>, weight: &PackedWeight, chunks: &[Vec<Piece>]) -> Vec<f32> {
    let mut y = vec![f32::NAN; x.count() * weight.n()];
    linear_tree(x, chunks, weight, Epilogue::default(), &mut y);
    y
}

fn whole(k: usize) -> Vec<Vec<Piece>> {
    vec![vec![(0, k)]]
}

fn rounded(x: &[f32]) -> Vec<f64> {
    let block = |x: &[f32; BLOCK]| {
        let mut bytes = [0; BLOCK];
        let scale = f64::from(quantise(x, &mut bytes));
        bytes.map(|byte| f64::from(byte) * scale)
    };
    x.as_chunks().0.iter().flat_map(block).collect()
}

fn dot(x: &[f64], w: &[f64]) -> f64 {
    x.iter().zip(w).map(|(x, w)| x * w).sum()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn equals_its_reference_and_every_kernel_gives_the_same_bits(
        kind in prop::sample::select(BlockType::ALL.to_vec()),
        [m, n, blocks] in [0usize..20, 0usize..70, 0usize..30],
        gap in 0usize..5,
    ) {
        // Fewer of the large ones.
        let k = blocks * BLOCK / kind.values() * kind.values();
        let (data, (rows, w)) = (values(m * (k + gap), 1), weights(kind, n, k));
        let x = Rows::new(&data, m, k + gap);
        let products: Vec<_> =
            kernels(kind).into_iter().map(|kernel| product(x, &pack(&rows, &whole(k), kernel), &whole(k))).collect();
        prop_assert!(products.iter().all(|product| *product == products[0]));
        for row in 0..m {
            let exact: Vec<f64> = x.part(row, (0, k)).iter().map(|x| f64::from(*x)).collect();
            let x = rounded(x.part(row, (0, k)));
            for column in 0..n {
                let (got, w) = (f64::from(products[0][row * n + column]), &w[column * k..][..k]);
                let (expected, magnitude) = (dot(&x, w), w.iter().map(|w| w.abs()).sum::<f64>());
                prop_assert!((got - expected).abs() <= 1e-5 * (1.0 + expected.abs()), "{} for {}", got, expected);
                // Inputs are in -1..1: an input is half a step away at most.
                prop_assert!((got - dot(&exact, w)).abs() <= magnitude / 254.0 + 1e-5, "{} for {}", got, dot(&exact, w));
            }
        }
    }

    #[test]
    fn inputs_are_rounded_to_the_nearest_of_their_block(x in prop::array::uniform32(any::<u32>()), tiny in any::<bool>()) {
        let x = x.map(|bits| f32::from_bits(if tiny { bits & 0x83ff_ffff } else { bits }));
        let largest = x.iter().fold(0f32, |largest, x| largest.max(x.abs()));
        let mut bytes = [0; BLOCK];
        let scale = quantise(&x, &mut bytes);
        if x.iter().any(|x| !x.is_finite()) {
            prop_assert!(scale.is_nan());
        } else if largest < LEAST {
            prop_assert_eq!((scale, bytes), (0.0, [0; BLOCK]));
        } else {
            prop_assert!(bytes.iter().any(|byte| byte.abs() == 127));
            for (x, byte) in x.iter().zip(bytes) {
                let error = (f64::from(*x) - f64::from(byte) * f64::from(scale)).abs();
                prop_assert!(error <= 0.5001 * f64::from(scale), "{} as {} of {}", x, byte, scale);
            }
        }
    }

    #[test]
    fn neither_batch_nor_cut_changes_a_result(
        kind in prop::sample::select(BlockType::ALL.to_vec()),
        [m, n, blocks] in [1usize..30, 2usize..60, 1usize..20],
        at in 0usize..1000,
    ) {
        let k = (blocks * BLOCK).next_multiple_of(kind.values());
        let (data, (rows, _)) = (values(m * k, 1), weights(kind, n, k));
        let all = product(Rows::new(&data, m, k), &pack_here(&rows, &whole(k)), &whole(k));
        let row = at % m;
        let alone = product(Rows::new(&data[row * k..], 1, k), &pack_here(&rows, &whole(k)), &whole(k));
        prop_assert_eq!(&alone[..], &all[row * n..][..n]);
        let cut = 1 + at % (n - 1);
        for part in [0..cut, cut..n] {
            let of = BlockRows::of(kind, rows.data(), k, std::slice::from_ref(&part), &[0..k]);
            let product = product(Rows::new(&data, m, k), &pack_here(&of, &whole(k)), &whole(k));
            for row in 0..m {
                prop_assert_eq!(&product[row * part.len()..][..part.len()], &all[row * n + part.start..row * n + part.end]);
            }
        }
    }

    #[test]
    fn the_tree_is_the_same_on_every_number_of_ranks(
        kind in prop::sample::select(BlockType::ALL.to_vec()),
        [m, n] in [1usize..14, 1usize..40],
        widths in [0usize..4, 0usize..4],
    ) {
        // An eighth of a row may begin and end within a block of 256.
        let widths = widths.map(|width| width * BLOCK);
        let k = 8 * (widths[0] + widths[1]);
        let (data, (rows, w)) = (values(m * k, 1), weights(kind, n, k));
        let x = Rows::new(&data, m, k);
        let pieces = |ranks: usize, rank: usize| -> Vec<Vec<Piece>> {
            let chunks = 8 / ranks;
            (rank * chunks..(rank + 1) * chunks).map(|c| vec![(c * widths[0], widths[0]), (8 * widths[0] + c * widths[1], widths[1])]).collect()
        };
        let results = [1, 2, 4, 8].map(|ranks| {
            let mut level: Vec<Vec<f32>> = (0..ranks).map(|rank| {
                let chunks = pieces(ranks, rank);
                let columns: Vec<_> = chunks.concat().into_iter().map(|(start, len)| start..start + len).collect();
                let held = BlockRows::of(kind, rows.data(), k, &[0..n], &columns);
                product(x, &pack_here(&held, &chunks), &chunks)
            }).collect();
            while level.len() > 1 {
                level = level.chunks(2).map(|p| p[0].iter().zip(&p[1]).map(|(a, b)| a + b).collect()).collect();
            }
            level.remove(0)
        });
        prop_assert!(results.iter().all(|r| *r == results[0]));
        for row in 0..m {
            let x = rounded(&data[row * k..][..k]);
            for column in 0..n {
                let (got, expected) = (f64::from(results[0][row * n + column]), dot(&x, &w[column * k..][..k]));
                prop_assert!((got - expected).abs() <= 1e-5 * (1.0 + expected.abs()), "{} for {}", got, expected);
            }
        }
    }
}

#[test]
fn the_largest_bytes_do_not_overflow() {
    let k = 64 * BLOCK;
    for byte in [-128i8, 127] {
        let block = [&f16::ONE.to_le_bytes()[..], &[byte as u8; BLOCK]].concat();
        let rows = BlockRows::of(BlockType::Q8_0, &block.repeat(k / BLOCK), k, &[0..1], &[0..k]);
        for x in [-1.0, 1.0] {
            for kernel in kernels(BlockType::Q8_0) {
                let y = product(Rows::new(&vec![x; k], 1, k), &pack(&rows, &whole(k), kernel), &whole(k))[0];
                let expected = x * f32::from(byte) * k as f32;
                assert!((y / expected - 1.0).abs() < 1e-5, "{kernel:?}: {y} for {expected}");
            }
        }
    }
}

#[test]
fn the_largest_and_the_least_numbers_of_a_block_do_not_overflow() {
    let k = 3 * WHOLE;
    for kind in BlockType::ALL {
        for byte in [0u8, 0x0f, 0x7f, 0x80, 0xf0, 0xff] {
            let mut data = vec![byte; k / kind.values() * kind.bytes()];
            for block in data.chunks_exact_mut(kind.bytes()) {
                halves_of(kind).iter().for_each(|at| block[*at..][..2].copy_from_slice(&f16::ONE.to_le_bytes()));
            }
            let (rows, mut wide) = (BlockRows::of(kind, &data, k, &[0..1], &[0..k]), vec![0.0; k]);
            kind.widen(&data, &mut wide);
            for x in [-1.0f32, 1.0] {
                let expected: f64 = wide.iter().map(|w| f64::from(*w) * f64::from(x)).sum();
                for kernel in kernels(kind) {
                    let y = product(Rows::new(&vec![x; k], 1, k), &pack(&rows, &whole(k), kernel), &whole(k))[0];
                    let magnitude: f64 = wide.iter().map(|w| f64::from(w.abs())).sum();
                    assert!(
                        (f64::from(y) - expected).abs() <= 1e-5 * magnitude,
                        "{kind:?} of {byte}, {kernel:?}: {y} for {expected}"
                    );
                }
            }
        }
    }
}

#[test]
fn what_is_no_number_stays_in_its_row() {
    let mut x = values(3 * WHOLE, 4);
    (x[5], x[WHOLE + 40]) = (f32::NAN, f32::INFINITY);
    for kind in BlockType::ALL {
        let (rows, _) = weights(kind, 3, WHOLE);
        for kernel in kernels(kind) {
            let y = product(Rows::new(&x, 3, WHOLE), &pack(&rows, &whole(WHOLE), kernel), &whole(WHOLE));
            assert!(y[..6].iter().all(|y| y.is_nan()) && y[6..].iter().all(|y| y.is_finite()), "{kind:?}, {kernel:?}: {y:?}");
        }
    }
}

#[test]
fn only_whole_blocks_are_taken() {
    let packed = |kind: BlockType, columns: Range<usize>, chunks: &[Vec<Piece>]| {
        let data = vec![0; 256 / kind.values() * kind.bytes()];
        PackedWeight::bytes_of_blocks(BlockRows::of(kind, &data, 256, &[0..1], &[columns]), chunks).is_ok()
    };
    for kind in BlockType::ALL {
        assert!(packed(kind, 32..96, &whole(64)), "{kind:?}");
        assert!(!packed(kind, 16..80, &whole(64)), "a block of inputs begins elsewhere than one of {kind:?}");
        assert!(!packed(kind, 0..64, &[vec![(0, 48)], vec![(48, 16)]]), "a chunk ends inside a block");
    }
}

#[test]
fn a_weight_holds_what_its_blocks_hold() {
    for kind in BlockType::ALL {
        let (rows, _) = weights(kind, 64, WHOLE);
        for kernel in kernels(kind) {
            assert_eq!(pack(&rows, &whole(WHOLE), kernel).bytes(), rows.bytes(), "{kind:?}, {kernel:?}");
        }
    }
}

#[test]
fn threads_do_not_change_a_result() {
    let [m, n, k] = [200, 330, 5 * WHOLE];
    let data = values(m * k, 1);
    for kind in [BlockType::Q8_0, BlockType::Q4K, BlockType::Q6K] {
        let weight = pack_here(&weights(kind, n, k).0, &whole(k));
        let run = |threads| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| product(Rows::new(&data, m, k), &weight, &whole(k)))
        };
        let one = run(1);
        assert!(run(2) == one && run(3) == one, "{kind:?}");
    }
}

#[test]
fn nothing_outside_the_operands_is_touched() {
    for before in [false, true] {
        for [m, n, blocks] in [[1, 1, 1], [6, 16, 2], [7, 17, 3], [13, 50, 13]] {
            for kind in [BlockType::Q8_0, BlockType::Q4K, BlockType::Q6K] {
                // The weight is packed by safe code.
                let k = (blocks * BLOCK).next_multiple_of(kind.values());
                let (x, (rows, _)) = (Guarded::new(&values(m * k, 1), before), weights(kind, n, k));
                let mut y = Guarded::new(&vec![0.0; m * n], before);
                for kernel in kernels(kind) {
                    let weight = pack(&rows, &whole(k), kernel);
                    linear_tree(Rows::new(x.slice(), m, k), &whole(k), &weight, Epilogue::default(), y.slice_mut());
                }
            }
        }
    }
}
