//! Linear layers that know their slice.
//!
//! Megatron's pair: a column-parallel layer divides its outputs over the group, a row-parallel layer its inputs, with one
//! sum over the group after it (<https://arxiv.org/abs/1909.08053>).

use std::fmt;
use std::sync::Arc;

use candle_core::Tensor;

use crate::collective::Collective;
use crate::weights::{Shard, Weights};
use crate::{Error, Result, ops};

/// Into how many fixed chunks a row-parallel layer cuts its input, whatever tp is. tp is 1, 2, 4 or 8.
const CHUNKS: usize = 8;

/// `y = x W^T + b`, whole on every rank.
#[derive(Clone, Debug)]
pub struct Linear {
    weight: Tensor,
    bias: Option<Tensor>,
}

impl Linear {
    /// Reads `weight: [d_out, d_in]` and, if the checkpoint has one, `bias: [d_out]`.
    pub fn load(w: &Weights, d_in: usize, d_out: usize) -> Result<Self> {
        let weight = w.get("weight", &[d_out, d_in], Shard::Replicated)?;
        let bias = w.contains("bias").then(|| w.get("bias", &[d_out], Shard::Replicated)).transpose()?;
        Ok(Self { weight, bias })
    }

    /// `x: [.., d_in]` gives `[.., d_out]`.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        ops::linear(x, &self.weight, self.bias.as_ref())
    }
}

/// `y = x W^T + b`, with the rows of `W` (output features) divided over the group.
#[derive(Clone)]
pub struct ColumnParallelLinear {
    linear: Linear,
    group: Arc<dyn Collective>,
    packed: usize,
}

impl ColumnParallelLinear {
    /// `d_out` lists the parts packed in the output (one for a plain layer); each is divided by itself.
    pub fn load(w: &Weights, d_in: usize, d_out: &[usize]) -> Result<Self> {
        let rows = d_out.iter().sum();
        let shard = Shard::Split { dim: 0, blocks: d_out.to_vec() };
        let weight = w.get("weight", &[rows, d_in], shard.clone())?;
        let bias = w.contains("bias").then(|| w.get("bias", &[rows], shard)).transpose()?;
        Ok(Self { linear: Linear { weight, bias }, group: w.group().clone(), packed: d_out.len() })
    }

    /// `x: [.., d_in]`, equal on every rank, gives this rank's `[.., d_out/tp]`: its slice of every packed part.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        self.linear.forward(x)
    }

    /// As [`Self::forward`], then gathered: `[.., d_out]` on every rank. For a layer of one part only (AdaLN modulation
    /// packs equal parts: load it as one part, the gather restores their order).
    pub fn forward_gathered(&self, x: &Tensor) -> Result<Tensor> {
        debug_assert_eq!(self.packed, 1, "gathering would interleave packed parts");
        let y = self.linear.forward(x)?;
        self.group.all_gather(&y, y.rank() - 1)
    }
}

/// `y = x W^T + b`, with the columns of `W` (input features) divided over the group.
///
/// The input is cut into eight fixed chunks whatever tp is; the chunks' products are added as one balanced tree, its lower
/// levels here and its upper ones in [`Collective::all_reduce`]. So every tp gives the same order of additions.
#[derive(Clone)]
pub struct RowParallelLinear {
    chunks: Vec<Chunk>,
    bias: Option<Tensor>,
    group: Arc<dyn Collective>,
}

/// One of the eight: the pieces of the input it reads (one per packed part) and their weights.
#[derive(Clone)]
struct Chunk {
    /// Start and length in this rank's input.
    pieces: Vec<(usize, usize)>,
    weight: Tensor,
}

impl RowParallelLinear {
    /// `d_in` lists the parts packed in the input (one for a plain layer); each is divided by itself.
    pub fn load(w: &Weights, d_in: &[usize], d_out: usize) -> Result<Self> {
        let (rank, tp) = (w.group().rank(), w.group().size());
        if !CHUNKS.is_multiple_of(tp) {
            return Err(Error::GroupSize { size: tp });
        }
        let shard = Shard::Split { dim: 1, blocks: d_in.to_vec() };
        let weight = w.get("weight", &[d_out, d_in.iter().sum()], shard)?;
        let bias = w.contains("bias").then(|| w.get("bias", &[d_out], Shard::Replicated)).transpose()?;
        // When only bytes are counted, cutting would make a zero of every element.
        let mine = if w.is_measuring() { 0..0 } else { rank * CHUNKS / tp..(rank + 1) * CHUNKS / tp };
        let chunks = mine.map(|chunk| Chunk::cut(&weight, d_in, tp, rank, chunk)).collect::<Result<_>>()?;
        Ok(Self { chunks, bias, group: w.group().clone() })
    }

    /// This rank's `x: [.., d_in/tp]` gives the same `[.., d_out]` on every rank.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let parts = self.chunks.iter().map(|chunk| chunk.forward(x)).collect::<Result<Vec<_>>>()?;
        let y = self.group.all_reduce(&tree_sum(parts)?)?;
        // After the sum, or the bias would be counted once per rank.
        match &self.bias {
            Some(bias) => Ok(y.broadcast_add(bias)?),
            None => Ok(y),
        }
    }
}

impl Chunk {
    fn cut(weight: &Tensor, d_in: &[usize], tp: usize, rank: usize, chunk: usize) -> Result<Self> {
        let mut pieces = Vec::new();
        let mut before = 0; // features of this rank in earlier parts
        for part in d_in {
            let (start, end) = (chunk * part / CHUNKS, (chunk + 1) * part / CHUNKS);
            pieces.push((before + start - rank * part / tp, end - start));
            before += part / tp;
        }
        let columns = pieces.iter().map(|(at, n)| weight.narrow(1, *at, *n)).collect::<Result<Vec<_>, _>>()?;
        Ok(Self { weight: Tensor::cat(&columns, 1)?.contiguous()?, pieces })
    }

    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let last = x.rank() - 1;
        if self.weight.dim(1)? == 0 {
            // A layer narrower than eight has empty chunks.
            let mut shape = x.dims().to_vec();
            shape[last] = self.weight.dim(0)?;
            return Ok(Tensor::zeros(shape, x.dtype(), x.device())?);
        }
        let pieces = self.pieces.iter().map(|(at, n)| x.narrow(last, *at, *n)).collect::<Result<Vec<_>, _>>()?;
        ops::linear(&Tensor::cat(&pieces, last)?, &self.weight, None)
    }
}

/// Adds a power of two of tensors as a balanced binary tree.
fn tree_sum(mut level: Vec<Tensor>) -> Result<Tensor> {
    while level.len() > 1 {
        level =
            level.chunks(2).map(|pair| if let [a, b] = pair { a + b } else { Ok(pair[0].clone()) }).collect::<Result<_, _>>()?;
    }
    level.pop().ok_or(Error::GroupSize { size: 0 })
}

impl fmt::Debug for ColumnParallelLinear {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ColumnParallelLinear({:?}, rank {} of {})", self.linear.weight.shape(), self.group.rank(), self.group.size())
    }
}

impl fmt::Debug for RowParallelLinear {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "RowParallelLinear({} chunks, rank {} of {})", self.chunks.len(), self.group.rank(), self.group.size())
    }
}
