//! Schedulers: every run of a case, evaluation by evaluation.

use candle_core::{DType, Tensor};
use models::scheduler::{
    DiffusionConfig, FlowMatchEulerDiscrete, FlowMatchEulerDiscreteConfig, FlowMatchHeunDiscrete, FlowMatchHeunDiscreteConfig,
    Run, Schedule, Scheduler, StepNoise,
};
use serde_json::{Value, json};
use tests::golden::{Case, Outcome};

/// How far each sigma may be off, over itself, and timesteps: what the case `sched_timesteps` says.
const SIGMAS: f32 = 1e-5;
const TIMESTEPS: f32 = 1e-3;

pub(crate) fn run(case: &mut Case) -> Outcome {
    if let Some(configs) = case.json["configs"].as_object().cloned() {
        return configs.iter().try_for_each(|(name, config)| schedule(case, name, config).map_err(|e| format!("{name}: {e}")));
    }
    let runs = case.json["runs"].as_object().ok_or("case.json has no `runs`")?.clone();
    runs.iter().try_for_each(|(name, run)| one(case, name, run).map_err(|e| format!("{name}: {e}")))
}

fn one(case: &mut Case, name: &str, run: &Value) -> Outcome {
    let (mut scheduler, sigmas) = build(case, name, run)?;
    let begin = run["options"]["begin"].as_u64().unwrap_or(0) as usize;
    // Those of flows bit for bit: they are a handful of roundings. Others go through logarithms and powers.
    let is_flow = run["class"].as_str().is_some_and(|class| class.starts_with("FlowMatch"));
    let (of_sigmas, of_timesteps) = if is_flow { (0.0, 0.0) } else { (SIGMAS, TIMESTEPS) };
    if case.has(&format!("{name}.sigmas")) {
        check_near("sigmas", &sigmas, &numbers(case, &format!("{name}.sigmas"))?, |b| of_sigmas * b.abs())?;
    }
    let timesteps = numbers(case, &format!("{name}.timesteps"))?;
    check_near("timesteps", &f32s(scheduler.timesteps()), &timesteps[begin..], |_| of_timesteps)?;
    check_noised_start(case, name, &*scheduler)?;
    let steps = run["n_steps_made"].as_u64().ok_or("no `n_steps_made`")? as usize;
    let tolerance = case.tolerance(&format!("{name}.step{:02}.prev_sample", steps - 1))?;
    let mut sample = case.tensor(&format!("{name}.sample_init"))?.clone();
    for step in 0..steps {
        let of = |what: &str| format!("{name}.step{step:02}.{what}");
        let input = scheduler.scale_model_input(&sample, step).map_err(err)?;
        if case.has(&of("model_input")) {
            case.check_within(&of("model_input"), &input, tolerance)?;
        }
        let output = case.tensor(&of("model_output"))?.clone();
        sample = scheduler.step(&output, step, &sample).map_err(err)?;
        case.check_within(&of("prev_sample"), &sample, tolerance)?;
    }
    Ok(())
}

/// One schedule of a case that has no steps. Its name is `CLASS.SPACING.STEPS`.
fn schedule(case: &Case, name: &str, config: &Value) -> Outcome {
    let (class, steps) = name.split_once('.').zip(name.rsplit_once('.')).map(|(a, b)| (a.0, b.1)).ok_or("no class")?;
    let steps: usize = steps.parse().map_err(err)?;
    let is_plms = class == "PNDMScheduler";
    let mut config = config.clone();
    if is_plms {
        // By default it begins with Runge-Kutta steps, which are refused. What follows them is here.
        match DiffusionConfig::new(class, if config.is_object() { &config } else { &Value::Null }) {
            Err(models::Error::Unsupported { field, .. }) if field.ends_with("skip_prk_steps") => {}
            other => return Err(format!("its Runge-Kutta steps are not refused: {other:?}")),
        }
        if !config.is_object() {
            // The reference refuses so few steps with them.
            return Ok(());
        }
        config["skip_prk_steps"] = Value::Bool(true);
    }
    let (of_sigmas, of_timesteps) = (&case.json["tolerance"]["sigmas"], &case.json["tolerance"]["timesteps"]);
    let (of_sigmas, of_timesteps) = (of_sigmas["suggested_rtol"].as_f64(), of_timesteps["suggested_atol"].as_f64());
    let (of_sigmas, of_timesteps) = of_sigmas.zip(of_timesteps).ok_or("no tolerances")?;
    let run = json!({ "class": class, "full_config": config, "num_inference_steps": steps });
    let (scheduler, sigmas) = build(case, name, &run)?;
    if case.has(&format!("{name}.sigmas")) {
        check_near("sigmas", &sigmas, &numbers(case, &format!("{name}.sigmas"))?, |b| of_sigmas as f32 * b.abs())?;
    }
    let (timesteps, recorded) = (f32s(scheduler.timesteps()), numbers(case, &format!("{name}.timesteps"))?);
    // The first step is made twice, and the first three by Runge-Kutta.
    let (made, others) = if is_plms { (4, recorded.len().saturating_sub(steps - 3)) } else { (0, 0) };
    check_near("timesteps", &timesteps[made..], &recorded[others..], |_| of_timesteps as f32)
}

