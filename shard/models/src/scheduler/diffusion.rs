//! The diffusion schedulers by their configurations: which class a file is of, and a job's scheduler from it.

use parallel::Tensor;
use serde_json::Value;

use super::fields::Fields;
use super::{
    Scheduler, StepNoise, ddim, ddpm, dpm_solver_multistep, dpm_solver_singlestep, euler, heun, k_dpm_2, lcm, noise_schedule,
    pndm, tcd, unipc_multistep,
};
use crate::model_dir::ModelDir;
use crate::{Error, Result};

/// A `scheduler_config.json` of one of these classes, checked.
#[derive(Clone, Debug, PartialEq)]
pub struct DiffusionConfig {
    kind: Kind,
    train_timesteps: usize,
}

#[derive(Clone, Debug, PartialEq)]
enum Kind {
    Ddim(ddim::Config),
    Ddpm(ddpm::Config),
    DpmSolverMultistep(dpm_solver_multistep::Config),
    DpmSolverSinglestep(dpm_solver_singlestep::Config),
    Euler(euler::Config),
    EulerAncestral(euler::Config),
    Heun(heun::Config),
    KDpm2(k_dpm_2::Config),
    KDpm2Ancestral(k_dpm_2::Config),
    Lcm(lcm::Config),
    Pndm(pndm::Config),
    Tcd(tcd::Config),
    UniPcMultistep(unipc_multistep::Config),
}

