//! UniPC (W. Zhao et al., <https://arxiv.org/abs/2302.04867>): a predictor, and a corrector for the step before.
//!
//! Follows diffusers 0.42.1 `schedulers/scheduling_unipc_multistep.py`.

use parallel::Tensor;
use serde_json::{Value, json};

use super::fields::{Fields, refused};
use super::multistep::{Multistep, Point, Points, Solver};
use super::prediction::{Bounds, Predicted, predicted};
use super::steps::sum;
use super::{Run, Scheduler, SchedulerState};
use crate::checkpoint::fits;
use crate::{Error, Result};

/// `scheduler_config.json` of a `UniPCMultistepScheduler`.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Config {
    multistep: Multistep,
    bounds: Bounds,
    order: usize,
    /// `solver_type`: `B(h) = h`, not `e^h - 1`.
    bh1: bool,
    predict_x0: bool,
    lower_order_final: bool,
}

impl Config {
    pub(super) fn read(fields: Fields<'_>) -> Result<Self> {
        let solvers = [("bh1", true), ("bh2", false), ("midpoint", false), ("heun", false), ("logrho", false)];
        fields.only("solver_p", &Value::Null)?;
        fields.only("disable_corrector", &json!([]))?;
        fields.only("sigma_min", &Value::Null)?;
        fields.only("sigma_max", &Value::Null)?;
        let config = Self {
            multistep: Multistep::read(fields, Solver::UniPc)?,
            bounds: Bounds::thresholding(fields)?,
            order: fields.count("solver_order", 2, [1, 3])?,
            bh1: fields.choice("solver_type", false, &solvers)?,
            predict_x0: fields.flag("predict_x0", true)?,
            lower_order_final: fields.flag("lower_order_final", true)?,
        };
        // A step to 0 is infinitely long but for the picture, and of the first order alone.
        let ends = config.multistep.ends_at_least || (config.predict_x0 && config.lower_order_final && !config.bh1);
        if ends { Ok(config) } else { Err(refused("final_sigmas_type", &json!("zero"))) }
    }

    pub(super) fn start(&self, run: &Run) -> Result<UniPcMultistep> {
        Ok(UniPcMultistep { points: self.multistep.start(run)?, outputs: Vec::new(), last_sample: None, config: self.clone() })
    }
}

/// The scheduler of one job.
#[derive(Debug)]
pub(super) struct UniPcMultistep {
    points: Points,
    /// What earlier evaluations predicted, the latest last.
    outputs: Vec<Tensor>,
    /// Where the step before began, corrected.
    last_sample: Option<Tensor>,
    config: Config,
}

/// The sizes of a step: `e^hh - 1`, `B(h)`, and the right side of the equations for its weights.
struct Step {
    phi: f64,
    b: f64,
    right: Vec<f64>,
}

impl UniPcMultistep {
    /// The order of a step of the run.
    fn order(&self, step: usize) -> Result<usize> {
        let (place, _) = self.points.steps.at(step)?;
        let most = if self.config.lower_order_final { self.points.steps.all() - place } else { usize::MAX };
        Ok(self.config.order.min(most).min(step + 1))
    }

    fn convert(&self, model_output: &Tensor, place: usize, sample: &Tensor) -> Result<Tensor> {
        let Point { alpha, sigma, .. } = self.points.point(place);
        let prediction = self.config.multistep.schedule.prediction;
        let Predicted { original, epsilon } = predicted(prediction, [alpha, sigma], model_output, sample)?;
        if self.config.predict_x0 { self.config.bounds.apply(original) } else { Ok(epsilon) }
    }

    fn sizes(&self, h: f64, order: usize) -> Step {
        let hh = if self.config.predict_x0 { -h } else { h };
        let phi = libm::expm1(hh);
        let b = if self.config.bh1 { hh } else { phi };
        let (mut phi_k, mut factorial) = (phi / hh - 1.0, 1.0);
        let mut right = Vec::new();
        for i in 1..=order {
            right.push(phi_k * factorial / b);
            factorial *= (i + 1) as f64;
            phi_k = phi_k / hh - 1.0 / factorial;
        }
        Step { phi, b, right }
    }

    /// From `from` to `to`: what both predictor and corrector begin with, then weighted differences of earlier outputs.
    fn update(
        &self,
        [from, to]: [Point; 2],
        sample: &Tensor,
        step: &Step,
        latest: &Tensor,
        more: &[(f64, Tensor)],
    ) -> Result<Tensor> {
        let (of_sample, scale) =
            if self.config.predict_x0 { (to.sigma / from.sigma, to.alpha) } else { (to.alpha / from.alpha, to.sigma) };
        let mut terms = vec![(of_sample, sample), (-scale * step.phi, latest)];
        terms.extend(more.iter().map(|(weight, difference)| (-scale * step.b * weight, difference)));
        sum(&terms)
    }

