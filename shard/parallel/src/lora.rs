//! Low-rank adapters (LoRA, <https://arxiv.org/abs/2106.09685>), never merged: a layer that adapters are active on gives
//! `W x + b + sum_i scale_i (alpha_i / rank_i) B_i (A_i x)`. Of a convolution, `A_i` is one that is laid where the layer's kernel is,
//! and `B_i` one of single pixels.
//!
//! Every linear layer and every convolution has a *site* here, by the full name of its weight, which it registers when it loads.
//! What is active is said for each item (dimension 0) of a forward, so items of one batch can have adapters of their own; an item
//! without any keeps its exact bits, and what is added to an item does not depend on its neighbours. Products are in f32, and each
//! is cut as the layer is: a column-parallel layer holds `A` whole and its rows (or channels) of `B`, a row-parallel one its columns
//! of `A` (in the layer's own eight chunks, with one sum of `[.., rank]` over the group) and `B` whole. So every tp gives the same
//! bits here, too.

use std::collections::HashMap;
use std::fmt;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use candle_core::{DType, Device, Tensor};

use crate::collective::Collective;
use crate::convolution::Placement;
use crate::{Error, Result};

mod pair;

use pair::Pair;

/// A layer that adapters can change: linear, or a convolution.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Site {
    /// The full name of the layer in its checkpoint, such as `transformer_blocks.0.attn.to_q`.
    pub name: String,
    /// Input features or channels, over all ranks.
    pub d_in: usize,
    /// Output features or channels, over all ranks.
    pub d_out: usize,
    /// Side of a convolution's kernel; `None`: a linear layer.
    pub kernel: Option<usize>,
    /// How the layer is divided over the ranks.
    pub cut: Cut,
}

impl Site {
    /// Numbers that each output is made of: the columns of `A`.
    pub fn width(&self) -> usize {
        self.d_in * self.kernel.map_or(1, |size| size * size)
    }
}

/// How a layer is divided over the ranks of its group.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Cut {
    /// Whole on every rank.
    Whole,
    /// By its outputs, which are these parts side by side.
    Outputs(Vec<usize>),
    /// By its inputs, which are these parts side by side.
    Inputs(Vec<usize>),
    /// Of its outputs this rank has these, one part after the other.
    Rows(Vec<Range<usize>>),
}

/// An adapter's two factors for one site, whole.
#[derive(Clone, Debug)]
pub struct Factors {
    /// The site's name.
    pub site: String,
    /// `A: [rank, d_in]`; of a convolution `[rank, d_in size size]`, flattened in the kernel's order.
    pub a: Tensor,
    /// `B: [d_out, rank]`
    pub b: Tensor,
    /// alpha / rank
    pub factor: f64,
}

/// What one rank holds of an adapter: its slices, for the sites it has.
pub struct Adapter {
    pairs: HashMap<usize, Pair>,
}

/// Consecutive items of a forward, and the adapters that are active on them, each with its scale.
pub type Run = (usize, Vec<(Arc<Adapter>, f64)>);

/// The sites of one rank, and what is active on them now.
pub struct Adapters {
    /// Where the layers compute.
    device: Device,
    /// Whether anything is active: all that a layer looks at when nothing is.
    busy: AtomicBool,
    inner: Mutex<Inner>,
}

#[derive(Default)]
struct Inner {
    sites: Vec<(Site, Arc<dyn Collective>)>,
    by_name: HashMap<String, usize>,
    active: Option<Arc<[Run]>>,
}

impl Adapters {
    /// None yet, for layers that compute on `device`.
    pub fn on(device: &Device) -> Self {
        Self { device: device.clone(), busy: AtomicBool::new(false), inner: Mutex::default() }
    }

    /// All sites, in the order in which they were loaded.
    pub fn sites(&self) -> Vec<Site> {
        self.inner().sites.iter().map(|(site, _)| site.clone()).collect()
    }

    /// Slices an adapter for this rank. Factors for sites that this rank does not have are another range's, and skipped.
    ///
    /// # Errors
    /// Those of `factors`, and [`Error::Shape`] when one does not fit its site.
    pub fn adapter<E: From<Error>>(&self, factors: impl IntoIterator<Item = Result<Factors, E>>) -> Result<Adapter, E> {
        let mut pairs = HashMap::new();
        for factors in factors {
            let factors = factors?;
            let found = {
                let inner = self.inner();
                inner.by_name.get(&factors.site).map(|index| (*index, inner.sites[*index].clone()))
            };
            if let Some((index, (site, group))) = found {
                pairs.insert(index, Pair::of(&factors, &site, &*group, &self.device)?);
            }
        }
        Ok(Adapter { pairs })
    }

