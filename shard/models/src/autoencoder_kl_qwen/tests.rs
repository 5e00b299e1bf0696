use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;

use parallel::{Device, Solo};

use super::*;

fn recorded() -> (AutoencoderKlQwenImageConfig, HashMap<String, Tensor>) {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden/vae_qwenimage/model");
    let config = serde_json::from_slice(&std::fs::read(dir.join("config.json")).unwrap()).unwrap();
    let file = dir.join("diffusion_pytorch_model.safetensors");
    (config, candle_core::safetensors::load(file, &Device::Cpu).unwrap())
}

fn open(tensors: &HashMap<String, Tensor>) -> (tempfile::TempDir, Weights) {
    let dir = tempfile::tempdir().unwrap();
    candle_core::safetensors::save(tensors, dir.path().join("diffusion_pytorch_model.safetensors")).unwrap();
    let w = Weights::open(dir.path(), Arc::new(Solo), DType::F32, &Device::Cpu).unwrap();
    (dir, w)
}

fn load(config: &AutoencoderKlQwenImageConfig, tensors: &HashMap<String, Tensor>) -> Result<AutoencoderKlQwenImage> {
    AutoencoderKlQwenImage::load(&open(tensors).1, config)
}

/// `[1, channels, height, width]` of numbers in -1..1.
fn numbers(channels: usize, height: usize, width: usize) -> Tensor {
    let values: Vec<f32> = (0..channels * height * width).map(|i| (i * 37 % 101) as f32 / 50.0 - 1.0).collect();
    Tensor::from_vec(values, (1, channels, height, width), &Device::Cpu).unwrap()
}

fn values(x: &Tensor) -> Vec<f32> {
    x.flatten_all().unwrap().to_vec1().unwrap()
}

/// Two tiles side by side, by hand: the first as it is, then led over to the second along the overlap.
fn blended(first: &Tensor, second: &Tensor, extent: usize) -> Vec<f32> {
    let width = first.dim(3).unwrap();
    let overlap = |t: &Tensor, at: usize| t.narrow(3, at, extent).unwrap();
    let ramp: Vec<f32> = (0..extent).map(|i| i as f32 / extent as f32).collect();
    let ramp = Tensor::from_vec(ramp, (1, 1, 1, extent), &Device::Cpu).unwrap();
    let from_first = overlap(first, width - extent).broadcast_mul(&ramp.affine(-1.0, 1.0).unwrap()).unwrap();
    let from_second = overlap(second, 0).broadcast_mul(&ramp).unwrap();
    let rest = second.narrow(3, extent, second.dim(3).unwrap() - extent).unwrap();
    let kept = first.narrow(3, 0, width - extent).unwrap();
    values(&Tensor::cat(&[kept, (from_first + from_second).unwrap(), rest], 3).unwrap())
}

fn close(a: &[f32], b: &[f32]) {
    assert_eq!(a.len(), b.len());
    assert!(a.iter().zip(b).all(|(a, b)| (a - b).abs() < 1e-5));
}

#[test]
fn large_pictures_are_worked_on_in_tiles_of_256_that_overlap_by_64() {
    let (config, tensors) = recorded();
    let vae = load(&config, &tensors).unwrap();
    let f = config.scale_factor();
    let image = numbers(3, 2 * f, 320);
    let tile = |x: &Tensor, at: usize, width: usize| x.narrow(3, at, width).unwrap().contiguous().unwrap();
    let mean = |x: &Tensor| vae.encode(x).unwrap().mean;
    let by_hand = blended(&mean(&tile(&image, 0, 256)), &mean(&tile(&image, 192, 128)), 64 / f);
    close(&values(&vae.encode_with(&image, Tiling::On).unwrap().mean), &by_hand);
    assert_ne!(values(&mean(&image)), by_hand);

    let latents = numbers(config.z_dim, 2, 320 / f);
    let decode = |x: &Tensor| vae.decode_raw(x, &mut |_, _| {}).unwrap();
    let by_hand = blended(&decode(&tile(&latents, 0, 256 / f)), &decode(&tile(&latents, 192 / f, 128 / f)), 64);
    close(&values(&vae.decode_with(&latents, Tiling::On).unwrap()), &by_hand);
    let small = tile(&latents, 0, 256 / f);
    assert_eq!(values(&vae.decode_with(&small, Tiling::On).unwrap()), values(&vae.decode(&small).unwrap()));
}

#[test]
fn only_what_one_picture_needs_is_read() {
    let (config, tensors) = recorded();
    let (_dir, w) = open(&tensors);
    AutoencoderKlQwenImage::load(&w, &config).unwrap();
    let needed = |(name, t): (&String, &Tensor)| match t.dims() {
        _ if name.contains("time_conv") => 0,
        [c_out, c_in, _, height, width] => c_out * c_in * height * width,
        // A kernel for pictures of twice the size is held as four of 2 by 2.
        [c_out, c_in, 3, 3] if name.contains("upsamplers") => c_out * c_in * 16,
        _ => t.elem_count(),
    };
    let expected: usize = tensors.iter().map(needed).sum();
    assert_eq!(w.bytes_held(), 4 * expected as u64);
    assert!(expected * 2 < tensors.values().map(Tensor::elem_count).sum());

    let measured = open(&tensors);
    let measured = measured.1.measuring();
    AutoencoderKlQwenImage::load(&measured, &config).unwrap();
    assert_eq!(measured.bytes_held(), w.bytes_held());
}

#[test]
fn a_tensor_too_many_or_too_few_is_an_error() {
    let (config, mut tensors) = recorded();
    // This step is in space alone.
    tensors.insert("encoder.down_blocks.1.time_conv.bias".into(), numbers(1, 1, 1));
    assert!(matches!(load(&config, &tensors), Err(Error::Parallel(parallel::Error::UnusedTensors { .. }))));
    tensors.remove("encoder.down_blocks.1.time_conv.bias");
    tensors.remove("decoder.conv_in.bias");
    assert!(matches!(load(&config, &tensors), Err(Error::Parallel(parallel::Error::MissingTensor { .. }))));
}

#[test]
fn a_configuration_of_what_is_not_here_is_refused_by_name() {
    let (good, tensors) = recorded();
    let check = |field: &str, change: &dyn Fn(&mut AutoencoderKlQwenImageConfig)| {
        let mut config = good.clone();
        change(&mut config);
        let error = load(&config, &tensors).unwrap_err();
        let Error::Unsupported { field: got, .. } = error else { panic!("{field}: {error}") };
        assert_eq!(got, field);
    };
    check("base_dim", &|c| c.base_dim = 0);
    check("z_dim", &|c| c.z_dim = usize::MAX);
    check("input_channels", &|c| c.input_channels = 0);
    check("dim_mult", &|c| c.dim_mult.clear());
    check("dim_mult", &|c| c.dim_mult[0] = usize::MAX);
    check("num_res_blocks", &|c| c.num_res_blocks = 0);
    check("attn_scales", &|c| c.attn_scales = vec![0.5]);
    check("temperal_downsample", &|c| c.temperal_downsample.truncate(1));
    check("latents_mean", &|c| c.latents_mean.truncate(1));
    check("latents_std", &|c| c.latents_std[0] = 0.0);
}

#[test]
fn unscaling_undoes_scaling() {
    let (config, _) = recorded();
    let z = numbers(4, 2, 2);
    close(&values(&config.unscale(&config.scale(&z).unwrap()).unwrap()), &values(&z));
}
