//! The EncodeImage and Decode stages: pictures to latents and back.

use parallel::{Tensor, Tensors};

use crate::autoencoder_kl::{AutoencoderKl, Moments, Tiling};
use crate::autoencoder_kl_qwen::AutoencoderKlQwenImage;
use crate::control::conditions::{ENCODED, of_control};
use crate::image_io::{self, Picture, PictureLimits};
use crate::stage::{Inputs, OneAtATime, Waiting};
use crate::{Error, Payload, Request, Result};

/// Pixels that `AutoencoderKL` works on in one piece, as the reference does: the largest of the sizes of "one megapixel" that
/// models are trained at, 1328 x 800.
const LARGEST_PIECE: usize = 1328 * 800;
/// The same for Qwen-Image's, whose models draw 1328 x 1328, and look at pictures of up to 1.12 megapixels. The finest layers
/// are narrower: it takes no more memory.
const LARGEST_PIECE_OF_QWEN: usize = 1328 * 1328;

/// What the stage asks of a network.
pub trait Autoencoder: Send + std::fmt::Debug {
    /// `image: [B, 3, H, W]`, in -1..1, gives the distribution of its latents, `[B, C, H/f, W/f]`, not scaled.
    fn encode(&self, image: &Tensor, tiling: Tiling) -> Result<Moments>;
    /// Latents as the denoiser leaves them, `[B, C, h, w]`, give `[B, 3, h f, w f]`, about -1..1.
    fn decode(&self, latents: &Tensor, tiling: Tiling) -> Result<Tensor>;
    /// `f`: pixels per latent, along a side.
    fn scale_factor(&self) -> usize;
    /// Pixels of the largest picture that is worked on in one piece; a larger one is in tiles, whose size the network gives.
    fn largest_piece(&self) -> usize;
}

impl Autoencoder for AutoencoderKl {
    fn encode(&self, image: &Tensor, tiling: Tiling) -> Result<Moments> {
        self.encode_with(image, tiling)
    }

    fn decode(&self, latents: &Tensor, tiling: Tiling) -> Result<Tensor> {
        self.decode_with(&self.config().unscale(latents)?, tiling)
    }

    fn scale_factor(&self) -> usize {
        self.config().scale_factor()
    }

    fn largest_piece(&self) -> usize {
        LARGEST_PIECE
    }
}

impl Autoencoder for AutoencoderKlQwenImage {
    fn encode(&self, image: &Tensor, tiling: Tiling) -> Result<Moments> {
        self.encode_with(image, tiling)
    }

    fn decode(&self, latents: &Tensor, tiling: Tiling) -> Result<Tensor> {
        self.decode_with(&self.config().unscale(latents)?, tiling)
    }

    fn scale_factor(&self) -> usize {
        self.config().scale_factor()
    }

    fn largest_piece(&self) -> usize {
        LARGEST_PIECE_OF_QWEN
    }
}

/// The width and height that a job's picture is encoded at, given the pixels per latent.
type EncodedSize = dyn Fn(&Request, &Picture, usize) -> Result<(usize, usize)> + Send;

/// Decodes a task that has latents, encodes one that has pictures.
pub struct AutoencoderStage {
    vae: Box<dyn Autoencoder>,
    limits: PictureLimits,
    size: Box<EncodedSize>,
    masked_picture: bool,
    waiting: Waiting,
}

impl AutoencoderStage {
    /// With limits for the pictures it is given, which it encodes at the job's own size.
    pub fn new(vae: impl Autoencoder + 'static, limits: PictureLimits) -> Self {
        let size = |request: &Request, _: &Picture, _: usize| Ok((request.width, request.height));
        Self { vae: Box::new(vae), limits, size: Box::new(size), masked_picture: false, waiting: Waiting::default() }
    }

    /// The same, encoding at another size.
    pub fn sized_by(self, size: impl Fn(&Request, &Picture, usize) -> Result<(usize, usize)> + Send + 'static) -> Self {
        Self { size: Box::new(size), ..self }
    }

    /// The same, also encoding the picture with what the mask covers taken out.
    pub fn with_masked_picture(self) -> Self {
        Self { masked_picture: true, ..self }
    }

    fn run(&self, request: &Request, inputs: &Inputs) -> Result<Payload> {
        if inputs.latents.is_some() { self.decode(inputs.latents()?) } else { self.encode(request, inputs) }
    }

    /// Of what the job has: `control.k.mean, control.k.logvar: [1, C, H, W]` of each control picture, and those of the picture that it starts from,
    /// see [`Self::encode_image`]; `image.k.mean, image.k.logvar` of the k-th picture behind that.
    fn encode(&self, request: &Request, inputs: &Inputs) -> Result<Payload> {
        let mut out = Tensors::new();
        for (k, control) in inputs.pictures.controls.iter().enumerate() {
            let picture = image_io::decode_picture(control, &self.limits).map_err(|error| of_control(k, error))?;
            let image = image_io::preprocess(&picture, request.width, request.height)?;
            self.moments(&format!("{ENCODED}.{k}"), &image, &mut out)?;
        }
        match &inputs.pictures.image {
            Some(image) => {
                self.encode_image(request, image, inputs.pictures.mask_image.as_deref(), &mut out)?;
                for (k, more) in (1..).zip(&inputs.pictures.more) {
                    let picture = self.picture(request, more).map_err(|error| of_more(k, error))?;
                    self.moments(&image_name(k), &picture, &mut out)?;
                }
            }
            None if out.is_empty() => return Err(Error::Invalid { field: "image", reason: "there is none".into() }),
            None => {}
        }
        Ok(Payload::ImageLatents(out))
    }

