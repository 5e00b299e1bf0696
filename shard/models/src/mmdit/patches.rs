//! Latents to tokens and back: a token is a square of latents.

use parallel::{ColumnParallelLinear, Device, Tensor, Weights};

use crate::{Error, Result};

/// Longest period of the sinusoids.
const MAX_PERIOD: f64 = 10_000.0;

/// `PatchEmbed`: latents to tokens with their positions. Its columns are divided over the ranks and gathered.
#[derive(Debug)]
pub(crate) struct PatchEmbed {
    proj: ColumnParallelLinear,
    /// `p`
    patch_size: usize,
    /// `None` where positions come in at another place.
    positions: Option<Positions>,
}

/// The places of tokens, which are on a square of `base_size` tokens whatever the size of the picture: `get_2d_sincos_pos_embed`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Positions {
    /// Side of the square.
    pub(crate) base_size: usize,
    /// Further divides the places.
    pub(crate) interpolation_scale: f64,
}

impl PatchEmbed {
    /// Patches of `c` channels and `p x p` latents to hidden states of `d`, a multiple of 4.
    pub(crate) fn load(w: &Weights, [c, p, d]: [usize; 3], positions: Option<Positions>) -> Result<Self> {
        let proj = ColumnParallelLinear::load_kernel(&w.pp("proj"), &[c, p, p], &[d])?;
        Ok(Self { proj, patch_size: p, positions })
    }

    /// `[B, C, H, W]` gives `[B, h w, D]` on every rank, and `h, w` as [`unpatchify`] takes them.
    pub(crate) fn forward(&self, latents: &Tensor) -> Result<(Tensor, Tensor)> {
        let (b, c, height, width) = latents.dims4()?;
        let p = self.patch_size;
        let (h, w) = (height / p, width / p);
        if h * p != height || w * p != width {
            let reason = format!("{height} x {width} latents are not patches of {p} x {p}");
            return Err(Error::Invalid { field: "hidden_states", reason });
        }
        let windows = latents.reshape((b, c, h, p, w, p))?.permute((0, 2, 4, 1, 3, 5))?; // [B, h, w, C, p, p]
        let mut tokens = self.proj.forward_gathered(&windows.contiguous()?.reshape((b, h * w, c * p * p))?)?;
        if let Some(positions) = &self.positions {
            let table = positions.table([h, w], tokens.dim(2)?, tokens.device())?;
            tokens = tokens.broadcast_add(&table.to_dtype(tokens.dtype())?)?;
        }
        Ok((tokens, Tensor::new(&[h as u32, w as u32], &Device::Cpu)?))
    }
}

impl Positions {
    /// `[h w, D]`: sines and cosines of the column, then those of the row.
    fn table(self, [h, w]: [usize; 2], d: usize, device: &Device) -> Result<Tensor> {
        let (rows, columns) = (self.of_side(h, d / 2), self.of_side(w, d / 2));
        let mut table = Vec::with_capacity(h * w * d);
        for row in &rows {
            for column in &columns {
                table.extend_from_slice(column);
                table.extend_from_slice(row);
            }
        }
        Ok(Tensor::from_vec(table, (h * w, d), device)?)
    }

    /// Of the `size` places along one side, `width` numbers each. Places are f32 and angles f64, as in the reference.
    fn of_side(self, size: usize, width: usize) -> Vec<Vec<f32>> {
        let half = width / 2;
        let stretch = (size as f64 / self.base_size as f64) as f32;
        let of_place = |i: usize| {
            let place = f64::from(i as f32 / stretch / self.interpolation_scale as f32);
            let angles = (0..half).map(|k| place / libm::pow(MAX_PERIOD, k as f64 / half as f64));
            let angles: Vec<f64> = angles.collect();
            let sines = angles.iter().map(|angle| libm::sin(*angle) as f32);
            sines.chain(angles.iter().map(|angle| libm::cos(*angle) as f32)).collect()
        };
        (0..size).map(of_place).collect()
    }
}

/// `[B, h w, p p C] -> [B, C, h p, w p]`; `grid` is `h, w`.
pub(crate) fn unpatchify(patches: &Tensor, grid: &Tensor, p: usize) -> Result<Tensor> {
    let (b, tokens, width) = patches.dims3()?;
    let grid = indices(grid)?;
    let [h, w] = *grid else {
        return Err(Error::Invalid { field: "grid", reason: format!("{} numbers for {tokens} tokens", grid.len()) });
    };
    let c = width / (p * p);
    let rows = patches.reshape((b, h, w, p, p, c))?.permute((0, 5, 1, 3, 2, 4))?; // [B, C, h, p, w, p]
    Ok(rows.contiguous()?.reshape((b, c, h * p, w * p))?)
}

/// Small numbers that travel as a tensor.
pub(crate) fn indices(tensor: &Tensor) -> Result<Vec<usize>> {
    Ok(tensor.to_vec1::<u32>()?.into_iter().map(|i| i as usize).collect())
}
