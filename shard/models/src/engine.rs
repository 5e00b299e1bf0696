//! The denoise engine: many jobs at once, one step each per turn.
//!
//! A job joins at a step boundary and leaves at one. The branches of all jobs (one a job, two with classifier-free guidance)
//! wait in one row; a turn takes as many as fit together into one forward, and issues forwards until every block range of
//! every lane has work. A job alone is the case n = 1, not another path.

use std::collections::VecDeque;

use parallel::{Tensor, Tensors};

use crate::block_runner::BlockRunner;
use crate::denoise::{DenoiseState, Denoiser};
use crate::lora::Share;
use crate::registry::Limits;
use crate::stage::{Forwards, Inputs, Stage, StageEvent, TaskKey, Waiting};
use crate::{Error, Request, Result};

/// The leader's end of a denoiser's group.
pub struct Engine {
    denoiser: Box<dyn Denoiser>,
    runner: BlockRunner,
    limits: Limits,
    waiting: Waiting,
    active: Vec<Active>,
    /// Forwards under way, oldest first: whose branches are in each, in order.
    in_flight: VecDeque<Vec<BranchRef>>,
    forwards: Forwards,
}

/// A job in the engine.
struct Active {
    key: TaskKey,
    state: DenoiseState,
    leaving: Option<Leaving>,
    /// Its adapters, on each of its pictures.
    share: Share,
    /// The branches of its next evaluation.
    branches: Vec<Branch>,
}

/// Why a job is not issued again.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Leaving {
    Cancelled,
    Parked,
}

enum Branch {
    Ready(Tensors),
    InFlight,
    Done(Result<Tensor>),
}

#[derive(Clone, Copy)]
struct BranchRef {
    key: TaskKey,
    branch: usize,
}

impl Engine {
    /// For the leader of the group that holds the network.
    pub fn new(denoiser: Box<dyn Denoiser>, runner: BlockRunner, limits: Limits) -> Self {
        let (waiting, active, in_flight, forwards) = Default::default();
        Self { denoiser, runner, limits, waiting, active, in_flight, forwards }
    }

