//! The vision tower: patches of pictures to features for the text model.

use std::sync::Arc;

use parallel::ops::{self, Activation};
use parallel::{Collective, ColumnParallelLinear, Linear, RowParallelLinear, Shard, Tensor, Weights};

use super::config::Qwen25VlVisionConfig;
use super::heads::HeadShare;
use super::layers::{Mlp, with_bias};
use super::positions::{Pictures, Rope};
use super::windows::Windows;
use crate::autoencoder_kl::Tap;
use crate::{Error, Result};

/// Of every norm of the tower.
const EPS: f64 = 1e-6;

/// `Qwen2_5_VisionTransformerPretrainedModel`.
#[derive(Debug)]
pub(super) struct VisionTower {
    patch_embed: PatchEmbed,
    blocks: Vec<Block>,
    merger: Merger,
    config: Qwen25VlVisionConfig,
}

impl VisionTower {
    pub(super) fn load(w: &Weights, config: &Qwen25VlVisionConfig) -> Result<Self> {
        Ok(Self {
            patch_embed: PatchEmbed::load(&w.pp("patch_embed.proj"), config)?,
            blocks: (0..config.depth).map(|i| Block::load(&w.pp("blocks").pp(i), config)).collect::<Result<_>>()?,
            merger: Merger::load(&w.pp("merger"), config)?,
            config: config.clone(),
        })
    }

    /// `pixel_values: [patches, C T P P]` of all pictures give one row for each of their tokens, `[tokens, D of the text]`.
    pub(super) fn forward(&self, pixel_values: &Tensor, pictures: &Pictures, tap: Tap) -> Result<Tensor> {
        let expected = [pictures.patches(), self.config.patch_width()];
        if pixel_values.dims() != expected {
            let reason = format!("{:?}, where the pictures' grids say {expected:?}", pixel_values.dims());
            return Err(Error::Invalid { field: "pixel_values", reason });
        }
        let windows = Windows::of(pictures, &self.config);
        let x = self.patch_embed.forward(pixel_values)?; // [patches, D]
        tap("model.visual.patch_embed", &x);
        let rows = |indices: Vec<u32>| {
            let len = indices.len();
            Tensor::from_vec(indices, len, x.device())
        };
        let rope = windows.rope(self.config.hidden_size / self.config.num_heads)?;
        let mut x = x.index_select(&rows(windows.patches(self.config.merge_unit()))?, 0)?.unsqueeze(0)?; // [1, patches, D]
        for (i, block) in self.blocks.iter().enumerate() {
            let whole = self.config.fullatt_block_indexes.contains(&i);
            x = block.forward(&x, if whole { &windows.pictures } else { &windows.windows }, &rope)?;
            tap(&format!("model.visual.blocks.{i}"), &x.squeeze(0)?);
        }
        let merged = self.merger.forward(&x.squeeze(0)?)?; // [tokens, D of the text]
        tap("model.visual.merger", &merged);
        Ok(merged.index_select(&rows(windows.reverse())?, 0)?)
    }
}

/// `Qwen2_5_VisionPatchEmbed`: a convolution whose kernels do not overlap is a linear layer. Divided by columns and gathered.
struct PatchEmbed {
    proj: Linear,
    group: Arc<dyn Collective>,
}

impl PatchEmbed {
    fn load(w: &Weights, config: &Qwen25VlVisionConfig) -> Result<Self> {
        let (d, side) = (config.hidden_size, config.patch_size);
        let shape = [d, config.in_channels, config.temporal_patch_size, side, side];
        Ok(Self { proj: Linear::load_fixed(w, &shape, Shard::split(0, d))?, group: w.group().clone() }) // [D/tp, C T P P]
    }

    fn forward(&self, pixel_values: &Tensor) -> Result<Tensor> {
        Ok(self.group.all_gather(&self.proj.forward(pixel_values)?, 1)?)
    }
}

impl std::fmt::Debug for PatchEmbed {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "PatchEmbed({:?}, rank {} of {})", self.proj, self.group.rank(), self.group.size())
    }
}

/// `Qwen2_5_VLVisionBlock`.
#[derive(Debug)]
struct Block {
    norm1: Tensor,
    attn: Attention,
    norm2: Tensor,
    mlp: Mlp,
}

impl Block {
    fn load(w: &Weights, config: &Qwen25VlVisionConfig) -> Result<Self> {
        let d = config.hidden_size;
        let norm = |name: &str| w.pp(name).get("weight", &[d], Shard::Replicated);
        Ok(Self {
            norm1: norm("norm1")?,
            attn: Attention::load(&w.pp("attn"), config)?,
            norm2: norm("norm2")?,
            mlp: Mlp::load_biased(&w.pp("mlp"), [d, config.intermediate_size])?,
        })
    }

