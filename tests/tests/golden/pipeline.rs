//! What golden cases of whole generations share, whatever the family: jobs from `case.json`, stages as workers run them, and the
//! comparisons of draws and steps.

use candle_core::{Device, Tensor};
use models::blocks::RankGroup;
use models::denoise::{DenoiseState, Denoiser};
use models::lora::card::{self, Registered};
use models::lora::store::{DEFAULT_CACHE_BYTES, Source, Sources};
use models::model_dir::ModelDir;
use models::registry::{self, Limits, LoadSpec, Rank};
use models::request::{AESTHETIC_SCORE, Encoder, Guidance, Lora, NEGATIVE_AESTHETIC_SCORE, SizeConditions};
use models::stage::{Inputs, Pictures, Stage, StageEvent};
use models::tokenizer::Tokenizer;
use models::{Payload, Request};
use parallel::rng::{Generator, TorchCpu};
use serde_json::Value;
use tests::golden::{Case, Outcome};

use crate::controlled;

/// Normals may differ from torch's in the last bits of the logarithm; the case `rng_cpu` says by how much.
pub(crate) const NOISE_TOLERANCE: f64 = 2e-6;

/// What another model left of a job that this one goes on with.
pub(crate) const BASE_LATENTS: &str = "base_latents";

/// What one text encoder reads.
pub(crate) struct TextEncoder {
    pub(crate) component: &'static str,
    pub(crate) tokenizer: &'static str,
    pub(crate) encoder: Encoder,
    /// `None`: the job's `max_sequence_length`.
    pub(crate) tokens: Option<usize>,
}

/// What a family's generations are compared by.
pub(crate) struct Family<'a> {
    pub(crate) denoiser: &'a dyn Denoiser,
    pub(crate) guidance: Guidance,
    pub(crate) encoders: Vec<TextEncoder>,
    /// Recorded embeddings, and what the denoiser calls them.
    pub(crate) embeds: Vec<(&'static str, &'static str)>,
    /// The component that denoises.
    pub(crate) network: &'static str,
    /// Inputs of the network that are compared at the first step, where they are recorded: as what, and what they are called.
    pub(crate) inputs: Vec<(&'static str, &'static str)>,
    /// Pictures that the autoencoder encodes, in the order it is called.
    pub(crate) pictures: Vec<&'static str>,
    /// How it encodes them, if not as the model's stage does.
    pub(crate) encode: Option<&'a Encode<'a>>,
    /// The denoiser's output to what the decoder works on.
    pub(crate) unscale: &'a dyn Fn(&Tensor) -> models::Result<Tensor>,
}

/// Each job's pictures encoded.
pub(crate) type Encode<'a> = dyn Fn(&[Request], &[Inputs]) -> Result<Vec<Payload>, String> + 'a;

/// A whole generation, stage by stage, each compared with its recording.
pub(crate) fn generation(case: &mut Case, dir: &ModelDir, family: &Family<'_>) -> Outcome {
    let jobs = jobs(case)?;
    check_ids(case, dir, family, &jobs)?;
    check_draws(case)?;
    let mut inputs: Vec<Inputs> = jobs.iter().map(|_| Inputs::default()).collect();
    for TextEncoder { component, .. } in &family.encoders {
        let outputs = one_by_one(case, dir, component, &jobs, &inputs)?;
        add(&mut inputs, outputs)?;
    }
    encode_pictures(case, dir, family, &jobs, &mut inputs)?;
    feed_noise(case, &jobs, &mut inputs)?;
    if case.has(BASE_LATENTS) {
        inputs[0].latents = Some(case.tensor(BASE_LATENTS)?.clone());
    }
    let states = start(family, &jobs, &inputs)?;
    check_embeds(case, family, &states)?;
    check_start(case, family, &states)?;
    let latents = denoise(case, dir, family.network, &jobs, &inputs)?;
    decode(case, dir, family, &jobs, latents)
}

