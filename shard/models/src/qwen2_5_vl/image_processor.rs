//! Pictures as the vision tower takes them.
//!
//! Follows `transformers/models/qwen2_vl/image_processing_qwen2_vl.py` (5.23.0): `Qwen2VLImageProcessor`, whose resize is
//! torchvision's.

use std::path::Path;

use parallel::{Device, Tensor, Tensors};
use serde::Deserialize;

use crate::image_io::{Filter, Picture, resampled};
use crate::model_dir::read_json;
use crate::{Error, Result};

const FILE: &str = "preprocessor_config.json";
/// PIL's number for the only filter this file has.
const BICUBIC: i64 = 3;
/// A picture's longer side may be this many times its shorter one.
const MAX_ASPECT: usize = 200;
/// Largest side of a patch, or of a square of patches, and most frames of a patch that are believed.
const MAX_SIDE: usize = 1 << 10;
/// Most pixels that a configuration may ask for; the published ones ask for an eighth of this.
const MAX_PIXELS: usize = 100 << 20;

/// `preprocessor_config.json`.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(default)]
struct Config {
    patch_size: usize,
    merge_size: usize,
    temporal_patch_size: usize,
    /// Before `size`, in whose place it is.
    min_pixels: Option<usize>,
    max_pixels: Option<usize>,
    size: Size,
    resample: i64,
    rescale_factor: f64,
    image_mean: [f64; 3],
    image_std: [f64; 3],
    do_resize: bool,
    do_rescale: bool,
    do_normalize: bool,
}

/// Both in pixels of the whole picture, whatever they are called.
#[derive(Clone, Debug, PartialEq, Deserialize)]
struct Size {
    shortest_edge: usize,
    longest_edge: usize,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            patch_size: 14,
            merge_size: 2,
            temporal_patch_size: 2,
            min_pixels: None,
            max_pixels: None,
            size: Size { shortest_edge: 56 * 56, longest_edge: 28 * 28 * 1280 },
            resample: BICUBIC,
            rescale_factor: 1.0 / 255.0,
            image_mean: [0.481_454_66, 0.457_827_5, 0.408_210_73],
            image_std: [0.268_629_54, 0.261_302_58, 0.275_777_11],
            do_resize: true,
            do_rescale: true,
            do_normalize: true,
        }
    }
}

/// Resizes a picture to whole squares of patches, and makes its patches.
#[derive(Clone, Debug)]
pub struct ImageProcessor {
    config: Config,
    min_pixels: usize,
    max_pixels: usize,
}

impl ImageProcessor {
    /// Reads `preprocessor_config.json` in `dir`.
    ///
    /// # Errors
    /// When it is not there, or asks for what is not here; the error names the field.
    pub fn load(dir: &Path) -> Result<Self> {
        Self::new(read_json(&dir.join(FILE))?)
    }

    fn new(config: Config) -> Result<Self> {
        let ok = |field: &str, good: bool, value: &dyn std::fmt::Debug| {
            let unsupported = || Error::Unsupported { field: format!("{FILE}: {field}"), value: format!("{value:?}") };
            if good { Ok(()) } else { Err(unsupported()) }
        };
        let side = |n: usize| (1..=MAX_SIDE).contains(&n);
        ok("patch_size", side(config.patch_size), &config.patch_size)?;
        ok("merge_size", side(config.merge_size), &config.merge_size)?;
        ok("temporal_patch_size", side(config.temporal_patch_size), &config.temporal_patch_size)?;
        ok("resample", config.resample == BICUBIC, &config.resample)?;
        ok("do_resize", config.do_resize, &config.do_resize)?;
        ok("do_rescale", config.do_rescale, &config.do_rescale)?;
        ok("do_normalize", config.do_normalize, &config.do_normalize)?;
        ok("rescale_factor", config.rescale_factor.is_normal(), &config.rescale_factor)?;
        ok("image_mean", config.image_mean.iter().all(|v| v.is_finite()), &config.image_mean)?;
        ok("image_std", config.image_std.iter().all(|v| v.is_normal()), &config.image_std)?;
        let min_pixels = config.min_pixels.unwrap_or(config.size.shortest_edge);
        let max_pixels = config.max_pixels.unwrap_or(config.size.longest_edge);
        ok("min_pixels", (1..=max_pixels).contains(&min_pixels), &min_pixels)?;
        ok("max_pixels", max_pixels <= MAX_PIXELS, &max_pixels)?;
        Ok(Self { config, min_pixels, max_pixels })
    }

