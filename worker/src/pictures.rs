//! Decoded pictures as PNGs.

use bytes::Bytes;
use models::{Payload, image_io};
use proto::v1::{ImageResult, Products, RunTask};
use sha2::{Digest, Sha256};

use crate::blobs::hex;
use crate::{Result, provenance};

/// PNGs, and what is known of each before it is stored. Compresses and hashes: not for tokio's threads.
pub(crate) fn encode(
    run: &RunTask,
    payload: &Payload,
    scheduler: Option<&str>,
    products: Products,
) -> Result<Vec<(Bytes, ImageResult)>> {
    let spec = run.spec.clone().unwrap_or_default();
    let pictures = image_io::to_u8(payload.image()?)?;
    let encoded = pictures.iter().enumerate().map(|(index, picture)| {
        let text = provenance::text(run, &spec, scheduler, products, index);
        let bytes = Bytes::from(image_io::encode_png(picture, &text)?);
        let image = ImageResult {
            blob_id: String::new(),
            sha256: hex(&Sha256::digest(&bytes)),
            width: picture.width as u32,
            height: picture.height as u32,
            media_type: "image/png".into(),
            byte_size: bytes.len() as u64,
        };
        Ok((bytes, image))
    });
    encoded.collect()
}
