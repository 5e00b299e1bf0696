use half::f16;
use proptest::prelude::*;

use super::*;
use crate::activation::Activation;
use crate::blocks::BlockType;
use crate::gemm::bytes::Scales;
use crate::gemm::{BlockRows, Element, Order, bf16, linear_tree};

fn values(n: usize, seed: usize) -> Vec<f32> {
    (0..n).map(|i| (((i + seed * 31) * 7919 + seed) % 1013) as f32 / 507.0 - 1.0).collect()
}

/// Packed for `kernel`, whichever it is.
fn packed(kernel: &'static MicroKernel, w: &[f32], [n, k]: [usize; 2], chunks: &[Vec<Piece>]) -> PackedWeight {
    match kernel.takes {
        Takes::Floats => f32::pack(Rows::new(w, n, k), &chunks.concat(), kernel),
        Takes::Blocks(_) => {
            let block = |w: &[f32]| {
                [f16::from_f32(0.01).to_le_bytes().to_vec(), w.iter().map(|w| (w * 100.0) as i8 as u8).collect()].concat()
            };
            let blocks: Vec<u8> = w.chunks_exact(BLOCK).flat_map(block).collect();
            let columns: Vec<_> = chunks.concat().into_iter().map(|(start, len)| start..start + len).collect();
            let rows = BlockRows::of(BlockType::Q8_0, &blocks, k, std::slice::from_ref(&(0..n)), &columns);
            PackedWeight::bytes_of_blocks_for(rows, chunks, kernel).unwrap()
        }
        _ => {
            let narrow: Vec<bf16> = w.iter().map(|w| bf16::from_f32(*w)).collect();
            PackedWeight::pack_pairs_for(Rows::new(&narrow, n, k), chunks, kernel)
        }
    }
}

/// All but those of tiles, whose inputs are laid out step by step.
fn kernels() -> Vec<&'static MicroKernel> {
    [MicroKernel::all(), MicroKernel::all_in(Order::Pairs), MicroKernel::all_int8(Scales::Stored)].concat()
}

fn tree(x: &[f32], k: usize, chunks: &[Vec<Piece>], weight: &PackedWeight, epilogue: Epilogue<'_>) -> Vec<f32> {
    let mut y = vec![f32::NAN; x.len() / k * weight.n()];
    linear_tree(Rows::new(x, x.len() / k, k), chunks, weight, epilogue, &mut y);
    y
}

fn bits(x: &[f32]) -> Vec<u32> {
    x.iter().map(|x| x.to_bits()).collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn what_is_laid_out_once_gives_the_bits_of_what_is_laid_out_each_time(m in 1usize..40, n in 1usize..70, blocks in 1usize..12) {
        let k = 32 * blocks;
        let (x, w, bias) = (values(m * k, 1), values(n * k, 2), values(n, 3));
        let epilogue = Epilogue { bias: Some(&bias), activation: Some(Activation::Silu) };
        for kernel in kernels() {
            for chunks in [vec![vec![(0, k)]], vec![vec![(0, 32)], vec![(32, k - 32)]]] {
                let weight = packed(kernel, &w, [n, k], &chunks);
                let inputs = PackedInputs::of(&[Source::Rows(Rows::new(&x, m, k), k)], &chunks, &weight).unwrap();
                let mut y = vec![f32::NAN; m * n];
                inputs.linear(&weight, epilogue, &mut y);
                prop_assert_eq!(bits(&y), bits(&tree(&x, k, &chunks, &weight, epilogue)), "{:?}", weight);
            }
        }
    }

    #[test]
    fn a_layer_hands_on_what_it_would_write(m in 1usize..40, n in 1usize..50, of_rows in 1usize..4, of_layer in 1usize..4, eight: bool) {
        // Two parts, each cut into as many chunks as there are; of the first there are rows, and the second is another layer's.
        let (before, chunks) = (40, if eight { 8 } else { 2 });
        let widths = [32 * of_rows * chunks, 64 * of_layer * chunks];
        let piece = |part: usize, chunk: usize| (part * widths[0] + chunk * widths[part] / chunks, widths[part] / chunks);
        let pieces: Vec<Vec<Piece>> = (0..chunks).map(|chunk| vec![piece(0, chunk), piece(1, chunk)]).collect();
        let k = widths[0] + widths[1];
        let (x, first, w1, bias, w2) =
            (values(m * before, 1), values(m * widths[0], 2), values(widths[1] * before, 3), values(widths[1], 4), values(n * k, 5));
        let epilogue = Epilogue { bias: Some(&bias), activation: Some(Activation::GeluTanh) };
        for kernel in [MicroKernel::all(), MicroKernel::all_in(Order::Pairs)].concat() {
            let one = vec![vec![(0, before)]];
            let weight = packed(kernel, &w1, [widths[1], before], &one);
            let second = tree(&x, before, &one, &weight, epilogue);
            let joined: Vec<f32> = (0..m)
                .flat_map(|row| [&first[row * widths[0]..][..widths[0]], &second[row * widths[1]..][..widths[1]]].concat())
                .collect();
            let next = packed(kernel, &w2, [n, k], &pieces);
            let expected = tree(&joined, k, &pieces, &next, Epilogue::default());
            let inputs = PackedInputs::of(&[Source::Rows(Rows::new(&x, m, before), before)], &one, &weight).unwrap();
            let layer = Layer { inputs: &inputs, weight: &weight, epilogue };
            let sources = [Source::Rows(Rows::new(&first, m, widths[0]), widths[0]), Source::Layer(layer)];
            let inputs = PackedInputs::of(&sources, &pieces, &next).unwrap();
            let mut y = vec![f32::NAN; m * n];
            inputs.linear(&next, Epilogue::default(), &mut y);
            prop_assert_eq!(bits(&y), bits(&expected), "{:?}", kernel);
        }
    }
}

#[test]
fn what_cannot_be_laid_out_column_by_column_is_not() {
    let kernel = MicroKernel::best();
    let x = values(3 * 8, 1);
    let one = vec![vec![(0, 8)]];
    // Three panels and a half.
    let narrow = packed(kernel, &values(7 * kernel.nr / 2 * 8, 2), [7 * kernel.nr / 2, 8], &one);
    let inputs = PackedInputs::of(&[Source::Rows(Rows::new(&x, 3, 8), 8)], &one, &narrow).unwrap();
    let layer = |weight| Source::Layer(Layer { inputs: &inputs, weight, epilogue: Epilogue::default() });
    let k = narrow.n();
    let all = vec![vec![(0, k)]];
    let next = packed(kernel, &values(4 * k, 3), [4, k], &all);
    assert!(PackedInputs::of(&[layer(&narrow)], &all, &next).is_none(), "half a panel");
    // Whole panels, which a chunk cuts in half.
    let wide = packed(kernel, &values(2 * kernel.nr * 8, 2), [2 * kernel.nr, 8], &one);
    let cut = kernel.nr / 2;
    let (k, halves) = (wide.n(), vec![vec![(0, cut)], vec![(cut, 2 * kernel.nr - cut)]]);
    let next = packed(kernel, &values(4 * k, 3), [4, k], &halves);
    assert!(PackedInputs::of(&[layer(&wide)], &halves, &next).is_none(), "a chunk that begins inside a panel");
    // Tiles have an order of their own.
    let tiles = packed(MicroKernel::bf16(Order::Tiles), &values(4 * 8, 3), [4, 8], &one);
    assert!(PackedInputs::of(&[Source::Rows(Rows::new(&x, 3, 8), 8)], &one, &tiles).is_none());
}
