//! What the diffusion schedulers share: how much of a picture is left at each of the timesteps that the network was trained on, and which
//! of them a run stops at.
//!
//! Follows the constructors and `set_timesteps` of diffusers 0.42.1, with the types in which they compute: betas and their products are float32
//! (the products accumulate in float64), what is interpolated is float64 and rounded in the end.

use serde_json::{Value, json};

use super::fields::{Fields, refused};
use super::sigmas::linspace;
use super::{MAX_INFERENCE_STEPS, Run};
use crate::{Error, Result};

/// Most timesteps that a network is believed to be trained on; the published ones have 1,000.
const MAX_TRAIN_TIMESTEPS: usize = 100_000;
/// 2^-24
const LITTLE: f32 = 1.0 / (1 << 24) as f32;

/// What the network's output is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Prediction {
    /// The noise.
    Epsilon,
    /// The picture.
    Sample,
    /// `alpha noise - sigma picture`.
    V,
    /// The way from the picture to the noise.
    Flow,
}

/// Which of the timesteps a run stops at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Spacing {
    /// From the last to the first.
    Linspace,
    /// Whole multiples of a step, from the first on.
    Leading,
    /// From the last on, down by a step.
    Trailing,
}

/// How schedulers differ in what a file need not say.
#[derive(Clone, Copy, Debug)]
pub(super) struct Defaults {
    pub(super) betas: [f64; 2],
    pub(super) scaled_linear: bool,
    pub(super) spacing: Spacing,
    pub(super) predictions: &'static [(&'static str, Prediction)],
    pub(super) zero_snr: ZeroSnr,
}

/// What `rescale_betas_zero_snr` leaves of a picture at the last timestep.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum ZeroSnr {
    /// Nothing.
    Nothing,
    /// 2^-24, so that there is a sigma.
    Little,
    /// The scheduler has no such field.
    Never,
}

const EPSILON: (&str, Prediction) = ("epsilon", Prediction::Epsilon);
const V: (&str, Prediction) = ("v_prediction", Prediction::V);
const SAMPLE: (&str, Prediction) = ("sample", Prediction::Sample);
/// Of schedulers that know two or three kinds of prediction.
pub(super) const TWO: &[(&str, Prediction)] = &[EPSILON, V];
pub(super) const THREE: &[(&str, Prediction)] = &[EPSILON, V, SAMPLE];
pub(super) const WITH_FLOW: &[(&str, Prediction)] = &[EPSILON, V, SAMPLE, ("flow_prediction", Prediction::Flow)];

impl Defaults {
    /// Those of most schedulers.
    pub(super) const fn new(spacing: Spacing, predictions: &'static [(&'static str, Prediction)], zero_snr: ZeroSnr) -> Self {
        Self { betas: [0.0001, 0.02], scaled_linear: false, spacing, predictions, zero_snr }
    }
}

/// How much of a picture is left at each timestep, and how a run goes through them.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct NoiseSchedule {
    /// `alpha bar`: of the picture's variance.
    alphas_cumprod: Vec<f32>,
    pub(super) prediction: Prediction,
    spacing: Spacing,
    steps_offset: usize,
}

/// Timesteps that a network was trained on.
pub(super) fn train_timesteps(fields: Fields<'_>) -> Result<usize> {
    fields.count("num_train_timesteps", 1000, [2, MAX_TRAIN_TIMESTEPS])
}

impl NoiseSchedule {
    pub(super) fn read(fields: Fields<'_>, defaults: Defaults) -> Result<Self> {
        let n = train_timesteps(fields)?;
        let spacings = [("linspace", Spacing::Linspace), ("leading", Spacing::Leading), ("trailing", Spacing::Trailing)];
        let mut alphas_cumprod = cumprod(&betas(fields, defaults, n)?);
        if defaults.zero_snr != ZeroSnr::Never && fields.flag("rescale_betas_zero_snr", false)? {
            alphas_cumprod = without_picture_at_the_end(&alphas_cumprod);
            if let (ZeroSnr::Little, Some(last)) = (defaults.zero_snr, alphas_cumprod.last_mut()) {
                *last = LITTLE;
            }
        }
        Ok(Self {
            alphas_cumprod,
            prediction: fields.choice("prediction_type", Prediction::Epsilon, defaults.predictions)?,
            spacing: fields.choice("timestep_spacing", defaults.spacing, &spacings)?,
            steps_offset: fields.count("steps_offset", 0, [0, n - 1])?,
        })
    }

