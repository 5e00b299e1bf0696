//! What both DPM-Solvers share: their configurations, what they predict, and what a step adds up.
//!
//! C. Lu et al., <https://arxiv.org/abs/2206.00927> and <https://arxiv.org/abs/2211.01095>. Follows diffusers 0.42.1
//! `schedulers/scheduling_dpmsolver_multistep.py` and `scheduling_dpmsolver_singlestep.py`.

use parallel::Tensor;
use serde_json::json;

use super::fields::{Fields, refused};
use super::multistep::{Multistep, Point, Solver};
use super::prediction::{Bounds, Predicted, predicted};
use super::steps::sum;
use crate::Result;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Algorithm {
    /// Of the noise.
    Dpm,
    /// Of the picture.
    DpmPlus,
    Sde,
    SdePlus,
}

/// The fields that both have.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct DpmSolver {
    pub(super) multistep: Multistep,
    bounds: Bounds,
    pub(super) order: usize,
    algorithm: Algorithm,
    /// `solver_type`: the second order's is Heun's, not the midpoint's.
    pub(super) heun: bool,
    pub(super) lower_order_final: bool,
}

impl DpmSolver {
    /// Of steps that go back over earlier ones (`Solver::Dpm`), or over those of their own group (`Solver::Singlestep`).
    pub(super) fn read(fields: Fields<'_>, solver: Solver) -> Result<Self> {
        let algorithms = [
            ("dpmsolver", Algorithm::Dpm),
            ("dpmsolver++", Algorithm::DpmPlus),
            ("deis", Algorithm::DpmPlus),
            ("sde-dpmsolver++", Algorithm::SdePlus),
            ("sde-dpmsolver", Algorithm::Sde),
        ];
        let known = if solver == Solver::Singlestep { &algorithms[..4] } else { &algorithms };
        let solvers = [("midpoint", false), ("heun", true), ("logrho", false), ("bh1", false), ("bh2", false)];
        // Minus infinity, as files have it, is no number in JSON: it is read as null.
        fields.only("lambda_min_clipped", &serde_json::Value::Null)?;
        fields.only("variance_type", &serde_json::Value::Null)?;
        let config = Self {
            multistep: Multistep::read(fields, solver)?,
            bounds: Bounds::thresholding(fields)?,
            order: fields.count("solver_order", 2, [1, 3])?,
            algorithm: fields.choice("algorithm_type", Algorithm::DpmPlus, known)?,
            heun: fields.choice("solver_type", false, &solvers)?,
            lower_order_final: fields.flag("lower_order_final", solver == Solver::Dpm)?,
        };
        let of_noise = matches!(config.algorithm, Algorithm::Dpm | Algorithm::Sde);
        if of_noise && !config.multistep.ends_at_least {
            return Err(refused("final_sigmas_type", &json!("zero")));
        }
        if config.algorithm == Algorithm::Sde && config.order == 3 {
            return Err(refused("solver_order", &json!(3)));
        }
        // The reference's singlestep solver fails there.
        if of_noise && solver == Solver::Singlestep && config.bounds != Bounds::None {
            return Err(refused("thresholding", &json!(true)));
        }
        Ok(config)
    }

    pub(super) fn draws(&self) -> bool {
        matches!(self.algorithm, Algorithm::Sde | Algorithm::SdePlus)
    }

    /// Of a step of an order between two points.
    pub(super) fn factors(&self, order: usize, from: Point, to: Point) -> Factors {
        let h = to.lambda - from.lambda;
        let heun = self.heun || order == 3;
        match self.algorithm {
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

    /// What a network's output predicts at a point: the picture, or of the older algorithms the noise.
    pub(super) fn convert(&self, model_output: &Tensor, at: Point, sample: &Tensor) -> Result<Tensor> {
        let Point { alpha, sigma, .. } = at;
        let prediction = self.multistep.schedule.prediction;
        let Predicted { original, epsilon } = predicted(prediction, [alpha, sigma], model_output, sample)?;
        if matches!(self.algorithm, Algorithm::DpmPlus | Algorithm::SdePlus) {
            return self.bounds.apply(original);
        }
        if self.bounds == Bounds::None {
            return Ok(epsilon);
        }
        let original = self.bounds.apply(original)?;
        Ok((sum(&[(1.0, sample), (-alpha, &original)])? / sigma)?)
    }
}

/// What a step adds up: the sample, the prediction, its first and second difference, and noise, each times a number.
#[derive(Clone, Copy, Debug)]
pub(super) struct Factors {
    pub(super) sample: f64,
    pub(super) prediction: f64,
    pub(super) first: f64,
    pub(super) second: f64,
    pub(super) noise: f64,
}
