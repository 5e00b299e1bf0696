//! Forward passes through a group: the leader hands inputs in, its peers follow.
//!
//! The leader (rank 0) repeats the inputs to the ranks that share the first range's tensors; hidden states go from range to
//! range; the last range hands the output back to the leader. Several forwards may be under way at once, one per range:
//! outputs come back in the order the inputs went in.
//!
//! Here tensors change places: the network computes on its rank's device, all around it is the host's.

use std::collections::VecDeque;

use parallel::{Device, Tensors};

use crate::blocks::{BlockModel, RankGroup, broadcast_tensors, recv_tensors, send_tensors};
use crate::{Error, Result};

/// The leader's end of a network that a group holds.
pub struct BlockRunner {
    model: Box<dyn BlockModel>,
    group: RankGroup,
    /// With one range, outputs are ready at once.
    ready: VecDeque<Result<Tensors>>,
    in_flight: usize,
}

impl BlockRunner {
    /// For rank 0 of `group`, which holds the first range of `model`.
    pub fn new(model: Box<dyn BlockModel>, group: RankGroup) -> Self {
        debug_assert!(group.is_leader());
        Self { model, group, ready: VecDeque::new(), in_flight: 0 }
    }

    /// How many forwards can be under way before the first range would wait for the last.
    pub fn depth(&self) -> usize {
        self.group.range.count
    }

    /// Begins a forward: the first range's part is done when this returns.
    ///
    /// # Errors
    /// When a rank is lost. What goes wrong in the network itself comes out of [`Self::collect`].
    pub fn issue(&mut self, inputs: &Tensors) -> Result<()> {
        broadcast_tensors(&*self.group.tensor, Some(inputs), 0)?;
        if let Some(output) = run_first_range(&*self.model, &self.group, inputs)? {
            self.ready.push_back(output);
        }
        self.in_flight += 1;
        Ok(())
    }

    /// The output of the oldest forward under way; waits for it. The inner result is what the network came to.
    ///
    /// # Errors
    /// When a rank is lost.
    pub fn collect(&mut self) -> Result<Result<Tensors>> {
        self.in_flight = self.in_flight.saturating_sub(1);
        if let Some(output) = self.ready.pop_front() {
            return Ok(output);
        }
        let layout = self.group.layout();
        let output = recv_tensors(self.group.whole(), layout.ranks() - layout.tp)?;
        Ok(output.map_err(|reason| Error::Rank { reason }))
    }

    /// One forward from beginning to end.
    pub fn forward(&mut self, inputs: &Tensors) -> Result<Tensors> {
        debug_assert_eq!(self.in_flight, 0);
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
            let inputs = broadcast_tensors(&*group.tensor, None, 0)?;
            run_first_range(&**model, group, &inputs)?;
            return Ok(());
        }
        let hidden = recv_tensors(group.whole(), group.previous())?.map_err(|reason| Error::Rank { reason });
        let hidden = hidden.and_then(|hidden| model.blocks(hidden.to_device(&group.device)?));
        let hidden = stop_if_lost(hidden)?;
        if !group.range.is_last() {
            return send_tensors(group.whole(), &hidden, group.next());
        }
        let output = stop_if_lost(hidden.and_then(|hidden| model.output(hidden)))?;
        // The ranks of a range all have the output; the first of them hands it to the leader.
        if group.tensor.rank() == 0 { send_tensors(group.whole(), &output, 0) } else { Ok(()) }
    }
}

/// The first range's part, on every rank of it. With one range that is all, and the output is returned.
fn run_first_range(model: &dyn BlockModel, group: &RankGroup, inputs: &Tensors) -> Result<Option<Result<Tensors>>> {
    let hidden = inputs.to_device(&group.device).map_err(Error::from).and_then(|inputs| model.embed(&inputs));
    let hidden = stop_if_lost(hidden.and_then(|hidden| model.blocks(hidden)))?;
    if !group.range.is_last() {
        send_tensors(group.whole(), &hidden, group.next())?;
        return Ok(None);
    }
    let output = hidden.and_then(|hidden| model.output(hidden));
    stop_if_lost(output.and_then(|output| Ok(output.to_device(&Device::Cpu)?))).map(Some)
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
        write!(f, "BlockRunner({:?}, {} in flight)", self.group, self.in_flight)
    }
}

impl std::fmt::Debug for Follower {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Follower({:?})", self.group)
    }
}
