//! However a network is cut, it computes the same bits, every rank reads its share alone, and a checkpoint that does not fit is a
//! typed error.
#![allow(clippy::unwrap_used)] // clippy.toml allows it in tests, and takes only functions marked #[test] for tests

use std::collections::HashMap;
use std::path::Path;

use models::blocks::{Layout, RangeOf};
use models::flux_transformer::{FluxTransformer, FluxTransformerConfig};
use models::{Error, Result};
use parallel::{DType, Tensor, Tensors, Weights};
use tempfile::TempDir;
use tests::ranks::{Ran, run_block_model};
use tests::synthetic;

fn config() -> FluxTransformerConfig {
    FluxTransformerConfig {
        in_channels: 16,
        num_layers: 3,
        num_single_layers: 3,
        attention_head_dim: 8,
        num_attention_heads: 8,
        joint_attention_dim: 48,
        pooled_projection_dim: 24,
        guidance_embeds: true,
        axes_dims_rope: vec![2, 2, 4],
        ..FluxTransformerConfig::default()
    }
}

/// Double-stream blocks in bf16, the rest in f32, as a checkpoint may mix them.
fn tensors() -> HashMap<String, Tensor> {
    let mut tensors = synthetic::flux_transformer(&config(), 1).unwrap();
    for (name, tensor) in &mut tensors {
        if name.starts_with("transformer_blocks") {
            *tensor = tensor.to_dtype(DType::BF16).unwrap();
        }
    }
    tensors
}

fn write(tensors: &HashMap<String, Tensor>) -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    synthetic::write(dir.path(), tensors).unwrap();
    dir
}

fn inputs(batch: usize) -> Tensors {
    synthetic::flux_inputs(&config(), batch, (5, 3), 7, 2).unwrap()
}

fn run(dir: &Path, tp: usize, block_ranges: usize, inputs: &Tensors) -> Result<Ran> {
    let load = |w: &Weights, range: RangeOf| FluxTransformer::load(w, &config(), range);
    run_block_model(dir, Layout::new(tp, block_ranges), inputs, load)
}

/// All elements, bit by bit.
fn bits(tensor: &Tensor) -> Vec<u32> {
    tensor.flatten_all().unwrap().to_vec1::<f32>().unwrap().into_iter().map(f32::to_bits).collect()
}

/// What stays whole on every rank of a range: embedders, `proj_out`, q/k norms, and the biases added after a sum.
fn is_replicated(name: &str) -> bool {
    let whole = ["x_embedder.", "context_embedder.", "time_text_embed.", "proj_out."].iter().any(|p| name.starts_with(p));
    let norm = ["norm_q", "norm_k", "norm_added_q", "norm_added_k"].iter().any(|n| name.contains(n));
    let after_sum = ["to_out.0.bias", "to_add_out.bias", "net.2.bias", "proj_out.bias"].iter().any(|b| name.ends_with(b));
    whole || norm || after_sum
}

/// Whether a tensor belongs to the ranks of `range`.
fn is_held(name: &str, range: RangeOf, config: &FluxTransformerConfig) -> bool {
    let index = |prefix: &str| name.strip_prefix(prefix)?.split('.').next()?.parse::<usize>().ok();
    match (index("transformer_blocks."), index("single_transformer_blocks.")) {
        (Some(i), _) => range.of(config.blocks()).contains(&i),
        (_, Some(i)) => range.of(config.blocks()).contains(&(config.num_layers + i)),
        _ if name.starts_with("norm_out") || name.starts_with("proj_out") => range.is_last(),
        _ => range.is_first(),
    }
}

#[test]
fn flux_computes_the_same_bits_at_every_layout_and_every_rank_reads_its_share_alone() {
    let tensors = tensors();
    let dir = write(&tensors);
    let inputs = inputs(2);
    let solo = run(dir.path(), 1, 1, &inputs).unwrap();
    let expected = solo.output("sample").unwrap();
    let bytes = |t: &Tensor| (t.elem_count() * t.dtype().size_in_bytes()) as u64;
    let total: u64 = tensors.values().map(bytes).sum();
    let replicated: u64 = tensors.iter().filter(|(name, _)| is_replicated(name)).map(|(_, t)| bytes(t)).sum();
    assert_eq!((solo.total_bytes, &solo.bytes_read), (total, &vec![total]));
    for (tp, block_ranges) in [(2, 1), (4, 1), (8, 1), (1, 2), (1, 3), (2, 2), (2, 3), (4, 2), (4, 3), (1, 6)] {
        let ran = run(dir.path(), tp, block_ranges, &inputs).unwrap();
        assert_eq!(ran.outputs.len(), tp);
        for output in &ran.outputs {
            assert!(bits(output.get("sample").unwrap()) == bits(expected), "tp {tp} x {block_ranges}");
        }
        for (rank, read) in ran.bytes_read.iter().enumerate() {
            let range = RangeOf { index: rank / tp, count: block_ranges };
            let held = tensors.iter().filter(|(name, _)| is_held(name, range, &config()));
            let share: u64 = held.map(|(name, t)| if is_replicated(name) { bytes(t) } else { bytes(t) / tp as u64 }).sum();
            assert_eq!(*read, share, "rank {rank} of tp {tp} x {block_ranges}");
        }
        // Split tensors are read once over all ranks, the replicated ones once per rank.
        assert_eq!(ran.bytes_read.iter().sum::<u64>(), total + (tp as u64 - 1) * replicated);
    }
}

