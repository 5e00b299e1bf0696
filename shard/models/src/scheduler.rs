//! Noise schedulers: where to evaluate the model, and how to step from one point to the next. One file each.

use std::fmt::Debug;

use parallel::{DType, Tensor};

use crate::{Error, Result};

pub mod diffusion;
pub mod flow_match_euler;
pub mod flow_match_heun;

mod ddim;
mod ddpm;
mod dpm_solver;
mod dpm_solver_multistep;
mod dpm_solver_singlestep;
mod euler;
mod heun;
mod k_dpm_2;
mod lcm;
mod pndm;
mod tcd;
mod unipc_multistep;

mod fields;
mod multistep;
mod noise_schedule;
mod prediction;
mod sigmas;
mod steps;
mod until;

pub use diffusion::{DiffusionConfig, Run};
pub use flow_match_euler::{FlowMatchEulerDiscrete, FlowMatchEulerDiscreteConfig};
pub use flow_match_heun::{FlowMatchHeunDiscrete, FlowMatchHeunDiscreteConfig};
pub(crate) use until::Until;

/// Most steps of one job. The published schedules were trained with 1,000; a request with a billion costs memory.
pub const MAX_INFERENCE_STEPS: usize = 10_000;

/// The state of one denoising run. Built per job, so nothing leaks from one job to the next.
pub trait Scheduler: Send + Debug {
    /// The timesteps at which the model is evaluated, first to last (two per step for second-order schedulers).
    fn timesteps(&self) -> &[f64];
    /// Evaluations that the run would have if it did not leave some at its end to another model.
    fn planned_steps(&self) -> usize {
        self.timesteps().len()
    }
    /// Scale of the initial noise.
    fn init_noise_sigma(&self) -> f64 {
        1.0
    }
    /// The noise of each evaluation of the whole schedule, and of what the last step ends at; none where a scheduler counts otherwise.
    fn sigmas(&self) -> &[f32] {
        &[]
    }
    /// What the model sees in place of `sample` at evaluation `step`.
    fn scale_model_input(&self, sample: &Tensor, _step: usize) -> Result<Tensor> {
        Ok(sample.clone())
    }
    /// x_t -> x_(t-1).
    fn step(&mut self, model_output: &Tensor, step: usize, sample: &Tensor) -> Result<Tensor>;
    /// `sample` noised to evaluation `step`: the start of image to image.
    fn scale_noise(&self, sample: &Tensor, step: usize, noise: &Tensor) -> Result<Tensor>;
    /// All that a resumed run needs besides the sample and the step.
    fn checkpoint(&self) -> SchedulerState;
    /// Takes up what [`Scheduler::checkpoint`] gave after evaluation `step` of samples like `like`. Schedulers without history
    /// accept only an empty one.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] when it is not what this scheduler has at that step.
    fn restore(&mut self, state: SchedulerState, _step: usize, _like: &Tensor) -> Result<()> {
        match state.history.len() {
            0 => Ok(()),
            n => Err(Error::checkpoint("scheduler", format!("has {n} tensors of history, this scheduler keeps none"))),
        }
    }
}

/// What a scheduler carries from step to step.
#[derive(Clone, Debug, Default)]
pub struct SchedulerState {
    /// What it was given or made at earlier evaluations and needs again, in its own order.
    pub history: Vec<Tensor>,
}

/// The arguments of diffusers' `set_timesteps`.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Schedule {
    /// How many steps.
    pub num_inference_steps: usize,
    /// The sigmas before any shift, one per step; the scheduler's own when absent.
    pub sigmas: Option<Vec<f64>>,
    /// The shift of schedulers with `use_dynamic_shifting`; see [`calculate_shift`].
    pub mu: Option<f64>,
}

impl Schedule {
    /// Sigmas from 1 to `1 / n` in `n` even steps, as FLUX and Qwen-Image set them.
    pub fn evenly_spaced(num_inference_steps: usize, mu: Option<f64>) -> Self {
        let sigmas = sigmas::linspace(1.0, 1.0 / num_inference_steps as f64, num_inference_steps);
        Self { num_inference_steps, sigmas: Some(sigmas), mu }
    }
}

/// Fresh noise for schedulers that add some at every step.
pub trait StepNoise: Send + Debug {
    /// The noise of evaluation `step`, of those that draw some the first ones. It depends on the step and not on earlier calls, so that a
    /// resumed run draws the same.
    fn draw(&mut self, step: usize, shape: &[usize]) -> Result<Tensor>;
}

/// The error of steps that need noise and have no source of it.
fn no_noise() -> Error {
    Error::Invalid { field: "noise", reason: "the scheduler's steps need some".into() }
}

/// `mu` for a picture of `image_seq_len` tokens: linear between the two published points.
pub fn calculate_shift(image_seq_len: usize, base_seq_len: usize, max_seq_len: usize, base_shift: f64, max_shift: f64) -> f64 {
    let m = (max_shift - base_shift) / (max_seq_len as f64 - base_seq_len as f64);
    let b = base_shift - m * base_seq_len as f64;
    image_seq_len as f64 * m + b
}

/// `sigma * noise + (1 - sigma) * sample`: a flow's straight way from picture to noise.
fn flow_scale_noise(sample: &Tensor, sigma: f32, noise: &Tensor) -> Result<Tensor> {
    let (sample_f32, noise) = (sample.to_dtype(DType::F32)?, noise.to_dtype(DType::F32)?);
    let noised = ((noise * f64::from(sigma))? + (sample_f32 * f64::from(1.0 - sigma))?)?;
    Ok(noised.to_dtype(sample.dtype())?)
}

/// `model_output * factor` as torch multiplies by a number: in f32, rounded to the output's own type; then widened.
fn scaled(model_output: &Tensor, factor: f32) -> Result<Tensor> {
    let y = (model_output.to_dtype(DType::F32)? * f64::from(factor))?;
    Ok(y.to_dtype(model_output.dtype())?.to_dtype(DType::F32)?)
}

/// The sigma at `begin + step` and the one after it.
fn sigma_pair(sigmas: &[f32], begin: usize, step: usize) -> Result<(f32, f32)> {
    let pair = begin.checked_add(step).and_then(|i| sigmas.get(i..)?.first_chunk::<2>());
    let [sigma, next] = pair.ok_or_else(|| Error::Invalid {
        field: "step",
        reason: format!("{step} is past the end of a schedule of {} steps", sigmas.len().saturating_sub(begin + 1)),
    })?;
    Ok((*sigma, *next))
}
