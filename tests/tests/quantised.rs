//! Weights of 16 bits and in ggml's blocks are held as they are stored, and nothing else about a model changes: the bits are those
//! of the model whose f32 weights are the widened values, on every layout.
#![allow(clippy::unwrap_used)] // clippy.toml allows it in tests, and takes only functions marked #[test] for tests

use std::collections::HashMap;
use std::path::Path;

use candle_core::quantized::GgmlDType;
use models::blocks::{Layout, RangeOf};
use models::flux_transformer::{FluxTransformer, FluxTransformerConfig};
use models::model_dir::ModelDir;
use models::stage::Inputs;
use models::{Request, registry};
use parallel::ops::has_kernels;
use parallel::{DType, Device, Shard, Tensor, Tensors, Weights};
use tests::cluster::tiny_flux;
use tests::equivalence::bits;
use tests::ranks::{Ran, run_block_model};
use tests::{gguf, stages, synthetic};

/// Its width is 256: blocks of 256 are whole in some layers only, and eight ranks cut them.
fn config() -> FluxTransformerConfig {
    synthetic::small_flux(1)
}

fn run(dir: &Path, (tp, block_ranges): (usize, usize), inputs: &Tensors) -> Ran {
    let load = |w: &Weights, range: RangeOf| FluxTransformer::load(w, &config(), range);
    run_block_model(dir, Layout::new(tp, block_ranges), inputs, load).unwrap()
}

/// Whether two runs gave the same bits; the same numbers within rounding where candle multiplies, whose sums depend on the cut.
fn same(a: &Ran, b: &Ran) -> bool {
    let [a, b] = [a, b].map(|ran| ran.output("sample").unwrap());
    if has_kernels(&Device::Cpu) {
        return bits(a) == bits(b);
    }
    let difference = (a - b).unwrap().abs().unwrap().flatten_all().unwrap().max(0).unwrap().to_scalar::<f32>().unwrap();
    difference < 1e-4
}

#[test]
fn blocks_give_the_bits_of_what_they_hold_on_every_layout() {
    let tensors = synthetic::flux_transformer(&config(), 3).unwrap();
    let inputs = synthetic::flux_inputs(&config(), 2, (4, 3), 5, 2).unwrap();
    for wanted in [GgmlDType::Q4K, GgmlDType::Q6K, GgmlDType::Q8_0, GgmlDType::Q5_1] {
        let (blocks, wide) = gguf::quantised(&tensors, wanted).unwrap();
        let [quantised, plain] = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
        gguf::write(&quantised.path().join("network.gguf"), &blocks).unwrap();
        synthetic::write(plain.path(), &wide).unwrap();
        let expected = run(plain.path(), (1, 1), &inputs);
        for layout in [(1, 1), (2, 1), (8, 1), (2, 2)] {
            let ran = run(quantised.path(), layout, &inputs);
            assert!(same(&ran, &expected), "{wanted:?} at {layout:?}");
            let total: u64 = ran.bytes_read.iter().sum();
            assert!(total < expected.total_bytes / 2, "{wanted:?} at {layout:?}: {total} of {} bytes", expected.total_bytes);
        }
    }
}

#[test]
fn weights_of_16_bits_are_held_in_16_bits() {
    let inputs = synthetic::flux_inputs(&config(), 1, (4, 3), 5, 2).unwrap();
    for dtype in [DType::BF16, DType::F16] {
        let mut tensors = synthetic::flux_transformer(&config(), 3).unwrap();
        tensors.values_mut().for_each(|tensor| *tensor = tensor.to_dtype(dtype).unwrap());
        let wide = tensors.iter().map(|(name, t)| (name.clone(), t.to_dtype(DType::F32).unwrap())).collect();
        let [narrow, plain] = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
        synthetic::write(narrow.path(), &tensors).unwrap();
        synthetic::write(plain.path(), &wide).unwrap();
        let held = |dir: &Path| {
            let weights = Weights::open(dir, std::sync::Arc::new(parallel::Solo), DType::F32, &Device::Cpu).unwrap().measuring();
            FluxTransformer::load(&weights, &config(), RangeOf::WHOLE).unwrap();
            weights.bytes_held()
        };
        let (half, full) = (held(narrow.path()), held(plain.path()));
        assert!(half * 100 < full * 51, "{dtype:?}: {half} of {full} bytes");
        for layout in [(1, 1), (4, 1)] {
            assert!(same(&run(narrow.path(), layout, &inputs), &run(plain.path(), (1, 1), &inputs)), "{dtype:?}");
        }
    }
}

