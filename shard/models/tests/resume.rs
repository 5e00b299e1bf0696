//! A denoising job that is stopped, or loses its engine, after any step goes on in another engine with the same bits.

#![allow(clippy::unwrap_used)] // helpers of tests are tests

use models::block_runner::BlockRunner;
use models::blocks::{BlockModel, RankGroup};
use models::denoise::{DenoiseState, Denoiser, LastStep};
use models::engine::Engine;
use models::registry::Limits;
use models::scheduler::{
    DiffusionConfig, FlowMatchEulerDiscrete, FlowMatchEulerDiscreteConfig, FlowMatchHeunDiscrete, FlowMatchHeunDiscreteConfig,
    Run as DiffusionRun, Schedule, Scheduler, StepNoise,
};
use models::stage::{Inputs, Stage, StageEvent};
use models::{Checkpoint, Error, Payload, Request, Result};
use parallel::{DType, Device, Tensor, Tensors};
use serde_json::json;

const STEPS: usize = 4;

/// sin: what a step gives depends on every bit of what it was given.
struct Sine;

impl BlockModel for Sine {
    fn embed(&self, inputs: &Tensors) -> Result<Tensors> {
        Ok(inputs.clone())
    }

    fn blocks(&self, hidden: Tensors) -> Result<Tensors> {
        Ok(hidden)
    }

    fn output(&self, mut hidden: Tensors) -> Result<Tensors> {
        Ok(Tensors::new().with("sample", (hidden.take("hidden_states")? * 7.0)?.sin()?))
    }
}

/// Noise of a step, whoever draws it.
#[derive(Debug)]
struct Counted;

impl StepNoise for Counted {
    fn draw(&mut self, step: usize, shape: &[usize]) -> Result<Tensor> {
        Ok(Tensor::full(0.1 * (step as f32 + 1.0), shape, &Device::Cpu)?)
    }
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Kind {
    Euler,
    Stochastic,
    Heun,
    HeunBegun,
    /// A class of the diffusion schedulers, its order or algorithm, and evaluations that are left out.
    Diffusion(&'static str, &'static str, usize),
}

const KINDS: [Kind; 28] = [
    Kind::Euler,
    Kind::Stochastic,
    Kind::Heun,
    Kind::HeunBegun,
    Kind::Diffusion("EulerDiscreteScheduler", "", 0),
    Kind::Diffusion("EulerAncestralDiscreteScheduler", "", 1),
    Kind::Diffusion("DDIMScheduler", "", 0),
    Kind::Diffusion("DDPMScheduler", "", 0),
    Kind::Diffusion("LCMScheduler", "", 0),
    Kind::Diffusion("PNDMScheduler", "", 0),
    Kind::Diffusion("PNDMScheduler", "", 1),
    Kind::Diffusion("HeunDiscreteScheduler", "", 0),
    Kind::Diffusion("HeunDiscreteScheduler", "", 2),
    Kind::Diffusion("DPMSolverMultistepScheduler", "dpmsolver++", 0),
    Kind::Diffusion("DPMSolverMultistepScheduler", "sde-dpmsolver++", 1),
    Kind::Diffusion("DPMSolverMultistepScheduler", "of order 3", 0),
    Kind::Diffusion("DPMSolverSinglestepScheduler", "", 0),
    Kind::Diffusion("DPMSolverSinglestepScheduler", "sde-dpmsolver++", 1),
    Kind::Diffusion("DPMSolverSinglestepScheduler", "of order 3", 0),
    Kind::Diffusion("DPMSolverSinglestepScheduler", "of order 3", 1),
    Kind::Diffusion("KDPM2DiscreteScheduler", "", 0),
    Kind::Diffusion("KDPM2DiscreteScheduler", "", 2),
    Kind::Diffusion("KDPM2AncestralDiscreteScheduler", "", 0),
    Kind::Diffusion("KDPM2AncestralDiscreteScheduler", "", 2),
    Kind::Diffusion("TCDScheduler", "", 1),
    Kind::Diffusion("UniPCMultistepScheduler", "", 0),
    Kind::Diffusion("UniPCMultistepScheduler", "", 1),
    Kind::Diffusion("UniPCMultistepScheduler", "of order 3", 0),
];

impl Kind {
    fn scheduler(self) -> Box<dyn Scheduler> {
        let schedule = Schedule { num_inference_steps: STEPS, ..Schedule::default() };
        let euler = FlowMatchEulerDiscreteConfig { shift: 3.0, ..Default::default() };
        let heun = || FlowMatchHeunDiscrete::new(&FlowMatchHeunDiscreteConfig::default(), &schedule).unwrap();
        match self {
            Kind::Euler => Box::new(FlowMatchEulerDiscrete::new(&euler, &schedule).unwrap()),
            Kind::Stochastic => Box::new(FlowMatchEulerDiscrete::stochastic(&euler, &schedule, Box::new(Counted)).unwrap()),
            Kind::Heun => Box::new(heun()),
            Kind::HeunBegun => Box::new(heun().with_begin(2).unwrap()),
            Kind::Diffusion(class, which, begin) => {
                let mut config = json!({ "beta_start": 0.00085, "beta_end": 0.012, "skip_prk_steps": true });
                match which {
                    "" => {}
                    "of order 3" => config["solver_order"] = json!(3),
                    algorithm => config["algorithm_type"] = json!(algorithm),
                }
                let run = DiffusionRun { num_inference_steps: STEPS + 1, begin, eta: 0.5, ..Default::default() };
                DiffusionConfig::new(class, &config).unwrap().start(&run, Some(Box::new(Counted))).unwrap()
            }
        }
    }
}

struct Family(Kind);

impl Denoiser for Family {
    fn start(&self, request: Request, inputs: Inputs) -> Result<DenoiseState> {
        let start = Tensor::arange(0f32, 12.0, &Device::Cpu)?.reshape((1, 3, 4))?;
        let latents = (start * (request.seed as f64 / 100.0))?;
        let tensors = inputs.conditioning.with("mask", latents.ones_like()?);
        Ok(DenoiseState { request, latents, step: 0, scheduler: self.0.scheduler(), tensors, last: None })
    }