    /// Differences of earlier outputs to the latest, from the place `at`, each over how far it is behind, and that.
    fn differences(&self, order: usize, at: usize, h: f64) -> Result<(Vec<f64>, Vec<Tensor>)> {
        let latest: Vec<&Tensor> = self.outputs.iter().rev().collect();
        let (mut ratios, mut differences) = (Vec::new(), Vec::new());
        for i in 1..order {
            let (Some(m0), Some(mi)) = (latest.first(), latest.get(i)) else {
                return Err(Error::checkpoint("scheduler", "an earlier output is missing"));
            };
            let ratio = (self.points.point(at - i).lambda - self.points.point(at).lambda) / h;
            differences.push(sum(&[(1.0 / ratio, *mi), (-1.0 / ratio, *m0)])?);
            ratios.push(ratio);
        }
        Ok((ratios, differences))
    }

    /// The sample where the step before ended, corrected by what was predicted there.
    fn correct(&self, place: usize, order: usize, output: &Tensor, last_sample: &Tensor) -> Result<Tensor> {
        let way = [self.points.point(place - 1), self.points.point(place)];
        let h = way[1].lambda - way[0].lambda;
        let step = self.sizes(h, order);
        let (mut ratios, differences) = self.differences(order, place - 1, h)?;
        ratios.push(1.0);
        let weights = if order == 1 { vec![0.5] } else { solve(&ratios, &step.right) };
        let m0 = self.outputs.last().ok_or_else(|| Error::checkpoint("scheduler", "an earlier output is missing"))?;
        let mut more: Vec<(f64, Tensor)> = weights.iter().copied().zip(differences).collect();
        more.push((weights[order - 1], sum(&[(1.0, output), (-1.0, m0)])?));
        self.update(way, last_sample, &step, m0, &more)
    }

    fn predict(&self, place: usize, order: usize, sample: &Tensor) -> Result<Tensor> {
        let way = [self.points.point(place), self.points.point(place + 1)];
        let h = way[1].lambda - way[0].lambda;
        let step = self.sizes(h, order);
        let (ratios, differences) = self.differences(order, place, h)?;
        let weights = if order == 2 { vec![0.5] } else { solve(&ratios, &step.right[..order - 1]) };
        let m0 = self.outputs.last().ok_or_else(|| Error::checkpoint("scheduler", "an earlier output is missing"))?;
        let more: Vec<(f64, Tensor)> = weights.into_iter().zip(differences).collect();
        self.update(way, sample, &step, m0, &more)
    }
}

/// The weights `w` for which the sum of `w_k ratio_k^i` is `right_i`: three at most, by elimination.
fn solve(ratios: &[f64], right: &[f64]) -> Vec<f64> {
    let n = ratios.len();
    let mut rows: Vec<Vec<f64>> =
        (0..n).map(|i| ratios.iter().map(|ratio| power(*ratio, i)).chain(std::iter::once(right[i])).collect()).collect();
    for at in 0..n {
        let largest = (at..n).max_by(|a, b| rows[*a][at].abs().total_cmp(&rows[*b][at].abs())).unwrap_or(at);
        rows.swap(at, largest);
        let pivot = rows[at].clone();
        for (i, row) in rows.iter_mut().enumerate().filter(|(i, _)| *i != at) {
            let factor = row[at] / pivot[at];
            debug_assert!(i < n);
            row.iter_mut().zip(&pivot).for_each(|(x, p)| *x -= factor * p);
        }
    }
    rows.iter().enumerate().map(|(i, row)| row[n] / row[i]).collect()
}

fn power(x: f64, n: usize) -> f64 {
    std::iter::repeat_n(x, n).product()
}

impl Scheduler for UniPcMultistep {
    fn timesteps(&self) -> &[f64] {
        self.points.steps.left()
    }

    fn sigmas(&self) -> &[f32] {
        &self.points.sigmas
    }

    fn step(&mut self, model_output: &Tensor, step: usize, sample: &Tensor) -> Result<Tensor> {
        let (place, _) = self.points.steps.at(step)?;
        let output = self.convert(model_output, place, sample)?;
        let sample = match self.last_sample.take() {
            Some(last_sample) => self.correct(place, self.order(step - 1)?, &output, &last_sample)?,
            None => sample.clone(),
        };
        self.outputs.drain(..(self.outputs.len() + 1).saturating_sub(self.config.order));
        self.outputs.push(output);
        let next = self.predict(place, self.order(step)?, &sample)?;
        self.last_sample = Some(sample);
        Ok(next.to_dtype(model_output.dtype())?)
    }

    fn scale_noise(&self, sample: &Tensor, step: usize, noise: &Tensor) -> Result<Tensor> {
        let Point { alpha, sigma, .. } = self.points.point(self.points.steps.at(step)?.0);
        sum(&[(alpha, sample), (sigma, noise)])
    }

    fn checkpoint(&self) -> SchedulerState {
        SchedulerState { history: self.outputs.iter().chain(&self.last_sample).cloned().collect() }
    }

    fn restore(&mut self, state: SchedulerState, step: usize, like: &Tensor) -> Result<()> {
        let (mut outputs, expected) = (state.history, step.min(self.config.order) + 1);
        if outputs.len() != expected {
            let reason = format!("has {} tensors of history, UniPC keeps {expected} after {step}", outputs.len());
            return Err(Error::checkpoint("scheduler", reason));
        }
        outputs.iter().enumerate().try_for_each(|(i, tensor)| fits(&format!("scheduler.{i}"), tensor, like))?;
        self.last_sample = outputs.pop();
        self.outputs = outputs;
        Ok(())
    }
}
