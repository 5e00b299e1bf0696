use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;

use parallel::{Device, Solo};

use super::*;

fn recorded() -> (AutoencoderKlConfig, HashMap<String, Tensor>) {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden/vae_tiling/model");
    let config = serde_json::from_slice(&std::fs::read(dir.join("config.json")).unwrap()).unwrap();
    let file = dir.join("diffusion_pytorch_model.safetensors");
    (config, candle_core::safetensors::load(file, &Device::Cpu).unwrap())
}

fn load(config: &AutoencoderKlConfig, tensors: &HashMap<String, Tensor>) -> Result<AutoencoderKl> {
    let dir = tempfile::tempdir().unwrap();
    candle_core::safetensors::save(tensors, dir.path().join("diffusion_pytorch_model.safetensors")).unwrap();
    AutoencoderKl::load(&Weights::open(dir.path(), Arc::new(Solo), DType::F32, &Device::Cpu)?, config)
}

fn latents(height: usize, width: usize) -> Tensor {
    let values: Vec<f32> = (0..4 * height * width).map(|i| (i * 37 % 101) as f32 / 50.0 - 1.0).collect();
    Tensor::from_vec(values, (1, 4, height, width), &Device::Cpu).unwrap()
}

fn values(x: &Tensor) -> Vec<f32> {
    x.flatten_all().unwrap().to_vec1().unwrap()
}

#[test]
fn the_old_names_of_attention_give_the_same_picture() {
    let (config, new) = recorded();
    let rename = |name: &String| {
        let names = [("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")];
        names.iter().fold(name.clone(), |name, (new, old)| name.replace(&format!(".{new}."), &format!(".{old}.")))
    };
    let old = new.iter().map(|(name, tensor)| (rename(name), tensor.clone())).collect();
    let decode = |tensors| values(&load(&config, tensors).unwrap().decode(&latents(4, 6)).unwrap());
    assert_eq!(decode(&new), decode(&old));
}

#[test]
fn a_tensor_too_many_or_too_few_is_an_error() {
    let (config, mut tensors) = recorded();
    tensors.insert("encoder.extra".into(), latents(1, 1));
    assert!(matches!(load(&config, &tensors), Err(Error::Parallel(parallel::Error::UnusedTensors { .. }))));
    tensors.remove("encoder.extra");
    tensors.remove("decoder.conv_in.bias");
    assert!(matches!(load(&config, &tensors), Err(Error::Parallel(parallel::Error::MissingTensor { .. }))));
}

#[test]
fn a_configuration_of_what_is_not_here_is_refused_by_name() {
    let (good, tensors) = recorded();
    let check = |field: &str, change: &dyn Fn(&mut AutoencoderKlConfig)| {
        let mut config = good.clone();
        change(&mut config);
        let error = load(&config, &tensors).unwrap_err();
        let Error::Unsupported { field: got, .. } = error else { panic!("{field}: {error}") };
        assert_eq!(got, field);
    };
    check("down_block_types", &|c| c.down_block_types[0] = "AttnDownEncoderBlock2D".into());
    check("up_block_types", &|c| c.up_block_types.truncate(1));
    check("block_out_channels", &|c| c.block_out_channels.clear());
    check("block_out_channels", &|c| c.block_out_channels[0] = usize::MAX);
    check("act_fn", &|c| c.act_fn = "mish".into());
    check("norm_num_groups", &|c| c.norm_num_groups = 0);
    check("norm_num_groups", &|c| c.norm_num_groups = 3);
    check("latent_channels", &|c| c.latent_channels = usize::MAX);
    check("scaling_factor", &|c| c.scaling_factor = 0.0);
}

#[test]
fn tiles_are_used_only_when_a_side_exceeds_one() {
    let (config, tensors) = recorded();
    let vae = load(&config, &tensors).unwrap();
    let decode = |z: &Tensor, tiling| values(&vae.decode_with(z, tiling).unwrap());
    let (small, large) = (latents(16, 16), latents(16, 17));
    assert_eq!(decode(&small, Tiling::On), decode(&small, Tiling::Off));
    assert_ne!(decode(&large, Tiling::On), decode(&large, Tiling::Off));
}

#[test]
fn tiles_of_no_size_are_refused() {
    let (config, tensors) = recorded();
    for sample_size in [0, 1, 2] {
        let vae = load(&AutoencoderKlConfig { sample_size, ..config.clone() }, &tensors).unwrap();
        let error = vae.decode_tiled(&latents(4, 4)).unwrap_err();
        assert!(matches!(&error, Error::Unsupported { field, .. } if field == "sample_size"), "{error}");
    }
}

#[test]
fn unscaling_undoes_scaling() {
    let (config, _) = recorded();
    let z = latents(2, 2);
    let back = config.unscale(&config.scale(&z).unwrap()).unwrap();
    assert!(values(&z).iter().zip(values(&back)).all(|(a, b)| (a - b).abs() < 1e-6));
}
