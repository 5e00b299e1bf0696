//! Heun steps (two evaluations each) along a rectified flow.
//!
//! Follows diffusers 0.42.1 `schedulers/scheduling_flow_match_heun_discrete.py`, with its defaults (`s_churn` 0: no noise is
//! added on the way).

use parallel::{DType, Tensor};
use serde::Deserialize;

use super::sigmas::{self, Precision};
use super::{Schedule, Scheduler, SchedulerState, flow_scale_noise, scaled, sigma_pair};
use crate::checkpoint::fits;
use crate::{Error, Result};

/// `scheduler_config.json` of `FlowMatchHeunDiscreteScheduler`.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(default)]
pub struct FlowMatchHeunDiscreteConfig {
    /// Timesteps run from this down to 0.
    pub num_train_timesteps: usize,
    /// The fixed shift of the sigmas.
    pub shift: f64,
}

impl Default for FlowMatchHeunDiscreteConfig {
    fn default() -> Self {
        Self { num_train_timesteps: 1000, shift: 1.0 }
    }
}

/// The scheduler of one job: the first evaluation of a step goes where Euler would, the second corrects it. The last step
/// has one evaluation.
#[derive(Debug)]
pub struct FlowMatchHeunDiscrete {
    /// Of the whole schedule, like the sigmas; `begin` says where this run starts.
    timesteps: Vec<f64>,
    /// Of each evaluation, and the final 0.
    sigmas: Vec<f32>,
    begin: usize,
    /// Between the two evaluations of a step.
    half_step: Option<HalfStep>,
}

/// What the second evaluation of a step needs of the first.
#[derive(Debug)]
struct HalfStep {
    derivative: Tensor,
    sample: Tensor,
}

impl FlowMatchHeunDiscrete {
    /// diffusers' constructor and `set_timesteps`, which takes neither `sigmas` nor `mu` here.
    pub fn new(config: &FlowMatchHeunDiscreteConfig, schedule: &Schedule) -> Result<Self> {
        sigmas::check_config(config.num_train_timesteps, config.shift)?;
        sigmas::check_schedule(schedule)?;
        for (field, given) in [("sigmas", schedule.sigmas.is_some()), ("mu", schedule.mu.is_some())] {
            if given {
                return Err(Error::Invalid { field, reason: "FlowMatchHeunDiscreteScheduler takes none".into() });
            }
        }
        let range = sigmas::sigma_range(config.num_train_timesteps, config.shift);
        let own = sigmas::own_sigmas(config.num_train_timesteps, range, schedule.num_inference_steps);
        let per_step: Vec<f32> = own.into_iter().map(|s| Precision::F64.shift(config.shift, s) as f32).collect();
        // The first once, every other twice: a step ends where the next one begins.
        let mut sigmas: Vec<f32> = per_step.iter().flat_map(|s| [*s, *s]).skip(1).collect();
        let n = config.num_train_timesteps as f32;
        let timesteps = sigmas.iter().map(|s| f64::from(s * n)).collect();
        sigmas.push(0.0);
        Ok(Self { timesteps, sigmas, begin: 0, half_step: None })
    }

    /// Starts at evaluation `start` (diffusers' `set_begin_index`; even, the first of a step): evaluations count from there,
    /// and [`Scheduler::timesteps`] has the rest.
    pub fn with_begin(mut self, start: usize) -> Result<Self> {
        let all = self.sigmas.len() - 1;
        if start >= all {
            return Err(Error::Invalid { field: "strength", reason: format!("no step is left of {all} after skipping {start}") });
        }
        self.begin = start;
        Ok(self)
    }

    /// The sigma of every evaluation, with the final 0.
    pub fn sigmas(&self) -> &[f32] {
        &self.sigmas
    }
}

impl Scheduler for FlowMatchHeunDiscrete {
    fn timesteps(&self) -> &[f64] {
        &self.timesteps[self.begin..]
    }

    fn step(&mut self, model_output: &Tensor, step: usize, sample: &Tensor) -> Result<Tensor> {
        // Upcast, or the small differences between steps are lost.
        let sample = sample.to_dtype(DType::F32)?;
        let previous = match self.half_step.take() {
            None => {
                let (sigma, next) = sigma_pair(&self.sigmas, self.begin, step)?;
                let derivative = derivative(&sample, model_output, sigma)?;
                let previous = (&sample + (&derivative * f64::from(next - sigma))?)?;
                // The last step ends at 0, where there is nothing to evaluate.
                if next > 0.0 {
                    self.half_step = Some(HalfStep { derivative, sample });
                }
                previous
            }
            Some(half) => {
                let first = step.checked_sub(1).unwrap_or(usize::MAX);
                let (sigma, next) = sigma_pair(&self.sigmas, self.begin, first)?;
                let corrected = ((half.derivative + derivative(&sample, model_output, next)?)? * 0.5)?;
                (half.sample + (corrected * f64::from(next - sigma))?)?
            }
        };
        Ok(previous.to_dtype(model_output.dtype())?)
    }

    fn scale_noise(&self, sample: &Tensor, step: usize, noise: &Tensor) -> Result<Tensor> {
        let (sigma, _) = sigma_pair(&self.sigmas, self.begin, step)?;
        flow_scale_noise(sample, sigma, noise)
    }

    fn checkpoint(&self) -> SchedulerState {
        let kept = self.half_step.iter().flat_map(|half| [half.derivative.clone(), half.sample.clone()]);
        SchedulerState { history: kept.collect() }
    }

    fn restore(&mut self, state: SchedulerState, step: usize, like: &Tensor) -> Result<()> {
        // A run begins with the first evaluation of a step, and its last step has no second one.
        let between = step % 2 == 1 && step < self.timesteps().len();
        let expected = if between { 2 } else { 0 };
        let found = state.history.len();
        let wrong =
            || Error::checkpoint("scheduler", format!("has {found} tensors of history, Heun keeps {expected} after {step}"));
        self.half_step = match (<[Tensor; 2]>::try_from(state.history), between) {
            (Ok([derivative, sample]), true) => {
                let like = like.to_dtype(DType::F32)?;
                fits("scheduler.0", &derivative, &like)?;
                fits("scheduler.1", &sample, &like)?;
                Some(HalfStep { derivative, sample })
            }
            (Err(history), false) if history.is_empty() => None,
            _ => return Err(wrong()),
        };
        Ok(())
    }
}

/// The flow at `sample`, by way of the picture it points to (the reference's roundings).
fn derivative(sample: &Tensor, model_output: &Tensor, sigma: f32) -> Result<Tensor> {
    let denoised = (sample - scaled(model_output, sigma)?)?;
    let sigma = Tensor::new(sigma, sample.device())?;
    Ok((sample - denoised)?.broadcast_div(&sigma)?)
}
