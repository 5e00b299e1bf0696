//! However the Stable Diffusion 3 and 3.5 transformers are cut, they compute the same bits, and every rank reads its share alone;
//! so does a block at its true width.
#![allow(clippy::unwrap_used)] // clippy.toml allows it in tests, and takes only functions marked #[test] for tests

use std::collections::HashMap;
use std::path::Path;

use models::blocks::{BlockModel, Layout, RangeOf};
use models::sd3_transformer::{Sd3Transformer, Sd3TransformerConfig};
use models::{Error, Result};
use parallel::{DType, Device, Tensor, Tensors, Weights};
use tempfile::TempDir;
use tests::ranks::{Ran, run_block_model};
use tests::synthetic::{self, Random};

fn sd3() -> Sd3TransformerConfig {
    Sd3TransformerConfig {
        in_channels: 4,
        out_channels: Some(4),
        num_layers: 5,
        attention_head_dim: 8,
        num_attention_heads: 8,
        joint_attention_dim: 48,
        caption_projection_dim: 64,
        pooled_projection_dim: 24,
        pos_embed_max_size: 12,
        ..Sd3TransformerConfig::default()
    }
}

fn sd35() -> Sd3TransformerConfig {
    Sd3TransformerConfig { qk_norm: Some("rms_norm".into()), dual_attention_layers: vec![0, 1, 2], ..sd3() }
}

/// The published ones: 3 medium, 3.5 medium, 3.5 large.
fn published() -> [Sd3TransformerConfig; 3] {
    let medium = Sd3TransformerConfig {
        num_layers: 24,
        num_attention_heads: 24,
        caption_projection_dim: 1536,
        pos_embed_max_size: 192,
        ..Sd3TransformerConfig::default()
    };
    let qk_norm = Some("rms_norm".to_owned());
    let medium_35 = Sd3TransformerConfig {
        pos_embed_max_size: 384,
        dual_attention_layers: (0..13).collect(),
        qk_norm: qk_norm.clone(),
        ..medium
    };
    let large_35 =
        Sd3TransformerConfig { num_layers: 38, num_attention_heads: 38, caption_projection_dim: 2432, qk_norm, ..medium.clone() };
    [medium, medium_35, large_35]
}

/// Blocks in bf16, the rest in f32, as a checkpoint may mix them.
fn write(config: &Sd3TransformerConfig) -> (TempDir, HashMap<String, Tensor>) {
    let mut tensors = synthetic::sd3_transformer(config, 1, |_| true).unwrap();
    for (name, tensor) in &mut tensors {
        if name.starts_with("transformer_blocks") {
            *tensor = tensor.to_dtype(DType::BF16).unwrap();
        }
    }
    let dir = tempfile::tempdir().unwrap();
    synthetic::write(dir.path(), &tensors).unwrap();
    (dir, tensors)
}

/// With two residuals of a ControlNet, and a block left out.
fn inputs(config: &Sd3TransformerConfig, batch: usize) -> Tensors {
    let residual = |seed| Random::new(seed).tensor(&[batch, 15, config.inner_dim()], 0.0, 0.5).unwrap();
    synthetic::sd3_inputs(config, batch, (5, 3), 7, 2)
        .unwrap()
        .with("block_controlnet_hidden_states.0", residual(3))
        .with("block_controlnet_hidden_states.1", residual(4))
        .with("skip_layers", Tensor::new(&[2u32], &Device::Cpu).unwrap())
}

fn run(dir: &Path, config: &Sd3TransformerConfig, tp: usize, block_ranges: usize, inputs: &Tensors) -> Result<Ran> {
    let load = |w: &Weights, range: RangeOf| Sd3Transformer::load(w, config, range);
    run_block_model(dir, Layout::new(tp, block_ranges), inputs, load)
}

/// All elements, bit by bit.
fn bits(tensor: &Tensor) -> Vec<u32> {
    tensor.flatten_all().unwrap().to_vec1::<f32>().unwrap().into_iter().map(f32::to_bits).collect()
}

/// What stays whole on every rank of a range: embedders of time and text, `proj_out`, q/k norms, and the biases added after a sum.
fn is_replicated(name: &str) -> bool {
    let whole = ["context_embedder.", "time_text_embed.", "proj_out."].iter().any(|p| name.starts_with(p));
    let norm = ["norm_q", "norm_k", "norm_added_q", "norm_added_k"].iter().any(|n| name.contains(n));
    let after_sum = ["to_out.0.bias", "to_add_out.bias", "net.2.bias"].iter().any(|b| name.ends_with(b));
    whole || norm || after_sum
}

