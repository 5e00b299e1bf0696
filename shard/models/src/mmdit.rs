//! What transformers of text and image tokens have in common: AdaLN modulation, feed-forward, joint attention, embeddings of
//! time, and ControlNet residuals (MMDiT: P. Esser et al., "Scaling Rectified Flow Transformers for High-Resolution Image
//! Synthesis", <https://arxiv.org/abs/2403.03206>).
//!
//! Follows diffusers 0.42.1: `models/attention.py`, `models/attention_processor.py`, `models/normalization.py`,
//! `models/embeddings.py`. Heads and MLP columns are divided over the tensor-parallel ranks, and so is AdaLN modulation,
//! which diffusers' plans leave whole on every rank.

use std::collections::BTreeMap;

use parallel::Weights;
use serde_json::Value;

use crate::blocks::RangeOf;
use crate::{Error, Result};

pub(crate) mod attention;
pub(crate) mod cross_attention;
pub(crate) mod embeddings;
pub(crate) mod layers;
pub(crate) mod patches;
pub(crate) mod residuals;
pub(crate) mod stream;

/// Most blocks in one network, so that a configuration cannot make loading loop for hours. FLUX.1 has 57.
pub(crate) const MAX_BLOCKS: usize = 1024;
/// Largest width of any layer, so that products of widths cannot overflow. FLUX.1's largest is 15,360.
pub(crate) const MAX_WIDTH: usize = 1 << 20;

/// Refuses the first field that is nothing, or more than [`MAX_WIDTH`].
pub(crate) fn check_widths<'a>(widths: impl IntoIterator<Item = (&'a str, usize)>) -> Result<()> {
    match widths.into_iter().find(|(_, width)| !(1..=MAX_WIDTH).contains(width)) {
        Some((field, width)) => Err(unsupported(field, &width)),
        None => Ok(()),
    }
}

/// Refuses the first field of `found` that says something else than `fixed`. A number may be written in another way, as `1` and `1.0`.
pub(crate) fn check_fixed(found: &BTreeMap<String, Value>, fixed: &[(&str, Value)]) -> Result<()> {
    let same = |a: &Value, b: &Value| a == b || matches!((a.as_f64(), b.as_f64()), (Some(a), Some(b)) if a == b);
    let other =
        fixed.iter().find_map(|(field, value)| found.get(*field).filter(|found| !same(found, value)).map(|v| (*field, v)));
    match other {
        Some((field, value)) => Err(unsupported(field, value)),
        None => Ok(()),
    }
}

/// A field of a configuration that cannot be so.
pub(crate) fn unsupported(field: &str, value: &dyn std::fmt::Debug) -> Error {
    Error::Unsupported { field: field.into(), value: format!("{value:?}") }
}

/// Refuses heads that cannot be divided over the ranks of `w`.
pub(crate) fn check_heads(w: &Weights, heads: usize) -> Result<()> {
    let tp = w.group().size();
    if !heads.is_multiple_of(tp) {
        return Err(parallel::Error::Indivisible { what: "num_attention_heads".into(), size: heads, tp }.into());
    }
    Ok(())
}

/// Loads a part that only some ranges hold; for the others its tensors, all below `names`, are somebody else's.
pub(crate) fn load_if<T>(held: bool, w: &Weights, names: &[&str], load: impl FnOnce() -> Result<T>) -> Result<Option<T>> {
    if held {
        return load().map(Some);
    }
    names.iter().for_each(|name| w.skip(name));
    Ok(None)
}

/// Loads this range's of `count` blocks, `name.0` and on, each by its place in the row; the tensors of the others are somebody else's.
pub(crate) fn load_range<T>(
    w: &Weights,
    name: &str,
    count: usize,
    range: RangeOf,
    load: impl Fn(&Weights, usize) -> Result<T>,
) -> Result<Vec<T>> {
    let held = range.of(count);
    (0..count).filter(|i| !held.contains(i)).for_each(|i| w.skip(format!("{name}.{i}")));
    held.map(|i| load(&w.pp(name).pp(i), i)).collect()
}

/// The error of a part that [`load_if`] left to another range.
pub(crate) fn not_held(what: &str) -> Error {
    Error::Invalid { field: "block range", reason: format!("the {what} are in another range") }
}
