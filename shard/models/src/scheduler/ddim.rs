//! DDIM's steps (J. Song et al., <https://arxiv.org/abs/2010.02502>).
//!
//! Follows diffusers 0.42.1 `schedulers/scheduling_ddim.py`, with `use_clipped_model_output` false.

use parallel::Tensor;

use super::fields::Fields;
use super::noise_schedule::{Defaults, NoiseSchedule, Spacing, THREE, ZeroSnr};
use super::prediction::{Bounds, Predicted, predicted};
use super::steps::{Steps, sum};
use super::{Run, Scheduler, SchedulerState, StepNoise, no_noise};
use crate::Result;

/// `scheduler_config.json` of a `DDIMScheduler`.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Config {
    schedule: NoiseSchedule,
    bounds: Bounds,
    /// The last step ends at the picture alone, not at the first timestep.
    set_alpha_to_one: bool,
}

impl Config {
    pub(super) fn read(fields: Fields<'_>) -> Result<Self> {
        Ok(Self {
            schedule: NoiseSchedule::read(fields, Defaults::new(Spacing::Leading, THREE, ZeroSnr::Nothing))?,
            bounds: Bounds::read(fields, true)?,
            set_alpha_to_one: fields.flag("set_alpha_to_one", true)?,
        })
    }

    pub(super) fn start(&self, run: &Run, noise: Option<Box<dyn StepNoise>>) -> Result<Ddim> {
        let n = self.schedule.check(run)?;
        let noise = if run.eta > 0.0 { Some(noise.ok_or_else(no_noise)?) } else { None };
        let steps = Steps::new(self.schedule.timesteps(n, true), run.begin)?;
        let stride = (self.schedule.train_timesteps() / n) as f64;
        Ok(Ddim { steps, stride, eta: run.eta, noise, config: self.clone() })
    }
}

/// The scheduler of one job.
#[derive(Debug)]
pub(super) struct Ddim {
    steps: Steps,
    /// Timesteps from one step to the next.
    stride: f64,
    eta: f64,
    noise: Option<Box<dyn StepNoise>>,
    config: Config,
}

impl Scheduler for Ddim {
    fn timesteps(&self) -> &[f64] {
        self.steps.left()
    }

    fn step(&mut self, model_output: &Tensor, step: usize, sample: &Tensor) -> Result<Tensor> {
        let (_, t) = self.steps.at(step)?;
        let schedule = &self.config.schedule;
        let alpha = schedule.alpha_cumprod(t);
        let before = t - self.stride;
        let previous = if before < 0.0 && self.config.set_alpha_to_one { 1.0 } else { schedule.alpha_cumprod(before) };
        let factors = [alpha.sqrt(), (1.0 - alpha).sqrt()];
        let Predicted { original, epsilon } = predicted(schedule.prediction, factors, model_output, sample)?;
        let original = self.config.bounds.apply(original)?;
        let variance = (1.0 - previous) / (1.0 - alpha) * (1.0 - alpha / previous);
        let deviation = self.eta * variance.max(0.0).sqrt();
        let direction = (1.0 - previous - deviation * deviation).max(0.0).sqrt();
        let mut next = sum(&[(previous.sqrt(), &original), (direction, &epsilon)])?;
        if let Some(noise) = &mut self.noise {
            next = sum(&[(1.0, &next), (deviation, &noise.draw(step, sample.dims())?)])?;
        }
        Ok(next.to_dtype(model_output.dtype())?)
    }

    fn scale_noise(&self, sample: &Tensor, step: usize, noise: &Tensor) -> Result<Tensor> {
        add_noise(&self.config.schedule, self.steps.at(step)?.1, sample, noise)
    }

    fn checkpoint(&self) -> SchedulerState {
        SchedulerState::default()
    }
}

/// `add_noise`: the picture and the noise in their parts of a timestep.
pub(super) fn add_noise(schedule: &NoiseSchedule, timestep: f64, sample: &Tensor, noise: &Tensor) -> Result<Tensor> {
    let alpha = schedule.alpha_cumprod(timestep);
    sum(&[(alpha.sqrt(), sample), ((1.0 - alpha).sqrt(), noise)])
}
