//! CLIP and T5. Cases: `clip_*`, `t5_encoder*`, `mt5_encoder`.

use std::sync::Arc;

use models::blocks::{BlockModel, RangeOf};
use models::clip::{ClipTextConfig, ClipTextEncoder};
use models::model_dir::read_json;
use models::t5::{T5Config, T5Encoder};
use parallel::{DType, Device, Solo, Tensors, Weights};
use tests::golden::{Case, Outcome};

pub(crate) fn run(case: &mut Case) -> Outcome {
    if case.json["model_class"].as_str().is_some_and(|class| class.starts_with("CLIP")) {
        clip(case)
    } else {
        t5(case, "no_mask")?;
        t5(case, "with_mask")
    }
}

fn clip(case: &mut Case) -> Outcome {
    let config: ClipTextConfig = read_json(&case.folder("weights")?.join("config.json")).map_err(text)?;
    let model = ClipTextEncoder::load(&weights(case)?, &config).map_err(text)?;
    let got = model.forward(case.tensor("in.input_ids")?).map_err(text)?;
    for (i, state) in got.hidden_states.iter().enumerate() {
        case.check(&format!("out.hidden_states.{i}"), state)?;
    }
    case.check("out.last_hidden_state", &got.last_hidden_state)?;
    case.check("out.pooled", &got.pooled)
}

/// Runs the encoder as one block range per block, so that every hidden state is seen.
fn t5(case: &mut Case, run: &str) -> Outcome {
    let config: T5Config = read_json(&case.folder("weights")?.join("config.json")).map_err(text)?;
    let mut inputs = Tensors::new().with("input_ids", case.tensor("in.input_ids")?.clone());
    if run == "with_mask" {
        inputs.insert("attention_mask", case.tensor("in.attention_mask")?.clone());
    }
    let mut hidden = None;
    for index in 0..config.num_layers {
        let range = RangeOf { index, count: config.num_layers };
        let model = T5Encoder::load(&weights(case)?, &config, range).map_err(text)?;
        let before = match hidden.take() {
            Some(hidden) => hidden,
            None => {
                let embedded = model.embed(&inputs).map_err(text)?;
                check_if_there(case, &format!("out.{run}.hidden_states.0"), &embedded)?;
                let length = case.tensor("in.input_ids")?.dims()[1];
                let bias = model.position_bias(length).map_err(text)?;
                check_if_there(case, "tap.encoder.block.0.layer.0.SelfAttention.1", &Tensors::new().with("hidden_states", bias))?;
                embedded
            }
        };
        let after = model.blocks(before).map_err(text)?;
        if run == "no_mask" && index == 0 {
            check_if_there(case, "tap.encoder.block.0.layer.1", &after)?;
        }
        if range.is_last() {
            let output = model.output(after).map_err(text)?;
            let last = output.get("last_hidden_state").map_err(text)?;
            let recorded = format!("out.{run}.hidden_states.{}", index + 1);
            // The reference's last hidden state has the final norm.
            check_if_there(case, &recorded, &Tensors::new().with("hidden_states", last.clone()))?;
            return case.check(&format!("out.{run}.last_hidden_state"), last);
        }
        check_if_there(case, &format!("out.{run}.hidden_states.{}", index + 1), &after)?;
        hidden = Some(after);
    }
    Err("the model has no blocks".into())
}

fn check_if_there(case: &mut Case, name: &str, hidden: &Tensors) -> Outcome {
    if !case.has(name) {
        return Ok(());
    }
    case.check(name, hidden.get("hidden_states").map_err(text)?)
}

fn weights(case: &Case) -> Result<Weights, String> {
    Weights::open(&case.folder("weights")?, Arc::new(Solo), DType::F32, &Device::Cpu).map_err(text)
}

fn text(e: impl std::fmt::Display) -> String {
    e.to_string()
}
