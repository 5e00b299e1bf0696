//! However the PixArt, DiT and Hunyuan-DiT transformers are cut, they compute the same bits, and ranks read of split tensors their share alone.
#![allow(clippy::unwrap_used)] // clippy.toml allows it in tests, and takes only functions marked #[test] for tests

use std::path::Path;

use models::blocks::{BlockModel, Layout, RangeOf};
use models::dit_transformer::{DiTTransformer, DiTTransformerConfig};
use models::hunyuan_dit::{HunyuanDiT, HunyuanDiTConfig};
use models::pixart_transformer::{PixArtTransformer, PixArtTransformerConfig};
use models::{Error, Result};
use parallel::{DType, Device, Tensor, Tensors, Weights};
use serde_json::{Value, json};
use tempfile::TempDir;
use tests::ranks::{Ran, run_block_model};
use tests::synthetic::{self, dit};

/// One of the networks.
#[derive(Debug)]
enum Config {
    PixArt(PixArtTransformerConfig),
    DiT(DiTTransformerConfig),
    Hunyuan(HunyuanDiTConfig),
}

/// Any of them, on one rank.
struct Model(Box<dyn BlockModel>);

impl BlockModel for Model {
    fn embed(&self, inputs: &Tensors) -> Result<Tensors> {
        self.0.embed(inputs)
    }

    fn blocks(&self, hidden: Tensors) -> Result<Tensors> {
        self.0.blocks(hidden)
    }

    fn output(&self, hidden: Tensors) -> Result<Tensors> {
        self.0.output(hidden)
    }
}

/// The first range of one, whose output is the hidden states.
struct FirstRange(Model);

impl BlockModel for FirstRange {
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

fn pixart(json: Value) -> Config {
    Config::PixArt(serde_json::from_value(json).unwrap())
}

fn hunyuan(json: Value) -> Config {
    Config::Hunyuan(serde_json::from_value(json).unwrap())
}

/// PixArt with and without the picture's size and with texts as they are, DiT, and both versions of Hunyuan-DiT, whose feed-forward part has a width
/// that nothing divides.
fn small() -> [Config; 5] {
    let pixart_small = |sample_size: usize, caption_channels: Option<usize>, text: usize| {
        pixart(json!({ "sample_size": sample_size, "num_layers": 3, "num_attention_heads": 8, "attention_head_dim": 6,
            "caption_channels": caption_channels, "cross_attention_dim": text }))
    };
    let hunyuan_small = |style: bool| {
        hunyuan(json!({ "num_layers": 6, "num_attention_heads": 8, "attention_head_dim": 8, "hidden_size": 64,
            "mlp_ratio": 4.3637, "cross_attention_dim": 24, "cross_attention_dim_t5": 32, "pooled_projection_dim": 16,
            "text_len": 5, "text_len_t5": 9, "use_style_cond_and_image_meta_size": style }))
    };
    let dit = json!({ "sample_size": 8, "num_layers": 3, "num_attention_heads": 8, "attention_head_dim": 6, "out_channels": 8,
        "num_embeds_ada_norm": 10 });
    [
        pixart_small(128, Some(40), 48),
        pixart_small(64, None, 40),
        Config::DiT(serde_json::from_value(dit).unwrap()),
        hunyuan_small(true),
        hunyuan_small(false),
    ]
}

/// PixArt XL, DiT XL/2, Hunyuan-DiT 1.1; or as many of their blocks.
fn published(blocks: Option<usize>) -> [Config; 3] {
    let dit = json!({ "out_channels": 8, "num_layers": blocks.unwrap_or(28) });
    [
        pixart(json!({ "caption_channels": 4096, "num_layers": blocks.unwrap_or(28) })),
        Config::DiT(serde_json::from_value(dit).unwrap()),
        hunyuan(json!({ "num_layers": blocks.unwrap_or(40), "hidden_size": 1408, "mlp_ratio": 4.3637 })),
    ]
}

impl Config {
    fn shapes(&self) -> dit::Shapes {
        match self {
            Self::PixArt(config) => dit::pixart_shapes(config),
            Self::DiT(config) => dit::dit_shapes(config),
            Self::Hunyuan(config) => dit::hunyuan_shapes(config),
        }
    }

    fn inputs(&self, batch: usize) -> Tensors {
        match self {
            Self::PixArt(config) => dit::pixart_inputs(config, batch, [10, 6], 2).unwrap(),
            Self::DiT(config) => dit::dit_inputs(config, batch, 8, 2).unwrap(),
            Self::Hunyuan(config) => dit::hunyuan_inputs(config, batch, [10, 6], 2).unwrap(),
        }
    }

    /// Whether a tensor belongs to the first range, of two that have a block each.
    fn is_of_first_range(name: &str) -> bool {
        let second = ["transformer_blocks.1.", "blocks.1.", "proj_out", "norm_out", "scale_shift_table"];
        !second.iter().any(|prefix| name.starts_with(prefix))
    }

