//! Noise schedulers: where to evaluate the model, and how to step from one point to the next. One file each.

use std::fmt::Debug;

use parallel::Tensor;
use serde::{Deserialize, Serialize};

use crate::Result;

pub mod flow_match_euler;
pub mod flow_match_heun;

/// The state of one denoising run. Built per job, so nothing leaks from one job to the next.
pub trait Scheduler: Send + Debug {
    /// The timesteps at which the model is evaluated, first to last (two per step for second-order schedulers).
    fn timesteps(&self) -> &[f64];
    /// Scale of the initial noise.
    fn init_noise_sigma(&self) -> f64 {
        1.0
    }
    /// What the model sees in place of `sample` at evaluation `step`.
    fn scale_model_input(&self, sample: &Tensor, _step: usize) -> Result<Tensor> {
        Ok(sample.clone())
    }
    /// x_t -> x_(t-1).
    fn step(&mut self, model_output: &Tensor, step: usize, sample: &Tensor) -> Result<Tensor>;
    /// `sample` noised to evaluation `step`: the start of image to image.
    fn scale_noise(&self, sample: &Tensor, step: usize, noise: &Tensor) -> Result<Tensor>;
    /// All that a resumed run needs besides the sample and the step.
    fn checkpoint(&self) -> SchedulerState;
}

/// What a scheduler carries from step to step.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct SchedulerState {
    /// Earlier model outputs of multistep schedulers, newest last, as (shape, data).
    pub history: Vec<(Vec<usize>, Vec<f32>)>,
}