/// Whether a tensor belongs to the ranks of `range`.
fn is_held(name: &str, range: RangeOf, config: &Sd3TransformerConfig) -> bool {
    let index = name.strip_prefix("transformer_blocks.").and_then(|name| name.split('.').next()?.parse::<usize>().ok());
    match index {
        Some(i) => range.of(config.num_layers).contains(&i),
        None if name.starts_with("norm_out") || name.starts_with("proj_out") => range.is_last(),
        None => range.is_first(),
    }
}

#[test]
fn sd3_and_sd35_compute_the_same_bits_at_every_layout_and_every_rank_reads_its_share_alone() {
    for config in [sd3(), sd35()] {
        let (dir, tensors) = write(&config);
        let inputs = inputs(&config, 2);
        let solo = run(dir.path(), &config, 1, 1, &inputs).unwrap();
        let expected = solo.output("sample").unwrap();
        assert_eq!(expected.dims(), [2, 4, 10, 6]);
        let bytes = |t: &Tensor| (t.elem_count() * t.dtype().size_in_bytes()) as u64;
        let total: u64 = tensors.values().map(bytes).sum();
        let replicated: u64 = tensors.iter().filter(|(name, _)| is_replicated(name)).map(|(_, t)| bytes(t)).sum();
        assert_eq!((solo.total_bytes, &solo.bytes_read), (total, &vec![total]));
        for tp in [1, 2, 4, 8] {
            for block_ranges in [1, 2, 3, 5] {
                let ran = run(dir.path(), &config, tp, block_ranges, &inputs).unwrap();
                assert_eq!(ran.outputs.len(), tp);
                for output in &ran.outputs {
                    assert!(bits(output.get("sample").unwrap()) == bits(expected), "tp {tp} x {block_ranges}");
                }
                for (rank, read) in ran.bytes_read.iter().enumerate() {
                    let range = RangeOf { index: rank / tp, count: block_ranges };
                    let held = tensors.iter().filter(|(name, _)| is_held(name, range, &config));
                    let share: u64 =
                        held.map(|(name, t)| if is_replicated(name) { bytes(t) } else { bytes(t) / tp as u64 }).sum();
                    assert_eq!(*read, share, "rank {rank} of tp {tp} x {block_ranges}");
                }
                // Split tensors are read once over all ranks, the replicated ones once per rank.
                assert_eq!(ran.bytes_read.iter().sum::<u64>(), total + (tp as u64 - 1) * replicated);
            }
        }
    }
}

#[test]
fn less_than_one_percent_of_the_published_networks_is_replicated() {
    for (config, parameters) in published().into_iter().zip([2_028_328_000, 2_243_171_520, 8_056_627_520]) {
        let count = |wanted: &dyn Fn(&str) -> bool| -> usize {
            let shapes = synthetic::sd3_shapes(&config).into_iter().filter(|(name, _)| wanted(name));
            shapes.map(|(_, shape)| shape.iter().product::<usize>()).sum()
        };
        // The table of positions is a buffer, and counts as none of them.
        assert_eq!(count(&|name| name != "pos_embed.pos_embed"), parameters, "the published checkpoint's parameters");
        let replicated = count(&is_replicated);
        assert!(replicated * 100 < parameters, "{replicated} of {parameters}");
    }
}

#[test]
fn an_item_of_a_batch_is_what_it_is_alone() {
    for config in [sd3(), sd35()] {
        let (dir, _) = write(&config);
        let both = inputs(&config, 2);
        let together = run(dir.path(), &config, 2, 2, &both).unwrap();
        for item in 0..2 {
            let alone = |(name, t): (&str, &Tensor)| {
                let t = if name == "skip_layers" { t.clone() } else { t.narrow(0, item, 1).unwrap() };
                (name.to_owned(), t)
            };
            let alone = run(dir.path(), &config, 2, 2, &both.iter().map(alone).collect()).unwrap();
            let expected = together.output("sample").unwrap().narrow(0, item, 1).unwrap();
            assert!(bits(alone.output("sample").unwrap()) == bits(&expected), "item {item}");
        }
    }
}

