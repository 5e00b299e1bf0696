//! FLUX.1: the transformer alone, whole and cut, and whole pictures.

use std::path::Path;

use models::blocks::{BlockModel, Layout, RangeOf};
use models::flux_transformer::{FluxTransformer, FluxTransformerConfig};
use parallel::{DType, Device, Solo, Tensor, Tensors, Weights};
use tests::golden::{Case, Outcome};
use tests::ranks::run_block_model;

/// The layouts every transformer case is run at, besides one rank; those that its heads cannot be divided by are left out.
const LAYOUTS: [Layout; 5] = [Layout::new(2, 1), Layout::new(1, 2), Layout::new(2, 2), Layout::new(4, 1), Layout::new(1, 3)];

pub(crate) fn component(case: &mut Case) -> Outcome {
    let dir = case.folder("weights")?;
    let text = std::fs::read(dir.join("config.json")).map_err(|e| format!("config.json: {e}"))?;
    let config: FluxTransformerConfig = serde_json::from_slice(&text).map_err(|e| format!("config.json: {e}"))?;
    let inputs: Tensors = case.below("in.").map(|(name, tensor)| (name.to_owned(), tensor.clone())).collect();
    block_by_block(case, &dir, &config, &inputs)?;
    for layout in std::iter::once(Layout::SOLO).chain(LAYOUTS) {
        if config.num_attention_heads.is_multiple_of(layout.tp) {
            let at_layout = |e: String| format!("at tp {} x {} ranges: {e}", layout.tp, layout.block_ranges);
            let load = |w: &Weights, range: RangeOf| FluxTransformer::load(w, &config, range);
            let ran = run_block_model(&dir, layout, &inputs, load).map_err(|e| at_layout(e.to_string()))?;
            for output in &ran.outputs {
                case.check("out.sample", output.get("sample").map_err(|e| at_layout(e.to_string()))?).map_err(at_layout)?;
            }
        }
    }
    Ok(())
}

/// Every block as a range of its own, one after the other, so that each one's output can be looked at.
fn block_by_block(case: &mut Case, dir: &Path, config: &FluxTransformerConfig, inputs: &Tensors) -> Outcome {
    let text = |e: models::Error| e.to_string();
    let load = |index: usize| -> models::Result<FluxTransformer> {
        let w = Weights::open(dir, std::sync::Arc::new(Solo), DType::F32, &Device::Cpu)?;
        FluxTransformer::load(&w, config, RangeOf { index, count: config.blocks() })
    };
    let mut hidden = load(0).and_then(|first| first.embed(inputs)).map_err(text)?;
    check_embedded(case, &hidden)?;
    for block in 0..config.blocks() {
        let model = load(block).map_err(text)?;
        hidden = model.blocks(hidden).map_err(text)?;
        check_block(case, config, &hidden, block)?;
        if block + 1 == config.blocks() {
            let output = model.output(std::mem::take(&mut hidden)).map_err(text)?;
            case.check("out.sample", output.get("sample").map_err(|e| e.to_string())?)?;
        }
    }
    Ok(())
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
