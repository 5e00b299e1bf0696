//! PLMS steps of pseudo numerical methods (L. Liu et al., <https://arxiv.org/abs/2202.09778>).
//!
//! Follows diffusers 0.42.1 `schedulers/scheduling_pndm.py` with `skip_prk_steps`, as Stable Diffusion has it.

use parallel::Tensor;
use serde_json::json;

use super::ddim::add_noise;
use super::fields::{Fields, refused};
use super::noise_schedule::{Defaults, NoiseSchedule, Prediction, Spacing, TWO, ZeroSnr};
use super::steps::{Steps, sum};
use super::{Run, Scheduler, SchedulerState};
use crate::checkpoint::fits;
use crate::{Error, Result};

/// Outputs of earlier evaluations that a step is made of, at most.
const OUTPUTS: usize = 4;

/// `scheduler_config.json` of a `PNDMScheduler`.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Config {
    schedule: NoiseSchedule,
    set_alpha_to_one: bool,
}

impl Config {
    pub(super) fn read(fields: Fields<'_>) -> Result<Self> {
        if !fields.flag("skip_prk_steps", false)? {
            return Err(refused("skip_prk_steps", &json!(false)));
        }
        Ok(Self {
            schedule: NoiseSchedule::read(fields, Defaults::new(Spacing::Leading, TWO, ZeroSnr::Never))?,
            set_alpha_to_one: fields.flag("set_alpha_to_one", false)?,
        })
    }

    pub(super) fn start(&self, run: &Run) -> Result<Pndm> {
        let n = self.schedule.check(run)?;
        let mut timesteps = self.schedule.timesteps(n, true);
        // The second one comes twice: the first step is made, evaluated at its end, and made again.
        timesteps.insert(1.min(n - 1) + 1, timesteps[1.min(n - 1)]);
        let steps = Steps::new(timesteps, run.begin)?;
        let stride = (self.schedule.train_timesteps() / n) as f64;
        Ok(Pndm { steps, stride, outputs: Vec::new(), first: None, config: self.clone() })
    }
}

/// The scheduler of one job.
#[derive(Debug)]
pub(super) struct Pndm {
    steps: Steps,
    /// Timesteps from one step to the next.
    stride: f64,
    /// Of earlier evaluations, the latest last; the second evaluation's is not kept.
    outputs: Vec<Tensor>,
    /// The sample of the first evaluation, until the second.
    first: Option<Tensor>,
    config: Config,
}

/// Outputs that are kept after so many evaluations.
fn kept(evaluations: usize) -> usize {
    match evaluations {
        0 | 1 => evaluations,
        _ => (evaluations - 1).min(OUTPUTS),
    }
}

impl Pndm {
    fn previous(&self, [t, before]: [f64; 2], model_output: &Tensor, sample: &Tensor) -> Result<Tensor> {
        let Config { schedule, set_alpha_to_one } = &self.config;
        let alpha = schedule.alpha_cumprod(t);
        let previous = if before < 0.0 && *set_alpha_to_one { 1.0 } else { schedule.alpha_cumprod(before) };
        let (beta, beta_previous) = (1.0 - alpha, 1.0 - previous);
        let epsilon = match schedule.prediction {
            Prediction::V => sum(&[(alpha.sqrt(), model_output), (beta.sqrt(), sample)])?,
            _ => model_output.clone(),
        };
        let denominator = alpha * beta_previous.sqrt() + (alpha * beta * previous).sqrt();
        sum(&[((previous / alpha).sqrt(), sample), (-(previous - alpha) / denominator, &epsilon)])
    }
}

impl Scheduler for Pndm {
    fn timesteps(&self) -> &[f64] {
        self.steps.left()
    }

    fn step(&mut self, model_output: &Tensor, step: usize, sample: &Tensor) -> Result<Tensor> {
        let (_, t) = self.steps.at(step)?;
        let mut way = [t, t - self.stride];
        let mut from = sample.clone();
        if step == 1 {
            way = [t + self.stride, t];
        } else {
            self.outputs.drain(..self.outputs.len().saturating_sub(OUTPUTS - 1));
            self.outputs.push(model_output.clone());
        }
        let output = match (self.outputs.as_slice(), step) {
            ([last], 0) => {
                self.first = Some(sample.clone());
                last.clone()
            }
            ([last], _) => {
                from = self.first.take().ok_or_else(|| Error::checkpoint("scheduler", "the first sample is missing"))?;
                sum(&[(0.5, model_output), (0.5, last)])?
            }
            ([a, last], _) => sum(&[(1.5, last), (-0.5, a)])?,
            ([b, a, last], _) => sum(&[(23.0 / 12.0, last), (-16.0 / 12.0, a), (5.0 / 12.0, b)])?,
            ([c, b, a, last], _) => sum(&[(55.0 / 24.0, last), (-59.0 / 24.0, a), (37.0 / 24.0, b), (-9.0 / 24.0, c)])?,
            _ => return Err(Error::checkpoint("scheduler", "there is no earlier output")),
        };
        Ok(self.previous(way, &output, &from)?.to_dtype(model_output.dtype())?)
    }

    fn scale_noise(&self, sample: &Tensor, step: usize, noise: &Tensor) -> Result<Tensor> {
        add_noise(&self.config.schedule, self.steps.at(step)?.1, sample, noise)
    }

    fn checkpoint(&self) -> SchedulerState {
        SchedulerState { history: self.outputs.iter().chain(&self.first).cloned().collect() }
    }

    fn restore(&mut self, state: SchedulerState, step: usize, like: &Tensor) -> Result<()> {
        let (mut outputs, first) = (state.history, usize::from(step == 1));
        if outputs.len() != kept(step) + first {
            let reason = format!("has {} tensors of history, PNDM keeps {} after {step}", outputs.len(), kept(step) + first);
            return Err(Error::checkpoint("scheduler", reason));
        }
        outputs.iter().enumerate().try_for_each(|(i, tensor)| fits(&format!("scheduler.{i}"), tensor, like))?;
        self.first = if first == 1 { outputs.pop() } else { None };
        self.outputs = outputs;
        Ok(())
    }
}
