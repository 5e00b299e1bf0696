//! How work is divided. Who computes a row never changes its bits; this only decides how soon it is done.

use std::sync::atomic::{AtomicUsize, Ordering};

use rayon::prelude::*;

/// Elements below which a pass over memory stays on its thread: waking another costs some microseconds.
const SMALL: usize = 1 << 15;

/// Calls `f(first row, rows)` on runs of whole rows of `y`, each `width` long, one run for each thread.
pub(crate) fn over_rows<T: Send>(y: &mut [T], width: usize, f: impl Fn(usize, &mut [T]) + Sync) {
    if y.is_empty() {
        return;
    }
    assert!(width > 0 && y.len().is_multiple_of(width), "{} elements are no rows of {width}", y.len());
    let threads = rayon::current_num_threads();
    if threads == 1 || y.len() < SMALL {
        return f(0, y);
    }
    let run = (y.len() / width).div_ceil(threads);
    y.par_chunks_mut(run * width).enumerate().for_each(|(i, rows)| f(i * run, rows));
}

/// Calls `f` for each job of `0..jobs`, on this thread alone when all of it is `small`.
pub(crate) fn over_jobs(jobs: usize, small: bool, f: impl Fn(usize) + Sync + Send) {
    if small || jobs <= 1 || rayon::current_num_threads() == 1 {
        (0..jobs).for_each(f);
    } else {
        (0..jobs).into_par_iter().with_max_len(1).for_each(f);
    }
}

/// As [`over_jobs`], one after the other in order, so that those that are under way at a time lie beside each other: what they have in common
/// is in the cache that threads share.
pub(crate) fn over_jobs_in_order(jobs: usize, small: bool, f: impl Fn(usize) + Sync + Send) {
    let threads = rayon::current_num_threads();
    if small || jobs <= 1 || threads == 1 {
        return (0..jobs).for_each(f);
    }
    let next = AtomicUsize::new(0);
    let take = || Some(next.fetch_add(1, Ordering::Relaxed)).filter(|job| *job < jobs);
    (0..threads).into_par_iter().with_max_len(1).for_each(|_| std::iter::from_fn(take).for_each(&f));
}
