//! A model's card as it travels.

use models::card::{Card, ComponentCard, ParameterCard, StageCard, StageCondition, StageKind};
use models::control::card::ControlCard;
use models::lora::card::AdapterCard;
use proto::v1;

use crate::{adapter_wire, control_wire};

/// The card of the model that models.toml calls `name`.
pub(crate) fn to_wire(name: &str, card: &Card, adapters: Vec<AdapterCard>, controls: Vec<ControlCard>) -> v1::ModelCard {
    v1::ModelCard {
        name: name.to_owned(),
        family: card.family.clone(),
        pipeline_class: card.pipeline_class.clone(),
        digest: card.digest.clone(),
        components: card.components.iter().map(component).collect(),
        stages: card.stages.iter().map(stage).collect(),
        parameters: card.parameters.iter().map(parameter).collect(),
        max_pixels: card.max_pixels,
        without_prompt: card.without_prompt,
        pixels_per_image: card.pixels_per_image,
        scheduler: card.scheduler.clone(),
        adapters: adapters.into_iter().map(adapter_wire::card).collect(),
        controls: controls.into_iter().map(control_wire::card).collect(),
    }
}

fn component(card: &ComponentCard) -> v1::Component {
    v1::Component {
        name: card.name.clone(),
        weight_bytes: card.weight_bytes,
        tp_options: card.tp_options.iter().map(|tp| saturate(*tp)).collect(),
        max_block_ranges: saturate(card.max_block_ranges),
        fingerprint: card.fingerprint.clone(),
    }
}

fn stage(card: &StageCard) -> v1::StageTemplate {
    let condition = match card.condition {
        StageCondition::Always => v1::StageCondition::Unspecified,
        StageCondition::WithImage => v1::StageCondition::WithImage,
        StageCondition::WithRefiner => v1::StageCondition::WithRefiner,
    };
    v1::StageTemplate {
        id: card.id.clone(),
        kind: kind(card.kind).into(),
        component: card.component.clone(),
        inputs: card.inputs.clone(),
        condition: condition.into(),
        with_pictures: card.with_pictures,
        with_controls: card.with_controls,
        replaces: card.replaces.clone(),
    }
}

fn kind(kind: StageKind) -> v1::StageKind {
    match kind {
        StageKind::EncodeText => v1::StageKind::EncodeText,
        StageKind::EncodeImage => v1::StageKind::EncodeImage,
        StageKind::Denoise => v1::StageKind::Denoise,
        StageKind::Decode => v1::StageKind::Decode,
        StageKind::Inpaint => v1::StageKind::Inpaint,
    }
}

fn parameter(card: &ParameterCard) -> v1::Parameter {
    v1::Parameter {
        name: card.name.clone(),
        minimum: card.minimum,
        maximum: card.maximum,
        multiple_of: card.multiple_of,
        default_value: card.default,
        default_text: card.default_text.clone(),
        required: card.required,
    }
}

fn saturate(n: usize) -> u32 {
    u32::try_from(n).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_card_keeps_everything_on_the_wire() {
        let card = Card {
            family: "flux".into(),
            pipeline_class: "FluxPipeline".into(),
            scheduler: "FlowMatchEulerDiscreteScheduler".into(),
            digest: "ab".repeat(32),
            components: vec![ComponentCard {
                name: "transformer".into(),
                weight_bytes: 7,
                tp_options: vec![1, 2, 4],
                max_block_ranges: 3,
                fingerprint: "ef".repeat(32),
            }],
            stages: vec![StageCard {
                id: "encode_image".into(),
                kind: StageKind::EncodeImage,
                component: "vae".into(),
                inputs: vec![],
                condition: StageCondition::WithImage,
                replaces: "before".into(),
                with_pictures: true,
                with_controls: true,
            }],
            parameters: vec![ParameterCard::number("width", 64.0, 2048.0, 1024.0).multiple(16.0)],
            max_pixels: 9,
            pixels_per_image: 5,
            without_prompt: true,
        };
        let adapter = AdapterCard {
            name: "pixel".into(),
            digest: "cd".repeat(32),
            bytes: 5,
            components: vec!["transformer".into()],
            defaults: [("shift".to_owned(), 3.0)].into(),
            problem: String::new(),
        };
        let control = ControlCard {
            name: "canny".into(),
            modes: 7,
            multiple: 8,
            guesses: true,
            residuals: [("blocks", 3)].into(),
            ..ControlCard::default()
        };
        let wire = to_wire("flux-dev", &card, vec![adapter], vec![control]);
        let control = &wire.controls[0];
        assert_eq!((control.name.as_str(), control.modes, control.multiple_of, control.takes_guess_mode), ("canny", 7, 8, true));
        assert_eq!(control.residuals["blocks"], 3);
        let adapter = &wire.adapters[0];
        assert_eq!((adapter.name.as_str(), adapter.byte_size, &adapter.components[0]), ("pixel", 5, &"transformer".to_owned()));
        assert_eq!((adapter.defaults[0].name.as_str(), adapter.defaults[0].value, adapter.problem.as_str()), ("shift", 3.0, ""));
        assert_eq!((wire.name.as_str(), wire.family.as_str(), wire.max_pixels), ("flux-dev", "flux", 9));
        assert_eq!((&wire.pipeline_class, &wire.scheduler, &wire.digest), (&card.pipeline_class, &card.scheduler, &card.digest));
        assert!(wire.without_prompt && wire.pixels_per_image == 5);
        assert_eq!(wire.components[0].tp_options, [1, 2, 4]);
        assert_eq!((wire.components[0].weight_bytes, wire.components[0].max_block_ranges), (7, 3));
        assert_eq!(wire.components[0].fingerprint, "ef".repeat(32));
        assert_eq!(wire.stages[0].kind(), v1::StageKind::EncodeImage);
        assert_eq!(wire.stages[0].condition(), v1::StageCondition::WithImage);
        assert!(wire.stages[0].with_pictures && wire.stages[0].with_controls && wire.stages[0].replaces == "before");
        assert_eq!((wire.parameters[0].multiple_of, wire.parameters[0].default_value), (16.0, Some(1024.0)));
    }
}
