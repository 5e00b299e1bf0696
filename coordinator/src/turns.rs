//! Thousands who wait for the same step are told of it one after the other: all at once, they would hold up everybody else.

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

/// What telling one of them costs, about.
const EACH: Duration = Duration::from_micros(40);
/// The last of them waits for no longer.
const AT_MOST: Duration = Duration::from_millis(400);

/// Hands out turns. Cheap to clone.
#[derive(Debug, Clone, Default)]
pub(crate) struct Turns(Arc<Counts>);

#[derive(Debug, Default)]
struct Counts {
    present: AtomicUsize,
    given: AtomicUsize,
}

impl Turns {
    pub(crate) fn take(&self) -> Turn {
        self.0.present.fetch_add(1, Ordering::Relaxed);
        Turn { of: self.0.clone(), number: self.0.given.fetch_add(1, Ordering::Relaxed) }
    }
}

/// One's place among those who are there.
#[derive(Debug)]
pub(crate) struct Turn {
    of: Arc<Counts>,
    number: usize,
}

impl Turn {
    /// How long to wait from the moment all are woken.
    pub(crate) fn wait(&self) -> Duration {
        let present = self.of.present.load(Ordering::Relaxed).max(1);
        let place = self.number % present;
        let all = EACH.saturating_mul(u32::try_from(present).unwrap_or(u32::MAX)).min(AT_MOST);
        all.mul_f64(place as f64 / present as f64)
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        self.of.present.fetch_sub(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn few_do_not_wait_and_many_are_spread() {
        let turns = Turns::default();
        let alone = turns.take();
        assert_eq!(alone.wait(), Duration::ZERO);
        let many: Vec<Turn> = (0..19_999).map(|_| turns.take()).collect();
        let mut waits: Vec<Duration> = many.iter().map(Turn::wait).collect();
        waits.sort_unstable();
        assert!(waits[0] < Duration::from_millis(1) && *waits.last().unwrap() < AT_MOST);
        assert!(waits[10_000] > AT_MOST / 3 && waits[10_000] < AT_MOST * 2 / 3);
        drop(many);
        assert_eq!(alone.wait(), Duration::ZERO);
    }
}