/// That numbers are as many as were recorded, each within the tolerance of its recording.
fn check_near(what: &str, got: &[f32], recorded: &[f32], tolerance: impl Fn(f32) -> f32) -> Outcome {
    let near = |(a, b): (&f32, &f32)| (a - b).abs() <= tolerance(*b);
    if got.len() == recorded.len() && got.iter().zip(recorded).all(near) {
        return Ok(());
    }
    Err(format!("{what} {got:?}, expected {recorded:?}"))
}

fn numbers(case: &Case, name: &str) -> Result<Vec<f32>, String> {
    case.tensor(name)?.to_dtype(DType::F32).and_then(|t| t.to_vec1()).map_err(err)
}

fn f32s(values: &[f64]) -> Vec<f32> {
    values.iter().map(|x| *x as f32).collect()
}

fn build(case: &Case, name: &str, run: &Value) -> Result<(Box<dyn Scheduler>, Vec<f32>), String> {
    let given = &run["set_timesteps"];
    let schedule = Schedule {
        num_inference_steps: run["num_inference_steps"].as_u64().ok_or("no `num_inference_steps`")? as usize,
        sigmas: given["sigmas"].as_array().map(|list| list.iter().filter_map(Value::as_f64).collect()),
        mu: given["mu"].as_f64(),
    };
    let begin = run["options"]["begin"].as_u64().unwrap_or(0) as usize;
    let full_config = run["full_config"].clone();
    match run["class"].as_str().unwrap_or_default() {
        "FlowMatchEulerDiscreteScheduler" => {
            let config: FlowMatchEulerDiscreteConfig = serde_json::from_value(full_config).map_err(err)?;
            let scheduler = if config.stochastic_sampling {
                FlowMatchEulerDiscrete::stochastic(&config, &schedule, Box::new(Recorded::of(case, name)))
            } else {
                FlowMatchEulerDiscrete::new(&config, &schedule)
            };
            let scheduler = scheduler.and_then(|s| s.with_begin(begin)).map_err(err)?;
            let sigmas = scheduler.sigmas().to_vec();
            Ok((Box::new(scheduler), sigmas))
        }
        "FlowMatchHeunDiscreteScheduler" => {
            let config: FlowMatchHeunDiscreteConfig = serde_json::from_value(full_config).map_err(err)?;
            let scheduler = FlowMatchHeunDiscrete::new(&config, &schedule).and_then(|s| s.with_begin(begin)).map_err(err)?;
            let sigmas = scheduler.sigmas().to_vec();
            Ok((Box::new(scheduler), sigmas))
        }
        class => {
            let options = &run["options"];
            let run = Run {
                num_inference_steps: schedule.num_inference_steps,
                begin,
                eta: options["step_kw"]["eta"].as_f64().unwrap_or_default(),
                original_inference_steps: given["original_inference_steps"].as_u64().map(|n| n as usize),
                original_strength: given["strength"].as_f64(),
            };
            let config = DiffusionConfig::new(class, &full_config).map_err(err)?;
            let scheduler = config.start(&run, Some(Box::new(Recorded::of(case, name)))).map_err(err)?;
            let sigmas = scheduler.sigmas().to_vec();
            Ok((scheduler, sigmas))
        }
    }
}

fn check_noised_start(case: &mut Case, name: &str, scheduler: &dyn Scheduler) -> Outcome {
    let of = |what: &str| format!("{name}.add_noise.{what}");
    if !case.has(&of("out")) {
        return Ok(());
    }
    let noised = scheduler.scale_noise(case.tensor(&of("original"))?, 0, case.tensor(&of("noise"))?).map_err(err)?;
    case.check_within(&of("out"), &noised, 1e-6)
}

/// The noise a recorded run drew.
#[derive(Debug)]
struct Recorded(Vec<Tensor>);

impl Recorded {
    fn of(case: &Case, name: &str) -> Self {
        let draws = (0..).map_while(|i| case.tensor(&format!("{name}.randn{i:02}")).ok().cloned());
        Self(draws.collect())
    }
}

impl StepNoise for Recorded {
    fn draw(&mut self, step: usize, _shape: &[usize]) -> models::Result<Tensor> {
        let missing = || models::Error::Invalid { field: "step", reason: format!("no noise was recorded for {step}") };
        self.0.get(step).cloned().ok_or_else(missing)
    }
}

fn err(e: impl std::fmt::Display) -> String {
    e.to_string()
}