/// Black Forest Labs' names of the tensors of a FLUX.1 transformer, and what diffusers has them as, row after row.
fn original(config: &FluxTransformerConfig) -> Vec<(String, Vec<String>)> {
    let mut layers: Vec<(String, Vec<String>)> = Vec::new();
    let mut add = |original: String, diffusers: &[String]| layers.push((original, diffusers.to_vec()));
    for (theirs, ours) in [
        ("img_in", "x_embedder"),
        ("txt_in", "context_embedder"),
        ("time_in.in_layer", "time_text_embed.timestep_embedder.linear_1"),
        ("time_in.out_layer", "time_text_embed.timestep_embedder.linear_2"),
        ("guidance_in.in_layer", "time_text_embed.guidance_embedder.linear_1"),
        ("guidance_in.out_layer", "time_text_embed.guidance_embedder.linear_2"),
        ("vector_in.in_layer", "time_text_embed.text_embedder.linear_1"),
        ("vector_in.out_layer", "time_text_embed.text_embedder.linear_2"),
        ("final_layer.linear", "proj_out"),
    ] {
        add(theirs.into(), &[ours.into()]);
    }
    for i in 0..config.num_layers {
        let (theirs, ours) = (format!("double_blocks.{i}"), format!("transformer_blocks.{i}"));
        for (stream, q, out, norm, ff) in [
            ("img", ["to_q", "to_k", "to_v"], "to_out.0", "norm1", "ff"),
            ("txt", ["add_q_proj", "add_k_proj", "add_v_proj"], "to_add_out", "norm1_context", "ff_context"),
        ] {
            add(format!("{theirs}.{stream}_attn.qkv"), &q.map(|q| format!("{ours}.attn.{q}")));
            add(format!("{theirs}.{stream}_attn.proj"), &[format!("{ours}.attn.{out}")]);
            add(format!("{theirs}.{stream}_mod.lin"), &[format!("{ours}.{norm}.linear")]);
            add(format!("{theirs}.{stream}_mlp.0"), &[format!("{ours}.{ff}.net.0.proj")]);
            add(format!("{theirs}.{stream}_mlp.2"), &[format!("{ours}.{ff}.net.2")]);
        }
    }
    for i in 0..config.num_single_layers {
        let (theirs, ours) = (format!("single_blocks.{i}"), format!("single_transformer_blocks.{i}"));
        let fused = ["attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"].map(|name| format!("{ours}.{name}"));
        add(format!("{theirs}.linear1"), &fused);
        add(format!("{theirs}.linear2"), &[format!("{ours}.proj_out")]);
        add(format!("{theirs}.modulation.lin"), &[format!("{ours}.norm.linear")]);
    }
    layers
}

/// The same norms.
fn original_norm(name: &str) -> Option<String> {
    let name = name.strip_suffix(".weight")?;
    let (block, norm) = name.split_once(".attn.norm_")?;
    let which = |norm: &str| if norm.ends_with('q') { "query_norm" } else { "key_norm" }.to_owned();
    if let Some(i) = block.strip_prefix("single_transformer_blocks.") {
        return Some(format!("single_blocks.{i}.norm.{}.scale", which(norm)));
    }
    let stream = if norm.starts_with("added_") { "txt_attn" } else { "img_attn" };
    Some(format!("double_blocks.{}.{stream}.norm.{}.scale", block.strip_prefix("transformer_blocks.")?, which(norm)))
}

fn original_names(config: &FluxTransformerConfig, mut tensors: HashMap<String, Tensor>) -> HashMap<String, Tensor> {
    let mut renamed = HashMap::new();
    for (theirs, ours) in original(config) {
        for kind in ["weight", "bias"] {
            let parts: Vec<Tensor> = ours.iter().map(|name| tensors.remove(&format!("{name}.{kind}")).unwrap()).collect();
            renamed.insert(format!("{theirs}.{kind}"), Tensor::cat(&parts, 0).unwrap());
        }
    }
    for kind in ["weight", "bias"] {
        let last = tensors.remove(&format!("norm_out.linear.{kind}")).unwrap();
        let [scale, shift] = [0, 1].map(|half| last.chunk(2, 0).unwrap()[half].clone());
        renamed.insert(format!("final_layer.adaLN_modulation.1.{kind}"), Tensor::cat(&[shift, scale], 0).unwrap());
    }
    renamed.extend(tensors.into_iter().map(|(name, tensor)| (original_norm(&name).unwrap(), tensor)));
    renamed
}

