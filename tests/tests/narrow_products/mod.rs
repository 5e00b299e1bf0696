//! Products in bf16, in one order or the other: the same bits on every layout, and no further from the reference than the reference's own
//! bf16 is.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use candle_core::quantized::GgmlDType;
use models::Result;
use models::autoencoder_kl::{AutoencoderKl, AutoencoderKlConfig};
use models::blocks::{BlockModel, Layout, RangeOf};
use models::dit_transformer::{DiTTransformer, DiTTransformerConfig};
use models::flux_transformer::{FluxTransformer, FluxTransformerConfig};
use models::hunyuan_dit::{HunyuanDiT, HunyuanDiTConfig};
use models::model_dir::read_json;
use models::pixart_transformer::{PixArtTransformer, PixArtTransformerConfig};
use models::qwen_image_transformer::{QwenImageTransformer, QwenImageTransformerConfig};
use models::sd3_transformer::{Sd3Transformer, Sd3TransformerConfig};
use models::t5::{T5Config, T5Encoder};
use models::unet_2d_condition::{UNet2DConditionConfig, UNet2DConditionModel};
use parallel::ops::has_kernels;
use parallel::{DType, Device, Solo, Tensor, Tensors, Weights};
use tests::equivalence::bits;
use tests::golden::Case;
use tests::ranks::run_block_model;
use tests::{gguf, synthetic};

/// Runs a test in the program's way, and in its ranks. Where candle's operations compute for the CPU there is nothing to show: they
/// multiply in f32 alone, which a worker says.
fn in_the_way(test: impl FnOnce()) {
    if has_kernels(&Device::Cpu) {
        crate::PRODUCTS.scope(test);
    }
}

fn open(name: &str) -> Case {
    Case::open(&Path::new(env!("CARGO_MANIFEST_DIR")).join("golden").join(name)).unwrap()
}

/// A folder with the case's weights in bf16, beside the folder they were recorded in.
fn narrowed(case: &mut Case) -> (PathBuf, tempfile::TempDir) {
    let (recorded, dir) = (case.folder("weights").unwrap(), tempfile::tempdir().unwrap());
    for entry in std::fs::read_dir(&recorded).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_some_and(|extension| extension == "safetensors") {
            let mut tensors = candle_core::safetensors::load(&path, &Device::Cpu).unwrap();
            tensors.values_mut().for_each(|tensor| *tensor = tensor.to_dtype(DType::BF16).unwrap());
            candle_core::safetensors::save(&tensors, dir.path().join(path.file_name().unwrap())).unwrap();
        }
    }
    (recorded, dir)
}

/// By which error two runs in bf16 are compared.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Error {
    /// The largest, and the root of the mean of squares.
    Both,
    /// The root of the mean of squares alone: of a few hundred numbers the largest error is a matter of chance, and says one thing in one
    /// order of additions and another in the other.
    Rms,
}

/// The error is at most that of the reference in bf16, and more than f32 would have.
fn compare(case: &Case, output: &str, got: &Tensor, by: Error) {
    let recorded = case.tensor(output).unwrap();
    let difference = (got - recorded).unwrap().abs().unwrap();
    let largest = f64::from(difference.flatten_all().unwrap().max(0).unwrap().to_scalar::<f32>().unwrap());
    let rms = |x: &Tensor| f64::from(x.sqr().unwrap().mean_all().unwrap().to_scalar::<f32>().unwrap().sqrt());
    let (theirs, own_rms) = (case.bf16_error(output).unwrap(), rms(&difference) / rms(recorded));
    let their_rms = case.json["tolerance"][output]["bf16_vs_f64"]["rms_rel"].as_f64().unwrap();
    println!("{} {output}: {largest:.4} and {own_rms:.4}, the reference in bf16 {theirs:.4} and {their_rms:.4}", case.name);
    assert!(by == Error::Rms || largest <= theirs, "{output} is {largest} from the reference, whose bf16 {theirs}");
    assert!(own_rms <= their_rms, "{output} is {own_rms} from the reference on the whole, whose bf16 {their_rms}");
    assert!(largest > case.tolerance(output).unwrap(), "{output} was not computed in bf16");
}

