//! A U-Net of random weights.

use std::collections::HashMap;

use candle_core::{Device, Result, Tensor};
use models::unet_2d_condition::{DownBlockType, OneOrMany, UNet2DConditionConfig, UpBlockType};
use parallel::Tensors;

use super::{Random, of_shapes, weight_and_bias};

/// The tensors of a network, as they are added to it.
struct Shapes(Vec<(String, Vec<usize>)>);

impl Shapes {
    fn linear(&mut self, name: String, d_in: usize, d_out: usize) {
        self.0.extend(weight_and_bias((name, d_in, d_out)));
    }

    fn conv(&mut self, name: String, c_in: usize, c_out: usize, size: usize) {
        self.0.push((format!("{name}.weight"), vec![c_out, c_in, size, size]));
        self.0.push((format!("{name}.bias"), vec![c_out]));
    }

    fn norm(&mut self, name: String, d: usize) {
        self.0.extend(["weight", "bias"].map(|part| (format!("{name}.{part}"), vec![d])));
    }

    fn resnet(&mut self, name: &str, c_in: usize, c_out: usize, temb: usize) {
        self.norm(format!("{name}.norm1"), c_in);
        self.conv(format!("{name}.conv1"), c_in, c_out, 3);
        self.linear(format!("{name}.time_emb_proj"), temb, c_out);
        self.norm(format!("{name}.norm2"), c_out);
        self.conv(format!("{name}.conv2"), c_out, c_out, 3);
        if c_in != c_out {
            self.conv(format!("{name}.conv_shortcut"), c_in, c_out, 1);
        }
    }

    fn transformer(&mut self, name: &str, config: &UNet2DConditionConfig, at: usize) {
        let (d, text) = (config.block_out_channels[at], config.cross_attention_dim.at(at));
        self.norm(format!("{name}.norm"), d);
        for proj in ["proj_in", "proj_out"] {
            match config.use_linear_projection {
                true => self.linear(format!("{name}.{proj}"), d, d),
                false => self.conv(format!("{name}.{proj}"), d, d, 1),
            }
        }
        for block in (0..config.transformer_layers_per_block.at(at)).map(|i| format!("{name}.transformer_blocks.{i}")) {
            for (attn, keys) in [("attn1", d), ("attn2", text)] {
                for (layer, d_in) in [("to_q", d), ("to_k", keys), ("to_v", keys)] {
                    self.0.push((format!("{block}.{attn}.{layer}.weight"), vec![d, d_in]));
                }
                self.linear(format!("{block}.{attn}.to_out.0"), d, d);
            }
            (1..=3).for_each(|i| self.norm(format!("{block}.norm{i}"), d));
            self.linear(format!("{block}.ff.net.0.proj"), d, 8 * d);
            self.linear(format!("{block}.ff.net.2"), 4 * d, d);
        }
    }
}

