//! Stable Diffusion XL whose steps draw noise (ancestral): each job draws its own, whoever it is batched with.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;

use models::Request;
use models::blocks::Layout;
use models::request::SizeConditions;
use models::unet_2d_condition::UNet2DConditionConfig;
use serde_json::Value;
use tests::same_bits::{Model, check_every_layout};
use tests::synthetic::{self, unet_2d_condition};

use super::check_lanes;

/// Four steps of two passes, but for the third's, which is without guidance.
fn request(key: u64) -> Request {
    let prompts = ["a red fox", "a fox on a stone", "morning light", "a watercolour"];
    Request {
        prompt: prompts[key as usize].into(),
        prompt_2: Some("a watercolour".into()),
        negative_prompt: (key == 0).then(|| "ugly".into()),
        width: 48,
        height: 32,
        num_inference_steps: 4,
        guidance_scale: Some(if key == 2 { 1.0 } else { 5.0 }),
        guidance_rescale: if key == 0 { 0.7 } else { 0.0 },
        clip_skip: (key == 1).then_some(1),
        size_conditions: SizeConditions { original_size: (key == 0).then_some([512, 640]), ..SizeConditions::default() },
        seed: key,
        num_images_per_prompt: if key == 1 { 2 } else { 1 },
        ..Request::default()
    }
}

fn read(path: &Path) -> Value {
    serde_json::from_slice(&fs::read(path).unwrap()).unwrap()
}

fn write(path: &Path, value: &Value) {
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::write(path, value.to_string()).unwrap();
}

/// The golden pipeline with a network of eight heads wherever there are any, and Euler's ancestral steps.
fn pipeline() -> tempfile::TempDir {
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("golden/sdxl_txt2img/pipeline").canonicalize().unwrap();
    let dir = tempfile::tempdir().unwrap();
    for entry in fs::read_dir(&golden).unwrap() {
        let entry = entry.unwrap();
        if !["unet", "scheduler", "model_index.json"].contains(&entry.file_name().to_str().unwrap()) {
            symlink(entry.path(), dir.path().join(entry.file_name())).unwrap();
        }
    }
    let class = Value::from("EulerAncestralDiscreteScheduler");
    let mut index = read(&golden.join("model_index.json"));
    index["scheduler"][1] = class.clone();
    write(&dir.path().join("model_index.json"), &index);
    let mut scheduler = read(&golden.join("scheduler/scheduler_config.json"));
    scheduler["_class_name"] = class;
    write(&dir.path().join("scheduler/scheduler_config.json"), &scheduler);
    let mut config = read(&golden.join("unet/config.json"));
    config["block_out_channels"] = Value::from(vec![16, 32, 64]);
    config["attention_head_dim"] = Value::from(vec![1, 8, 8]);
    config["norm_num_groups"] = Value::from(8);
    let unet = dir.path().join("unet");
    write(&unet.join("config.json"), &config);
    let config: UNet2DConditionConfig = serde_json::from_value(config).unwrap();
    synthetic::write(&unet, &unet_2d_condition::unet(&config, 9).unwrap()).unwrap();
    dir
}

#[test]
fn sdxl_has_the_same_bits_on_every_layout_alone_and_batched() {
    let dir = pipeline();
    let encoders = &["text_encoder", "text_encoder_2"];
    let model = Model { dir: dir.path(), encoders, denoiser: "unet", text_tp: 1, request };
    check_every_layout(&model);
    check_lanes(&model, &[Layout::new(2, 1).with_cfg_parallel(2), Layout::new(1, 2).with_cfg_parallel(3)]);
}
