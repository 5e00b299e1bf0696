use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

use super::*;

fn case(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden").join(name)
}

fn case_picture(path: &str) -> Picture {
    decode_picture(&std::fs::read(case(path)).unwrap(), &PictureLimits::default()).unwrap()
}

fn check_equal(got: &Tensor, expected: &Tensor) {
    assert_eq!(got.dims(), expected.dims());
    let values = |t: &Tensor| t.flatten_all().unwrap().to_vec1::<f32>().unwrap();
    assert_eq!(values(got), values(expected));
}

fn recorded(name: &str, tensor: &str) -> Tensor {
    candle_core::safetensors::load(case(name).join("tensors.safetensors"), &Device::Cpu).unwrap().remove(tensor).unwrap()
}

fn pattern(width: usize, height: usize) -> Picture {
    let byte = |i: usize| {
        let (x, y, c) = (i / 3 % width, i / 3 / width, i % 3);
        ((x * 37 + y * 91 + c * 53 + x * y * 7) % 256) as u8
    };
    Picture { width, height, data: (0..width * height * 3).map(byte).collect() }
}

fn hex_sha256(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|b| format!("{b:02x}")).collect()
}

fn png_of(picture: &Picture) -> Vec<u8> {
    let image = RgbImage { width: picture.width, height: picture.height, data: picture.data.clone() };
    encode_png(&image, &[]).unwrap()
}

#[test]
fn an_input_picture_becomes_what_diffusers_gave_its_autoencoder() {
    for name in ["flux_dev_img2img", "flux_dev_inpaint"] {
        let image = preprocess(&case_picture(&format!("{name}/image.png")), 48, 32).unwrap();
        check_equal(&image, &recorded(name, "vae_encode.call0.in"));
    }
}

#[test]
fn a_mask_hides_what_diffusers_hid() {
    let image = preprocess(&case_picture("flux_dev_inpaint/image.png"), 48, 32).unwrap();
    let mask = preprocess_mask(&case_picture("flux_dev_inpaint/mask_image.png"), 48, 32).unwrap();
    let masked = image.broadcast_mul(&(1.0 - mask).unwrap()).unwrap();
    check_equal(&masked, &recorded("flux_dev_inpaint", "vae_encode.call1.in"));
}

#[test]
fn a_resize_equals_pillows_to_the_bit() {
    // sha256 of `Image.resize(size, LANCZOS).tobytes()` of the pattern, Pillow 13.0.0.
    for ([in_w, in_h], [w, h], expected) in [
        ([13, 9], [7, 5], "0e4bbe4c1247f35404fe5d2023caf7ccf0cbf0f6d9479aad36795858c3556a83"),
        ([5, 4], [11, 7], "4ec572887e1f85a51eb89a981c759a307424f71a5e8e1a38988dea6162f43cd8"),
        ([100, 60], [48, 32], "748065876f83c94b8ce1bb4558e3745dfd4ee022fa9a1d38b4e40644f15fd436"),
        ([48, 32], [48, 20], "aca96d0ab95702b6a82a4b7d4cc168a7d24e18d6756e9c2b6552f8f74f7e1752"),
        ([48, 32], [100, 32], "2e8ea036822532415b73b1e1fb9a2a1ed8bfde150530b86485b89ab8d0fd29dd"),
        ([1, 1], [3, 2], "e4db3bfab78ac8fc96f3382ad3679b868884e6d8a569a60afca12278f37b68e9"),
        ([300, 7], [2, 16], "a76367b3290d1ac84e598b0f46bbcd77452c9c686ceeff478870f32a93d7206d"),
    ] {
        let got = resized(&pattern(in_w, in_h), w, h).unwrap();
        assert_eq!(hex_sha256(&got), expected, "{in_w} x {in_h} to {w} x {h}");
    }
}

#[test]
fn a_resized_mask_is_pillows_grey_cut_at_half() {
    let grey = grey_in_unit_range(&pattern(20, 14), 20, 14).unwrap();
    assert_eq!(grey.dims(), [1, 1, 14, 20]);
    let of_first = luma(pattern(20, 14).pixel(0, 0));
    assert_eq!(grey.flatten_all().unwrap().to_vec1::<f32>().unwrap()[0], f32::from(of_first) / 255.0);
    let soft = preprocess_soft_mask(&Picture { width: 3, height: 1, data: [[0; 3], [1; 3], [200; 3]].concat() }, 3, 1).unwrap();
    assert_eq!(soft.flatten_all().unwrap().to_vec1::<f32>().unwrap(), [0.0, 1.0, 1.0]);
    let mask = preprocess_mask(&pattern(20, 14), 16, 16).unwrap();
    let bits: Vec<u8> = mask.flatten_all().unwrap().to_vec1::<f32>().unwrap().into_iter().map(|v| v as u8).collect();
    assert_eq!(hex_sha256(&bits), "21b73d9d9c0bedc560ac47da1a23763faacfcd0fe0b03abe9eb90d6623250e3c");
}

