//! A group's link that counts what goes over it.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use parallel::mesh::Link;
use parallel::{Result, Tensor};

/// What one rank exchanged with the others.
#[derive(Debug, Default)]
pub(crate) struct Traffic {
    pub(crate) sent_bytes: AtomicU64,
    pub(crate) received_bytes: AtomicU64,
    /// In sums and gathers, where all ranks of a block range meet.
    pub(crate) exchange_nanos: AtomicU64,
    /// For another rank's tensor: of a rank that follows, for work to do too.
    pub(crate) receive_nanos: AtomicU64,
}

/// A link and its counts.
pub(crate) struct Counted {
    pub(crate) link: Arc<dyn Link>,
    pub(crate) traffic: Arc<Traffic>,
}

impl Link for Counted {
    fn rank(&self) -> usize {
        self.link.rank()
    }

    fn size(&self) -> usize {
        self.link.size()
    }

    fn send(&self, x: &Tensor, to: usize) -> Result<()> {
        self.traffic.sent_bytes.fetch_add(bytes(x), Ordering::Relaxed);
        self.link.send(x, to)
    }

    fn recv(&self, from: usize) -> Result<Tensor> {
        let began = Instant::now();
        let received = self.link.recv(from);
        add_nanos(&self.traffic.receive_nanos, began);
        self.traffic.received_bytes.fetch_add(received.as_ref().map_or(0, bytes), Ordering::Relaxed);
        received
    }

    fn recv_floats(&self, from: usize, len: usize, f: &mut dyn FnMut(&[f32])) -> Result<()> {
        let began = Instant::now();
        let received = self.link.recv_floats(from, len, &mut |floats| {
            add_nanos(&self.traffic.receive_nanos, began);
            self.traffic.received_bytes.fetch_add(size_of_val(floats) as u64, Ordering::Relaxed);
            f(floats);
        });
        if received.is_err() {
            add_nanos(&self.traffic.receive_nanos, began);
        }
        received
    }

    fn exchange(&self, x: &Tensor, to: &[usize], from: &[usize]) -> Result<Vec<Tensor>> {
        let began = Instant::now();
        let received = self.link.exchange(x, to, from);
        add_nanos(&self.traffic.exchange_nanos, began);
        self.traffic.sent_bytes.fetch_add(bytes(x) * to.len() as u64, Ordering::Relaxed);
        let taken: u64 = received.iter().flatten().map(bytes).sum();
        self.traffic.received_bytes.fetch_add(taken, Ordering::Relaxed);
        received
    }
}

fn bytes(x: &Tensor) -> u64 {
    (x.elem_count() * x.dtype().size_in_bytes()) as u64
}

fn add_nanos(total: &AtomicU64, began: Instant) {
    total.fetch_add(u64::try_from(began.elapsed().as_nanos()).unwrap_or(u64::MAX), Ordering::Relaxed);
}

#[cfg(test)]
mod tests {
    use std::thread;

    use parallel::mesh::Mesh;
    use parallel::{Collective, Device, InProcess};

    use super::*;

    /// What each of two ranks counts of a sum of `len` floats.
    fn counts_of_sum(len: usize) -> [Arc<Traffic>; 2] {
        let traffic = [Arc::<Traffic>::default(), Arc::default()];
        thread::scope(|s| {
            for (link, traffic) in InProcess::group(2).into_iter().zip(&traffic) {
                let counted = Counted { link: Arc::new(link), traffic: traffic.clone() };
                s.spawn(move || {
                    Mesh::whole(Arc::new(counted)).all_reduce(&Tensor::full(1f32, len, &Device::Cpu).unwrap()).unwrap()
                });
            }
        });
        traffic
    }

    #[test]
    fn a_sum_over_two_ranks_is_counted_once_each_way() {
        // A large one goes in pieces.
        for len in [3, 3 << 20] {
            for traffic in counts_of_sum(len) {
                let [sent, received] = [&traffic.sent_bytes, &traffic.received_bytes].map(|bytes| bytes.load(Ordering::Relaxed));
                assert_eq!([sent, received], [4 * len as u64; 2]);
            }
        }
        assert!(counts_of_sum(3).iter().all(|traffic| traffic.receive_nanos.load(Ordering::Relaxed) == 0));
    }
}
