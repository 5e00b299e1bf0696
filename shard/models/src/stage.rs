//! What a worker runs: stages, each a queue of tasks that is advanced turn by turn.
//!
//! Only the leader (rank 0) of a group holds tasks. Its peers hold slices of the network and do the forwards they are handed
//! ([`crate::block_runner`]), so what to run next, and whether to stop, is decided in one place: ranks cannot disagree.

use std::collections::BTreeMap;

use parallel::{Tensor, Tensors};

use crate::denoise::DenoiseState;
use crate::{Checkpoint, Error, Payload, Request, Result};

/// Names a task within its stage; chosen by the caller.
pub type TaskKey = u64;

/// A stage of a component, on the leader of the component's group.
pub trait Stage: Send {
    /// Takes a task in. It begins at the next turn that has room for it.
    fn start(&mut self, key: TaskKey, request: Request, inputs: Inputs);

    /// Stops a task so that it can go on elsewhere: at the next step boundary, within one turn, it gives
    /// [`StageEvent::Failed`] with [`Error::Parked`] and what was done of it. A task that has not begun gives what it was to
    /// begin with; a stage without steps finishes the one it has begun. Unknown keys are ignored.
    fn park(&mut self, key: TaskKey);

    /// Stops a task: it gives [`StageEvent::Failed`] with [`Error::Cancelled`] within one turn. Unknown keys are ignored.
    fn cancel(&mut self, key: TaskKey);

    /// Does a bounded piece of work (a denoise step, one text, one picture) and tells what came of it. `false`: there is
    /// nothing to do until the next `start`.
    ///
    /// # Errors
    /// Only when the group cannot go on ([`Error::loses_group`]); what goes wrong with one task is that task's event.
    fn turn(&mut self, on_event: &mut dyn FnMut(StageEvent<'_>)) -> Result<bool>;

    /// The forwards that were begun so far, for a stage that puts pictures of several tasks into one.
    fn forwards(&self) -> Forwards {
        Forwards::default()
    }
}

/// Forwards since the beginning: pictures over count is the mean size of a batch.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Forwards {
    /// How many.
    pub count: u64,
    /// Pictures in all of them together.
    pub pictures: u64,
}

/// What happens to a task.
#[derive(Debug)]
pub enum StageEvent<'a> {
    /// It begins to be worked on.
    Started {
        /// The task.
        key: TaskKey,
    },
    /// It made a step.
    Step {
        /// The task.
        key: TaskKey,
        /// Steps done.
        step: usize,
        /// Steps in all.
        steps: usize,
        /// Where the denoiser is, if this is a denoise step: what previews and checkpoints are made of.
        state: Option<&'a DenoiseState>,
    },
    /// It is done.
    Done {
        /// The task.
        key: TaskKey,
        /// Its output.
        payload: Payload,
    },
    /// It ended without output.
    Failed {
        /// The task.
        key: TaskKey,
        /// Why.
        error: Error,
        /// Steps that had been done.
        step: usize,
    },
}

/// What a task starts from, besides its request.
#[derive(Clone, Debug, Default)]
pub struct Inputs {
    /// From the text encoders, all of their names together.
    pub conditioning: Tensors,
    /// From the autoencoder's encoder.
    pub image_latents: Option<Tensors>,
    /// From the denoiser.
    pub latents: Option<Tensor>,
    /// Noise to start from in place of drawing it, `[B, C, H, W]`: the reference's `latents` argument.
    pub noise: Option<Tensor>,
    /// What its steps would draw, in place of drawing it.
    pub step_noise: Vec<Tensor>,
    /// What latents of control pictures are drawn with, in place of drawing it, in the job's order.
    pub control_noise: Vec<Tensor>,
    /// The job's own pictures, as uploaded.
    pub pictures: Pictures,
    /// Where to go on, for the denoiser.
    pub checkpoint: Option<Checkpoint>,
}

/// A job's pictures, as uploaded: PNG, JPEG or WebP bytes.
#[derive(Clone, Debug, Default)]
pub struct Pictures {
    /// Where to start from.
    pub image: Option<Vec<u8>>,
    /// Further ones that are looked at, behind that.
    pub more: Vec<Vec<u8>>,
    /// Where to repaint.
    pub mask_image: Option<Vec<u8>>,
    /// One for each of the job's controls, in their order.
    pub controls: Vec<Vec<u8>>,
}

