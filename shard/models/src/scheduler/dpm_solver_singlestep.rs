//! DPM-Solver of single steps: groups of one, two or three evaluations, each of which starts again from where its group began.
//!
//! C. Lu et al., <https://arxiv.org/abs/2211.01095>. Follows diffusers 0.42.1 `schedulers/scheduling_dpmsolver_singlestep.py`.

use parallel::{DType, Tensor};

use super::dpm_solver::DpmSolver;
use super::fields::Fields;
use super::multistep::{Point, Points, Solver};
use super::steps::sum;
use super::{Run, Scheduler, SchedulerState, StepNoise, no_noise};
use crate::checkpoint::fits;
use crate::{Error, Result};

/// `scheduler_config.json` of a `DPMSolverSinglestepScheduler`.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Config(DpmSolver);

impl Config {
    pub(super) fn read(fields: Fields<'_>) -> Result<Self> {
        Ok(Self(DpmSolver::read(fields, Solver::Singlestep)?))
    }

    pub(super) fn draws(&self) -> bool {
        self.0.draws()
    }

    pub(super) fn start(&self, run: &Run, noise: Option<Box<dyn StepNoise>>) -> Result<DpmSolverSinglestep> {
        let noise = if self.draws() { Some(noise.ok_or_else(no_noise)?) } else { None };
        let points = self.0.multistep.start(run)?;
        let orders = self.orders(points.steps.all());
        Ok(DpmSolverSinglestep { points, orders, outputs: Vec::new(), from: None, noise, solver: self.0.clone() })
    }

    /// `get_order_list`: 1, 2, 3, 1, 2, 3 and so on. A group that the steps do not fill is of a lower order.
    fn orders(&self, steps: usize) -> Vec<usize> {
        let DpmSolver { order, lower_order_final, ref multistep, .. } = self.0;
        let mut orders: Vec<usize> = (0..steps).map(|place| place % order + 1).collect();
        let lowers = (lower_order_final && steps.is_multiple_of(order)) || !multistep.ends_at_least;
        if let (true, Some(last)) = (lowers, orders.last_mut()) {
            *last = 1;
        }
        orders
    }
}

/// The scheduler of one job.
#[derive(Debug)]
pub(super) struct DpmSolverSinglestep {
    points: Points,
    /// Of each step of the whole schedule: how many evaluations of its group it has, with its own.
    orders: Vec<usize>,
    /// What earlier evaluations predicted, the latest last.
    outputs: Vec<Tensor>,
    /// Where the group began.
    from: Option<Tensor>,
    noise: Option<Box<dyn StepNoise>>,
    solver: DpmSolver,
}

impl Scheduler for DpmSolverSinglestep {
    fn timesteps(&self) -> &[f64] {
        self.points.steps.left()
    }

    fn sigmas(&self) -> &[f32] {
        &self.points.sigmas
    }

    fn step(&mut self, model_output: &Tensor, step: usize, sample: &Tensor) -> Result<Tensor> {
        let (place, _) = self.points.steps.at(step)?;
        let output = self.solver.convert(model_output, self.points.point(place), sample)?;
        self.outputs.drain(..(self.outputs.len() + 1).saturating_sub(self.solver.order));
        self.outputs.push(output);
        // A run that begins within a group has fewer.
        let order = self.orders[place].min(self.outputs.len());
        if order == 1 {
            self.from = Some(sample.to_dtype(DType::F32)?);
        }
        let group = place + 1 - order;
        let (from, to) = (self.points.point(group), self.points.point(place + 1));
        let factors = self.solver.factors(order, from, to);
        // How far each evaluation is from the group's first, over the way of this step.
        let behind = |i: usize| (self.points.point(place - i).lambda - from.lambda) / (to.lambda - from.lambda);
        let latest: Vec<&Tensor> = self.outputs.iter().rev().collect();
        let missing = || Error::checkpoint("scheduler", "where its group began is missing");
        let mut terms = vec![(factors.sample, self.from.as_ref().ok_or_else(missing)?)];
        match (order, latest.as_slice()) {
            (1, [m0, ..]) => terms.push((factors.prediction, *m0)),
            (2, [m0, m1, ..]) => {
                let difference = factors.first / behind(0);
                terms.extend([(difference, *m0), (factors.prediction - difference, *m1)]);
            }
            (3, [m0, m1, m2, ..]) => {
                let (r0, r1) = (behind(0), behind(1));
                // The factors of D1_1 and D1_0: Heun's solver has D1 and D2 as sums of them, the midpoint's has D1_1 alone.
                let [far, near] = if self.solver.heun {
                    [2.0 * factors.second - r1 * factors.first, r0 * factors.first - 2.0 * factors.second].map(|x| x / (r0 - r1))
                } else {
                    [factors.first, 0.0]
                };
                let (far, near) = (far / r0, near / r1);
                terms.extend([(far, *m0), (near, *m1), (factors.prediction - far - near, *m2)]);
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
        SchedulerState { history: self.outputs.iter().chain(&self.from).cloned().collect() }
    }

    fn restore(&mut self, state: SchedulerState, step: usize, like: &Tensor) -> Result<()> {
        let mut history = state.history;
        let expected = step.min(self.solver.order) + usize::from(step > 0);
        if history.len() != expected {
            let reason = format!("has {} tensors of history, DPM-Solver keeps {expected} after {step}", history.len());
            return Err(Error::checkpoint("scheduler", reason));
        }
        let like = like.to_dtype(DType::F32)?;
        history.iter().enumerate().try_for_each(|(i, tensor)| fits(&format!("scheduler.{i}"), tensor, &like))?;
        self.from = history.pop();
        self.outputs = history;
        Ok(())
    }
}
