//! What golden cases of whole generations share, whatever the family: jobs from `case.json`, stages as workers run them, and the
//! comparisons of draws and steps.

use candle_core::{Device, Tensor};
use models::blocks::RankGroup;
use models::lora::card::{self, Registered};
use models::lora::store::{DEFAULT_CACHE_BYTES, Source, Sources};
use models::model_dir::ModelDir;
use models::registry::{self, Limits, LoadSpec, Rank};
use models::request::Lora;
use models::stage::{Inputs, Pictures, Stage, StageEvent};
use models::{Payload, Request};
use parallel::rng::{Generator, TorchCpu};
use serde_json::Value;
use tests::golden::{Case, Outcome};

/// Normals may differ from torch's in the last bits of the logarithm; the case `rng_cpu` says by how much.
pub(crate) const NOISE_TOLERANCE: f64 = 2e-6;

/// One job for each prompt of the case.
pub(crate) fn jobs(case: &Case) -> Result<Vec<Request>, String> {
    let list = |name: &str| match case.param(name) {
        Value::Null => Vec::new(),
        Value::Array(values) => values.iter().map(|v| v.as_str().unwrap_or_default().to_owned()).collect(),
        value => vec![value.as_str().unwrap_or_default().to_owned()],
    };
    let number = |name: &str| case.param(name).as_f64();
    let size = |name: &str| number(name).map(|v| v as usize);
    let (second, negative) = (list("prompt_2"), list("negative_prompt"));
    let loras = loras(case)?;
    let job = |(i, prompt): (usize, String)| {
        Some(Request {
            prompt,
            prompt_2: second.get(i).cloned(),
            negative_prompt: negative.get(i).cloned(),
            width: size("width")?,
            height: size("height")?,
            num_inference_steps: size("num_inference_steps")?,
            guidance_scale: number("guidance_scale"),
            true_cfg_scale: number("true_cfg_scale").unwrap_or(1.0),
            seed: case.json["generator_seed"].as_u64()?,
            num_images_per_prompt: size("num_images_per_prompt").unwrap_or(1),
            strength: number("strength"),
            max_sequence_length: size("max_sequence_length")?,
            loras: loras.clone(),
            ..Request::default()
        })
    };
    list("prompt").into_iter().enumerate().map(job).collect::<Option<_>>().ok_or_else(|| "a parameter is missing".into())
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
    for name in (0..).map(|i| format!("randn{i:02}")).take_while(|name| case.has(name)).collect::<Vec<_>>() {
        let draw = generator.randn(case.tensor(&name)?.dims()).map_err(text)?;
        case.check_within(&name, &draw, NOISE_TOLERANCE)?;
    }
    Ok(())
}

/// The job's pictures, if it has any.
pub(crate) fn pictures(case: &Case) -> Result<Option<Pictures>, String> {
    let read = |name: &str| case.param(name).as_str().map(|file| std::fs::read(case.dir.join(file)).map_err(text)).transpose();
    let (image, mask_image) = (read("image")?, read("mask_image")?);
    Ok(image.is_some().then_some(Pictures { image, mask_image }))
}

/// Several prompts of one generator: each job gets its rows of the one draw. A single job draws for itself.
pub(crate) fn feed_noise(case: &Case, jobs: &[Request], inputs: &mut [Inputs]) -> Outcome {
    if jobs.len() == 1 {
        return Ok(());
    }
    let noise = case.tensor("randn00")?;
    for (i, inputs) in inputs.iter_mut().enumerate() {
        let rows = jobs[i].num_images_per_prompt;
        inputs.noise = Some(noise.narrow(0, i * rows, rows).map_err(text)?);
    }
    Ok(())
}

/// All jobs at once in one engine.
pub(crate) fn denoise(case: &mut Case, dir: &ModelDir, jobs: &[Request], inputs: &[Inputs]) -> Result<Vec<Payload>, String> {
    let mut stage = load(case, dir, "transformer")?;
    let tasks: Vec<_> = jobs.iter().cloned().zip(inputs.iter().cloned()).collect();
    let mut steps: Vec<Vec<Tensor>> = Vec::new();
    let outputs = run_stage(&mut *stage, &tasks, |step, sample| {
        if steps.len() < step {
            steps.resize(step, Vec::new());
        }
        steps[step - 1].push(sample.clone());
        Ok(())
    })?;
    for (step, rows) in steps.iter().enumerate() {
        case.check(&format!("step{step:02}.prev_sample"), &Tensor::cat(rows, 0).map_err(text)?)?;
    }
    Ok(outputs)
}

/// Every job through a component's stage, one after the other.
pub(crate) fn one_by_one(
    case: &Case,
    dir: &ModelDir,
    component: &str,
    jobs: &[Request],
    inputs: &[Inputs],
) -> Result<Vec<Payload>, String> {
    let mut stage = load(case, dir, component)?;
    let alone = |(job, inputs): (&Request, &Inputs)| {
        Ok(run_stage(&mut *stage, &[(job.clone(), inputs.clone())], |_, _| Ok(()))?.remove(0))
    };
    jobs.iter().zip(inputs).map(alone).collect()
}

/// A component's stage on a group of one, with the case's adapters.
pub(crate) fn load(case: &Case, dir: &ModelDir, component: &str) -> Result<Box<dyn Stage>, String> {
    let spec = LoadSpec { dir, component, group: RankGroup::solo(), device: Device::Cpu, limits: Limits::default() };
    match registry::load_with(spec, sources(case, dir)?, &mut |_| ()).map_err(text)? {
        Rank::Leader(stage) => Ok(stage),
        Rank::Follower(_) => Err("a group of one has a leader only".into()),
    }
}

/// Starts all tasks, takes turns until all are done, and returns their outputs in order. `on_step` sees every denoise step.
pub(crate) fn run_stage(
    stage: &mut dyn Stage,
    tasks: &[(Request, Inputs)],
    mut on_step: impl FnMut(usize, &Tensor) -> Outcome,
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
                    failed = on_step(step, &last.prev_sample).err();
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
