//! Checkpoints of random weights, so that a test needs no download. Names and shapes are written down here once more, from
//! the reference, not taken from the loader under test.

use std::collections::HashMap;
use std::path::Path;

use candle_core::{DType, Device, Result, Tensor};
use models::flux_transformer::FluxTransformerConfig;
use models::sd3_transformer::Sd3TransformerConfig;

pub mod dit;
pub mod qwen_image;
pub mod unet_2d_condition;

/// A small generator (SplitMix64) whose numbers depend on nothing but the seed.
#[derive(Debug)]
pub struct Random(u64);

impl Random {
    /// Starts at `seed`.
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// Uniform in -1..1.
    pub fn uniform(&mut self) -> f32 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) >> 40) as f32 / (1u32 << 23) as f32 - 1.0
    }

    /// A tensor of numbers in `center - spread .. center + spread`.
    pub fn tensor(&mut self, shape: &[usize], center: f32, spread: f32) -> Result<Tensor> {
        let data: Vec<f32> = (0..shape.iter().product()).map(|_| center + spread * self.uniform()).collect();
        Tensor::from_vec(data, shape, &Device::Cpu)
    }
}

/// A FLUX.1 transformer that eight ranks can divide, of one block with two streams and `singles` with one.
pub fn small_flux(singles: usize) -> FluxTransformerConfig {
    FluxTransformerConfig {
        in_channels: 32,
        num_layers: 1,
        num_single_layers: singles,
        attention_head_dim: 32,
        num_attention_heads: 8,
        joint_attention_dim: 64,
        pooled_projection_dim: 32,
        guidance_embeds: true,
        axes_dims_rope: vec![8, 12, 12],
        ..FluxTransformerConfig::default()
    }
}

/// The names and shapes of a FLUX.1 transformer's tensors, by diffusers' names.
pub fn flux_shapes(config: &FluxTransformerConfig) -> Vec<(String, Vec<usize>)> {
    let (d, dh) = (config.inner_dim(), config.attention_head_dim);
    let mut linears = vec![
        ("x_embedder".to_owned(), config.in_channels, d),
        ("context_embedder".to_owned(), config.joint_attention_dim, d),
        ("norm_out.linear".to_owned(), d, 2 * d),
        ("proj_out".to_owned(), d, config.out_channels.unwrap_or(config.in_channels)),
    ];
    let mut norms = Vec::new();
    let embedders = [("timestep_embedder", 256), ("guidance_embedder", 256), ("text_embedder", config.pooled_projection_dim)];
    for (name, d_in) in embedders.into_iter().filter(|(name, _)| config.guidance_embeds || *name != "guidance_embedder") {
        linears.push((format!("time_text_embed.{name}.linear_1"), d_in, d));
        linears.push((format!("time_text_embed.{name}.linear_2"), d, d));
    }
    for block in (0..config.num_layers).map(|i| format!("transformer_blocks.{i}")) {
        linears.extend(["norm1", "norm1_context"].map(|name| (format!("{block}.{name}.linear"), d, 6 * d)));
        let projections = ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"];
        linears.extend(projections.map(|name| (format!("{block}.attn.{name}"), d, d)));
        norms.extend(["norm_q", "norm_k", "norm_added_q", "norm_added_k"].map(|name| format!("{block}.attn.{name}")));
        for ff in ["ff", "ff_context"] {
            linears.push((format!("{block}.{ff}.net.0.proj"), d, 4 * d));
            linears.push((format!("{block}.{ff}.net.2"), 4 * d, d));
        }
    }
    for block in (0..config.num_single_layers).map(|i| format!("single_transformer_blocks.{i}")) {
        linears.extend(["to_q", "to_k", "to_v"].map(|name| (format!("{block}.attn.{name}"), d, d)));
        norms.extend(["norm_q", "norm_k"].map(|name| format!("{block}.attn.{name}")));
        linears.push((format!("{block}.norm.linear"), d, 3 * d));
        linears.push((format!("{block}.proj_mlp"), d, 4 * d));
        linears.push((format!("{block}.proj_out"), 5 * d, d));
    }
    let norms = norms.into_iter().map(|name| (format!("{name}.weight"), vec![dh]));
    linears.into_iter().flat_map(weight_and_bias).chain(norms).collect()
}

/// The two tensors of a linear layer.
fn weight_and_bias((name, d_in, d_out): (String, usize, usize)) -> [(String, Vec<usize>); 2] {
    [(format!("{name}.weight"), vec![d_out, d_in]), (format!("{name}.bias"), vec![d_out])]
}

