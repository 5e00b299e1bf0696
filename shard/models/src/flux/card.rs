//! The card of a FLUX directory: components, stages, and what a job may set.

use super::{FluxDenoiser, Kind};
use crate::Result;
use crate::autoencoder_kl::AutoencoderKlConfig;
use crate::card::{Card, ComponentCard, ParameterCard, StageCard, StageKind};
use crate::clip::ClipTextConfig;
use crate::flow::{self, Defaults};
use crate::flux_transformer::FluxTransformerConfig;
use crate::model_dir::ModelDir;
use crate::scheduler::FlowMatchEulerDiscreteConfig;
use crate::t5::T5Config;

/// The card of a FLUX directory.
pub fn describe(dir: &ModelDir) -> Result<Card> {
    let transformer: FluxTransformerConfig = dir.config("transformer")?;
    let t5: T5Config = dir.config("text_encoder_2")?;
    let clip: ClipTextConfig = dir.config("text_encoder")?;
    let vae: AutoencoderKlConfig = dir.config("vae")?;
    let scheduler = FlowMatchEulerDiscreteConfig::of(dir)?;
    FluxDenoiser::load(dir)?;
    // Kontext's tokens of the reference picture are those of one of its preferred sizes, all of about this area.
    let looked_at = if Kind::of(dir) == Kind::Kontext { 1 << 20 } else { 0 };
    let card = Card {
        family: "flux".into(),
        pipeline_class: dir.pipeline_class().into(),
        scheduler: FlowMatchEulerDiscreteConfig::CLASS.into(),
        digest: String::new(),
        components: vec![
            ComponentCard::of(dir, "text_encoder", clip.num_attention_heads, 1)?,
            ComponentCard::of(dir, "text_encoder_2", t5.num_heads, t5.num_layers)?,
            ComponentCard::of(dir, "transformer", transformer.num_attention_heads, transformer.blocks())?,
            // One head, and small beside the rest: held whole.
            ComponentCard::of(dir, "vae", 1, 1)?,
        ],
        stages: StageCard::with_controls(
            StageCard::of_text_encoders(&["text_encoder", "text_encoder_2"], "transformer"),
            StageKind::EncodeImage,
        ),
        parameters: parameters(Kind::of(dir), &transformer, &scheduler, &vae),
        max_pixels: flow::MAX_PIXELS + looked_at,
        pixels_per_image: looked_at,
        without_prompt: false,
    };
    card.with_defaults_of(dir)
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
    let (steps, guidance) = match kind {
        Kind::Fill => (50, 30.0),
        Kind::Base if few_steps => (4, 3.5),
        Kind::Base | Kind::Kontext | Kind::Control => (28, 3.5),
    };
    let mut parameters = flow::parameters(&Defaults {
        multiple: 16,
        max_side: flow::MAX_SIDE,
        side: vae.sample_size.clamp(16, 1024),
        num_inference_steps: steps,
        least_steps: scheduler.least_steps(),
        max_sequence_length: if few_steps { 256 } else { 512 },
    });
    parameters.push(ParameterCard::field("prompt_2"));
    if transformer.guidance_embeds {
        parameters.push(ParameterCard::number("guidance_scale", 0.0, 100.0, guidance));
    }
    if !matches!(kind, Kind::Fill | Kind::Control) {
        parameters.extend(["negative_prompt", "negative_prompt_2"].map(ParameterCard::field));
        parameters.push(ParameterCard::number("true_cfg_scale", 1.0, 20.0, 1.0));
    }
    match kind {
        Kind::Base => {}
        // Its picture is looked at, not begun from.
        Kind::Kontext | Kind::Control => {
            parameters.retain(|p| !["strength", "mask_image_blob_id"].contains(&p.name.as_str()));
            for parameter in parameters.iter_mut().filter(|p| p.name == "image_blob_id") {
                parameter.required = kind == Kind::Control;
            }
        }
        Kind::Fill => {
            for parameter in &mut parameters {
                parameter.required = ["image_blob_id", "mask_image_blob_id"].contains(&parameter.name.as_str());
                if parameter.name == "strength" {
                    parameter.default = Some(1.0);
                }
            }
        }
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
        for (kind, guidance, strength, steps) in [
            (Kind::Base, 3.5, Some(0.6), 28.0),
            (Kind::Kontext, 3.5, None, 28.0),
            (Kind::Fill, 30.0, Some(1.0), 50.0),
            (Kind::Control, 3.5, None, 28.0),
        ] {
            let found = (default(kind, "guidance_scale"), default(kind, "strength"), default(kind, "num_inference_steps"));
            assert_eq!(found, (Some(guidance), strength, Some(steps)), "{kind:?}");
            let needed: Vec<String> = card(kind).into_iter().filter(|p| p.required).map(|p| p.name).collect();
            let expected: &[&str] = match kind {
                Kind::Fill => &["image_blob_id", "mask_image_blob_id"],
                Kind::Control => &["image_blob_id"],
                Kind::Base | Kind::Kontext => &[],
            };
            assert_eq!(needed, expected, "{kind:?}");
            assert_eq!(find(kind, "true_cfg_scale").is_some(), matches!(kind, Kind::Base | Kind::Kontext), "{kind:?}");
            assert_eq!(find(kind, "mask_image_blob_id").is_some(), matches!(kind, Kind::Base | Kind::Fill), "{kind:?}");
        }
    }
}
