//! FLUX.1 Fill: what a mask covers is drawn anew. The network sees the rest of the picture, and the mask, beside each token.
//!
//! Follows diffusers 0.42.1 `pipelines/flux/pipeline_flux_fill.py`.

use parallel::Tensor;

use crate::Result;
use crate::autoencoder_kl::AutoencoderKlConfig;
use crate::packing::pack_latents;

/// Channels beside a token's own: the masked picture's latents and the mask's pixels, 2 x 2 of each packed.
pub(super) fn channels(vae: &AutoencoderKlConfig) -> usize {
    4 * (vae.latent_channels + vae.scale_factor().pow(2))
}

/// A mask at full size as channels of the latents (each has the `factor` x `factor` pixels that it covers), packed.
/// `[1, 1, h f, w f] -> [1, f f, h, w] -> [1, h/2 w/2, 4 f f]`
pub(super) fn pack_mask(mask: &Tensor, factor: usize) -> Result<Tensor> {
    let (_, _, height, width) = mask.dims4()?;
    let (h, w) = (height / factor, width / factor);
    let pixels = mask.reshape((1, h, factor, w, factor))?.permute((0, 2, 4, 1, 3))?; // [1, f, f, h, w]
    pack_latents(&pixels.contiguous()?.reshape((1, factor * factor, h, w))?)
}

#[cfg(test)]
mod tests {
    use parallel::Device;

    use super::*;

    #[test]
    fn a_token_has_the_mask_of_its_pixels_by_their_place_within_a_latent() {
        // Pixels numbered along rows; a latent covers 2 x 2 of them, a token 2 x 2 latents.
        let mask = Tensor::arange(0f32, 32.0, &Device::Cpu).unwrap().reshape((1, 1, 4, 8)).unwrap();
        let packed = pack_mask(&mask, 2).unwrap().to_vec3::<f32>().unwrap();
        assert_eq!(packed[0].len(), 2);
        // For each place (y, x) within a latent: the token's four latents.
        let first = [0., 2., 16., 18., 1., 3., 17., 19., 8., 10., 24., 26., 9., 11., 25., 27.];
        assert_eq!(packed[0][0], first);
        assert_eq!(packed[0][1], first.map(|v| v + 4.0));
    }
}
