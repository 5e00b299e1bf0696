//! The FLUX.1 transformer alone, whole and cut.

use models::blocks::RangeOf;
use models::flux_transformer::{FluxTransformer, FluxTransformerConfig};
use models::model_dir::read_json;
use parallel::{Tensor, Tensors, Weights};
use tests::golden::{Case, Outcome};

use crate::transformers::{at_every_layout, block_by_block};

pub(crate) fn component(case: &mut Case) -> Outcome {
    let dir = case.folder("weights")?;
    let config: FluxTransformerConfig = read_json(&dir.join("config.json")).map_err(|e| e.to_string())?;
    let load = |w: &Weights, range: RangeOf| FluxTransformer::load(w, &config, range);
    let check_block = |case: &mut Case, hidden: &Tensors, block: usize| check_block(case, &config, hidden, block);
    block_by_block(case, &dir, config.blocks(), load, check_embedded, check_block)?;
    at_every_layout(case, &dir, config.num_attention_heads, load)
}

fn check_embedded(case: &mut Case, hidden: &Tensors) -> Outcome {
    let get = |name: &str| hidden.get(name).map_err(|e| e.to_string());
    let plain =
        [("tap.x_embedder", "hidden_states"), ("tap.context_embedder", "encoder_hidden_states"), ("tap.time_text_embed", "temb")];
    for (tap, name) in plain.into_iter().filter(|(tap, _)| case.has(tap)).collect::<Vec<_>>() {
        case.check(tap, get(name)?)?;
    }
    for (tap, name) in [("tap.pos_embed.0", "image_rotary_emb.cos"), ("tap.pos_embed.1", "image_rotary_emb.sin")] {
        if case.has(tap) {
            // The reference repeats each angle for both of its pair.
            let table = get(name)?;
            let repeated = Tensor::stack(&[table, table], 2).and_then(|t| t.flatten_from(1)).map_err(|e| e.to_string())?;
            case.check(tap, &repeated)?;
        }
    }
    Ok(())
}

/// Recorded are the blocks' outputs, before a ControlNet's residual is added; `hidden` is after.
fn check_block(case: &mut Case, config: &FluxTransformerConfig, hidden: &Tensors, block: usize) -> Outcome {
    let (kind, residuals, index, count) = match block.checked_sub(config.num_layers) {
        None => ("transformer_blocks", "controlnet_block_samples", block, config.num_layers),
        Some(index) => ("single_transformer_blocks", "controlnet_single_block_samples", index, config.num_single_layers),
    };
    let samples = (0..).take_while(|i| case.has(&format!("in.{residuals}.{i}"))).count();
    let mut hidden_states = hidden.get("hidden_states").map_err(|e| e.to_string())?.clone();
    if samples > 0 {
        let residual = case.tensor(&format!("in.{residuals}.{}", index / count.div_ceil(samples)))?;
        hidden_states = (hidden_states - residual).map_err(|e| e.to_string())?;
    }
    case.check(&format!("tap.{kind}.{index}.0"), hidden.get("encoder_hidden_states").map_err(|e| e.to_string())?)?;
    case.check(&format!("tap.{kind}.{index}.1"), &hidden_states)
}
