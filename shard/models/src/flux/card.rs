//! The card of a FLUX directory: components, stages, and what a job may set.

use super::{FluxDenoiser, Kind};
use crate::Result;
use crate::autoencoder_kl::AutoencoderKlConfig;
use crate::card::{Card, ComponentCard, ParameterCard, StageCard, StageKind};
use crate::clip::ClipTextConfig;
use crate::flux_transformer::FluxTransformerConfig;
use crate::model_dir::ModelDir;
use crate::scheduler::FlowMatchEulerDiscreteConfig;
use crate::t5::T5Config;

/// Side limits of a picture, in pixels.
const MAX_SIDE: usize = 4096;
/// 2048 x 2048: what the position embedding was made for, and then some.
const MAX_PIXELS: u64 = 4 << 20;
const MAX_STEPS: usize = 500;

/// The card of a FLUX directory.
pub fn describe(dir: &ModelDir) -> Result<Card> {
    let transformer: FluxTransformerConfig = dir.config("transformer")?;
    let t5: T5Config = dir.config("text_encoder_2")?;
    let clip: ClipTextConfig = dir.config("text_encoder")?;
    let vae: AutoencoderKlConfig = dir.config("vae")?;
    let scheduler: FlowMatchEulerDiscreteConfig = dir.scheduler_config()?;
    FluxDenoiser::load(dir)?;
    let component = |name: &str, heads: usize, max_block_ranges: usize| -> Result<ComponentCard> {
        let tp_options = [1, 2, 4, 8].into_iter().filter(|tp| heads.is_multiple_of(*tp)).collect();
        Ok(ComponentCard { name: name.into(), weight_bytes: dir.weight_bytes(name)?, tp_options, max_block_ranges })
    };
    let blocks = transformer.num_layers + transformer.num_single_layers;
    let card = Card {
        family: "flux".into(),
        pipeline_class: dir.pipeline_class().into(),
        scheduler: "FlowMatchEulerDiscreteScheduler".into(),
        digest: String::new(),
        components: vec![
            component("text_encoder", clip.num_attention_heads, 1)?,
            component("text_encoder_2", t5.num_heads, t5.num_layers)?,
            component("transformer", transformer.num_attention_heads, blocks)?,
            // One head, and small beside the rest: held whole.
            component("vae", 1, 1)?,
        ],
        stages: stages(),
        parameters: parameters(Kind::of(dir), &transformer, &scheduler, &vae),
        max_pixels: MAX_PIXELS,
    };
    card.with_defaults_of(dir)
}

fn stages() -> Vec<StageCard> {
    let stage = |id: &str, kind, component: &str, inputs: &[&str], with_image| StageCard {
        id: id.into(),
        kind,
        component: component.into(),
        inputs: inputs.iter().map(|i| (*i).to_owned()).collect(),
        with_image,
        with_pictures: kind == StageKind::EncodeImage,
    };
    vec![
        stage("encode_text", StageKind::EncodeText, "text_encoder", &[], false),
        stage("encode_text_2", StageKind::EncodeText, "text_encoder_2", &[], false),
        stage("encode_image", StageKind::EncodeImage, "vae", &[], true),
        stage("denoise", StageKind::Denoise, "transformer", &["encode_text", "encode_text_2", "encode_image"], false),
        stage("decode", StageKind::Decode, "vae", &["denoise"], false),
    ]
}

/// What a job may set. Defaults are the pipelines'; a checkpoint without dynamic shifting is a few-step one (schnell) unless
/// its directory says otherwise.
fn parameters(
    kind: Kind,
    transformer: &FluxTransformerConfig,
    scheduler: &FlowMatchEulerDiscreteConfig,
    vae: &AutoencoderKlConfig,
) -> Vec<ParameterCard> {
    let few_steps = !transformer.guidance_embeds && !scheduler.use_dynamic_shifting && scheduler.shift == 1.0;
    let side = (vae.sample_size.max(16) as f64).min(1024.0);
    let size = |name| ParameterCard::number(name, 16.0, MAX_SIDE as f64, side).multiple(16.0);
    let (steps, guidance) = match kind {
        Kind::Fill => (50.0, 30.0),
        Kind::Base if few_steps => (4.0, 3.5),
        Kind::Base | Kind::Kontext => (28.0, 3.5),
    };
    let mut parameters = vec![
        ParameterCard::field("prompt_2"),
        size("width"),
        size("height"),
        ParameterCard::number("num_inference_steps", 1.0, MAX_STEPS as f64, steps).multiple(1.0),
        ParameterCard::number("num_images_per_prompt", 1.0, 10.0, 1.0).multiple(1.0),
        ParameterCard::number("max_sequence_length", 1.0, 512.0, if few_steps { 256.0 } else { 512.0 }).multiple(1.0),
        ParameterCard::field("noise_generator"),
    ];
    if transformer.guidance_embeds {
        parameters.push(ParameterCard::number("guidance_scale", 0.0, 100.0, guidance));
    }
    if kind != Kind::Fill {
        parameters.push(ParameterCard::field("negative_prompt"));
        parameters.push(ParameterCard::field("negative_prompt_2"));
        parameters.push(ParameterCard::number("true_cfg_scale", 1.0, 20.0, 1.0));
    }
    // Above nothing: the least strength still makes one step.
    let strength = |default| ParameterCard::number("strength", 0.001, 1.0, default);
    let (image, mask) = (ParameterCard::field("image_blob_id"), ParameterCard::field("mask_image_blob_id"));
    match kind {
        Kind::Base => parameters.extend([image, mask, strength(0.6)]),
        Kind::Kontext => parameters.push(image),
        Kind::Fill => parameters.extend([image.required(), mask.required(), strength(1.0)]),
    }
    parameters
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_job_may_set_what_its_pipeline_takes_and_no_more() {
        let scheduler = FlowMatchEulerDiscreteConfig::default();
        let card = |kind| {
            let transformer = FluxTransformerConfig { guidance_embeds: true, ..FluxTransformerConfig::default() };
            parameters(kind, &transformer, &scheduler, &AutoencoderKlConfig::default())
        };
        let find = |kind, name: &str| card(kind).into_iter().find(|p| p.name == name);
        let default = |kind, name| find(kind, name).and_then(|p| p.default);
        for (kind, guidance, strength, steps) in
            [(Kind::Base, 3.5, Some(0.6), 28.0), (Kind::Kontext, 3.5, None, 28.0), (Kind::Fill, 30.0, Some(1.0), 50.0)]
        {
            let found = (default(kind, "guidance_scale"), default(kind, "strength"), default(kind, "num_inference_steps"));
            assert_eq!(found, (Some(guidance), strength, Some(steps)), "{kind:?}");
            let needed: Vec<String> = card(kind).into_iter().filter(|p| p.required).map(|p| p.name).collect();
            let expected: &[&str] = if kind == Kind::Fill { &["image_blob_id", "mask_image_blob_id"] } else { &[] };
            assert_eq!(needed, expected, "{kind:?}");
            assert_eq!(find(kind, "true_cfg_scale").is_some(), kind != Kind::Fill, "{kind:?}");
            assert_eq!(find(kind, "mask_image_blob_id").is_some(), kind != Kind::Kontext, "{kind:?}");
        }
    }
}