/// llama.cpp's names of T5's tensors.
fn llama_names(tensors: HashMap<String, Tensor>) -> HashMap<String, Tensor> {
    let layers = [
        ("encoder.block.", "enc.blk."),
        (".layer.0.SelfAttention.relative_attention_bias", ".attn_rel_b"),
        (".layer.0.SelfAttention.", ".attn_"),
        (".layer.0.layer_norm", ".attn_norm"),
        (".layer.1.layer_norm", ".ffn_norm"),
        (".layer.1.DenseReluDense.wi_0", ".ffn_gate"),
        (".layer.1.DenseReluDense.wi_1", ".ffn_up"),
        (".layer.1.DenseReluDense.wo", ".ffn_down"),
        ("encoder.final_layer_norm", "enc.output_norm"),
        ("shared.", "token_embd."),
    ];
    let renamed = |name: String| layers.iter().fold(name, |name, (ours, theirs)| name.replace(ours, theirs));
    // Checkpoints have the token embedding under two names; llama.cpp's converter keeps one.
    let kept = tensors.into_iter().filter(|(name, _)| name != "encoder.embed_tokens.weight");
    kept.map(|(name, tensor)| (renamed(name), tensor)).collect()
}

fn copy(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap().map(Result::unwrap) {
        let to = to.join(entry.file_name());
        if entry.path().is_dir() {
            copy(&entry.path(), &to);
        } else {
            std::fs::copy(entry.path(), to).unwrap();
        }
    }
}

/// What a model makes of a prompt: its embedding by T5, and latents.
fn draw(model: &Path, layout: Layout) -> Vec<String> {
    let request = Request { prompt: "a red heart".into(), num_inference_steps: 2, max_sequence_length: 32, ..Request::default() };
    let request = Request { height: 32, width: 32, ..request };
    let mut inputs = Inputs::default();
    let run = |component: &str, inputs: &Inputs| {
        // CLIP is not quantised, and has no block ranges.
        let layout = if component == "text_encoder" { Layout::SOLO } else { layout };
        let job = vec![(0, request.clone(), inputs.clone())];
        stages::with_leader(model, component, layout, 1, |stage| stages::drain(stage, job, 0))
    };
    let mut seen = Vec::new();
    for encoder in ["text_encoder", "text_encoder_2"] {
        inputs.add(run(encoder, &Inputs::default()).0.remove(0)).unwrap();
    }
    seen.extend(inputs.conditioning.iter().map(|(name, t)| format!("{name} {}", stages::sha256(t))));
    seen.extend(run("transformer", &inputs).1);
    seen
}

#[test]
fn quantised_files_have_the_names_that_their_tools_give_them() {
    let folder = tempfile::tempdir().unwrap();
    let [published, plain] = ["published", "plain"].map(|name| folder.path().join(name));
    for model in [&published, &plain] {
        copy(&tiny_flux(), model);
    }
    for component in ["transformer", "text_encoder_2"] {
        let [from, to] = [&plain, &published].map(|model| model.join(component));
        let [file] = &parallel::checkpoint::checkpoint_files(&from).unwrap()[..] else { panic!("one file") };
        let tensors = candle_core::safetensors::load(file, &Device::Cpu).unwrap();
        let tensors: HashMap<_, _> = tensors.into_iter().map(|(name, t)| (name, t.to_dtype(DType::F32).unwrap())).collect();
        let (_, wide) = gguf::quantised(&tensors, GgmlDType::Q8_0).unwrap();
        std::fs::remove_file(file).unwrap();
        std::fs::remove_file(to.join(file.file_name().unwrap())).unwrap();
        candle_core::safetensors::save(&wide, from.join("model.safetensors")).unwrap();
        let renamed = match component {
            "transformer" => {
                let config = serde_json::from_slice(&std::fs::read(to.join("config.json")).unwrap()).unwrap();
                original_names(&config, wide)
            }
            _ => llama_names(wide),
        };
        // What was widened from blocks is the same blocks again.
        let (blocks, _) = gguf::quantised(&renamed, GgmlDType::Q8_0).unwrap();
        gguf::write(&to.join("any-name-Q8_0.gguf"), &blocks).unwrap();
    }
    let expected = draw(&plain, Layout::SOLO);
    assert_eq!(expected.len(), 4, "two encoders and two steps");
    for layout in [Layout::SOLO, Layout::new(2, 1), Layout::new(1, 2)] {
        assert_eq!(draw(&published, layout), expected, "{layout}");
    }
    registry::describe(&ModelDir::open(&published).unwrap()).unwrap();
}

