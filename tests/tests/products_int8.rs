//! Products in 8 bits: the same bits on every layout and in any batch, and little further from the reference than what the weights' own
//! blocks cost.
#![allow(clippy::unwrap_used)] // clippy.toml allows it in tests, and takes only functions marked #[test] for tests

use std::collections::HashMap;
use std::path::Path;

use candle_core::quantized::GgmlDType;
use models::Result;
use models::blocks::{BlockModel, Layout, RangeOf};
use models::flux_transformer::{FluxTransformer, FluxTransformerConfig};
use models::model_dir::read_json;
use models::sd3_transformer::{Sd3Transformer, Sd3TransformerConfig};
use parallel::ops::{Products, has_kernels};
use parallel::{Device, Tensor, Tensors, Weights};
use tests::equivalence::bits;
use tests::golden::Case;
use tests::ranks::run_block_model;
use tests::{gguf, synthetic};

/// Runs a test in 8 bits, and its ranks. Where candle's operations compute for the CPU there is nothing to show: they multiply in f32
/// alone, which a worker says.
fn in_int8(test: impl FnOnce()) {
    if has_kernels(&Device::Cpu) {
        Products::Int8.scope(test);
    }
}

/// A folder with the tensors in blocks, and what these hold.
fn quantised(tensors: &HashMap<String, Tensor>, wanted: GgmlDType) -> (tempfile::TempDir, HashMap<String, Tensor>) {
    let dir = tempfile::tempdir().unwrap();
    let (blocks, wide) = gguf::quantised(tensors, wanted).unwrap();
    gguf::write(&dir.path().join("network.gguf"), &blocks).unwrap();
    (dir, wide)
}

/// The root of the mean squared difference.
fn distance(a: &Tensor, b: &Tensor) -> f64 {
    f64::from((a - b).unwrap().sqr().unwrap().mean_all().unwrap().to_scalar::<f32>().unwrap()).sqrt()
}

/// A case of a transformer with its weights in `Q8_0`, beside the same numbers as f32.
fn check<M: BlockModel>(name: &str, load: impl Fn(&Path, &Weights, RangeOf) -> Result<M> + Sync) {
    let case = Case::open(&Path::new(env!("CARGO_MANIFEST_DIR")).join("golden").join(name)).unwrap();
    let (recorded, mut tensors) = (case.folder("weights").unwrap(), HashMap::new());
    for entry in std::fs::read_dir(&recorded).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_some_and(|extension| extension == "safetensors") {
            tensors.extend(candle_core::safetensors::load(&path, &Device::Cpu).unwrap());
        }
    }
    let (blocks, wide) = quantised(&tensors, GgmlDType::Q8_0);
    let widened = tempfile::tempdir().unwrap();
    synthetic::write(widened.path(), &wide).unwrap();
    let inputs: Tensors = case.below("in.").map(|(name, tensor)| (name.to_owned(), tensor.clone())).collect();
    let run = |dir: &Path, layout: Layout| {
        let ran = run_block_model(dir, layout, &inputs, |w, range| load(&recorded, w, range)).unwrap();
        ran.output("sample").unwrap().clone()
    };
    let expected = case.tensor("out.sample").unwrap();
    let ours = run(blocks.path(), Layout::SOLO);
    let [error, of_blocks] = [&ours, &run(widened.path(), Layout::SOLO)].map(|got| distance(got, expected));
    println!("{name}: {error:.5} from the reference, {of_blocks:.5} with the same weights in f32");
    assert!(error <= 2.0 * of_blocks, "{name} is {error} from the reference, of which its blocks are {of_blocks}");
    for layout in [Layout::new(2, 1), Layout::new(1, 2), Layout::new(2, 2)] {
        let same = bits(&run(blocks.path(), layout)) == bits(&ours);
        assert!(same, "{name} has other bits at tp {} x {} ranges", layout.tp, layout.block_ranges);
    }
}

#[test]
fn flux_in_int8_is_nearly_as_near_as_its_blocks() {
    in_int8(|| {
        check("flux_transformer_dev", |dir: &Path, w: &Weights, range: RangeOf| {
            let config: FluxTransformerConfig = read_json(&dir.join("config.json"))?;
            FluxTransformer::load(w, &config, range)
        });
    });
}

#[test]
fn sd3_in_int8_is_nearly_as_near_as_its_blocks() {
    in_int8(|| {
        check("sd3_transformer", |dir: &Path, w: &Weights, range: RangeOf| {
            let config: Sd3TransformerConfig = read_json(&dir.join("config.json"))?;
            Sd3Transformer::load(w, &config, range)
        });
    });
}

#[test]
fn up_to_eight_ranks_three_ranges_and_any_batch_have_the_same_bits_in_int8() {
    in_int8(|| {
        // Wide enough that an eighth of a row is whole blocks of inputs.
        let config = synthetic::small_flux(2);
        let tensors = synthetic::flux_transformer(&config, 3).unwrap();
        let three = synthetic::flux_inputs(&config, 3, (4, 3), 5, 2).unwrap();
        let first = |name: &str, tensor: &Tensor| {
            let ids = name.ends_with("_ids");
            (name.to_owned(), if ids { tensor.clone() } else { tensor.narrow(0, 0, 1).unwrap() })
        };
        let one: Tensors = three.iter().map(|(name, tensor)| first(name, tensor)).collect();
        let run = |dir: &Path, inputs: &Tensors, layout: Layout| {
            let ran = run_block_model(dir, layout, inputs, |w, range| FluxTransformer::load(w, &config, range)).unwrap();
            ran.output("sample").unwrap().clone()
        };
        let whole = tempfile::tempdir().unwrap();
        synthetic::write(whole.path(), &tensors).unwrap();
        let exact = run(whole.path(), &three, Layout::SOLO);
        for wanted in [GgmlDType::Q8_0, GgmlDType::Q4K, GgmlDType::Q6K] {
            let (blocks, wide) = quantised(&tensors, wanted);
            let expected = run(blocks.path(), &three, Layout::SOLO);
            for (tp, ranges) in [(2, 1), (4, 1), (8, 1), (1, 3), (4, 2)] {
                let same = bits(&run(blocks.path(), &three, Layout::new(tp, ranges))) == bits(&expected);
                assert!(same, "{wanted:?} at tp {tp} x {ranges} ranges");
            }
            let alone = run(blocks.path(), &one, Layout::SOLO);
            assert!(bits(&alone) == bits(&expected.narrow(0, 0, 1).unwrap()), "{wanted:?} alone");

            let widened = tempfile::tempdir().unwrap();
            synthetic::write(widened.path(), &wide).unwrap();
            let in_f32 = run(widened.path(), &three, Layout::SOLO);
            let [error, of_blocks, of_inputs] =
                [(&exact, &expected), (&exact, &in_f32), (&in_f32, &expected)].map(|(a, b)| distance(a, b));
            println!("{wanted:?}: {error:.5} from the exact weights, {of_blocks:.5} with the same blocks in f32");
            assert!(of_inputs > 1e-4, "nothing of {wanted:?} was multiplied in 8 bits");
            assert!(
                error <= 2.0 * of_blocks,
                "{wanted:?} is {error} from the exact weights, of which its blocks are {of_blocks}"
            );
        }
    });
}