    fn branches(&self, state: &DenoiseState) -> Result<Vec<Tensors>> {
        let branch = |x: Tensor| Tensors::new().with("hidden_states", x);
        Ok(vec![branch(state.latents.clone()), branch((&state.latents + 1.0)?)])
    }

    fn shared_inputs(&self) -> &'static [&'static str] {
        &[]
    }

    fn batch_key(&self, _: &DenoiseState, _branch: usize) -> Vec<usize> {
        Vec::new()
    }

    fn advance(&self, state: &mut DenoiseState, outputs: Vec<Tensor>) -> Result<()> {
        let model_output = ((&outputs[0] + &outputs[1])? * 0.5)?;
        let prev_sample = state.scheduler.step(&model_output, state.step, &state.latents)?;
        state.latents = prev_sample.clone();
        state.last = Some(LastStep { model_output, prev_sample });
        Ok(())
    }

    fn finish(&self, state: DenoiseState) -> Result<Payload> {
        Ok(Payload::Latents(Tensors::new().with("latents", state.latents)))
    }
}

fn engine(kind: Kind) -> Engine {
    let limits = Limits { max_jobs: 1, ..Limits::default() };
    Engine::new(Box::new(Family(kind)), BlockRunner::new(Box::new(Sine), RankGroup::solo()), limits)
}

fn request() -> Request {
    Request { width: 4, height: 4, num_inference_steps: STEPS, seed: 7, ..Request::default() }
}

fn from(checkpoint: Option<Checkpoint>) -> Inputs {
    Inputs { checkpoint, ..Inputs::default() }
}

fn bits(tensor: &Tensor) -> Vec<u32> {
    let values = tensor.flatten_all().unwrap().to_vec1::<f32>().unwrap();
    assert!(values.iter().all(|x| x.is_finite()), "{values:?}");
    values.into_iter().map(f32::to_bits).collect()
}

/// What a run came to.
#[derive(Debug)]
struct Run {
    steps: Vec<usize>,
    /// After each of them.
    checkpoints: Vec<Checkpoint>,
    end: std::result::Result<Vec<u32>, (Error, usize)>,
}

/// Runs from `inputs` to the end; parks after `park_after` steps of its own.
fn go(kind: Kind, inputs: Inputs, park_after: Option<usize>) -> Run {
    let mut engine = engine(kind);
    engine.start(1, request(), inputs);
    let (mut steps, mut checkpoints, mut end) = (Vec::new(), Vec::new(), None);
    loop {
        if park_after == Some(steps.len()) {
            engine.park(1);
        }
        let more = engine.turn(&mut |event| match event {
            StageEvent::Started { .. } => {}
            StageEvent::Step { step, state, .. } => {
                steps.push(step);
                checkpoints.push(state.unwrap().checkpoint());
            }
            StageEvent::Done { payload, .. } => end = Some(Ok(bits(payload.tensors().get("latents").unwrap()))),
            StageEvent::Failed { error, step, .. } => end = Some(Err((error, step))),
        });
        if !more.unwrap() {
            return Run { steps, checkpoints, end: end.unwrap() };
        }
    }
}

