//! However the U-Nets of Stable Diffusion 1 and XL are cut, they compute the same bits, and every rank reads its share alone.
#![allow(clippy::unwrap_used)] // clippy.toml allows it in tests, and takes only functions marked #[test] for tests

use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;

use models::blocks::{BlockModel, Layout, RangeOf};
use models::unet_2d_condition::{OneOrMany, UNet2DConditionConfig, UNet2DConditionModel};
use models::{Error, Result};
use parallel::lora::{Activated, Factors};
use parallel::ops::Products;
use parallel::{DType, Device, Solo, Tensor, Tensors, Weights};
use tempfile::TempDir;
use tests::ranks::{Ran, run_block_model};
use tests::synthetic::unet_2d_condition::{self as synthetic, sd15, sdxl};
use tests::synthetic::{self as checkpoints, Random};

/// Of each family a network that eight ranks can divide.
fn small() -> [UNet2DConditionConfig; 2] {
    let sd15 = UNet2DConditionConfig {
        block_out_channels: vec![16, 32, 32, 32],
        layers_per_block: 1,
        cross_attention_dim: OneOrMany::One(24),
        norm_num_groups: 8,
        ..sd15()
    };
    let sdxl = UNet2DConditionConfig {
        block_out_channels: vec![16, 32, 64],
        attention_head_dim: OneOrMany::Many(vec![1, 8, 16]),
        transformer_layers_per_block: OneOrMany::Many(vec![1, 1, 2]),
        cross_attention_dim: OneOrMany::One(40),
        norm_num_groups: 8,
        addition_time_embed_dim: Some(8),
        projection_class_embeddings_input_dim: Some(72),
        ..sdxl()
    };
    [sd15, sdxl]
}

/// In bf16, but for norms and biases, as checkpoints are.
fn write(config: &UNet2DConditionConfig) -> (TempDir, HashMap<String, Tensor>) {
    let mut tensors = synthetic::unet(config, 1).unwrap();
    for tensor in tensors.values_mut().filter(|tensor| tensor.rank() > 1) {
        *tensor = tensor.to_dtype(DType::BF16).unwrap();
    }
    let dir = tempfile::tempdir().unwrap();
    checkpoints::write(dir.path(), &tensors).unwrap();
    (dir, tensors)
}

/// With residuals of a ControlNet and features of a T2I-Adapter.
fn inputs(config: &UNet2DConditionConfig, batch: usize) -> Tensors {
    let size = [16, 8];
    let mut inputs = synthetic::inputs(config, batch, size, 7, 2).unwrap();
    let mut random = Random::new(3);
    let mut add = |name: String, channels: usize, halvings: usize| {
        let shape = [batch, channels, size[0] >> halvings, size[1] >> halvings];
        inputs.insert(name, random.tensor(&shape, 0.0, 0.5).unwrap());
    };
    let (widths, n) = (&config.block_out_channels, config.resolutions());
    let mut skips = vec![(widths[0], 0)];
    for (at, width) in widths.iter().enumerate() {
        skips.extend(std::iter::repeat_n((*width, at), config.layers_per_block));
        skips.extend((at + 1 < n).then_some((*width, at + 1)));
    }
    for (i, (channels, halvings)) in skips.into_iter().enumerate() {
        add(format!("down_block_additional_residuals.{i}"), channels, halvings);
    }
    add("mid_block_additional_residual".into(), widths[n - 1], n - 1);
    for (at, width) in widths.iter().enumerate() {
        use models::unet_2d_condition::DownBlockType::DownBlock2D;
        // Of a block without attention they are added after it is halved.
        let halved = usize::from(config.down_block_types[at] == DownBlock2D && at + 1 < n);
        add(format!("down_intrablock_additional_residuals.{at}"), *width, at + halved);
    }
    inputs
}

fn run(dir: &Path, config: &UNet2DConditionConfig, tp: usize, block_ranges: usize, inputs: &Tensors) -> Result<Ran> {
    let load = |w: &Weights, range: RangeOf| UNet2DConditionModel::load(w, config, range);
    run_block_model(dir, Layout::new(tp, block_ranges), inputs, load)
}

/// All elements, bit by bit.
fn bits(tensor: &Tensor) -> Vec<u32> {
    tensor.flatten_all().unwrap().to_vec1::<f32>().unwrap().into_iter().map(f32::to_bits).collect()
}

