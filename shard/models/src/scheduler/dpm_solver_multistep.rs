//! DPM-Solver and DPM-Solver++ (C. Lu et al., <https://arxiv.org/abs/2211.01095>), of one to three steps.
//!
//! Follows diffusers 0.42.1 `schedulers/scheduling_dpmsolver_multistep.py`.

use parallel::Tensor;
use serde_json::json;

use super::fields::{Fields, refused};
use super::multistep::{Multistep, Point, Points, Solver};
use super::prediction::{Bounds, Predicted, predicted};
use super::steps::sum;
use super::{Run, Scheduler, SchedulerState, StepNoise, no_noise};
use crate::checkpoint::fits;
use crate::{Error, Result};

/// Schedules of fewer steps end in steps of a lower order.
const FEW: usize = 15;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Algorithm {
    /// Of the noise.
    Dpm,
    /// Of the picture.
    DpmPlus,
    Sde,
    SdePlus,
}

/// `scheduler_config.json` of a `DPMSolverMultistepScheduler`.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Config {
    multistep: Multistep,
    bounds: Bounds,
    order: usize,
    algorithm: Algorithm,
    /// `solver_type`: the second order's is Heun's, not the midpoint's.
    heun: bool,
    lower_order_final: bool,
    euler_at_final: bool,
}

impl Config {
    pub(super) fn read(fields: Fields<'_>) -> Result<Self> {
        let algorithms = [
            ("dpmsolver", Algorithm::Dpm),
            ("dpmsolver++", Algorithm::DpmPlus),
            ("deis", Algorithm::DpmPlus),
            ("sde-dpmsolver", Algorithm::Sde),
            ("sde-dpmsolver++", Algorithm::SdePlus),
        ];
        let solvers = [("midpoint", false), ("heun", true), ("logrho", false), ("bh1", false), ("bh2", false)];
        // Minus infinity, as files have it, is no number in JSON: it is read as null.
        fields.only("lambda_min_clipped", &serde_json::Value::Null)?;
        fields.only("variance_type", &serde_json::Value::Null)?;
        let config = Self {
            multistep: Multistep::read(fields, Solver::Dpm)?,
            bounds: Bounds::thresholding(fields)?,
            order: fields.count("solver_order", 2, [1, 3])?,
            algorithm: fields.choice("algorithm_type", Algorithm::DpmPlus, &algorithms)?,
            heun: fields.choice("solver_type", false, &solvers)?,
            lower_order_final: fields.flag("lower_order_final", true)?,
            euler_at_final: fields.flag("euler_at_final", false)?,
        };
        let of_noise = matches!(config.algorithm, Algorithm::Dpm | Algorithm::Sde);
        if of_noise && !config.multistep.ends_at_least {
            return Err(refused("final_sigmas_type", &json!("zero")));
        }
        if config.algorithm == Algorithm::Sde && config.order == 3 {
            return Err(refused("solver_order", &json!(3)));
        }
        Ok(config)
    }

    pub(super) fn draws(&self) -> bool {
        matches!(self.algorithm, Algorithm::Sde | Algorithm::SdePlus)
    }

    pub(super) fn start(&self, run: &Run, noise: Option<Box<dyn StepNoise>>) -> Result<DpmSolverMultistep> {
        let noise = if self.draws() { Some(noise.ok_or_else(no_noise)?) } else { None };
        Ok(DpmSolverMultistep { points: self.multistep.start(run)?, outputs: Vec::new(), noise, config: self.clone() })
    }
}

/// The scheduler of one job.
#[derive(Debug)]
pub(super) struct DpmSolverMultistep {
    points: Points,
    /// What earlier evaluations predicted, the latest last.
    outputs: Vec<Tensor>,
    noise: Option<Box<dyn StepNoise>>,
    config: Config,
}

/// What a step adds up: the sample, the prediction, its first and second difference, and noise, each times a number.
struct Factors {
    sample: f64,
    prediction: f64,
    first: f64,
    second: f64,
    noise: f64,
}

impl DpmSolverMultistep {
    /// The order of the step at a place, the `step`-th of the run.
    fn order(&self, place: usize, step: usize) -> usize {
        let config = &self.config;
        let (all, few) = (self.points.steps.all(), self.points.steps.all() < FEW && config.lower_order_final);
        if place + 1 == all && (config.euler_at_final || few || !config.multistep.ends_at_least) {
            return 1;
        }
        let most = if place + 2 == all && few { 2 } else { 3 };
        config.order.min(most).min(step + 1)
    }