#[test]
fn every_input_has_a_say() {
    let config = sd35();
    let (dir, _) = write(&config);
    let all = inputs(&config, 1);
    let expected = bits(run(dir.path(), &config, 1, 1, &all).unwrap().output("sample").unwrap());
    for (name, tensor) in all.iter() {
        let other = if name == "skip_layers" { (tensor + 1.0).unwrap() } else { (tensor * 0.5).unwrap() };
        let changed = all.clone().with(name, other);
        assert!(bits(run(dir.path(), &config, 1, 1, &changed).unwrap().output("sample").unwrap()) != expected, "{name}");
    }
}

#[test]
fn what_does_not_fit_is_named_on_every_layout() {
    let config = sd3();
    let (dir, _) = write(&config);
    let good = inputs(&config, 1);
    let latents = |height: usize, width: usize| Tensor::zeros((1, 4, height, width), DType::F32, &Device::Cpu).unwrap();
    let bad = [
        ("skip_layers", Tensor::new(&[1u32, 5], &Device::Cpu).unwrap()),
        ("hidden_states", latents(26, 6)),
        ("hidden_states", latents(9, 6)),
    ];
    for (name, tensor) in bad {
        let inputs = good.clone().with(name, tensor);
        for (tp, block_ranges) in [(1, 1), (2, 1), (1, 2)] {
            match run(dir.path(), &config, tp, block_ranges, &inputs) {
                Err(Error::Invalid { field, .. }) => assert_eq!(field, name),
                other => panic!("{name}: {other:?}"),
            }
        }
    }
    let mut inputs = good;
    inputs.take("timestep").unwrap();
    match run(dir.path(), &config, 2, 2, &inputs) {
        Err(Error::Parallel(parallel::Error::MissingInput { name })) => assert_eq!(name, "timestep"),
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_degree_that_does_not_divide_the_heads_is_a_typed_error() {
    let [.., large] = published();
    let dir = tempfile::tempdir().unwrap();
    synthetic::write(dir.path(), &HashMap::new()).unwrap();
    match run(dir.path(), &large, 4, 1, &Tensors::new()) {
        Err(Error::Parallel(parallel::Error::Indivisible { what, size: 38, tp: 4 })) => assert_eq!(what, "num_attention_heads"),
        other => panic!("{other:?}"),
    }
}

/// The first block and what comes before it; its output is the hidden states.
struct FirstBlock(Sd3Transformer);

impl BlockModel for FirstBlock {
    fn embed(&self, inputs: &Tensors) -> Result<Tensors> {
        self.0.embed(inputs)
    }

    fn blocks(&self, hidden: Tensors) -> Result<Tensors> {
        self.0.blocks(hidden)
    }

    fn output(&self, hidden: Tensors) -> Result<Tensors> {
        Ok(hidden)
    }
}

#[test]
fn a_block_of_the_published_width_computes_the_same_bits_at_tp_1_and_2() {
    let [medium, _, large] = published();
    for config in [medium, large] {
        // Two blocks, of which only the first is there: the last would have no output for the text.
        let config = Sd3TransformerConfig { num_layers: 2, pos_embed_max_size: 8, ..config };
        let first = |name: &str| is_held(name, RangeOf { index: 0, count: 2 }, &config);
        let mut tensors = synthetic::sd3_transformer(&config, 5, first).unwrap();
        tensors.values_mut().for_each(|t| *t = t.to_dtype(DType::BF16).unwrap());
        let dir = tempfile::tempdir().unwrap();
        synthetic::write(dir.path(), &tensors).unwrap();
        drop(tensors);
        let inputs = synthetic::sd3_inputs(&config, 1, (4, 4), 5, 6).unwrap();
        let load = |w: &Weights, _: RangeOf| Ok(FirstBlock(Sd3Transformer::load(w, &config, RangeOf { index: 0, count: 2 })?));
        let run = |tp| run_block_model(dir.path(), Layout::new(tp, 1), &inputs, load).unwrap();
        let solo = run(1);
        // Of the large one's 38 heads there are two halves and no quarters.
        for output in &run(2).outputs {
            for name in ["hidden_states", "encoder_hidden_states"] {
                let expected = solo.output(name).unwrap();
                assert!(bits(output.get(name).unwrap()) == bits(expected), "{name}, width {}", config.inner_dim());
            }
        }
    }
}
