//! The U-Nets of Stable Diffusion 1.5 and XL, one forward of one picture.

use models::blocks::RangeOf;
use models::unet_2d_condition::{DownBlockType, OneOrMany, UNet2DConditionConfig, UNet2DConditionModel, UpBlockType};
use parallel::{Device, Tensor, Tensors, Weights};

use super::layers::Layers;
use super::{Model, Network};

/// Pixels of a picture's side to one of its latents'.
const SCALE: usize = 8;
/// Tokens of the text.
const TEXT: usize = 77;
/// Channels of XL's pooled text, and the numbers beside it.
const POOLED: usize = 1280;
const TIME_IDS: usize = 6;

/// It denoises a picture of `side` by `side` pixels.
pub(in crate::bench) struct UNet {
    pub(in crate::bench) config: UNet2DConditionConfig,
    pub(in crate::bench) side: usize,
}

/// Stable Diffusion 1.5's.
pub(in crate::bench) fn sd15() -> UNet2DConditionConfig {
    UNet2DConditionConfig { cross_attention_dim: OneOrMany::One(768), ..UNet2DConditionConfig::default() }
}

/// Stable Diffusion XL's.
pub(in crate::bench) fn sdxl() -> UNet2DConditionConfig {
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
        projection_class_embeddings_input_dim: Some(POOLED + TIME_IDS * 256),
        ..UNet2DConditionConfig::default()
    }
}

impl UNet {
    fn layers(&self) -> Layers {
        let (config, widths) = (&self.config, &self.config.block_out_channels);
        let (n, first) = (widths.len(), widths[0]);
        let pixels = |at: usize| ((self.side / SCALE) >> at).pow(2);
        let mut layers = Layers::default();
        layers.conv("conv_in", [config.in_channels, first], 3, pixels(0));
        layers.linear("time_embedding.linear_1", [first, 4 * first], 1);
        layers.linear("time_embedding.linear_2", [4 * first, 4 * first], 1);
        if let Some(width) = config.projection_class_embeddings_input_dim {
            layers.linear("add_embedding.linear_1", [width, 4 * first], 1);
            layers.linear("add_embedding.linear_2", [4 * first, 4 * first], 1);
        }
        let mut skips = vec![first];
        for (at, width) in widths.iter().copied().enumerate() {
            let block = format!("down_blocks.{at}");
            for i in 0..config.layers_per_block {
                let c_in = if i == 0 { widths[at.saturating_sub(1)] } else { width };
                self.resnet(&mut layers, &format!("{block}.resnets.{i}"), [c_in, width], pixels(at));
                if config.down_block_types[at] == DownBlockType::CrossAttnDownBlock2D {
                    self.transformer(&mut layers, &format!("{block}.attentions.{i}"), at, pixels(at));
                }
                skips.push(width);
            }
            if at + 1 < n {
                layers.conv(&format!("{block}.downsamplers.0.conv"), [width; 2], 3, pixels(at + 1));
                skips.push(width);
            }
        }
        let last = widths[n - 1];
        (0..2).for_each(|i| self.resnet(&mut layers, &format!("mid_block.resnets.{i}"), [last; 2], pixels(n - 1)));
        self.transformer(&mut layers, "mid_block.attentions.0", n - 1, pixels(n - 1));
        let mut before = last;
        for (up, at) in (0..n).rev().enumerate() {
            let (block, width) = (format!("up_blocks.{up}"), widths[at]);
            for i in 0..=config.layers_per_block {
                let c_in = before + skips.pop().unwrap_or_default();
                self.resnet(&mut layers, &format!("{block}.resnets.{i}"), [c_in, width], pixels(at));
                before = width;
                if config.up_block_types[up] == UpBlockType::CrossAttnUpBlock2D {
                    self.transformer(&mut layers, &format!("{block}.attentions.{i}"), at, pixels(at));
                }
            }
            if at > 0 {
                layers.doubling_conv(&format!("{block}.upsamplers.0.conv"), width, pixels(at - 1));
            }
        }
        layers.affine("conv_norm_out", first);
        layers.conv("conv_out", [first, config.out_channels], 3, pixels(0));
        layers
    }

