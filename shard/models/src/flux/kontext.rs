//! FLUX.1 Kontext: a picture is edited by being looked at. Its tokens follow those of the picture that is drawn.
//!
//! Paper: <https://arxiv.org/abs/2506.15742>. Follows diffusers 0.42.1 `pipelines/flux/pipeline_flux_kontext.py`. Differences: a
//! job is drawn at the size it asks for, as by the reference with `max_area` = width * height.

use parallel::Tensor;

use super::denoiser::image_ids;
use crate::image_io::Picture;
use crate::{Request, Result};

/// Width and height of the pictures that the network was trained to look at.
const PREFERRED_KONTEXT_RESOLUTIONS: [(usize, usize); 17] = [
    (672, 1568),
    (688, 1504),
    (720, 1456),
    (752, 1392),
    (800, 1328),
    (832, 1248),
    (880, 1184),
    (944, 1104),
    (1024, 1024),
    (1104, 944),
    (1184, 880),
    (1248, 832),
    (1328, 800),
    (1392, 752),
    (1456, 720),
    (1504, 688),
    (1568, 672),
];

/// Width and height that a reference picture is brought to before it is encoded: of the preferred resolutions the nearest in
/// aspect. `factor`: pixels per latent.
pub fn reference_size(request: &Request, picture: &Picture, factor: usize) -> Result<(usize, usize)> {
    let (width, height) = own_size(request, picture, factor)?;
    let aspect = width as f64 / height as f64;
    let distance = |(w, h): (usize, usize)| (aspect - w as f64 / h as f64).abs();
    // Widths grow, so that of two that are equally near the first is the narrower one, as the reference has it.
    let nearest = PREFERRED_KONTEXT_RESOLUTIONS.into_iter().min_by(|a, b| distance(*a).total_cmp(&distance(*b)));
    let (width, height) = nearest.unwrap_or((width, height));
    Ok((whole_tokens(width, factor), whole_tokens(height, factor)))
}

/// The same without the preference (the reference's `_auto_resize=False`): the picture's own size in whole tokens.
pub fn own_size(_request: &Request, picture: &Picture, factor: usize) -> Result<(usize, usize)> {
    Ok((whole_tokens(picture.width(), factor), whole_tokens(picture.height(), factor)))
}

/// The longest multiple of a token's side within `pixels`; one token at least.
fn whole_tokens(pixels: usize, factor: usize) -> usize {
    let side = 2 * factor;
    (pixels / side).max(1) * side
}

/// Positions of a reference picture's tokens: as the target's, in another picture. `[1, C, 2h, 2w] -> [h w, 3]`
pub(super) fn reference_ids(latents: &Tensor) -> Result<Tensor> {
    let (_, _, height, width) = latents.dims4()?;
    image_ids(1, height / 2, width / 2)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image_io::{PictureLimits, decode_picture};

    fn picture(width: u32, height: u32) -> Picture {
        let mut bytes = Vec::new();
        let mut encoder = png::Encoder::new(&mut bytes, width, height);
        encoder.set_color(png::ColorType::Grayscale);
        let pixels = vec![0; (width * height) as usize];
        encoder.write_header().unwrap().write_image_data(&pixels).unwrap();
        decode_picture(&bytes, &PictureLimits::default()).unwrap()
    }

    #[test]
    fn a_reference_picture_gets_the_preferred_size_nearest_in_aspect() {
        // The reference's own answers: min((abs(aspect - w / h), w, h) ...) over the whole multiples of 16.
        let cases = [
            ((37, 37), (1024, 1024)),
            ((640, 480), (1184, 880)),
            ((480, 640), (880, 1184)),
            ((1920, 1080), (1392, 752)),
            ((3000, 100), (1568, 672)),
            ((100, 3000), (672, 1568)),
            ((15, 15), (1024, 1024)),
        ];
        for ((width, height), expected) in cases {
            assert_eq!(reference_size(&Request::default(), &picture(width, height), 8).unwrap(), expected, "{width} x {height}");
        }
    }

    #[test]
    fn without_preference_a_picture_keeps_its_size_in_whole_tokens() {
        let own = |width, height, factor| own_size(&Request::default(), &picture(width, height), factor).unwrap();
        assert_eq!((own(37, 41, 2), own(640, 487, 8), own(5, 40, 8)), ((36, 40), (640, 480), (16, 32)));
    }
}
