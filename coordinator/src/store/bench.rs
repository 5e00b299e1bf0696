//! How fast a store makes things durable.

use std::{
    fmt,
    time::{Duration, Instant},
};

use proto::v1::{JobRecord, JobSpec};
use uuid::Uuid;

use super::{Change, StoreHandle};

/// Bytes of the prompts that are written.
const PROMPT_BYTES: usize = 600;

/// What was measured.
#[derive(Debug, Clone)]
pub struct Figures {
    /// Writers, each with one batch of one job in flight.
    pub writers: usize,
    /// Batches that became durable.
    pub writes: u64,
    /// In this time.
    pub elapsed: Duration,
    /// Half of them took no longer.
    pub median: Duration,
    /// 99 of 100 took no longer.
    pub p99: Duration,
    /// Why it ended early.
    pub failed: Option<String>,
}

impl Figures {
    /// Batches a second.
    pub fn rate(&self) -> f64 {
        self.writes as f64 / self.elapsed.as_secs_f64()
    }
}

impl fmt::Display for Figures {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { writers, median, p99, .. } = self;
        write!(f, "{:.0} durable writes/s, {writers} in flight, median {median:.1?}, p99 {p99:.1?}", self.rate())
    }
}

/// Keeps `writers` batches of one new job each in flight for `time`. Blocks; it writes from the calling thread, so that
/// what is measured is the store and not a runtime.
pub fn group_commit(handle: &StoreHandle, writers: usize, time: Duration) -> Figures {
    let mut durable = handle.durable();
    let start = Instant::now();
    let mut started = std::collections::VecDeque::with_capacity(writers);
    let mut latencies = Vec::new();
    let mut number = 0;
    let mut failed = None;
    while start.elapsed() < time && failed.is_none() {
        while started.len() < writers {
            number += 1;
            started.push_back((handle.write(vec![Change::Put(Box::new(job(number)))]), Instant::now()));
        }
        let Some((oldest, _)) = started.front().copied() else { break };
        let reached = futures::executor::block_on(durable.wait_for(|d| d.batch >= oldest || d.failed.is_some()));
        let reached = match reached {
            Ok(reached) => reached.clone(),
            Err(_) => break,
        };
        let now = Instant::now();
        while let Some((_, begun)) = started.pop_front_if(|(batch, _)| *batch <= reached.batch) {
            latencies.push(now - begun);
        }
        failed = reached.failed;
    }
    let elapsed = start.elapsed();
    latencies.sort_unstable();
    let at = |share: f64| latencies.get((latencies.len() as f64 * share) as usize).copied().unwrap_or_default();
    Figures { writers, writes: latencies.len() as u64, elapsed, median: at(0.5), p99: at(0.99), failed }
}

fn job(number: u64) -> JobRecord {
    let spec = JobSpec { model: "bench".into(), prompt: "x".repeat(PROMPT_BYTES), ..JobSpec::default() };
    JobRecord { id: Uuid::new_v4().to_string(), number, spec: Some(spec), ..JobRecord::default() }
}
