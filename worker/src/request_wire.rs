//! A job's specification as a stage needs it.

use models::Request;
use models::request::{
    AESTHETIC_SCORE, Control, Lora, NEGATIVE_AESTHETIC_SCORE, NoiseGenerator, SizeConditions, SkipLayerGuidance,
};
use proto::v1::{self, JobSpec};

use crate::{Error, Result};

/// The request in `spec`, in which the coordinator has filled in every default.
///
/// # Errors
/// [`Error::Message`] with the field that is missing.
pub(crate) fn from_wire(spec: &JobSpec) -> Result<Request> {
    Ok(Request {
        prompt: spec.prompt.clone(),
        prompt_2: spec.prompt_2.clone(),
        negative_prompt: spec.negative_prompt.clone(),
        negative_prompt_2: spec.negative_prompt_2.clone(),
        prompt_3: spec.prompt_3.clone(),
        negative_prompt_3: spec.negative_prompt_3.clone(),
        width: count_if_given("width", spec.width)?,
        height: count_if_given("height", spec.height)?,
        num_inference_steps: count_if_given("num_inference_steps", spec.num_inference_steps)?,
        guidance_scale: spec.guidance_scale,
        // A model that has no such parameter has no default for it either: off.
        true_cfg_scale: spec.true_cfg_scale.unwrap_or(1.0),
        skip_layer_guidance: skip_layer_guidance(spec)?,
        clip_skip: spec.clip_skip.map(|layers| layers as usize),
        shift: spec.shift,
        eta: spec.eta.unwrap_or_default(),
        guidance_rescale: spec.guidance_rescale.unwrap_or_default(),
        noise_level: spec.noise_level.map(|level| level as usize),
        denoising_end: spec.denoising_end,
        aesthetic_score: spec.aesthetic_score.unwrap_or(AESTHETIC_SCORE),
        negative_aesthetic_score: spec.negative_aesthetic_score.unwrap_or(NEGATIVE_AESTHETIC_SCORE),
        size_conditions: size_conditions(spec),
        seed: spec.seed.ok_or_else(|| missing("seed"))?,
        num_images_per_prompt: count("num_images_per_prompt", spec.num_images_per_prompt)?,
        strength: spec.strength,
        max_sequence_length: count_if_given("max_sequence_length", spec.max_sequence_length)?,
        noise_generator: match spec.noise_generator() {
            v1::NoiseGenerator::Unspecified | v1::NoiseGenerator::TorchCpu => NoiseGenerator::TorchCpu,
            v1::NoiseGenerator::TorchCuda => NoiseGenerator::TorchCuda,
        },
        loras: spec.loras.iter().map(|lora| Lora { name: lora.name.clone(), scale: lora.scale.unwrap_or(1.0) }).collect(),
        controls: spec.controls.iter().map(control).collect(),
        guess_mode: spec.guess_mode,
    })
}

fn control(control: &v1::Control) -> Control {
    Control {
        name: control.name.clone(),
        conditioning_scale: control.conditioning_scale.unwrap_or(1.0),
        guidance_start: control.guidance_start.unwrap_or(0.0),
        guidance_end: control.guidance_end.unwrap_or(1.0),
        mode: control.mode.map(|mode| mode as usize),
    }
}

fn size_conditions(spec: &JobSpec) -> SizeConditions {
    let size = |size: Option<v1::Size>| size.map(|size| [size.height, size.width]);
    let offset = |offset: Option<v1::Offset>| offset.map(|offset| [offset.top, offset.left]);
    SizeConditions {
        original_size: size(spec.original_size),
        crops_coords_top_left: offset(spec.crops_coords_top_left),
        target_size: size(spec.target_size),
        negative_original_size: size(spec.negative_original_size),
        negative_crops_coords_top_left: offset(spec.negative_crops_coords_top_left),
        negative_target_size: size(spec.negative_target_size),
    }
}

fn skip_layer_guidance(spec: &JobSpec) -> Result<Option<SkipLayerGuidance>> {
    if spec.skip_guidance_layers.is_empty() {
        return Ok(None);
    }
    Ok(Some(SkipLayerGuidance {
        layers: spec.skip_guidance_layers.iter().map(|layer| *layer as usize).collect(),
        scale: spec.skip_layer_guidance_scale.ok_or_else(|| missing("skip_layer_guidance_scale"))?,
        start: spec.skip_layer_guidance_start.ok_or_else(|| missing("skip_layer_guidance_start"))?,
        stop: spec.skip_layer_guidance_stop.ok_or_else(|| missing("skip_layer_guidance_stop"))?,
    }))
}

fn count(field: &'static str, value: Option<u32>) -> Result<usize> {
    match value {
        Some(0) => Err(Error::message(field, "must be at least 1")),
        Some(value) => Ok(value as usize),
        None => Err(missing(field)),
    }
}

/// 0 when it is left to the model: the coordinator fills in what the model's card has a default for.
fn count_if_given(field: &'static str, value: Option<u32>) -> Result<usize> {
    value.map_or(Ok(0), |value| count(field, Some(value)))
}

fn missing(field: &'static str) -> Error {
    Error::message(field, "is missing")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_field_that_is_missing_is_named() {
        let whole = JobSpec {
            width: Some(64),
            height: Some(32),
            num_inference_steps: Some(4),
            seed: Some(u64::MAX),
            num_images_per_prompt: Some(1),
            max_sequence_length: Some(512),
            ..JobSpec::default()
        };
        let request = from_wire(&whole).unwrap();
        assert_eq!((request.width, request.height, request.seed, request.true_cfg_scale), (64, 32, u64::MAX, 1.0));
        let without_seed = JobSpec { seed: None, ..whole.clone() };
        assert_eq!(from_wire(&without_seed).unwrap_err().to_string(), "seed: is missing");
        let open = JobSpec { width: None, max_sequence_length: None, ..whole.clone() };
        let open = from_wire(&open).unwrap();
        assert_eq!((open.width, open.height, open.max_sequence_length), (0, 32, 0), "left to the model");
        let empty = JobSpec { width: Some(0), ..whole };
        assert_eq!(from_wire(&empty).unwrap_err().to_string(), "width: must be at least 1");
    }
}