    /// `pixel_values: [patches, 3 T P P]` and `image_grid_thw: [1, 3]` of a picture, and how many tokens it has in a text.
    ///
    /// # Errors
    /// [`Error::Invalid`] for the field `image` when one side is more than 200 times the other.
    pub fn process(&self, picture: &Picture) -> Result<(Tensors, usize)> {
        let Config { patch_size, merge_size, .. } = self.config;
        let [height, width] = self.smart_resize(picture.height(), picture.width())?;
        let pixels = resampled(picture, [width, height], Filter::Bicubic)?;
        let [rows, columns] = [height, width].map(|side| side / patch_size);
        let patches =
            Tensor::from_vec(self.patchify(&pixels, [rows, columns]), (rows * columns, self.patch_width()), &Device::Cpu)?;
        let grid = Tensor::new(&[[1, rows as i64, columns as i64]], &Device::Cpu)?;
        let tensors = Tensors::new().with("pixel_values", patches).with("image_grid_thw", grid);
        Ok((tensors, rows * columns / (merge_size * merge_size)))
    }

    fn patch_width(&self) -> usize {
        3 * self.config.temporal_patch_size * self.config.patch_size * self.config.patch_size
    }

    /// The nearest size of whole squares of patches, within the bounds, in about the same shape.
    fn smart_resize(&self, height: usize, width: usize) -> Result<[usize; 2]> {
        if height.max(width) > MAX_ASPECT * height.min(width) {
            let reason = format!("{width} x {height} pixels: one side is more than {MAX_ASPECT} times the other");
            return Err(Error::Invalid { field: "image", reason });
        }
        let factor = (self.config.patch_size * self.config.merge_size) as f64;
        let sides = [height as f64, width as f64];
        let area = sides[0] * sides[1];
        let nearest = sides.map(|side| (side / factor).round_ties_even() * factor);
        let resized = if nearest[0] * nearest[1] > self.max_pixels as f64 {
            let beta = (area / self.max_pixels as f64).sqrt();
            sides.map(|side| factor.max((side / beta / factor).floor() * factor))
        } else if nearest[0] * nearest[1] < self.min_pixels as f64 {
            let beta = (self.min_pixels as f64 / area).sqrt();
            sides.map(|side| (side * beta / factor).ceil() * factor)
        } else {
            nearest
        };
        Ok(resized.map(|side| side as usize))
    }