/// The names and shapes of a U-Net's tensors, by diffusers' names.
pub fn shapes(config: &UNet2DConditionConfig) -> Vec<(String, Vec<usize>)> {
    let widths = &config.block_out_channels;
    let (n, first, temb, last) = (widths.len(), widths[0], 4 * widths[0], widths[widths.len() - 1]);
    let mut all = Shapes(Vec::new());
    all.conv("conv_in".into(), config.in_channels, first, 3);
    all.linear("time_embedding.linear_1".into(), first, temb);
    all.linear("time_embedding.linear_2".into(), temb, temb);
    if let Some(width) = config.projection_class_embeddings_input_dim {
        all.linear("add_embedding.linear_1".into(), width, temb);
        all.linear("add_embedding.linear_2".into(), temb, temb);
    }
    for at in 0..n {
        let block = format!("down_blocks.{at}");
        for i in 0..config.layers_per_block {
            let c_in = if i == 0 { widths[at.saturating_sub(1)] } else { widths[at] };
            all.resnet(&format!("{block}.resnets.{i}"), c_in, widths[at], temb);
            if config.down_block_types[at] == DownBlockType::CrossAttnDownBlock2D {
                all.transformer(&format!("{block}.attentions.{i}"), config, at);
            }
        }
        if at + 1 < n {
            all.conv(format!("{block}.downsamplers.0.conv"), widths[at], widths[at], 3);
        }
    }
    (0..2).for_each(|i| all.resnet(&format!("mid_block.resnets.{i}"), last, last, temb));
    all.transformer("mid_block.attentions.0", config, n - 1);
    // The channels of what the way up takes again: the first convolution's, then each layer's and each halving's.
    let mut skips = vec![first];
    for (at, width) in widths.iter().enumerate() {
        skips.extend(std::iter::repeat_n(*width, config.layers_per_block + usize::from(at + 1 < n)));
    }
    let mut width = last;
    for up in 0..n {
        let (at, block) = (n - 1 - up, format!("up_blocks.{up}"));
        for i in 0..=config.layers_per_block {
            let skip = skips.pop().unwrap_or_default();
            all.resnet(&format!("{block}.resnets.{i}"), width + skip, widths[at], temb);
            width = widths[at];
            if config.up_block_types[up] == UpBlockType::CrossAttnUpBlock2D {
                all.transformer(&format!("{block}.attentions.{i}"), config, at);
            }
        }
        if at > 0 {
            all.conv(format!("{block}.upsamplers.0.conv"), width, width, 3);
        }
    }
    all.norm("conv_norm_out".into(), first);
    all.conv("conv_out".into(), first, config.out_channels, 3);
    all.0
}

/// Its tensors, f32.
pub fn unet(config: &UNet2DConditionConfig, seed: u64) -> Result<HashMap<String, Tensor>> {
    of_shapes(shapes(config), seed)
}

/// Its inputs by diffusers' names: latents of `height` by `width`, `l_txt` text tokens; of XL what it is told besides.
pub fn inputs(
    config: &UNet2DConditionConfig,
    batch: usize,
    [height, width]: [usize; 2],
    l_txt: usize,
    seed: u64,
) -> Result<Tensors> {
    let mut random = Random::new(seed);
    let time: Vec<f32> = (0..batch).map(|i| 750.0 / (i + 1) as f32).collect();
    let inputs = Tensors::new()
        .with("sample", random.tensor(&[batch, config.in_channels, height, width], 0.0, 1.5)?)
        .with("encoder_hidden_states", random.tensor(&[batch, l_txt, config.cross_attention_dim.at(0)], 0.0, 1.5)?)
        .with("timestep", Tensor::new(time, &Device::Cpu)?);
    let (Some(all), Some(each)) = (config.projection_class_embeddings_input_dim, config.addition_time_embed_dim) else {
        return Ok(inputs);
    };
    let text = all - 6 * each;
    Ok(inputs
        .with("added_cond_kwargs.text_embeds", random.tensor(&[batch, text], 0.0, 1.0)?)
        .with("added_cond_kwargs.time_ids", random.tensor(&[batch, 6], 512.0, 500.0)?))
}

/// Stable Diffusion 1.5's.
pub fn sd15() -> UNet2DConditionConfig {
    UNet2DConditionConfig { cross_attention_dim: OneOrMany::One(768), ..UNet2DConditionConfig::default() }
}

/// Stable Diffusion XL's.
pub fn sdxl() -> UNet2DConditionConfig {
    use DownBlockType::{CrossAttnDownBlock2D, DownBlock2D};
    use UpBlockType::{CrossAttnUpBlock2D, UpBlock2D};
    UNet2DConditionConfig {
        down_block_types: vec![DownBlock2D, CrossAttnDownBlock2D, CrossAttnDownBlock2D],
        up_block_types: vec![CrossAttnUpBlock2D, CrossAttnUpBlock2D, UpBlock2D],
        block_out_channels: vec![320, 640, 1280],
        transformer_layers_per_block: OneOrMany::Many(vec![1, 2, 10]),
        attention_head_dim: OneOrMany::Many(vec![5, 10, 20]),
        cross_attention_dim: OneOrMany::One(2048),
        use_linear_projection: true,
        addition_embed_type: Some("text_time".into()),
        addition_time_embed_dim: Some(256),
        projection_class_embeddings_input_dim: Some(2816),
        ..UNet2DConditionConfig::default()
    }
}