/// What stays whole on every rank of a range: the first and the last convolution, embedders, norms but the one between two
/// convolutions, and the biases added after a sum.
fn is_replicated(name: &str) -> bool {
    let whole = ["conv_in.", "conv_out.", "conv_norm_out.", "time_embedding.", "add_embedding."];
    let norm = ["norm1.", "norm3.", ".norm."].iter().any(|norm| name.contains(norm));
    // Of a transformer block's three norms, one is named as a residual block's that is cut.
    let in_transformer = name.contains("transformer_blocks") && name.contains("norm2.");
    let after_sum = ["to_out.0.bias", "net.2.bias"].iter().any(|b| name.ends_with(b));
    whole.iter().any(|p| name.starts_with(p)) || norm || in_transformer || after_sum
}

/// Whether a tensor belongs to the ranks of `range`.
fn is_held(name: &str, range: RangeOf, config: &UNet2DConditionConfig) -> bool {
    let n = config.resolutions();
    let of = |kind: &str, before: usize| {
        name.strip_prefix(kind).and_then(|name| name.split('.').next()?.parse::<usize>().ok()).map(|i| before + i)
    };
    let index = of("down_blocks.", 0).or(name.starts_with("mid_block").then_some(n)).or_else(|| of("up_blocks.", n + 1));
    match index {
        Some(i) => range.of(config.blocks()).contains(&i),
        None if name.starts_with("conv_norm_out") || name.starts_with("conv_out") => range.is_last(),
        None => range.is_first(),
    }
}

#[test]
fn u_nets_compute_the_same_bits_at_every_layout_and_every_rank_reads_its_share_alone() {
    for config in small() {
        let (dir, tensors) = write(&config);
        let inputs = inputs(&config, 2);
        let solo = run(dir.path(), &config, 1, 1, &inputs).unwrap();
        let expected = solo.output("sample").unwrap();
        assert_eq!(expected.dims(), [2, 4, 16, 8]);
        let bytes = |t: &Tensor| (t.elem_count() * t.dtype().size_in_bytes()) as u64;
        let total: u64 = tensors.values().map(bytes).sum();
        assert_eq!((solo.total_bytes, &solo.bytes_read), (total, &vec![total]));
        for tp in [1, 2, 4, 8] {
            for block_ranges in [1, 2, 3, 7] {
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
            }
        }
    }
}

#[test]
fn products_in_bf16_have_the_same_bits_at_every_layout() {
    for config in small() {
        let (dir, _) = write(&config);
        let inputs = inputs(&config, 1);
        for products in [Products::Bf16, Products::Amx] {
            products.scope(|| {
                let solo = run(dir.path(), &config, 1, 1, &inputs).unwrap();
                for (tp, block_ranges) in [(2, 1), (4, 2), (8, 3)] {
                    let ran = run(dir.path(), &config, tp, block_ranges, &inputs).unwrap();
                    let (got, expected) = (ran.output("sample").unwrap(), solo.output("sample").unwrap());
                    assert!(bits(got) == bits(expected), "{products} at tp {tp} x {block_ranges}");
                }
            });
        }
    }
}

/// A network, and the adapters on what it is given.
struct Adapted {
    network: UNet2DConditionModel,
    _active: Activated,
}

impl BlockModel for Adapted {
    fn embed(&self, inputs: &Tensors) -> Result<Tensors> {
        self.network.embed(inputs)
    }

    fn blocks(&self, hidden: Tensors) -> Result<Tensors> {
        self.network.blocks(hidden)
    }

    fn output(&self, hidden: Tensors) -> Result<Tensors> {
        self.network.output(hidden)
    }
}

#[test]
fn adapters_on_every_layer_give_the_same_bits_at_every_layout_and_leave_other_items_alone() {
    for config in small() {
        let (dir, tensors) = write(&config);
        let w = Weights::open(dir.path(), Arc::new(Solo), DType::F32, &Device::Cpu).unwrap().measuring();
        UNet2DConditionModel::load(&w, &config, RangeOf::WHOLE).unwrap();
        let sites = w.adapters().sites();
        assert_eq!(sites.len(), tensors.values().filter(|tensor| tensor.rank() > 1).count(), "every layer is a site");
        let mut random = Random::new(5);
        let factors = sites.into_iter().map(|site| {
            let (a, b) = (random.tensor(&[2, site.width()], 0.0, 0.1)?, random.tensor(&[site.d_out, 2], 0.0, 0.1)?);
            Ok(Factors { site: site.name, a, b, factor: 1.0 })
        });
        let factors: Vec<Factors> = factors.collect::<candle_core::Result<_>>().unwrap();
        let inputs = inputs(&config, 2);
        let adapted = |tp: usize, block_ranges: usize, scale: f64| {
            let load = |w: &Weights, range: RangeOf| {
                let network = UNet2DConditionModel::load(w, &config, range)?;
                let adapter = Arc::new(w.adapters().adapter::<parallel::Error>(factors.iter().cloned().map(Ok))?);
                let _active = w.adapters().activate(vec![(1, vec![(adapter, scale)]), (1, vec![])]);
                Ok(Adapted { network, _active })
            };
            let ran = run_block_model(dir.path(), Layout::new(tp, block_ranges), &inputs, load).unwrap();
            ran.output("sample").unwrap().clone()
        };
        let item = |x: &Tensor, i: usize| bits(&x.narrow(0, i, 1).unwrap());
        let plain = run(dir.path(), &config, 1, 1, &inputs).unwrap().output("sample").unwrap().clone();
        let expected = adapted(1, 1, 1.0);
        assert!(item(&expected, 0) != item(&plain, 0) && item(&expected, 1) == item(&plain, 1));
        assert!(item(&expected, 0) != item(&adapted(1, 1, 0.5), 0));
        for (tp, block_ranges) in [(1, 3), (2, 1), (4, 2), (8, 1)] {
            assert!(bits(&adapted(tp, block_ranges, 1.0)) == bits(&expected), "tp {tp} x {block_ranges}");
        }
    }
}