/// A case of a transformer with its weights narrowed to bf16, at every layout.
fn check<M: BlockModel>(name: &str, by: Error, load: impl Fn(&Path, &Weights, RangeOf) -> Result<M> + Sync) {
    let mut case = open(name);
    if let Ok(shapes) = serde_json::from_value::<Vec<Vec<u32>>>(case.param("img_shapes").clone()) {
        case.put("in.img_shapes", Tensor::new(shapes, &Device::Cpu).unwrap());
    }
    let (recorded, dir) = narrowed(&mut case);
    let inputs: Tensors = case.below("in.").map(|(name, tensor)| (name.to_owned(), tensor.clone())).collect();
    let mut first = None;
    for layout in [Layout::SOLO, Layout::new(2, 1), Layout::new(1, 2), Layout::new(2, 2)] {
        let ran = run_block_model(dir.path(), layout, &inputs, |w, range| load(&recorded, w, range)).unwrap();
        let sample = ran.output("sample").unwrap().clone();
        let same = first.get_or_insert_with(|| bits(&sample)) == &bits(&sample);
        assert!(same, "{name} has other bits at tp {} x {} ranges", layout.tp, layout.block_ranges);
        compare(&case, "out.sample", &sample, by);
    }
}

#[test]
fn t5_in_bf16_is_as_near_as_transformers_and_the_same_on_every_layout() {
    in_the_way(|| {
        let mut case = open("t5_encoder");
        let (recorded, dir) = narrowed(&mut case);
        let config: T5Config = read_json(&recorded.join("config.json")).unwrap();
        let inputs = Tensors::new().with("input_ids", case.tensor("in.input_ids").unwrap().clone());
        let mut first = None;
        for layout in [Layout::SOLO, Layout::new(2, 1), Layout::new(2, 2)] {
            let ran = run_block_model(dir.path(), layout, &inputs, |w, range| T5Encoder::load(w, &config, range)).unwrap();
            let last = ran.output("last_hidden_state").unwrap().clone();
            assert!(first.get_or_insert_with(|| bits(&last)) == &bits(&last), "tp {} x {}", layout.tp, layout.block_ranges);
            compare(&case, "out.no_mask.last_hidden_state", &last, Error::Both);
        }
    });
}

#[test]
fn autoencoders_in_bf16_are_as_near_as_diffusers() {
    in_the_way(|| {
        for name in ["vae_flux", "vae_sd15", "vae_sdxl"] {
            let mut case = open(name);
            let (recorded, dir) = narrowed(&mut case);
            let config: AutoencoderKlConfig = read_json(&recorded.join("config.json")).unwrap();
            let weights = Weights::open(dir.path(), Arc::new(Solo), DType::F32, &Device::Cpu).unwrap();
            let vae = AutoencoderKl::load(&weights, &config).unwrap();
            compare(&case, "out.decode", &vae.decode(case.tensor("in.latent").unwrap()).unwrap(), Error::Both);
            compare(&case, "out.encode.mean", &vae.encode(case.tensor("in.image").unwrap()).unwrap().mean, Error::Both);
        }
    });
}

#[test]
fn up_to_eight_ranks_three_ranges_and_any_batch_have_the_same_bits_in_bf16() {
    in_the_way(|| {
        let config = synthetic::small_flux(2);
        let dir = tempfile::tempdir().unwrap();
        let mut tensors = synthetic::flux_transformer(&config, 3).unwrap();
        tensors.values_mut().for_each(|tensor| *tensor = tensor.to_dtype(DType::BF16).unwrap());
        synthetic::write(dir.path(), &tensors).unwrap();
        let three = synthetic::flux_inputs(&config, 3, (4, 3), 5, 2).unwrap();
        let first = |name: &str, tensor: &Tensor| {
            let ids = name.ends_with("_ids");
            (name.to_owned(), if ids { tensor.clone() } else { tensor.narrow(0, 0, 1).unwrap() })
        };
        let one: Tensors = three.iter().map(|(name, tensor)| first(name, tensor)).collect();
        let run = |inputs: &Tensors, layout: Layout| {
            let ran = run_block_model(dir.path(), layout, inputs, |w, range| FluxTransformer::load(w, &config, range)).unwrap();
            ran.output("sample").unwrap().clone()
        };
        let expected = run(&three, Layout::SOLO);
        for (tp, ranges) in [(2, 1), (4, 1), (8, 1), (1, 3), (4, 2)] {
            assert!(bits(&run(&three, Layout::new(tp, ranges))) == bits(&expected), "tp {tp} x {ranges} ranges");
        }
        assert!(bits(&run(&one, Layout::SOLO)) == bits(&expected.narrow(0, 0, 1).unwrap()), "alone");
    });
}

