//! What the multistep solvers (DPM-Solver, UniPC) share: their sigmas and timesteps, and half the logarithm of the signal-to-noise ratio.

use serde_json::{Value, json};

use super::Run;
use super::fields::{Fields, refused};
use super::noise_schedule::{self, Defaults, NoiseSchedule, Spacing, WITH_FLOW, ZeroSnr};
use super::sigmas::{exponential, karras, linspace};
use super::steps::Steps;
use crate::Result;

/// How sigmas are chosen.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Sigmas {
    OfTimesteps,
    Karras,
    Exponential,
    /// Evenly spaced in the logarithm, at rounded timesteps.
    Lu,
    /// Of a flow, with this shift.
    Flow(f64),
}

/// The reference's solvers differ in details.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Solver {
    Dpm,
    /// DPM-Solver of single steps.
    Singlestep,
    UniPc,
}

/// The part of a configuration that all have.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Multistep {
    pub(super) schedule: NoiseSchedule,
    pub(super) sigmas: Sigmas,
    pub(super) ends_at_least: bool,
    /// Timesteps between whole ones are rounded, not cut off.
    rounds: bool,
    solver: Solver,
}

impl Multistep {
    pub(super) fn read(fields: Fields<'_>, solver: Solver) -> Result<Self> {
        noise_schedule::refuse_other_sigmas(fields)?;
        let mut chosen = Vec::new();
        for (name, sigmas) in [
            ("use_karras_sigmas", Sigmas::Karras),
            ("use_exponential_sigmas", Sigmas::Exponential),
            ("use_lu_lambdas", Sigmas::Lu),
            ("use_flow_sigmas", Sigmas::Flow(fields.number("flow_shift", 1.0)?)),
        ] {
            // The others have no such field.
            let known = solver == Solver::Dpm || name != "use_lu_lambdas";
            if known && fields.flag(name, false)? {
                chosen.push((name, sigmas));
            }
        }
        if let [_, (name, _), ..] = chosen.as_slice() {
            return Err(refused(name, &json!(true)));
        }
        let sigmas = chosen.first().map_or(Sigmas::OfTimesteps, |(_, sigmas)| *sigmas);
        if let Sigmas::Flow(shift) = sigmas
            && shift <= 0.0
        {
            return Err(refused("flow_shift", &json!(shift)));
        }
        fields.only("shift_terminal", &Value::Null)?;
        let single = solver == Solver::Singlestep;
        let zero_snr = if single { ZeroSnr::Never } else { ZeroSnr::Little };
        let schedule = NoiseSchedule::read(fields, Defaults::new(Spacing::Linspace, WITH_FLOW, zero_snr))?;
        Ok(Self {
            // It has no other spacing.
            schedule: if single { schedule.evenly_spaced() } else { schedule },
            sigmas,
            ends_at_least: fields.choice("final_sigmas_type", false, &[("zero", false), ("sigma_min", true)])?,
            rounds: solver != Solver::Dpm || !fields.says("beta_schedule", "squaredcos_cap_v2"),
            solver,
        })
    }

    /// The timesteps of a run and the sigmas of the whole schedule, with the one that the last step ends at.
    pub(super) fn start(&self, run: &Run) -> Result<Points> {
        let schedule = &self.schedule;
        let n = schedule.check(run)?;
        let mut last = schedule.least_sigma();
        let (mut timesteps, mut sigmas);
        match self.sigmas {
            Sigmas::OfTimesteps => {
                timesteps = schedule.timesteps_but_the_first(n);
                sigmas = schedule.interpolated(&timesteps);
            }
            Sigmas::Flow(shift) => {
                sigmas = self.of_flow(shift, n);
                let train = schedule.train_timesteps() as f64;
                timesteps = sigmas.iter().map(|sigma| (sigma * train).trunc()).collect();
                if self.solver == Solver::UniPc {
                    last = sigmas[n - 1];
                }
            }
            Sigmas::Karras | Sigmas::Exponential | Sigmas::Lu => {
                let range = schedule.range();
                sigmas = if self.sigmas == Sigmas::Karras { karras(range, n) } else { exponential(range, n) };
                timesteps = schedule.timesteps_of(&sigmas);
                let rounds = self.rounds && self.sigmas != Sigmas::Exponential;
                timesteps.iter_mut().for_each(|t| *t = if rounds { t.round_ties_even() } else { t.trunc() });
                if self.solver == Solver::UniPc {
                    last = sigmas[n - 1];
                }
            }
        }
        sigmas.push(if self.ends_at_least { last } else { 0.0 });
        Ok(Points {
            steps: Steps::new(timesteps, run.begin)?,
            sigmas: sigmas.into_iter().map(|sigma| sigma as f32).collect(),
            flow: matches!(self.sigmas, Sigmas::Flow(_)),
        })
    }

    fn of_flow(&self, shift: f64, n: usize) -> Vec<f64> {
        let shifted = |sigma: f64| shift * sigma / (1.0 + (shift - 1.0) * sigma);
        let even = linspace(1.0, 1.0 / self.schedule.train_timesteps() as f64, n + 1);
        if self.solver != Solver::UniPc {
            return even.into_iter().map(|alpha| shifted(1.0 - alpha)).rev().take(n).collect();
        }
        let mut sigmas: Vec<f64> = even.into_iter().map(shifted).take(n).collect();
        // Where there is noise alone, there would be no ratio.
        const LITTLE: f64 = 1e-6;
        if (sigmas[0] - 1.0).abs() < LITTLE {
            sigmas[0] -= LITTLE;
        }
        sigmas
    }
}

/// Where a run evaluates, and how much noise there is.
#[derive(Clone, Debug)]
pub(super) struct Points {
    pub(super) steps: Steps,
    pub(super) sigmas: Vec<f32>,
    flow: bool,
}

/// How much of picture and noise there is at a place of the schedule.
#[derive(Clone, Copy, Debug)]
pub(super) struct Point {
    pub(super) alpha: f64,
    pub(super) sigma: f64,
    /// `ln(alpha / sigma)`
    pub(super) lambda: f64,
}

impl Points {
    /// At a place of the whole schedule.
    pub(super) fn point(&self, place: usize) -> Point {
        let sigma = self.sigmas.get(place).copied().map_or(0.0, f64::from);
        let alpha = if self.flow { 1.0 - sigma } else { 1.0 / (sigma * sigma + 1.0).sqrt() };
        let sigma = if self.flow { sigma } else { sigma * alpha };
        Point { alpha, sigma, lambda: libm::log(alpha) - libm::log(sigma) }
    }
}
