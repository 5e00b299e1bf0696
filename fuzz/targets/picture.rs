//! Pictures and masks of anybody: PNG, JPEG, WebP. What is decoded is within the limits, and becomes the network's input.
#![no_main]

use libfuzzer_sys::fuzz_target;
use models::image_io::{PictureLimits, decode_picture, preprocess, preprocess_mask};

const LIMITS: PictureLimits = PictureLimits { max_width: 512, max_height: 512, max_pixels: 1 << 16, max_alloc: 1 << 20 };

fuzz_target!(|bytes: &[u8]| {
    let Ok(picture) = decode_picture(bytes, &LIMITS) else { return };
    // Turned upright, width and height may have changed places.
    assert!(picture.width().max(picture.height()) <= 512 && picture.width() * picture.height() <= 1 << 16);
    let image = preprocess(&picture, 16, 8).expect("a picture");
    let mask = preprocess_mask(&picture, 16, 8).expect("a mask");
    assert_eq!((image.dims(), mask.dims()), (&[1, 3, 8, 16][..], &[1, 1, 8, 16][..]));
});
