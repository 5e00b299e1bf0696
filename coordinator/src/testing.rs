//! The small model that the crate's tests share.

use proto::v1::{Component, JobSpec, ModelCard, Parameter, Products, Registration, StageCondition, StageKind, StageTemplate};

fn stage(id: &str, kind: StageKind, component: &str, inputs: &[&str]) -> StageTemplate {
    StageTemplate {
        id: id.into(),
        kind: kind as i32,
        component: component.into(),
        inputs: inputs.iter().map(|input| (*input).to_owned()).collect(),
        condition: StageCondition::Unspecified as i32,
        with_pictures: kind == StageKind::EncodeImage,
        with_controls: kind == StageKind::EncodeImage,
        replaces: String::new(),
    }
}

fn component(name: &str, tp_options: &[u32], max_block_ranges: u32) -> Component {
    Component {
        name: name.into(),
        weight_bytes: 1000,
        tp_options: tp_options.to_vec(),
        max_block_ranges,
        fingerprint: String::new(),
    }
}

fn number(name: &str, minimum: f64, maximum: f64, default: f64) -> Parameter {
    Parameter { name: name.into(), minimum, maximum, default_value: Some(default), ..Parameter::default() }
}

/// A model of four stages; `encode_image` only for jobs with a picture.
pub(crate) fn card(name: &str) -> ModelCard {
    let mut encode_image = stage("encode_image", StageKind::EncodeImage, "vae", &[]);
    encode_image.condition = StageCondition::WithImage as i32;
    ModelCard {
        name: name.into(),
        digest: "d".repeat(64),
        components: vec![
            component("text_encoder", &[1], 1),
            component("transformer", &[1, 2, 4, 8], 4),
            component("vae", &[1], 1),
        ],
        stages: vec![
            stage("encode_text", StageKind::EncodeText, "text_encoder", &[]),
            encode_image,
            stage("denoise", StageKind::Denoise, "transformer", &["encode_text", "encode_image"]),
            stage("decode", StageKind::Decode, "vae", &["denoise"]),
        ],
        parameters: vec![
            number("width", 16.0, 4096.0, 64.0),
            number("height", 16.0, 4096.0, 64.0),
            number("num_inference_steps", 1.0, 10_000.0, 4.0),
        ],
        max_pixels: 1 << 24,
        ..ModelCard::default()
    }
}

/// A request for one picture of `model`.
pub(crate) fn spec(model: &str) -> JobSpec {
    JobSpec { model: model.into(), prompt: "a red car".into(), ..JobSpec::default() }
}

/// A worker with one label `role` that can multiply in anything.
pub(crate) fn worker(id: &str, role: &str) -> Registration {
    Registration {
        worker_id: id.into(),
        address: format!("{id}:1"),
        data_address: format!("{id}:2"),
        device: "cpu".into(),
        labels: [("role".to_owned(), role.to_owned())].into(),
        products: Products::ALL.map(i32::from).to_vec(),
        ..Registration::default()
    }
}