    /// Puts the distribution of a picture's latents, `[1, C, H, W]`, under its name.
    fn moments(&self, name: &str, image: &Tensor, out: &mut Tensors) -> Result<()> {
        let (_, _, height, width) = image.dims4()?;
        let moments = self.vae.encode(image, self.tiling(width, height))?;
        out.insert(format!("{name}.mean"), moments.mean);
        out.insert(format!("{name}.logvar"), moments.logvar);
        Ok(())
    }

    /// `image.mean, image.logvar: [1, C, H, W]`; when there is a mask `mask: [1, 1, height, width]` and, if asked for, the
    /// moments of `masked_image`.
    fn encode_image(&self, request: &Request, image: &[u8], mask: Option<&[u8]>, out: &mut Tensors) -> Result<()> {
        let image = self.picture(request, image)?;
        self.moments(&image_name(0), &image, out)?;
        if let Some(mask) = mask {
            let (_, _, height, width) = image.dims4()?;
            let mask = image_io::decode_picture(mask, &self.limits).map_err(of_mask)?;
            let mask = image_io::preprocess_mask(&mask, width, height)?;
            if self.masked_picture {
                self.moments("masked_image", &image.broadcast_mul(&mask.affine(-1.0, 1.0)?)?, out)?;
            }
            out.insert("mask", mask);
        }
        Ok(())
    }

    /// A picture at the size that it is encoded at, `[1, 3, H, W]`.
    fn picture(&self, request: &Request, image: &[u8]) -> Result<Tensor> {
        let picture = image_io::decode_picture(image, &self.limits)?;
        let (width, height) = (self.size)(request, &picture, self.vae.scale_factor())?;
        image_io::preprocess(&picture, width, height)
    }

    fn tiling(&self, width: usize, height: usize) -> Tiling {
        if width * height > self.vae.largest_piece() { Tiling::On } else { Tiling::Off }
    }

    /// `latents: [B, C, H, W]` to pictures in 0..1.
    fn decode(&self, latents: &Tensor) -> Result<Payload> {
        let (_, _, height, width) = latents.dims4()?;
        let factor = self.vae.scale_factor();
        let image = self.vae.decode(latents, self.tiling(width * factor, height * factor))?;
        let image = image_io::denormalize(&image)?;
        Ok(Payload::Image(Tensors::new().with("image", image)))
    }
}

/// What the moments of a job's k-th picture are called: `image`, and then by number.
pub(crate) fn image_name(k: usize) -> String {
    if k == 0 { "image".into() } else { format!("image.{k}") }
}

/// What is wrong with the k-th picture behind the first is wrong with that field.
pub(crate) fn of_more(k: usize, error: Error) -> Error {
    match error {
        Error::Invalid { reason, .. } => {
            Error::Invalid { field: "more_images", reason: format!("of more_images[{}]: {reason}", k - 1) }
        }
        other => other,
    }
}

/// What is wrong with a mask is wrong with that field.
fn of_mask(error: Error) -> Error {
    match error {
        Error::Invalid { reason, .. } => Error::Invalid { field: "mask_image", reason },
        other => other,
    }
}

impl OneAtATime for AutoencoderStage {
    fn waiting(&mut self) -> &mut Waiting {
        &mut self.waiting
    }

    fn do_task(&mut self, request: &Request, inputs: &Inputs) -> Result<Payload> {
        self.run(request, inputs)
    }
}

impl std::fmt::Debug for AutoencoderStage {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "AutoencoderStage({:?})", self.vae)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Sizes that Qwen-Image's model card gives, 16 : 9 to 1 : 1.
    const PUBLISHED: [(usize, usize); 4] = [(1328, 1328), (1664, 928), (1472, 1104), (1584, 1056)];

    #[test]
    fn qwen_pictures_of_the_sizes_it_is_made_for_are_worked_on_in_one_piece() {
        for (width, height) in PUBLISHED {
            assert!(width * height <= LARGEST_PIECE_OF_QWEN, "{width} x {height}");
        }
        // What editing looks at: sides about those of a megapixel, rounded to multiples of 32, up to 4096 and 256.
        let area = crate::qwen_image::WORKING_AREA;
        let rounded_up = (1..=16).map(|ratio| {
            let width = (area as f64 * f64::from(ratio)).sqrt();
            (width + 16.0) * (width / f64::from(ratio) + 16.0)
        });
        assert!(rounded_up.fold(0.0, f64::max) <= LARGEST_PIECE_OF_QWEN as f64);
    }
}
