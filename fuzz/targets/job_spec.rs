//! A job as it comes from anybody: what the parser lets through is complete, within every limit, and passes again as it is.
#![no_main]

use coordinator::plan::Plan;
use coordinator::request::{Context, Request};
use libfuzzer_sys::fuzz_target;
use prost::Message;
use proto::v1::{
    Adapter, AdapterDefault, Control, ControlNetwork, JobSpec, ModelCard, Parameter, StageCondition, StageKind, StageTemplate,
};

const MOST_PIXELS: u64 = 1 << 24;

fn parameter(name: &str, minimum: f64, maximum: f64, multiple_of: f64, default: f64) -> Parameter {
    Parameter { name: name.into(), minimum, maximum, multiple_of, default_value: Some(default), ..Parameter::default() }
}

fn stage(id: &str, kind: StageKind, inputs: &[&str], condition: StageCondition) -> StageTemplate {
    StageTemplate {
        id: id.into(),
        kind: kind as i32,
        component: id.into(),
        inputs: inputs.iter().map(|input| (*input).to_owned()).collect(),
        condition: condition as i32,
        with_pictures: kind == StageKind::EncodeImage,
        with_controls: kind == StageKind::EncodeImage,
        replaces: if condition == StageCondition::WithRefiner { "denoise".into() } else { String::new() },
    }
}

fn card() -> ModelCard {
    let fields = ["prompt_2", "negative_prompt", "image_blob_id", "mask_image_blob_id", "noise_generator"];
    let mut parameters: Vec<Parameter> =
        fields.iter().map(|name| Parameter { name: (*name).into(), ..Parameter::default() }).collect();
    parameters.extend([
        parameter("width", 16.0, 8192.0, 16.0, 256.0),
        parameter("height", 16.0, 8192.0, 16.0, 256.0),
        parameter("num_inference_steps", 1.0, 100.0, 0.0, 20.0),
        parameter("guidance_scale", 0.0, 20.0, 0.0, 3.5),
        parameter("true_cfg_scale", 0.0, 20.0, 0.0, 1.0),
        parameter("strength", 0.0, 1.0, 0.0, 0.6),
        parameter("shift", 0.1, 10.0, 0.0, 3.0),
        parameter("num_images_per_prompt", 1.0, 10.0, 0.0, 1.0),
        parameter("skip_guidance_layers", 0.0, 23.0, 1.0, 0.0),
        parameter("skip_layer_guidance_scale", 0.0, 20.0, 0.0, 2.8),
        parameter("denoising_end", 0.001, 1.0, 0.0, 0.8),
    ]);
    let defaults = vec![AdapterDefault { name: "num_inference_steps".into(), value: 8.0 }];
    ModelCard {
        name: "model".into(),
        max_pixels: MOST_PIXELS,
        parameters,
        controls: vec![ControlNetwork { name: "c".into(), modes: 3, multiple_of: 32, ..ControlNetwork::default() }],
        adapters: vec![Adapter { name: "a".into(), defaults, ..Adapter::default() }],
        stages: vec![
            stage("text", StageKind::EncodeText, &[], StageCondition::Unspecified),
            stage("image", StageKind::EncodeImage, &[], StageCondition::WithImage),
            stage("denoise", StageKind::Denoise, &["text", "image"], StageCondition::Unspecified),
            stage("refine", StageKind::Denoise, &["text", "denoise"], StageCondition::WithRefiner),
            stage("decode", StageKind::Decode, &["denoise"], StageCondition::Unspecified),
        ],
        ..ModelCard::default()
    }
}

fuzz_target!(|bytes: &[u8]| {
    let Ok(spec) = JobSpec::decode(bytes) else { return };
    let (card, context) = (card(), Context { seed: 7, max_pixels: MOST_PIXELS, missing_blobs: &[] });
    let Ok(request) = Request::parse(spec, &card, context) else { return };
    let spec = request.spec();
    let side = |side: Option<u32>| u64::from(side.expect("filled in"));
    let pixels = side(spec.width) * side(spec.height) * side(spec.num_images_per_prompt);
    assert!((1..=MOST_PIXELS).contains(&pixels), "{pixels} pixels");
    assert!(spec.seed.is_some() && spec.prompt.chars().count() <= proto::MAX_PROMPT_CHARS);
    assert!(spec.loras.iter().all(|lora| lora.name == "a" && lora.scale.is_some_and(f64::is_finite)));
    let well =
        |control: &Control| control.name == "c" && control.mode.is_some_and(|mode| mode < 3) && !control.image_blob_id.is_empty();
    assert!(spec.controls.iter().all(well) && !spec.guess_mode);
    let again = Request::parse(spec.clone(), &card, context).expect("it was taken before");
    assert_eq!(again.spec(), spec);
    drop(Plan::new(&request, &card));
});
