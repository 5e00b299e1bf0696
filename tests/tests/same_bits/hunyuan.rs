//! Hunyuan-DiT, whose two texts have masks, whose positions are shared by a forward, and whose scheduler draws noise at every step.

use std::os::unix::fs::symlink;
use std::path::Path;

use models::Request;
use models::blocks::Layout;
use models::hunyuan_dit::HunyuanDiTConfig;
use tests::same_bits::{Model, check_every_layout};
use tests::synthetic::{self, dit};

use super::check_lanes;

/// Four steps of two passes, but for the third's, which is without guidance.
fn request(key: u64) -> Request {
    let prompts = ["一只小猫", "a fox on a stone", "morning light", "a watercolour"];
    Request {
        prompt: prompts[key as usize].into(),
        negative_prompt: (key == 0).then(|| "ugly".into()),
        width: 48,
        height: 32,
        num_inference_steps: 4,
        guidance_scale: Some(if key == 2 { 1.0 } else { 5.0 }),
        guidance_rescale: if key == 0 { 0.5 } else { 0.0 },
        seed: key,
        num_images_per_prompt: if key == 1 { 2 } else { 1 },
        max_sequence_length: 0,
        ..Request::default()
    }
}

/// The golden pipeline with a transformer of eight heads and of blocks that take what others gave.
fn pipeline() -> tempfile::TempDir {
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("golden/hunyuan_pipeline/pipeline").canonicalize().unwrap();
    let dir = tempfile::tempdir().unwrap();
    for entry in std::fs::read_dir(golden).unwrap() {
        let entry = entry.unwrap();
        if entry.file_name() != "transformer" {
            symlink(entry.path(), dir.path().join(entry.file_name())).unwrap();
        }
    }
    let config = r#"{"_class_name": "HunyuanDiT2DModel", "attention_head_dim": 8, "num_attention_heads": 8, "hidden_size": 64,
        "num_layers": 4, "mlp_ratio": 4.3637, "cross_attention_dim": 24, "cross_attention_dim_t5": 32, "pooled_projection_dim": 16,
        "in_channels": 4, "sample_size": 8}"#;
    let transformer = dir.path().join("transformer");
    std::fs::create_dir(&transformer).unwrap();
    std::fs::write(transformer.join("config.json"), config).unwrap();
    let config: HunyuanDiTConfig = serde_json::from_str(config).unwrap();
    synthetic::write(&transformer, &dit::transformer(dit::hunyuan_shapes(&config), 9).unwrap()).unwrap();
    dir
}

#[test]
fn hunyuan_dit_has_the_same_bits_on_every_layout_alone_and_batched() {
    let dir = pipeline();
    let encoders = &["text_encoder", "text_encoder_2"];
    let model = Model { dir: dir.path(), encoders, denoiser: "transformer", text_tp: 2, request };
    check_every_layout(&model);
    check_lanes(&model, &[Layout::new(2, 1).with_cfg_parallel(2), Layout::new(1, 2).with_cfg_parallel(3)]);
}
