//! U-Nets alone, whole and cut, and with what ControlNets and T2I-Adapters add to them. Cases: `unet_*`.

use std::path::Path;

use models::blocks::{Layout, RangeOf};
use models::if_unet::{IfUNet, IfUNetConfig};
use models::model_dir::read_json;
use models::unet_2d_condition::{UNet2DConditionConfig, UNet2DConditionModel};
use parallel::{Tensors, Weights};
use tests::golden::{Case, Outcome};
use tests::ranks::run_block_model;

use crate::pipeline::text;
use crate::transformers::{at_every_layout, block_by_block, inputs};

pub(crate) fn component(case: &mut Case) -> Outcome {
    let dir = case.folder("weights")?;
    let kind: serde_json::Value = read_json(&dir.join("config.json")).map_err(text)?;
    if kind["addition_embed_type"] == "text" {
        return of_deepfloyd_if(case, &dir);
    }
    let config: UNet2DConditionConfig = read_json(&dir.join("config.json")).map_err(text)?;
    if case.has("out.plain") {
        return with_residuals(case, &dir, &config);
    }
    let load = |w: &Weights, range: RangeOf| UNet2DConditionModel::load(w, &config, range);
    let check_block = |case: &mut Case, hidden: &Tensors, block: usize| check_block(case, config.resolutions(), hidden, block);
    block_by_block(case, &dir, config.blocks(), load, check_embedded, check_block)?;
    at_every_layout(case, &dir, config.shares(), load)
}

/// DeepFloyd IF's, whose blocks are others. Of the timestep's embedding and what is added to it, the noise level's is not recorded.
fn of_deepfloyd_if(case: &mut Case, dir: &Path) -> Outcome {
    let config: IfUNetConfig = read_json(&dir.join("config.json")).map_err(text)?;
    let load = |w: &Weights, range: RangeOf| IfUNet::load(w, &config, range);
    let has_noise_level = config.has_noise_level();
    let check_embedded = |case: &mut Case, hidden: &Tensors| {
        case.check("tap.encoder_hid_proj", hidden.get("encoder_hidden_states").map_err(text)?)?;
        if has_noise_level {
            case.check("tap.conv_in", hidden.get("sample").map_err(text)?)
        } else {
            check_embedded(case, hidden)
        }
    };
    let check_block = |case: &mut Case, hidden: &Tensors, block: usize| check_block(case, config.resolutions(), hidden, block);
    block_by_block(case, dir, config.blocks(), load, check_embedded, check_block)?;
    at_every_layout(case, dir, config.shares(), load)
}

fn check_embedded(case: &mut Case, hidden: &Tensors) -> Outcome {
    if case.has("tap.conv_in") {
        case.check("tap.conv_in", hidden.get("sample").map_err(text)?)?;
    }
    let temb = hidden.get("temb").map_err(text)?;
    if !case.has("tap.add_embedding") {
        return case.check("tap.time_embedding", temb);
    }
    // Recorded are both alone.
    let tolerance = case.tolerance("tap.time_embedding")? + case.tolerance("tap.add_embedding")?;
    let added = (temb - case.tensor("tap.add_embedding")?).map_err(text)?;
    case.check_within("tap.time_embedding", &added, tolerance)
}

/// Recorded of a block on the way down are its output and what the way up takes again.
fn check_block(case: &mut Case, resolutions: usize, hidden: &Tensors, block: usize) -> Outcome {
    let sample = hidden.get("sample").map_err(text)?;
    let tap = match block.checked_sub(resolutions) {
        None => format!("tap.down_blocks.{block}.0"),
        Some(0) => "tap.mid_block".to_owned(),
        Some(up) => format!("tap.up_blocks.{}", up - 1),
    };
    if case.has(&tap) {
        case.check(&tap, sample)?;
    }
    if block >= resolutions {
        return Ok(());
    }
    let skips = hidden.list("down_block_res_samples");
    let own = (0..).take_while(|i| case.has(&format!("tap.down_blocks.{block}.1.{i}"))).count();
    for (i, skip) in skips[skips.len() - own..].iter().enumerate() {
        case.check(&format!("tap.down_blocks.{block}.1.{i}"), skip)?;
    }
    Ok(())
}

/// The plain network, with a ControlNet's residuals, and with a T2I-Adapter's features.
fn with_residuals(case: &mut Case, dir: &Path, config: &UNet2DConditionConfig) -> Outcome {
    let all = inputs(case);
    let is_plain = |name: &str| ["sample", "timestep", "encoder_hidden_states"].contains(&name);
    let plain: Tensors = all.iter().filter(|(name, _)| is_plain(name)).map(|(name, t)| (name.to_owned(), t.clone())).collect();
    let mut controlled = plain.clone().with("mid_block_additional_residual", all.get("mid").map_err(text)?.clone());
    let mut adapted = plain.clone();
    for (recorded, name, inputs) in [
        ("down", "down_block_additional_residuals", &mut controlled),
        ("adapter", "down_intrablock_additional_residuals", &mut adapted),
    ] {
        all.list(recorded).into_iter().enumerate().for_each(|(i, tensor)| inputs.insert(format!("{name}.{i}"), tensor));
    }
    let load = |w: &Weights, range: RangeOf| UNet2DConditionModel::load(w, config, range);
    for (output, inputs) in [("out.plain", &plain), ("out.controlnet", &controlled), ("out.adapter", &adapted)] {
        for layout in [Layout::SOLO, Layout::new(2, 1), Layout::new(1, 2), Layout::new(1, 7)] {
            let ran = run_block_model(dir, layout, inputs, load).map_err(text)?;
            case.check(output, ran.output("sample").map_err(text)?)?;
        }
    }
    Ok(())
}
