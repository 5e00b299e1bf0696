//! Control networks alone, whole and cut. Cases: `controlnet_*`, `adapter_*`.

use std::path::Path;

use models::blocks::{BlockModel, Layout};
use models::control::kind::ControlKind;
use models::control::{Control, ControlNetwork};
use models::{Error, Result};
use parallel::{Device, Tensor, Tensors};
use tests::golden::{Case, Outcome};
use tests::ranks::run_block_model;

use crate::pipeline::text;
use crate::transformers::inputs;

/// Guess mode multiplies the first tensor by this and the last by one.
const LEAST_GUESS: f64 = 0.1;

pub(crate) fn component(case: &mut Case) -> Outcome {
    let dir = case.folder("weights")?;
    let mut kind = ControlKind::read(&dir).map_err(text)?;
    if let ControlKind::Sd3(config) = &mut kind {
        // In the reference it is the pipeline that gives zeros in place of the pooled text.
        config.force_zeros_for_pooled_projection = false;
    }
    let inputs = as_a_pass(case)?;
    for layout in [Layout::SOLO, Layout::new(2, 1)] {
        let load = |w: &parallel::Weights, _| Ok(Alone(kind.load(w)?));
        let ran = run_block_model(Path::new(&dir), layout, &inputs, load).map_err(text)?;
        for output in &ran.outputs {
            compare(case, &kind, output).map_err(|e| format!("at tp {}: {e}", layout.tp))?;
        }
    }
    Ok(())
}

/// The recorded inputs as those of a pass of the network that is controlled.
fn as_a_pass(case: &Case) -> std::result::Result<Tensors, String> {
    let mut inputs = inputs(case);
    if let Some(image) = inputs.find("x").cloned() {
        inputs.insert("controlnet_cond", image);
    }
    if let Some(mode) = inputs.find("controlnet_mode").cloned() {
        inputs.insert("controlnet_mode", mode.to_dtype(parallel::DType::U32).and_then(|mode| mode.flatten_all()).map_err(text)?);
    }
    if let Some(shapes) = case.param("img_shapes").as_array() {
        let row = |shape: &serde_json::Value| -> Vec<u32> {
            shape.as_array().into_iter().flatten().filter_map(|side| side.as_u64().map(|side| side as u32)).collect()
        };
        inputs.insert("img_shapes", Tensor::new(shapes.iter().map(row).collect::<Vec<_>>(), &Device::Cpu).map_err(text)?);
    }
    Ok(inputs)
}

/// Its outputs, and where they were recorded at another scale or in guess mode those as well.
fn compare(case: &mut Case, kind: &ControlKind, output: &Tensors) -> Outcome {
    let names: Vec<(String, String)> = match kind {
        ControlKind::Adapter(_) => list("features", "down_intrablock_additional_residuals", output),
        ControlKind::UNet(_) => {
            let mut names = list("down", "down_block_additional_residuals", output);
            names.push(("mid".into(), "mid_block_additional_residual".into()));
            names
        }
        ControlKind::Flux(_) => {
            let mut names = list("double", "controlnet_block_samples", output);
            names.extend(list("single", "controlnet_single_block_samples", output));
            names
        }
        ControlKind::Sd3(_) => list("blocks", "block_controlnet_hidden_states", output),
        ControlKind::QwenImage(_) => list("blocks", "controlnet_block_samples", output),
    };
    let scale = scale(case)?;
    let plain = if matches!(kind, ControlKind::UNet(_)) { 1.0 } else { scale };
    let last = (names.len() - 1) as f64;
    for (i, (recorded, name)) in names.iter().enumerate() {
        let residual = output.get(name).map_err(text)?;
        let guess = LEAST_GUESS.powf(1.0 - i as f64 / last);
        for (kind, scale) in [("out", plain), ("out.scaled", scale), ("out.guess", guess)] {
            let recorded = format!("{kind}.{recorded}");
            if kind == "out" || case.has(&recorded) {
                case.check(&recorded, &(residual * scale).map_err(text)?)?;
            }
        }
    }
    Ok(())
}

/// What a case's sentence says of `conditioning_scale`; 1 if nothing.
fn scale(case: &Case) -> std::result::Result<f64, String> {
    let what = case.json["what"].as_str().unwrap_or_default();
    let Some((_, rest)) = what.split_once("conditioning_scale ") else { return Ok(1.0) };
    let number = rest.split(|c: char| !c.is_ascii_digit() && c != '.').next().unwrap_or_default();
    number.trim_end_matches('.').parse().map_err(|e| format!("{what:?}: {e}"))
}

fn list(recorded: &str, name: &str, output: &Tensors) -> Vec<(String, String)> {
    (0..output.list(name).len()).map(|i| (format!("{recorded}.{i}"), format!("{name}.{i}"))).collect()
}

/// A control network as a row of no blocks.
struct Alone(Box<dyn ControlNetwork>);

impl BlockModel for Alone {
    fn embed(&self, inputs: &Tensors) -> Result<Tensors> {
        let cond = inputs.get("controlnet_cond")?;
        let control = Control { cond, mode: inputs.find("controlnet_mode"), scale: None };
        let residuals = self.0.residuals(inputs, &[control])?;
        let named = residuals.len();
        let output: Tensors = residuals.into_iter().collect();
        if output.len() == named { Ok(output) } else { Err(Error::Rank { reason: "two residuals have one name".into() }) }
    }

    fn blocks(&self, hidden: Tensors) -> Result<Tensors> {
        Ok(hidden)
    }

    fn output(&self, hidden: Tensors) -> Result<Tensors> {
        Ok(hidden)
    }
}