#[test]
fn less_than_half_a_percent_of_flux_dev_is_replicated() {
    let dev = FluxTransformerConfig { guidance_embeds: true, ..FluxTransformerConfig::default() };
    let count = |shapes: &mut dyn Iterator<Item = (String, Vec<usize>)>| shapes.map(|(_, s)| s.iter().product::<usize>()).sum();
    let total: usize = count(&mut synthetic::flux_shapes(&dev).into_iter());
    let replicated: usize = count(&mut synthetic::flux_shapes(&dev).into_iter().filter(|(name, _)| is_replicated(name)));
    assert_eq!(total, 11_901_408_320, "the published checkpoint's parameters");
    assert!(replicated * 200 < total, "{replicated} of {total}");
}

#[test]
fn an_item_of_a_batch_is_what_it_is_alone() {
    let dir = write(&tensors());
    let both = inputs(2);
    let together = run(dir.path(), 2, 2, &both).unwrap();
    for item in 0..2 {
        let alone = |(name, t): (&str, &Tensor)| {
            let t = if name.ends_with("_ids") { t.clone() } else { t.narrow(0, item, 1).unwrap() };
            (name.to_owned(), t)
        };
        let alone = run(dir.path(), 2, 2, &both.iter().map(alone).collect()).unwrap();
        let expected = together.output("sample").unwrap().narrow(0, item, 1).unwrap();
        assert!(bits(alone.output("sample").unwrap()) == bits(&expected), "item {item}");
    }
}

#[test]
fn a_degree_that_does_not_divide_the_heads_is_a_typed_error() {
    let dir = write(&tensors());
    for tp in [3, 16] {
        match run(dir.path(), tp, 1, &inputs(1)) {
            Err(Error::Parallel(parallel::Error::Indivisible { what, size: 8, tp: found })) => {
                assert_eq!((what.as_str(), found), ("num_attention_heads", tp));
            }
            other => panic!("tp {tp}: {other:?}"),
        }
    }
}

#[test]
fn a_truncated_checkpoint_is_a_typed_error() {
    let dir = write(&tensors());
    let file = dir.path().join("diffusion_pytorch_model.safetensors");
    let whole = std::fs::read(&file).unwrap();
    for len in [0, 7, 8, 1000, whole.len() / 2, whole.len() - 1] {
        std::fs::write(&file, &whole[..len]).unwrap();
        let result = run(dir.path(), 2, 1, &inputs(1));
        assert!(
            matches!(result, Err(Error::Parallel(parallel::Error::Checkpoint { .. } | parallel::Error::Io { .. }))),
            "{result:?}"
        );
    }
}

#[test]
fn a_tensor_the_model_does_not_use_is_named() {
    let mut tensors = tensors();
    tensors.insert("transformer_blocks.1.attn.to_q.lora_A".into(), tensors["x_embedder.bias"].clone());
    let dir = write(&tensors);
    match run(dir.path(), 1, 1, &inputs(1)) {
        Err(Error::Parallel(parallel::Error::UnusedTensors { names })) => {
            assert_eq!(names, ["transformer_blocks.1.attn.to_q.lora_A"]);
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_missing_tensor_is_named() {
    for missing in ["proj_out.weight", "single_transformer_blocks.2.proj_mlp.weight", "transformer_blocks.0.attn.to_out.0.bias"] {
        let mut tensors = tensors();
        tensors.remove(missing).unwrap();
        let dir = write(&tensors);
        match run(dir.path(), 1, 1, &inputs(1)) {
            Err(Error::Parallel(parallel::Error::MissingTensor { name })) => assert_eq!(name, missing),
            other => panic!("{missing}: {other:?}"),
        }
    }
}

#[test]
fn a_tensor_of_another_shape_is_named() {
    let mut tensors = tensors();
    tensors.insert("x_embedder.weight".into(), tensors["proj_out.weight"].clone());
    match run(write(&tensors).path(), 1, 1, &inputs(1)) {
        Err(Error::Parallel(parallel::Error::Shape { name, .. })) => assert_eq!(name, "x_embedder.weight"),
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_missing_input_is_named_on_every_layout() {
    let dir = write(&tensors());
    let mut inputs = inputs(1);
    inputs.take("guidance").unwrap();
    for (tp, block_ranges) in [(1, 1), (2, 1), (1, 2)] {
        match run(dir.path(), tp, block_ranges, &inputs) {
            Err(Error::Parallel(parallel::Error::MissingInput { name })) => assert_eq!(name, "guidance"),
            other => panic!("{other:?}"),
        }
    }
}
