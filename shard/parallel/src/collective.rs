//! Communication among the ranks that hold slices of one component.

use candle_core::Tensor;

use crate::{Error, Result};

/// Communication among the ranks that hold slices of one component.
///
/// Calls block; every rank of the group makes the same calls in the same order. A lost peer is an error on every other
/// rank, never a hang.
pub trait Collective: Send + Sync {
    /// This rank's index in the group.
    fn rank(&self) -> usize;
    /// How many ranks the group has.
    fn size(&self) -> usize;
    /// Sum over all ranks (1, 2, 4 or 8) as a balanced binary tree in rank order: every rank gets the same bits, and so
    /// does every group size that divides eight, if a rank's `x` is the sum of its own subtree.
    fn all_reduce(&self, x: &Tensor) -> Result<Tensor>;
    /// The ranks' `x`, all of one shape, side by side along `dim`, in rank order.
    fn all_gather(&self, x: &Tensor, dim: usize) -> Result<Tensor>;
    /// `root`'s `x` on every rank; only `root` gives one.
    fn broadcast(&self, x: Option<&Tensor>, root: usize) -> Result<Tensor>;
    /// Hands `x` to another rank. Does not wait for it to be taken.
    fn send(&self, x: &Tensor, to: usize) -> Result<()>;
    /// Takes the next tensor that `from` sent here. Between processes it arrives in the host's memory.
    fn recv(&self, from: usize) -> Result<Tensor>;
    /// Whether any rank said `true`. Ranks must not act on local facts alone: one that leaves a loop its peers stay in
    /// leaves them waiting.
    fn any(&self, flag: bool) -> Result<bool>;
}

/// The group of one: every collective is the identity.
#[derive(Debug, Clone, Copy, Default)]
pub struct Solo;

impl Collective for Solo {
    fn rank(&self) -> usize {
        0
    }

    fn size(&self) -> usize {
        1
    }

    fn all_reduce(&self, x: &Tensor) -> Result<Tensor> {
        Ok(x.clone())
    }

    fn all_gather(&self, x: &Tensor, _dim: usize) -> Result<Tensor> {
        Ok(x.clone())
    }

    fn broadcast(&self, x: Option<&Tensor>, _root: usize) -> Result<Tensor> {
        x.cloned().ok_or_else(|| Error::Frame("the root of a broadcast gave nothing".into()))
    }

    fn send(&self, _x: &Tensor, to: usize) -> Result<()> {
        Err(Error::PeerLost { rank: to, reason: "a group of one has no peers".into() })
    }

    fn recv(&self, from: usize) -> Result<Tensor> {
        Err(Error::PeerLost { rank: from, reason: "a group of one has no peers".into() })
    }

    fn any(&self, flag: bool) -> Result<bool> {
        Ok(flag)
    }
}

/// A place in a group whose other ranks do not exist: says its rank and size, and fails every exchange. For loading code
/// that is only measured.
#[derive(Debug, Clone, Copy)]
pub struct Placeholder {
    /// The rank.
    pub rank: usize,
    /// The group's size.
    pub size: usize,
}

impl Placeholder {
    fn fail<T>(self) -> Result<T> {
        Err(Error::PeerLost { rank: self.rank, reason: "the group exists on paper only".into() })
    }
}

impl Collective for Placeholder {
    fn rank(&self) -> usize {
        self.rank
    }

    fn size(&self) -> usize {
        self.size
    }

    fn all_reduce(&self, _x: &Tensor) -> Result<Tensor> {
        self.fail()
    }

    fn all_gather(&self, _x: &Tensor, _dim: usize) -> Result<Tensor> {
        self.fail()
    }

    fn broadcast(&self, _x: Option<&Tensor>, _root: usize) -> Result<Tensor> {
        self.fail()
    }

    fn send(&self, _x: &Tensor, _to: usize) -> Result<()> {
        self.fail()
    }

    fn recv(&self, _from: usize) -> Result<Tensor> {
        self.fail()
    }

    fn any(&self, _flag: bool) -> Result<bool> {
        self.fail()
    }
}
