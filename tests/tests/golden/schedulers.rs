//! Schedulers: every run of a case, evaluation by evaluation.

use candle_core::{DType, Device, Tensor};
use models::scheduler::{
    DiffusionConfig, FlowMatchEulerDiscrete, FlowMatchEulerDiscreteConfig, FlowMatchHeunDiscrete, FlowMatchHeunDiscreteConfig,
    Run, Schedule, Scheduler, StepNoise,
};
use serde_json::Value;
use tests::golden::{Case, Outcome};

/// How far sigmas may be off, over the largest, and timesteps: what the case `sched_timesteps` says.
const SIGMAS: f64 = 1e-5;
const TIMESTEPS: f32 = 1e-3;

pub(crate) fn run(case: &mut Case) -> Outcome {
    let runs = case.json["runs"].as_object().ok_or("case.json has no `runs`")?.clone();
    runs.iter().try_for_each(|(name, run)| one(case, name, run).map_err(|e| format!("{name}: {e}")))
}

fn one(case: &mut Case, name: &str, run: &Value) -> Outcome {
    let (mut scheduler, sigmas) = build(case, name, run)?;
    let begin = run["options"]["begin"].as_u64().unwrap_or(0) as usize;
    // Those of flows bit for bit: they are a handful of roundings. Others go through logarithms and powers.
    let is_flow = run["class"].as_str().is_some_and(|class| class.starts_with("FlowMatch"));
    if case.has(&format!("{name}.sigmas")) && !sigmas.is_empty() {
        let tolerance = if is_flow { 0.0 } else { SIGMAS * f64::from(sigmas.iter().copied().fold(0.0, f32::max)) };
        case.check_within(&format!("{name}.sigmas"), &tensor(sigmas)?, tolerance)?;
    }
    let timesteps: Vec<f32> = scheduler.timesteps().iter().map(|t| *t as f32).collect();
    let recorded = case.tensor(&format!("{name}.timesteps"))?.to_dtype(DType::F32).map_err(err)?;
    let recorded = recorded.narrow(0, begin, recorded.elem_count() - begin).and_then(|t| t.to_vec1::<f32>()).map_err(err)?;
    let near = |(a, b): (&f32, &f32)| (a - b).abs() <= if is_flow { 0.0 } else { TIMESTEPS };
    if timesteps.len() != recorded.len() || !timesteps.iter().zip(&recorded).all(near) {
        return Err(format!("timesteps {timesteps:?}, expected {recorded:?}"));
    }
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

fn tensor(values: Vec<f32>) -> Result<Tensor, String> {
    let len = values.len();
    Tensor::from_vec(values, len, &Device::Cpu).map_err(err)
}

fn err(e: impl std::fmt::Display) -> String {
    e.to_string()
}