/// A FLUX.1 transformer's tensors, f32.
pub fn flux_transformer(config: &FluxTransformerConfig, seed: u64) -> Result<HashMap<String, Tensor>> {
    of_shapes(flux_shapes(config), seed)
}

/// Tensors of these names and shapes, f32. Layers keep the variance of their input.
fn of_shapes(shapes: Vec<(String, Vec<usize>)>, seed: u64) -> Result<HashMap<String, Tensor>> {
    let mut random = Random::new(seed);
    let tensors = shapes.into_iter().map(|(name, shape)| {
        let (center, spread) = match shape.as_slice() {
            [_, d_in, window @ ..] if !name.ends_with("pos_embed.pos_embed") => {
                (0.0, (3.0 / (*d_in * window.iter().product::<usize>()) as f32).sqrt())
            }
            [_] if name.ends_with("bias") => (0.0, 0.1),
            [_] => (1.0, 0.2),
            _ => (0.0, 1.0),
        };
        Ok((name, random.tensor(&shape, center, spread)?))
    });
    tensors.collect()
}

/// The names and shapes of a Stable Diffusion 3 transformer's tensors, by diffusers' names.
pub fn sd3_shapes(config: &Sd3TransformerConfig) -> Vec<(String, Vec<usize>)> {
    let (d, dh, p) = (config.inner_dim(), config.attention_head_dim, config.patch_size);
    let out_channels = config.out_channels.unwrap_or(config.in_channels);
    let mut linears = vec![
        ("context_embedder".to_owned(), config.joint_attention_dim, d),
        ("norm_out.linear".to_owned(), d, 2 * d),
        ("proj_out".to_owned(), d, p * p * out_channels),
    ];
    for (name, d_in) in [("timestep_embedder", 256), ("text_embedder", config.pooled_projection_dim)] {
        linears.push((format!("time_text_embed.{name}.linear_1"), d_in, d));
        linears.push((format!("time_text_embed.{name}.linear_2"), d, d));
    }
    let mut norms = Vec::new();
    for index in 0..config.num_layers {
        let block = format!("transformer_blocks.{index}");
        let (last, dual) = (index + 1 == config.num_layers, config.dual_attention_layers.contains(&index));
        linears.push((format!("{block}.norm1.linear"), d, if dual { 9 * d } else { 6 * d }));
        linears.push((format!("{block}.norm1_context.linear"), d, if last { 2 * d } else { 6 * d }));
        let projections = ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj"];
        linears.extend(projections.map(|name| (format!("{block}.attn.{name}"), d, d)));
        norms.extend(["norm_q", "norm_k", "norm_added_q", "norm_added_k"].map(|name| format!("{block}.attn.{name}")));
        if dual {
            linears.extend(["to_q", "to_k", "to_v", "to_out.0"].map(|name| (format!("{block}.attn2.{name}"), d, d)));
            norms.extend(["norm_q", "norm_k"].map(|name| format!("{block}.attn2.{name}")));
        }
        if !last {
            linears.push((format!("{block}.attn.to_add_out"), d, d));
        }
        for ff in if last { vec!["ff"] } else { vec!["ff", "ff_context"] } {
            linears.push((format!("{block}.{ff}.net.0.proj"), d, 4 * d));
            linears.push((format!("{block}.{ff}.net.2"), 4 * d, d));
        }
    }
    let weight_and_bias = |(name, d_in, d_out): (String, usize, usize)| {
        [(format!("{name}.weight"), vec![d_out, d_in]), (format!("{name}.bias"), vec![d_out])]
    };
    let norms = norms.into_iter().filter(|_| config.qk_norm.is_some()).map(|name| (format!("{name}.weight"), vec![dh]));
    let patch_embed = [
        ("pos_embed.proj.weight".to_owned(), vec![d, config.in_channels, p, p]),
        ("pos_embed.proj.bias".to_owned(), vec![d]),
        ("pos_embed.pos_embed".to_owned(), vec![1, config.pos_embed_max_size * config.pos_embed_max_size, d]),
    ];
    linears.into_iter().flat_map(weight_and_bias).chain(norms).chain(patch_embed).collect()
}

