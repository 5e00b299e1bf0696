//! Pictures in and out: what PIL and diffusers' `VaeImageProcessor` do, bit for bit where that can be.
//!
//! Follows diffusers 0.42.1 `image_processor.py` and Pillow's `Resample.c` and `Convert.c`. Differences: pictures become RGB
//! when they are read (as diffusers' `load_image` makes them), so alpha is dropped before a resize and not after; grey pictures of 16 bits, such as depth
//! maps, lose their low byte, where Pillow makes all above 255 white; JPEG and WebP decoders may differ from Pillow's by rounding.

use parallel::{DType, Device, Tensor};

use crate::{Error, Result};

mod decode;
mod encode;
mod resize;

pub use decode::{PictureLimits, decode_picture};
pub use encode::{encode_png, to_u8};
pub(crate) use resize::Filter;

/// Longest side that [`preprocess`] makes.
const MAX_SIDE: usize = 1 << 14;

/// A picture that came from outside: 8-bit RGB.
#[derive(Clone, PartialEq, Eq)]
pub struct Picture {
    width: usize,
    height: usize,
    /// Rows of `R, G, B`.
    data: Vec<u8>,
}

impl Picture {
    /// Pixels.
    pub fn width(&self) -> usize {
        self.width
    }

    /// Pixels.
    pub fn height(&self) -> usize {
        self.height
    }

    /// Red, green and blue of a pixel, from the top and from the left.
    pub(crate) fn pixel(&self, y: usize, x: usize) -> [u8; 3] {
        let at = 3 * (y * self.width + x);
        [self.data[at], self.data[at + 1], self.data[at + 2]]
    }
}

impl std::fmt::Debug for Picture {
    // Pictures appear in no log.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Picture({} x {})", self.width, self.height)
    }
}

/// A picture on its way out: 8-bit RGB.
#[derive(Clone, PartialEq, Eq)]
pub struct RgbImage {
    /// Pixels.
    pub width: usize,
    /// Pixels.
    pub height: usize,
    /// Rows of `R, G, B`.
    pub data: Vec<u8>,
}

impl std::fmt::Debug for RgbImage {
    // Pictures appear in no log.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "RgbImage({} x {})", self.width, self.height)
    }
}

/// The picture at another size (Lanczos).
pub fn resize(picture: &Picture, width: usize, height: usize) -> Result<Picture> {
    Ok(Picture { width, height, data: resized(picture, width, height)? })
}

/// The autoencoder's input: `[1, 3, height, width]`, f32 in -1..1. Resized (Lanczos) if its size differs.
pub fn preprocess(picture: &Picture, width: usize, height: usize) -> Result<Tensor> {
    let pixels = resized(picture, width, height)?;
    let planes = (0..3).flat_map(|c| pixels.iter().skip(c).step_by(3)); // [H, W, C] -> [C, H, W]
    let values: Vec<f32> = planes.map(|v| 2.0 * (f32::from(*v) / 255.0) - 1.0).collect();
    Ok(Tensor::from_vec(values, (1, 3, height, width), &Device::Cpu)?)
}

/// What a control network is given: `[1, 3, height, width]`, f32 in 0..1. Resized (Lanczos) if its size differs.
pub fn in_unit_range(picture: &Picture, width: usize, height: usize) -> Result<Tensor> {
    let pixels = resized(picture, width, height)?;
    let planes = (0..3).flat_map(|c| pixels.iter().skip(c).step_by(3)); // [H, W, C] -> [C, H, W]
    let values: Vec<f32> = planes.map(|v| f32::from(*v) / 255.0).collect();
    Ok(Tensor::from_vec(values, (1, 3, height, width), &Device::Cpu)?)
}

/// As [`in_unit_range`], of a grey picture: `[1, 1, height, width]`.
pub fn grey_in_unit_range(picture: &Picture, width: usize, height: usize) -> Result<Tensor> {
    let grey = picture.data.as_chunks::<3>().0.iter().flat_map(|rgb| [luma(*rgb); 3]).collect();
    Ok(in_unit_range(&Picture { data: grey, ..*picture }, width, height)?.narrow(1, 0, 1)?.contiguous()?)
}

/// A mask: `[1, 1, height, width]`, f32, 1 where the picture is to be made anew (at least half white). Resized (Lanczos) if
/// its size differs.
pub fn preprocess_mask(picture: &Picture, width: usize, height: usize) -> Result<Tensor> {
    mask(picture, [width, height], |luma| f32::from(luma) / 255.0 >= 0.5)
}

/// The same where all counts that is not black, such as the soft edge of a stroke: LaMa's authors' `mask > 0`.
pub fn preprocess_soft_mask(picture: &Picture, width: usize, height: usize) -> Result<Tensor> {
    mask(picture, [width, height], |luma| luma > 0)
}

fn mask(picture: &Picture, [width, height]: [usize; 2], is_covered: impl Fn(u8) -> bool) -> Result<Tensor> {
    let pixels = resized(picture, width, height)?;
    let values: Vec<f32> = pixels.as_chunks::<3>().0.iter().map(|rgb| f32::from(u8::from(is_covered(luma(*rgb))))).collect();
    Ok(Tensor::from_vec(values, (1, 1, height, width), &Device::Cpu)?)
}

/// The decoder's output, about -1..1, as a picture in 0..1 (what [`to_u8`] takes).
pub fn denormalize(image: &Tensor) -> Result<Tensor> {
    Ok(image.to_dtype(DType::F32)?.affine(0.5, 0.5)?.clamp(0f32, 1f32)?)
}

/// PIL's conversion of RGB to `L` (ITU-R 601-2 luma).
fn luma([r, g, b]: [u8; 3]) -> u8 {
    let [r, g, b] = [r, g, b].map(u32::from);
    // The weights add to 1 << 16, so this is at most 255.
    ((r * 19595 + g * 38470 + b * 7471 + 0x8000) >> 16) as u8
}

fn resized(picture: &Picture, width: usize, height: usize) -> Result<Vec<u8>> {
    resampled(picture, [width, height], Filter::Lanczos)
}

/// Rows of `R, G, B`, resized if the size differs.
pub(crate) fn resampled(picture: &Picture, [width, height]: [usize; 2], filter: Filter) -> Result<Vec<u8>> {
    for (field, side) in [("width", width), ("height", height)] {
        if !(1..=MAX_SIDE).contains(&side) {
            return Err(Error::Invalid { field, reason: format!("{side} is not between 1 and {MAX_SIDE}") });
        }
    }
    if (picture.width, picture.height) == (width, height) {
        return Ok(picture.data.clone());
    }
    Ok(resize::resize(&picture.data, [picture.width, picture.height], [width, height], filter))
}

#[cfg(test)]
mod tests;
