//! The EncodeImage and Decode stages: pictures to latents and back.

use parallel::{Tensor, Tensors};

use crate::autoencoder_kl::{AutoencoderKl, Tiling};
use crate::image_io::{self, Picture, PictureLimits};
use crate::stage::{Inputs, Stage, StageEvent, TaskKey, Waiting};
use crate::{Error, Payload, Request, Result};

/// Above this many pixels the autoencoder works in tiles, whose size its configuration gives. The largest of the sizes of "one
/// megapixel" that models are trained at, 1328 x 800, goes in one piece, as in the reference.
const TILING_ABOVE: usize = 1328 * 800;

/// The width and height that a job's picture is encoded at, given the pixels per latent.
pub type EncodedSize = fn(&Request, &Picture, usize) -> (usize, usize);

/// An autoencoder: decodes a task that has latents, encodes one that has pictures.
#[derive(Debug)]
pub struct AutoencoderStage {
    vae: AutoencoderKl,
    limits: PictureLimits,
    size: EncodedSize,
    masked_picture: bool,
    waiting: Waiting,
}

impl AutoencoderStage {
    /// With limits for the pictures it is given, which it encodes at the job's own size.
    pub fn new(vae: AutoencoderKl, limits: PictureLimits) -> Self {
        let size = |request: &Request, _: &Picture, _| (request.width, request.height);
        Self { vae, limits, size, masked_picture: false, waiting: Waiting::default() }
    }

    /// The same, encoding at another size.
    pub fn sized_by(self, size: EncodedSize) -> Self {
        Self { size, ..self }
    }

    /// The same, also encoding the picture with what the mask covers taken out.
    pub fn with_masked_picture(self) -> Self {
        Self { masked_picture: true, ..self }
    }

    fn run(&self, request: &Request, inputs: &Inputs) -> Result<Payload> {
        if inputs.latents.is_some() { self.decode(request, inputs.latents()?) } else { self.encode(request, inputs) }
    }

    /// `image.mean, image.logvar: [1, C, H, W]`; when there is a mask `mask: [1, 1, height, width]` and, if asked for, the
    /// moments of `masked_image`.
    fn encode(&self, request: &Request, inputs: &Inputs) -> Result<Payload> {
        let missing = || Error::Invalid { field: "image", reason: "there is none".into() };
        let picture = image_io::decode_picture(inputs.pictures.image.as_deref().ok_or_else(missing)?, &self.limits)?;
        let (width, height) = (self.size)(request, &picture, self.vae.scale_factor());
        let image = image_io::preprocess(&picture, width, height)?;
        let mut out = Tensors::new();
        let encode = |name: &str, image: &Tensor, out: &mut Tensors| -> Result<()> {
            let moments = self.vae.encode_with(image, tiling(width, height))?;
            out.insert(format!("{name}.mean"), moments.mean);
            out.insert(format!("{name}.logvar"), moments.logvar);
            Ok(())
        };
        encode("image", &image, &mut out)?;
        if let Some(mask) = &inputs.pictures.mask_image {
            let mask = image_io::preprocess_mask(&image_io::decode_picture(mask, &self.limits)?, width, height)?;
            if self.masked_picture {
                encode("masked_image", &image.broadcast_mul(&mask.affine(-1.0, 1.0)?)?, &mut out)?;
            }
            out.insert("mask", mask);
        }
        Ok(Payload::ImageLatents(out))
    }

    /// `latents: [B, C, H, W]` to pictures in 0..1.
    fn decode(&self, request: &Request, latents: &Tensor) -> Result<Payload> {
        let image = self.vae.decode_with(&self.vae.config().unscale(latents)?, tiling(request.width, request.height))?;
        let image = image_io::denormalize(&image)?;
        Ok(Payload::Image(Tensors::new().with("image", image)))
    }
}

fn tiling(width: usize, height: usize) -> Tiling {
    if width * height > TILING_ABOVE { Tiling::On } else { Tiling::Off }
}

impl Stage for AutoencoderStage {
    fn start(&mut self, key: TaskKey, request: Request, inputs: Inputs) {
        self.waiting.push(key, request, inputs);
    }

    fn park(&mut self, key: TaskKey) {
        self.waiting.park(key);
    }

    fn cancel(&mut self, key: TaskKey) {
        self.waiting.cancel(key);
    }

    fn turn(&mut self, on_event: &mut dyn FnMut(StageEvent<'_>)) -> Result<bool> {
        let mut waiting = std::mem::take(&mut self.waiting);
        let more = waiting.turn(on_event, |request, inputs| self.run(request, inputs));
        self.waiting = waiting;
        more
    }
}
