//! What the flow schedulers share: sigmas computed with the roundings of the reference; and the ways to space them that all have.
//!
//! The reference computes sigmas it was given in float32 (numpy keeps the array's type) and its own in float64, and turns
//! both into float32 at the end. [`Precision`] follows it, so the recorded sigmas come out bit for bit.

use super::{MAX_INFERENCE_STEPS, Schedule};
use crate::{Error, Result};

/// The exponent of [`karras`].
const RHO: f64 = 7.0;

/// In which type the reference holds the sigmas while it shifts them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Precision {
    /// Sigmas given by the caller.
    F32,
    /// The scheduler's own.
    F64,
}

impl Precision {
    /// The nearest number of this type.
    pub(super) fn round(self, x: f64) -> f64 {
        match self {
            // Each operation on two f32 numbers, done in f64 and rounded once, gives the bits of the f32 operation.
            Precision::F32 => f64::from(x as f32),
            Precision::F64 => x,
        }
    }

    /// `shift * s / (1 + (shift - 1) * s)`.
    pub(super) fn shift(self, shift: f64, s: f64) -> f64 {
        let round = |x| self.round(x);
        let numerator = round(round(shift) * s);
        let denominator = round(1.0 + round(round(shift - 1.0) * s));
        round(numerator / denominator)
    }

    /// `e / (e + (1 / s - 1))`: with `e = exp(mu)` or `mu`, the shift that depends on the picture's size.
    pub(super) fn time_shift(self, e: f64, s: f64) -> f64 {
        let round = |x| self.round(x);
        let odds = round(round(1.0 / s) - 1.0);
        round(round(e) / round(round(e) + odds))
    }

    /// Stretches `sigmas` so that the last becomes `terminal`.
    pub(super) fn stretch_to_terminal(self, sigmas: &mut [f64], terminal: f64) {
        let round = |x| self.round(x);
        let Some(last) = sigmas.last() else { return };
        let scale = round(round(1.0 - last) / round(1.0 - terminal));
        for s in sigmas {
            *s = round(1.0 - round(round(1.0 - *s) / scale));
        }
    }
}

/// `sigma_max` and `sigma_min` as the constructors leave them: the first and the last of `num_train_timesteps`, shifted.
pub(super) fn sigma_range(num_train_timesteps: usize, shift: f64) -> (f64, f64) {
    let n = f64::from(num_train_timesteps as f32);
    let at = |t: f64| Precision::F32.shift(shift, Precision::F32.round(t / n));
    (at(n), at(1.0))
}

/// `n` numbers from `start` to `stop`, as numpy's `linspace` makes them.
pub(super) fn linspace(start: f64, stop: f64, n: usize) -> Vec<f64> {
    let step = (stop - start) / (n.max(2) - 1) as f64;
    let mut values: Vec<f64> = (0..n).map(|i| i as f64 * step + start).collect();
    if n > 1 {
        values[n - 1] = stop;
    }
    values
}

/// `_convert_to_karras` (T. Karras et al., <https://arxiv.org/abs/2206.00364>): `n` sigmas from the largest to the least.
pub(super) fn karras([largest, least]: [f64; 2], n: usize) -> Vec<f64> {
    let [from, to] = [largest, least].map(|sigma| libm::pow(sigma, 1.0 / RHO));
    linspace(0.0, 1.0, n).into_iter().map(|ramp| libm::pow(from + ramp * (to - from), RHO)).collect()
}

/// `_convert_to_exponential`: evenly spaced in the logarithm. With an exponent of 1 `_convert_to_lu` does the same.
pub(super) fn exponential([largest, least]: [f64; 2], n: usize) -> Vec<f64> {
    linspace(libm::log(largest), libm::log(least), n).into_iter().map(libm::exp).collect()
}

/// The scheduler's own sigmas, before `set_timesteps` shifts them (a second time: the range is shifted already).
pub(super) fn own_sigmas(num_train_timesteps: usize, (max, min): (f64, f64), steps: usize) -> Vec<f64> {
    let n = num_train_timesteps as f64;
    linspace(max * n, min * n, steps).into_iter().map(|t| t / n).collect()
}

/// The checks every flow scheduler makes on what it is given.
pub(super) fn check_schedule(schedule: &Schedule) -> Result<()> {
    let steps = schedule.num_inference_steps;
    if !(1..=MAX_INFERENCE_STEPS).contains(&steps) {
        let reason = format!("{steps} is not between 1 and {MAX_INFERENCE_STEPS}");
        return Err(Error::Invalid { field: "num_inference_steps", reason });
    }
    if let Some(sigmas) = &schedule.sigmas {
        if sigmas.len() != steps {
            return Err(Error::Invalid { field: "sigmas", reason: format!("{} for {steps} steps", sigmas.len()) });
        }
        if !sigmas.iter().all(|s| s.is_finite()) {
            return Err(Error::Invalid { field: "sigmas", reason: "they are not all finite".into() });
        }
    }
    if schedule.mu.is_some_and(|mu| !mu.is_finite()) {
        return Err(Error::Invalid { field: "mu", reason: "it is not finite".into() });
    }
    Ok(())
}

/// The checks every flow scheduler makes on its configuration.
pub(super) fn check_config(num_train_timesteps: usize, shift: f64) -> Result<()> {
    if num_train_timesteps == 0 {
        return Err(Error::Unsupported { field: "num_train_timesteps".into(), value: "0".into() });
    }
    if !(shift.is_finite() && shift > 0.0) {
        return Err(Error::Unsupported { field: "shift".into(), value: shift.to_string() });
    }
    Ok(())
}
