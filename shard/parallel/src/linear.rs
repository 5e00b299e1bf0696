//! Linear layers that know their slice.
//!
//! Megatron's pair: a column-parallel layer divides its outputs over the group, a row-parallel layer its inputs, with one
//! sum over the group after it (<https://arxiv.org/abs/1909.08053>).

use std::fmt;
use std::ops::Range;
use std::sync::Arc;

use candle_core::{D, DType, Tensor};

use crate::collective::Collective;
use crate::lora::{Cut, Patch, Site};
use crate::ops::{Activation, Chunks, Features, LaidOut, Matrix};
use crate::weights::{Shard, Weights};
use crate::{Error, Result, ops};

/// Into how many fixed chunks a row-parallel layer cuts its input, whatever tp is. tp is 1, 2, 4 or 8.
const CHUNKS: usize = 8;

/// The part of `size` features that this rank of `group` has in a layer that may be cut unevenly: see
/// [`RowParallelLinear::load_uneven`].
pub fn share(size: usize, group: &dyn Collective) -> Range<usize> {
    let (rank, tp) = (group.rank(), group.size());
    rank * size / tp..(rank + 1) * size / tp
}

/// `y = x W^T + b`, whole on every rank.
#[derive(Clone, Debug)]
pub struct Linear {
    weight: Matrix,
    bias: Option<Tensor>,
    patch: Option<Patch>,
}

impl Linear {
    /// Reads `weight: [d_out, d_in]` and, if the checkpoint has one, `bias: [d_out]`.
    pub fn load(w: &Weights, d_in: usize, d_out: usize) -> Result<Self> {
        let weight = w.matrix("weight", &[d_out, d_in], Shard::Replicated, None)?;
        let bias = w.contains("bias").then(|| w.get("bias", &[d_out], Shard::Replicated)).transpose()?;
        Ok(Self { weight, bias, patch: Some(patch(w, d_in, d_out, Cut::Whole)) })
    }

    /// Reads some rows of `weight: [d_out, d_in]` and, if the checkpoint has one, of `bias: [d_out]`: those output features, one
    /// part after the other.
    pub fn load_rows(w: &Weights, [d_in, d_out]: [usize; 2], rows: &[Range<usize>]) -> Result<Self> {
        let shard = Shard::Parts { dim: 0, parts: rows.to_vec() };
        let weight = w.matrix("weight", &[d_out, d_in], shard.clone(), None)?;
        let bias = w.contains("bias").then(|| w.get("bias", &[d_out], shard)).transpose()?;
        Ok(Self { weight, bias, patch: Some(patch(w, d_in, d_out, Cut::Rows(rows.to_vec()))) })
    }

    /// Reads one of the three parts of a `torch.nn.MultiheadAttention`'s packed projections of width `d`: `in_proj_weight: [3 d, d]` and
    /// `in_proj_bias: [3 d]` hold those of queries, keys and values. Adapters do not change it.
    pub fn load_in_proj(w: &Weights, d: usize, part: usize) -> Result<Self> {
        let shard = Shard::part(0, part * d..(part + 1) * d);
        let weight = w.matrix("in_proj_weight", &[3 * d, d], shard.clone(), None)?;
        Ok(Self { weight, bias: Some(w.get("in_proj_bias", &[3 * d], shard)?), patch: None })
    }

    /// Reads a slice of `weight: [d_out, d_in..]`, without a bias. Adapters do not change it.
    pub fn load_fixed(w: &Weights, full_shape: &[usize], shard: Shard) -> Result<Self> {
        Ok(Self { weight: w.matrix("weight", full_shape, shard, None)?, bias: None, patch: None })
    }

    /// `x: [.., d_in]` gives `[.., d_out]`.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        self.finish(x, self.weight.product(x, self.bias.as_ref(), None)?)
    }

    /// As [`Self::forward`] of each, of the same `x`, which is laid out for all of them once.
    pub fn forward_all<const N: usize>(layers: [&Self; N], x: &Tensor) -> Result<[Tensor; N]> {
        let laid_out = match layers.first() {
            Some(first) => first.weight.lay_out(&[Features::Whole(x)])?,
            None => None,
        };
        let mut all = layers.map(|_| x.clone());
        for (y, layer) in all.iter_mut().zip(layers) {
            *y = match &laid_out {
                Some(laid_out) if layer.weight.takes(laid_out) => {
                    layer.finish(x, layer.weight.product_of(laid_out, layer.bias.as_ref())?)?
                }
                _ => layer.forward(x)?,
            };
        }
        Ok(all)
    }

    /// `y`, the product and bias, with what adapters add for `x`.
    fn finish(&self, x: &Tensor, y: Tensor) -> Result<Tensor> {
        let y = match &self.patch {
            Some(patch) => patch.add(x, y)?,
            None => y,
        };
        Ok(y.to_dtype(x.dtype())?)
    }

    /// As [`Self::forward`], then `activation`: on the way out, where nothing comes between.
    fn forward_activated(&self, x: &Tensor, activation: Activation) -> Result<Tensor> {
        if x.dtype() == DType::F32 && !self.is_adapted() {
            return self.weight.product(x, self.bias.as_ref(), Some(activation));
        }
        ops::activate(&self.forward(x)?, activation)
    }

    /// Whether adapters change it now.
    fn is_adapted(&self) -> bool {
        self.patch.as_ref().is_some_and(Patch::is_active)
    }
}

