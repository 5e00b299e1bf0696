//! Whose weights lie in memory: a seat's are read when those of its group's earlier epochs are gone from this worker, whatever
//! ranks they were of.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

/// Every seat whose weights may still be there.
#[derive(Debug, Default)]
pub(crate) struct Seats {
    by_group: HashMap<String, Vec<Seat>>,
}

#[derive(Debug)]
struct Seat {
    epoch: u64,
    memory: Weak<Mutex<()>>,
}

/// A seat's place in memory.
#[derive(Debug)]
pub(crate) struct Memory {
    own: Arc<Mutex<()>>,
    /// Seats of other epochs that were there before.
    before: Vec<Arc<Mutex<()>>>,
}

impl Seats {
    /// One more seat. Those that were there in other epochs were told to end: none of them begins to load after this.
    pub(crate) fn take(&mut self, group_id: &str, epoch: u64) -> Memory {
        self.by_group.retain(|_, seats| {
            seats.retain(|seat| seat.memory.strong_count() > 0);
            !seats.is_empty()
        });
        let seats = self.by_group.entry(group_id.to_owned()).or_default();
        // Ranks of one epoch hold their weights side by side.
        let before = seats.iter().filter(|seat| seat.epoch != epoch).filter_map(|seat| seat.memory.upgrade()).collect();
        let own = Arc::default();
        seats.push(Seat { epoch, memory: Arc::downgrade(&own) });
        Memory { own, before }
    }
}

impl Memory {
    /// Returns when the seats before it are empty. To be kept for as long as the weights are. Nobody waits for one that came later,
    /// so all come to their turn.
    pub(crate) fn wait(&self) -> MutexGuard<'_, ()> {
        let own = lock(&self.own);
        self.before.iter().for_each(|seat| drop(lock(seat)));
        own
    }
}

fn lock(seat: &Mutex<()>) -> MutexGuard<'_, ()> {
    seat.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::{Receiver, channel};
    use std::thread;
    use std::time::Duration;

    use super::*;

    /// Longest wait for a thread; the machine may be busy.
    const PATIENCE: Duration = Duration::from_secs(30);

    /// Says when the seat has its turn; its weights are there only for a moment.
    fn turn(memory: Memory) -> Receiver<()> {
        let (tell, told) = channel();
        thread::spawn(move || {
            let _held = memory.wait();
            tell.send(()).unwrap();
        });
        told
    }

    #[test]
    fn a_seat_waits_for_every_seat_of_its_groups_earlier_epochs_on_this_worker() {
        let mut seats = Seats::default();
        // Two ranks of an epoch, side by side.
        let (first, second) = (seats.take("g", 1), seats.take("g", 1));
        let (held, other) = (first.wait(), second.wait());
        let next = turn(seats.take("g", 2));
        let last = turn(seats.take("g", 3));
        turn(seats.take("another", 2)).recv_timeout(PATIENCE).unwrap();
        drop(held);
        assert!(next.recv_timeout(Duration::from_millis(100)).is_err(), "the other rank's weights are there");
        assert!(last.try_recv().is_err());
        drop(other);
        next.recv_timeout(PATIENCE).unwrap();
        last.recv_timeout(PATIENCE).unwrap();
    }

    #[test]
    fn seats_that_are_gone_are_forgotten() {
        let mut seats = Seats::default();
        for epoch in 0..10 {
            drop(seats.take("g", epoch));
        }
        let _kept = seats.take("another", 1);
        assert_eq!(seats.by_group.values().map(Vec::len).sum::<usize>(), 1);
    }
}