/// Those of a Stable Diffusion 3 transformer's tensors that `is_wanted`, f32.
pub fn sd3_transformer(
    config: &Sd3TransformerConfig,
    seed: u64,
    is_wanted: impl Fn(&str) -> bool,
) -> Result<HashMap<String, Tensor>> {
    of_shapes(sd3_shapes(config).into_iter().filter(|(name, _)| is_wanted(name)).collect(), seed)
}

/// A Stable Diffusion 3 transformer's inputs by diffusers' names: `grid` image tokens, `l_txt` text tokens.
pub fn sd3_inputs(
    config: &Sd3TransformerConfig,
    batch: usize,
    (rows, columns): (usize, usize),
    l_txt: usize,
    seed: u64,
) -> Result<parallel::Tensors> {
    let mut random = Random::new(seed);
    let timestep: Vec<f32> = (0..batch).map(|i| 750.0 / (i + 1) as f32).collect();
    let latents = [batch, config.in_channels, rows * config.patch_size, columns * config.patch_size];
    Ok(parallel::Tensors::new()
        .with("hidden_states", random.tensor(&latents, 0.0, 1.5)?)
        .with("encoder_hidden_states", random.tensor(&[batch, l_txt, config.joint_attention_dim], 0.0, 1.5)?)
        .with("pooled_projections", random.tensor(&[batch, config.pooled_projection_dim], 0.0, 1.5)?)
        .with("timestep", Tensor::new(timestep, &Device::Cpu)?))
}

/// A FLUX.1 transformer's inputs by diffusers' names: `grid` image tokens, `l_txt` text tokens.
pub fn flux_inputs(
    config: &FluxTransformerConfig,
    batch: usize,
    grid: (usize, usize),
    l_txt: usize,
    seed: u64,
) -> Result<parallel::Tensors> {
    let (height, width) = grid;
    let mut random = Random::new(seed);
    let ids: Vec<f32> = (0..height).flat_map(|y| (0..width).flat_map(move |x| [0.0, y as f32, x as f32])).collect();
    let time = |first: f32| (0..batch).map(|i| first / (i + 1) as f32).collect::<Vec<_>>();
    let mut inputs = parallel::Tensors::new()
        .with("hidden_states", random.tensor(&[batch, height * width, config.in_channels], 0.0, 1.5)?)
        .with("encoder_hidden_states", random.tensor(&[batch, l_txt, config.joint_attention_dim], 0.0, 1.5)?)
        .with("pooled_projections", random.tensor(&[batch, config.pooled_projection_dim], 0.0, 1.5)?)
        .with("timestep", Tensor::new(time(0.75), &Device::Cpu)?)
        .with("img_ids", Tensor::from_vec(ids, (height * width, 3), &Device::Cpu)?)
        .with("txt_ids", Tensor::zeros((l_txt, 3), DType::F32, &Device::Cpu)?);
    if config.guidance_embeds {
        inputs.insert("guidance", Tensor::new(time(3.5), &Device::Cpu)?);
    }
    Ok(inputs)
}

/// Writes a component's folder.
pub fn write(dir: &Path, tensors: &HashMap<String, Tensor>) -> Result<()> {
    candle_core::safetensors::save(tensors, dir.join("diffusion_pytorch_model.safetensors"))
}

/// An adapter for a FLUX.1 transformer, in PEFT's format: most of its layers in every block, and the first embedder.
pub fn flux_lora(config: &FluxTransformerConfig, rank: usize, strength: f32, seed: u64) -> Result<HashMap<String, Tensor>> {
    let mut random = Random::new(seed);
    let adapted = |name: &str| {
        let layers = ["to_q", "to_k", "add_v_proj", "to_out.0", "ff.net.0.proj", "net.2", "proj_out", "norm1.linear", "proj_mlp"];
        name == "x_embedder" || (name.contains("blocks.") && layers.iter().any(|layer| name.ends_with(layer)))
    };
    let mut tensors = HashMap::new();
    for (name, shape) in flux_shapes(config) {
        if let (Some(name), [d_out, d_in]) = (name.strip_suffix(".weight").filter(|name| adapted(name)), shape.as_slice()) {
            let (a, b) = ((3.0 / *d_in as f32).sqrt(), strength * (3.0 / rank as f32).sqrt());
            tensors.insert(format!("transformer.{name}.lora_A.weight"), random.tensor(&[rank, *d_in], 0.0, a)?);
            tensors.insert(format!("transformer.{name}.lora_B.weight"), random.tensor(&[*d_out, rank], 0.0, b)?);
        }
    }
    Ok(tensors)
}
