//! However Qwen2.5-VL is cut, through its heads even, it computes the same bits, and every rank reads its share alone.
#![allow(clippy::unwrap_used)] // clippy.toml allows it in tests, and takes only functions marked #[test] for tests

use std::collections::HashMap;
use std::ops::Range;
use std::path::Path;

use models::blocks::{Layout, RangeOf};
use models::qwen2_5_vl::{Qwen25VlConfig, Qwen25VlModel};
use parallel::{DType, Device, Tensor, Tensors, Weights};
use serde_json::json;
use tempfile::TempDir;
use tests::ranks::{Ran, run_block_model};
use tests::synthetic::{self, Random};

/// No width of it but the largest is a multiple of eight heads or columns.
fn small() -> Qwen25VlConfig {
    let json = json!({
        "vocab_size": 40, "hidden_size": 112, "intermediate_size": 60, "num_hidden_layers": 3, "num_attention_heads": 14,
        "num_key_value_heads": 2, "rms_norm_eps": 1e-6, "rope_scaling": {"type": "mrope", "mrope_section": [1, 2, 1]},
        "image_token_id": 30, "vision_config": {
            "depth": 3, "hidden_size": 32, "intermediate_size": 42, "num_heads": 4, "in_chans": 3, "out_hidden_size": 112,
            "patch_size": 2, "spatial_merge_size": 2, "temporal_patch_size": 2, "window_size": 8, "fullatt_block_indexes": [1]
        }
    });
    serde_json::from_value(json).unwrap()
}

/// One layer and one block at the width of the published 7B model.
fn true_width() -> Qwen25VlConfig {
    let json = json!({
        "vocab_size": 64, "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 1, "num_attention_heads": 28,
        "num_key_value_heads": 4, "rms_norm_eps": 1e-6, "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
        "image_token_id": 30, "vision_config": {"depth": 1, "patch_size": 2, "window_size": 16}
    });
    serde_json::from_value(json).unwrap()
}

/// The names and shapes of the tensors, by transformers' names as the hub has them.
fn shapes(config: &Qwen25VlConfig) -> Vec<(String, Vec<usize>)> {
    let (d, inner, dh) = (config.hidden_size, config.intermediate_size, config.hidden_size / config.num_attention_heads);
    let kv = config.num_key_value_heads * dh;
    let mut shapes = vec![
        ("lm_head.weight".to_owned(), vec![config.vocab_size, d]),
        ("model.embed_tokens.weight".to_owned(), vec![config.vocab_size, d]),
        ("model.norm.weight".to_owned(), vec![d]),
    ];
    let mut add = |name: String, shape: &[usize]| shapes.push((name, shape.to_vec()));
    for layer in (0..config.num_hidden_layers).map(|i| format!("model.layers.{i}")) {
        for norm in ["input_layernorm", "post_attention_layernorm"] {
            add(format!("{layer}.{norm}.weight"), &[d]);
        }
        for (name, d_out) in [("q_proj", d), ("k_proj", kv), ("v_proj", kv)] {
            add(format!("{layer}.self_attn.{name}.weight"), &[d_out, d]);
            add(format!("{layer}.self_attn.{name}.bias"), &[d_out]);
        }
        add(format!("{layer}.self_attn.o_proj.weight"), &[d, d]);
        for (name, shape) in [("gate_proj", [inner, d]), ("up_proj", [inner, d]), ("down_proj", [d, inner])] {
            add(format!("{layer}.mlp.{name}.weight"), &shape);
        }
    }
    let vision = &config.vision;
    let (d, inner, unit) = (vision.hidden_size, vision.intermediate_size, vision.spatial_merge_size.pow(2));
    let patch = [vision.temporal_patch_size, vision.patch_size, vision.patch_size];
    add("visual.patch_embed.proj.weight".into(), &[d, vision.in_channels, patch[0], patch[1], patch[2]]);
    add("visual.merger.ln_q.weight".into(), &[d]);
    let mut linears = vec![
        ("visual.merger.mlp.0".to_owned(), [unit * d, unit * d]),
        ("visual.merger.mlp.2".to_owned(), [vision.out_hidden_size, unit * d]),
    ];
    for block in (0..vision.depth).map(|i| format!("visual.blocks.{i}")) {
        add(format!("{block}.norm1.weight"), &[d]);
        add(format!("{block}.norm2.weight"), &[d]);
        linears.extend([("attn.qkv", [3 * d, d]), ("attn.proj", [d, d])].map(|(name, shape)| (format!("{block}.{name}"), shape)));
        let mlp = [("gate_proj", [inner, d]), ("up_proj", [inner, d]), ("down_proj", [d, inner])];
        linears.extend(mlp.map(|(name, shape)| (format!("{block}.mlp.{name}"), shape)));
    }
    for (name, shape) in linears {
        add(format!("{name}.weight"), &shape);
        add(format!("{name}.bias"), &shape[..1]);
    }
    shapes
}