#[test]
fn a_run_taken_up_after_any_step_gives_the_same_bits() {
    for kind in KINDS {
        let straight = go(kind, from(None), None);
        let picture = straight.end.unwrap();
        let evaluations = kind.scheduler().timesteps().len();
        assert_eq!(straight.checkpoints.len(), evaluations);
        for checkpoint in straight.checkpoints {
            let step = checkpoint.step;
            let rest = go(kind, from(Some(checkpoint)), None);
            assert_eq!(rest.steps, (step + 1..=evaluations).collect::<Vec<_>>(), "{kind:?} from {step}");
            assert_eq!(rest.end.unwrap(), picture, "{kind:?} from {step}");
        }
    }
}

#[test]
fn a_parked_run_stops_after_its_step_and_goes_on_from_there() {
    for kind in KINDS {
        let straight = go(kind, from(None), None);
        let picture = straight.end.unwrap();
        for after in 1..straight.steps.len() {
            let run = go(kind, from(None), Some(after));
            let (error, step) = run.end.unwrap_err();
            let Error::Parked(Some(checkpoint)) = error else { panic!("{kind:?} after {after}: {error}") };
            assert_eq!((step, checkpoint.step, run.steps.len()), (after, after, after), "{kind:?}");
            assert_eq!(go(kind, from(Some(*checkpoint)), None).end.unwrap(), picture, "{kind:?} from {after}");
        }
    }
}

#[test]
fn a_run_parked_before_it_begins_keeps_what_it_was_to_begin_with() {
    let run = go(Kind::Euler, from(None), Some(0));
    assert!(matches!(run.end, Err((Error::Parked(None), 0))), "{run:?}");
    let checkpoint = go(Kind::Euler, from(None), None).checkpoints.swap_remove(1);
    let run = go(Kind::Euler, from(Some(checkpoint)), Some(0));
    assert!(matches!(run.end, Err((Error::Parked(Some(kept)), 2)) if kept.step == 2));
}

#[test]
fn a_checkpoint_that_does_not_fit_is_refused_by_the_field_that_does_not() {
    let check = |kind: Kind, step: usize, change: &dyn Fn(&mut Checkpoint), named: &str| {
        let mut checkpoint = go(kind, from(None), None).checkpoints.swap_remove(step - 1);
        change(&mut checkpoint);
        match go(kind, from(Some(checkpoint)), None).end {
            Err((Error::Checkpoint { field, .. }, 0)) => assert_eq!(field, named, "{kind:?}"),
            other => panic!("{kind:?}: {named}: {other:?}"),
        }
    };
    let zeros = |shape: (usize, usize, usize), dtype| Tensor::zeros(shape, dtype, &Device::Cpu).unwrap();
    check(Kind::Euler, 1, &|c| c.step = 0, "step");
    check(Kind::Euler, 1, &|c| c.step = STEPS + 1, "step");
    check(Kind::Euler, 1, &|c| drop(c.tensors.take("latents")), "latents");
    check(Kind::Euler, 1, &|c| c.tensors.insert("latents", zeros((1, 3, 5), DType::F32)), "latents");
    check(Kind::Euler, 1, &|c| c.tensors.insert("latents", zeros((1, 3, 4), DType::F16)), "latents");
    check(Kind::Euler, 1, &|c| c.tensors.insert("x", zeros((1, 3, 4), DType::F32)), "x");
    check(Kind::Euler, 1, &|c| c.tensors.insert("scheduler.0", zeros((1, 3, 4), DType::F32)), "scheduler");
    check(Kind::Heun, 1, &|c| c.step = 2, "scheduler");
    check(Kind::Heun, 2, &|c| c.step = 1, "scheduler");
    check(Kind::Heun, 1, &|c| drop(c.tensors.take("scheduler.1")), "scheduler");
    check(Kind::Heun, 1, &|c| c.tensors.insert("scheduler.1", zeros((1, 1, 4), DType::F32)), "scheduler.1");
}
