//! Euler steps along a rectified flow: the scheduler of FLUX, Stable Diffusion 3 and Qwen-Image.
//!
//! Papers: <https://arxiv.org/abs/2209.03003>, <https://arxiv.org/abs/2403.03206>. Follows diffusers 0.42.1
//! `schedulers/scheduling_flow_match_euler_discrete.py`. Not here: `use_beta_sigmas`, `invert_sigmas`, timesteps per token.

use parallel::{DType, Tensor};
use serde::Deserialize;

use super::sigmas::{self, Precision};
use super::{Schedule, Scheduler, SchedulerState, StepNoise, calculate_shift, flow_scale_noise, scaled, sigma_pair};
use crate::model_dir::ModelDir;
use crate::{Error, Result};

/// `scheduler_config.json` of `FlowMatchEulerDiscreteScheduler`.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(default)]
pub struct FlowMatchEulerDiscreteConfig {
    /// Timesteps run from this down to 0.
    pub num_train_timesteps: usize,
    /// The fixed shift of the sigmas.
    pub shift: f64,
    /// Whether the shift depends on the picture's size (`mu`) instead.
    pub use_dynamic_shifting: bool,
    /// `mu` at `base_image_seq_len` tokens.
    pub base_shift: f64,
    /// `mu` at `max_image_seq_len` tokens.
    pub max_shift: f64,
    /// See `base_shift`.
    pub base_image_seq_len: usize,
    /// See `max_shift`.
    pub max_image_seq_len: usize,
    /// Not supported.
    pub invert_sigmas: bool,
    /// What the last sigma is stretched to.
    pub shift_terminal: Option<f64>,
    /// Respaces the sigmas as Karras et al.
    pub use_karras_sigmas: bool,
    /// Respaces the sigmas evenly in their logarithm.
    pub use_exponential_sigmas: bool,
    /// Not supported.
    pub use_beta_sigmas: bool,
    /// `exponential` or `linear`: how `mu` shifts.
    pub time_shift_type: String,
    /// Draws fresh noise at every step; only through [`FlowMatchEulerDiscrete::stochastic`].
    pub stochastic_sampling: bool,
}

impl Default for FlowMatchEulerDiscreteConfig {
    fn default() -> Self {
        Self {
            num_train_timesteps: 1000,
            shift: 1.0,
            use_dynamic_shifting: false,
            base_shift: 0.5,
            max_shift: 1.15,
            base_image_seq_len: 256,
            max_image_seq_len: 4096,
            invert_sigmas: false,
            shift_terminal: None,
            use_karras_sigmas: false,
            use_exponential_sigmas: false,
            use_beta_sigmas: false,
            time_shift_type: "exponential".into(),
            stochastic_sampling: false,
        }
    }
}

impl FlowMatchEulerDiscreteConfig {
    /// The scheduler's class.
    pub const CLASS: &str = "FlowMatchEulerDiscreteScheduler";

    /// The scheduler of a model whose jobs step by it, without noise of their own.
    ///
    /// # Errors
    /// [`Error::Unsupported`] when it is another, or asks for what is not here.
    pub fn of(dir: &ModelDir) -> Result<Self> {
        let config: Self = dir.scheduler_config(Self::CLASS)?;
        config.check_for_steps()?;
        Ok(config)
    }

    /// The least steps that make a schedule. One step's sigma is 1 and cannot be stretched to any other.
    pub fn least_steps(&self) -> usize {
        if self.terminal().is_some() { 2 } else { 1 }
    }

    /// What the last sigma is stretched to. As in the reference, 0 means nothing.
    fn terminal(&self) -> Option<f64> {
        self.shift_terminal.filter(|terminal| *terminal != 0.0)
    }

    /// Refuses what is not here, and noise at every step.
    fn check_for_steps(&self) -> Result<()> {
        if self.stochastic_sampling {
            return Err(Error::Unsupported { field: "stochastic_sampling".into(), value: "true".into() });
        }
        self.check()
    }

    /// `mu` for a picture of `image_seq_len` tokens, by this configuration's own two points.
    pub fn mu(&self, image_seq_len: usize) -> f64 {
        calculate_shift(image_seq_len, self.base_image_seq_len, self.max_image_seq_len, self.base_shift, self.max_shift)
    }

    fn check(&self) -> Result<()> {
        sigmas::check_config(self.num_train_timesteps, self.shift)?;
        let unsupported =
            |field: &str, value: &dyn ToString| Err(Error::Unsupported { field: field.to_owned(), value: value.to_string() });
        if self.invert_sigmas {
            return unsupported("invert_sigmas", &true);
        }
        if self.use_beta_sigmas {
            return unsupported("use_beta_sigmas", &true);
        }
        if self.use_karras_sigmas && self.use_exponential_sigmas {
            return unsupported("use_karras_sigmas", &"true beside use_exponential_sigmas");
        }
        if !matches!(self.time_shift_type.as_str(), "exponential" | "linear") {
            return unsupported("time_shift_type", &self.time_shift_type);
        }
        Ok(())
    }
}

