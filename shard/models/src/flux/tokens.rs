//! Latents as the transformer's tokens, and back.

use parallel::{Device, Tensor};

use crate::Result;

/// `[B, C, 2h, 2w] -> [B, h w, 4 C]`: a token holds 2 x 2 latents, in the order channel, dy, dx.
pub(super) fn pack_latents(latents: &Tensor) -> Result<Tensor> {
    let (b, c, h, w) = latents.dims4()?;
    let tokens = latents.reshape((b, c, h / 2, 2, w / 2, 2))?.permute((0, 2, 4, 1, 3, 5))?; // [B, h, w, C, 2, 2]
    Ok(tokens.contiguous()?.reshape((b, h / 2 * (w / 2), c * 4))?)
}

/// `[B, h w, 4 C] -> [B, C, 2h, 2w]`.
pub(super) fn unpack_latents(tokens: &Tensor, h: usize, w: usize) -> Result<Tensor> {
    let (b, _, width) = tokens.dims3()?;
    let latents = tokens.reshape((b, h, w, width / 4, 2, 2))?.permute((0, 3, 1, 4, 2, 5))?; // [B, C, h, 2, w, 2]
    Ok(latents.contiguous()?.reshape((b, width / 4, h * 2, w * 2))?)
}

/// Position of every token: (picture, y, x), where the target is picture 0. `[h w, 3]`
pub(super) fn image_ids(picture: usize, h: usize, w: usize) -> Result<Tensor> {
    let ids: Vec<f32> = (0..h).flat_map(|y| (0..w).flat_map(move |x| [picture as f32, y as f32, x as f32])).collect();
    Ok(Tensor::from_vec(ids, (h * w, 3), &Device::Cpu)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unpacking_undoes_packing() {
        let latents = Tensor::arange(0f32, 2.0 * 4.0 * 6.0 * 8.0, &Device::Cpu).unwrap().reshape((2, 4, 6, 8)).unwrap();
        let packed = pack_latents(&latents).unwrap();
        assert_eq!(packed.dims(), [2, 12, 16]);
        // The first token: channel 0's dy, dx first.
        let first = packed.to_vec3::<f32>().unwrap()[0][0][..4].to_vec();
        assert_eq!(first, [0.0, 1.0, 8.0, 9.0]);
        let back = unpack_latents(&packed, 3, 4).unwrap();
        assert_eq!(
            back.flatten_all().unwrap().to_vec1::<f32>().unwrap(),
            latents.flatten_all().unwrap().to_vec1::<f32>().unwrap()
        );
    }
}
