//! Forward passes through a group: the leader hands inputs in, its peers follow.
//!
//! The leader (rank 0) hands the inputs of a forward to the first rank of a lane, itself or another; that rank repeats them to
//! those that share the first range's tensors; hidden states go from range to range; the last range hands the output back to
//! the leader. Several forwards may be under way at once, one per range of each lane: outputs come back in the order the
//! inputs went in, whatever lane they come from.

use std::collections::VecDeque;

use parallel::Tensors;

use crate::blocks::{BlockModel, RankGroup, broadcast_tensors, recv_tensors, send_tensors};
use crate::{Error, Result};

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

    /// The lane with the fewest forwards under way. Of several the last, so that the leader's own comes after the others: it
    /// does the first range's part itself, and hands out nothing meanwhile.
    fn free_lane(&self) -> usize {
        let under_way = |lane: &usize| self.in_flight.iter().filter(|l| *l == lane).count();
        (0..self.group.layout().cfg_parallel).rev().min_by_key(under_way).unwrap_or(0)
    }

    /// Begins a forward on the lane that is free. On the leader's own, the first range's part is done when this returns.
    ///
    /// # Errors
    /// When a rank is lost. What goes wrong in the network itself comes out of [`Self::collect`].
    pub fn issue(&mut self, inputs: &Tensors) -> Result<()> {
        let lane = self.free_lane();
        if lane > 0 {
            send_tensors(self.group.whole(), &Ok(inputs.clone()), self.group.layout().lane_leader(lane))?;
        } else {
            broadcast_tensors(&*self.group.tensor, Some(inputs), 0)?;
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
        let output = recv_tensors(self.group.whole(), self.group.layout().lane_end(lane))?;
        Ok(output.map_err(|reason| Error::Rank { reason }))
    }

    /// One forward from beginning to end.
    pub fn forward(&mut self, inputs: &Tensors) -> Result<Tensors> {
        debug_assert!(self.in_flight.is_empty());
        self.issue(inputs)?;
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
            let handed = if group.is_lane_leader() { Some(recv_tensors(group.whole(), 0)?) } else { None };
            let handed = handed.transpose().map_err(parallel::Error::Frame)?;
            let inputs = broadcast_tensors(&*group.tensor, handed.as_ref(), 0)?;
            return match run_first_range(&**model, group, &inputs)? {
                Some(output) => hand_back(group, &output),
                None => Ok(()),
            };
        }
        let hidden = recv_tensors(group.whole(), group.previous())?.map_err(|reason| Error::Rank { reason });
        let hidden = stop_if_lost(hidden.and_then(|hidden| model.blocks(hidden)))?;
        if !group.range.is_last() {
            return send_tensors(group.whole(), &hidden, group.next());
        }
        hand_back(group, &stop_if_lost(hidden.and_then(|hidden| model.output(hidden)))?)
    }
}

/// The ranks of a lane's last range all have the output; the first of them hands it to the leader.
fn hand_back(group: &RankGroup, output: &Result<Tensors>) -> Result<()> {
    if group.tensor.rank() == 0 { send_tensors(group.whole(), output, 0) } else { Ok(()) }
}

/// The first range's part, on every rank of it. With one range that is all, and the output is returned.
fn run_first_range(model: &dyn BlockModel, group: &RankGroup, inputs: &Tensors) -> Result<Option<Result<Tensors>>> {
    let hidden = stop_if_lost(model.embed(inputs).and_then(|hidden| model.blocks(hidden)))?;
    if !group.range.is_last() {
        send_tensors(group.whole(), &hidden, group.next())?;
        return Ok(None);
    }
    stop_if_lost(hidden.and_then(|hidden| model.output(hidden))).map(Some)
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
