//! Euler's steps, and those that add noise to each (ancestral).
//!
//! Follows diffusers 0.42.1 `schedulers/scheduling_euler_discrete.py` (with `s_churn` 0) and `scheduling_euler_ancestral_discrete.py`.

use parallel::Tensor;
use serde_json::json;

use super::fields::Fields;
use super::noise_schedule::{self, Defaults, NoiseSchedule, Spacing, THREE, TWO, ZeroSnr};
use super::prediction::predicted;
use super::sigmas::{exponential, karras};
use super::steps::{Steps, sum};
use super::{Run, Scheduler, SchedulerState, StepNoise, no_noise, sigma_pair};
use crate::Result;

/// `scheduler_config.json` of an `EulerDiscreteScheduler` or `EulerAncestralDiscreteScheduler`.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Config {
    schedule: NoiseSchedule,
    sigmas: Sigmas,
    /// The last step ends at the least sigma, not at 0.
    ends_at_least: bool,
    ancestral: bool,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Sigmas {
    OfTimesteps,
    Karras([f64; 2]),
    Exponential([f64; 2]),
}

impl Config {
    pub(super) fn read(fields: Fields<'_>) -> Result<Self> {
        let schedule = NoiseSchedule::read(fields, Defaults::new(Spacing::Linspace, THREE, ZeroSnr::Little))?;
        noise_schedule::refuse_other_sigmas(fields)?;
        fields.only("interpolation_type", &json!("linear"))?;
        fields.only("timestep_type", &json!("discrete"))?;
        // 0: the run's own.
        let range = [fields.number("sigma_max", 0.0)?, fields.number("sigma_min", 0.0)?];
        let karras = fields.flag("use_karras_sigmas", false)?;
        let sigmas = match (karras, fields.flag("use_exponential_sigmas", false)?) {
            (false, false) => Sigmas::OfTimesteps,
            (true, false) => Sigmas::Karras(range),
            (false, true) => Sigmas::Exponential(range),
            (true, true) => return Err(super::fields::refused("use_exponential_sigmas", &json!(true))),
        };
        let ends_at_least = fields.choice("final_sigmas_type", false, &[("zero", false), ("sigma_min", true)])?;
        Ok(Self { schedule, sigmas, ends_at_least, ancestral: false })
    }

    pub(super) fn read_ancestral(fields: Fields<'_>) -> Result<Self> {
        let schedule = NoiseSchedule::read(fields, Defaults::new(Spacing::Linspace, TWO, ZeroSnr::Little))?;
        Ok(Self { schedule, sigmas: Sigmas::OfTimesteps, ends_at_least: false, ancestral: true })
    }

    pub(super) fn start(&self, run: &Run, noise: Option<Box<dyn StepNoise>>) -> Result<Euler> {
        let schedule = &self.schedule;
        let n = schedule.check(run)?;
        let mut timesteps = schedule.timesteps(n, false);
        let mut sigmas = schedule.interpolated(&timesteps);
        let own = [sigmas[0], sigmas[n - 1]];
        let within = |range: [f64; 2]| [0, 1].map(|i| if range[i] > 0.0 { range[i] } else { own[i] });
        match self.sigmas {
            Sigmas::OfTimesteps => {}
            Sigmas::Karras(range) => sigmas = karras(within(range), n),
            Sigmas::Exponential(range) => sigmas = exponential(within(range), n),
        }
        if self.sigmas != Sigmas::OfTimesteps {
            timesteps = schedule.timesteps_of(&sigmas).into_iter().map(|t| f64::from(t as f32)).collect();
        }
        sigmas.push(if self.ends_at_least { schedule.least_sigma() } else { 0.0 });
        let sigmas: Vec<f32> = sigmas.into_iter().map(|sigma| sigma as f32).collect();
        let largest = f64::from(sigmas.iter().copied().fold(0.0, f32::max));
        let init_noise_sigma = if schedule.begins_at_the_end() { largest } else { (largest * largest + 1.0).sqrt() };
        let noise = if self.ancestral { Some(noise.ok_or_else(no_noise)?) } else { None };
        Ok(Euler { steps: Steps::new(timesteps, run.begin)?, sigmas, init_noise_sigma, config: self.clone(), noise })
    }
}

/// The scheduler of one job.
#[derive(Debug)]
pub(super) struct Euler {
    steps: Steps,
    /// Of the whole schedule, with the one that the last step ends at.
    sigmas: Vec<f32>,
    init_noise_sigma: f64,
    config: Config,
    /// Of ancestral steps.
    noise: Option<Box<dyn StepNoise>>,
}

impl Euler {
    /// The sigma of an evaluation and the one after it.
    fn pair(&self, step: usize) -> Result<[f64; 2]> {
        let (place, _) = self.steps.at(step)?;
        let (sigma, next) = sigma_pair(&self.sigmas, place, 0)?;
        Ok([f64::from(sigma), f64::from(next)])
    }
}

impl Scheduler for Euler {
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
        let [sigma, _] = self.pair(step)?;
        Ok((sample / (sigma * sigma + 1.0).sqrt())?)
    }

    fn step(&mut self, model_output: &Tensor, step: usize, sample: &Tensor) -> Result<Tensor> {
        let [sigma, next] = self.pair(step)?;
        let original = of_sigma(self.config.schedule.prediction, sigma, model_output, sample)?;
        let [down, up] = if self.noise.is_some() { down_and_up(sigma, next) } else { [next, 0.0] };
        let derivative = (sum(&[(1.0, sample), (-1.0, &original)])? / sigma)?;
        let previous = sum(&[(1.0, sample), (down - sigma, &derivative)])?;
        let previous = match &mut self.noise {
            Some(noise) => sum(&[(1.0, &previous), (up, &noise.draw(step, sample.dims())?)])?,
            None => previous,
        };
        Ok(previous.to_dtype(model_output.dtype())?)
    }

    fn scale_noise(&self, sample: &Tensor, step: usize, noise: &Tensor) -> Result<Tensor> {
        let [sigma, _] = self.pair(step)?;
        sum(&[(1.0, sample), (sigma, noise)])
    }

    fn checkpoint(&self) -> SchedulerState {
        SchedulerState::default()
    }
}

/// Where an ancestral step from `sigma` to `next` goes, below `next`, and the noise that brings it up again.
pub(super) fn down_and_up(sigma: f64, next: f64) -> [f64; 2] {
    let up = (next * next * (sigma * sigma - next * next) / (sigma * sigma)).max(0.0).sqrt();
    [(next * next - up * up).max(0.0).sqrt(), up]
}

/// The picture that an output at noise of deviation `sigma`, beside a picture of 1, stands for.
pub(super) fn of_sigma(
    prediction: super::noise_schedule::Prediction,
    sigma: f64,
    model_output: &Tensor,
    sample: &Tensor,
) -> Result<Tensor> {
    use super::noise_schedule::Prediction::V;
    if prediction == V {
        let variance = sigma * sigma + 1.0;
        return sum(&[(-sigma / variance.sqrt(), model_output), (1.0 / variance, sample)]);
    }
    Ok(predicted(prediction, [1.0, sigma], model_output, sample)?.original)
}
