//! Whole Qwen-Image generations, through the stages that workers run.

use candle_core::{Device, Tensor};
use models::Request;
use models::autoencoder_kl_qwen::AutoencoderKlQwenImageConfig;
use models::blocks::RankGroup;
use models::denoise::Denoiser;
use models::model_dir::ModelDir;
use models::qwen_image::{self, Editing, QwenImageDenoiser};
use models::registry::{Limits, LoadSpec, Rank};
use models::request::Guidance;
use models::stage::{Inputs, Stage};
use parallel::{DType, Solo, Weights};
use tests::golden::{Case, Outcome};

use crate::controlled;
use crate::pipeline::{
    Family, add, check_draws, check_start, decode, denoise, each_alone, feed_noise, jobs, load, pictures, start, text,
};

pub(crate) fn run(case: &mut Case) -> Outcome {
    let dir = ModelDir::open(&case.folder("weights")?).map_err(text)?;
    let vae: AutoencoderKlQwenImageConfig = dir.config("vae").map_err(text)?;
    let denoiser = QwenImageDenoiser::load(&dir).map_err(text)?.with_controls(&controlled::facts(case, &dir)?);
    let family = Family {
        denoiser: &denoiser,
        guidance: Guidance::TrueCfg,
        encoders: Vec::new(), // the prompts are in templates and not padded: see `encode_prompts`
        embeds: Vec::new(),
        network: "transformer",
        inputs: vec!["timestep"].into_iter().map(|name| (name, name)).collect(),
        pictures: Vec::new(), // encoded at a size of their own: see `encode_pictures`
        encode: None,
        // The reference's have a frame: [B, C, 1, H, W].
        unscale: &|latents| Ok(vae.unscale(latents)?.unsqueeze(2)?),
    };
    let jobs = jobs(case)?;
    check_draws(case)?;
    let mut inputs: Vec<Inputs> = jobs.iter().map(|_| Inputs::default()).collect();
    if let Some(pictures) = pictures(case)? {
        inputs.iter_mut().for_each(|inputs| inputs.pictures = pictures.clone());
    }
    encode_prompts(case, &dir, &jobs, &mut inputs)?;
    encode_pictures(case, &dir, &jobs, &mut inputs)?;
    feed_noise(case, &jobs, &mut inputs)?;
    let states = start(&family, &jobs, &inputs)?;
    check_start(case, &family, &states)?;
    if jobs.len() == 1 && case.has("vae_encode.call0.mean") {
        // The latents of the picture, scaled, among them.
        let tolerance = case.tolerance("vae_encode.call0.mean")?;
        let given = denoiser.branches(&states[0]).map_err(text)?.remove(0).take("hidden_states").map_err(text)?;
        case.check_within("transformer.call0.in.hidden_states", &given, tolerance)?;
    }
    let latents = denoise(case, &dir, "transformer", &jobs, &inputs)?;
    decode(case, &dir, &family, &jobs, latents)
}

/// The prompts' embeddings. Ours are as long as their text; the reference's are padded with zeros to the longest.
fn encode_prompts(case: &mut Case, dir: &ModelDir, jobs: &[Request], inputs: &mut [Inputs]) -> Outcome {
    let outputs = each_alone(&mut *stage(case, dir, "text_encoder")?, jobs, inputs)?;
    for (call, name) in ["prompt_embeds", "negative_prompt_embeds"].into_iter().enumerate() {
        let recorded = format!("encode_prompt.call{call}.0");
        if !case.has(&recorded) {
            continue;
        }
        let longest = case.tensor(&recorded)?.dims()[1];
        let (mut rows, mut masks) = (Vec::new(), Vec::new());
        for output in &outputs {
            let embeds = output.tensors().get(name).map_err(text)?;
            let tokens = embeds.dims()[1];
            let padding = longest.checked_sub(tokens).ok_or("a text has more tokens than recorded")?;
            rows.push(embeds.pad_with_zeros(1, 0, padding).map_err(text)?);
            masks.push((0..longest).map(|i| i64::from(i < tokens)).collect::<Vec<_>>());
        }
        case.check(&recorded, &Tensor::cat(&rows, 0).map_err(text)?)?;
        let mask = format!("encode_prompt.call{call}.1");
        if case.has(&mask) {
            case.check_within(&mask, &Tensor::new(masks, &Device::Cpu).map_err(text)?, 0.0)?;
        }
    }
    add(inputs, outputs)
}

/// The picture's latents, if the jobs have one.
fn encode_pictures(case: &mut Case, dir: &ModelDir, jobs: &[Request], inputs: &mut [Inputs]) -> Outcome {
    if !case.has("vae_encode.call0.mean") {
        return Ok(());
    }
    let outputs = each_alone(&mut *stage(case, dir, "vae")?, jobs, inputs)?;
    for call in (0..).take_while(|call| case.has(&format!("vae_encode.call{call}.mean"))).collect::<Vec<_>>() {
        let picture = match call {
            _ if controlled::is_controlled(case) => format!("control.{call}"),
            0 => "image".into(),
            more => format!("image.{more}"),
        };
        for name in ["mean", "logvar"] {
            let got = outputs[0].tensors().get(&format!("{picture}.{name}")).map_err(text)?.unsqueeze(2).map_err(text)?;
            case.check(&format!("vae_encode.call{call}.{name}"), &got)?;
        }
    }
    add(inputs, outputs)
}

/// A component's stage on a group of one, looking at pictures of the case's own working area.
fn stage(case: &Case, dir: &ModelDir, component: &str) -> Result<Box<dyn Stage>, String> {
    let area = |name: &str| case.param(name).as_u64().map(|area| area as usize);
    let Some(encoded) = area("working_area_pixels") else { return load(case, dir, component) };
    let seen = area("condition_area_pixels").unwrap_or(encoded);
    let editing = Editing::of(dir).map(|editing| Editing { seen, encoded, ..editing });
    let path = dir.require(component).map_err(text)?.path;
    let weights = Weights::open(&path, std::sync::Arc::new(Solo), DType::F32, &Device::Cpu).map_err(text)?;
    let spec = LoadSpec { dir, component, group: RankGroup::solo(), device: Device::Cpu, limits: Limits::default() };
    match qwen_image::load_with(spec, &weights, editing).map_err(text)? {
        Rank::Leader(stage) => Ok(stage),
        Rank::Follower(_) => Err("a group of one has a leader only".into()),
    }
}