/// One job for each prompt of the case.
pub(crate) fn jobs(case: &Case) -> Result<Vec<Request>, String> {
    let list = |name: &str| match case.param(name) {
        Value::Null => Vec::new(),
        Value::Array(values) => values.iter().map(|v| v.as_str().unwrap_or_default().to_owned()).collect(),
        value => vec![value.as_str().unwrap_or_default().to_owned()],
    };
    let number = |name: &str| case.param(name).as_f64();
    let size = |name: &str| number(name).map(|v| v as usize);
    // Cases that start from a picture leave its size to it: they draw one of the same.
    let side = |name: &str, dim: usize| size(name).or_else(|| case.tensor("image").ok()?.dims().get(dim).copied());
    let (loras, controls) = (loras(case)?, controlled::controls(case));
    let [second, third] = ["prompt_2", "prompt_3"].map(list);
    let [negative, negative_2, negative_3] = ["negative_prompt", "negative_prompt_2", "negative_prompt_3"].map(list);
    let prompts = list("prompt");
    let job = |(i, prompt): (usize, String)| {
        Some(Request {
            prompt,
            prompt_2: second.get(i).cloned(),
            prompt_3: third.get(i).cloned(),
            negative_prompt: negative.get(i).cloned(),
            negative_prompt_2: negative_2.get(i).cloned(),
            negative_prompt_3: negative_3.get(i).cloned(),
            width: side("width", 2)?,
            height: side("height", 1)?,
            num_inference_steps: size("num_inference_steps")?,
            guidance_scale: number("guidance_scale"),
            true_cfg_scale: number("true_cfg_scale").unwrap_or(1.0),
            seed: case.json["generator_seed"].as_u64()?,
            num_images_per_prompt: size("num_images_per_prompt").unwrap_or(1),
            strength: number("strength"),
            clip_skip: size("clip_skip"),
            eta: number("eta").unwrap_or_default(),
            noise_level: size("noise_level"),
            denoising_end: number("denoising_end").or(number("denoising_start")),
            aesthetic_score: number("aesthetic_score").unwrap_or(AESTHETIC_SCORE),
            negative_aesthetic_score: number("negative_aesthetic_score").unwrap_or(NEGATIVE_AESTHETIC_SCORE),
            size_conditions: size_conditions(case, i, prompts.len()),
            guidance_rescale: number("guidance_rescale").unwrap_or_default(),
            // Cases of Qwen-Image leave the reference's default.
            max_sequence_length: size("max_sequence_length").unwrap_or(512),
            loras: loras.clone(),
            controls: controls.clone(),
            guess_mode: case.param("guess_mode").as_bool().unwrap_or_default(),
            ..Request::default()
        })
    };
    prompts.iter().cloned().enumerate().map(job).collect::<Option<_>>().ok_or_else(|| "a parameter is missing".into())
}

/// Sizes and crops that Stable Diffusion XL is told of in the job of one prompt of several. From noise the reference repeats the unconditional pass's row and the
/// other's by turns, and stacks the passes one after the other: each prompt is told of the rows of its places among all.
fn size_conditions(case: &Case, prompt: usize, prompts: usize) -> SizeConditions {
    let pair = |name: &str| {
        let values = case.param(name).as_array()?;
        Some([0, 1].map(|i| values.get(i).and_then(Value::as_u64).unwrap_or_default() as u32))
    };
    let row =
        |prefix: &str| ["original_size", "crops_coords_top_left", "target_size"].map(|name| pair(&format!("{prefix}{name}")));
    let (negative, positive) = (row("negative_"), row(""));
    let rows = if prompts == 1 || negative[0].is_none() {
        [negative, positive]
    } else {
        [0, prompts].map(|pass| [negative, positive][(pass + prompt) % 2])
    };
    let [
        [negative_original_size, negative_crops_coords_top_left, negative_target_size],
        [original_size, crops_coords_top_left, target_size],
    ] = rows;
    SizeConditions {
        original_size,
        crops_coords_top_left,
        target_size,
        negative_original_size,
        negative_crops_coords_top_left,
        negative_target_size,
    }
}

/// The ids every text encoder is given: for the prompts at its first call, and with guidance for the negative ones at its second.
pub(crate) fn check_ids(case: &mut Case, dir: &ModelDir, family: &Family<'_>, jobs: &[Request]) -> Outcome {
    for TextEncoder { component, tokenizer, encoder, tokens } in &family.encoders {
        let tokenizer = Tokenizer::load(&dir.root().join(tokenizer)).map_err(text)?;
        let tokens = tokens.unwrap_or(jobs[0].max_sequence_length);
        let ids = |prompt: &str| {
            Ok(tokenizer.encode(prompt, tokens).map_err(text)?.input_ids.into_iter().map(i64::from).collect::<Vec<_>>())
        };
        let check = |case: &mut Case, call: usize, rows: Vec<Vec<i64>>| {
            case.check_within(&format!("{component}.call{call}.input_ids"), &Tensor::new(rows, &Device::Cpu).map_err(text)?, 0.0)
        };
        check(case, 0, jobs.iter().map(|job| ids(job.prompt_of(*encoder))).collect::<Result<_, String>>()?)?;
        // XL's unconditional pass may be given zeros, of no text.
        if jobs[0].cfg_scale(family.guidance).is_some() && case.has(&format!("{component}.call1.input_ids")) {
            let negative = jobs.iter().filter_map(|job| job.negative_prompt_of(*encoder, family.guidance));
            check(case, 1, negative.map(ids).collect::<Result<_, String>>()?)?;
        }
    }
    Ok(())
}