#[test]
fn little_of_the_published_networks_is_replicated() {
    for (config, parameters) in [(sd15(), 859_520_964), (sdxl(), 2_567_463_684)] {
        let count = |wanted: &dyn Fn(&str) -> bool| -> usize {
            let shapes = synthetic::shapes(&config).into_iter().filter(|(name, _)| wanted(name));
            shapes.map(|(_, shape)| shape.iter().product::<usize>()).sum()
        };
        assert_eq!(count(&|_| true), parameters, "the published checkpoint's parameters");
        let replicated = count(&is_replicated);
        assert!(replicated * 100 < parameters, "{replicated} of {parameters}");
    }
}

#[test]
fn an_item_of_a_batch_is_what_it_is_alone() {
    for config in small() {
        let (dir, _) = write(&config);
        let both = inputs(&config, 2);
        let together = run(dir.path(), &config, 2, 2, &both).unwrap();
        for item in 0..2 {
            let alone: Tensors = both.iter().map(|(name, t)| (name.to_owned(), t.narrow(0, item, 1).unwrap())).collect();
            let alone = run(dir.path(), &config, 2, 2, &alone).unwrap();
            let expected = together.output("sample").unwrap().narrow(0, item, 1).unwrap();
            assert!(bits(alone.output("sample").unwrap()) == bits(&expected), "item {item}");
        }
    }
}

#[test]
fn every_input_has_a_say() {
    for config in small() {
        let (dir, _) = write(&config);
        let all = inputs(&config, 1);
        let expected = bits(run(dir.path(), &config, 1, 1, &all).unwrap().output("sample").unwrap());
        for (name, tensor) in all.iter() {
            let changed = all.clone().with(name, (tensor * 0.5).unwrap());
            assert!(bits(run(dir.path(), &config, 1, 1, &changed).unwrap().output("sample").unwrap()) != expected, "{name}");
        }
    }
}

#[test]
fn what_does_not_fit_is_named_on_every_layout() {
    let [config, _] = small();
    let (dir, _) = write(&config);
    let mut good = inputs(&config, 1);
    let odd = good.clone().with("sample", Tensor::zeros((1, 4, 16, 12), DType::F32, &Device::Cpu).unwrap());
    let mut few = good.clone();
    few.take("down_block_additional_residuals.6").unwrap();
    for (tp, block_ranges) in [(1, 1), (2, 1), (1, 2)] {
        for (name, inputs) in [("sample", &odd), ("down_block_additional_residuals", &few)] {
            match run(dir.path(), &config, tp, block_ranges, inputs) {
                Err(Error::Invalid { field, .. }) => assert_eq!(field, name),
                // From another range comes what went wrong there, in words.
                Err(Error::Rank { reason }) => assert!(reason.contains(name), "{reason}"),
                other => panic!("{name}: {other:?}"),
            }
        }
    }
    good.take("timestep").unwrap();
    match run(dir.path(), &config, 2, 2, &good) {
        Err(Error::Parallel(parallel::Error::MissingInput { name })) => assert_eq!(name, "timestep"),
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_degree_that_does_not_divide_the_heads_is_a_typed_error() {
    let dir = tempfile::tempdir().unwrap();
    checkpoints::write(dir.path(), &HashMap::new()).unwrap();
    match run(dir.path(), &sdxl(), 4, 1, &Tensors::new()) {
        Err(Error::Parallel(parallel::Error::Indivisible { what, size: 2, tp: 4 })) => {
            assert!(what.contains("attention_head_dim"))
        }
        other => panic!("{other:?}"),
    }
}