    /// Makes adapters active, from the first item to the last, until the guard is dropped.
    pub fn activate(self: &Arc<Self>, runs: Vec<Run>) -> Activated {
        self.inner().active = Some(runs.into());
        self.busy.store(true, Ordering::Relaxed);
        Activated(self.clone())
    }

    pub(crate) fn register(self: &Arc<Self>, site: Site, group: &Arc<dyn Collective>) -> Patch {
        let mut inner = self.inner();
        let index = match inner.by_name.get(&site.name) {
            Some(index) => *index,
            None => {
                let index = inner.sites.len();
                inner.by_name.insert(site.name.clone(), index);
                inner.sites.push((site, group.clone()));
                index
            }
        };
        Patch { adapters: self.clone(), index, reduce: None }
    }

    fn active(&self) -> Option<Arc<[Run]>> {
        // The rank's own thread alone sets it and computes.
        if self.busy.load(Ordering::Relaxed) { self.inner().active.clone() } else { None }
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// For as long as it lives, adapters are active.
#[must_use]
pub struct Activated(Arc<Adapters>);

impl Drop for Activated {
    fn drop(&mut self) {
        self.0.busy.store(false, Ordering::Relaxed);
        self.0.inner().active = None;
    }
}

/// A layer's end: adds what is active on its site.
#[derive(Clone)]
pub(crate) struct Patch {
    adapters: Arc<Adapters>,
    index: usize,
    /// Where `A x` must be summed over: of a row-parallel layer.
    reduce: Option<Arc<dyn Collective>>,
}

impl Patch {
    /// For a layer whose inputs are divided over `group`.
    pub(crate) fn reducing(self, group: &Arc<dyn Collective>) -> Self {
        Self { reduce: Some(group.clone()), ..self }
    }

    /// Whether anything is active on the layer.
    pub(crate) fn is_active(&self) -> bool {
        let holds =
            |runs: &[Run]| runs.iter().flat_map(|(_, uses)| uses).any(|(adapter, _)| adapter.pairs.contains_key(&self.index));
        self.adapters.active().is_some_and(|runs| holds(&runs))
    }

    /// `y`, a linear layer's own output for `x` before it is rounded, and what is active on it. `x: [items, .., d_in]`, or all items
    /// several times, one time after the other: a modulation that is made for two timesteps at once.
    pub(crate) fn add(&self, x: &Tensor, y: Tensor) -> Result<Tensor> {
        self.add_each(x, y, |pair, x| pair.product(x, self.reduce.as_deref()))
    }

    /// As [`Self::add`], of a convolution whose kernel is laid on `x: [items, C_in, H, W]` as `at` says.
    pub(crate) fn add_convolved(&self, x: &Tensor, y: Tensor, at: Placement) -> Result<Tensor> {
        self.add_each(x, y, |pair, x| pair.convolved(x, at))
    }

    fn add_each(&self, x: &Tensor, y: Tensor, change: impl Fn(&Pair, &Tensor) -> Result<Tensor>) -> Result<Tensor> {
        let Some(runs) = self.adapters.active().filter(|_| self.is_active()) else { return Ok(y) };
        let items: usize = runs.iter().map(|(items, _)| items).sum();
        if x.rank() < 2 || items == 0 || !x.dim(0)?.is_multiple_of(items) {
            return Err(Error::Adapted { found: x.dims().to_vec(), items });
        }
        // Of a single run it is all the same.
        let (times, each) = if runs.len() == 1 { (1, x.dim(0)? / items) } else { (x.dim(0)? / items, 1) };
        let y = if y.dtype() == DType::F64 { y } else { y.to_dtype(DType::F32)? };
        let mut rows = Vec::new();
        let mut start = 0;
        for (items, uses) in std::iter::repeat_n(&runs, times).flat_map(|runs| runs.iter()) {
            let items = items * each;
            let mut sum = y.narrow(0, start, items)?;
            let x = x.narrow(0, start, items)?;
            for (adapter, scale) in uses {
                if let Some(pair) = adapter.pairs.get(&self.index) {
                    let change = (change(pair, &x)? * (scale * pair.factor))?;
                    sum = (sum + change.to_dtype(y.dtype())?)?;
                }
            }
            rows.push(sum);
            start += items;
        }
        Ok(Tensor::cat(&rows, 0)?)
    }
}

impl fmt::Debug for Patch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Patch(site {})", self.index)
    }
}

impl fmt::Debug for Adapter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Adapter({} sites)", self.pairs.len())
    }
}

impl fmt::Debug for Adapters {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Adapters({} sites)", self.inner().sites.len())
    }
}

impl fmt::Debug for Activated {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Activated")
    }
}

#[cfg(test)]
mod tests;
