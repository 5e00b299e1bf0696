//! A Qwen-Image transformer of random weights.

use std::collections::HashMap;

use candle_core::{Device, Result, Tensor};
use models::qwen_image_transformer::QwenImageTransformerConfig;
use parallel::Tensors;

use super::{Random, of_shapes, weight_and_bias};

/// The names and shapes of a Qwen-Image transformer's tensors, by diffusers' names.
pub fn shapes(config: &QwenImageTransformerConfig) -> Vec<(String, Vec<usize>)> {
    let (d, dh) = (config.inner_dim(), config.attention_head_dim);
    let out_channels = config.out_channels.unwrap_or(config.in_channels);
    let mut linears = vec![
        ("img_in".to_owned(), config.in_channels, d),
        ("txt_in".to_owned(), config.joint_attention_dim, d),
        ("time_text_embed.timestep_embedder.linear_1".to_owned(), 256, d),
        ("time_text_embed.timestep_embedder.linear_2".to_owned(), d, d),
        ("norm_out.linear".to_owned(), d, 2 * d),
        ("proj_out".to_owned(), d, config.patch_size * config.patch_size * out_channels),
    ];
    let mut norms = vec![("txt_norm.weight".to_owned(), vec![config.joint_attention_dim])];
    for block in (0..config.num_layers).map(|i| format!("transformer_blocks.{i}")) {
        linears.extend(["img_mod.1", "txt_mod.1"].map(|name| (format!("{block}.{name}"), d, 6 * d)));
        let projections = ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"];
        linears.extend(projections.map(|name| (format!("{block}.attn.{name}"), d, d)));
        let of_heads = ["norm_q", "norm_k", "norm_added_q", "norm_added_k"];
        norms.extend(of_heads.map(|name| (format!("{block}.attn.{name}.weight"), vec![dh])));
        for mlp in ["img_mlp", "txt_mlp"] {
            linears.push((format!("{block}.{mlp}.net.0.proj"), d, 4 * d));
            linears.push((format!("{block}.{mlp}.net.2"), 4 * d, d));
        }
    }
    linears.into_iter().flat_map(weight_and_bias).chain(norms).collect()
}

/// Its tensors, f32.
pub fn transformer(config: &QwenImageTransformerConfig, seed: u64) -> Result<HashMap<String, Tensor>> {
    of_shapes(shapes(config), seed)
}

/// Its inputs by diffusers' names: the tokens of `pictures` (rows and columns of each), `l_txt` text tokens.
pub fn inputs(
    config: &QwenImageTransformerConfig,
    batch: usize,
    pictures: &[[u32; 2]],
    l_txt: usize,
    seed: u64,
) -> Result<Tensors> {
    let mut random = Random::new(seed);
    let l_img = pictures.iter().map(|[height, width]| (height * width) as usize).sum();
    let shapes: Vec<Vec<u32>> = pictures.iter().map(|[height, width]| vec![1, *height, *width]).collect();
    let time: Vec<f32> = (0..batch).map(|i| 0.75 / (i + 1) as f32).collect();
    Ok(Tensors::new()
        .with("hidden_states", random.tensor(&[batch, l_img, config.in_channels], 0.0, 1.5)?)
        .with("encoder_hidden_states", random.tensor(&[batch, l_txt, config.joint_attention_dim], 0.0, 1.5)?)
        .with("timestep", Tensor::new(time, &Device::Cpu)?)
        .with("img_shapes", Tensor::new(shapes, &Device::Cpu)?))
}
