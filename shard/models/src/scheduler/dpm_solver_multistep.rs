//! DPM-Solver and DPM-Solver++ (C. Lu et al., <https://arxiv.org/abs/2211.01095>), of one to three steps.
//!
//! Follows diffusers 0.42.1 `schedulers/scheduling_dpmsolver_multistep.py`.

use parallel::Tensor;

use super::dpm_solver::DpmSolver;
use super::fields::Fields;
use super::multistep::{Point, Points, Solver};
use super::steps::sum;
use super::{Run, Scheduler, SchedulerState, StepNoise, no_noise};
use crate::checkpoint::fits;
use crate::{Error, Result};

/// Schedules of fewer steps end in steps of a lower order.
const FEW: usize = 15;

/// `scheduler_config.json` of a `DPMSolverMultistepScheduler`.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Config {
    solver: DpmSolver,
    euler_at_final: bool,
}

impl Config {
    pub(super) fn read(fields: Fields<'_>) -> Result<Self> {
        Ok(Self { solver: DpmSolver::read(fields, Solver::Dpm)?, euler_at_final: fields.flag("euler_at_final", false)? })
    }

    pub(super) fn draws(&self) -> bool {
        self.solver.draws()
    }

    pub(super) fn start(&self, run: &Run, noise: Option<Box<dyn StepNoise>>) -> Result<DpmSolverMultistep> {
        let noise = if self.draws() { Some(noise.ok_or_else(no_noise)?) } else { None };
        Ok(DpmSolverMultistep { points: self.solver.multistep.start(run)?, outputs: Vec::new(), noise, config: self.clone() })
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

impl DpmSolverMultistep {
    /// The order of the step at a place, the `step`-th of the run.
    fn order(&self, place: usize, step: usize) -> usize {
        let Config { solver, euler_at_final } = &self.config;
        let (all, few) = (self.points.steps.all(), self.points.steps.all() < FEW && solver.lower_order_final);
        if place + 1 == all && (*euler_at_final || few || !solver.multistep.ends_at_least) {
            return 1;
        }
        let most = if place + 2 == all && few { 2 } else { 3 };
        solver.order.min(most).min(step + 1)
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
        let solver = &self.config.solver;
        let output = solver.convert(model_output, self.points.point(place), sample)?;
        self.outputs.drain(..(self.outputs.len() + 1).saturating_sub(solver.order));
        self.outputs.push(output);
        let order = self.order(place, step);
        let (from, to) = (self.points.point(place), self.points.point(place + 1));
        let factors = solver.factors(order, from, to);
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
        let (found, expected) = (state.history.len(), step.min(self.config.solver.order));
        if found != expected {
            let reason = format!("has {found} tensors of history, DPM-Solver keeps {expected} after {step}");
            return Err(Error::checkpoint("scheduler", reason));
        }
        state.history.iter().enumerate().try_for_each(|(i, tensor)| fits(&format!("scheduler.{i}"), tensor, like))?;
        self.outputs = state.history;
        Ok(())
    }
}