#[test]
fn blocks_in_bf16_are_their_values_rounded_on_every_layout() {
    in_the_way(|| {
        let config = synthetic::small_flux(1);
        let tensors = synthetic::flux_transformer(&config, 3).unwrap();
        let inputs = synthetic::flux_inputs(&config, 1, (4, 3), 5, 2).unwrap();
        for wanted in [GgmlDType::Q4K, GgmlDType::Q8_0] {
            let (blocks, mut wide) = gguf::quantised(&tensors, wanted).unwrap();
            for (name, tensor) in &blocks {
                // What is not in blocks is multiplied in f32 in both.
                if tensor.dtype() != GgmlDType::F32 {
                    let rounded = wide[name].to_dtype(DType::BF16).unwrap();
                    wide.insert(name.clone(), rounded);
                }
            }
            let [quantised, rounded] = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
            gguf::write(&quantised.path().join("network.gguf"), &blocks).unwrap();
            synthetic::write(rounded.path(), &wide).unwrap();
            let run = |dir: &Path, layout: Layout| {
                let ran = run_block_model(dir, layout, &inputs, |w, range| FluxTransformer::load(w, &config, range)).unwrap();
                bits(ran.output("sample").unwrap())
            };
            let expected = run(rounded.path(), Layout::SOLO);
            for (tp, ranges) in [(1, 1), (2, 1), (8, 1), (2, 2)] {
                assert!(run(quantised.path(), Layout::new(tp, ranges)) == expected, "{wanted:?} at tp {tp} x {ranges} ranges");
            }
        }
    });
}

#[test]
fn flux_in_bf16_is_as_near_as_diffusers_and_the_same_on_every_layout() {
    let load = |dir: &Path, w: &Weights, range: RangeOf| {
        let config: FluxTransformerConfig = read_json(&dir.join("config.json"))?;
        FluxTransformer::load(w, &config, range)
    };
    in_the_way(|| {
        check("flux_transformer_dev", Error::Both, load);
        check("flux_transformer_kontext_ids", Error::Both, load);
    });
}

#[test]
fn sd3_in_bf16_is_as_near_as_diffusers_and_the_same_on_every_layout() {
    let load = |dir: &Path, w: &Weights, range: RangeOf| {
        let config: Sd3TransformerConfig = read_json(&dir.join("config.json"))?;
        Sd3Transformer::load(w, &config, range)
    };
    in_the_way(|| {
        check("sd3_transformer", Error::Both, load);
        check("sd35_transformer", Error::Both, load);
    });
}

#[test]
fn qwen_image_in_bf16_is_as_near_as_diffusers_and_the_same_on_every_layout() {
    let load = |dir: &Path, w: &Weights, range: RangeOf| {
        let config: QwenImageTransformerConfig = read_json(&dir.join("config.json"))?;
        QwenImageTransformer::load(w, &config, range)
    };
    in_the_way(|| {
        check("qwen_transformer", Error::Both, load);
    });
}

#[test]
fn u_nets_in_bf16_is_as_near_as_diffusers_and_the_same_on_every_layout() {
    let load = |dir: &Path, w: &Weights, range: RangeOf| {
        let config: UNet2DConditionConfig = read_json(&dir.join("config.json"))?;
        UNet2DConditionModel::load(w, &config, range)
    };
    in_the_way(|| {
        check("unet_sd15", Error::Rms, load);
        check("unet_sdxl", Error::Rms, load);
        check("unet_sdxl_refiner", Error::Rms, load);
    });
}

#[test]
fn pixart_in_bf16_is_as_near_as_diffusers_and_the_same_on_every_layout() {
    let load = |dir: &Path, w: &Weights, range: RangeOf| {
        let config: PixArtTransformerConfig = read_json(&dir.join("config.json"))?;
        PixArtTransformer::load(w, &config, range)
    };
    in_the_way(|| {
        check("pixart_transformer_1024", Error::Both, load);
        check("pixart_transformer_512", Error::Both, load);
    });
}

#[test]
fn dit_in_bf16_is_as_near_as_diffusers_and_the_same_on_every_layout() {
    let load = |dir: &Path, w: &Weights, range: RangeOf| {
        let config: DiTTransformerConfig = read_json(&dir.join("config.json"))?;
        DiTTransformer::load(w, &config, range)
    };
    in_the_way(|| {
        check("dit_transformer", Error::Both, load);
    });
}

#[test]
fn hunyuan_dit_in_bf16_is_as_near_as_diffusers_and_the_same_on_every_layout() {
    let load = |dir: &Path, w: &Weights, range: RangeOf| {
        let config: HunyuanDiTConfig = read_json(&dir.join("config.json"))?;
        HunyuanDiT::load(w, &config, range)
    };
    in_the_way(|| {
        check("hunyuan_transformer_v11", Error::Both, load);
        check("hunyuan_transformer_v12", Error::Both, load);
    });
}
