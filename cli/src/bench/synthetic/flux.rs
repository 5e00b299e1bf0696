//! FLUX.1's transformer: any width of heads of 128 channels, any number of blocks.

use models::Error;
use models::blocks::RangeOf;
use models::flux_transformer::{FluxTransformer, FluxTransformerConfig};
use parallel::{DType, Device, Tensor, Tensors, Weights};

use super::{Model, Network};

/// Blocks of the whole network: of two streams, and of one.
pub(in crate::bench) const BLOCKS: [usize; 2] = [19, 38];
/// Width of a head.
const HEAD: usize = 128;
/// Width of the timestep's embedding.
const TIME: usize = 256;

/// How large.
#[derive(Clone, Copy)]
pub(in crate::bench) struct Flux {
    /// Blocks of two streams, and of one.
    pub(in crate::bench) blocks: [usize; 2],
    /// Of 128 channels each.
    pub(in crate::bench) heads: usize,
    /// Width of what the text encoder gives.
    pub(in crate::bench) text_width: usize,
    /// Image tokens along a side.
    pub(in crate::bench) grid: usize,
    pub(in crate::bench) text_tokens: usize,
}

impl Flux {
    pub(in crate::bench) fn width(&self) -> usize {
        self.heads * HEAD
    }

    pub(in crate::bench) fn tokens(&self) -> usize {
        self.grid * self.grid + self.text_tokens
    }

    /// Floating-point operations of one block: products with 12 width^2 weights a token, and attention. Double and single blocks have
    /// the same; modulation, norms and embedders are left out (under 1 %).
    pub(in crate::bench) fn block_flops(&self) -> f64 {
        let (width, tokens) = (self.width() as f64, self.tokens() as f64);
        24.0 * width * width * tokens + 4.0 * tokens * tokens * width
    }

    fn config(&self) -> FluxTransformerConfig {
        FluxTransformerConfig {
            num_layers: self.blocks[0],
            num_single_layers: self.blocks[1],
            num_attention_heads: self.heads,
            joint_attention_dim: self.text_width,
            guidance_embeds: true,
            ..FluxTransformerConfig::default()
        }
    }
}

impl Network for Flux {
    fn shapes(&self) -> Vec<(String, Vec<usize>)> {
        let config = self.config();
        let d = config.inner_dim();
        let mut linears: Vec<(String, usize, usize)> = vec![
            ("x_embedder".into(), config.in_channels, d),
            ("context_embedder".into(), config.joint_attention_dim, d),
            ("norm_out.linear".into(), d, 2 * d),
            ("proj_out".into(), d, config.in_channels),
        ];
        for (name, width) in [("timestep", TIME), ("guidance", TIME), ("text", config.pooled_projection_dim)] {
            linears.push((format!("time_text_embed.{name}_embedder.linear_1"), width, d));
            linears.push((format!("time_text_embed.{name}_embedder.linear_2"), d, d));
        }
        let mut norms = Vec::new();
        for block in (0..config.num_layers).map(|i| format!("transformer_blocks.{i}")) {
            linears.extend(["norm1", "norm1_context"].map(|name| (format!("{block}.{name}.linear"), d, 6 * d)));
            let projections = ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"];
            linears.extend(projections.map(|name| (format!("{block}.attn.{name}"), d, d)));
            for name in ["ff", "ff_context"] {
                linears.push((format!("{block}.{name}.net.0.proj"), d, 4 * d));
                linears.push((format!("{block}.{name}.net.2"), 4 * d, d));
            }
            norms.extend(["norm_q", "norm_k", "norm_added_q", "norm_added_k"].map(|norm| format!("{block}.attn.{norm}")));
        }
        for block in (0..config.num_single_layers).map(|i| format!("single_transformer_blocks.{i}")) {
            linears.extend(["to_q", "to_k", "to_v"].map(|name| (format!("{block}.attn.{name}"), d, d)));
            let others = [("norm.linear", d, 3 * d), ("proj_mlp", d, 4 * d), ("proj_out", 5 * d, d)];
            linears.extend(others.map(|(name, d_in, d_out)| (format!("{block}.{name}"), d_in, d_out)));
            norms.extend(["norm_q", "norm_k"].map(|norm| format!("{block}.attn.{norm}")));
        }
        let norms = norms.into_iter().map(|name| (format!("{name}.weight"), vec![HEAD]));
        let tensors =
            |(name, d_in, d_out)| [(format!("{name}.weight"), vec![d_out, d_in]), (format!("{name}.bias"), vec![d_out])];
        linears.into_iter().flat_map(tensors).chain(norms).collect()
    }

    fn load(&self, weights: &Weights, range: RangeOf) -> models::Result<Model> {
        Ok(Model::Blocks(Box::new(FluxTransformer::load(weights, &self.config(), range)?)))
    }

    fn output(&self) -> &'static str {
        "sample"
    }

    fn flops(&self) -> f64 {
        self.block_flops() * self.blocks.iter().sum::<usize>() as f64
    }

    fn inputs(&self) -> models::Result<Tensors> {
        let (config, tokens, device) = (self.config(), self.grid * self.grid, &Device::Cpu);
        let random = |shape: &[usize]| Ok::<_, Error>(Tensor::randn(0f32, 1.0, shape, device)?);
        let ids: Vec<f32> = (0..tokens).flat_map(|i| [0.0, (i / self.grid) as f32, (i % self.grid) as f32]).collect();
        Ok(Tensors::new()
            .with("hidden_states", random(&[1, tokens, config.in_channels])?)
            .with("encoder_hidden_states", random(&[1, self.text_tokens, self.text_width])?)
            .with("pooled_projections", random(&[1, config.pooled_projection_dim])?)
            .with("timestep", Tensor::new(&[0.75f32], device)?)
            .with("guidance", Tensor::new(&[3.5f32], device)?)
            .with("img_ids", Tensor::from_vec(ids, (tokens, 3), device)?)
            .with("txt_ids", Tensor::zeros((self.text_tokens, 3), DType::F32, device)?))
    }
}
