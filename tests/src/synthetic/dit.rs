//! PixArt, DiT and Hunyuan-DiT transformers of random weights.

use std::collections::HashMap;

use candle_core::{Device, Result, Tensor};
use models::dit_transformer::DiTTransformerConfig;
use models::hunyuan_dit::HunyuanDiTConfig;
use models::pixart_transformer::PixArtTransformerConfig;
use parallel::Tensors;

use super::{Random, of_shapes, weight_and_bias};

/// Names and shapes.
pub type Shapes = Vec<(String, Vec<usize>)>;

/// Tensors of these names and shapes, f32.
pub fn transformer(shapes: Shapes, seed: u64) -> Result<HashMap<String, Tensor>> {
    of_shapes(shapes, seed)
}

/// The names and shapes of a PixArt transformer's tensors, by diffusers' names.
pub fn pixart_shapes(config: &PixArtTransformerConfig) -> Shapes {
    let (d, p) = (config.inner_dim(), config.patch_size);
    let mut linears =
        vec![("adaln_single.linear".to_owned(), d, 6 * d), ("proj_out".to_owned(), d, p * p * config.channels_out())];
    linears.extend(mlp("adaln_single.emb.timestep_embedder", [256, d, d]));
    if config.is_told_the_size() {
        linears.extend(mlp("adaln_single.emb.resolution_embedder", [256, d / 3, d / 3]));
        linears.extend(mlp("adaln_single.emb.aspect_ratio_embedder", [256, d / 3, d / 3]));
    }
    if let Some(width) = config.caption_channels {
        linears.extend(mlp("caption_projection", [width, d, d]));
    }
    let mut shapes = vec![("scale_shift_table".to_owned(), vec![2, d])];
    for block in (0..config.num_layers).map(|i| format!("transformer_blocks.{i}")) {
        linears.extend(attention(&format!("{block}.attn1"), d, d));
        linears.extend(attention(&format!("{block}.attn2"), d, config.cross_attention_dim.unwrap_or(d)));
        linears.extend(feed_forward(&block, d, 4 * d));
        shapes.push((format!("{block}.scale_shift_table"), vec![6, d]));
    }
    shapes.extend(patch_embed([config.in_channels, p, d]));
    shapes.extend(linears.into_iter().flat_map(weight_and_bias));
    shapes
}

/// Its inputs by diffusers' names, for latents of `sides`; the last of the 7 text tokens of every item are padding.
pub fn pixart_inputs(config: &PixArtTransformerConfig, batch: usize, sides: [usize; 2], seed: u64) -> Result<Tensors> {
    let mut random = Random::new(seed);
    let text = [batch, 7, config.caption_channels.or(config.cross_attention_dim).unwrap_or_default()];
    let inputs = latents(&mut random, config.in_channels, batch, sides)?
        .with("encoder_hidden_states", random.tensor(&text, 0.0, 1.5)?)
        .with("encoder_attention_mask", mask(batch, 7)?);
    if !config.is_told_the_size() {
        return Ok(inputs);
    }
    Ok(inputs
        .with("added_cond_kwargs.resolution", random.tensor(&[batch, 2], 600.0, 400.0)?)
        .with("added_cond_kwargs.aspect_ratio", random.tensor(&[batch, 1], 1.0, 0.5)?))
}

/// The names and shapes of a DiT transformer's tensors, by diffusers' names.
pub fn dit_shapes(config: &DiTTransformerConfig) -> Shapes {
    let (d, p) = (config.inner_dim(), config.patch_size);
    let mut linears = vec![("proj_out_1".to_owned(), d, 2 * d), ("proj_out_2".to_owned(), d, p * p * config.channels_out())];
    let mut shapes = Vec::new();
    for block in (0..config.num_layers).map(|i| format!("transformer_blocks.{i}")) {
        linears.push((format!("{block}.norm1.linear"), d, 6 * d));
        linears.extend(mlp(&format!("{block}.norm1.emb.timestep_embedder"), [256, d, d]));
        linears.extend(attention(&format!("{block}.attn1"), d, d));
        linears.extend(feed_forward(&block, d, 4 * d));
        let table = format!("{block}.norm1.emb.class_embedder.embedding_table.weight");
        shapes.push((table, vec![config.num_embeds_ada_norm + 1, d]));
    }
    shapes.extend(patch_embed([config.in_channels, p, d]));
    shapes.extend(linears.into_iter().flat_map(weight_and_bias));
    shapes
}

/// Its inputs by diffusers' names, for latents of `side`; the first item is of no class.
pub fn dit_inputs(config: &DiTTransformerConfig, batch: usize, side: usize, seed: u64) -> Result<Tensors> {
    let labels: Vec<u32> = (0..batch).map(|i| (config.num_embeds_ada_norm - 3 * i) as u32).collect();
    let latents = latents(&mut Random::new(seed), config.in_channels, batch, [side, side])?;
    Ok(latents.with("class_labels", Tensor::new(labels, &Device::Cpu)?))
}

