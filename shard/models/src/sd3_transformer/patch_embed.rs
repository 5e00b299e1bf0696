//! Latents to tokens with their positions.

use std::fmt;
use std::sync::Arc;

use parallel::{Collective, ColumnParallelLinear, Shard, Tensor, Weights};

use super::Sd3TransformerConfig;
use crate::{Error, Result};

/// `PatchEmbed`, with a table of positions that is cropped centrally or without one. Both are divided over the ranks by columns and
/// gathered: the table of SD3.5 medium has 384 x 384 positions, a tenth of all weights.
pub(super) struct PatchEmbed {
    proj: ColumnParallelLinear,
    /// `[S, S, D/tp]`
    pos_embed: Option<Tensor>,
    /// `p`
    patch_size: usize,
    group: Arc<dyn Collective>,
}

impl PatchEmbed {
    pub(super) fn load(w: &Weights, config: &Sd3TransformerConfig) -> Result<Self> {
        let (d, s) = (config.inner_dim(), config.pos_embed_max_size);
        let pos_embed = w.get("pos_embed", &[1, s * s, d], Shard::split(2, d))?;
        // A measured table takes no memory as long as it is not reshaped.
        let pos_embed = if w.is_measuring() { pos_embed } else { pos_embed.reshape((s, s, ()))? };
        Ok(Self { pos_embed: Some(pos_embed), ..Self::load_without_positions(w, config)? })
    }

    /// Of what lies on latents that have their positions already.
    pub(super) fn load_without_positions(w: &Weights, config: &Sd3TransformerConfig) -> Result<Self> {
        let (d, p) = (config.inner_dim(), config.patch_size);
        let proj = ColumnParallelLinear::load_kernel(&w.pp("proj"), &[config.in_channels, p, p], &[d])?;
        Ok(Self { proj, pos_embed: None, patch_size: p, group: w.group().clone() })
    }

    /// `[B, C, H, W]` gives `[B, h w, D]` on every rank, and `h, w`.
    pub(super) fn forward(&self, latents: &Tensor) -> Result<(Tensor, [u32; 2])> {
        let (b, c, height, width) = latents.dims4()?;
        let p = self.patch_size;
        let s = self.pos_embed.as_ref().map_or(Ok(usize::MAX), |table| table.dim(0))?;
        let (h, w) = (height / p, width / p);
        if h * p != height || w * p != width || h > s || w > s {
            let reason = format!("{height} x {width} latents are not at most {s} x {s} patches of {p} x {p}");
            return Err(Error::Invalid { field: "hidden_states", reason });
        }
        let windows = latents.reshape((b, c, h, p, w, p))?.permute((0, 2, 4, 1, 3, 5))?; // [B, h, w, C, p, p]
        let mut latent = self.proj.forward(&windows.contiguous()?.reshape((b, h * w, c * p * p))?)?; // [B, h w, D/tp]
        if let Some(table) = &self.pos_embed {
            let cropped = table.narrow(0, (s - h) / 2, h)?.narrow(1, (s - w) / 2, w)?;
            latent = latent.broadcast_add(&cropped.contiguous()?.reshape((1, h * w, ()))?)?;
        }
        Ok((self.group.all_gather(&latent, 2)?, [h as u32, w as u32]))
    }
}

impl fmt::Debug for PatchEmbed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PatchEmbed({:?}, {:?})", self.proj, self.pos_embed.as_ref().map(Tensor::shape))
    }
}