/// The case's adapters, by the names of their files, and the weight of each.
fn loras(case: &Case) -> Result<Vec<Lora>, String> {
    let one = |lora: &Value| Some(Lora { name: lora["file"].as_str()?.to_owned(), scale: lora["weight"].as_f64()? });
    let all = case.json["lora"].as_array().into_iter().flatten().map(one);
    all.collect::<Option<_>>().ok_or_else(|| "an adapter has no file or no weight".into())
}

/// The same, as a worker checks and registers them.
fn sources(case: &Case, dir: &ModelDir) -> Result<Sources, String> {
    let registered: Vec<Registered> = loras(case)?
        .into_iter()
        .map(|Lora { name, .. }| Registered { path: case.dir.join(&name), name, defaults: Default::default() })
        .collect();
    let cards = card::describe(dir, &registry::describe(dir).map_err(text)?, &registered).map_err(text)?;
    if let Some(card) = cards.iter().find(|card| !card.problem.is_empty()) {
        return Err(card.problem.clone());
    }
    let source = |(card, Registered { name, path, .. }): (card::AdapterCard, Registered)| Source {
        name,
        path,
        digest: card.digest,
        components: card.components,
    };
    Ok(Sources { named: cards.into_iter().zip(registered).map(source).collect(), cache_bytes: DEFAULT_CACHE_BYTES })
}

/// The draws of the run, in order, from its seed.
pub(crate) fn check_draws(case: &mut Case) -> Outcome {
    let seed = case.json["generator_seed"].as_u64().ok_or("no generator_seed")?;
    let mut generator = Generator::Cpu(TorchCpu::new(seed));
    let first = usize::from(controlled::draws_elsewhere(case));
    for name in (first..).map(|i| format!("randn{i:02}")).take_while(|name| case.has(name)).collect::<Vec<_>>() {
        let draw = generator.randn(case.tensor(&name)?.dims()).map_err(text)?;
        case.check_within(&name, &draw, NOISE_TOLERANCE)?;
    }
    Ok(())
}

/// The job's pictures, if it has any.
pub(crate) fn pictures(case: &Case) -> Result<Option<Pictures>, String> {
    let read = |name: &str| case.param(name).as_str().map(|file| std::fs::read(case.dir.join(file)).map_err(text)).transpose();
    let controls = controlled::pictures(case)?;
    if !controls.is_empty() {
        return Ok(Some(Pictures { controls, ..Pictures::default() }));
    }
    let several = case.param("image").as_array().into_iter().flatten().filter_map(Value::as_str);
    let mut several = several.map(|file| std::fs::read(case.dir.join(file)).map_err(text));
    let image = several.next().transpose()?.or(read("image")?);
    let more = several.collect::<Result<_, _>>()?;
    Ok(image.is_some().then_some(Pictures { image, more, mask_image: read("mask_image")?, controls }))
}

/// The pictures' latents, if the jobs start from some.
fn encode_pictures(case: &mut Case, dir: &ModelDir, family: &Family<'_>, jobs: &[Request], inputs: &mut [Inputs]) -> Outcome {
    let Some(pictures) = pictures(case)? else { return Ok(()) };
    inputs.iter_mut().for_each(|inputs| inputs.pictures = pictures.clone());
    if controlled::is_controlled(case) && family.pictures.is_empty() {
        return Ok(()); // they are given to the denoiser
    }
    let outputs = match family.encode {
        Some(encode) => encode(jobs, inputs)?,
        None => one_by_one(case, dir, "vae", jobs, inputs)?,
    };
    for (call, picture) in family.pictures.iter().enumerate() {
        for moment in ["mean", "logvar"] {
            let encoded = outputs[0].tensors().get(&format!("{picture}.{moment}")).map_err(text)?;
            let recorded = format!("vae_encode.call{call}.{moment}");
            // The reference encodes a control picture once for each pass.
            let rows = case.tensor(&recorded)?.dims()[0];
            let encoded = Tensor::cat(&vec![encoded.clone(); rows], 0).map_err(text)?;
            case.check(&recorded, &encoded)?;
        }
    }
    add(inputs, outputs)
}

/// Every job's output of a stage, to its inputs of the next.
pub(crate) fn add(inputs: &mut [Inputs], outputs: Vec<Payload>) -> Outcome {
    inputs.iter_mut().zip(outputs).try_for_each(|(inputs, output)| inputs.add(output).map_err(text))
}