    fn load(&self, w: &Weights, range: RangeOf) -> Result<Model> {
        Ok(Model(match self {
            Self::PixArt(config) => Box::new(PixArtTransformer::load(w, config, range)?),
            Self::DiT(config) => Box::new(DiTTransformer::load(w, config, range)?),
            Self::Hunyuan(config) => Box::new(HunyuanDiT::load(w, config, range)?),
        }))
    }

    /// Blocks in bf16, the rest in f32, as a checkpoint may mix them.
    fn write(&self) -> TempDir {
        let mut tensors = dit::transformer(self.shapes(), 1).unwrap();
        for (name, tensor) in &mut tensors {
            if name.contains("blocks") {
                *tensor = tensor.to_dtype(DType::BF16).unwrap();
            }
        }
        let dir = tempfile::tempdir().unwrap();
        synthetic::write(dir.path(), &tensors).unwrap();
        dir
    }

    fn run(&self, dir: &Path, (tp, block_ranges): (usize, usize), inputs: &Tensors) -> Result<Ran> {
        run_block_model(dir, Layout::new(tp, block_ranges), inputs, |w: &Weights, range: RangeOf| self.load(w, range))
    }

    /// What stays whole on every rank of a range.
    fn is_replicated(&self, name: &str) -> bool {
        let starts = |prefixes: &[&str]| prefixes.iter().any(|prefix| name.starts_with(prefix));
        let whole = match self {
            Self::PixArt(_) => starts(&["adaln_single.emb", "proj_out", "scale_shift_table"]),
            Self::DiT(_) => starts(&["proj_out_2"]),
            Self::Hunyuan(_) => starts(&[
                "proj_out",
                "text_embedding_padding",
                "time_extra_emb.timestep_embedder",
                "time_extra_emb.style_embedder",
                "time_extra_emb.pooler.positional_embedding",
                "time_extra_emb.pooler.c_proj.bias",
            ]),
        };
        let norm = [".norm2.", ".norm3.", "norm1.norm.", "norm_q", "norm_k", "skip_norm"].iter().any(|part| name.contains(part));
        let after_sum = ["to_out.0.bias", "net.2.bias", "linear_2.bias"].iter().any(|end| name.ends_with(end));
        whole || norm || after_sum || name.ends_with("scale_shift_table")
    }
}

/// All elements, bit by bit.
fn bits(tensor: &Tensor) -> Vec<u32> {
    tensor.flatten_all().unwrap().to_vec1::<f32>().unwrap().into_iter().map(f32::to_bits).collect()
}

#[test]
fn every_layout_computes_the_same_bits_and_split_tensors_are_read_once_over_all_ranks() {
    for config in small() {
        let (dir, inputs) = (config.write(), config.inputs(2));
        let solo = config.run(dir.path(), (1, 1), &inputs).unwrap();
        let expected = solo.output("sample").unwrap();
        assert_eq!(expected.dims()[..2], [2, 8]);
        let bytes = |(name, shape): &(String, Vec<usize>)| {
            let size = if name.contains("blocks") { 2 } else { 4 };
            (shape.iter().product::<usize>() * size) as u64
        };
        let shapes = config.shapes();
        let total: u64 = shapes.iter().map(bytes).sum();
        let replicated: u64 = shapes.iter().filter(|(name, _)| config.is_replicated(name)).map(bytes).sum();
        assert_eq!((solo.total_bytes, &solo.bytes_read), (total, &vec![total]));
        for tp in [1, 2, 4, 8] {
            for block_ranges in [1, 2, 3, 7] {
                let ran = config.run(dir.path(), (tp, block_ranges), &inputs).unwrap();
                assert_eq!(ran.outputs.len(), tp);
                for output in &ran.outputs {
                    assert!(bits(output.get("sample").unwrap()) == bits(expected), "tp {tp} x {block_ranges}, {config:?}");
                }
                let read: u64 = ran.bytes_read.iter().sum();
                assert_eq!(read, total + (tp as u64 - 1) * replicated, "tp {tp} x {block_ranges}, {config:?}");
            }
        }
    }
}

#[test]
fn less_than_one_percent_of_the_published_networks_is_replicated() {
    for config in published(None) {
        let count = |wanted: &dyn Fn(&str) -> bool| -> usize {
            let shapes = config.shapes().into_iter().filter(|(name, _)| wanted(name));
            shapes.map(|(_, shape)| shape.iter().product::<usize>()).sum()
        };
        let (replicated, parameters) = (count(&|name| config.is_replicated(name)), count(&|_| true));
        assert!(replicated * 100 < parameters, "{replicated} of {parameters}, {config:?}");
    }
}

#[test]
fn an_item_of_a_batch_is_what_it_is_alone() {
    for config in small() {
        let (dir, both) = (config.write(), config.inputs(2));
        let together = config.run(dir.path(), (2, 2), &both).unwrap();
        for item in 0..2 {
            let alone = |(name, t): (&str, &Tensor)| {
                let shared = name.starts_with("image_rotary_emb");
                (name.to_owned(), if shared { t.clone() } else { t.narrow(0, item, 1).unwrap() })
            };
            let alone = config.run(dir.path(), (2, 2), &both.iter().map(alone).collect()).unwrap();
            let expected = together.output("sample").unwrap().narrow(0, item, 1).unwrap();
            assert!(bits(alone.output("sample").unwrap()) == bits(&expected), "item {item}, {config:?}");
        }
    }
}

#[test]
fn every_input_has_a_say() {
    for config in small() {
        let (dir, all) = (config.write(), config.inputs(1));
        let expected = bits(config.run(dir.path(), (1, 1), &all).unwrap().output("sample").unwrap());
        // There is one style.
        for (name, tensor) in all.iter().filter(|(name, _)| *name != "style") {
            let other = match (name, tensor.dtype()) {
                (_, DType::U32) => tensor.zeros_like().unwrap(),
                (name, _) if name.contains("mask") => (tensor * 0.0).unwrap(),
                _ => (tensor * 0.5).unwrap(),
            };
            let changed = all.clone().with(name, other);
            let changed = config.run(dir.path(), (1, 1), &changed).unwrap();
            assert!(bits(changed.output("sample").unwrap()) != expected, "{name}, {config:?}");
        }
    }
}

#[test]
fn what_does_not_fit_is_named_on_every_layout() {
    let zeros = |dims: &[usize]| Tensor::zeros(dims, DType::F32, &Device::Cpu).unwrap();
    for config in small() {
        let (dir, good) = (config.write(), config.inputs(1));
        let mut bad = vec![("hidden_states", "hidden_states", zeros(&[1, 4, 9, 9]))];
        match &config {
            Config::PixArt(_) => {}
            // Taken for a square by the reference.
            Config::DiT(_) => bad.push(("hidden_states", "hidden_states", zeros(&[1, 4, 8, 6]))),
            Config::Hunyuan(_) => {
                bad.push(("image_rotary_emb.0", "image_rotary_emb", zeros(&[15, 4])));
                bad.push(("encoder_hidden_states_t5", "encoder_hidden_states_t5", zeros(&[1, 8, 32])));
                bad.push(("encoder_hidden_states", "encoder_hidden_states", zeros(&[1, 6, 24])));
            }
        }
        for (name, field, tensor) in bad {
            let mut inputs = good.clone().with(name, tensor);
            if field == "encoder_hidden_states" {
                inputs.insert("text_embedding_mask", zeros(&[1, 6]));
            }
            for layout in [(1, 1), (2, 1), (1, 2)] {
                match config.run(dir.path(), layout, &inputs) {
                    Err(Error::Invalid { field: found, .. }) => assert_eq!(found, field),
                    other => panic!("{name}: {other:?}"),
                }
            }
        }
        let mut inputs = good;
        inputs.take("timestep").unwrap();
        match config.run(dir.path(), (2, 2), &inputs) {
            Err(Error::Parallel(parallel::Error::MissingInput { name })) => assert_eq!(name, "timestep"),
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn a_degree_that_does_not_divide_the_heads_is_a_typed_error() {
    let config = pixart(json!({ "num_attention_heads": 6, "attention_head_dim": 8, "cross_attention_dim": 48 }));
    let dir = tempfile::tempdir().unwrap();
    synthetic::write(dir.path(), &Default::default()).unwrap();
    match config.run(dir.path(), (4, 1), &Tensors::new()) {
        Err(Error::Parallel(parallel::Error::Indivisible { what, size: 6, tp: 4 })) => assert_eq!(what, "num_attention_heads"),
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_block_of_the_published_width_computes_the_same_bits_at_every_tp() {
    for config in published(Some(2)) {
        let shapes = config.shapes().into_iter().filter(|(name, _)| Config::is_of_first_range(name)).collect();
        let mut tensors = dit::transformer(shapes, 5).unwrap();
        tensors.values_mut().for_each(|t| *t = t.to_dtype(DType::BF16).unwrap());
        let dir = tempfile::tempdir().unwrap();
        synthetic::write(dir.path(), &tensors).unwrap();
        drop(tensors);
        let inputs = config.inputs(1);
        let load = |w: &Weights, _: RangeOf| Ok(FirstRange(config.load(w, RangeOf { index: 0, count: 2 })?));
        let run = |tp| run_block_model(dir.path(), Layout::new(tp, 1), &inputs, load).unwrap();
        let solo = run(1);
        for tp in [2, 4, 8] {
            for output in &run(tp).outputs {
                for (name, expected) in solo.outputs[0].iter().filter(|(_, t)| t.dtype() == DType::F32) {
                    assert!(bits(output.get(name).unwrap()) == bits(expected), "{name} at tp {tp}, {config:?}");
                }
            }
        }
    }
}
