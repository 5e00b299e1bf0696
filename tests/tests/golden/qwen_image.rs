//! The Qwen-Image transformer alone, whole and cut.

use models::blocks::RangeOf;
use models::model_dir::read_json;
use models::qwen_image_transformer::{QwenImageTransformer, QwenImageTransformerConfig};
use parallel::{Device, Tensor, Tensors, Weights};
use tests::golden::{Case, Outcome};

use crate::pipeline::text;
use crate::transformers::{at_every_layout, block_by_block};

pub(crate) fn component(case: &mut Case) -> Outcome {
    let dir = case.folder("weights")?;
    let config: QwenImageTransformerConfig = read_json(&dir.join("config.json")).map_err(text)?;
    let shapes: Vec<Vec<u32>> = serde_json::from_value(case.param("img_shapes").clone()).map_err(text)?;
    case.put("in.img_shapes", Tensor::new(shapes, &Device::Cpu).map_err(text)?);
    let load = |w: &Weights, range: RangeOf| QwenImageTransformer::load(w, &config, range);
    let check_block = |case: &mut Case, hidden: &Tensors, block: usize| check_block(case, &config, hidden, block);
    block_by_block(case, &dir, config.num_layers, load, check_embedded, check_block)?;
    at_every_layout(case, &dir, config.num_attention_heads, load)
}

fn check_embedded(case: &mut Case, hidden: &Tensors) -> Outcome {
    let get = |name: &str| hidden.get(name).map_err(text);
    let plain = [("tap.img_in", "hidden_states"), ("tap.txt_in", "encoder_hidden_states"), ("tap.time_text_embed", "temb")];
    for (tap, name) in plain {
        check_if_there(case, tap, get(name)?)?;
    }
    // One table, text first; the reference has one for each.
    let l_txt = get("encoder_hidden_states")?.dims()[1];
    for part in ["cos", "sin"] {
        let table = get(&format!("image_rotary_emb.{part}"))?;
        let l_img = table.dims()[0] - l_txt;
        check_if_there(case, &format!("out.rope.txt_{part}"), &table.narrow(0, 0, l_txt).map_err(text)?)?;
        check_if_there(case, &format!("out.rope.img_{part}"), &table.narrow(0, l_txt, l_img).map_err(text)?)?;
    }
    Ok(())
}

/// Recorded are the blocks' outputs, before a ControlNet's residual is added; `hidden` is after.
fn check_block(case: &mut Case, config: &QwenImageTransformerConfig, hidden: &Tensors, block: usize) -> Outcome {
    let samples = (0..).take_while(|i| case.has(&format!("in.controlnet_block_samples.{i}"))).count();
    let mut hidden_states = hidden.get("hidden_states").map_err(text)?.clone();
    if samples > 0 {
        let index = block / config.num_layers.div_ceil(samples);
        let residual = case.tensor(&format!("in.controlnet_block_samples.{index}"))?;
        hidden_states = (hidden_states - residual).map_err(text)?;
    }
    case.check(&format!("tap.transformer_blocks.{block}.0"), hidden.get("encoder_hidden_states").map_err(text)?)?;
    case.check(&format!("tap.transformer_blocks.{block}.1"), &hidden_states)
}

fn check_if_there(case: &mut Case, name: &str, got: &Tensor) -> Outcome {
    if case.has(name) { case.check(name, got) } else { Ok(()) }
}