/// Every job as the denoiser starts it.
pub(crate) fn start(family: &Family<'_>, jobs: &[Request], inputs: &[Inputs]) -> Result<Vec<DenoiseState>, String> {
    jobs.iter().zip(inputs).map(|(job, inputs)| family.denoiser.start(job.clone(), inputs.clone()).map_err(text)).collect()
}

/// What the denoiser makes of the text encoders' outputs.
pub(crate) fn check_embeds(case: &mut Case, family: &Family<'_>, states: &[DenoiseState]) -> Outcome {
    let guided = states[0].request.cfg_scale(family.guidance).is_some();
    for (recorded, name) in family.embeds.iter().filter(|(_, name)| guided || !name.starts_with("negative_")) {
        let mut rows = Vec::new();
        for state in states {
            let one = state.tensors.get(name).map_err(text)?;
            rows.extend(std::iter::repeat_n(one.clone(), state.pictures()));
        }
        case.check(recorded, &Tensor::cat(&rows, 0).map_err(text)?)?;
    }
    Ok(())
}

/// Where the denoiser starts, and what the network is given first.
pub(crate) fn check_start(case: &mut Case, family: &Family<'_>, states: &[DenoiseState]) -> Outcome {
    let timesteps: Vec<f64> =
        case.json["timesteps_passed_to_step"].as_array().into_iter().flatten().filter_map(Value::as_f64).collect();
    if states[0].scheduler.timesteps().len() != timesteps.len() {
        return Err(format!("{} timesteps, expected {}", states[0].scheduler.timesteps().len(), timesteps.len()));
    }
    if let Some((got, expected)) = states[0].scheduler.timesteps().iter().zip(&timesteps).find(|(a, b)| (*a - *b).abs() > 1e-3) {
        return Err(format!("timestep {got}, expected {expected}"));
    }
    let tolerance = case.tolerance("step00.prev_sample")?;
    let latents: Vec<Tensor> = states.iter().map(|s| s.latents.clone()).collect();
    case.check_within("latents_init", &Tensor::cat(&latents, 0).map_err(text)?, tolerance)?;
    controlled::check_start(case, family.denoiser, &states[0])?;
    let branches = family.denoiser.branches(&states[0]).map_err(text)?;
    for (recorded, name) in &family.inputs {
        let recorded = format!("{}.call0.in.{recorded}", family.network);
        if states.len() > 1 || !case.has(&recorded) {
            continue;
        }
        let each: Vec<Tensor> = branches.iter().map(|b| b.get(name).cloned()).collect::<Result<_, _>>().map_err(text)?;
        // Some pipelines pass both branches at once.
        let one = case.tensor(&recorded)?.dims()[0] == each[0].dims()[0];
        let got = if one { each[0].clone() } else { Tensor::cat(&each, 0).map_err(text)? };
        // What the network is given of the latents has no tolerance of its own: it is made of the first step's sample.
        let of_latents = if ["hidden_states", "sample"].contains(name) { tolerance } else { NOISE_TOLERANCE };
        let tolerance = case.tolerance(&recorded).unwrap_or(of_latents);
        case.check_within(&recorded, &got, tolerance)?;
    }
    Ok(())
}

/// Several prompts of one generator: each job gets its rows of every draw. A single job draws for itself.
pub(crate) fn feed_noise(case: &Case, jobs: &[Request], inputs: &mut [Inputs]) -> Outcome {
    if controlled::draws_elsewhere(case) {
        inputs[0].control_noise = vec![case.tensor("randn00")?.clone()];
    }
    if jobs.len() == 1 {
        return Ok(());
    }
    let noise = case.tensor("randn00")?;
    // Qwen-Image's has a frame: [B, 1, C, H, W].
    let noise = if noise.rank() == 5 { noise.squeeze(1).map_err(text)? } else { noise.clone() };
    for (i, inputs) in inputs.iter_mut().enumerate() {
        let rows = jobs[i].num_images_per_prompt;
        let own = |noise: &Tensor| noise.narrow(0, i * rows, rows).map_err(text);
        inputs.noise = Some(own(&noise)?);
        let of_steps = (1..).map_while(|draw| case.tensor(&format!("randn{draw:02}")).ok());
        inputs.step_noise = of_steps.map(own).collect::<Result<_, _>>()?;
    }
    Ok(())
}

