//! One job while it is denoised, and what a family says about it.

use parallel::{Tensor, Tensors};

use crate::scheduler::Scheduler;
use crate::stage::Inputs;
use crate::{Payload, Request, Result};

/// One job while it is denoised: what is batched with others, stopped, previewed and checkpointed.
#[derive(Debug)]
pub struct DenoiseState {
    /// The job.
    pub request: Request,
    /// x_t, in the shape the network takes.
    pub latents: Tensor,
    /// Evaluations done.
    pub step: usize,
    /// The noise scheduler, this job's own.
    pub scheduler: Box<dyn Scheduler>,
    /// What the family keeps for the job: embeddings, position ids, noise and mask for inpainting.
    pub tensors: Tensors,
    /// What the last step was made of; none before the first.
    pub last: Option<LastStep>,
}

/// What a step was made of.
#[derive(Clone, Debug)]
pub struct LastStep {
    /// What the scheduler was given, after guidance.
    pub model_output: Tensor,
    /// What the scheduler gave, before any blending with a masked picture.
    pub prev_sample: Tensor,
}

impl DenoiseState {
    /// Evaluations in all.
    pub fn steps(&self) -> usize {
        self.scheduler.timesteps().len()
    }

    /// Pictures the job draws.
    pub fn pictures(&self) -> usize {
        self.request.num_images_per_prompt
    }
}

/// What a family knows about denoising. Lives on the leader only; the network itself is a [`crate::blocks::BlockModel`].
pub trait Denoiser: Send {
    /// A job at its first step: its noise drawn, its timesteps set.
    fn start(&self, request: Request, inputs: Inputs) -> Result<DenoiseState>;

    /// The network's inputs for the next evaluation: one branch, or two with classifier-free guidance. Dimension 0 counts
    /// pictures, except in the inputs named by [`Self::shared_inputs`].
    fn branches(&self, state: &DenoiseState) -> Result<Vec<Tensors>>;

    /// Inputs that are the same for all pictures of a forward, such as position ids.
    fn shared_inputs(&self) -> &'static [&'static str];

    /// Branches with equal keys, of one job or of several, may share a forward. `branch` counts as [`Self::branches`] does.
    fn batch_key(&self, state: &DenoiseState, branch: usize) -> Vec<usize>;

    /// Takes the network's output for each branch: guidance, then the scheduler's step.
    fn advance(&self, state: &mut DenoiseState, outputs: Vec<Tensor>) -> Result<()>;

    /// The finished latents, for the decoder.
    fn finish(&self, state: DenoiseState) -> Result<Payload>;
}
