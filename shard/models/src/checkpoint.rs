//! What a denoising job has done, so that another engine can go on with it.
//!
//! Only what cannot be made again is kept: the latents, the step, and what the scheduler carries from step to step. All else
//! (embeddings, noise, masks, timesteps) a family's [`crate::denoise::Denoiser::start`] makes of the request and the same
//! inputs, whose randomness is the seed's. So one form serves every family and every scheduler.

use parallel::{Tensor, Tensors};

use crate::denoise::DenoiseState;
use crate::scheduler::SchedulerState;
use crate::{Error, Result};

/// x_t's name in a checkpoint.
const LATENTS: &str = "latents";
/// What the names of the scheduler's tensors begin with; `.0`, `.1` and so on follow.
const SCHEDULER: &str = "scheduler";

/// A job between two evaluations.
#[derive(Clone, Debug)]
pub struct Checkpoint {
    /// Evaluations done.
    pub step: usize,
    /// `latents`, and `scheduler.0`, `scheduler.1`, ...: the scheduler's history.
    pub tensors: Tensors,
}

impl DenoiseState {
    /// What has been done. Costs a handle a tensor: nothing is copied.
    pub fn checkpoint(&self) -> Checkpoint {
        let mut tensors = Tensors::new().with(LATENTS, self.latents.clone());
        for (i, tensor) in self.scheduler.checkpoint().history.into_iter().enumerate() {
            tensors.insert(format!("{SCHEDULER}.{i}"), tensor);
        }
        Checkpoint { step: self.step, tensors }
    }

    /// Goes on where `checkpoint` was, in a state that was started from the same request and inputs.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] with the field that does not fit; the state is then as it was.
    pub fn restore(&mut self, checkpoint: Checkpoint) -> Result<()> {
        let Checkpoint { step, mut tensors } = checkpoint;
        if step == 0 || step > self.steps() {
            return Err(Error::checkpoint("step", format!("{step} is not within 1 to {}", self.steps())));
        }
        let latents = tensors.take(LATENTS).map_err(|_| Error::checkpoint(LATENTS, "is missing"))?;
        fits(LATENTS, &latents, &self.latents)?;
        let history = tensors.list(SCHEDULER);
        if let Some((name, _)) = tensors.iter().find(|(name, _)| !is_history(name, history.len())) {
            return Err(Error::checkpoint(name, "is nothing that a state has"));
        }
        self.scheduler.restore(SchedulerState { history }, step, &self.latents)?;
        self.latents = latents;
        self.step = step;
        self.last = None;
        Ok(())
    }
}

/// Whether `tensor` has the type and shape of what it replaces.
pub(crate) fn fits(field: &str, tensor: &Tensor, like: &Tensor) -> Result<()> {
    let (got, expected) = ((tensor.dtype(), tensor.dims()), (like.dtype(), like.dims()));
    if got == expected { Ok(()) } else { Err(Error::checkpoint(field, format!("is {got:?}, not {expected:?}"))) }
}

fn is_history(name: &str, len: usize) -> bool {
    (0..len).any(|i| name == format!("{SCHEDULER}.{i}"))
}
