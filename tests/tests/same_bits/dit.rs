//! DiT: classes in place of prompts, and no text encoder.

use std::os::unix::fs::symlink;
use std::path::Path;

use models::Request;
use models::blocks::Layout;
use models::dit_transformer::DiTTransformerConfig;
use tests::same_bits::{Model, check_every_layout};
use tests::synthetic::{self, dit};

use super::check_lanes;

/// Four steps of two passes, but for the third's, which is without guidance.
fn request(key: u64) -> Request {
    let prompts = ["golden retriever", "1", "999", "3"];
    Request {
        prompt: prompts[key as usize].into(),
        num_inference_steps: 4,
        guidance_scale: Some(if key == 2 { 1.0 } else { 4.0 }),
        seed: key,
        num_images_per_prompt: if key == 1 { 2 } else { 1 },
        max_sequence_length: 0,
        ..Request::default()
    }
}

/// The golden pipeline with a transformer of eight heads.
fn pipeline() -> tempfile::TempDir {
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("golden/dit_pipeline/pipeline").canonicalize().unwrap();
    let dir = tempfile::tempdir().unwrap();
    for entry in std::fs::read_dir(golden).unwrap() {
        let entry = entry.unwrap();
        if entry.file_name() != "transformer" {
            symlink(entry.path(), dir.path().join(entry.file_name())).unwrap();
        }
    }
    let config = r#"{"_class_name": "DiTTransformer2DModel", "attention_head_dim": 6, "num_attention_heads": 8, "num_layers": 3,
        "in_channels": 4, "out_channels": 8, "sample_size": 8}"#;
    let transformer = dir.path().join("transformer");
    std::fs::create_dir(&transformer).unwrap();
    std::fs::write(transformer.join("config.json"), config).unwrap();
    let config: DiTTransformerConfig = serde_json::from_str(config).unwrap();
    synthetic::write(&transformer, &dit::transformer(dit::dit_shapes(&config), 9).unwrap()).unwrap();
    dir
}

#[test]
fn dit_has_the_same_bits_on_every_layout_alone_and_batched() {
    let dir = pipeline();
    let model = Model { dir: dir.path(), encoders: &[], denoiser: "transformer", text_tp: 1, request };
    check_every_layout(&model);
    check_lanes(&model, &[Layout::new(2, 1).with_cfg_parallel(2), Layout::new(1, 2).with_cfg_parallel(3)]);
}
