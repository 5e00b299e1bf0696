//! The collectives, written once over point-to-point links.
//!
//! Threads of one process and processes on several hosts differ in their [`Link`] only, so they give the same bits.

use std::sync::Arc;

use candle_core::{DType, Device, Tensor};

use crate::collective::Collective;
use crate::ops::host::read;
use crate::ops::kernels::streaming::append_sum;
use crate::{Error, Result};

/// Floats of a piece of a large sum: 1 MiB, which is in the caches still when it is added, and worth waking for.
const PIECE: usize = 1 << 18;
/// Of a sum that goes in pieces, at least.
const LARGE: usize = 4 * PIECE;
/// Pieces that a rank sends before it has taken the first: twice as many, and one, are unread at most, for which a ring has room.
const AHEAD: usize = 2;

/// Ordered, reliable delivery between any two ranks. A send never waits for the receiver.
pub trait Link: Send + Sync {
    /// This end.
    fn rank(&self) -> usize;
    /// How many ends there are.
    fn size(&self) -> usize;
    /// Hands a tensor to `to`.
    fn send(&self, x: &Tensor, to: usize) -> Result<()>;
    /// Takes the next tensor from `from`; fails when that rank is lost.
    fn recv(&self, from: usize) -> Result<Tensor>;
    /// Takes the next tensor from `from`, of `len` floats, and lends them to `f`, where they lie if they can be read there: for what is read once.
    ///
    /// # Errors
    /// As [`Self::recv`], and when it is another tensor.
    fn recv_floats(&self, from: usize, len: usize, f: &mut dyn FnMut(&[f32])) -> Result<()> {
        lend_floats(&self.recv(from)?, len, f)
    }

    /// Hands `x` to each of `to` and takes a tensor of `x`'s shape and type from each of `from`, who do the same at the same
    /// time. What only ranks that meet in one call can do at a device's speed.
    fn exchange(&self, x: &Tensor, to: &[usize], from: &[usize]) -> Result<Vec<Tensor>> {
        to.iter().try_for_each(|to| self.send(x, *to))?;
        from.iter().map(|from| self.recv(*from)).collect()
    }
}

/// Lends the `len` floats that a tensor is to have.
pub(crate) fn lend_floats(x: &Tensor, len: usize, f: &mut dyn FnMut(&[f32])) -> Result<()> {
    if x.dtype() != DType::F32 || x.elem_count() != len {
        return Err(not_floats(x.dtype(), x.dims(), len));
    }
    read(x, f)
}

/// A tensor that is not `len` floats.
pub(crate) fn not_floats(dtype: DType, dims: &[usize], len: usize) -> Error {
    Error::Frame(format!("{dims:?} of {dtype:?}, not {len} of {:?}", DType::F32))
}

/// Some of the ranks of a link, in an order of their own: a whole group, or the tensor-parallel ranks of one block range.
#[derive(Clone)]
pub struct Mesh {
    link: Arc<dyn Link>,
    members: Vec<usize>,
    rank: usize,
}

impl Mesh {
    /// All ranks of `link`.
    pub fn whole(link: Arc<dyn Link>) -> Self {
        Self { members: (0..link.size()).collect(), rank: link.rank(), link }
    }

    /// The part of this group that holds `ranks` (indices in this group), in that order.
    ///
    /// # Errors
    /// When this rank is not among them.
    pub fn subgroup(&self, ranks: &[usize]) -> Result<Self> {
        let rank = ranks.iter().position(|r| *r == self.rank);
        let rank = rank.ok_or_else(|| Error::Frame(format!("rank {} is not in the subgroup {ranks:?}", self.rank)))?;
        let members = ranks.iter().map(|r| self.members.get(*r).copied()).collect::<Option<_>>();
        let members =
            members.ok_or_else(|| Error::Frame(format!("the subgroup {ranks:?} names ranks that are not in the group")))?;
        Ok(Self { link: self.link.clone(), members, rank })
    }