    /// Patches of `rows x columns`, square of patches by square of patches; in each, all of a channel's frames (the picture again
    /// and again), then the next channel's. Normalised as `(x - mean / factor) / (std / factor)` in f32.
    fn patchify(&self, pixels: &[u8], [rows, columns]: [usize; 2]) -> Vec<f32> {
        let Config { patch_size, merge_size, temporal_patch_size, rescale_factor, image_mean, image_std, .. } = self.config;
        let unscaled = |v: [f64; 3]| v.map(|v| v as f32 * (1.0 / rescale_factor) as f32);
        let (mean, std) = (unscaled(image_mean), unscaled(image_std));
        let row_bytes = columns * patch_size * 3;
        let mut values = Vec::with_capacity(rows * columns * self.patch_width());
        let squares = (0..rows / merge_size).flat_map(|y| (0..columns / merge_size).map(move |x| (y, x)));
        let within = |(y, x): (usize, usize)| {
            (0..merge_size * merge_size).map(move |i| (y * merge_size + i / merge_size, x * merge_size + i % merge_size))
        };
        for (row, column) in squares.flat_map(within) {
            for c in 0..3 {
                let begin = values.len();
                for y in row * patch_size..(row + 1) * patch_size {
                    let line = &pixels[y * row_bytes + column * patch_size * 3..][..patch_size * 3];
                    values.extend(line.iter().skip(c).step_by(3).map(|v| (f32::from(*v) - mean[c]) / std[c]));
                }
                let end = values.len();
                (1..temporal_patch_size).for_each(|_| values.extend_from_within(begin..end));
            }
        }
        values
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image_io::{PictureLimits, decode_picture, preprocess};

    fn processor() -> ImageProcessor {
        ImageProcessor::new(Config { min_pixels: Some(3136), max_pixels: Some(12_845_056), ..Config::default() }).unwrap()
    }

    #[test]
    fn sizes_are_the_references() {
        // `smart_resize` with the published bounds: (height, width) and what it gives.
        let cases = [
            ((64, 96), [56, 84]),
            ((1024, 1024), [1036, 1036]),
            ((832, 1248), [840, 1260]),
            ((42, 70), [56, 56]),
            ((10, 10), [56, 56]),
            ((1, 150), [28, 700]),
            ((8000, 6000), [4116, 3080]),
            ((14, 2000), [28, 672]),
            ((5000, 30), [5012, 28]),
        ];
        for ((height, width), expected) in cases {
            assert_eq!(processor().smart_resize(height, width).unwrap(), expected, "{height} x {width}");
        }
        let error = processor().smart_resize(1, 201).unwrap_err();
        assert!(matches!(error, Error::Invalid { field: "image", .. }), "{error}");
    }

    #[test]
    fn a_picture_becomes_the_patches_that_the_reference_recorded_to_the_bit() {
        let case = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden/qwen_edit");
        let picture = decode_picture(&std::fs::read(case.join("image.png")).unwrap(), &PictureLimits::default()).unwrap();
        // The pipeline brings the picture to its working size first.
        let picture = as_picture(&preprocess(&picture, 96, 64).unwrap());
        let processor = ImageProcessor::load(&case.join("pipeline/processor")).unwrap();
        let (got, tokens) = processor.process(&picture).unwrap();
        let recorded = candle_core::safetensors::load(case.join("tensors.safetensors"), &Device::Cpu).unwrap();
        assert_eq!(tokens, 6);
        let grid = |t: &Tensor| t.to_vec2::<i64>().unwrap();
        assert_eq!(grid(got.get("image_grid_thw").unwrap()), grid(&recorded["text_encoder.call0.image_grid_thw"]));
        let values = |t: &Tensor| t.to_vec2::<f32>().unwrap();
        assert_eq!(values(got.get("pixel_values").unwrap()), values(&recorded["text_encoder.call0.pixel_values"]));
    }

    /// Of `[1, 3, H, W]` in -1..1.
    fn as_picture(x: &Tensor) -> Picture {
        let image = crate::image_io::to_u8(&crate::image_io::denormalize(x).unwrap()).unwrap().remove(0);
        decode_picture(&crate::image_io::encode_png(&image, &[]).unwrap(), &PictureLimits::default()).unwrap()
    }

    #[test]
    fn a_configuration_of_what_is_not_here_is_refused_by_name() {
        let check = |field: &str, config: Config| match ImageProcessor::new(config) {
            Err(Error::Unsupported { field: found, .. }) => assert_eq!(found, format!("{FILE}: {field}")),
            other => panic!("{field}: {other:?}"),
        };
        check("patch_size", Config { patch_size: 0, ..Config::default() });
        check("merge_size", Config { merge_size: usize::MAX, ..Config::default() });
        check("temporal_patch_size", Config { temporal_patch_size: 0, ..Config::default() });
        check("resample", Config { resample: 1, ..Config::default() });
        check("do_resize", Config { do_resize: false, ..Config::default() });
        check("image_std", Config { image_std: [0.0; 3], ..Config::default() });
        check("min_pixels", Config { min_pixels: Some(9), max_pixels: Some(4), ..Config::default() });
        check("max_pixels", Config { max_pixels: Some(usize::MAX), ..Config::default() });
    }
}