/// Layers keep about the variance of their input.
fn tensors(config: &Qwen25VlConfig, dtype: DType) -> HashMap<String, Tensor> {
    let mut random = Random::new(7);
    let mut tensor = |(name, shape): (String, Vec<usize>)| {
        let (center, spread) = match shape.as_slice() {
            _ if name.contains("embed_tokens") => (0.0, 1.0),
            [_, rest @ ..] if !rest.is_empty() => (0.0, (3.0 / rest.iter().product::<usize>() as f32).sqrt()),
            _ if name.ends_with("bias") => (0.0, 0.1),
            _ => (1.0, 0.2),
        };
        let tensor = random.tensor(&shape, center, spread).unwrap().to_dtype(dtype).unwrap();
        (name, tensor)
    };
    shapes(config).into_iter().map(&mut tensor).collect()
}

fn write(tensors: &HashMap<String, Tensor>) -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    synthetic::write(dir.path(), tensors).unwrap();
    dir
}

/// Two items: a picture of three windows in each row before a text that is padded, and a text with a small picture in it.
fn inputs(config: &Qwen25VlConfig) -> Tensors {
    let image = config.image_token_id;
    let first = [vec![3, 4], vec![image; 15], vec![5, 6, 7], vec![0; 4]].concat();
    let second = [(1..=20).collect(), vec![image; 1], vec![8, 9, 10]].concat();
    let mask: Vec<i64> = (0..48).map(|i| i64::from(!(20..24).contains(&i))).collect();
    let pixels = 3 * config.vision.temporal_patch_size * config.vision.patch_size.pow(2);
    Tensors::new()
        .with("input_ids", Tensor::from_vec([first, second].concat(), (2, 24), &Device::Cpu).unwrap())
        .with("attention_mask", Tensor::from_vec(mask, (2, 24), &Device::Cpu).unwrap())
        .with("pixel_values", Random::new(3).tensor(&[64, pixels], 0.0, 1.5).unwrap())
        .with("image_grid_thw", Tensor::new(&[[1i64, 6, 10], [1, 2, 2]], &Device::Cpu).unwrap())
}

fn run(dir: &Path, config: &Qwen25VlConfig, (tp, block_ranges): (usize, usize), inputs: &Tensors) -> Ran {
    let load = |w: &Weights, range: RangeOf| Qwen25VlModel::load(w, config, range);
    run_block_model(dir, Layout::new(tp, block_ranges), inputs, load).unwrap()
}

/// All elements, bit by bit.
fn bits(tensor: &Tensor) -> Vec<u32> {
    tensor.flatten_all().unwrap().to_vec1::<f32>().unwrap().into_iter().map(f32::to_bits).collect()
}

fn last(tensors: &Tensors) -> &Tensor {
    tensors.get("last_hidden_state").unwrap()
}

/// How much of a dimension of `size` rank `index` of `tp` has, when it is cut wherever the cut falls.
fn share(size: usize, index: usize, tp: usize) -> Range<usize> {
    index * size / tp..(index + 1) * size / tp
}

/// The heads that `share` touches.
fn touched(share: Range<usize>, width: usize) -> usize {
    share.end.div_ceil(width) - share.start / width
}

/// Elements of a tensor that rank `index` of `tp` reads.
fn read(name: &str, shape: &[usize], config: &Qwen25VlConfig, index: usize, tp: usize) -> usize {
    let vision = &config.vision;
    let dh = config.hidden_size / config.num_attention_heads;
    let elements: usize = shape.iter().product();
    let heads = touched(share(config.hidden_size, index, tp), dh);
    let kv = touched(share(config.hidden_size, index, tp), dh * config.num_attention_heads / config.num_key_value_heads);
    let eyes = touched(share(vision.hidden_size, index, tp), vision.hidden_size / vision.num_heads);
    let columns = |size: usize| elements / size * share(size, index, tp).len();
    match name {
        _ if name.contains("norm") || name.ends_with("ln_q.weight") => elements,
        _ if name.ends_with("down_proj.bias") || name.ends_with("attn.proj.bias") => elements,
        _ if name.ends_with("mlp.2.bias") => elements,
        _ if name.contains("q_proj") => elements / config.num_attention_heads * heads,
        _ if name.contains("k_proj") || name.contains("v_proj") => elements / config.num_key_value_heads * kv,
        _ if name.contains("qkv") => elements / vision.num_heads * eyes,
        _ if name.contains("visual") && name.contains("mlp.") && name.contains("_proj") => columns(vision.intermediate_size),
        _ if name.contains("mlp.") && name.contains("_proj") => columns(config.intermediate_size),
        _ => elements / tp,
    }
}