    /// The sum of `x` and what `member` has, who does the same at the same time.
    fn sum_in_pieces(&self, x: &Tensor, member: usize, mine_first: bool) -> Result<Tensor> {
        let (flat, len) = (x.flatten_all()?, x.elem_count());
        let send = |first: usize| match len.checked_sub(first) {
            None | Some(0) => Ok(()),
            Some(rest) => self.link.send(&flat.narrow(0, first, rest.min(PIECE))?, member),
        };
        (0..AHEAD).try_for_each(|piece| send(piece * PIECE))?;
        let mut sum = Vec::with_capacity(len);
        for first in (0..len).step_by(PIECE) {
            let mine = flat.narrow(0, first, PIECE.min(len - first))?;
            read(&mine, |mine| {
                self.link.recv_floats(member, mine.len(), &mut |theirs| {
                    let [lower, upper] = if mine_first { [mine, theirs] } else { [theirs, mine] };
                    append_sum(&mut sum, lower, upper);
                })
            })??;
            send(first + AHEAD * PIECE)?;
        }
        Ok(Tensor::from_vec(sum, x.shape(), &Device::Cpu)?)
    }

    /// Everyone's `x`, in rank order.
    fn everyones(&self, x: &Tensor) -> Result<Vec<Tensor>> {
        let others: Vec<usize> = self.others().map(|other| self.members[other]).collect();
        let mut all = self.link.exchange(x, &others, &others)?;
        all.insert(self.rank, x.clone());
        Ok(all)
    }

    fn others(&self) -> impl Iterator<Item = usize> + use<> {
        let rank = self.rank;
        (0..self.members.len()).filter(move |r| *r != rank)
    }

    /// The rank of the link that is `rank` here.
    fn member(&self, rank: usize) -> Result<usize> {
        self.members.get(rank).copied().ok_or_else(|| Error::Frame(format!("there is no rank {rank}")))
    }
}

impl Collective for Mesh {
    fn rank(&self) -> usize {
        self.rank
    }

    fn size(&self) -> usize {
        self.members.len()
    }

    /// A butterfly: at each level of the tree, ranks swap the sums of neighbouring subtrees and add the lower one first.
    fn all_reduce(&self, x: &Tensor) -> Result<Tensor> {
        let size = self.size();
        if !matches!(size, 1 | 2 | 4 | 8) {
            return Err(Error::GroupSize { size });
        }
        let mut sum = x.clone();
        let mut distance = 1;
        while distance < size {
            let peer = self.rank ^ distance;
            let member = self.member(peer)?;
            sum = if sum.device().is_cpu() && sum.dtype() == DType::F32 && sum.elem_count() >= LARGE {
                self.sum_in_pieces(&sum, member, peer > self.rank)?
            } else {
                let gone = || Error::PeerLost { rank: member, reason: "it gave nothing".into() };
                let other = self.link.exchange(&sum, &[member], &[member])?.pop().ok_or_else(gone)?;
                if peer > self.rank { (sum + other)? } else { (other + sum)? }
            };
            distance *= 2;
        }
        Ok(sum)
    }

    fn all_gather(&self, x: &Tensor, dim: usize) -> Result<Tensor> {
        if self.size() == 1 {
            return Ok(x.clone());
        }
        Ok(Tensor::cat(&self.everyones(x)?, dim)?)
    }

    fn broadcast(&self, x: Option<&Tensor>, root: usize) -> Result<Tensor> {
        if self.rank != root {
            return self.recv(root);
        }
        let x = x.ok_or_else(|| Error::Frame("the root of a broadcast gave nothing".into()))?;
        for to in self.others() {
            self.send(x, to)?;
        }
        Ok(x.clone())
    }

    fn send(&self, x: &Tensor, to: usize) -> Result<()> {
        self.link.send(x, self.member(to)?)
    }

    fn recv(&self, from: usize) -> Result<Tensor> {
        self.link.recv(self.member(from)?)
    }

    fn any(&self, flag: bool) -> Result<bool> {
        let flags = self.everyones(&Tensor::new(&[u8::from(flag)], &Device::Cpu)?)?;
        for flag in flags {
            if flag.to_dtype(DType::U8)?.to_vec1::<u8>()?.contains(&1) {
                return Ok(true);
            }
        }
        Ok(false)
    }
}

impl std::fmt::Debug for Mesh {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Mesh(rank {} of {:?})", self.rank, self.members)
    }
}

