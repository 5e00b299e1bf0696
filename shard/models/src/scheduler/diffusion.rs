//! The diffusion schedulers by their configurations: which class a file is of, and a job's scheduler from it.

use serde_json::Value;

use super::fields::Fields;
use super::{Scheduler, StepNoise, ddim, ddpm, dpm_solver_multistep, euler, heun, lcm, pndm, unipc_multistep};
use crate::model_dir::ModelDir;
use crate::{Error, Result};

/// A `scheduler_config.json` of one of these classes, checked.
#[derive(Clone, Debug, PartialEq)]
pub struct DiffusionConfig(Kind);

#[derive(Clone, Debug, PartialEq)]
enum Kind {
    Ddim(ddim::Config),
    Ddpm(ddpm::Config),
    DpmSolverMultistep(dpm_solver_multistep::Config),
    Euler(euler::Config),
    EulerAncestral(euler::Config),
    Heun(heun::Config),
    Lcm(lcm::Config),
    Pndm(pndm::Config),
    UniPcMultistep(unipc_multistep::Config),
}

/// diffusers' arguments of `set_timesteps` and `step`.
#[derive(Clone, Debug, Default)]
pub struct Run {
    /// How many steps.
    pub num_inference_steps: usize,
    /// Evaluations of the whole schedule that are left out at its beginning; those of the run count from there.
    pub begin: usize,
    /// How much noise DDIM's steps add.
    pub eta: f64,
    /// How many steps a latent consistency model was distilled for; its own where there is none.
    pub original_inference_steps: Option<usize>,
    /// The part of those steps that a run of it is spread over; all where there is none.
    pub original_strength: Option<f64>,
}

impl DiffusionConfig {
    /// Of a model's directory.
    ///
    /// # Errors
    /// [`Error::Unsupported`] with the class or the field that is not known here.
    pub fn of(dir: &ModelDir) -> Result<Self> {
        let (class, config) = dir.scheduler_file()?;
        Self::new(&class, &config)
    }

    /// Of a class, by its name.
    ///
    /// # Errors
    /// As [`Self::of`].
    pub fn new(class: &str, config: &Value) -> Result<Self> {
        let fields = Fields(config);
        Ok(Self(match class {
            "DDIMScheduler" => Kind::Ddim(ddim::Config::read(fields)?),
            "DDPMScheduler" => Kind::Ddpm(ddpm::Config::read(fields)?),
            "DPMSolverMultistepScheduler" => Kind::DpmSolverMultistep(dpm_solver_multistep::Config::read(fields)?),
            "EulerDiscreteScheduler" => Kind::Euler(euler::Config::read(fields)?),
            "EulerAncestralDiscreteScheduler" => Kind::EulerAncestral(euler::Config::read_ancestral(fields)?),
            "HeunDiscreteScheduler" => Kind::Heun(heun::Config::read(fields)?),
            "LCMScheduler" => Kind::Lcm(lcm::Config::read(fields)?),
            "PNDMScheduler" => Kind::Pndm(pndm::Config::read(fields)?),
            "UniPCMultistepScheduler" => Kind::UniPcMultistep(unipc_multistep::Config::read(fields)?),
            other => return Err(Error::Unsupported { field: "scheduler (model_index.json)".into(), value: other.into() }),
        }))
    }

    /// The reference's class.
    pub fn class(&self) -> &'static str {
        match &self.0 {
            Kind::Ddim(_) => "DDIMScheduler",
            Kind::Ddpm(_) => "DDPMScheduler",
            Kind::DpmSolverMultistep(_) => "DPMSolverMultistepScheduler",
            Kind::Euler(_) => "EulerDiscreteScheduler",
            Kind::EulerAncestral(_) => "EulerAncestralDiscreteScheduler",
            Kind::Heun(_) => "HeunDiscreteScheduler",
            Kind::Lcm(_) => "LCMScheduler",
            Kind::Pndm(_) => "PNDMScheduler",
            Kind::UniPcMultistep(_) => "UniPCMultistepScheduler",
        }
    }

    /// Least number of steps.
    pub fn least_steps(&self) -> usize {
        1
    }

    /// Evaluations of a step, as `scheduler.order`.
    pub fn order(&self) -> usize {
        if matches!(self.0, Kind::Heun(_)) { 2 } else { 1 }
    }

    /// Whether a step takes `eta`.
    pub fn takes_eta(&self) -> bool {
        matches!(self.0, Kind::Ddim(_))
    }

    /// A job's scheduler: diffusers' `set_timesteps` and `set_begin_index`.
    ///
    /// # Errors
    /// [`Error::Invalid`] when there are no such steps, or none is left; or when steps need noise and there is no source of it.
    pub fn start(&self, run: &Run, noise: Option<Box<dyn StepNoise>>) -> Result<Box<dyn Scheduler>> {
        Ok(match &self.0 {
            Kind::Ddim(config) => Box::new(config.start(run, noise)?),
            Kind::Ddpm(config) => Box::new(config.start(run, noise)?),
            Kind::DpmSolverMultistep(config) => Box::new(config.start(run, noise)?),
            Kind::Euler(config) | Kind::EulerAncestral(config) => Box::new(config.start(run, noise)?),
            Kind::Heun(config) => Box::new(config.start(run)?),
            Kind::Lcm(config) => Box::new(config.start(run, noise)?),
            Kind::Pndm(config) => Box::new(config.start(run)?),
            Kind::UniPcMultistep(config) => Box::new(config.start(run)?),
        })
    }
}