/// The scheduler of one job.
#[derive(Debug)]
pub struct FlowMatchEulerDiscrete {
    /// Of the whole schedule, like the sigmas; `begin` says where this run starts.
    timesteps: Vec<f64>,
    /// One more than timesteps: the last is 0.
    sigmas: Vec<f32>,
    begin: usize,
    noise: Option<Box<dyn StepNoise>>,
}

impl FlowMatchEulerDiscrete {
    /// diffusers' constructor and `set_timesteps`.
    ///
    /// # Errors
    /// When the configuration asks for what is not here (among it `stochastic_sampling`), or `schedule` does not fit it.
    pub fn new(config: &FlowMatchEulerDiscreteConfig, schedule: &Schedule) -> Result<Self> {
        config.check_for_steps()?;
        Self::build(config, schedule, None)
    }

    /// As [`Self::new`] for a configuration with `stochastic_sampling`: each step draws from `noise`.
    pub fn stochastic(config: &FlowMatchEulerDiscreteConfig, schedule: &Schedule, noise: Box<dyn StepNoise>) -> Result<Self> {
        Self::build(config, schedule, Some(noise))
    }

    fn build(config: &FlowMatchEulerDiscreteConfig, schedule: &Schedule, noise: Option<Box<dyn StepNoise>>) -> Result<Self> {
        config.check()?;
        let mut sigmas: Vec<f32> = sigmas_of(config, schedule)?.into_iter().map(|s| s as f32).collect();
        if !sigmas.iter().all(|sigma| sigma.is_finite()) {
            let reason = format!("{} give sigmas that are no numbers", schedule.num_inference_steps);
            return Err(Error::Invalid { field: "num_inference_steps", reason });
        }
        let n = config.num_train_timesteps as f32;
        let timesteps = sigmas.iter().map(|s| f64::from(s * n)).collect();
        sigmas.push(0.0);
        Ok(Self { timesteps, sigmas, begin: 0, noise })
    }

    /// Starts at step `start` (diffusers' `set_begin_index`): steps count from there, and [`Scheduler::timesteps`] has the
    /// rest.
    pub fn with_begin(mut self, start: usize) -> Result<Self> {
        let all = self.sigmas.len() - 1;
        if start >= all {
            return Err(Error::Invalid { field: "strength", reason: format!("no step is left of {all} after skipping {start}") });
        }
        self.begin = start;
        Ok(self)
    }

    /// All sigmas of the schedule, with the final 0.
    pub fn sigmas(&self) -> &[f32] {
        &self.sigmas
    }
}

impl Scheduler for FlowMatchEulerDiscrete {
    fn timesteps(&self) -> &[f64] {
        &self.timesteps[self.begin..]
    }

    fn step(&mut self, model_output: &Tensor, step: usize, sample: &Tensor) -> Result<Tensor> {
        let (sigma, next) = sigma_pair(&self.sigmas, self.begin, step)?;
        // Upcast, or the small differences between steps are lost.
        let sample = sample.to_dtype(DType::F32)?;
        let previous = match &mut self.noise {
            None => (sample + scaled(model_output, next - sigma)?)?,
            Some(noise) => {
                let noise = noise.draw(step, sample.dims())?;
                let x0 = (sample - scaled(model_output, sigma)?)?;
                ((x0 * f64::from(1.0 - next))? + (noise * f64::from(next))?)?
            }
        };
        Ok(previous.to_dtype(model_output.dtype())?)
    }

    fn scale_noise(&self, sample: &Tensor, step: usize, noise: &Tensor) -> Result<Tensor> {
        let (sigma, _) = sigma_pair(&self.sigmas, self.begin, step)?;
        flow_scale_noise(sample, sigma, noise)
    }

    fn checkpoint(&self) -> SchedulerState {
        SchedulerState::default()
    }
}