#[test]
fn the_recorded_picture_is_rounded_as_diffusers_rounded_it() {
    let image = recorded("flux_dev_img2img", "image").permute((0, 3, 1, 2)).unwrap();
    let pictures = to_u8(&image).unwrap();
    assert_eq!(pictures.len(), 1);
    assert_eq!(pictures[0].data, case_picture("flux_dev_img2img/image_0.png").data);
}

#[test]
fn a_png_comes_back_with_its_text_in_order_and_the_same_bytes_every_time() {
    let picture = pattern(17, 11);
    let image = RgbImage { width: 17, height: 11, data: picture.data.clone() };
    let text: Vec<(String, String)> =
        [("seed", "7"), ("prompt", "日本 fox"), ("model", "café")].map(|(k, v)| (k.to_owned(), v.to_owned())).into();
    let bytes = encode_png(&image, &text).unwrap();
    assert_eq!(bytes, encode_png(&image, &text).unwrap());
    assert_eq!(decode_picture(&bytes, &PictureLimits::default()).unwrap(), picture);
    let at = |word: &[u8]| bytes.windows(word.len()).position(|w| w == word).unwrap();
    assert!(at(b"tEXtseed") < at(b"iTXtprompt") && at(b"iTXtprompt") < at(b"tEXtmodel"));
    assert!(at(b"tEXtmodel") < at(b"IDAT"));
}

#[test]
fn what_cannot_be_a_png_is_refused() {
    let image = |width, height, len| RgbImage { width, height, data: vec![0; len] };
    for image in [image(0, 1, 0), image(2, 2, 11), image(usize::MAX, usize::MAX, 3)] {
        assert!(matches!(encode_png(&image, &[]), Err(Error::Invalid { field: "image", .. })), "{image:?}");
    }
    for text in [("", "x"), ("a\nb", "x"), ("key", "zero\0byte")] {
        let text = [(text.0.to_owned(), text.1.to_owned())];
        assert!(encode_png(&image(1, 1, 3), &text).is_err(), "{text:?}");
    }
}

/// A PNG of one kilobyte that claims to be 30000 x 30000: a header, and no pixels to speak of.
fn bomb() -> Vec<u8> {
    let mut bytes = png_of(&pattern(4, 4));
    bytes[16..20].copy_from_slice(&30_000u32.to_be_bytes());
    bytes[20..24].copy_from_slice(&30_000u32.to_be_bytes());
    let crc = crc32(&bytes[12..29]);
    bytes[29..33].copy_from_slice(&crc.to_be_bytes());
    bytes
}

fn crc32(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(!0u32, |crc, b| {
        (0..8).fold(crc ^ u32::from(*b), |crc, _| if crc & 1 == 1 { crc >> 1 ^ 0xedb8_8320 } else { crc >> 1 })
    })
}

#[test]
fn a_picture_beyond_the_limits_is_refused_at_its_header() {
    let small = png_of(&pattern(20, 10));
    let limits = PictureLimits::default();
    for (bytes, limits) in [
        (bomb(), limits),
        (bomb(), PictureLimits { max_width: u32::MAX, max_height: u32::MAX, ..limits }),
        (bomb(), PictureLimits { max_width: u32::MAX, max_height: u32::MAX, max_pixels: u64::MAX, ..limits }),
        (small.clone(), PictureLimits { max_width: 19, ..limits }),
        (small.clone(), PictureLimits { max_height: 9, ..limits }),
        (small.clone(), PictureLimits { max_pixels: 199, ..limits }),
        (small.clone(), PictureLimits { max_alloc: 599, ..limits }),
    ] {
        let error = decode_picture(&bytes, &limits).unwrap_err();
        assert!(matches!(&error, Error::Invalid { field: "image", .. }), "{error}");
    }
    let exact = PictureLimits { max_width: 20, max_height: 10, max_pixels: 200, max_alloc: 600 };
    assert!(decode_picture(&small, &exact).is_ok());
}

#[test]
fn damaged_and_foreign_files_are_errors() {
    let good = png_of(&pattern(20, 10));
    for bytes in [&[][..], b"GIF89a\x01\x00\x01\x00", b"<svg/>", &good[..30], &good[..good.len() / 2], b"\xff\xd8\xff\xe0"] {
        let error = decode_picture(bytes, &PictureLimits::default()).unwrap_err();
        assert!(matches!(&error, Error::Invalid { field: "image", .. }), "{error}");
    }
}

#[test]
fn a_size_that_cannot_be_is_refused() {
    let picture = pattern(4, 4);
    for (width, height) in [(0, 4), (4, 0), (usize::MAX, 4)] {
        assert!(preprocess(&picture, width, height).is_err());
    }
}
