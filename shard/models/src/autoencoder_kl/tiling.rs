//! Working on large pictures in overlapping tiles that are blended where they overlap.
//!
//! Follows `AutoencoderKL._tiled_encode` and `tiled_decode` (those of `AutoencoderKLQwenImage` do the same): the overlap is a
//! quarter of a tile; a tile is blended with the one above it, then with the one to its left, both as blended themselves.

use parallel::Tensor;

use crate::{Error, Result};

/// How large the tiles are.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Tiles {
    /// Side in pixels.
    sample: usize,
    /// Side in latents.
    latent: usize,
}

/// Along one direction, in which the input's tiles become the output's.
struct Grid {
    /// Side of an input tile.
    tile: usize,
    /// From one input tile to the next.
    stride: usize,
    /// How far output tiles are blended.
    blend: usize,
    /// What is kept of an output tile.
    keep: usize,
}

impl Tiles {
    /// Tiles of `sample` pixels a side, for an autoencoder with `scale_factor` pixels per latent.
    pub(crate) fn new(sample: usize, scale_factor: usize) -> Self {
        Self { sample, latent: sample / scale_factor }
    }

    /// Whether `image: [B, C, H, W]` needs more than one tile.
    pub(crate) fn is_larger_image(&self, image: &Tensor) -> Result<bool> {
        let (_, _, h, w) = image.dims4()?;
        Ok(h.max(w) > self.sample)
    }

    /// Whether `latents: [B, C, h, w]` need more than one tile.
    pub(crate) fn is_larger_latent(&self, latents: &Tensor) -> Result<bool> {
        let (_, _, h, w) = latents.dims4()?;
        Ok(h.max(w) > self.latent)
    }

    pub(crate) fn encode(&self, image: &Tensor, f: impl Fn(&Tensor) -> Result<Tensor>) -> Result<Tensor> {
        Grid::new(self.sample, self.latent)?.run(image, f)
    }

    pub(crate) fn decode(&self, latents: &Tensor, f: impl Fn(&Tensor) -> Result<Tensor>) -> Result<Tensor> {
        Grid::new(self.latent, self.sample)?.run(latents, f)
    }
}

impl Grid {
    fn new(tile: usize, output: usize) -> Result<Self> {
        let (stride, blend) = (tile - tile.div_ceil(4), output / 4);
        if stride == 0 || output == 0 {
            return Err(Error::Unsupported { field: "sample_size".into(), value: format!("{} with tiling", tile.max(output)) });
        }
        Ok(Self { tile, stride, blend, keep: output - blend })
    }

    /// `f` of every tile of `x: [B, C, H, W]`, put together.
    fn run(&self, x: &Tensor, f: impl Fn(&Tensor) -> Result<Tensor>) -> Result<Tensor> {
        let (_, _, height, width) = x.dims4()?;
        let mut above: Vec<Tensor> = Vec::new();
        let mut rows = Vec::new();
        for top in (0..height).step_by(self.stride) {
            let band = x.narrow(2, top, self.tile.min(height - top))?;
            let mut row: Vec<Tensor> = Vec::new();
            for left in (0..width).step_by(self.stride) {
                let tile = band.narrow(3, left, self.tile.min(width - left))?.contiguous()?;
                let mut tile = f(&tile)?;
                if let Some(above) = above.get(row.len()) {
                    tile = blend(above, &tile, 2, self.blend)?;
                }
                if let Some(before) = row.last() {
                    tile = blend(before, &tile, 3, self.blend)?;
                }
                row.push(tile);
            }
            let kept = row.iter().map(|tile| self.keep(tile)).collect::<Result<Vec<_>>>()?;
            rows.push(Tensor::cat(&kept, 3)?);
            above = row;
        }
        Ok(Tensor::cat(&rows, 2)?)
    }

    /// The part of an output tile that the next ones do not cover.
    fn keep(&self, tile: &Tensor) -> Result<Tensor> {
        let (_, _, h, w) = tile.dims4()?;
        Ok(tile.narrow(2, 0, h.min(self.keep))?.narrow(3, 0, w.min(self.keep))?)
    }
}

/// `b` with its first `extent` rows (`dim` 2) or columns (3) led over from the last ones of `a`.
fn blend(a: &Tensor, b: &Tensor, dim: usize, extent: usize) -> Result<Tensor> {
    let (len_a, len_b) = (a.dim(dim)?, b.dim(dim)?);
    let extent = extent.min(len_a).min(len_b);
    if extent == 0 {
        return Ok(b.clone());
    }
    let mut shape = [1; 4];
    shape[dim] = extent;
    let ramp = |f: &dyn Fn(f64) -> f64| {
        let weights: Vec<f32> = (0..extent).map(|i| f(i as f64 / extent as f64) as f32).collect();
        Tensor::from_vec(weights, &shape, b.device())?.to_dtype(b.dtype())
    };
    let from_a = a.narrow(dim, len_a - extent, extent)?.broadcast_mul(&ramp(&|t| 1.0 - t)?)?;
    let from_b = b.narrow(dim, 0, extent)?.broadcast_mul(&ramp(&|t| t)?)?;
    let rest = b.narrow(dim, extent, len_b - extent)?;
    Ok(Tensor::cat(&[(from_a + from_b)?, rest], dim)?)
}