/// Whether a tensor belongs to the ranks of `range`.
fn is_held(name: &str, range: RangeOf, config: &Qwen25VlConfig) -> bool {
    match name.strip_prefix("model.layers.").and_then(|rest| rest.split('.').next()?.parse::<usize>().ok()) {
        Some(layer) => range.of(config.num_hidden_layers).contains(&layer),
        None if name == "model.norm.weight" => range.is_last(),
        None => range.is_first() && name != "lm_head.weight",
    }
}

#[test]
fn every_layout_computes_the_same_bits_and_every_rank_reads_its_share_alone() {
    let config = small();
    let tensors = tensors(&config, DType::F32);
    let dir = write(&tensors);
    let inputs = inputs(&config);
    let solo = run(dir.path(), &config, (1, 1), &inputs);
    let expected = bits(last(&solo.outputs[0]));
    for tp in [1, 2, 4, 8] {
        for block_ranges in [1, 2, 3] {
            let ran = run(dir.path(), &config, (tp, block_ranges), &inputs);
            assert_eq!(ran.outputs.len(), tp);
            assert!(ran.outputs.iter().all(|output| bits(last(output)) == expected), "tp {tp} x {block_ranges}");
            for (rank, bytes) in ran.bytes_read.iter().enumerate() {
                let range = RangeOf { index: rank / tp, count: block_ranges };
                let held = tensors.iter().filter(|(name, _)| is_held(name, range, &config));
                let share: usize = held.map(|(name, t)| read(name, t.dims(), &config, rank % tp, tp)).sum();
                assert_eq!(*bytes, 4 * share as u64, "rank {rank} of tp {tp} x {block_ranges}");
            }
        }
    }
}

#[test]
fn the_names_that_transformers_5_saves_are_the_same_model() {
    let config = small();
    let tensors = tensors(&config, DType::F32);
    let rename = |name: &String| match name.split_once('.') {
        Some(("model", rest)) => format!("model.language_model.{rest}"),
        Some(("visual", rest)) => format!("model.visual.{rest}"),
        _ => name.clone(),
    };
    let renamed = tensors.iter().map(|(name, tensor)| (rename(name), tensor.clone())).collect();
    let run = |tensors| run(write(tensors).path(), &config, (2, 2), &inputs(&config));
    assert_eq!(bits(last(&run(&tensors).outputs[0])), bits(last(&run(&renamed).outputs[0])));
}

#[test]
fn an_item_of_a_batch_is_what_it_is_alone() {
    let config = small();
    let dir = write(&tensors(&config, DType::F32));
    let both = inputs(&config);
    let together = run(dir.path(), &config, (2, 1), &both);
    for (item, patches) in [(0, 0..60), (1, 60..64)] {
        let alone = |(name, t): (&str, &Tensor)| {
            let (start, len) = if name == "pixel_values" { (patches.start, patches.len()) } else { (item, 1) };
            (name.to_owned(), t.narrow(0, start, len).unwrap())
        };
        let alone = run(dir.path(), &config, (2, 1), &both.iter().map(alone).collect());
        let expected = last(&together.outputs[0]).narrow(0, item, 1).unwrap();
        assert!(bits(last(&alone.outputs[0])) == bits(&expected), "item {item}");
    }
}

#[test]
fn padding_changes_nothing_before_it() {
    let config = small();
    let dir = write(&tensors(&config, DType::F32));
    let ids = |ids: &[u32]| Tensor::from_vec(ids.to_vec(), (1, ids.len()), &Device::Cpu).unwrap();
    let text = Tensors::new().with("input_ids", ids(&[1, 2, 3, 4, 5]));
    let padded =
        Tensors::new().with("input_ids", ids(&[1, 2, 3, 4, 5, 0, 0])).with("attention_mask", ids(&[1, 1, 1, 1, 1, 0, 0]));
    let run = |inputs| last(&run(dir.path(), &config, (1, 1), &inputs).outputs[0]).narrow(1, 0, 5).unwrap();
    assert_eq!(bits(&run(text)), bits(&run(padded)));
}

#[test]
fn at_the_published_width_the_bits_are_the_same_at_tp_1_2_and_8() {
    let config = true_width();
    let dir = write(&tensors(&config, DType::BF16));
    let inputs = inputs(&config);
    let expected = bits(last(&run(dir.path(), &config, (1, 1), &inputs).outputs[0]));
    assert!(expected.iter().all(|bits| f32::from_bits(*bits).is_finite()));
    for tp in [2, 8] {
        let ran = run(dir.path(), &config, (tp, 1), &inputs);
        assert!(ran.outputs.iter().all(|output| bits(last(output)) == expected), "tp {tp}");
    }
}