    fn resnet(&self, layers: &mut Layers, name: &str, [c_in, c_out]: [usize; 2], pixels: usize) {
        layers.affine(&format!("{name}.norm1"), c_in);
        layers.conv(&format!("{name}.conv1"), [c_in, c_out], 3, pixels);
        layers.linear(&format!("{name}.time_emb_proj"), [4 * self.config.block_out_channels[0], c_out], 1);
        layers.affine(&format!("{name}.norm2"), c_out);
        layers.conv(&format!("{name}.conv2"), [c_out, c_out], 3, pixels);
        if c_in != c_out {
            layers.conv(&format!("{name}.conv_shortcut"), [c_in, c_out], 1, pixels);
        }
    }

    fn transformer(&self, layers: &mut Layers, name: &str, at: usize, pixels: usize) {
        let (d, d_text) = (self.config.block_out_channels[at], self.config.cross_attention_dim.at(at));
        layers.affine(&format!("{name}.norm"), d);
        for proj in ["proj_in", "proj_out"] {
            let proj = format!("{name}.{proj}");
            match self.config.use_linear_projection {
                true => layers.linear(&proj, [d, d], pixels),
                false => layers.conv(&proj, [d, d], 1, pixels),
            }
        }
        for block in (0..self.config.transformer_layers_per_block.at(at)).map(|i| format!("{name}.transformer_blocks.{i}")) {
            for (attn, d_keys, keys) in [("attn1", d, pixels), ("attn2", d_text, TEXT)] {
                layers.projection(&format!("{block}.{attn}.to_q"), [d, d], pixels);
                layers.projection(&format!("{block}.{attn}.to_k"), [d_keys, d], keys);
                layers.projection(&format!("{block}.{attn}.to_v"), [d_keys, d], keys);
                layers.linear(&format!("{block}.{attn}.to_out.0"), [d, d], pixels);
                layers.attention(d, pixels, keys);
            }
            (1..=3).for_each(|i| layers.affine(&format!("{block}.norm{i}"), d));
            layers.linear(&format!("{block}.ff.net.0.proj"), [d, 8 * d], pixels);
            layers.linear(&format!("{block}.ff.net.2"), [4 * d, d], pixels);
        }
    }
}

impl Network for UNet {
    fn shapes(&self) -> Vec<(String, Vec<usize>)> {
        self.layers().shapes
    }

    fn load(&self, weights: &Weights, range: RangeOf) -> models::Result<Model> {
        Ok(Model::Blocks(Box::new(UNet2DConditionModel::load(weights, &self.config, range)?)))
    }

    fn inputs(&self) -> models::Result<Tensors> {
        let side = self.side / SCALE;
        let random = |shape: &[usize]| Tensor::randn(0f32, 1.0, shape, &Device::Cpu);
        let mut inputs = Tensors::new()
            .with("sample", random(&[1, self.config.in_channels, side, side])?)
            .with("timestep", Tensor::new(&[500f32], &Device::Cpu)?)
            .with("encoder_hidden_states", random(&[1, TEXT, self.config.cross_attention_dim.at(0)])?);
        if self.config.has_text_time() {
            inputs.insert("added_cond_kwargs.text_embeds", random(&[1, POOLED])?);
            let size = self.side as f32;
            let ids = [size, size, 0.0, 0.0, size, size];
            inputs.insert("added_cond_kwargs.time_ids", Tensor::new(&[ids], &Device::Cpu)?);
        }
        Ok(inputs)
    }

    fn output(&self) -> &'static str {
        "sample"
    }

    fn flops(&self) -> f64 {
        self.layers().flops
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_published_networks_have_as_many_weights() {
        for (config, parameters) in [(sd15(), 859_520_964), (sdxl(), 2_567_463_684)] {
            let shapes = UNet { config, side: 512 }.shapes();
            let count: usize = shapes.iter().map(|(_, shape)| shape.iter().product::<usize>()).sum();
            assert_eq!(count, parameters);
        }
    }
}
