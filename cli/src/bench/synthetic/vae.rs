//! FLUX.1's autoencoder, which decodes one picture.

use models::autoencoder_kl::{AutoencoderKl, AutoencoderKlConfig};
use models::blocks::RangeOf;
use parallel::{Device, Tensor, Tensors, Weights};

use super::layers::Layers;
use super::{Model, Network};

/// Channels at each resolution, the finest first.
const WIDTHS: [usize; 4] = [128, 256, 512, 512];
/// Residual blocks at each resolution of the encoder.
const LAYERS: usize = 2;
/// Channels of the latents.
const LATENT: usize = 16;

/// It decodes a picture of `side` by `side` pixels.
pub(in crate::bench) struct Vae {
    pub(in crate::bench) side: usize,
}

impl Layers {
    fn resnet(&mut self, name: &str, [c_in, c_out]: [usize; 2], pixels: usize) {
        self.affine(&format!("{name}.norm1"), c_in);
        self.conv(&format!("{name}.conv1"), [c_in, c_out], 3, pixels);
        self.affine(&format!("{name}.norm2"), c_out);
        self.conv(&format!("{name}.conv2"), [c_out, c_out], 3, pixels);
        if c_in != c_out {
            self.conv(&format!("{name}.conv_shortcut"), [c_in, c_out], 1, pixels);
        }
    }

    fn mid_block(&mut self, name: &str, channels: usize, pixels: usize) {
        (0..2).for_each(|i| self.resnet(&format!("{name}.resnets.{i}"), [channels; 2], pixels));
        self.affine(&format!("{name}.attentions.0.group_norm"), channels);
        for linear in ["to_q", "to_k", "to_v", "to_out.0"] {
            self.shapes.push((format!("{name}.attentions.0.{linear}.weight"), vec![channels; 2]));
            self.shapes.push((format!("{name}.attentions.0.{linear}.bias"), vec![channels]));
        }
        self.flops += (8 * channels * channels * pixels + 4 * channels * pixels * pixels) as f64;
    }

    fn head(&mut self, name: &str, [c_in, c_out]: [usize; 2], pixels: usize) {
        self.affine(&format!("{name}.conv_norm_out"), c_in);
        self.conv(&format!("{name}.conv_out"), [c_in, c_out], 3, pixels);
    }

    fn encoder(&mut self) {
        self.conv("encoder.conv_in", [3, WIDTHS[0]], 3, 0);
        for (i, width) in WIDTHS.into_iter().enumerate() {
            let before = WIDTHS[i.saturating_sub(1)];
            for layer in 0..LAYERS {
                let c_in = if layer == 0 { before } else { width };
                self.resnet(&format!("encoder.down_blocks.{i}.resnets.{layer}"), [c_in, width], 0);
            }
            if i + 1 < WIDTHS.len() {
                self.conv(&format!("encoder.down_blocks.{i}.downsamplers.0.conv"), [width; 2], 3, 0);
            }
        }
        self.mid_block("encoder.mid_block", WIDTHS[3], 0);
        self.head("encoder", [WIDTHS[3], 2 * LATENT], 0);
    }

    /// From a picture of latents of so many pixels.
    fn decoder(&mut self, mut pixels: usize) {
        self.conv("decoder.conv_in", [LATENT, WIDTHS[3]], 3, pixels);
        self.mid_block("decoder.mid_block", WIDTHS[3], pixels);
        let mut before = WIDTHS[3];
        for (i, width) in WIDTHS.into_iter().rev().enumerate() {
            for layer in 0..=LAYERS {
                let c_in = if layer == 0 { before } else { width };
                self.resnet(&format!("decoder.up_blocks.{i}.resnets.{layer}"), [c_in, width], pixels);
            }
            if i + 1 < WIDTHS.len() {
                pixels *= 4;
                self.doubling_conv(&format!("decoder.up_blocks.{i}.upsamplers.0.conv"), width, pixels);
            }
            before = width;
        }
        self.head("decoder", [WIDTHS[0], 3], pixels);
    }
}

impl Vae {
    fn layers(&self) -> Layers {
        let mut layers = Layers::default();
        layers.encoder();
        layers.decoder((self.side / 8).pow(2));
        layers
    }
}

impl Network for Vae {
    fn shapes(&self) -> Vec<(String, Vec<usize>)> {
        self.layers().shapes
    }

    fn load(&self, weights: &Weights, _: RangeOf) -> models::Result<Model> {
        let config = AutoencoderKlConfig {
            down_block_types: vec!["DownEncoderBlock2D".into(); WIDTHS.len()],
            up_block_types: vec!["UpDecoderBlock2D".into(); WIDTHS.len()],
            block_out_channels: WIDTHS.to_vec(),
            layers_per_block: LAYERS,
            latent_channels: LATENT,
            use_quant_conv: false,
            use_post_quant_conv: false,
            ..AutoencoderKlConfig::default()
        };
        Ok(Model::Decoder(Box::new(AutoencoderKl::load(weights, &config)?)))
    }

    fn inputs(&self) -> models::Result<Tensors> {
        let side = self.side / 8;
        Ok(Tensors::new().with("latents", Tensor::randn(0f32, 1.0, (1, LATENT, side, side), &Device::Cpu)?))
    }

    fn output(&self) -> &'static str {
        "sample"
    }

    fn flops(&self) -> f64 {
        self.layers().flops
    }
}