    fn factors(&self, order: usize, from: Point, to: Point) -> Factors {
        let h = to.lambda - from.lambda;
        let heun = self.config.heun || order == 3;
        match self.config.algorithm {
            Algorithm::DpmPlus => {
                let e = libm::expm1(-h);
                Factors {
                    sample: to.sigma / from.sigma,
                    prediction: -to.alpha * e,
                    first: if heun { to.alpha * (e / h + 1.0) } else { -0.5 * to.alpha * e },
                    second: -to.alpha * ((e + h) / (h * h) - 0.5),
                    noise: 0.0,
                }
            }
            Algorithm::Dpm => {
                let e = libm::expm1(h);
                Factors {
                    sample: to.alpha / from.alpha,
                    prediction: -to.sigma * e,
                    first: if heun { -to.sigma * (e / h - 1.0) } else { -0.5 * to.sigma * e },
                    second: -to.sigma * ((e - h) / (h * h) - 0.5),
                    noise: 0.0,
                }
            }
            Algorithm::SdePlus => {
                let e = -libm::expm1(-2.0 * h);
                Factors {
                    sample: to.sigma / from.sigma * libm::exp(-h),
                    prediction: to.alpha * e,
                    first: if heun { to.alpha * (1.0 - e / (2.0 * h)) } else { 0.5 * to.alpha * e },
                    second: to.alpha * ((e - 2.0 * h) / (4.0 * h * h) - 0.5),
                    noise: to.sigma * e.sqrt(),
                }
            }
            Algorithm::Sde => {
                let e = libm::expm1(h);
                Factors {
                    sample: to.alpha / from.alpha,
                    prediction: -2.0 * to.sigma * e,
                    first: if heun { -2.0 * to.sigma * (e / h - 1.0) } else { -to.sigma * e },
                    second: 0.0,
                    noise: to.sigma * libm::expm1(2.0 * h).sqrt(),
                }
            }
        }
    }

    /// What a network's output predicts: the picture, or of the older algorithms the noise.
    fn convert(&self, model_output: &Tensor, place: usize, sample: &Tensor) -> Result<Tensor> {
        let Point { alpha, sigma, .. } = self.points.point(place);
        let prediction = self.config.multistep.schedule.prediction;
        let Predicted { original, epsilon } = predicted(prediction, [alpha, sigma], model_output, sample)?;
        if matches!(self.config.algorithm, Algorithm::DpmPlus | Algorithm::SdePlus) {
            return self.config.bounds.apply(original);
        }
        if self.config.bounds == Bounds::None {
            return Ok(epsilon);
        }
        let original = self.config.bounds.apply(original)?;
        Ok((sum(&[(1.0, sample), (-alpha, &original)])? / sigma)?)
    }
}

impl Scheduler for DpmSolverMultistep {
    fn timesteps(&self) -> &[f64] {
        self.points.steps.left()
    }

    fn sigmas(&self) -> &[f32] {
        &self.points.sigmas
    }

    fn step(&mut self, model_output: &Tensor, step: usize, sample: &Tensor) -> Result<Tensor> {
        let (place, _) = self.points.steps.at(step)?;
        let output = self.convert(model_output, place, sample)?;
        self.outputs.drain(..(self.outputs.len() + 1).saturating_sub(self.config.order));
        self.outputs.push(output);
        let order = self.order(place, step);
        let (from, to) = (self.points.point(place), self.points.point(place + 1));
        let factors = self.factors(order, from, to);
        // How far each earlier evaluation is behind the one after it, over the way of this step.
        let h = to.lambda - from.lambda;
        let behind = |i: usize| (self.points.point(place + 1 - i).lambda - self.points.point(place - i).lambda) / h;
        let latest: Vec<&Tensor> = self.outputs.iter().rev().collect();
        let mut terms = vec![(factors.sample, sample)];
        match (order, latest.as_slice()) {
            (1, [m0, ..]) => terms.push((factors.prediction, *m0)),
            (2, [m0, m1, ..]) => {
                let difference = factors.first / behind(1);
                terms.extend([(factors.prediction + difference, *m0), (-difference, *m1)]);
            }
            (3, [m0, m1, m2, ..]) => {
                let (r0, r1) = (behind(1), behind(2));
                // D1 and D2 as sums of the two differences.
                let weight = r0 / (r0 + r1);
                let near = (factors.first * (1.0 + weight) + factors.second / (r0 + r1)) / r0;
                let far = -(factors.first * weight + factors.second / (r0 + r1)) / r1;
                terms.extend([(factors.prediction + near, *m0), (far - near, *m1), (-far, *m2)]);
            }
            _ => return Err(Error::checkpoint("scheduler", "an earlier output is missing")),
        }
        let mut next = sum(&terms)?;
        if let Some(noise) = &mut self.noise {
            next = sum(&[(1.0, &next), (factors.noise, &noise.draw(step, sample.dims())?)])?;
        }
        Ok(next.to_dtype(model_output.dtype())?)
    }

    fn scale_noise(&self, sample: &Tensor, step: usize, noise: &Tensor) -> Result<Tensor> {
        let Point { alpha, sigma, .. } = self.points.point(self.points.steps.at(step)?.0);
        sum(&[(alpha, sample), (sigma, noise)])
    }

    fn checkpoint(&self) -> SchedulerState {
        SchedulerState { history: self.outputs.clone() }
    }

    fn restore(&mut self, state: SchedulerState, step: usize, like: &Tensor) -> Result<()> {
        let (found, expected) = (state.history.len(), step.min(self.config.order));
        if found != expected {
            let reason = format!("has {found} tensors of history, DPM-Solver keeps {expected} after {step}");
            return Err(Error::checkpoint("scheduler", reason));
        }
        state.history.iter().enumerate().try_for_each(|(i, tensor)| fits(&format!("scheduler.{i}"), tensor, like))?;
        self.outputs = state.history;
        Ok(())
    }
}
