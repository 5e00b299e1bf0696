//! Ranks that are threads of one process.

use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use candle_core::Tensor;

use crate::mesh::Link;
use crate::{Error, Result};

/// One end of a group whose ranks are threads.
#[derive(Debug)]
pub struct InProcess {
    rank: usize,
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    size: usize,
    boxes: Mutex<Boxes>,
    changed: Condvar,
}

#[derive(Debug)]
struct Boxes {
    /// `waiting[from * size + to]`.
    waiting: Vec<VecDeque<Tensor>>,
    /// The ranks that left.
    left: Vec<bool>,
}

fn left(rank: usize) -> Error {
    Error::PeerLost { rank, reason: "its thread ended".into() }
}

impl InProcess {
    /// The ends of a group of `size`, in rank order. Dropping one tells the others.
    pub fn group(size: usize) -> Vec<Self> {
        let boxes = Boxes { waiting: vec![VecDeque::new(); size * size], left: vec![false; size] };
        let shared = Arc::new(Shared { size, boxes: Mutex::new(boxes), changed: Condvar::new() });
        (0..size).map(|rank| Self { rank, shared: shared.clone() }).collect()
    }

    fn boxes(&self) -> MutexGuard<'_, Boxes> {
        self.shared.boxes.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Link for InProcess {
    fn rank(&self) -> usize {
        self.rank
    }

    fn size(&self) -> usize {
        self.shared.size
    }

    fn send(&self, x: &Tensor, to: usize) -> Result<()> {
        let mut boxes = self.boxes();
        if boxes.left[to] {
            return Err(left(to));
        }
        boxes.waiting[self.rank * self.shared.size + to].push_back(x.clone());
        self.shared.changed.notify_all();
        Ok(())
    }

    fn recv(&self, from: usize) -> Result<Tensor> {
        let slot = from * self.shared.size + self.rank;
        let boxes = self.boxes();
        let empty = |b: &mut Boxes| b.waiting[slot].is_empty() && !b.left[from];
        let mut boxes = self.shared.changed.wait_while(boxes, empty).unwrap_or_else(PoisonError::into_inner);
        // What a rank sent before it left still arrives.
        boxes.waiting[slot].pop_front().ok_or_else(|| left(from))
    }
}

impl Drop for InProcess {
    fn drop(&mut self) {
        let rank = self.rank;
        self.boxes().left[rank] = true;
        self.shared.changed.notify_all();
    }
}