/// The layer's place among those that adapters can change.
fn patch(w: &Weights, d_in: usize, d_out: usize, cut: Cut) -> Patch {
    w.adapters().register(Site { name: w.prefix().to_owned(), d_in, d_out, kernel: None, cut }, w.group())
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
        Self::load_kernel(w, &[d_in], d_out)
    }

    /// As [`Self::load`] from `weight: [d_out, kernel..]`: a convolution of windows that touch and do not overlap is a linear layer
    /// of them. `x: [.., d_in]` is then a window, flattened in the kernel's order.
    pub fn load_kernel(w: &Weights, kernel: &[usize], d_out: &[usize]) -> Result<Self> {
        let rows = d_out.iter().sum();
        let shard = Shard::Split { dim: 0, blocks: d_out.to_vec() };
        let weight = w.matrix("weight", &[&[rows], kernel].concat(), shard.clone(), None)?;
        let bias = w.contains("bias").then(|| w.get("bias", &[rows], shard)).transpose()?;
        let patch = Some(patch(w, kernel.iter().product(), rows, Cut::Outputs(d_out.to_vec())));
        Ok(Self { linear: Linear { weight, bias, patch }, group: w.group().clone(), packed: d_out.len() })
    }

    /// `x: [.., d_in]`, equal on every rank, gives this rank's `[.., d_out/tp]`: its slice of every packed part.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        self.linear.forward(x)
    }

    /// As [`Self::forward`] of each, of the same `x`: see [`Linear::forward_all`].
    pub fn forward_all<const N: usize>(layers: [&Self; N], x: &Tensor) -> Result<[Tensor; N]> {
        Linear::forward_all(layers.map(|layer| &layer.linear), x)
    }

    /// As [`Self::forward`], then `activation`.
    pub fn forward_activated(&self, x: &Tensor, activation: Activation) -> Result<Tensor> {
        self.linear.forward_activated(x, activation)
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
    weight: Matrix,
    bias: Option<Tensor>,
    patch: Patch,
    group: Arc<dyn Collective>,
}

impl RowParallelLinear {
    /// `d_in` lists the parts packed in the input (one for a plain layer); each is divided by itself.
    pub fn load(w: &Weights, d_in: &[usize], d_out: usize) -> Result<Self> {
        Self::load_shard(w, d_in, d_out, Shard::Split { dim: 1, blocks: d_in.to_vec() })
    }

    /// As [`Self::load`] for an input of one part that tp need not divide: this rank's are the features of [`share`].
    pub fn load_uneven(w: &Weights, d_in: usize, d_out: usize) -> Result<Self> {
        Self::load_shard(w, &[d_in], d_out, Shard::part(1, share(d_in, &**w.group())))
    }

    fn load_shard(w: &Weights, d_in: &[usize], d_out: usize, shard: Shard) -> Result<Self> {
        let (rank, tp) = (w.group().rank(), w.group().size());
        if !CHUNKS.is_multiple_of(tp) {
            return Err(Error::GroupSize { size: tp });
        }
        let weight = w.matrix("weight", &[d_out, d_in.iter().sum()], shard, Some(chunks(d_in, tp, rank)))?;
        let bias = w.contains("bias").then(|| w.get("bias", &[d_out], Shard::Replicated)).transpose()?;
        let patch = patch(w, d_in.iter().sum(), d_out, Cut::Inputs(d_in.to_vec())).reducing(w.group());
        Ok(Self { weight, bias, patch, group: w.group().clone() })
    }

