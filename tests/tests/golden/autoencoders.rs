//! AutoencoderKL and AutoencoderKLQwenImage: moments, pictures and submodules, whole and in tiles.

use std::collections::HashMap;
use std::sync::Arc;

use candle_core::{DType, Device, Tensor};
use models::autoencoder_kl::{AutoencoderKl, AutoencoderKlConfig, Moments};
use models::autoencoder_kl_qwen::{AutoencoderKlQwenImage, AutoencoderKlQwenImageConfig};
use models::model_dir::read_json;
use parallel::{Solo, Weights};
use tests::golden::{Case, Outcome};

pub(crate) fn run(case: &mut Case) -> Outcome {
    let folder = case.folder("weights")?;
    let config: AutoencoderKlConfig = read_json(&folder.join("config.json")).map_err(err)?;
    let weights = Weights::open(&folder, Arc::new(Solo), DType::F32, &Device::Cpu).map_err(err)?;
    let vae = AutoencoderKl::load(&weights, &config).map_err(err)?;
    let (image, latent) = (case.tensor("in.image")?.clone(), case.tensor("in.latent")?.clone());
    if case.has("out.decode_tiled") {
        check_moments(case, &vae.encode_tiled(&image).map_err(err)?)?;
        case.check("out.decode_tiled", &vae.decode_tiled(&latent).map_err(err)?)?;
        return case.check("out.decode_untiled", &vae.decode(&latent).map_err(err)?);
    }
    let mut seen = HashMap::new();
    let mut tap = |name: &str, x: &Tensor| drop(seen.insert(format!("tap.{name}"), x.clone()));
    let moments = vae.encode_tapped(&image, &mut tap).map_err(err)?;
    let decoded = vae.decode_tapped(&latent, &mut tap).map_err(err)?;
    let mut taps: Vec<String> = case.below("tap.").map(|(name, _)| format!("tap.{name}")).collect();
    taps.sort();
    for name in taps {
        case.check(&name, seen.get(&name).ok_or_else(|| format!("`{name}` was not tapped"))?)?;
    }
    check_moments(case, &moments)?;
    case.check("out.decode", &decoded)
}

/// Recorded with a frame dimension of one.
pub(crate) fn qwen_image(case: &mut Case) -> Outcome {
    let folder = case.folder("weights")?;
    let config: AutoencoderKlQwenImageConfig = read_json(&folder.join("config.json")).map_err(err)?;
    let weights = Weights::open(&folder, Arc::new(Solo), DType::F32, &Device::Cpu).map_err(err)?;
    let vae = AutoencoderKlQwenImage::load(&weights, &config).map_err(err)?;
    let mut seen = HashMap::new();
    let mut tap = |name: &str, x: &Tensor| drop(seen.insert(format!("tap.{name}"), x.clone()));
    let frame = |name: &str| case.tensor(name)?.squeeze(2).map_err(err);
    let moments = vae.encode_tapped(&frame("in.image")?, &mut tap).map_err(err)?;
    let decoded = vae.decode_tapped(&frame("in.latent")?, &mut tap).map_err(err)?;
    let outputs = [("out.encode.mean", moments.mean), ("out.encode.logvar", moments.logvar), ("out.decode", decoded)];
    seen.extend(outputs.map(|(name, x)| (name.to_owned(), x)));
    let mut names: Vec<String> =
        ["tap.", "out."].iter().flat_map(|p| case.below(p).map(move |(n, _)| format!("{p}{n}"))).collect();
    names.sort();
    for name in names {
        let got = seen.get(&name).ok_or_else(|| format!("`{name}` was not seen"))?;
        case.check(&name, &got.unsqueeze(2).map_err(err)?)?;
    }
    Ok(())
}

fn check_moments(case: &mut Case, moments: &Moments) -> Outcome {
    let std = moments.std().map_err(err)?;
    for (name, got) in [("mean", &moments.mean), ("logvar", &moments.logvar), ("std", &std)] {
        let name = format!("out.encode.{name}");
        if case.has(&name) {
            case.check(&name, got)?;
        }
    }
    Ok(())
}

fn err(e: impl std::fmt::Display) -> String {
    e.to_string()
}