    /// The same, whatever the file says of its spacing.
    pub(super) fn evenly_spaced(self) -> Self {
        Self { spacing: Spacing::Linspace, ..self }
    }

    /// Timesteps the network was trained on.
    pub(super) fn train_timesteps(&self) -> usize {
        self.alphas_cumprod.len()
    }

    /// `alpha bar` at a timestep; beyond the last, or before the first, that of the last or of the first.
    pub(super) fn alpha_cumprod(&self, timestep: f64) -> f64 {
        let at = (timestep.max(0.0) as usize).min(self.alphas_cumprod.len() - 1);
        f64::from(self.alphas_cumprod[at])
    }

    /// Noise over picture at each timestep, the least first.
    fn sigmas(&self) -> Vec<f64> {
        self.alphas_cumprod.iter().map(|a| f64::from(((1.0 - a) / a).sqrt())).collect()
    }

    /// At the first timestep.
    pub(super) fn least_sigma(&self) -> f64 {
        self.sigmas()[0]
    }

    /// Whether a run's first noise is scaled by its first sigma alone.
    pub(super) fn begins_at_the_end(&self) -> bool {
        self.spacing != Spacing::Leading
    }

    /// Checks the number of steps, and gives it.
    pub(super) fn check(&self, run: &Run) -> Result<usize> {
        let (n, most) = (run.num_inference_steps, MAX_INFERENCE_STEPS.min(self.train_timesteps() - 1));
        if (1..=most).contains(&n) {
            return Ok(n);
        }
        Err(Error::Invalid { field: "num_inference_steps", reason: format!("{n} is not between 1 and {most}") })
    }

    /// `n` timesteps, the last first. Evenly spaced ones are rounded if they are to be `whole`.
    pub(super) fn timesteps(&self, n: usize, whole: bool) -> Vec<f64> {
        let train = self.train_timesteps() as f64;
        let mut timesteps: Vec<f64> = match self.spacing {
            Spacing::Linspace => {
                let even = linspace(0.0, train - 1.0, n).into_iter();
                if whole { even.map(f64::round_ties_even).collect() } else { even.map(|t| f64::from(t as f32)).collect() }
            }
            Spacing::Leading => {
                let ratio = self.train_timesteps() / n;
                (0..n).map(|i| (i * ratio + self.steps_offset) as f64).collect()
            }
            Spacing::Trailing => {
                let down = |i: usize| (train - i as f64 * (train / n as f64)).round_ties_even() - 1.0;
                (0..n).rev().map(down).collect()
            }
        };
        timesteps.reverse();
        timesteps
    }

    /// As [`Self::timesteps`], of schedulers that leave out the first of `n + 1`.
    pub(super) fn timesteps_but_the_first(&self, n: usize) -> Vec<f64> {
        if self.spacing == Spacing::Trailing {
            return self.timesteps(n, true);
        }
        let mut timesteps = self.timesteps(n + 1, true);
        timesteps.truncate(n);
        timesteps
    }

    /// The sigma of each timestep, between those of its neighbours.
    pub(super) fn interpolated(&self, timesteps: &[f64]) -> Vec<f64> {
        let sigmas = self.sigmas();
        let at = |t: &f64| {
            let t = t.clamp(0.0, (sigmas.len() - 1) as f64);
            let low = (t as usize).min(sigmas.len() - 2);
            (sigmas[low + 1] - sigmas[low]) * (t - low as f64) + sigmas[low]
        };
        timesteps.iter().map(at).collect()
    }

    /// Largest and least sigma of all timesteps.
    pub(super) fn range(&self) -> [f64; 2] {
        let sigmas = self.sigmas();
        [sigmas[sigmas.len() - 1], sigmas[0]]
    }

    /// `_sigma_to_t`: the timestep of each sigma, between its neighbours by the logarithm.
    pub(super) fn timesteps_of(&self, sigmas: &[f64]) -> Vec<f64> {
        let logs: Vec<f64> = self.sigmas().into_iter().map(|sigma| f64::from(libm::logf(sigma as f32))).collect();
        let of = |sigma: &f64| {
            let log = libm::log(sigma.max(1e-10));
            let low = logs.partition_point(|other| *other <= log).saturating_sub(1).min(logs.len() - 2);
            let w = ((logs[low] - log) / (logs[low] - logs[low + 1])).clamp(0.0, 1.0);
            (1.0 - w) * low as f64 + w * (low + 1) as f64
        };
        sigmas.iter().map(of).collect()
    }
}