    /// This rank's `x: [.., d_in/tp]` gives the same `[.., d_out]` on every rank.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let y = self.sum(|bias| self.weight.product(x, bias, None))?;
        Ok(self.patch.add(x, y)?.to_dtype(x.dtype())?)
    }

    /// As [`Self::forward`] of parts that lie side by side: with what comes from a layer, that is written nowhere but where it is multiplied,
    /// rounded as the product takes it.
    pub fn forward_parts(&self, parts: &[Part<'_>]) -> Result<Tensor> {
        if let Some(x) = self.lay_out(parts)? {
            return self.sum(|bias| self.weight.product_of(&x, bias));
        }
        let parts = parts.iter().map(Part::tensor).collect::<Result<Vec<_>>>()?;
        match parts.as_slice() {
            [x] => self.forward(x),
            [a, b] => self.forward(&ops::join(a, b)?),
            parts => self.forward(&Tensor::cat(parts, D::Minus1)?),
        }
    }

    /// `None` where adapters have to see what is multiplied, or where it cannot be laid out before.
    fn lay_out(&self, parts: &[Part<'_>]) -> Result<Option<LaidOut>> {
        let adapted = |part: &Part<'_>| matches!(part, Part::Activated { layer, .. } if layer.linear.is_adapted());
        if self.patch.is_active() || parts.iter().any(adapted) {
            return Ok(None);
        }
        let inputs = parts.iter().map(|part| match part {
            Part::Tensor(_) => Ok(None),
            Part::Activated { layer, x, .. } => layer.linear.weight.lay_out(&[Features::Whole(x)]),
        });
        let inputs = inputs.collect::<Result<Vec<_>>>()?;
        let features = parts.iter().zip(&inputs).map(|(part, inputs)| match (part, inputs) {
            (Part::Tensor(x), _) => Some(Features::Whole(x)),
            (Part::Activated { layer, activation, .. }, Some(x)) => {
                let Linear { weight, bias, .. } = &layer.linear;
                Some(Features::Layer { x, weight, bias: bias.as_ref(), activation: Some(*activation) })
            }
            (Part::Activated { .. }, None) => None,
        });
        features.collect::<Option<Vec<_>>>().map_or(Ok(None), |features| self.weight.lay_out(&features))
    }

    /// Of this rank's product, given the bias, over all ranks.
    fn sum(&self, product: impl Fn(Option<&Tensor>) -> Result<Tensor>) -> Result<Tensor> {
        if self.group.size() == 1 {
            return product(self.bias.as_ref());
        }
        // Sums travel unrounded: rounded ones would depend on how many ranks there are.
        let y = self.group.all_reduce(&product(None)?)?;
        // After the sum, or the bias would be counted once per rank.
        match &self.bias {
            Some(bias) => Ok(y.broadcast_add(&bias.to_dtype(y.dtype())?)?),
            None => Ok(y),
        }
    }
}

/// Some features of what goes into a layer.
#[derive(Clone, Copy, Debug)]
pub enum Part<'a> {
    /// `[.., d]`
    Tensor(&'a Tensor),
    /// What a layer makes of `x`, activated.
    Activated {
        /// Of this rank's outputs.
        layer: &'a ColumnParallelLinear,
        /// `[.., d_in]`
        x: &'a Tensor,
        /// What comes after the layer.
        activation: Activation,
    },
}

impl Part<'_> {
    fn tensor(&self) -> Result<Tensor> {
        match self {
            Self::Tensor(x) => Ok((*x).clone()),
            Self::Activated { layer, x, activation } => layer.forward_activated(x, *activation),
        }
    }
}

/// This rank's share of the eight: for each, the piece it reads of every part packed in the input, by its place on this rank.
pub(crate) fn chunks(d_in: &[usize], tp: usize, rank: usize) -> Chunks {
    let pieces = |chunk: usize| {
        let mut before = 0; // features of this rank in earlier parts
        let piece = |part: &usize| {
            let (start, end) = (chunk * part / CHUNKS, (chunk + 1) * part / CHUNKS);
            let at = before + start - rank * part / tp;
            before += part / tp;
            (at, end - start)
        };
        d_in.iter().map(piece).collect()
    };
    (rank * CHUNKS / tp..(rank + 1) * CHUNKS / tp).map(pieces).collect()
}

impl fmt::Debug for ColumnParallelLinear {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ColumnParallelLinear({:?}, rank {} of {})", self.linear.weight, self.group.rank(), self.group.size())
    }
}

impl fmt::Debug for RowParallelLinear {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "RowParallelLinear({:?}, rank {} of {})", self.weight, self.group.rank(), self.group.size())
    }
}

#[cfg(test)]
mod tests;
