//! Forwards on ranks that are threads of this process, each with threads of its own.

use std::sync::{Arc, Barrier};
use std::thread;
use std::time::{Duration, Instant};

use indicatif::ProgressBar;
use models::blocks::{Layout, RankGroup, recv_tensors, send_tensors};
use parallel::InProcess;
use parallel::ops::Products;

use super::super::synthetic::{Checkpoint, Network};
use super::memory::{anonymous_bytes, page_faults};
use super::style;
use crate::error::Error;

/// How the network is cut, and what goes through it.
#[derive(Clone, Copy)]
pub(super) struct Work {
    pub(super) layout: Layout,
    /// What every rank multiplies in.
    pub(super) products: Products,
    /// Of each rank.
    pub(super) threads: usize,
    /// Forwards of each job; the next begins when the one before it is done.
    pub(super) steps: usize,
    /// Jobs side by side.
    pub(super) jobs: usize,
}

/// What it came to.
pub(super) struct Ran {
    /// Of one forward: the shortest; with several jobs, from one output to the next on the average.
    pub(super) forward: Duration,
    /// Memory when all ranks had loaded.
    pub(super) loaded: u64,
    /// Pages that the last forwards of all ranks asked the system for.
    pub(super) faults: u64,
}

/// Of one rank.
struct OfRank {
    started: Instant,
    /// When each output was there.
    outputs: Vec<Instant>,
    loaded: u64,
    faults: u64,
    /// Kept until all ranks are done: one that leaves counts as lost, even with nothing left to say.
    _group: RankGroup,
}

/// Loads the ranks and runs them together.
pub(super) fn forwards<N: Network>(work: Work, checkpoint: &Checkpoint<N>) -> Result<Ran, Error> {
    let together = Barrier::new(work.layout.ranks());
    let bar = ProgressBar::new((work.steps * work.jobs) as u64 + 1)
        .with_style(style("{msg:16} {bar:30} {pos:>3}/{len:<3} {elapsed:>4}"));
    bar.set_message("loading");
    bar.tick();
    let (bar_, together) = (&bar, &together);
    let rank = move |link: InProcess| -> Result<OfRank, Error> {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(work.threads).build();
        let pool = pool.map_err(|e| Error::Flag { flag: "--threads", reason: e.to_string() })?;
        let run = || {
            let group = RankGroup::new(Arc::new(link), work.layout)?;
            let loaded = checkpoint.load(&group);
            together.wait();
            let (loaded, held) = (loaded?, anonymous_bytes());
            if group.is_leader() {
                bar_.inc(1);
                bar_.set_message("forward");
            }
            let (started, mut outputs, mut before) = (Instant::now(), Vec::new(), page_faults());
            for step in 0..work.steps {
                before = page_faults();
                for _ in 0..work.jobs {
                    // A job's next step needs the one before it.
                    if step > 0 && work.layout.block_ranges > 1 && group.range.is_first() {
                        recv_tensors(group.whole(), group.previous())??;
                    }
                    if let Some(output) = loaded.part(&group)? {
                        outputs.push(Instant::now());
                        bar_.inc(u64::from(group.tensor.rank() == 0));
                        if step + 1 < work.steps && work.layout.block_ranges > 1 {
                            send_tensors(group.whole(), &Ok(output), group.next())?;
                        }
                    }
                }
            }
            Ok(OfRank { started, outputs, loaded: held, faults: page_faults() - before, _group: group })
        };
        pool.install(|| work.products.scope(run))
    };
    let results: Vec<_> = thread::scope(|scope| {
        let ranks = InProcess::group(work.layout.ranks()).into_iter().map(|link| scope.spawn(move || rank(link)));
        ranks.collect::<Vec<_>>().into_iter().map(|rank| rank.join()).collect()
    });
    bar.finish_and_clear();
    let panicked = |_| Error::Io(std::io::Error::other("a rank ended in a panic"));
    let ranks = results.into_iter().map(|result| result.map_err(panicked)?).collect::<Result<Vec<_>, Error>>()?;
    let (Some(first), Some(last)) = (ranks.first(), ranks.last()) else {
        return Err(Error::Io(std::io::Error::other("no rank ran")));
    };
    let one = work.layout.block_ranges * work.jobs == 1;
    let forward = if one { shortest(last) } else { average(&last.outputs) };
    Ok(Ran { forward: forward.unwrap_or_default(), loaded: first.loaded, faults: first.faults })
}

fn shortest(rank: &OfRank) -> Option<Duration> {
    let begins = std::iter::once(&rank.started).chain(&rank.outputs);
    begins.zip(&rank.outputs).map(|(begin, end)| *end - *begin).min()
}

/// Between neighbours: while the first one is on its way, no other is done.
fn average(outputs: &[Instant]) -> Option<Duration> {
    let between = outputs.len().checked_sub(1).filter(|between| *between > 0)?;
    Some((outputs[between] - outputs[0]) / between as u32)
}
