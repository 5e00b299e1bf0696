//! Reading pictures that came from anybody.

use std::io::Cursor;

use image::{ColorType, DynamicImage, ImageDecoder, ImageFormat, ImageReader, Limits};

use super::Picture;
use crate::{Error, Result};

/// Bytes that one byte of deflate can stand for at most: 258 by two bits.
const MOST_DEFLATED: u64 = 1032;

/// What a picture may cost, checked on its header, before anything is decoded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PictureLimits {
    /// Pixels.
    pub max_width: u32,
    /// Pixels.
    pub max_height: u32,
    /// Width times height.
    pub max_pixels: u64,
    /// Bytes of the decoded picture, in the file's own depth.
    pub max_alloc: u64,
}

impl Default for PictureLimits {
    /// Room for what a phone takes.
    fn default() -> Self {
        Self { max_width: 8192, max_height: 8192, max_pixels: 1 << 25, max_alloc: 1 << 28 }
    }
}

/// Reads a PNG, JPEG or WebP as PIL's `convert("RGB")` has it: alpha dropped, upright by its EXIF orientation.
///
/// # Errors
/// `Invalid` with the field `image`: another format, a damaged file, or one beyond `limits`.
pub fn decode_picture(bytes: &[u8], limits: &PictureLimits) -> Result<Picture> {
    let mut reader = ImageReader::new(Cursor::new(bytes)).with_guessed_format().map_err(|e| invalid(e.to_string()))?;
    let format = reader.format();
    if !matches!(format, Some(ImageFormat::Png | ImageFormat::Jpeg | ImageFormat::WebP)) {
        return Err(invalid("it is not a PNG, JPEG or WebP picture"));
    }
    let mut crate_limits = Limits::default();
    crate_limits.max_image_width = Some(limits.max_width);
    crate_limits.max_image_height = Some(limits.max_height);
    crate_limits.max_alloc = Some(limits.max_alloc);
    reader.limits(crate_limits);
    let mut decoder = reader.into_decoder().map_err(|e| invalid(e.to_string()))?;
    check(&decoder, limits)?;
    let (held, file) = (decoder.total_bytes(), bytes.len() as u64);
    if format == Some(ImageFormat::Png) && held > file.saturating_mul(MOST_DEFLATED) {
        return Err(invalid(format!("{held} bytes when decoded, which no PNG of {file} bytes can hold")));
    }
    // A file without EXIF, or with damaged EXIF, is taken as it lies.
    let orientation = decoder.orientation().ok();
    let mut image = DynamicImage::from_decoder(decoder).map_err(|e| invalid(e.to_string()))?;
    if let Some(orientation) = orientation {
        image.apply_orientation(orientation);
    }
    let (width, height) = (image.width() as usize, image.height() as usize);
    Ok(Picture { width, height, data: rgb(image) })
}

fn check(decoder: &impl ImageDecoder, limits: &PictureLimits) -> Result<()> {
    let (width, height) = decoder.dimensions();
    if width == 0 || height == 0 {
        return Err(invalid("it is empty"));
    }
    if width > limits.max_width || height > limits.max_height {
        let (w, h) = (limits.max_width, limits.max_height);
        return Err(invalid(format!("{width} x {height} pixels; the limit is {w} x {h}")));
    }
    let pixels = u64::from(width) * u64::from(height);
    if pixels > limits.max_pixels {
        return Err(invalid(format!("{pixels} pixels; the limit is {}", limits.max_pixels)));
    }
    let bytes = decoder.total_bytes();
    if bytes > limits.max_alloc {
        return Err(invalid(format!("{bytes} bytes when decoded; the limit is {}", limits.max_alloc)));
    }
    Ok(())
}

/// 16-bit channels lose their low byte, as in PIL (but for grey ones, see [`super`]); the rest is the crate's.
fn rgb(image: DynamicImage) -> Vec<u8> {
    match image.color() {
        ColorType::L16 | ColorType::La16 | ColorType::Rgb16 | ColorType::Rgba16 => {
            image.into_rgb16().into_raw().into_iter().map(|v| (v >> 8) as u8).collect()
        }
        _ => image.into_rgb8().into_raw(),
    }
}

fn invalid(reason: impl Into<String>) -> Error {
    Error::Invalid { field: "image", reason: reason.into() }
}