fn betas(fields: Fields<'_>, defaults: Defaults, n: usize) -> Result<Vec<f32>> {
    if let Some(trained) = fields.numbers("trained_betas")? {
        if trained.len() != n || !trained.iter().all(|beta| (0.0..1.0).contains(beta)) {
            return Err(refused("trained_betas", &json!(trained)));
        }
        return Ok(trained.into_iter().map(|beta| beta as f32).collect());
    }
    let [start, end] = defaults.betas;
    let (start, end) = (fields.number("beta_start", start)?, fields.number("beta_end", end)?);
    for (name, beta) in [("beta_start", start), ("beta_end", end)] {
        if !(0.0..1.0).contains(&beta) {
            return Err(refused(name, &json!(beta)));
        }
    }
    let usual = if defaults.scaled_linear { "scaled_linear" } else { "linear" };
    let words = [("linear", "linear"), ("scaled_linear", "scaled_linear"), ("squaredcos_cap_v2", "squaredcos_cap_v2")];
    Ok(match fields.choice("beta_schedule", usual, &words)? {
        "linear" => linspace_f32(start, end, n),
        "scaled_linear" => linspace_f32(start.sqrt(), end.sqrt(), n).into_iter().map(|root| root * root).collect(),
        _ => {
            let root = |t: f64| libm::cos((t + 0.008) / 1.008 * std::f64::consts::FRAC_PI_2);
            let left = |t: f64| root(t) * root(t);
            let at = |i: usize| left(i as f64 / n as f64);
            (0..n).map(|i| (1.0 - at(i + 1) / at(i)).min(0.999) as f32).collect()
        }
    })
}

/// torch's `linspace` in float32: from both ends to the middle, each rounded once.
fn linspace_f32(start: f64, end: f64, n: usize) -> Vec<f32> {
    let (start, end) = (start as f32, end as f32);
    let step = (end - start) / (n - 1) as f32;
    let from = |end: f32, step: f32, i: usize| step.mul_add(i as f32, end);
    let at = |i: usize| if i < n / 2 { from(start, step, i) } else { from(end, -step, n - 1 - i) };
    (0..n).map(at).collect()
}

fn cumprod(betas: &[f32]) -> Vec<f32> {
    let mut product = 1.0;
    let next = |beta: &f32| {
        product *= f64::from(1.0 - beta);
        product as f32
    };
    betas.iter().map(next).collect()
}

/// `rescale_zero_terminal_snr` (S. Lin et al., <https://arxiv.org/abs/2305.08891>, algorithm 1).
fn without_picture_at_the_end(alphas_cumprod: &[f32]) -> Vec<f32> {
    let roots: Vec<f32> = alphas_cumprod.iter().map(|a| a.sqrt()).collect();
    let (first, last) = (roots[0], roots[roots.len() - 1]);
    let scale = first / (first - last);
    let bars: Vec<f32> = roots.iter().map(|root| (root - last) * scale).map(|root| root * root).collect();
    let alphas = std::iter::once(bars[0]).chain(bars.windows(2).map(|two| two[1] / two[0]));
    cumprod(&alphas.map(|alpha| 1.0 - alpha).collect::<Vec<_>>())
}

/// Refuses ways to choose sigmas that are not here.
pub(super) fn refuse_other_sigmas(fields: Fields<'_>) -> Result<()> {
    ["use_beta_sigmas", "use_dynamic_shifting"].into_iter().try_for_each(|name| fields.only(name, &Value::Bool(false)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_between_two_are_torchs_to_the_bit() {
        // torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float32)
        let all = linspace_f32(0.00085f64.sqrt(), 0.012f64.sqrt(), 1000);
        let expected = [
            (1, 0x3cef_7eb8u32),
            (7, 0x3cf3_7345),
            (333, 0x3d65_2d3c),
            (499, 0x3d8d_f216),
            (500, 0x3d8e_1c46),
            (501, 0x3d8e_4677),
            (777, 0x3dbb_c2c9),
            (998, 0x3de0_2eae),
        ];
        for (at, bits) in expected {
            assert_eq!(all[at].to_bits(), bits, "{at}: {}", all[at]);
        }
    }
}