/// diffusers' arguments of `set_timesteps` and `step`.
#[derive(Clone, Debug, Default)]
pub struct Run {
    /// How many steps.
    pub num_inference_steps: usize,
    /// Evaluations of the whole schedule that are left out at its beginning; those of the run count from there.
    pub begin: usize,
    /// How much noise the steps of DDIM and TCD add, from 0 to 1.
    pub eta: f64,
    /// How many steps a latent consistency model was distilled for; its own where there is none, as always with TCD.
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
        let kind = match class {
            "DDIMScheduler" => Kind::Ddim(ddim::Config::read(fields)?),
            "DDPMScheduler" => Kind::Ddpm(ddpm::Config::read(fields)?),
            "DPMSolverMultistepScheduler" => Kind::DpmSolverMultistep(dpm_solver_multistep::Config::read(fields)?),
            "DPMSolverSinglestepScheduler" => Kind::DpmSolverSinglestep(dpm_solver_singlestep::Config::read(fields)?),
            "EulerDiscreteScheduler" => Kind::Euler(euler::Config::read(fields)?),
            "EulerAncestralDiscreteScheduler" => Kind::EulerAncestral(euler::Config::read_ancestral(fields)?),
            "HeunDiscreteScheduler" => Kind::Heun(heun::Config::read(fields)?),
            "KDPM2DiscreteScheduler" => Kind::KDpm2(k_dpm_2::Config::read(fields)?),
            "KDPM2AncestralDiscreteScheduler" => Kind::KDpm2Ancestral(k_dpm_2::Config::read_ancestral(fields)?),
            "LCMScheduler" => Kind::Lcm(lcm::Config::read(fields)?),
            "PNDMScheduler" => Kind::Pndm(pndm::Config::read(fields)?),
            "TCDScheduler" => Kind::Tcd(tcd::Config::read(fields)?),
            "UniPCMultistepScheduler" => Kind::UniPcMultistep(unipc_multistep::Config::read(fields)?),
            other => return Err(Error::Unsupported { field: "scheduler (model_index.json)".into(), value: other.into() }),
        };
        Ok(Self { kind, train_timesteps: noise_schedule::train_timesteps(fields)? })
    }

    /// The reference's class.
    pub fn class(&self) -> &'static str {
        match &self.kind {
            Kind::Ddim(_) => "DDIMScheduler",
            Kind::Ddpm(_) => "DDPMScheduler",
            Kind::DpmSolverMultistep(_) => "DPMSolverMultistepScheduler",
            Kind::DpmSolverSinglestep(_) => "DPMSolverSinglestepScheduler",
            Kind::Euler(_) => "EulerDiscreteScheduler",
            Kind::EulerAncestral(_) => "EulerAncestralDiscreteScheduler",
            Kind::Heun(_) => "HeunDiscreteScheduler",
            Kind::KDpm2(_) => "KDPM2DiscreteScheduler",
            Kind::KDpm2Ancestral(_) => "KDPM2AncestralDiscreteScheduler",
            Kind::Lcm(_) => "LCMScheduler",
            Kind::Pndm(_) => "PNDMScheduler",
            Kind::Tcd(_) => "TCDScheduler",
            Kind::UniPcMultistep(_) => "UniPCMultistepScheduler",
        }
    }

    /// Least number of steps.
    pub fn least_steps(&self) -> usize {
        1
    }

    /// Evaluations of a step, as `scheduler.order`.
    pub fn order(&self) -> usize {
        match self.kind {
            Kind::Heun(_) => 2,
            Kind::KDpm2(_) | Kind::KDpm2Ancestral(_) => k_dpm_2::ORDER,
            _ => 1,
        }
    }

    /// The timestep that belongs to a part of the denoising: `int(round(n - part * n))` of n timesteps, halves to even numbers.
    pub fn cutoff(&self, part: f64) -> f64 {
        let n = self.train_timesteps as f64;
        (n - part * n).round_ties_even()
    }

    /// Whether a step takes `eta`.
    pub fn takes_eta(&self) -> bool {
        matches!(self.kind, Kind::Ddim(_) | Kind::Tcd(_))
    }

    /// Whether a step is given the variance that the network learned beside its prediction.
    pub fn takes_variance(&self) -> bool {
        matches!(&self.kind, Kind::Ddpm(config) if config.learns_variance())
    }

    /// Timesteps that [`Self::add_noise`] takes; none where it is not there.
    pub fn noise_levels(&self) -> Option<usize> {
        match &self.kind {
            Kind::Ddpm(config) => Some(config.schedule().train_timesteps()),
            _ => None,
        }
    }

    /// A picture and noise in their parts of a timestep, as the reference's `add_noise`; of DDPM alone.
    ///
    /// # Errors
    /// [`Error::Unsupported`] for another class.
    pub fn add_noise(&self, sample: &Tensor, noise: &Tensor, timestep: usize) -> Result<Tensor> {
        match &self.kind {
            Kind::Ddpm(config) => ddim::add_noise(config.schedule(), timestep as f64, sample, noise),
            _ => Err(Error::Unsupported { field: "image_noising_scheduler".into(), value: self.class().into() }),
        }
    }

    /// Whether steps may draw noise for this `eta`.
    pub fn draws(&self, eta: f64) -> bool {
        match &self.kind {
            Kind::Ddim(_) | Kind::Tcd(_) => eta > 0.0,
            Kind::Ddpm(_) | Kind::EulerAncestral(_) | Kind::KDpm2Ancestral(_) | Kind::Lcm(_) => true,
            Kind::DpmSolverMultistep(config) => config.draws(),
            Kind::DpmSolverSinglestep(config) => config.draws(),
            Kind::Euler(_) | Kind::Heun(_) | Kind::KDpm2(_) | Kind::Pndm(_) | Kind::UniPcMultistep(_) => false,
        }
    }

    /// A job's scheduler: diffusers' `set_timesteps` and `set_begin_index`.
    ///
    /// # Errors
    /// [`Error::Invalid`] when there are no such steps, or none is left; or when steps need noise and there is no source of it.
    pub fn start(&self, run: &Run, noise: Option<Box<dyn StepNoise>>) -> Result<Box<dyn Scheduler>> {
        Ok(match &self.kind {
            Kind::Ddim(config) => Box::new(config.start(run, noise)?),
            Kind::Ddpm(config) => Box::new(config.start(run, noise)?),
            Kind::DpmSolverMultistep(config) => Box::new(config.start(run, noise)?),
            Kind::DpmSolverSinglestep(config) => Box::new(config.start(run, noise)?),
            Kind::Euler(config) | Kind::EulerAncestral(config) => Box::new(config.start(run, noise)?),
            Kind::Heun(config) => Box::new(config.start(run)?),
            Kind::KDpm2(config) | Kind::KDpm2Ancestral(config) => Box::new(config.start(run, noise)?),
            Kind::Lcm(config) => Box::new(config.start(run, noise)?),
            Kind::Pndm(config) => Box::new(config.start(run)?),
            Kind::Tcd(config) => Box::new(config.start(run, noise)?),
            Kind::UniPcMultistep(config) => Box::new(config.start(run)?),
        })
    }
}
