//! The controls of golden cases of whole generations: which networks, their pictures, and what is compared of them.

use candle_core::Tensor;
use models::control::kind::{ControlFacts, ControlKind};
use models::control::{ControlSource, card};
use models::denoise::{DenoiseState, Denoiser};
use models::model_dir::ModelDir;
use models::request::Control;
use serde_json::Value;
use tests::golden::{Case, Outcome};

use crate::pipeline::{NOISE_TOLERANCE, text};

/// A parameter or a key that is one thing, or a list of them.
fn list(value: &Value) -> Vec<Value> {
    match value {
        Value::Null => Vec::new(),
        Value::Array(all) => all.clone(),
        one => vec![one.clone()],
    }
}

/// The folders of the case's networks, by which they are called as well.
fn folders(case: &Case) -> Vec<String> {
    let of = |key: &str| list(&case.json[key]);
    let all = [of("controlnet_weights"), of("adapter_weights")].concat();
    all.into_iter().filter_map(|folder| folder.as_str().map(str::to_owned)).collect()
}

/// Whether a case's pictures are control pictures.
pub(crate) fn is_controlled(case: &Case) -> bool {
    !folders(case).is_empty()
}

pub(crate) fn sources(case: &Case) -> Result<Vec<ControlSource>, String> {
    let all = case.dir.parent().ok_or("a case has no folder around it")?;
    Ok(folders(case).into_iter().map(|name| ControlSource { path: all.join(&name), name, fingerprint: String::new() }).collect())
}

/// What a denoiser must know of them, checked as a worker does before jobs may name them.
pub(crate) fn facts(case: &Case, dir: &ModelDir) -> Result<Vec<ControlFacts>, String> {
    let registered = sources(case)?.into_iter().map(|ControlSource { name, path, .. }| card::RegisteredControl { name, path });
    let registered: Vec<_> = registered.collect();
    if let Some(bad) = card::describe(dir, &registered).into_iter().find(|card| !card.problem.is_empty()) {
        return Err(format!("{}: {}", bad.name, bad.problem));
    }
    let one = |control: card::RegisteredControl| {
        Ok(ControlFacts { kind: ControlKind::read(&control.path).map_err(text)?, name: control.name })
    };
    registered.into_iter().map(one).collect()
}

/// The job's controls.
pub(crate) fn controls(case: &Case) -> Vec<Control> {
    let number = |names: [&str; 2], k: usize, default: f64| {
        let given = names.into_iter().flat_map(|name| list(case.param(name)));
        let given: Vec<f64> = given.filter_map(|value| value.as_f64()).collect();
        given.get(k).or(given.first()).copied().unwrap_or(default)
    };
    let modes = list(case.param("control_mode"));
    let one = |(k, name): (usize, String)| Control {
        name,
        conditioning_scale: number(["controlnet_conditioning_scale", "adapter_conditioning_scale"], k, 1.0),
        guidance_start: number(["control_guidance_start", ""], k, 0.0),
        guidance_end: number(["control_guidance_end", "adapter_conditioning_factor"], k, 1.0),
        mode: modes.get(k).and_then(Value::as_u64).map(|mode| mode as usize),
    };
    // One network may be given several pictures.
    let folders = folders(case);
    let named: Vec<String> = match &folders[..] {
        [one] => vec![one.clone(); modes.len().max(1)],
        _ => folders,
    };
    named.into_iter().enumerate().map(one).collect()
}

/// The controls' pictures.
pub(crate) fn pictures(case: &Case) -> Result<Vec<Vec<u8>>, String> {
    if !is_controlled(case) {
        return Ok(Vec::new());
    }
    let files = [list(case.param("control_image")), list(case.param("image"))].concat();
    let read = |file: &Value| std::fs::read(case.dir.join(file.as_str().unwrap_or_default())).map_err(text);
    files.iter().map(read).collect()
}

/// Whether the first draw of the run is of the control picture's latents, from another generator than the job's.
pub(crate) fn draws_elsewhere(case: &Case) -> bool {
    case.json["pipeline_class"].as_str() == Some("StableDiffusion3ControlNetPipeline")
}

/// The first control's picture as its network was given it at the first step.
pub(crate) fn check_start(case: &mut Case, denoiser: &dyn Denoiser, state: &DenoiseState) -> Outcome {
    let branches = denoiser.branches(state).map_err(text)?;
    let given: Vec<Tensor> = branches.iter().filter_map(|branch| branch.find("controls.0.cond").cloned()).collect();
    for recorded in ["controlnet_cond", "controlnet_cond.0"].map(|name| format!("controlnet.call0.in.{name}")) {
        if case.has(&recorded) {
            let rows = case.tensor(&recorded)?.dims()[0];
            let got = Tensor::cat(&given, 0).and_then(|all| all.narrow(0, 0, rows)).map_err(text)?;
            // Latents are made of the autoencoder's output.
            let of_latents = case.tolerance("vae_encode.call0.mean").unwrap_or(NOISE_TOLERANCE);
            case.check_within(&recorded, &got, of_latents.max(NOISE_TOLERANCE))?;
        }
    }
    Ok(())
}
