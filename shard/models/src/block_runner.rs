//! Forward passes through a group: the leader hands inputs in, its peers follow.
//!
//! The leader (rank 0) hands the inputs of a forward to the first rank of a lane, itself or another; that rank repeats them to
//! those that share the first range's tensors; hidden states go from range to range; the last range hands the output back to
//! the leader. Several forwards may be under way at once, one per range of each lane: outputs come back in the order the
//! inputs went in, whatever lane they come from.
//!
//! Which adapters are active on which item goes along with the inputs and the hidden states, under a name of its own. The ranks
//! of a range agree that all of them have the adapters before any begins: see [`RankGroup::activate`].
//!
//! Here tensors change places: the network computes on its rank's device, all around it is the host's.

use std::collections::VecDeque;

use parallel::{Device, Tensors};

use crate::blocks::{BlockModel, RankGroup, broadcast_tensors, from_tensor, recv_tensors, send_tensors, to_tensor};
use crate::control::ControlFacts;
use crate::lora::Share;
use crate::request::Lora;
use crate::{Error, Result};

/// Under this name adapters travel; no network has such an input.
const ADAPTERS: &str = "atelier.adapters";

/// The leader's end of a network that a group holds.
pub struct BlockRunner {
    model: Box<dyn BlockModel>,
    group: RankGroup,
    /// With one range, outputs of the leader's own lane are ready at once.
    ready: VecDeque<Result<Tensors>>,
    /// The lanes of the forwards under way, oldest first.
    in_flight: VecDeque<usize>,
}

impl BlockRunner {
    /// For rank 0 of `group`, which holds the first range of `model`.
    pub fn new(model: Box<dyn BlockModel>, group: RankGroup) -> Self {
        debug_assert!(group.is_leader());
        Self { model, group, ready: VecDeque::new(), in_flight: VecDeque::new() }
    }

    /// How many forwards can be under way before every lane's first range would wait for its last.
    pub fn depth(&self) -> usize {
        self.group.range.count * self.group.layout().cfg_parallel
    }

    /// What is known of the control networks that its jobs may name.
    pub fn controls(&self) -> &[ControlFacts] {
        self.group.controls().facts()
    }

    /// The lane with the fewest forwards under way. Of several the last, so that the leader's own comes after the others: it
    /// does the first range's part itself, and hands out nothing meanwhile.
    fn free_lane(&self) -> usize {
        let under_way = |lane: &usize| self.in_flight.iter().filter(|l| *l == lane).count();
        (0..self.group.layout().cfg_parallel).rev().min_by_key(under_way).unwrap_or(0)
    }

    /// Those of a job's adapters that change this network.
    ///
    /// # Errors
    /// [`Error::Adapter`] when one is not known here.
    pub fn relevant(&self, loras: &[Lora]) -> Result<Vec<Lora>> {
        match (loras.first(), self.group.adapters()) {
            (None, _) => Ok(Vec::new()),
            (Some(_), Some(adapters)) => adapters.relevant(loras),
            (Some(lora), None) => Err(Error::Adapter { name: lora.name.clone(), reason: "this group has no adapters".into() }),
        }
    }

    /// Whether these adapters can be active in one forward.
    pub fn fit_together(&self, names: &[&str]) -> bool {
        self.group.adapters().is_none_or(|adapters| adapters.fit_together(names))
    }

    /// Begins a forward on the lane that is free. On the leader's own, the first range's part is done when this returns. `shares` says which adapters are active on which of
    /// the items, from the first to the last; empty: none on any.
    ///
    /// # Errors
    /// When a rank is lost. What goes wrong in the network itself comes out of [`Self::collect`].
    pub fn issue(&mut self, inputs: &Tensors, shares: &[Share]) -> Result<()> {
        let mut inputs = inputs.clone();
        if shares.iter().any(|share| !share.is_plain()) {
            inputs.insert(ADAPTERS, to_tensor(&shares)?);
        }
        let lane = self.free_lane();
        if lane > 0 {
            send_tensors(self.group.whole(), &Ok(inputs), self.group.layout().lane_leader(lane))?;
        } else {
            broadcast_tensors(&*self.group.tensor, Some(&inputs), 0)?;
            if let Some(output) = run_first_range(&*self.model, &self.group, inputs)? {
                self.ready.push_back(output);
            }
        }
        self.in_flight.push_back(lane);
        Ok(())
    }

    /// The output of the oldest forward under way; waits for it. The inner result is what the network came to.
    ///
    /// # Errors
    /// When a rank is lost.
    pub fn collect(&mut self) -> Result<Result<Tensors>> {
        let Some(lane) = self.in_flight.pop_front() else {
            return Ok(Err(Error::Rank { reason: "no forward is under way".into() }));
        };
        if lane == 0
            && let Some(output) = self.ready.pop_front()
        {
            return Ok(output);
        }
        recv_tensors(self.group.whole(), self.group.layout().lane_end(lane))
    }