/// All jobs at once in one engine.
pub(crate) fn denoise(
    case: &mut Case,
    dir: &ModelDir,
    network: &str,
    jobs: &[Request],
    inputs: &[Inputs],
) -> Result<Vec<Payload>, String> {
    let mut stage = load(case, dir, network)?;
    let tasks: Vec<_> = jobs.iter().cloned().zip(inputs.iter().cloned()).collect();
    let mut steps: Vec<Vec<Tensor>> = Vec::new();
    let outputs = run_stage(&mut *stage, &tasks, |step, sample| {
        if steps.len() < step {
            steps.resize(step, Vec::new());
        }
        steps[step - 1].push(sample.clone());
    })?;
    for (step, rows) in steps.iter().enumerate() {
        case.check(&format!("step{step:02}.prev_sample"), &Tensor::cat(rows, 0).map_err(text)?)?;
    }
    Ok(outputs)
}

/// The latents as the decoder takes them, and the picture.
pub(crate) fn decode(case: &mut Case, dir: &ModelDir, family: &Family<'_>, jobs: &[Request], latents: Vec<Payload>) -> Outcome {
    let rows = latents.iter().map(|l| l.tensors().get("latents").cloned().map_err(text)).collect::<Result<Vec<_>, String>>()?;
    case.check("vae_decode.in", &(family.unscale)(&Tensor::cat(&rows, 0).map_err(text)?).map_err(text)?)?;
    let mut inputs: Vec<Inputs> = jobs.iter().map(|_| Inputs::default()).collect();
    add(&mut inputs, latents)?;
    let pictures = one_by_one(case, dir, "vae", jobs, &inputs)?;
    let images = pictures.iter().map(|p| p.image().cloned().map_err(text)).collect::<Result<Vec<_>, String>>()?;
    let image = Tensor::cat(&images, 0).and_then(|image| image.permute((0, 2, 3, 1))).map_err(text)?;
    case.check("image", &image)
}

/// Every job through a component's stage, one after the other.
pub(crate) fn one_by_one(
    case: &Case,
    dir: &ModelDir,
    component: &str,
    jobs: &[Request],
    inputs: &[Inputs],
) -> Result<Vec<Payload>, String> {
    each_alone(&mut *load(case, dir, component)?, jobs, inputs)
}

/// Every job through a stage, one after the other.
pub(crate) fn each_alone(stage: &mut dyn Stage, jobs: &[Request], inputs: &[Inputs]) -> Result<Vec<Payload>, String> {
    let alone = |(job, inputs): (&Request, &Inputs)| Ok(run_stage(stage, &[(job.clone(), inputs.clone())], |_, _| ())?.remove(0));
    jobs.iter().zip(inputs).map(alone).collect()
}

/// A component's stage on a group of one, with the case's adapters.
pub(crate) fn load(case: &Case, dir: &ModelDir, component: &str) -> Result<Box<dyn Stage>, String> {
    let spec = LoadSpec { dir, component, group: RankGroup::solo(), device: Device::Cpu, limits: Limits::default() };
    match registry::load_with(spec, sources(case, dir)?, &controlled::sources(case)?, &mut |_| ()).map_err(text)? {
        Rank::Leader(stage) => Ok(stage),
        Rank::Follower(_) => Err("a group of one has a leader only".into()),
    }
}

/// Starts all tasks, takes turns until all are done, and returns their outputs in order. `on_step` sees every denoise step.
pub(crate) fn run_stage(
    stage: &mut dyn Stage,
    tasks: &[(Request, Inputs)],
    mut on_step: impl FnMut(usize, &Tensor),
) -> Result<Vec<Payload>, String> {
    for (key, (request, inputs)) in tasks.iter().enumerate() {
        stage.start(key as u64, request.clone(), inputs.clone());
    }
    let mut done: Vec<Option<Payload>> = tasks.iter().map(|_| None).collect();
    let mut failed = None;
    while done.iter().any(Option::is_none) && failed.is_none() {
        let worked = stage.turn(&mut |event| match event {
            StageEvent::Step { step, state: Some(state), .. } => {
                if let Some(last) = &state.last {
                    on_step(step, &last.prev_sample);
                }
            }
            StageEvent::Done { key, payload } => done[key as usize] = Some(payload),
            StageEvent::Failed { error, .. } => failed = Some(error.to_string()),
            StageEvent::Started { .. } | StageEvent::Step { .. } => {}
        });
        if !worked.map_err(text)? {
            break;
        }
    }
    match failed {
        Some(reason) => Err(reason),
        None => done.into_iter().collect::<Option<_>>().ok_or_else(|| "a task was left undone".into()),
    }
}

/// An error as a case reports it.
pub(crate) fn text(e: impl std::fmt::Display) -> String {
    e.to_string()
}
