//! A piece of FLUX.1 with weights that were never trained: one double block and one single block at a width of choice, so that a step
//! can be timed without 24 GB of weights.

use std::path::Path;
use std::sync::Arc;

use models::blocks::{BlockModel, RangeOf};
use models::flux_transformer::{FluxTransformer, FluxTransformerConfig};
use parallel::{Collective, DType, Device, Error, Tensor, Tensors, Weights};
use safetensors::tensor::{Dtype, TensorView};

/// Blocks of the whole network.
pub(super) const BLOCKS: usize = 19 + 38;
/// Blocks here.
pub(super) const HELD: usize = 2;
/// Width of a head.
const HEAD: usize = 128;
/// Width of the timestep's embedding.
const TIME: usize = 256;
/// Tensors begin at different places among the numbers they share; this far apart at most.
const SHIFT: usize = 1 << 16;

/// How large.
pub(super) struct Scale {
    /// Of 128 channels each.
    pub(super) heads: usize,
    /// Width of what the text encoder gives.
    pub(super) text_width: usize,
    /// Image tokens along a side.
    pub(super) grid: usize,
    pub(super) text_tokens: usize,
}

impl Scale {
    pub(super) fn width(&self) -> usize {
        self.heads * HEAD
    }

    pub(super) fn tokens(&self) -> usize {
        self.grid * self.grid + self.text_tokens
    }

    /// Floating-point operations of one block: products with 12 width^2 weights a token, and attention. Double and single blocks have
    /// the same; modulation, norms and embedders are left out (under 1 %).
    pub(super) fn block_flops(&self) -> f64 {
        let (width, tokens) = (self.width() as f64, self.tokens() as f64);
        24.0 * width * width * tokens + 4.0 * tokens * tokens * width
    }

    fn config(&self) -> FluxTransformerConfig {
        FluxTransformerConfig {
            num_layers: 1,
            num_single_layers: 1,
            num_attention_heads: self.heads,
            joint_attention_dim: self.text_width,
            guidance_embeds: true,
            ..FluxTransformerConfig::default()
        }
    }

    /// The network's inputs by diffusers' names, of one picture.
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

/// Its weights, in a folder that goes with this, and inputs.
pub(super) struct Checkpoint {
    folder: tempfile::TempDir,
    config: FluxTransformerConfig,
    inputs: Tensors,
}

impl Checkpoint {
    /// Writes them, in bf16: 1 GB at FLUX.1's width.
    pub(super) fn write(scale: &Scale) -> models::Result<Self> {
        let config = scale.config();
        let io = |source| Error::Io { path: std::env::temp_dir(), source };
        let folder = tempfile::tempdir().map_err(io)?;
        write(&folder.path().join("diffusion_pytorch_model.safetensors"), &shapes(&config))?;
        Ok(Self { folder, config, inputs: scale.inputs()? })
    }

    /// One rank's part of it.
    pub(super) fn load(&self, group: Arc<dyn Collective>, device: &Device) -> models::Result<Loaded> {
        let weights = Weights::open(self.folder.path(), group, DType::F32, device)?;
        let model = FluxTransformer::load(&weights, &self.config, RangeOf::WHOLE)?;
        Ok(Loaded { model, inputs: self.inputs.to_device(device)?, device: device.clone() })
    }
}

/// A network that can be run.
pub(super) struct Loaded {
    model: FluxTransformer,
    inputs: Tensors,
    device: Device,
}

impl Loaded {
    /// One forward, done when it returns.
    pub(super) fn forward(&self) -> models::Result<Tensor> {
        let hidden = self.model.blocks(self.model.embed(&self.inputs)?)?;
        let sample = self.model.output(hidden)?.take("sample")?;
        self.device.synchronize()?;
        Ok(sample)
    }
}

/// Names and shapes by diffusers' names.
fn shapes(config: &FluxTransformerConfig) -> Vec<(String, Vec<usize>)> {
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
    let double = "transformer_blocks.0";
    linears.extend(["norm1", "norm1_context"].map(|name| (format!("{double}.{name}.linear"), d, 6 * d)));
    for name in ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"] {
        linears.push((format!("{double}.attn.{name}"), d, d));
    }
    for name in ["ff", "ff_context"] {
        linears.push((format!("{double}.{name}.net.0.proj"), d, 4 * d));
        linears.push((format!("{double}.{name}.net.2"), 4 * d, d));
    }
    let single = "single_transformer_blocks.0";
    linears.extend(["to_q", "to_k", "to_v"].map(|name| (format!("{single}.attn.{name}"), d, d)));
    for (name, d_in, d_out) in [("norm.linear", d, 3 * d), ("proj_mlp", d, 4 * d), ("proj_out", 5 * d, d)] {
        linears.push((format!("{single}.{name}"), d_in, d_out));
    }
    let norms = [(double, "norm_q"), (double, "norm_k"), (double, "norm_added_q"), (double, "norm_added_k")];
    let norms = norms.into_iter().chain([(single, "norm_q"), (single, "norm_k")]);
    let norms = norms.map(|(block, norm)| (format!("{block}.attn.{norm}.weight"), vec![HEAD]));
    let tensors = |(name, d_in, d_out)| [(format!("{name}.weight"), vec![d_out, d_in]), (format!("{name}.bias"), vec![d_out])];
    linears.into_iter().flat_map(tensors).chain(norms).collect()
}

/// Writes tensors whose numbers are parts of one row of them: so that gigabytes need not be made up.
fn write(path: &Path, shapes: &[(String, Vec<usize>)]) -> models::Result<()> {
    let largest = shapes.iter().map(|(_, shape)| shape.iter().product::<usize>()).max().unwrap_or_default();
    let small: Vec<u8> = (0..largest + SHIFT).flat_map(|i| bf16(0.04 * noise(i))).collect();
    let ones: Vec<u8> = (0..HEAD + SHIFT).flat_map(|i| bf16(1.0 + 0.2 * noise(i))).collect();
    let bad = |reason: String| Error::Checkpoint { path: path.to_owned(), reason };
    let views = shapes.iter().enumerate().map(|(i, (name, shape))| {
        let from = if name.contains(".norm_") && shape.len() == 1 { &ones } else { &small };
        let start = 2 * (i * 7919 % SHIFT);
        let bytes = &from[start..start + 2 * shape.iter().product::<usize>()];
        Ok((name, TensorView::new(Dtype::BF16, shape.clone(), bytes).map_err(|error| bad(error.to_string()))?))
    });
    let views = views.collect::<Result<Vec<_>, Error>>()?;
    Ok(safetensors::serialize_to_file(views, None, path).map_err(|error| bad(error.to_string()))?)
}

/// In -1..1, without a pattern that a product could see.
fn noise(i: usize) -> f32 {
    let mut z = (i as u64).wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    ((z ^ (z >> 31)) >> 40) as f32 / (1u32 << 23) as f32 - 1.0
}

/// The upper half of an f32.
fn bf16(value: f32) -> [u8; 2] {
    ((value.to_bits() >> 16) as u16).to_le_bytes()
}