    /// One forward from beginning to end; the rest as for [`Self::issue`].
    pub fn forward(&mut self, inputs: &Tensors, shares: &[Share]) -> Result<Tensors> {
        debug_assert!(self.in_flight.is_empty());
        self.issue(inputs, shares)?;
        self.collect()?
    }
}

/// The end of a rank that does what it is handed.
pub struct Follower {
    model: Box<dyn BlockModel>,
    group: RankGroup,
}

impl Follower {
    /// For any rank but 0 of `group`.
    pub fn new(model: Box<dyn BlockModel>, group: RankGroup) -> Self {
        debug_assert!(!group.is_leader());
        Self { model, group }
    }

    /// Does the forwards this rank is handed until the group is over, and returns why it is.
    pub fn run(&self) -> Error {
        loop {
            if let Err(error) = self.turn() {
                return error;
            }
        }
    }

    fn turn(&self) -> Result<()> {
        let Self { model, group } = self;
        if group.range.is_first() {
            let handed = if group.is_lane_leader() { Some(recv_tensors(group.whole(), 0)??) } else { None };
            let inputs = broadcast_tensors(&*group.tensor, handed.as_ref(), 0)?;
            return match run_first_range(&**model, group, inputs)? {
                Some(output) => hand_back(group, &output),
                None => Ok(()),
            };
        }
        let hidden = recv_tensors(group.whole(), group.previous())?;
        let output = in_range(group, hidden, |hidden| {
            let hidden = model.blocks(hidden.to_device(&group.device)?)?;
            last_part(&**model, group, hidden)
        })?;
        if !group.range.is_last() {
            return send_tensors(group.whole(), &output, group.next());
        }
        hand_back(group, &output)
    }
}

/// The ranks of a lane's last range all have the output; the first of them hands it to the leader.
fn hand_back(group: &RankGroup, output: &Result<Tensors>) -> Result<()> {
    if group.tensor.rank() == 0 { send_tensors(group.whole(), output, 0) } else { Ok(()) }
}

/// The first range's part, on every rank of it. With one range that is all, and the output is returned.
fn run_first_range(model: &dyn BlockModel, group: &RankGroup, inputs: Tensors) -> Result<Option<Result<Tensors>>> {
    let output = in_range(group, Ok(inputs), |inputs| {
        let hidden = model.embed(&inputs.to_device(&group.device)?).and_then(|hidden| model.blocks(hidden))?;
        last_part(model, group, hidden)
    })?;
    if group.range.is_last() {
        return Ok(Some(output));
    }
    send_tensors(group.whole(), &output, group.next())?;
    Ok(None)
}

/// What comes after the blocks, on the last range, for the host; other ranges' hidden states stay as they are.
fn last_part(model: &dyn BlockModel, group: &RankGroup, hidden: Tensors) -> Result<Tensors> {
    if group.range.is_last() { Ok(model.output(hidden)?.to_device(&Device::Cpu)?) } else { Ok(hidden) }
}

/// A range's part of a forward, with the adapters that came with it active; they go on to the next range.
fn in_range(group: &RankGroup, hidden: Result<Tensors>, run: impl FnOnce(Tensors) -> Result<Tensors>) -> Result<Result<Tensors>> {
    let mut hidden = match hidden {
        Ok(hidden) => hidden,
        failed => return Ok(failed),
    };
    if hidden.find(ADAPTERS).is_none() {
        return stop_if_lost(run(hidden));
    }
    let adapters = hidden.take(ADAPTERS)?;
    let shares: Vec<Share> = from_tensor(&adapters)?;
    let _active = match group.activate(&shares)? {
        Ok(active) => active,
        Err(error) => return Ok(Err(error)),
    };
    let output = stop_if_lost(run(hidden))?.map_err(|error| blamed(error, &shares));
    Ok(if group.range.is_last() { output } else { output.map(|output| output.with(ADAPTERS, adapters)) })
}

/// What no forward without adapters would have failed for is theirs, so that jobs without any go on. It is said of the first; the
/// others' turn comes, if theirs is the fault.
fn blamed(error: Error, shares: &[Share]) -> Error {
    match (&error, shares.iter().flat_map(Share::loras).next()) {
        (Error::Parallel(parallel::Error::Adapted { .. }), Some((name, _))) => {
            Error::Adapter { name: name.to_owned(), reason: error.to_string() }
        }
        _ => error,
    }
}

/// Tells a failure of the group, which ends it, from one of the network, which every rank of a range sees alike.
fn stop_if_lost(result: Result<Tensors>) -> Result<Result<Tensors>> {
    match result {
        Err(error) if error.loses_group() => Err(error),
        other => Ok(other),
    }
}

impl std::fmt::Debug for BlockRunner {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "BlockRunner({:?}, {} in flight)", self.group, self.in_flight.len())
    }
}

impl std::fmt::Debug for Follower {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Follower({:?})", self.group)
    }
}
