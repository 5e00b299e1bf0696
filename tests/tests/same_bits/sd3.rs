//! Stable Diffusion 3.5 with skip-layer guidance in some of its steps: the number of passes changes from step to step.

use std::os::unix::fs::symlink;
use std::path::Path;

use models::Request;
use models::blocks::Layout;
use models::request::SkipLayerGuidance;
use models::sd3_transformer::Sd3TransformerConfig;
use tests::same_bits::{Model, check_every_layout};
use tests::synthetic;

use super::check_lanes;

/// As its neighbours' it is four steps of two or three passes, but for the third's, which is without guidance.
fn request(key: u64) -> Request {
    let prompts = ["a red fox", "a fox on a stone", "morning light", "a watercolour"];
    let skip = |layers: &[usize]| SkipLayerGuidance { layers: layers.to_vec(), scale: 2.8, start: 0.2, stop: 0.7 };
    Request {
        prompt: prompts[key as usize].into(),
        prompt_2: Some("a watercolour".into()),
        negative_prompt: (key == 0).then(|| "ugly".into()),
        width: 48,
        height: 32,
        num_inference_steps: 4,
        guidance_scale: Some(if key == 2 { 1.0 } else { 5.0 }),
        skip_layer_guidance: match key {
            0 => Some(skip(&[1, 3])),
            3 => Some(skip(&[2])),
            _ => None,
        },
        clip_skip: (key == 0).then_some(1),
        seed: key,
        num_images_per_prompt: if key == 1 { 2 } else { 1 },
        max_sequence_length: 16,
        ..Request::default()
    }
}

/// The golden pipeline with a transformer of eight heads.
fn pipeline() -> tempfile::TempDir {
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("golden/sd3_txt2img/pipeline").canonicalize().unwrap();
    let dir = tempfile::tempdir().unwrap();
    for entry in std::fs::read_dir(golden).unwrap() {
        let entry = entry.unwrap();
        if entry.file_name() != "transformer" {
            symlink(entry.path(), dir.path().join(entry.file_name())).unwrap();
        }
    }
    let config = r#"{"_class_name": "SD3Transformer2DModel", "attention_head_dim": 8, "num_attention_heads": 8, "num_layers": 5,
        "caption_projection_dim": 64, "joint_attention_dim": 40, "pooled_projection_dim": 32, "in_channels": 16,
        "out_channels": 16, "patch_size": 2, "pos_embed_max_size": 24, "qk_norm": "rms_norm", "sample_size": 16,
        "dual_attention_layers": [0, 1]}"#;
    let transformer = dir.path().join("transformer");
    std::fs::create_dir(&transformer).unwrap();
    std::fs::write(transformer.join("config.json"), config).unwrap();
    let config: Sd3TransformerConfig = serde_json::from_str(config).unwrap();
    synthetic::write(&transformer, &synthetic::sd3_transformer(&config, 9, |_| true).unwrap()).unwrap();
    dir
}

#[test]
fn sd35_has_the_same_bits_on_every_layout_alone_and_batched() {
    let dir = pipeline();
    let encoders = &["text_encoder", "text_encoder_2", "text_encoder_3"];
    let model = Model { dir: dir.path(), encoders, denoiser: "transformer", text_tp: 2, request };
    check_every_layout(&model);
    check_lanes(&model, &[Layout::new(2, 1).with_cfg_parallel(2), Layout::new(1, 2).with_cfg_parallel(3)]);
}
