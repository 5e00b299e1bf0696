//! DDPM's steps (J. Ho et al., <https://arxiv.org/abs/2006.11239>), with the variances that DeepFloyd-IF's networks learn.
//!
//! Follows diffusers 0.42.1 `schedulers/scheduling_ddpm.py`.

use parallel::Tensor;

use super::ddim::add_noise;
use super::fields::Fields;
use super::noise_schedule::{Defaults, NoiseSchedule, Spacing, THREE, ZeroSnr};
use super::prediction::{Bounds, predicted};
use super::steps::{Steps, sum};
use super::{Run, Scheduler, SchedulerState, StepNoise, no_noise};
use crate::{Error, Result};

/// Least variance that is believed, so that it has a logarithm.
const LEAST_VARIANCE: f64 = 1e-20;

/// Whose variance a step's noise has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Variance {
    /// The posterior's.
    FixedSmall,
    /// The step's own.
    FixedLarge,
    /// Between the two by what the network says, in logarithms: the second half of its output's channels, -1 to 1.
    LearnedRange,
}

/// `scheduler_config.json` of a `DDPMScheduler`.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Config {
    schedule: NoiseSchedule,
    bounds: Bounds,
    variance: Variance,
}

impl Config {
    pub(super) fn read(fields: Fields<'_>) -> Result<Self> {
        // What the reference makes of the logarithm of the small one is the same.
        let variances = [
            ("fixed_small", Variance::FixedSmall),
            ("fixed_small_log", Variance::FixedSmall),
            ("fixed_large", Variance::FixedLarge),
            ("learned_range", Variance::LearnedRange),
        ];
        Ok(Self {
            schedule: NoiseSchedule::read(fields, Defaults::new(Spacing::Leading, THREE, ZeroSnr::Nothing))?,
            bounds: Bounds::read(fields, true)?,
            variance: fields.choice("variance_type", Variance::FixedSmall, &variances)?,
        })
    }

    pub(super) fn schedule(&self) -> &NoiseSchedule {
        &self.schedule
    }

    pub(super) fn learns_variance(&self) -> bool {
        self.variance == Variance::LearnedRange
    }

    pub(super) fn start(&self, run: &Run, noise: Option<Box<dyn StepNoise>>) -> Result<Ddpm> {
        let n = self.schedule.check(run)?;
        let steps = Steps::new(self.schedule.timesteps(n, true), run.begin)?;
        Ok(Ddpm { steps, noise: noise.ok_or_else(no_noise)?, config: self.clone() })
    }
}

/// The scheduler of one job.
#[derive(Debug)]
pub(super) struct Ddpm {
    steps: Steps,
    noise: Box<dyn StepNoise>,
    config: Config,
}

impl Scheduler for Ddpm {
    fn timesteps(&self) -> &[f64] {
        self.steps.left()
    }

    fn step(&mut self, model_output: &Tensor, step: usize, sample: &Tensor) -> Result<Tensor> {
        let (place, t) = self.steps.at(step)?;
        let Config { schedule, bounds, variance } = &self.config;
        let (output, learned) = halves(model_output, sample, *variance)?;
        let alpha = schedule.alpha_cumprod(t);
        let previous = match self.steps.left().get(step + 1) {
            Some(before) => schedule.alpha_cumprod(*before),
            None => 1.0,
        };
        let (beta, beta_previous) = (1.0 - alpha, 1.0 - previous);
        let current_alpha = alpha / previous;
        let current_beta = 1.0 - current_alpha;
        let factors = [alpha.sqrt(), beta.sqrt()];
        let original = bounds.apply(predicted(schedule.prediction, factors, &output, sample)?.original)?;
        let of_original = previous.sqrt() * current_beta / beta;
        let of_sample = current_alpha.sqrt() * beta_previous / beta;
        let mut next = sum(&[(of_original, &original), (of_sample, sample)])?;
        if t > 0.0 {
            debug_assert!(place < self.steps.all());
            let small = (beta_previous / beta * current_beta).max(LEAST_VARIANCE);
            let noise = self.noise.draw(step, sample.dims())?;
            next = match (variance, learned) {
                (Variance::LearnedRange, Some(learned)) => {
                    let part = learned.affine(0.5, 0.5)?;
                    let (least, most) = (libm::log(small), libm::log(current_beta));
                    let log = part.affine(most - least, least)?;
                    (next + (exp(&(log * 0.5)?)? * noise)?)?
                }
                (Variance::FixedLarge, _) => sum(&[(1.0, &next), (current_beta.sqrt(), &noise)])?,
                _ => sum(&[(1.0, &next), (small.sqrt(), &noise)])?,
            };
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

/// The prediction, and the learned variance if there is one.
fn halves(model_output: &Tensor, sample: &Tensor, variance: Variance) -> Result<(Tensor, Option<Tensor>)> {
    let (channels, own) = (model_output.dim(1)?, sample.dim(1)?);
    if variance != Variance::LearnedRange {
        return Ok((model_output.clone(), None));
    }
    if channels != 2 * own {
        let reason = format!("{channels} channels for {own} and as many variances");
        return Err(Error::Invalid { field: "model_output", reason });
    }
    let half = |at: usize| model_output.narrow(1, at * own, own)?.contiguous();
    Ok((half(0)?, Some(half(1)?)))
}

/// Of each element, by the crate's own exponential: no C library has a say in a picture.
fn exp(x: &Tensor) -> Result<Tensor> {
    let values = x.flatten_all()?.to_vec1::<f32>()?.into_iter().map(|x| libm::exp(f64::from(x)) as f32).collect();
    Ok(Tensor::from_vec(values, x.shape(), x.device())?)
}
