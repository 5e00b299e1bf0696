//! A run that leaves the end of its schedule to another model's.

use parallel::Tensor;

use super::{Scheduler, SchedulerState};
use crate::{Error, Result};

/// A scheduler whose run ends early: what another model goes on with.
#[derive(Debug)]
pub(crate) struct Until {
    scheduler: Box<dyn Scheduler>,
    end: usize,
}

impl Until {
    /// The first evaluations of a run, those at `cutoff` or before: `[ts for ts in timesteps if ts >= cutoff]`.
    ///
    /// # Errors
    /// [`Error::Invalid`] when there are none, or when no others are left.
    pub(crate) fn new(scheduler: Box<dyn Scheduler>, cutoff: f64) -> Result<Self> {
        let steps = scheduler.timesteps().len();
        let end = scheduler.timesteps().iter().filter(|timestep| **timestep >= cutoff).count();
        // The other model's schedule is its own, but as a rule it is the same one.
        let idle = match end {
            0 => "the base model",
            _ if end == steps => "the refiner",
            _ => return Ok(Self { scheduler, end }),
        };
        Err(Error::Invalid {
            field: "denoising_end",
            reason: format!("it leaves {idle} none of the {steps} steps that are made"),
        })
    }
}

impl Scheduler for Until {
    fn timesteps(&self) -> &[f64] {
        &self.scheduler.timesteps()[..self.end]
    }

    fn planned_steps(&self) -> usize {
        self.scheduler.planned_steps()
    }

    fn init_noise_sigma(&self) -> f64 {
        self.scheduler.init_noise_sigma()
    }

    fn sigmas(&self) -> &[f32] {
        self.scheduler.sigmas()
    }

    fn scale_model_input(&self, sample: &Tensor, step: usize) -> Result<Tensor> {
        self.scheduler.scale_model_input(sample, step)
    }

    fn step(&mut self, model_output: &Tensor, step: usize, sample: &Tensor) -> Result<Tensor> {
        self.scheduler.step(model_output, step, sample)
    }

    fn scale_noise(&self, sample: &Tensor, step: usize, noise: &Tensor) -> Result<Tensor> {
        self.scheduler.scale_noise(sample, step, noise)
    }

    fn checkpoint(&self) -> SchedulerState {
        self.scheduler.checkpoint()
    }

    fn restore(&mut self, state: SchedulerState, step: usize, like: &Tensor) -> Result<()> {
        self.scheduler.restore(state, step, like)
    }
}

#[cfg(test)]
mod tests {
    use parallel::{DType, Device};
    use serde_json::json;

    use super::*;
    use crate::scheduler::{DiffusionConfig, Run};

    /// Euler's run of ten steps of this class: timesteps 901, 801 and so on.
    fn run() -> (DiffusionConfig, Box<dyn Scheduler>) {
        let config = json!({"beta_schedule": "scaled_linear", "timestep_spacing": "leading", "steps_offset": 1});
        let config = DiffusionConfig::new("EulerDiscreteScheduler", &config).unwrap();
        let scheduler = config.start(&Run { num_inference_steps: 10, ..Run::default() }, None).unwrap();
        (config, scheduler)
    }

    #[test]
    fn a_run_ends_where_the_other_model_begins_and_both_make_the_steps_of_one() {
        let (config, mut whole) = run();
        let mut first = Until::new(run().1, config.cutoff(0.8)).unwrap();
        assert_eq!((first.timesteps().len(), first.planned_steps(), first.timesteps()[7]), (8, 10, 201.0));
        let mut rest = config.start(&Run { num_inference_steps: 10, begin: 8, ..Run::default() }, None).unwrap();
        assert_eq!(rest.timesteps(), [101.0, 1.0]);
        let output = |step: usize| Tensor::full(0.1 * step as f32, (1, 2), &Device::Cpu).unwrap();
        let mut expected = Tensor::ones((1, 2), DType::F32, &Device::Cpu).unwrap();
        let mut sample = expected.clone();
        for step in 0..10 {
            expected = whole.step(&output(step), step, &expected).unwrap();
            let own: &mut dyn Scheduler = if step < 8 { &mut first } else { &mut *rest };
            sample = own.step(&output(step), step % 8, &sample).unwrap();
        }
        assert_eq!(sample.to_vec2::<f32>().unwrap(), expected.to_vec2::<f32>().unwrap());
    }

    #[test]
    fn a_cutoff_that_leaves_one_of_both_no_step_is_refused() {
        for (part, idle) in [(0.05, "the base model none"), (0.999, "the refiner none")] {
            let (config, scheduler) = run();
            let error = Until::new(scheduler, config.cutoff(part)).unwrap_err().to_string();
            assert!(error.contains("denoising_end") && error.contains(idle), "{error}");
        }
    }

    #[test]
    fn a_cutoff_is_rounded_as_the_reference_rounds() {
        let (config, _) = run();
        // int(round(1000 - part * 1000)) in Python
        let rounded = [0.8, 0.9995, 0.0005, 0.6, 0.3335].map(|part| config.cutoff(part));
        assert_eq!(rounded, [200.0, 0.0, 1000.0, 400.0, 666.0]);
    }
}
