//! Stable Diffusion 3 and 3.5: the transformer alone, whole and cut, and whole generations through the stages that workers run.

use models::autoencoder_kl::AutoencoderKlConfig;
use models::blocks::RangeOf;
use models::model_dir::{ModelDir, read_json};
use models::request::{Encoder, Guidance};
use models::sd3::Sd3Denoiser;
use models::sd3_transformer::{Sd3Transformer, Sd3TransformerConfig};
use parallel::{Tensors, Weights};
use tests::golden::{Case, Outcome};

use crate::controlled;
use crate::pipeline::{Family, TextEncoder, generation, text};
use crate::transformers::{at_every_layout, block_by_block};

pub(crate) fn component(case: &mut Case) -> Outcome {
    let dir = case.folder("weights")?;
    let config: Sd3TransformerConfig = read_json(&dir.join("config.json")).map_err(text)?;
    let load = |w: &Weights, range: RangeOf| Sd3Transformer::load(w, &config, range);
    let check_block = |case: &mut Case, hidden: &Tensors, block: usize| check_block(case, &config, hidden, block);
    block_by_block(case, &dir, config.num_layers, load, check_embedded, check_block)?;
    at_every_layout(case, &dir, config.num_attention_heads, load)
}

fn check_embedded(case: &mut Case, hidden: &Tensors) -> Outcome {
    let taps =
        [("tap.pos_embed", "hidden_states"), ("tap.context_embedder", "encoder_hidden_states"), ("tap.time_text_embed", "temb")];
    for (tap, name) in taps {
        if case.has(tap) {
            case.check(tap, hidden.get(name).map_err(text)?)?;
        }
    }
    Ok(())
}

/// Recorded are the blocks' outputs, before a ControlNet's residual is added; `hidden` is after.
fn check_block(case: &mut Case, config: &Sd3TransformerConfig, hidden: &Tensors, block: usize) -> Outcome {
    let name = "block_controlnet_hidden_states";
    let samples = (0..).take_while(|i| case.has(&format!("in.{name}.{i}"))).count();
    let last = block + 1 == config.num_layers;
    let mut hidden_states = hidden.get("hidden_states").map_err(text)?.clone();
    if samples > 0 && !last {
        let residual = case.tensor(&format!("in.{name}.{}", block * samples / config.num_layers))?;
        hidden_states = (hidden_states - residual).map_err(text)?;
    }
    if !last {
        case.check(&format!("tap.transformer_blocks.{block}.0"), hidden.get("encoder_hidden_states").map_err(text)?)?;
    }
    case.check(&format!("tap.transformer_blocks.{block}.1"), &hidden_states)
}

pub(crate) fn pipeline(case: &mut Case) -> Outcome {
    let dir = ModelDir::open(&case.folder("weights")?).map_err(text)?;
    let vae: AutoencoderKlConfig = dir.config("vae").map_err(text)?;
    let mut encoders = vec![
        TextEncoder { component: "text_encoder", tokenizer: "tokenizer", encoder: Encoder::First, tokens: Some(77) },
        TextEncoder { component: "text_encoder_2", tokenizer: "tokenizer_2", encoder: Encoder::Second, tokens: Some(77) },
    ];
    if dir.component("text_encoder_3").is_some() {
        encoders.push(TextEncoder {
            component: "text_encoder_3",
            tokenizer: "tokenizer_3",
            encoder: Encoder::Third,
            tokens: None,
        });
    }
    let family = Family {
        denoiser: &Sd3Denoiser::load(&dir).map_err(text)?.with_controls(&controlled::facts(case, &dir)?),
        guidance: Guidance::Cfg,
        encoders,
        embeds: vec![
            ("encode_prompt.call0.0", "prompt_embeds"),
            ("encode_prompt.call0.1", "negative_prompt_embeds"),
            ("encode_prompt.call0.2", "pooled_prompt_embeds"),
            ("encode_prompt.call0.3", "negative_pooled_prompt_embeds"),
        ],
        // The embeddings among them are compared above, at their own tolerances.
        network: "transformer",
        inputs: vec!["timestep"].into_iter().map(|name| (name, name)).collect(),
        pictures: if controlled::is_controlled(case) { vec!["control.0"] } else { vec!["image"] },
        encode: None,
        unscale: &|latents| vae.unscale(latents),
    };
    generation(case, &dir, &family)
}