    fn admit(&mut self, on_event: &mut dyn FnMut(StageEvent<'_>)) {
        while self.active.len() < self.limits.max_jobs.max(1) {
            let Some((key, request, inputs)) = self.waiting.pop() else { return };
            on_event(StageEvent::Started { key });
            match self.begin(key, request, inputs) {
                Ok(job) => self.keep_or_finish(job, on_event),
                Err(error) => on_event(StageEvent::Failed { key, error, step: 0 }),
            }
        }
    }

    /// A job before its next evaluation: the first, or where its checkpoint was.
    fn begin(&self, key: TaskKey, request: Request, mut inputs: Inputs) -> Result<Active> {
        let checkpoint = inputs.checkpoint.take();
        let loras = self.runner.relevant(&request.loras)?;
        let mut state = self.denoiser.start(request, inputs)?;
        if let Some(checkpoint) = checkpoint {
            state.restore(checkpoint)?;
        }
        let branches = self.next_branches(&state)?;
        let share = Share::new(state.pictures(), &loras);
        Ok(Active { key, state, leaving: None, share, branches })
    }

    /// Puts a job at the end of the row, so that jobs take turns, or lets it go when nothing is left to do.
    fn keep_or_finish(&mut self, job: Active, on_event: &mut dyn FnMut(StageEvent<'_>)) {
        let (key, step) = (job.key, job.state.step);
        if step < job.state.steps() {
            return self.active.push(job);
        }
        on_event(match self.denoiser.finish(job.state) {
            Ok(payload) => StageEvent::Done { key, payload },
            Err(error) => StageEvent::Failed { key, error, step },
        });
    }

    fn next_branches(&self, state: &DenoiseState) -> Result<Vec<Branch>> {
        if state.step >= state.steps() {
            return Ok(Vec::new());
        }
        Ok(self.denoiser.branches(state)?.into_iter().map(Branch::Ready).collect())
    }

    /// Lets go of stopped jobs that have nothing under way.
    fn drop_leaving(&mut self, on_event: &mut dyn FnMut(StageEvent<'_>)) {
        self.waiting.tell_stopped(on_event);
        self.active.retain(|job| {
            let under_way = job.branches.iter().any(|b| matches!(b, Branch::InFlight));
            let Some(leaving) = job.leaving.filter(|_| !under_way) else { return true };
            let error = match leaving {
                Leaving::Cancelled => Error::Cancelled,
                Leaving::Parked => Error::Parked((job.state.step > 0).then(|| Box::new(job.state.checkpoint()))),
            };
            on_event(StageEvent::Failed { key: job.key, error, step: job.state.step });
            false
        });
    }

    fn stop(&mut self, key: TaskKey, why: Leaving) {
        for job in self.active.iter_mut().filter(|job| job.key == key) {
            job.leaving = Some(why);
        }
    }

    /// The branches of the next forward: those that wait, in order, as far as they fit with the first.
    fn pick(&self) -> Vec<BranchRef> {
        let waiting: Vec<(&Active, usize)> =
            self.active.iter().filter(|job| job.leaving.is_none()).flat_map(|job| ready(job).map(move |b| (job, b))).collect();
        let Some((first, branch)) = waiting.first() else { return Vec::new() };
        // Leave something for the other block ranges and lanes: a batch that takes all of it would let them idle.
        let free = self.runner.depth().saturating_sub(self.in_flight.len()).max(1);
        let share = waiting.len().div_ceil(free);
        let key = self.denoiser.batch_key(&first.state, *branch);
        let (mut picked, mut pictures) = (Vec::new(), 0);
        let mut adapters = Vec::new();
        for (job, branch) in &waiting {
            let fits = picked.is_empty()
                || (pictures + job.state.pictures() <= self.limits.max_batch && self.adapters_fit(&adapters, &job.share));
            if picked.len() < share && fits && self.denoiser.batch_key(&job.state, *branch) == key {
                picked.push(BranchRef { key: job.key, branch: *branch });
                pictures += job.state.pictures();
                adapters = together(&adapters, &job.share);
            }
        }
        picked
    }

    /// Whether a job's adapters can be active beside others in one forward.
    fn adapters_fit<'a>(&'a self, others: &[&'a str], share: &'a Share) -> bool {
        share.is_plain() || self.runner.fit_together(&together(others, share))
    }

    /// Takes the picked branches' inputs, side by side along dimension 0.
    fn take_inputs(&mut self, picked: &[BranchRef]) -> Result<Tensors> {
        let mut each = Vec::new();
        for reference in picked {
            let slot = self
                .active
                .iter_mut()
                .find(|job| job.key == reference.key)
                .and_then(|job| job.branches.get_mut(reference.branch));
            if let Some(slot) = slot
                && let Branch::Ready(inputs) = std::mem::replace(slot, Branch::InFlight)
            {
                each.push(inputs);
            }
        }
        side_by_side(&each, self.denoiser.shared_inputs())
    }

    fn issue(&mut self, picked: Vec<BranchRef>, on_event: &mut dyn FnMut(StageEvent<'_>)) -> Result<()> {
        match self.take_inputs(&picked) {
            Ok(inputs) => {
                let job = |reference: &BranchRef| self.active.iter().find(|job| job.key == reference.key);
                let shares: Vec<Share> = picked.iter().filter_map(job).map(|job| job.share.clone()).collect();
                let pictures: usize = picked.iter().filter_map(job).map(|job| job.state.pictures()).sum();
                self.runner.issue(&inputs, &shares)?;
                self.forwards.count += 1;
                self.forwards.pictures += pictures as u64;
                self.in_flight.push_back(picked);
            }
            Err(error) => self.settle(&picked, &Err(error), on_event),
        }
        Ok(())
    }

    /// Takes in the oldest forward under way.
    fn collect(&mut self, on_event: &mut dyn FnMut(StageEvent<'_>)) -> Result<()> {
        let output = self.runner.collect()?.and_then(|mut output| Ok(output.take("sample")?));
        let Some(picked) = self.in_flight.pop_front() else { return Ok(()) };
        self.settle(&picked, &output, on_event);
        Ok(())
    }

    /// Hands a forward's output out and steps the jobs that have all their branches.
    fn settle(&mut self, picked: &[BranchRef], output: &Result<Tensor>, on_event: &mut dyn FnMut(StageEvent<'_>)) {
        self.hand_out(picked, output);
        for reference in picked {
            self.advance(reference.key, on_event);
        }
    }

    /// Gives each branch its rows of a forward's output, or the reason why there are none. What an adapter is to blame for fails
    /// the jobs that use it; the others' branches wait again.
    fn hand_out(&mut self, picked: &[BranchRef], output: &Result<Tensor>) {
        let blamed = |job: &Active| matches!(output, Err(Error::Adapter { name, .. }) if job.share.names(name));
        let is_picked = |job: &&Active| picked.iter().any(|reference| reference.key == job.key);
        let some_blamed = self.active.iter().filter(is_picked).any(blamed);
        let mut row = 0;
        for reference in picked {
            let Some(job) = self.active.iter_mut().find(|job| job.key == reference.key) else { continue };
            let rows = job.state.pictures();
            let mine = match output {
                Ok(output) => Branch::Done(output.narrow(0, row, rows).map_err(Error::from)),
                Err(Error::Adapter { name, reason }) if blamed(job) => {
                    Branch::Done(Err(Error::Adapter { name: name.clone(), reason: reason.clone() }))
                }
                Err(_) if some_blamed => again(&*self.denoiser, &job.state, reference.branch),
                Err(error) => Branch::Done(Err(Error::Rank { reason: error.to_string() })),
            };
            row += rows;
            if let Some(slot) = job.branches.get_mut(reference.branch) {
                *slot = mine;
            }
        }
    }

    /// Steps a job if all its branches are done, and lets it go when it is finished.
    fn advance(&mut self, key: TaskKey, on_event: &mut dyn FnMut(StageEvent<'_>)) {
        let Some(at) = self.active.iter().position(|job| job.key == key) else { return };
        // What a parked job has under way still counts; a cancelled one's does not.
        if self.active[at].leaving == Some(Leaving::Cancelled)
            || !self.active[at].branches.iter().all(|b| matches!(b, Branch::Done(_)))
        {
            return;
        }
        let mut job = self.active.remove(at);
        match self.step(&mut job) {
            Ok(()) => {
                let (step, steps) = (job.state.step, job.state.steps());
                on_event(StageEvent::Step { key, step, steps, state: Some(&job.state) });
                self.keep_or_finish(job, on_event);
            }
            Err(error) => on_event(StageEvent::Failed { key, error, step: job.state.step }),
        }
    }

    fn step(&self, job: &mut Active) -> Result<()> {
        let outputs = std::mem::take(&mut job.branches).into_iter().map(|branch| match branch {
            Branch::Done(output) => output,
            Branch::Ready(_) | Branch::InFlight => Err(Error::Rank { reason: "a branch was not computed".into() }),
        });
        self.denoiser.advance(&mut job.state, outputs.collect::<Result<_>>()?)?;
        job.state.step += 1;
        job.branches = self.next_branches(&job.state)?;
        Ok(())
    }
}

impl Stage for Engine {
    fn start(&mut self, key: TaskKey, request: Request, inputs: Inputs) {
        self.waiting.push(key, request, inputs);
    }

    fn park(&mut self, key: TaskKey) {
        self.waiting.park(key);
        self.stop(key, Leaving::Parked);
    }

    fn cancel(&mut self, key: TaskKey) {
        self.waiting.cancel(key);
        self.stop(key, Leaving::Cancelled);
    }

    fn forwards(&self) -> Forwards {
        self.forwards
    }

    /// Issues one forward while a block range is free, else takes in the oldest one.
    fn turn(&mut self, on_event: &mut dyn FnMut(StageEvent<'_>)) -> Result<bool> {
        self.drop_leaving(on_event);
        self.admit(on_event);
        if self.in_flight.len() < self.runner.depth() {
            let picked = self.pick();
            if !picked.is_empty() {
                self.issue(picked, on_event)?;
                // With one range and one lane the output is there already: a turn is then a whole step.
                if self.in_flight.len() < self.runner.depth() {
                    return Ok(true);
                }
            }
        }
        if self.in_flight.is_empty() {
            return Ok(!self.active.is_empty());
        }
        self.collect(on_event)?;
        self.drop_leaving(on_event);
        Ok(true)
    }
}

fn ready(job: &Active) -> impl Iterator<Item = usize> + '_ {
    job.branches.iter().enumerate().filter(|(_, b)| matches!(b, Branch::Ready(_))).map(|(i, _)| i)
}

/// A branch whose inputs were taken and came to nothing, as it was before.
fn again(denoiser: &dyn Denoiser, state: &DenoiseState, branch: usize) -> Branch {
    match denoiser.branches(state) {
        Ok(mut branches) if branch < branches.len() => Branch::Ready(branches.swap_remove(branch)),
        Ok(_) => Branch::Done(Err(Error::Rank { reason: "a branch is gone".into() })),
        Err(error) => Branch::Done(Err(error)),
    }
}

/// The names of adapters, each once.
fn together<'a>(others: &[&'a str], share: &'a Share) -> Vec<&'a str> {
    let mut names = others.to_vec();
    for (name, _) in share.loras() {
        if !names.contains(&name) {
            names.push(name);
        }
    }
    names
}

/// Inputs side by side along dimension 0; shared ones are taken from the first.
fn side_by_side(each: &[Tensors], shared: &[&str]) -> Result<Tensors> {
    let Some(first) = each.first() else { return Ok(Tensors::new()) };
    let mut together = Tensors::new();
    for (name, tensor) in first.iter() {
        let tensor = if each.len() == 1 || shared.contains(&name) {
            tensor.clone()
        } else {
            Tensor::cat(&each.iter().map(|inputs| inputs.get(name)).collect::<parallel::Result<Vec<_>>>()?, 0)?
        };
        together.insert(name, tensor);
    }
    Ok(together)
}

impl std::fmt::Debug for Engine {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Engine({} jobs, {} forwards under way)", self.active.len(), self.in_flight.len())
    }
}