    /// `x: [1, patches, D]`; patches attend within consecutive segments of these lengths.
    fn forward(&self, x: &Tensor, segments: &[usize], rope: &Rope) -> Result<Tensor> {
        let x = (x + self.attn.forward(&ops::rms_norm(x, &self.norm1, EPS)?, segments, rope)?)?;
        Ok((&x + self.mlp.forward(&ops::rms_norm(&x, &self.norm2, EPS)?)?)?)
    }
}

/// `Qwen2_5_VLVisionAttention`.
#[derive(Debug)]
struct Attention {
    /// Queries, keys and values of this rank's heads, packed.
    qkv: Linear,
    proj: RowParallelLinear,
    heads: HeadShare,
    scale: f64,
}

impl Attention {
    fn load(w: &Weights, config: &Qwen25VlVisionConfig) -> Result<Self> {
        let d = config.hidden_size;
        let width = d / config.num_heads;
        let heads = HeadShare::new([config.num_heads, config.num_heads, width], &**w.group());
        let rows = [0, d, 2 * d].map(|first| heads.query_rows(first));
        Ok(Self {
            qkv: Linear::load_rows(with_bias(&w.pp("qkv"))?, [d, 3 * d], &rows)?,
            proj: RowParallelLinear::load(with_bias(&w.pp("proj"))?, &[d], d)?,
            heads,
            scale: 1.0 / (width as f64).sqrt(),
        })
    }

    fn forward(&self, x: &Tensor, segments: &[usize], rope: &Rope) -> Result<Tensor> {
        let qkv = self.qkv.forward(x)?; // [1, patches, 3 (N here) Dh]
        let width = qkv.dim(2)? / 3;
        let part = |i: usize| self.heads.split_queries(&qkv.narrow(2, i * width, width)?); // [1, N here, patches, Dh]
        let (q, k, v) = (rope.turn(&part(0)?)?, rope.turn(&part(1)?)?, part(2)?);
        let attended = within_segments(&q, &k, &v, segments, self.scale)?;
        Ok(self.proj.forward(&self.heads.merge(&attended)?)?)
    }
}

/// Attention of `[1, N, L, Dh]` within consecutive segments. Neighbours of one length go together, as so many more heads.
fn within_segments(q: &Tensor, k: &Tensor, v: &Tensor, segments: &[usize], scale: f64) -> Result<Tensor> {
    let (_, n, _, dh) = q.dims4()?;
    let mut start = 0;
    let mut done = Vec::new();
    for run in segments.chunk_by(|a, b| a == b) {
        let (length, count) = (run[0], run.len());
        let part = |x: &Tensor| -> Result<Tensor> {
            let part = x.narrow(2, start, count * length)?.contiguous()?;
            Ok(part.reshape((1, n * count, length, dh))?) // [1, N, count length, Dh] -> [1, N count, length, Dh]
        };
        let attended = ops::attention(&part(q)?, &part(k)?, &part(v)?, scale, None)?;
        done.push(attended.reshape((1, n, count * length, dh))?);
        start += count * length;
    }
    Ok(Tensor::cat(&done, 2)?)
}

/// `Qwen2_5_VLPatchMerger`: a square of patches becomes one token.
#[derive(Debug)]
struct Merger {
    ln_q: Tensor,
    up: ColumnParallelLinear,
    down: RowParallelLinear,
    unit: usize,
}

impl Merger {
    fn load(w: &Weights, config: &Qwen25VlVisionConfig) -> Result<Self> {
        let (d, unit) = (config.hidden_size, config.merge_unit());
        Ok(Self {
            ln_q: w.get("ln_q.weight", &[d], Shard::Replicated)?,
            up: ColumnParallelLinear::load(with_bias(&w.pp("mlp.0"))?, unit * d, &[unit * d])?,
            down: RowParallelLinear::load(with_bias(&w.pp("mlp.2"))?, &[unit * d], config.out_hidden_size)?,
            unit,
        })
    }

    /// `[patches, D] -> [patches / unit, D of the text]`
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let (patches, d) = x.dims2()?;
        let x = ops::rms_norm(x, &self.ln_q, EPS)?.reshape((patches / self.unit, self.unit * d))?;
        Ok(self.down.forward(&ops::activate(&self.up.forward(&x)?, Activation::Gelu)?)?)
    }
}