/// `set_timesteps` up to the conversion to tensors.
fn sigmas_of(config: &FlowMatchEulerDiscreteConfig, schedule: &Schedule) -> Result<Vec<f64>> {
    sigmas::check_schedule(schedule)?;
    let steps = schedule.num_inference_steps;
    let (precision, mut sigmas) = match &schedule.sigmas {
        Some(given) => (Precision::F32, given.iter().map(|s| Precision::F32.round(*s)).collect()),
        None => {
            // With dynamic shifting the constructor leaves the range as it is.
            let shift = if config.use_dynamic_shifting { 1.0 } else { config.shift };
            let range = sigmas::sigma_range(config.num_train_timesteps, shift);
            (Precision::F64, sigmas::own_sigmas(config.num_train_timesteps, range, steps))
        }
    };
    if config.use_dynamic_shifting {
        let needed = || Error::Invalid { field: "mu", reason: "it is needed with use_dynamic_shifting".into() };
        let mu = schedule.mu.ok_or_else(needed)?;
        let e = if config.time_shift_type == "linear" { mu } else { libm::exp(mu) };
        sigmas.iter_mut().for_each(|s| *s = precision.time_shift(e, *s));
    } else {
        sigmas.iter_mut().for_each(|s| *s = precision.shift(config.shift, *s));
    }
    if let Some(terminal) = config.terminal() {
        precision.stretch_to_terminal(&mut sigmas, terminal);
    }
    let (Some(&max), Some(&min)) = (sigmas.first(), sigmas.last()) else { return Ok(sigmas) };
    if config.use_karras_sigmas {
        sigmas = sigmas::karras([max, min], steps);
    } else if config.use_exponential_sigmas {
        sigmas = sigmas::exponential([max, min], steps);
    }
    Ok(sigmas)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn schedule(steps: usize) -> Schedule {
        Schedule { num_inference_steps: steps, ..Schedule::default() }
    }

    #[test]
    fn a_published_configuration_of_what_is_not_here_is_refused_by_name() {
        for text in [
            r#"{"use_beta_sigmas": true}"#,
            r#"{"invert_sigmas": true}"#,
            r#"{"stochastic_sampling": true}"#,
            r#"{"time_shift_type": "cubic"}"#,
            r#"{"num_train_timesteps": 0}"#,
            r#"{"shift": 0.0}"#,
        ] {
            let config: FlowMatchEulerDiscreteConfig = serde_json::from_str(text).unwrap();
            let error = FlowMatchEulerDiscrete::new(&config, &schedule(4)).unwrap_err();
            let Error::Unsupported { field, .. } = error else { panic!("{text}: {error}") };
            assert!(text.contains(&field), "{text}: {field}");
        }
    }

    #[test]
    fn one_step_cannot_be_stretched_to_a_terminal_sigma_and_is_refused_by_its_field() {
        let stretched = FlowMatchEulerDiscreteConfig { shift_terminal: Some(0.02), ..Default::default() };
        let plain = FlowMatchEulerDiscreteConfig { shift_terminal: Some(0.0), ..Default::default() };
        for schedule in [schedule(1), Schedule::evenly_spaced(1, None)] {
            let error = FlowMatchEulerDiscrete::new(&stretched, &schedule).unwrap_err();
            assert!(matches!(error, Error::Invalid { field: "num_inference_steps", .. }), "{error}");
            FlowMatchEulerDiscrete::new(&plain, &schedule).unwrap();
        }
        assert_eq!((stretched.least_steps(), plain.least_steps()), (2, 1));
        let sigmas = FlowMatchEulerDiscrete::new(&stretched, &Schedule::evenly_spaced(2, None)).unwrap().sigmas().to_vec();
        assert!(sigmas.iter().all(|sigma| sigma.is_finite()) && (sigmas[1] - 0.02).abs() < 1e-6, "{sigmas:?}");
    }

    #[test]
    fn a_run_that_begins_later_has_the_rest_of_the_timesteps() {
        let config = FlowMatchEulerDiscreteConfig { shift: 3.0, ..Default::default() };
        let make = || FlowMatchEulerDiscrete::new(&config, &schedule(10)).unwrap();
        let all = make().timesteps().to_vec();
        assert_eq!(make().with_begin(4).unwrap().timesteps(), &all[4..]);
        assert!(make().with_begin(10).is_err());
    }

    #[test]
    fn a_step_past_the_end_is_an_error() {
        let mut scheduler = FlowMatchEulerDiscrete::new(&Default::default(), &schedule(2)).unwrap();
        let x = Tensor::new(&[1f32], &parallel::Device::Cpu).unwrap();
        assert!(scheduler.step(&x, 1, &x).is_ok());
        assert!(scheduler.step(&x, 2, &x).is_err());
        assert!(scheduler.step(&x, usize::MAX, &x).is_err());
    }

    #[test]
    fn impossible_schedules_are_refused() {
        let config = FlowMatchEulerDiscreteConfig::default();
        let dynamic = FlowMatchEulerDiscreteConfig { use_dynamic_shifting: true, ..Default::default() };
        for (config, schedule) in [
            (&config, schedule(0)),
            (&config, schedule(usize::MAX)),
            (&config, Schedule { sigmas: Some(vec![1.0]), ..schedule(2) }),
            (&config, Schedule { sigmas: Some(vec![f64::NAN]), ..schedule(1) }),
            (&dynamic, schedule(2)),
            (&dynamic, Schedule { mu: Some(f64::INFINITY), ..schedule(2) }),
        ] {
            assert!(matches!(FlowMatchEulerDiscrete::new(config, &schedule), Err(Error::Invalid { .. })), "{schedule:?}");
        }
    }
}