impl Inputs {
    /// Takes in the output of another stage.
    pub fn add(&mut self, payload: Payload) -> Result<()> {
        match payload {
            Payload::Conditioning(tensors) => self.conditioning.extend(tensors),
            Payload::ImageLatents(tensors) => self.image_latents = Some(tensors),
            Payload::Latents(mut tensors) => self.latents = Some(tensors.take("latents")?),
            other @ Payload::Image(_) => return Err(Error::Payload { stage: "input", got: other.kind() }),
        }
        Ok(())
    }

    /// The latents a decoder needs.
    pub fn latents(&self) -> Result<&Tensor> {
        self.latents.as_ref().ok_or_else(|| parallel::Error::MissingInput { name: "latents".into() }.into())
    }
}

/// A stage that does a whole task in a turn, the first that came first.
pub(crate) trait OneAtATime: Send {
    /// The tasks that have come.
    fn waiting(&mut self) -> &mut Waiting;

    /// One task from beginning to end.
    fn do_task(&mut self, request: &Request, inputs: &Inputs) -> Result<Payload>;
}

impl<T: OneAtATime> Stage for T {
    fn start(&mut self, key: TaskKey, request: Request, inputs: Inputs) {
        self.waiting().push(key, request, inputs);
    }

    fn park(&mut self, key: TaskKey) {
        self.waiting().park(key);
    }

    fn cancel(&mut self, key: TaskKey) {
        self.waiting().cancel(key);
    }

    fn turn(&mut self, on_event: &mut dyn FnMut(StageEvent<'_>)) -> Result<bool> {
        let mut waiting = std::mem::take(self.waiting());
        let more = waiting.turn(on_event, |request, inputs| self.do_task(request, inputs));
        *self.waiting() = waiting;
        more
    }
}

/// Tasks waiting for their turn, in the order they came. For stages that work on one at a time.
#[derive(Debug, Default)]
pub(crate) struct Waiting {
    order: BTreeMap<u64, (TaskKey, Request, Inputs)>,
    next: u64,
    /// Those that were stopped, and why; told at the next turn.
    stopped: Vec<(TaskKey, Error)>,
}

impl Waiting {
    pub(crate) fn push(&mut self, key: TaskKey, request: Request, inputs: Inputs) {
        self.order.insert(self.next, (key, request, inputs));
        self.next += 1;
    }

    pub(crate) fn cancel(&mut self, key: TaskKey) {
        self.stop(key, |_| Error::Cancelled);
    }

    /// What a task was to begin with is what has been done of it.
    pub(crate) fn park(&mut self, key: TaskKey) {
        self.stop(key, |inputs| Error::Parked(inputs.checkpoint.map(Box::new)));
    }

    fn stop(&mut self, key: TaskKey, why: impl Fn(Inputs) -> Error) {
        let stopped = self.order.extract_if(.., |_, (k, ..)| *k == key);
        self.stopped.extend(stopped.map(|(_, (key, _, inputs))| (key, why(inputs))));
    }

    /// Tells of the tasks that were stopped since the last turn.
    pub(crate) fn tell_stopped(&mut self, on_event: &mut dyn FnMut(StageEvent<'_>)) {
        for (key, error) in self.stopped.drain(..) {
            let step = if let Error::Parked(Some(checkpoint)) = &error { checkpoint.step } else { 0 };
            on_event(StageEvent::Failed { key, error, step });
        }
    }

    /// One turn of a stage that does a whole task at a time: the next task, from beginning to end.
    pub(crate) fn turn(
        &mut self,
        on_event: &mut dyn FnMut(StageEvent<'_>),
        run: impl FnOnce(&Request, &Inputs) -> Result<Payload>,
    ) -> Result<bool> {
        self.tell_stopped(on_event);
        let Some((key, request, inputs)) = self.pop() else { return Ok(false) };
        on_event(StageEvent::Started { key });
        match run(&request, &inputs) {
            Ok(payload) => {
                on_event(StageEvent::Step { key, step: 1, steps: 1, state: None });
                on_event(StageEvent::Done { key, payload });
            }
            Err(error) if error.loses_group() => return Err(error),
            Err(error) => on_event(StageEvent::Failed { key, error, step: 0 }),
        }
        Ok(true)
    }

    pub(crate) fn pop(&mut self) -> Option<(TaskKey, Request, Inputs)> {
        self.order.pop_first().map(|(_, task)| task)
    }
}
