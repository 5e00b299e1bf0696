//! How long the store takes to make things durable.

use std::{collections::VecDeque, time::Duration};

use telemetry::{Histogram, Page, SHORT};
use tokio::time::Instant;

/// Batches on their way to the store, and how long those before took.
#[derive(Debug)]
pub(crate) struct Writes {
    /// Number and beginning of each, oldest first.
    under_way: VecDeque<(u64, Instant)>,
    took: Histogram,
}

impl Default for Writes {
    fn default() -> Self {
        Self { under_way: VecDeque::new(), took: Histogram::new(SHORT) }
    }
}

impl Writes {
    /// The store was given a batch.
    pub(crate) fn began(&mut self, batch: u64) {
        self.under_way.push_back((batch, Instant::now()));
    }

    /// All batches up to this one are durable.
    pub(crate) fn ended(&mut self, batch: u64) {
        while let Some((_, began)) = self.under_way.pop_front_if(|(number, _)| *number <= batch) {
            self.took.observe(began.elapsed().as_secs_f64());
        }
    }

    /// How long the oldest batch has waited that is not durable yet.
    pub(crate) fn waits(&self) -> Duration {
        self.under_way.front().map_or(Duration::ZERO, |(_, began)| began.elapsed())
    }

    pub(crate) fn measure(&self, page: &mut Page) {
        let help = "How long it took until what was given to the store of jobs was durable.";
        page.histograms("atelier_store_write_seconds", help, [], [([], self.took.clone())]);
        let help = "How long the oldest change has waited that is not durable yet.";
        page.gauge("atelier_store_waiting_seconds", help, self.waits().as_secs_f64());
    }
}
