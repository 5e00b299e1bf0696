//! Latents as tokens: FLUX and Qwen-Image give their networks 2 x 2 latents at a time.

use parallel::Tensor;

use crate::Result;

/// `[B, C, 2h, 2w] -> [B, h w, 4 C]`: a token holds 2 x 2 latents, in the order channel, dy, dx.
pub(crate) fn pack_latents(latents: &Tensor) -> Result<Tensor> {
    let (b, c, h, w) = latents.dims4()?;
    let tokens = latents.reshape((b, c, h / 2, 2, w / 2, 2))?.permute((0, 2, 4, 1, 3, 5))?; // [B, h, w, C, 2, 2]
    Ok(tokens.contiguous()?.reshape((b, h / 2 * (w / 2), c * 4))?)
}

/// `[B, h w, 4 C] -> [B, C, 2h, 2w]`.
pub(crate) fn unpack_latents(tokens: &Tensor, h: usize, w: usize) -> Result<Tensor> {
    let (b, _, width) = tokens.dims3()?;
    let latents = tokens.reshape((b, h, w, width / 4, 2, 2))?.permute((0, 3, 1, 4, 2, 5))?; // [B, C, h, 2, w, 2]
    Ok(latents.contiguous()?.reshape((b, width / 4, h * 2, w * 2))?)
}

#[cfg(test)]
mod tests {
    use parallel::Device;

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