/// The names and shapes of a Hunyuan-DiT transformer's tensors, by diffusers' names.
pub fn hunyuan_shapes(config: &HunyuanDiTConfig) -> Shapes {
    let (d, dh, p) = (config.inner_dim(), config.attention_head_dim, config.patch_size);
    let (d_bert, d_t5, pooled) = (config.cross_attention_dim, config.cross_attention_dim_t5, config.pooled_projection_dim);
    let style = config.use_style_cond_and_image_meta_size;
    let extra = if style { pooled + 6 * 256 + d } else { pooled };
    let mut linears = vec![
        ("norm_out.linear".to_owned(), d, 2 * d),
        ("proj_out".to_owned(), d, p * p * config.channels_out()),
        ("time_extra_emb.pooler.c_proj".to_owned(), d_t5, pooled),
    ];
    linears.extend(["q_proj", "k_proj", "v_proj"].map(|name| (format!("time_extra_emb.pooler.{name}"), d_t5, d_t5)));
    linears.extend(mlp("time_extra_emb.timestep_embedder", [256, d, d]));
    linears.extend(mlp("time_extra_emb.extra_embedder", [extra, 4 * d, d]));
    linears.extend(mlp("text_embedder", [d_t5, 4 * d_t5, d_bert]));
    let mut shapes = vec![
        ("text_embedding_padding".to_owned(), vec![config.text_len + config.text_len_t5, d_bert]),
        ("time_extra_emb.pooler.positional_embedding".to_owned(), vec![1 + config.text_len_t5, d_t5]),
    ];
    if style {
        shapes.push(("time_extra_emb.style_embedder.weight".to_owned(), vec![1, d]));
    }
    for (i, block) in (0..config.num_layers).map(|i| (i, format!("blocks.{i}"))) {
        linears.push((format!("{block}.norm1.linear"), d, d));
        linears.extend(attention(&format!("{block}.attn1"), d, d));
        linears.extend(attention(&format!("{block}.attn2"), d, d_bert));
        linears.extend(feed_forward(&block, d, (d as f64 * config.mlp_ratio) as usize));
        let mut norms = vec![("norm1.norm", d), ("norm2", d), ("norm3", d)];
        norms.extend(["attn1.norm_q", "attn1.norm_k", "attn2.norm_q", "attn2.norm_k"].map(|name| (name, dh)));
        if i > config.num_layers / 2 {
            norms.push(("skip_norm", 2 * d));
            linears.push((format!("{block}.skip_linear"), 2 * d, d));
        }
        let both = |(name, width): (&str, usize)| ["weight", "bias"].map(|part| (format!("{block}.{name}.{part}"), vec![width]));
        shapes.extend(norms.into_iter().flat_map(both));
    }
    shapes.extend(patch_embed([config.in_channels, p, d]));
    shapes.extend(linears.into_iter().flat_map(weight_and_bias));
    shapes
}

/// Its inputs by diffusers' names, for latents of `sides`; the last tokens of both texts of every item are padding.
pub fn hunyuan_inputs(config: &HunyuanDiTConfig, batch: usize, sides: [usize; 2], seed: u64) -> Result<Tensors> {
    let mut random = Random::new(seed);
    let tokens = sides.iter().map(|side| side / config.patch_size).product();
    let mut inputs = latents(&mut random, config.in_channels, batch, sides)?;
    for (name, mask_name, l, width) in [
        ("encoder_hidden_states", "text_embedding_mask", config.text_len, config.cross_attention_dim),
        ("encoder_hidden_states_t5", "text_embedding_mask_t5", config.text_len_t5, config.cross_attention_dim_t5),
    ] {
        inputs.insert(name, random.tensor(&[batch, l, width], 0.0, 1.5)?);
        inputs.insert(mask_name, mask(batch, l)?);
    }
    for name in ["image_rotary_emb.0", "image_rotary_emb.1"] {
        let pairs = random.tensor(&[tokens, config.attention_head_dim / 2, 1], 0.0, 1.0)?;
        inputs.insert(name, Tensor::cat(&[&pairs, &pairs], 2)?.flatten_from(1)?);
    }
    if config.use_style_cond_and_image_meta_size {
        inputs.insert("image_meta_size", random.tensor(&[batch, 6], 600.0, 400.0)?);
        inputs.insert("style", Tensor::zeros(batch, candle_core::DType::U32, &Device::Cpu)?);
    }
    Ok(inputs)
}

fn mlp(name: &str, [d_in, inner, d]: [usize; 3]) -> [(String, usize, usize); 2] {
    [(format!("{name}.linear_1"), d_in, inner), (format!("{name}.linear_2"), inner, d)]
}

fn attention(name: &str, d: usize, d_keys: usize) -> [(String, usize, usize); 4] {
    [("to_q", d), ("to_k", d_keys), ("to_v", d_keys), ("to_out.0", d)].map(|(part, d_in)| (format!("{name}.{part}"), d_in, d))
}

fn feed_forward(block: &str, d: usize, inner: usize) -> [(String, usize, usize); 2] {
    [(format!("{block}.ff.net.0.proj"), d, inner), (format!("{block}.ff.net.2"), inner, d)]
}

fn patch_embed([c, p, d]: [usize; 3]) -> [(String, Vec<usize>); 2] {
    [("pos_embed.proj.weight".to_owned(), vec![d, c, p, p]), ("pos_embed.proj.bias".to_owned(), vec![d])]
}

fn latents(random: &mut Random, channels: usize, batch: usize, [height, width]: [usize; 2]) -> Result<Tensors> {
    let timestep: Vec<f32> = (0..batch).map(|i| 750.0 / (i + 1) as f32).collect();
    Ok(Tensors::new()
        .with("hidden_states", random.tensor(&[batch, channels, height, width], 0.0, 1.5)?)
        .with("timestep", Tensor::new(timestep, &Device::Cpu)?))
}

fn mask(batch: usize, length: usize) -> Result<Tensor> {
    let kept = |item: usize, at: usize| if at + item + 2 < length { 1f32 } else { 0.0 };
    let mask: Vec<f32> = (0..batch).flat_map(|item| (0..length).map(move |at| kept(item, at))).collect();
    Tensor::from_vec(mask, (batch, length), &Device::Cpu)
}
