//! Runs one network on a group of ranks that are threads of the test.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread;

use models::blocks::{BlockModel, Layout, RangeOf, RankGroup, recv_tensors, send_tensors};
use models::{Error, Result};
use parallel::ops::Products;
use parallel::{DType, Device, InProcess, Tensors, Weights};

/// What a run on several ranks came to.
#[derive(Debug)]
pub struct Ran {
    /// The output of each rank of the last range; they should be equal.
    pub outputs: Vec<Tensors>,
    /// Bytes of weights each rank read.
    pub bytes_read: Vec<u64>,
    /// Bytes of weights in the whole checkpoint.
    pub total_bytes: u64,
}

impl Ran {
    /// The tensor of that name from the last range's first rank.
    pub fn output(&self, name: &str) -> Result<&parallel::Tensor> {
        let missing = || parallel::Error::MissingInput { name: name.to_owned() };
        Ok(self.outputs.first().ok_or_else(missing)?.get(name)?)
    }
}

/// Loads the checkpoint in `dir` in f32 on every rank of a group of `layout`, each its slice, and runs it once on `inputs`; every rank
/// multiplies as the thread that calls this does.
///
/// # Errors
/// The first rank's that has a reason of its own, rather than a lost peer.
pub fn run_block_model<M: BlockModel>(
    dir: &Path,
    layout: Layout,
    inputs: &Tensors,
    load: impl Fn(&Weights, RangeOf) -> Result<M> + Sync,
) -> Result<Ran> {
    let (load, products) = (&load, Products::here());
    let run = move |link: InProcess| products.scope(|| run_rank(dir, RankGroup::new(Arc::new(link), layout)?, inputs, load));
    let results: Vec<Result<RanRank>> = thread::scope(|scope| {
        let ranks: Vec<_> = InProcess::group(layout.ranks()).into_iter().map(|link| scope.spawn(move || run(link))).collect();
        ranks.into_iter().map(|rank| rank.join().unwrap_or(Err(Error::Cancelled))).collect()
    });
    let (mut done, mut errors) = (Vec::new(), Vec::new());
    for result in results {
        match result {
            Ok(rank) => done.push(rank),
            Err(e) => errors.push(e),
        }
    }
    let lost = |e: &Error| matches!(e, Error::Parallel(parallel::Error::PeerLost { .. }));
    if let Some(cause) = errors.iter().position(|e| !lost(e)).or(errors.len().checked_sub(1)) {
        return Err(errors.swap_remove(cause));
    }
    Ok(Ran {
        bytes_read: done.iter().map(|rank| rank.bytes_read).collect(),
        total_bytes: done.first().map_or(0, |rank| rank.total_bytes),
        outputs: done.into_iter().filter_map(|rank| rank.output).collect(),
    })
}

struct RanRank {
    /// Kept until all ranks are done: one that leaves counts as lost, even with nothing left to say.
    _group: RankGroup,
    output: Option<Tensors>,
    bytes_read: u64,
    total_bytes: u64,
}

fn run_rank<M: BlockModel>(
    dir: &Path,
    group: RankGroup,
    inputs: &Tensors,
    load: &impl Fn(&Weights, RangeOf) -> Result<M>,
) -> Result<RanRank> {
    let weights = Weights::open(dir, group.tensor.clone(), DType::F32, &Device::Cpu)?;
    let model = load(&weights, group.range)?;
    let hidden = if group.range.is_first() {
        model.embed(inputs)?
    } else {
        let received = recv_tensors(group.whole(), group.previous())?;
        received.map_err(|error| parallel::Error::Frame(format!("the previous range failed: {error}")))?
    };
    let hidden = model.blocks(hidden);
    let output = if group.range.is_last() {
        Some(model.output(hidden?)?)
    } else {
        send_tensors(group.whole(), &hidden, group.next())?;
        hidden?;
        None
    };
    Ok(RanRank {
        _group: group,
        output,
        bytes_read: weights.bytes_read().load(Ordering::Relaxed),
        total_bytes: weights.total_bytes(),
    })
}