#[test]
fn a_file_that_is_cut_short_or_is_none_is_refused_by_name() {
    let tensors = synthetic::flux_transformer(&config(), 3).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("network.gguf");
    gguf::write(&path, &gguf::quantised(&tensors, GgmlDType::Q4K).unwrap().0).unwrap();
    let whole = std::fs::read(&path).unwrap();
    for (bytes, part) in [
        (&whole[..whole.len() - 1], "goes beyond the file"),
        (&whole[..400], "truncated"),
        (&whole[..3], "truncated"),
        (&b"GGUFxxxxxxxxxxxxxxxxxxxxxxxxxxxxx"[..], "version"),
        (b"safetensors are something else", "does not begin"),
    ] {
        std::fs::write(&path, bytes).unwrap();
        let error = Weights::open(folder.path(), std::sync::Arc::new(parallel::Solo), DType::F32, &Device::Cpu).unwrap_err();
        assert!(error.to_string().contains("network.gguf") && error.to_string().contains(part), "{error}");
    }
}

#[test]
fn quantise_writes_a_model_whose_weights_are_within_half_a_step_of_the_old_ones() {
    let folder = tempfile::tempdir().unwrap();
    let to = folder.path().join("model-q8_0");
    let quantise = |more: &[&str]| {
        let mut command = tests::cluster::atelier();
        let said =
            command.arg("quantise").arg(tiny_flux()).arg(&to).args(more).stderr(std::process::Stdio::piped()).output().unwrap();
        (said.status.success(), String::from_utf8(said.stderr).unwrap())
    };
    let (done, said) = quantise(&["--component", "unet"]);
    assert!(!done && said.contains("--component: the model has no `unet`") && !to.exists(), "{said}");
    let (done, said) = quantise(&["--component", "transformer", "--component", "text_encoder_2", "--format", "q8_0"]);
    assert!(done, "{said}");
    let (done, said) = quantise(&[]);
    assert!(!done && said.contains("model-q8_0"), "what is there is not written over: {said}");

    let [old, new] = [&tiny_flux(), &to].map(|model| ModelDir::open(model).unwrap());
    for component in ["transformer", "text_encoder_2", "vae"] {
        let open = |dir: &ModelDir| {
            let path = dir.require(component).unwrap().path;
            registry::open(dir, &path, std::sync::Arc::new(parallel::Solo), &Device::Cpu).unwrap()
        };
        let (before, after) = (open(&old), open(&new));
        let mut in_blocks = 0;
        for (name, shape, stored) in after.tensors() {
            let values = |weights: &Weights| {
                weights.get(&name, &shape, Shard::Replicated).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap()
            };
            let (before, after) = (values(&before), values(&after));
            if stored.is_some() {
                assert_eq!(before, after, "{name} stays as it is");
                continue;
            }
            in_blocks += 1;
            for (before, after) in before.chunks(32).zip(after.chunks(32)) {
                let largest = before.iter().fold(0f32, |most, v| most.max(v.abs()));
                // A step, and the rounding of the scale to half precision.
                let allowed = largest / 127.0 * 0.51 + largest * 1e-3;
                assert!(before.iter().zip(after).all(|(b, a)| (b - a).abs() <= allowed), "{component}: {name}");
            }
        }
        assert_eq!(in_blocks > 0, component != "vae", "{component}");
    }
    assert_eq!(draw(&to, Layout::SOLO), draw(&to, Layout::new(2, 1)));
}
