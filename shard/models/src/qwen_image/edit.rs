//! How Qwen-Image-Edit and Qwen-Image-Edit-Plus look at pictures.

use crate::image_io::Picture;
use crate::model_dir::ModelDir;
use crate::{Error, Result};

/// The reference's class of models that edit one picture.
pub(super) const ONE: &str = "QwenImageEditPipeline";
/// Of those that may be given several.
pub(super) const SEVERAL: &str = "QwenImageEditPlusPipeline";
/// Pixels of a picture that is looked at, about: by the autoencoder, and by the text encoder of those that edit one.
pub(crate) const WORKING_AREA: usize = 1024 * 1024;
/// By the text encoder of those that may be given several.
const CONDITION_AREA: usize = 384 * 384;
/// Most pictures that a job brings where it may bring several.
const MOST: u64 = 4;

/// How a model that edits looks at pictures.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Editing {
    /// It may be given several pictures, which its text names by number.
    pub several: bool,
    /// Pixels, about, of a picture that the text encoder reads.
    pub seen: usize,
    /// Pixels, about, of a picture that the autoencoder encodes.
    pub encoded: usize,
}

impl Editing {
    /// That of a model; none: it edits no pictures.
    pub fn of(dir: &ModelDir) -> Option<Self> {
        match dir.pipeline_class() {
            ONE => Some(Self { several: false, seen: WORKING_AREA, encoded: WORKING_AREA }),
            SEVERAL => Some(Self { several: true, seen: CONDITION_AREA, encoded: WORKING_AREA }),
            _ => None,
        }
    }
}
/// Sides of such a picture are multiples of this.
const MULTIPLE: f64 = 32.0;
/// Longest side of such a picture: at one megapixel it is 16 times as long as the other.
const MAX_SIDE: f64 = 4096.0;

impl Editing {
    /// Most pictures that a job brings.
    pub(crate) fn most(self) -> u64 {
        if self.several { MOST } else { 1 }
    }
}

/// `calculate_dimensions`: width and height of about `area` pixels in the shape of `picture`.
///
/// # Errors
/// [`Error::Invalid`] for the field `image` when one of its sides is too long for the other.
pub(super) fn working_size(picture: &Picture, area: usize) -> Result<(usize, usize)> {
    let ratio = picture.width() as f64 / picture.height() as f64;
    let width = (area as f64 * ratio).sqrt();
    let sides = [width, width / ratio].map(|side| (side / MULTIPLE).round_ties_even() * MULTIPLE);
    if sides.iter().all(|side| (MULTIPLE..=MAX_SIDE).contains(side)) {
        let [width, height] = sides.map(|side| side as usize);
        return Ok((width, height));
    }
    let reason = format!("{} x {} pixels: one side is too long for the other", picture.width(), picture.height());
    Err(Error::Invalid { field: "image", reason })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image_io::{PictureLimits, decode_picture};

    /// Pictures, and the reference's own answers.
    const EXPECTED: [((u32, u32), (usize, usize)); 6] = [
        ((64, 64), (1024, 1024)),
        ((90, 60), (1248, 832)),
        ((1920, 1080), (1376, 768)),
        ((480, 640), (896, 1184)),
        ((1600, 100), (4096, 256)),
        ((100, 1500), (256, 3968)),
    ];

    fn picture(width: u32, height: u32) -> Picture {
        let mut bytes = Vec::new();
        let mut encoder = png::Encoder::new(&mut bytes, width, height);
        encoder.set_color(png::ColorType::Grayscale);
        let pixels = vec![0; (width * height) as usize];
        encoder.write_header().unwrap().write_image_data(&pixels).unwrap();
        decode_picture(&bytes, &PictureLimits::default()).unwrap()
    }

    #[test]
    fn a_picture_keeps_its_shape_at_one_megapixel() {
        for ((width, height), expected) in EXPECTED {
            assert_eq!(working_size(&picture(width, height), WORKING_AREA).unwrap(), expected, "{width} x {height}");
        }
        assert_eq!(working_size(&picture(90, 60), 6144).unwrap(), (96, 64));
    }

    #[test]
    fn a_picture_that_is_hardly_more_than_a_line_is_refused() {
        for (width, height) in [(1700, 100), (1, 1000), (8192, 1)] {
            let error = working_size(&picture(width, height), WORKING_AREA).unwrap_err();
            assert!(matches!(error, Error::Invalid { field: "image", .. }), "{error}");
        }
    }
}
