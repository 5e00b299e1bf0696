//! Steps of trajectory consistency distillation (J. Zheng et al., <https://arxiv.org/abs/2402.19159>): each goes below the next timestep by
//! `eta`, the paper's gamma, and noise brings it up again.
//!
//! Follows diffusers 0.42.1 `schedulers/scheduling_tcd.py`. It has `clip_sample` and `thresholding` and does neither: they are refused.

use parallel::Tensor;
use serde_json::json;

use super::ddim::add_noise;
use super::fields::Fields;
use super::lcm::{DEFAULTS, distilled_timesteps};
use super::noise_schedule::NoiseSchedule;
use super::prediction::{Predicted, predicted};
use super::steps::{Steps, sum};
use super::{Run, Scheduler, SchedulerState, StepNoise, no_noise};
use crate::{Error, Result};

/// `scheduler_config.json` of a `TCDScheduler`.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Config {
    schedule: NoiseSchedule,
    original_inference_steps: usize,
}

impl Config {
    pub(super) fn read(fields: Fields<'_>) -> Result<Self> {
        ["clip_sample", "thresholding"].into_iter().try_for_each(|name| fields.only(name, &json!(false)))?;
        let schedule = NoiseSchedule::read(fields, DEFAULTS)?;
        let original_inference_steps = fields.count("original_inference_steps", 50, [1, schedule.train_timesteps()])?;
        Ok(Self { schedule, original_inference_steps })
    }

    pub(super) fn start(&self, run: &Run, noise: Option<Box<dyn StepNoise>>) -> Result<Tcd> {
        if !(0.0..=1.0).contains(&run.eta) {
            return Err(Error::Invalid { field: "eta", reason: format!("{} is not between 0 and 1", run.eta) });
        }
        // Of a number that is given, the reference takes any timesteps, not those that the model was distilled for.
        if run.original_inference_steps.is_some() {
            return Err(Error::Invalid { field: "original_inference_steps", reason: "TCDScheduler takes its own alone".into() });
        }
        let noise = if run.eta > 0.0 { Some(noise.ok_or_else(no_noise)?) } else { None };
        let timesteps = distilled_timesteps(&self.schedule, self.original_inference_steps, run)?;
        Ok(Tcd { steps: Steps::new(timesteps, run.begin)?, eta: run.eta, noise, config: self.clone() })
    }
}

/// The scheduler of one job.
#[derive(Debug)]
pub(super) struct Tcd {
    steps: Steps,
    eta: f64,
    noise: Option<Box<dyn StepNoise>>,
    config: Config,
}

impl Scheduler for Tcd {
    fn timesteps(&self) -> &[f64] {
        self.steps.left()
    }

    fn step(&mut self, model_output: &Tensor, step: usize, sample: &Tensor) -> Result<Tensor> {
        let (place, t) = self.steps.at(step)?;
        let schedule = &self.config.schedule;
        let last = place + 1 == self.steps.all();
        let next = if last { 0.0 } else { self.steps.at(step + 1)?.1 };
        // In float32, as the reference multiplies a timestep.
        let below = f64::from(((1.0 - self.eta) as f32 * next as f32).floor());
        let [alpha, next, below] = [t, next, below].map(|t| schedule.alpha_cumprod(t));
        let factors = [alpha.sqrt(), (1.0 - alpha).sqrt()];
        let Predicted { original, epsilon } = predicted(schedule.prediction, factors, model_output, sample)?;
        let mut previous = sum(&[(below.sqrt(), &original), ((1.0 - below).sqrt(), &epsilon)])?;
        if let (Some(noise), false) = (&mut self.noise, last) {
            let kept = next / below;
            previous = sum(&[(kept.sqrt(), &previous), ((1.0 - kept).max(0.0).sqrt(), &noise.draw(step, sample.dims())?)])?;
        }
        Ok(previous.to_dtype(model_output.dtype())?)
    }

    fn scale_noise(&self, sample: &Tensor, step: usize, noise: &Tensor) -> Result<Tensor> {
        add_noise(&self.config.schedule, self.steps.at(step)?.1, sample, noise)
    }

    fn checkpoint(&self) -> SchedulerState {
        SchedulerState::default()
    }
}
