//! Qwen2.5-VL: every submodule that was recorded, layer by layer, and the last hidden state however it is cut.

use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;

use models::blocks::{BlockModel, Layout, RangeOf};
use models::model_dir::read_json;
use models::qwen2_5_vl::{Qwen25VlConfig, Qwen25VlModel};
use parallel::{DType, Device, Solo, Tensor, Tensors, Weights};
use tests::golden::{Case, Outcome};
use tests::ranks::run_block_model;

/// (tp, block ranges). At tp 8 two ranks share each of the recorded model's heads.
const LAYOUTS: [(usize, usize); 9] = [(1, 1), (2, 1), (4, 1), (8, 1), (1, 2), (1, 3), (2, 2), (2, 3), (8, 2)];

pub(crate) fn run(case: &mut Case) -> Outcome {
    let dir = case.folder("weights")?;
    let config: Qwen25VlConfig = read_json(&dir.join("config.json")).map_err(text)?;
    let inputs: Tensors = case.below("in.").map(|(name, tensor)| (name.to_owned(), tensor.clone())).collect();
    layer_by_layer(case, &dir, &config, &inputs)?;
    let last = format!("out.hidden_states.{}", config.num_hidden_layers);
    for (tp, block_ranges) in LAYOUTS {
        let at_layout = |e: String| format!("at tp {tp} x {block_ranges} ranges: {e}");
        let load = |w: &Weights, range: RangeOf| Qwen25VlModel::load(w, &config, range);
        let ran = run_block_model(&dir, Layout::new(tp, block_ranges), &inputs, load).map_err(|e| at_layout(e.to_string()))?;
        for output in &ran.outputs {
            check(case, &last, output.get("last_hidden_state").map_err(text)?).map_err(at_layout)?;
        }
    }
    Ok(())
}

/// Every layer as a range of its own. The reference's last hidden state has the final norm.
fn layer_by_layer(case: &mut Case, dir: &Path, config: &Qwen25VlConfig, inputs: &Tensors) -> Outcome {
    let count = config.num_hidden_layers;
    let load = |index: usize| -> models::Result<Qwen25VlModel> {
        let w = Weights::open(dir, Arc::new(Solo), DType::F32, &Device::Cpu)?;
        Qwen25VlModel::load(&w, config, RangeOf { index, count })
    };
    let mut seen = HashMap::new();
    let mut tap = |name: &str, x: &Tensor| drop(seen.insert(format!("tap.{name}"), x.clone()));
    let first = load(0).map_err(text)?;
    if case.has("out.position_ids") {
        case.check_within("out.position_ids", &first.position_ids(inputs).map_err(text)?, 0.0)?;
        let features = first.image_features(inputs, &mut tap).map_err(text)?;
        case.check("out.image_features.0", &features)?;
    }
    let mut hidden = first.embed(inputs).map_err(text)?;
    check(case, "out.hidden_states.0", hidden.get("hidden_states").map_err(text)?)?;
    for index in 0..count {
        let model = load(index).map_err(text)?;
        hidden = model.blocks_tapped(hidden, &mut tap).map_err(text)?;
        if index + 1 < count {
            check(case, &format!("out.hidden_states.{}", index + 1), hidden.get("hidden_states").map_err(text)?)?;
        } else {
            let output = model.output(std::mem::take(&mut hidden)).map_err(text)?;
            check(case, &format!("out.hidden_states.{count}"), output.get("last_hidden_state").map_err(text)?)?;
        }
    }
    let mut taps: Vec<String> = case.below("tap.").map(|(name, _)| format!("tap.{name}")).collect();
    taps.sort();
    for name in taps {
        check(case, &name, seen.get(&name).ok_or_else(|| format!("`{name}` was not tapped"))?)?;
    }
    Ok(())
}

/// Values at masked positions depend on the implementation: those are not compared.
fn check(case: &mut Case, name: &str, got: &Tensor) -> Outcome {
    let mask = case.tensor("in.attention_mask")?.to_dtype(DType::U8).map_err(text)?;
    if !got.dims().starts_with(mask.dims()) {
        return case.check(name, got);
    }
    let mask = mask.unsqueeze(2).and_then(|mask| mask.broadcast_as(got.shape())).map_err(text)?;
    let compared = mask.where_cond(got, case.tensor(name)?).map_err(text)?;
    case.check(name, &compared)
}

fn text(e: impl std::fmt::Display) -> String {
    e.to_string()
}
