//! Ranks on GPUs, connected by NCCL.
//!
//! [`NcclLink`] is a [`Tcp`] with a communicator beside it. The connections stay what they are: rendezvous, heartbeats, the end
//! of a group, and every tensor of the host. What ranks that meet in one call exchange ([`Link::exchange`], under `all_reduce`
//! and `all_gather`) goes from device to device by NCCL, one group of sends and receives a call.
//!
//! **The order of additions is ours.** `ncclAllReduce` picks its algorithm by size, topology and version, and the sum with it.
//! Here the ranks swap partial sums and add them as the tree of [`Mesh`](crate::mesh::Mesh), on the device: the same bits as on
//! any other link, and on every tp that divides eight if the kernels below give them. A rank sends `log2 n` times the tensor
//! where a ring sends `2 (n - 1) / n` times: the same for 2 ranks, 2 against 1.5 for 4, 3 against 1.75 for 8. It also needs one
//! communicator only, whatever subgroups there are.
//!
//! **What one rank hands to another alone goes through the host** ([`Link::send`]; hidden states between block ranges): a send
//! must not wait for its receiver, and `ncclSend` may. With two forwards under way in a ring of two ranges, each would wait
//! for the other.
//!
//! **A call is over when it returns**: the exchange is done, or the communicator is aborted and no buffer is in use. Every wait
//! looks at the stream, at `ncclCommGetAsyncError`, at the peers' heartbeats and at the clock. So a lost rank is an error here
//! too, never a hang; the price is that the host waits for the device once an exchange.
//!
//! **The id of a communicator is a secret** ([`UniqueId`]): whoever knows it can join. Rank 0 makes one for each epoch and
//! hands it to its peers over the group's own connections, which believe only who knows the epoch's secret; no coordinator
//! and no log ever has it.
//!
//! Nothing is set in the environment. NCCL's own variables (`NCCL_SOCKET_IFNAME`, `NCCL_IB_HCA`, `NCCL_DEBUG`, ...) are the
//! operator's; only `NCCL_COMM_BLOCKING` is refused unless it is 0, which communicators here are made with.

use std::sync::Arc;
use std::time::Duration;

use candle_core::{Device, Tensor};

use crate::mesh::Link;
use crate::tcp::Tcp;
use crate::{Error, Result};

#[cfg(feature = "cuda")]
mod candle_memory;
mod comm;
mod id;
mod library;
mod memory;

#[cfg(feature = "cuda")]
pub use candle_memory::CandleMemory;
pub use comm::{NcclComm, Watch};
pub use id::UniqueId;
pub use library::OLDEST_NCCL;
pub use memory::{Buffer, DriverMemory, Memory};

/// How long the ranks of a group may take to meet in an exchange, with what each still computes before it. A rank whose process
/// is gone or stopped is noticed within [`SILENCE`](crate::tcp::SILENCE); this is for one that lives and does not come.
pub const EXCHANGE_TIMEOUT: Duration = Duration::from_secs(60);

/// One end of a group whose ranks are processes with a GPU each.
#[derive(Debug)]
pub struct NcclLink {
    tcp: Arc<Tcp>,
    comm: NcclComm,
}

impl NcclLink {
    /// Adds a communicator to `tcp`; every rank of the group does. `limit` is for each exchange, as for this.
    ///
    /// # Errors
    /// When a library cannot be used on this rank, or the ranks do not come together.
    pub fn connect(tcp: Arc<Tcp>, memory: Box<dyn Memory>, limit: Duration) -> Result<Self> {
        library::check_nccl()?;
        let id = if tcp.rank() == 0 {
            let id = UniqueId::new()?;
            let words = id.to_tensor()?;
            (1..tcp.size()).try_for_each(|to| tcp.send(&words, to))?;
            id
        } else {
            UniqueId::from_tensor(&tcp.recv(0)?)?
        };
        let peers = tcp.clone();
        let comm = NcclComm::connect(&id, [tcp.rank(), tcp.size()], memory, Box::new(move || peers.check()), limit)?;
        // A word from everyone: from here on their silence is noticed, and nobody begins before all have joined.
        let others: Vec<usize> = (0..tcp.size()).filter(|other| *other != tcp.rank()).collect();
        tcp.exchange(&Tensor::new(&[0u8], &Device::Cpu)?, &others, &others)?;
        Ok(Self { tcp, comm })
    }

    /// The communicator.
    pub fn comm(&self) -> &NcclComm {
        &self.comm
    }
}

impl Link for NcclLink {
    fn rank(&self) -> usize {
        self.tcp.rank()
    }

    fn size(&self) -> usize {
        self.tcp.size()
    }

    fn send(&self, x: &Tensor, to: usize) -> Result<()> {
        self.tcp.send(x, to)
    }

    fn recv(&self, from: usize) -> Result<Tensor> {
        self.tcp.recv(from)
    }

    fn recv_floats(&self, from: usize, len: usize, f: &mut dyn FnMut(&[f32])) -> Result<()> {
        self.tcp.recv_floats(from, len, f)
    }

    fn exchange(&self, x: &Tensor, to: &[usize], from: &[usize]) -> Result<Vec<Tensor>> {
        if self.comm.memory().takes(x) { self.comm.exchange(x, to, from) } else { self.tcp.exchange(x, to, from) }
    }
}

/// What a call into the driver gave.
fn driver(call: &'static str, result: cudarc::driver::sys::CUresult) -> Result<()> {
    match result {
        cudarc::driver::sys::CUresult::CUDA_SUCCESS => Ok(()),
        other => Err(Error::Gpu { call, reason: format!("{other:?}") }),
    }
}
