//! Qwen-Image's transformer alone, whole and cut.

use std::path::Path;

use models::blocks::{BlockModel, Layout, RangeOf};
use models::qwen_image_transformer::{QwenImageTransformer, QwenImageTransformerConfig};
use parallel::{DType, Device, Solo, Tensor, Tensors, Weights};
use tests::golden::{Case, Outcome};
use tests::ranks::run_block_model;

/// The layouts every transformer case is run at, besides one rank; those that its heads cannot be divided by are left out.
const LAYOUTS: [Layout; 5] = [
    Layout { tp: 2, block_ranges: 1 },
    Layout { tp: 1, block_ranges: 2 },
    Layout { tp: 2, block_ranges: 2 },
    Layout { tp: 4, block_ranges: 1 },
    Layout { tp: 1, block_ranges: 3 },
];

pub(crate) fn component(case: &mut Case) -> Outcome {
    let dir = case.folder("weights")?;
    let config: QwenImageTransformerConfig = models::model_dir::read_json(&dir.join("config.json")).map_err(text)?;
    let inputs: Tensors = case.below("in.").map(|(name, tensor)| (name.to_owned(), tensor.clone())).collect();
    let inputs = inputs.with("img_shapes", img_shapes(case)?);
    block_by_block(case, &dir, &config, &inputs)?;
    for layout in std::iter::once(Layout::SOLO).chain(LAYOUTS) {
        if config.num_attention_heads.is_multiple_of(layout.tp) {
            let at_layout = |e: String| format!("at tp {} x {} ranges: {e}", layout.tp, layout.block_ranges);
            let load = |w: &Weights, range: RangeOf| QwenImageTransformer::load(w, &config, range);
            let ran = run_block_model(&dir, layout, &inputs, load).map_err(|e| at_layout(e.to_string()))?;
            for output in &ran.outputs {
                case.check("out.sample", output.get("sample").map_err(|e| at_layout(e.to_string()))?).map_err(at_layout)?;
            }
        }
    }
    Ok(())
}

/// Recorded among the parameters.
fn img_shapes(case: &Case) -> Result<Tensor, String> {
    let shapes: Vec<Vec<u32>> = serde_json::from_value(case.param("img_shapes").clone()).map_err(text)?;
    Tensor::new(shapes, &Device::Cpu).map_err(text)
}

/// Every block as a range of its own, one after the other, so that each one's output can be looked at.
fn block_by_block(case: &mut Case, dir: &Path, config: &QwenImageTransformerConfig, inputs: &Tensors) -> Outcome {
    let load = |index: usize| -> models::Result<QwenImageTransformer> {
        let w = Weights::open(dir, std::sync::Arc::new(Solo), DType::F32, &Device::Cpu)?;
        QwenImageTransformer::load(&w, config, RangeOf { index, count: config.num_layers })
    };
    let mut hidden = load(0).and_then(|first| first.embed(inputs)).map_err(text)?;
    check_embedded(case, &hidden)?;
    for block in 0..config.num_layers {
        let model = load(block).map_err(text)?;
        hidden = model.blocks(hidden).map_err(text)?;
        check_block(case, config, &hidden, block)?;
        if block + 1 == config.num_layers {
            let output = model.output(std::mem::take(&mut hidden)).map_err(text)?;
            case.check("out.sample", output.get("sample").map_err(text)?)?;
        }
    }
    Ok(())
}

fn check_embedded(case: &mut Case, hidden: &Tensors) -> Outcome {
    let get = |name: &str| hidden.get(name).map_err(text);
    let plain = [("tap.img_in", "hidden_states"), ("tap.txt_in", "encoder_hidden_states"), ("tap.time_text_embed", "temb")];
    for (tap, name) in plain {
        if case.has(tap) {
            case.check(tap, get(name)?)?;
        }
    }
    // One table, text first; the reference has one for each.
    let l_txt = get("encoder_hidden_states")?.dims()[1];
    for part in ["cos", "sin"] {
        let table = get(&format!("image_rotary_emb.{part}"))?;
        let image_tokens = table.dims()[0] - l_txt;
        for (stream, at, tokens) in [("txt", 0, l_txt), ("img", l_txt, image_tokens)] {
            let recorded = format!("out.rope.{stream}_{part}");
            if case.has(&recorded) {
                case.check(&recorded, &table.narrow(0, at, tokens).map_err(text)?)?;
            }
        }
    }
    Ok(())
}

/// Recorded are the blocks' outputs, before a ControlNet's residual is added; `hidden` is after.
fn check_block(case: &mut Case, config: &QwenImageTransformerConfig, hidden: &Tensors, block: usize) -> Outcome {
    let samples = (0..).take_while(|i| case.has(&format!("in.controlnet_block_samples.{i}"))).count();
    let mut hidden_states = hidden.get("hidden_states").map_err(text)?.clone();
    if samples > 0 {
        let of = block / config.num_layers.div_ceil(samples);
        let residual = case.tensor(&format!("in.controlnet_block_samples.{of}"))?;
        hidden_states = (hidden_states - residual).map_err(text)?;
    }
    case.check(&format!("tap.transformer_blocks.{block}.0"), hidden.get("encoder_hidden_states").map_err(text)?)?;
    case.check(&format!("tap.transformer_blocks.{block}.1"), &hidden_states)
}

fn text(e: impl std::fmt::Display) -> String {
    e.to_string()
}
