//! Steps of latent consistency models (S. Luo et al., <https://arxiv.org/abs/2310.04378>).
//!
//! Follows diffusers 0.42.1 `schedulers/scheduling_lcm.py`.

use parallel::Tensor;
use serde_json::json;

use super::ddim::add_noise;
use super::fields::{Fields, refused};
use super::noise_schedule::{Defaults, NoiseSchedule, Spacing, THREE, ZeroSnr};
use super::prediction::{Bounds, predicted};
use super::steps::{Steps, sum};
use super::{Run, Scheduler, SchedulerState, StepNoise, no_noise};
use crate::{Error, Result};

const SIGMA_DATA: f64 = 0.5;

/// Of this scheduler and of TCD.
pub(super) const DEFAULTS: Defaults =
    Defaults { betas: [0.00085, 0.012], scaled_linear: true, ..Defaults::new(Spacing::Leading, THREE, ZeroSnr::Nothing) };

/// `scheduler_config.json` of an `LCMScheduler`.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Config {
    schedule: NoiseSchedule,
    bounds: Bounds,
    original_inference_steps: usize,
    timestep_scaling: f64,
}

impl Config {
    pub(super) fn read(fields: Fields<'_>) -> Result<Self> {
        let schedule = NoiseSchedule::read(fields, DEFAULTS)?;
        let timestep_scaling = fields.number("timestep_scaling", 10.0)?;
        if timestep_scaling <= 0.0 {
            return Err(refused("timestep_scaling", &json!(timestep_scaling)));
        }
        Ok(Self {
            original_inference_steps: fields.count("original_inference_steps", 50, [1, schedule.train_timesteps()])?,
            bounds: Bounds::read(fields, false)?,
            schedule,
            timestep_scaling,
        })
    }

    pub(super) fn start(&self, run: &Run, noise: Option<Box<dyn StepNoise>>) -> Result<Lcm> {
        let original = run.original_inference_steps.unwrap_or(self.original_inference_steps);
        let steps = Steps::new(distilled_timesteps(&self.schedule, original, run)?, run.begin)?;
        Ok(Lcm { steps, noise: noise.ok_or_else(no_noise)?, config: self.clone() })
    }
}

/// Of those a model was distilled for, the last first, as many as the run has steps, as evenly spaced as can be.
pub(super) fn distilled_timesteps(schedule: &NoiseSchedule, original: usize, run: &Run) -> Result<Vec<f64>> {
    let n = schedule.check(run)?;
    let stride = schedule.train_timesteps() / original.max(1);
    let all = (original as f64 * run.original_strength.unwrap_or(1.0)) as usize;
    if all < n || stride == 0 {
        let reason = format!("{n} is more than the {all} that the model was distilled for");
        return Err(Error::Invalid { field: "num_inference_steps", reason });
    }
    let at = |i: usize| ((all - (i as f64 * (all as f64 / n as f64)) as usize) * stride - 1) as f64;
    Ok((0..n).map(at).collect())
}

/// The scheduler of one job.
#[derive(Debug)]
pub(super) struct Lcm {
    steps: Steps,
    noise: Box<dyn StepNoise>,
    config: Config,
}

impl Scheduler for Lcm {
    fn timesteps(&self) -> &[f64] {
        self.steps.left()
    }

    fn step(&mut self, model_output: &Tensor, step: usize, sample: &Tensor) -> Result<Tensor> {
        let (place, t) = self.steps.at(step)?;
        let Config { schedule, bounds, timestep_scaling, .. } = &self.config;
        let alpha = schedule.alpha_cumprod(t);
        let factors = [alpha.sqrt(), (1.0 - alpha).sqrt()];
        let original = bounds.apply(predicted(schedule.prediction, factors, model_output, sample)?.original)?;
        let scaled = t * timestep_scaling;
        let length = scaled * scaled + SIGMA_DATA * SIGMA_DATA;
        let (skip, out) = (SIGMA_DATA * SIGMA_DATA / length, scaled / length.sqrt());
        let mut next = sum(&[(out, &original), (skip, sample)])?;
        if place + 1 < self.steps.all() {
            let previous = schedule.alpha_cumprod(self.steps.at(step + 1)?.1);
            let noise = self.noise.draw(step, sample.dims())?;
            next = sum(&[(previous.sqrt(), &next), ((1.0 - previous).sqrt(), &noise)])?;
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
