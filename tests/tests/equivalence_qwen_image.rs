//! However Qwen-Image's transformer is cut, it computes the same bits, and every rank reads its share alone.
#![allow(clippy::unwrap_used)] // clippy.toml allows it in tests, and takes only functions marked #[test] for tests

use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;

use models::blocks::{BlockModel, Layout, RangeOf};
use models::qwen_image_transformer::{QwenImageTransformer, QwenImageTransformerConfig};
use models::{Error, Result};
use parallel::lora::{Factors, Run, Site};
use parallel::{DType, Device, Solo, Tensor, Tensors, Weights};
use tempfile::TempDir;
use tests::equivalence::{Checkpoint, bits};
use tests::ranks::{Ran, run_block_model};
use tests::synthetic::{self, qwen_image};

const LAYOUTS: [(usize, usize); 10] = [(2, 1), (4, 1), (8, 1), (1, 2), (1, 3), (2, 2), (2, 3), (4, 2), (4, 3), (1, 5)];

fn config() -> QwenImageTransformerConfig {
    QwenImageTransformerConfig {
        in_channels: 16,
        out_channels: Some(4),
        num_layers: 5,
        attention_head_dim: 8,
        num_attention_heads: 8,
        joint_attention_dim: 48,
        axes_dims_rope: vec![2, 2, 4],
        ..QwenImageTransformerConfig::default()
    }
}

