//! Writing pictures.

use parallel::{DType, Tensor};
use png::text_metadata::{ITXtChunk, TEXtChunk};

use super::RgbImage;
use crate::{Error, Result};

/// 8-bit pictures of `image: [B, 3, H, W]`, f32 in 0..1, as `VaeImageProcessor.numpy_to_pil` rounds them (half to even).
pub fn to_u8(image: &Tensor) -> Result<Vec<RgbImage>> {
    let (_, channels, height, width) = image.dims4()?;
    if channels != 3 {
        return Err(Error::Invalid { field: "image", reason: format!("{channels} channels; it should have 3") });
    }
    let pixels = image.permute((0, 2, 3, 1))?.to_dtype(DType::F32)?.contiguous()?; // [B, C, H, W] -> [B, H, W, C]
    let values = pixels.flatten_all()?.to_vec1::<f32>()?;
    // The cast saturates: what is outside 0..1 becomes black or white.
    let byte = |v: &f32| (v * 255.0).round_ties_even() as u8;
    let pictures = values.chunks_exact((3 * height * width).max(1));
    Ok(pictures.map(|p| RgbImage { width, height, data: p.iter().map(byte).collect() }).collect())
}

/// A PNG with `text` (keyword, text) in that order: `tEXt` where Latin-1 can say it, `iTXt` where not. The same picture and
/// text give the same bytes.
pub fn encode_png(image: &RgbImage, text: &[(String, String)]) -> Result<Vec<u8>> {
    let side = |n: usize| u32::try_from(n).ok().filter(|n| (1..=1 << 24).contains(n));
    let (Some(width), Some(height)) = (side(image.width), side(image.height)) else {
        return Err(invalid(format!("{} x {} pixels do not make a PNG", image.width, image.height)));
    };
    let expected = image.width.checked_mul(image.height).and_then(|n| n.checked_mul(3));
    if expected != Some(image.data.len()) {
        return Err(invalid(format!("{} bytes for {width} x {height} pixels", image.data.len())));
    }
    let mut file = Vec::new();
    let mut encoder = png::Encoder::new(&mut file, width, height);
    encoder.set_color(png::ColorType::Rgb);
    encoder.set_depth(png::BitDepth::Eight);
    encoder.set_compression(png::Compression::Balanced);
    let mut writer = encoder.write_header().map_err(failed)?;
    for (keyword, text) in text {
        write_text(&mut writer, keyword, text)?;
    }
    writer.write_image_data(&image.data).map_err(failed)?;
    writer.finish().map_err(failed)?;
    Ok(file)
}

fn write_text(writer: &mut png::Writer<&mut Vec<u8>>, keyword: &str, text: &str) -> Result<()> {
    if !(1..=79).contains(&keyword.len()) || !keyword.chars().all(|c| c.is_ascii_graphic() || c == ' ') {
        return Err(invalid("a text's keyword is not 1 to 79 printable ASCII characters"));
    }
    // A zero byte ends a text.
    if text.contains('\0') {
        return Err(invalid("a text has a zero byte"));
    }
    let latin_1 = text.chars().all(|c| u32::from(c) < 256);
    let written = if latin_1 {
        writer.write_text_chunk(&TEXtChunk::new(keyword, text))
    } else {
        writer.write_text_chunk(&ITXtChunk::new(keyword, text))
    };
    written.map_err(failed)
}

fn failed(e: png::EncodingError) -> Error {
    invalid(e.to_string())
}

fn invalid(reason: impl Into<String>) -> Error {
    Error::Invalid { field: "image", reason: reason.into() }
}
