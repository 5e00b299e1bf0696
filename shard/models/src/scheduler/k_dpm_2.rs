//! DPM2 of T. Karras et al. (<https://arxiv.org/abs/2206.00364>): the second of a step's two evaluations is half way, by the logarithm of sigma. The
//! ancestral one adds noise to each step.
//!
//! Follows diffusers 0.42.1 `schedulers/scheduling_k_dpm_2_discrete.py` and `scheduling_k_dpm_2_ancestral_discrete.py`.

use parallel::{DType, Tensor};
use serde_json::json;

use super::euler::{down_and_up, of_sigma};
use super::fields::{Fields, refused};
use super::heun::DEFAULTS;
use super::noise_schedule::{self, NoiseSchedule};
use super::sigmas::{exponential, karras};
use super::steps::{Steps, sum};
use super::{Run, Scheduler, SchedulerState, StepNoise, no_noise};
use crate::checkpoint::fits;
use crate::{Error, Result};

/// Evaluations of a step.
pub(super) const ORDER: usize = 2;

/// `scheduler_config.json` of a `KDPM2DiscreteScheduler` or `KDPM2AncestralDiscreteScheduler`.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Config {
    schedule: NoiseSchedule,
    karras: bool,
    exponential: bool,
    ancestral: bool,
}

impl Config {
    pub(super) fn read(fields: Fields<'_>) -> Result<Self> {
        noise_schedule::refuse_other_sigmas(fields)?;
        let (karras, exponential) = (fields.flag("use_karras_sigmas", false)?, fields.flag("use_exponential_sigmas", false)?);
        if karras && exponential {
            return Err(refused("use_exponential_sigmas", &json!(true)));
        }
        Ok(Self { schedule: NoiseSchedule::read(fields, DEFAULTS)?, karras, exponential, ancestral: false })
    }

    pub(super) fn read_ancestral(fields: Fields<'_>) -> Result<Self> {
        Ok(Self { ancestral: true, ..Self::read(fields)? })
    }

    pub(super) fn start(&self, run: &Run, noise: Option<Box<dyn StepNoise>>) -> Result<KDpm2> {
        let n = self.schedule.check(run)?;
        if !run.begin.is_multiple_of(ORDER) {
            let reason = format!("evaluation {} is not the first of a step", run.begin);
            return Err(Error::Invalid { field: "strength", reason });
        }
        let mut timesteps = self.schedule.timesteps(n, false);
        let mut sigmas = self.schedule.interpolated(&timesteps);
        let range = [sigmas[0], sigmas[n - 1]];
        if self.karras || self.exponential {
            sigmas = if self.karras { karras(range, n) } else { exponential(range, n) };
            timesteps = self.schedule.timesteps_of(&sigmas);
        }
        if self.karras {
            timesteps.iter_mut().for_each(|t| *t = t.round_ties_even());
        }
        sigmas.push(0.0);
        let sigmas: Vec<f32> = sigmas.into_iter().map(|sigma| sigma as f32).collect();
        let ways: Vec<Way> = sigmas.windows(2).map(|two| Way::between(two[0], two[1], self.ancestral)).collect();
        let halves = self.schedule.timesteps_of(&ways.iter().map(|way| way.half).collect::<Vec<_>>());
        // The last step goes to 0 at once.
        let both = timesteps.into_iter().zip(halves).flat_map(|(t, half)| [t, half]).take(ORDER * n - 1);
        let steps = Steps::new(both.map(|t| f64::from(t as f32)).collect(), run.begin)?;
        let largest = f64::from(sigmas.iter().copied().fold(0.0, f32::max));
        let init_noise_sigma = if self.schedule.begins_at_the_end() { largest } else { (largest * largest + 1.0).sqrt() };
        let noise = if self.ancestral { Some(noise.ok_or_else(no_noise)?) } else { None };
        // As the reference has them: the first once, every other twice, the final 0 once more.
        let sigmas = sigmas.iter().flat_map(|sigma| [*sigma, *sigma]).skip(1).chain([0.0]).collect();
        Ok(KDpm2 { steps, sigmas, ways, init_noise_sigma, from: None, noise, config: self.clone() })
    }
}