/// The first blocks in bf16, the rest in f32, as a checkpoint may mix them.
fn tensors(config: &QwenImageTransformerConfig) -> HashMap<String, Tensor> {
    let mut tensors = qwen_image::transformer(config, 1).unwrap();
    for (name, tensor) in &mut tensors {
        if name.starts_with("transformer_blocks.0") || name.starts_with("transformer_blocks.1") {
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

/// A target and a reference picture.
fn inputs(batch: usize) -> Tensors {
    qwen_image::inputs(&config(), batch, &[[5, 3], [2, 4]], 7, 2).unwrap()
}

fn run(dir: &Path, config: &QwenImageTransformerConfig, (tp, block_ranges): (usize, usize), inputs: &Tensors) -> Result<Ran> {
    let load = |w: &Weights, range: RangeOf| QwenImageTransformer::load(w, config, range);
    run_block_model(dir, Layout::new(tp, block_ranges), inputs, load)
}

/// What stays whole on every rank of a range: embedders, `proj_out`, q/k norms, and the biases added after a sum.
fn is_replicated(name: &str) -> bool {
    let whole = ["img_in.", "txt_in.", "txt_norm.", "time_text_embed.", "proj_out."].iter().any(|p| name.starts_with(p));
    let norm = ["norm_q", "norm_k", "norm_added_q", "norm_added_k"].iter().any(|n| name.contains(n));
    let after_sum = ["to_out.0.bias", "to_add_out.bias", "net.2.bias"].iter().any(|b| name.ends_with(b));
    whole || norm || after_sum
}

/// Whether a tensor belongs to the ranks of `range`.
fn is_held(name: &str, range: RangeOf, blocks: usize) -> bool {
    let block = name.strip_prefix("transformer_blocks.").and_then(|rest| rest.split('.').next()?.parse::<usize>().ok());
    match block {
        Some(block) => range.of(blocks).contains(&block),
        None if name.starts_with("norm_out") || name.starts_with("proj_out") => range.is_last(),
        None => range.is_first(),
    }
}

fn same_bits_and_own_share(config: &QwenImageTransformerConfig, layouts: &[(usize, usize)], inputs: &Tensors) -> Tensor {
    let tensors = tensors(config);
    let dir = write(&tensors);
    let checkpoint = Checkpoint {
        dir: dir.path(),
        tensors: &tensors,
        is_replicated: &is_replicated,
        is_held: &|name, range| is_held(name, range, config.num_layers),
    };
    checkpoint.check(layouts, inputs, |w, range| QwenImageTransformer::load(w, config, range))
}

#[test]
fn qwen_image_computes_the_same_bits_at_every_layout_and_every_rank_reads_its_share_alone() {
    let at_job_time = same_bits_and_own_share(&config(), &LAYOUTS, &inputs(2));
    let zero_cond_t = QwenImageTransformerConfig { zero_cond_t: true, ..config() };
    let at_zero = same_bits_and_own_share(&zero_cond_t, &LAYOUTS, &inputs(2));
    assert!(bits(&at_job_time) != bits(&at_zero), "a reference picture is seen at another time");
}

#[test]
fn padded_texts_and_residuals_change_the_output_and_reach_every_block_range() {
    let mask = Tensor::new(&[[1u32, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0, 0]], &Device::Cpu).unwrap();
    let residual = |i: u64| synthetic::Random::new(i).tensor(&[2, 23, 64], 0.0, 1.0).unwrap();
    let plain = same_bits_and_own_share(&config(), &[], &inputs(2));
    let masked = inputs(2).with("encoder_hidden_states_mask", mask);
    let masked_output = same_bits_and_own_share(&config(), &LAYOUTS, &masked);
    let rows = |t: &Tensor, item: usize| bits(&t.narrow(0, item, 1).unwrap());
    assert!(rows(&masked_output, 0) == rows(&plain, 0) && rows(&masked_output, 1) != rows(&plain, 1));
    let guided = masked.with("controlnet_block_samples.0", residual(5)).with("controlnet_block_samples.1", residual(6));
    assert!(bits(&same_bits_and_own_share(&config(), &LAYOUTS, &guided)) != bits(&masked_output));
}

/// One block of the published network: 3,072 wide, 24 heads.
#[test]
fn at_its_true_width_a_block_computes_the_same_bits_on_two_ranks() {
    let config = QwenImageTransformerConfig { num_layers: 1, ..QwenImageTransformerConfig::default() };
    let inputs = qwen_image::inputs(&config, 1, &[[6, 5], [3, 3]], 11, 2).unwrap();
    same_bits_and_own_share(&config, &[(2, 1)], &inputs);
}

#[test]
fn less_than_a_fifth_of_a_percent_of_the_published_network_is_replicated() {
    let published = QwenImageTransformerConfig::default();
    let count = |keep: &dyn Fn(&str) -> bool| -> usize {
        qwen_image::shapes(&published)
            .iter()
            .filter(|(name, _)| keep(name))
            .map(|(_, shape)| shape.iter().product::<usize>())
            .sum()
    };
    let (total, replicated) = (count(&|_| true), count(&is_replicated));
    assert_eq!(total, 20_430_401_088, "the published checkpoint's parameters");
    assert!(replicated * 500 < total, "{replicated} of {total}");
}

#[test]
fn an_item_of_a_batch_is_what_it_is_alone() {
    let config = QwenImageTransformerConfig { zero_cond_t: true, ..config() };
    let dir = write(&tensors(&config));
    let both = inputs(2);
    let together = run(dir.path(), &config, (2, 2), &both).unwrap();
    for item in 0..2 {
        let alone = |(name, t): (&str, &Tensor)| {
            let t = if name == "img_shapes" { t.clone() } else { t.narrow(0, item, 1).unwrap() };
            (name.to_owned(), t)
        };
        let alone = run(dir.path(), &config, (2, 2), &both.iter().map(alone).collect()).unwrap();
        let expected = together.output("sample").unwrap().narrow(0, item, 1).unwrap();
        assert!(bits(alone.output("sample").unwrap()) == bits(&expected), "item {item}");
    }
}

/// With `zero_cond_t` the time's embedding is made twice: as often as adapters on it are added.
#[test]
fn adapters_on_what_depends_on_the_time_are_each_items_own_though_references_are_seen_at_another_time() {
    let config = QwenImageTransformerConfig { zero_cond_t: true, ..config() };
    let dir = write(&tensors(&config));
    let w = Weights::open(dir.path(), Arc::new(Solo), DType::F32, &Device::Cpu).unwrap();
    let model = QwenImageTransformer::load(&w, &config, RangeOf::WHOLE).unwrap();
    let of_time = |site: &Site| site.name.contains("timestep_embedder") || site.name.contains("img_mod");
    let mut random = synthetic::Random::new(11);
    let factors = w.adapters().sites().into_iter().filter(of_time).map(|Site { name, d_in, d_out, .. }| {
        let (a, b) = (random.tensor(&[2, d_in], 0.0, 0.3)?, random.tensor(&[d_out, 2], 0.0, 0.3)?);
        Ok::<_, parallel::Error>(Factors { site: name, a, b, factor: 1.0 })
    });
    let factors: Vec<_> = factors.collect();
    assert_eq!(factors.len(), 2 + config.num_layers);
    let adapter = Arc::new(w.adapters().adapter(factors).unwrap());
    let run = |inputs: &Tensors, runs: Vec<Run>| {
        let _active = w.adapters().activate(runs);
        let hidden = model.blocks(model.embed(inputs).unwrap()).unwrap();
        model.output(hidden).unwrap().take("sample").unwrap()
    };
    let both = inputs(2);
    let item = |item: usize| -> Tensors {
        let narrow = |t: &Tensor| t.narrow(0, item, 1).unwrap();
        both.iter().map(|(name, t)| (name.to_owned(), if name == "img_shapes" { t.clone() } else { narrow(t) })).collect()
    };
    let uses = [vec![(adapter, 0.7)], vec![]];
    let together = run(&both, uses.iter().map(|uses| (1, uses.clone())).collect());
    let plain = run(&both, vec![]);
    for (i, uses) in uses.into_iter().enumerate() {
        let row = |t: &Tensor| bits(&t.narrow(0, i, 1).unwrap());
        assert!(row(&together) == bits(&run(&item(i), vec![(1, uses)])), "item {i}");
        assert_eq!(row(&together) == row(&plain), i == 1, "item {i} and the network without adapters");
    }
}

#[test]
fn a_degree_that_does_not_divide_the_heads_is_a_typed_error() {
    let dir = write(&tensors(&config()));
    match run(dir.path(), &config(), (3, 1), &inputs(1)) {
        Err(Error::Parallel(parallel::Error::Indivisible { what, size: 8, tp: 3 })) => assert_eq!(what, "num_attention_heads"),
        other => panic!("{other:?}"),
    }
}

#[test]
fn what_a_checkpoint_lacks_or_has_too_much_of_is_named() {
    let whole = tensors(&config());
    let result = |tensors: &HashMap<String, Tensor>| run(write(tensors).path(), &config(), (1, 2), &inputs(1));
    for missing in ["txt_norm.weight", "transformer_blocks.3.img_mod.1.bias", "transformer_blocks.0.attn.norm_added_k.weight"] {
        let mut tensors = whole.clone();
        tensors.remove(missing).unwrap();
        match result(&tensors) {
            Err(Error::Parallel(parallel::Error::MissingTensor { name })) => assert_eq!(name, missing),
            other => panic!("{missing}: {other:?}"),
        }
    }
    let mut tensors = whole.clone();
    tensors.insert("transformer_blocks.1.attn.to_q.lora_A".into(), whole["img_in.bias"].clone());
    match result(&tensors) {
        Err(Error::Parallel(parallel::Error::UnusedTensors { names })) => {
            assert_eq!(names, ["transformer_blocks.1.attn.to_q.lora_A"]);
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn what_inputs_lack_or_contradict_is_named_on_every_layout() {
    let dir = write(&tensors(&config()));
    for layout in [(1, 1), (2, 1), (1, 2)] {
        let mut without = inputs(1);
        without.take("img_shapes").unwrap();
        match run(dir.path(), &config(), layout, &without) {
            Err(Error::Parallel(parallel::Error::MissingInput { name })) => assert_eq!(name, "img_shapes"),
            other => panic!("{other:?}"),
        }
        let wrong = inputs(1).with("img_shapes", Tensor::new(&[[1u32, 5, 3]], &Device::Cpu).unwrap());
        let result = run(dir.path(), &config(), layout, &wrong);
        assert!(matches!(result, Err(Error::Invalid { field: "img_shapes", .. })), "{result:?}");
    }
}
