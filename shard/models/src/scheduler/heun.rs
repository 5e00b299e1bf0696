//! Heun's steps, of two evaluations each.
//!
//! Follows diffusers 0.42.1 `schedulers/scheduling_heun_discrete.py` (with `gamma` 0).

use parallel::Tensor;
use serde_json::json;

use super::euler::of_sigma;
use super::fields::{Fields, refused};
use super::noise_schedule::{self, Defaults, NoiseSchedule, Spacing, THREE, TWO, ZeroSnr};
use super::prediction::Bounds;
use super::sigmas::{exponential, karras};
use super::steps::{Steps, sum};
use super::{Run, Scheduler, SchedulerState};
use crate::checkpoint::fits;
use crate::{Error, Result};

/// Of this scheduler and of KDPM2.
pub(super) const DEFAULTS: Defaults =
    Defaults { betas: [0.00085, 0.012], ..Defaults::new(Spacing::Linspace, TWO, ZeroSnr::Never) };

/// `scheduler_config.json` of a `HeunDiscreteScheduler`.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Config {
    schedule: NoiseSchedule,
    bounds: Bounds,
    karras: bool,
    exponential: bool,
}

impl Config {
    pub(super) fn read(fields: Fields<'_>) -> Result<Self> {
        noise_schedule::refuse_other_sigmas(fields)?;
        let (karras, exponential) = (fields.flag("use_karras_sigmas", false)?, fields.flag("use_exponential_sigmas", false)?);
        if karras && exponential {
            return Err(refused("use_exponential_sigmas", &json!(true)));
        }
        // It has no dynamic thresholding.
        let clips = fields.flag("clip_sample", false)?;
        let bounds = if clips { Bounds::Clip(fields.number("clip_sample_range", 1.0)?) } else { Bounds::None };
        Ok(Self {
            schedule: NoiseSchedule::read(fields, Defaults { predictions: THREE, ..DEFAULTS })?,
            bounds,
            karras,
            exponential,
        })
    }

    pub(super) fn start(&self, run: &Run) -> Result<Heun> {
        let n = self.schedule.check(run)?;
        let mut timesteps = self.schedule.timesteps(n, false);
        let mut sigmas = self.schedule.interpolated(&timesteps);
        let range = [sigmas[0], sigmas[n - 1]];
        if self.karras || self.exponential {
            sigmas = if self.karras { karras(range, n) } else { exponential(range, n) };
            timesteps = self.schedule.timesteps_of(&sigmas).into_iter().map(|t| f64::from(t as f32)).collect();
        }
        let sigmas: Vec<f32> = sigmas.into_iter().map(|sigma| sigma as f32).collect();
        let largest = f64::from(sigmas.iter().copied().fold(0.0, f32::max));
        let init_noise_sigma = if self.schedule.begins_at_the_end() { largest } else { (largest * largest + 1.0).sqrt() };
        // The first once, every other twice: a step ends where the next one begins.
        let timesteps = timesteps.iter().flat_map(|t| [*t, *t]).skip(1).collect();
        let mut sigmas: Vec<f32> = sigmas.iter().flat_map(|sigma| [*sigma, *sigma]).skip(1).collect();
        sigmas.push(0.0);
        Ok(Heun { steps: Steps::new(timesteps, run.begin)?, sigmas, init_noise_sigma, half: None, config: self.clone() })
    }
}

/// The scheduler of one job.
#[derive(Debug)]
pub(super) struct Heun {
    steps: Steps,
    /// Of each evaluation, and the final 0.
    sigmas: Vec<f32>,
    init_noise_sigma: f64,
    /// Between the two evaluations of a step: the derivative and the sample of the first.
    half: Option<[Tensor; 2]>,
    config: Config,
}

impl Heun {
    fn sigma(&self, place: usize) -> f64 {
        self.sigmas.get(place).copied().map_or(0.0, f64::from)
    }
}

impl Scheduler for Heun {
    fn timesteps(&self) -> &[f64] {
        self.steps.left()
    }

    fn sigmas(&self) -> &[f32] {
        &self.sigmas
    }

    fn init_noise_sigma(&self) -> f64 {
        self.init_noise_sigma
    }

    fn scale_model_input(&self, sample: &Tensor, step: usize) -> Result<Tensor> {
        let sigma = self.sigma(self.steps.at(step)?.0);
        Ok((sample / (sigma * sigma + 1.0).sqrt())?)
    }

    fn step(&mut self, model_output: &Tensor, step: usize, sample: &Tensor) -> Result<Tensor> {
        let (place, _) = self.steps.at(step)?;
        let at = self.sigma(place);
        let original = of_sigma(self.config.schedule.prediction, at, model_output, sample)?;
        let original = self.config.bounds.apply(original)?;
        let derivative = (sum(&[(1.0, sample), (-1.0, &original)])? / at)?;
        let previous = match self.half.take() {
            None => {
                let next = self.sigma(place + 1);
                let previous = sum(&[(1.0, sample), (next - at, &derivative)])?;
                // The last step ends at 0, where there is nothing to evaluate.
                if place + 1 < self.steps.all() {
                    self.half = Some([derivative, sample.clone()]);
                }
                previous
            }
            Some([first, from]) => {
                let way = at - self.sigma(place.saturating_sub(1));
                sum(&[(1.0, &from), (way / 2.0, &first), (way / 2.0, &derivative)])?
            }
        };
        Ok(previous.to_dtype(model_output.dtype())?)
    }

    fn scale_noise(&self, sample: &Tensor, step: usize, noise: &Tensor) -> Result<Tensor> {
        sum(&[(1.0, sample), (self.sigma(self.steps.at(step)?.0), noise)])
    }

    fn checkpoint(&self) -> SchedulerState {
        SchedulerState { history: self.half.iter().flatten().cloned().collect() }
    }

    fn restore(&mut self, state: SchedulerState, step: usize, like: &Tensor) -> Result<()> {
        // A run begins with the first evaluation of a step, and its last step has no second one.
        let between = step % 2 == 1 && step < self.timesteps().len();
        let found = state.history.len();
        self.half = match (<[Tensor; 2]>::try_from(state.history), between) {
            (Ok(half), true) => {
                half.iter().enumerate().try_for_each(|(i, tensor)| fits(&format!("scheduler.{i}"), tensor, like))?;
                Some(half)
            }
            (Err(history), false) if history.is_empty() => None,
            _ => return Err(Error::checkpoint("scheduler", format!("has {found} tensors of history after {step}"))),
        };
        Ok(())
    }
}