#[cfg(test)]
mod tests {
    use std::thread;

    use super::*;
    use crate::InProcess;

    /// Runs `f` on `size` ranks that are threads and returns what each gave.
    fn on_ranks<T: Send>(size: usize, f: impl Fn(Mesh) -> T + Sync) -> Vec<T> {
        thread::scope(|s| {
            let f = &f;
            let ranks: Vec<_> =
                InProcess::group(size).into_iter().map(|link| s.spawn(move || f(Mesh::whole(Arc::new(link))))).collect();
            ranks.into_iter().map(|r| r.join().unwrap()).collect()
        })
    }

    fn value(rank: usize) -> Tensor {
        Tensor::new(&[1.0f32 / (rank as f32 + 3.0), 1e8, -1e8 + rank as f32], &Device::Cpu).unwrap()
    }

    #[test]
    fn all_reduce_gives_every_rank_the_balanced_tree() {
        let sums = on_ranks(8, |mesh| mesh.all_reduce(&value(mesh.rank())).unwrap().to_vec1::<f32>().unwrap());
        let pair = |a: Tensor, b: Tensor| (a + b).unwrap();
        let quad = |i| pair(pair(value(i), value(i + 1)), pair(value(i + 2), value(i + 3)));
        let expected = pair(quad(0), quad(4)).to_vec1::<f32>().unwrap();
        assert!(sums.iter().all(|s| *s == expected), "{sums:?} is not {expected:?}");
    }

    #[test]
    fn large_sums_have_the_same_bits() {
        // Of several pieces, the last one short, and not where its rows begin.
        let value = |rank: usize| {
            let floats = |i: usize| ((i * 7919 + rank * 31) % 1013) as f32 / (rank as f32 + 3.0);
            let x = Tensor::from_vec((0..2 * LARGE + 1002).map(floats).collect::<Vec<_>>(), (2, LARGE + 501), &Device::Cpu);
            x.unwrap().narrow(1, 1, LARGE + 500).unwrap()
        };
        let sums = on_ranks(4, |mesh| mesh.all_reduce(&value(mesh.rank())).unwrap().to_vec2::<f32>().unwrap());
        let pair = |a: Tensor, b: Tensor| (a + b).unwrap();
        let expected = pair(pair(value(0), value(1)), pair(value(2), value(3))).to_vec2::<f32>().unwrap();
        assert!(sums.iter().all(|s| *s == expected));
    }

    #[test]
    fn gather_broadcast_and_any_reach_every_rank() {
        let results = on_ranks(4, |mesh| {
            let mine = Tensor::new(&[[mesh.rank() as f32]], &Device::Cpu).unwrap();
            let all = mesh.all_gather(&mine, 1).unwrap().to_vec2::<f32>().unwrap();
            let root = mesh.broadcast((mesh.rank() == 2).then_some(&mine), 2).unwrap().to_vec2::<f32>().unwrap();
            (all, root, mesh.any(mesh.rank() == 3).unwrap(), mesh.any(false).unwrap())
        });
        for (all, root, some, none) in results {
            assert_eq!((all, root, some, none), (vec![vec![0., 1., 2., 3.]], vec![vec![2.]], true, false));
        }
    }

    #[test]
    fn subgroups_sum_among_themselves() {
        let sums = on_ranks(4, |mesh| {
            let half = if mesh.rank() < 2 { [0, 1] } else { [2, 3] };
            let part = mesh.subgroup(&half).unwrap();
            part.all_reduce(&Tensor::new(&[mesh.rank() as f32], &Device::Cpu).unwrap()).unwrap().to_vec1::<f32>().unwrap()[0]
        });
        assert_eq!(sums, [1., 1., 5., 5.]);
    }

    #[test]
    fn a_lost_rank_fails_the_others_instead_of_hanging_them() {
        let results =
            on_ranks(4, |mesh| if mesh.rank() == 3 { Err(Error::Frame("gone".into())) } else { mesh.all_reduce(&value(0)) });
        assert!(results[..3].iter().all(|r| matches!(r, Err(Error::PeerLost { .. }))), "{results:?}");
    }
}
