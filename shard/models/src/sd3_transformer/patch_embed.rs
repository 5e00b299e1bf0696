//! Latents to tokens with their positions.

use std::fmt;
use std::sync::Arc;

use parallel::{Collective, ColumnParallelLinear, Shard, Tensor, Weights};

use super::Sd3TransformerConfig;
use crate::{Error, Result};

/// `PatchEmbed` with a table of positions that is cropped centrally. Both are divided over the ranks by columns and gathered:
/// the table of SD3.5 medium has 384 x 384 positions, a tenth of all weights.
pub(super) struct PatchEmbed {
    proj: ColumnParallelLinear,
    /// `[S, S, D/tp]`
    pos_embed: Tensor,
    /// `p`
    patch_size: usize,
    group: Arc<dyn Collective>,
}

impl PatchEmbed {
    pub(super) fn load(w: &Weights, config: &Sd3TransformerConfig) -> Result<Self> {
        let (d, p, s) = (config.inner_dim(), config.patch_size, config.pos_embed_max_size);
        let pos_embed = w.get("pos_embed", &[1, s * s, d], Shard::split(2, d))?;
        Ok(Self {
            proj: ColumnParallelLinear::load_kernel(&w.pp("proj"), &[config.in_channels, p, p], &[d])?,
            // A measured table takes no memory as long as it is not reshaped.
            pos_embed: if w.is_measuring() { pos_embed } else { pos_embed.reshape((s, s, ()))? },
            patch_size: p,
            group: w.group().clone(),
        })
    }

    /// `[B, C, H, W]` gives `[B, h w, D]` on every rank, and `h, w`.
    pub(super) fn forward(&self, latents: &Tensor) -> Result<(Tensor, [u32; 2])> {
        let (b, c, height, width) = latents.dims4()?;
        let (p, s) = (self.patch_size, self.pos_embed.dim(0)?);
        let (h, w) = (height / p, width / p);
        if h * p != height || w * p != width || h > s || w > s {
            let reason = format!("{height} x {width} latents are not at most {s} x {s} patches of {p} x {p}");
            return Err(Error::Invalid { field: "hidden_states", reason });
        }
        let windows = latents.reshape((b, c, h, p, w, p))?.permute((0, 2, 4, 1, 3, 5))?; // [B, h, w, C, p, p]
        let latent = self.proj.forward(&windows.contiguous()?.reshape((b, h * w, c * p * p))?)?; // [B, h w, D/tp]
        let cropped = self.pos_embed.narrow(0, (s - h) / 2, h)?.narrow(1, (s - w) / 2, w)?;
        let cropped = cropped.contiguous()?.reshape((1, h * w, ()))?;
        let embedded = self.group.all_gather(&latent.broadcast_add(&cropped)?, 2)?;
        Ok((embedded, [h as u32, w as u32]))
    }
}

impl fmt::Debug for PatchEmbed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PatchEmbed({:?}, {:?})", self.proj, self.pos_embed.shape())
    }
}