/// The sigmas of one step.
#[derive(Clone, Copy, Debug)]
struct Way {
    from: f64,
    /// Of the second evaluation; 0 if there is none.
    half: f64,
    /// Where the step goes, before the noise that brings it up.
    down: f64,
    up: f64,
}

impl Way {
    fn between(from: f32, next: f32, ancestral: bool) -> Self {
        let (from, next) = (f64::from(from), f64::from(next));
        let [down, up] = if ancestral { down_and_up(from, next) } else { [next, 0.0] };
        let half = if next > 0.0 { libm::exp((libm::log(from) + libm::log(down)) / 2.0) } else { 0.0 };
        Self { from, half, down, up }
    }
}

/// The scheduler of one job.
#[derive(Debug)]
pub(super) struct KDpm2 {
    steps: Steps,
    sigmas: Vec<f32>,
    /// Of each step of the whole schedule.
    ways: Vec<Way>,
    init_noise_sigma: f64,
    /// Between the two evaluations of a step: its sample.
    from: Option<Tensor>,
    /// Of ancestral steps.
    noise: Option<Box<dyn StepNoise>>,
    config: Config,
}

impl KDpm2 {
    /// The step that an evaluation is of, and the sigma there.
    fn at(&self, step: usize) -> Result<(Way, f64)> {
        let (place, _) = self.steps.at(step)?;
        let way = self.ways[place / ORDER];
        Ok((way, if place % ORDER == 0 { way.from } else { way.half }))
    }
}

impl Scheduler for KDpm2 {
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
        let (_, sigma) = self.at(step)?;
        Ok((sample / (sigma * sigma + 1.0).sqrt())?)
    }

    fn step(&mut self, model_output: &Tensor, step: usize, sample: &Tensor) -> Result<Tensor> {
        let (Way { from, half, down, up }, at) = self.at(step)?;
        let original = of_sigma(self.config.schedule.prediction, at, model_output, sample)?;
        let derivative = (sum(&[(1.0, sample), (-1.0, &original)])? / at)?;
        let previous = match self.from.take() {
            None => {
                let previous = sum(&[(1.0, sample), (half - from, &derivative)])?;
                if half > 0.0 {
                    self.from = Some(sample.to_dtype(DType::F32)?);
                }
                previous
            }
            Some(start) => {
                let previous = sum(&[(1.0, &start), (down - from, &derivative)])?;
                match &mut self.noise {
                    Some(noise) => sum(&[(1.0, &previous), (up, &noise.draw(step / ORDER, sample.dims())?)])?,
                    None => previous,
                }
            }
        };
        Ok(previous.to_dtype(model_output.dtype())?)
    }

    fn scale_noise(&self, sample: &Tensor, step: usize, noise: &Tensor) -> Result<Tensor> {
        // The sigma of the evaluation's place, which of a second one is not that of its evaluation.
        let place = self.steps.at(step)?.0;
        sum(&[(1.0, sample), (f64::from(self.sigmas[place]), noise)])
    }

    fn checkpoint(&self) -> SchedulerState {
        SchedulerState { history: self.from.iter().cloned().collect() }
    }

    fn restore(&mut self, state: SchedulerState, step: usize, like: &Tensor) -> Result<()> {
        // The last step has no second evaluation.
        let between = step % ORDER == 1 && step < self.timesteps().len();
        let found = state.history.len();
        self.from = match (<[Tensor; 1]>::try_from(state.history), between) {
            (Ok([from]), true) => {
                fits("scheduler.0", &from, &like.to_dtype(DType::F32)?)?;
                Some(from)
            }
            (Err(history), false) if history.is_empty() => None,
            _ => return Err(Error::checkpoint("scheduler", format!("has {found} tensors of history after {step}"))),
        };
        Ok(())
    }
}
