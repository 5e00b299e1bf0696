//! Every recorded case, or a reason why not.
//!
//! `[GOLDEN_DIR=<absolute folder>] [GOLDEN_ONLY=flux,t5] cargo test --release --workspace --test golden -- --nocapture` runs every
//! case folder found there (default: tests/golden) and prints a line for each. A case that cannot be run must be listed, with its
//! reason, in tests/golden/UNSUPPORTED.toml.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use tests::golden::{Case, Outcome};

mod autoencoders;
mod controlled;
mod controls;
mod deepfloyd_if;
mod dit;
mod flux;
mod flux_pipeline;
mod lama;
mod pipeline;
mod qwen2_5_vl;
mod qwen_image;
mod qwen_image_pipeline;
mod rng;
mod schedulers;
mod sd3;
mod stable_diffusion;
mod text_encoders;
mod tokenizers;
mod transformers;
mod unet;

#[test]
fn every_case_equals_its_recording() {
    let dir = std::env::var_os("GOLDEN_DIR").map_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("golden"), PathBuf::from);
    let only = std::env::var("GOLDEN_ONLY").unwrap_or_default();
    let only: Vec<&str> = only.split(',').filter(|s| !s.is_empty()).collect();
    let unsupported = unsupported();
    let (mut passed, mut failed, mut skipped) = (0, Vec::new(), 0);
    for path in case_folders(&dir) {
        let name = path.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
        if !only.is_empty() && !only.iter().any(|prefix| name.starts_with(prefix)) {
            continue;
        }
        if let Some(reason) = unsupported.get(&name) {
            println!("{name:<42} unsupported: {reason}");
            skipped += 1;
            continue;
        }
        match run(&path) {
            (case, Ok(())) => {
                println!("{name:<42} pass  {case}");
                passed += 1;
            }
            (case, Err(e)) => {
                println!("{name:<42} FAIL  {case} {e}");
                failed.push(name);
            }
        }
    }
    println!("{passed} passed, {} failed, {skipped} unsupported", failed.len());
    assert!(failed.is_empty(), "failed: {failed:?}");
    assert!(passed > 0, "no case was run: is GOLDEN_DIR ({}) right?", dir.display());
}

fn run(path: &Path) -> (String, Outcome) {
    let mut case = match Case::open(path) {
        Ok(case) => case,
        Err(e) => return (String::new(), Err(e)),
    };
    let outcome = dispatch(&mut case);
    let worst = case.worst().map(|w| format!("worst {} {:.1e} of {:.1e}", w.name, w.error, w.tolerance));
    (worst.unwrap_or_default(), outcome)
}

fn dispatch(case: &mut Case) -> Outcome {
    let class =
        ["model_class", "pipeline_class"].into_iter().find_map(|key| case.json[key].as_str()).unwrap_or_default().to_owned();
    match (case.kind(), class.as_str()) {
        ("rng", _) => rng::run(case),
        ("tokenizer", _) => tokenizers::run(case),
        ("scheduler", _) => schedulers::run(case),
        (
            "component",
            "CLIPTextModel" | "CLIPTextModelWithProjection" | "T5EncoderModel" | "MT5EncoderModel" | "UMT5EncoderModel",
        ) => text_encoders::run(case),
        ("component", "Qwen2_5_VLForConditionalGeneration") => qwen2_5_vl::run(case),
        ("component", "AutoencoderKL") => autoencoders::run(case),
        ("component", "AutoencoderKLQwenImage") => autoencoders::qwen_image(case),
        ("component", "FluxTransformer2DModel") => flux::component(case),
        ("component", "QwenImageTransformer2DModel") => qwen_image::component(case),
        ("component", "SD3Transformer2DModel") => sd3::component(case),
        ("component", "UNet2DConditionModel") => unet::component(case),
        ("component", "Lama") => lama::component(case),
        (
            "component",
            "ControlNetModel" | "T2IAdapter" | "FluxControlNetModel" | "SD3ControlNetModel" | "QwenImageControlNetModel",
        ) => controls::component(case),
        ("component", "PixArtTransformer2DModel") => dit::pixart(case),
        ("component", "DiTTransformer2DModel") => dit::dit(case),
        ("component", "HunyuanDiT2DModel") => dit::hunyuan(case),
        ("component", "BertModel") => dit::bert(case),
        ("pipeline", class) if class.starts_with("StableDiffusion3") => sd3::pipeline(case),
        ("pipeline", class) if class.starts_with("StableDiffusionXL") => stable_diffusion::xl(case),
        ("pipeline", class) if class.starts_with("StableDiffusion") => stable_diffusion::pipeline(case),
        ("pipeline", class) if class.starts_with("IF") => deepfloyd_if::pipeline(case),
        ("pipeline", "DiTPipeline") => dit::dit_pipeline(case),
        ("pipeline", class) if class.starts_with("HunyuanDiT") => dit::hunyuan_pipeline(case),
        ("pipeline", class) if class.starts_with("PixArt") => dit::pixart_pipeline(case),
        ("pipeline", class) if class.starts_with("Flux") => flux_pipeline::run(case),
        ("pipeline", class) if class.starts_with("QwenImage") => qwen_image_pipeline::run(case),
        (kind, class) => Err(format!("nothing runs a {kind} of `{class}`, and UNSUPPORTED.toml does not list it")),
    }
}

fn unsupported() -> BTreeMap<String, String> {
    let text = include_str!("../../golden/UNSUPPORTED.toml");
    toml::from_str(text).expect("UNSUPPORTED.toml maps case names to reasons")
}

fn case_folders(dir: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(dir).unwrap_or_else(|e| panic!("{}: {e}", dir.display()));
    let mut folders: Vec<PathBuf> =
        entries.filter_map(|e| Some(e.ok()?.path())).filter(|p| p.join("case.json").is_file()).collect();
    folders.sort();
    folders
}
