//! One rank's end of a communicator.
//!
//! cudarc has a `Comm`, which is not used: it blocks while ranks join and cannot be told to stop, it does not ask for errors
//! that come later, and it panics when it is dropped after one.

use std::ffi::{c_int, c_uint};
use std::fmt;
use std::mem::size_of;
use std::ptr::{self, NonNull};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use candle_core::Tensor;
use cudarc::driver::sys::{CUresult, cuStreamQuery};
use cudarc::nccl::sys::{self, ncclResult_t};

use super::id::UniqueId;
use super::memory::{Buffer, Memory};
use super::{driver, library};
use crate::{Error, Result};

/// Says, from outside of NCCL, whether the other ranks are still there; asked again and again while one waits for them.
pub type Watch = Box<dyn Fn() -> Result<()> + Send + Sync>;

/// Marks a configuration as one (nccl.h).
const MAGIC: c_uint = 0xcafe_beef;
/// The version whose configuration is given: newer libraries take their defaults for what came later.
const CONFIG_VERSION: c_uint = 22_800;
/// "The library's default" (nccl.h).
const UNDEFINED: c_int = c_int::MIN;
/// How often a wait looks again at once before it sleeps in between: an exchange takes tens of microseconds.
const SPINS: u32 = 2_000;
/// How long it sleeps then.
const PAUSE: Duration = Duration::from_micros(50);

/// One rank's end of a communicator. Made, used and given up on the rank's own thread; a lock keeps any other out of NCCL
/// meanwhile.
pub struct NcclComm {
    rank: usize,
    size: usize,
    memory: Box<dyn Memory>,
    watch: Watch,
    limit: Duration,
    /// `None` once it is aborted.
    handle: Mutex<Option<Handle>>,
}

/// NCCL's pointer.
struct Handle(NonNull<sys::ncclComm>);

// SAFETY: NCCL's communicators belong to no thread; they must not be used by two at once, which the lock around this sees to.
#[allow(unsafe_code)]
unsafe impl Send for Handle {}

impl NcclComm {
    /// Joins as `rank` of `size`, all of whom have the `id`. Waits until all have joined, at most `limit`, which holds for each
    /// later exchange too; `watch` ends a wait before.
    ///
    /// # Errors
    /// When the library cannot be used, when the ranks do not come together, and what `watch` says.
    #[allow(unsafe_code)]
    pub fn connect(
        id: &UniqueId,
        [rank, size]: [usize; 2],
        memory: Box<dyn Memory>,
        watch: Watch,
        limit: Duration,
    ) -> Result<Self> {
        const CALL: &str = "ncclCommInitRankConfig";
        library::check_nccl()?;
        refuse_blocking()?;
        memory.bind()?;
        let mut raw = ptr::null_mut();
        let mut config = config();
        // SAFETY: the function was found; pointer and configuration outlive the call, which does not wait for other ranks.
        let result = unsafe { sys::ncclCommInitRankConfig(&mut raw, size as c_int, id.raw(), rank as c_int, &mut config) };
        let handle = NonNull::new(raw).map(Handle);
        // From here on dropping it aborts what there is.
        let comm = Self { rank, size, memory, watch, limit, handle: Mutex::new(handle) };
        started(CALL, result)?;
        comm.with_handle(CALL, |handle| comm.settle(CALL, handle, Instant::now() + limit))?;
        Ok(comm)
    }

    /// Where the tensors are that it takes.
    pub fn memory(&self) -> &dyn Memory {
        &*self.memory
    }

    /// Hands `x` to each of `to` and takes a tensor of `x`'s shape and type from each of `from`, who do the same at the same
    /// time. When it returns, that is done, or this communicator is aborted; nothing is under way.
    ///
    /// # Errors
    /// When a rank is lost or does not come in time, and what NCCL says.
    pub fn exchange(&self, x: &Tensor, to: &[usize], from: &[usize]) -> Result<Vec<Tensor>> {
        if let Some(peer) = to.iter().chain(from).find(|peer| **peer >= self.size || **peer == self.rank) {
            return Err(Error::Frame(format!("rank {} of {} exchanges nothing with {peer}", self.rank, self.size)));
        }
        if (to.is_empty() && from.is_empty()) || x.elem_count() == 0 {
            return Ok(vec![x.clone(); from.len()]);
        }
        self.memory.bind()?;
        let mine = self.memory.load(x)?;
        let theirs = from.iter().map(|_| self.memory.reserve(x.shape(), x.dtype())).collect::<Result<Vec<_>>>()?;
        let receives = theirs.iter().zip(from);
        self.with_handle("ncclGroupEnd", |handle| {
            let deadline = Instant::now() + self.limit;
            self.start(handle, to.iter().map(|to| (&mine, to)), receives)?;
            self.settle("ncclGroupEnd", handle, deadline)?;
            self.finish(handle, deadline)
        })?;
        theirs.into_iter().map(|buffer| self.memory.unload(buffer)).collect()
    }

    /// Gives the communicator up, whatever is under way: peers that wait for this rank learn of it by their own means.
    ///
    /// # Errors
    /// What NCCL says; it is given up all the same.
    pub fn abort(&self) -> Result<()> {
        let handle = self.handle().take();
        handle.map_or(Ok(()), |handle| self.let_go(&handle))
    }

    /// Runs `f` with the communicator. After a failure there is none any more: what NCCL still does with the buffers must end
    /// before they do.
    fn with_handle(&self, call: &'static str, f: impl FnOnce(&Handle) -> Result<()>) -> Result<()> {
        let mut held = self.handle();
        let gone = || Error::Gpu { call, reason: "the communicator was given up before".into() };
        let result = f(held.as_ref().ok_or_else(gone)?);
        if result.is_err()
            && let Some(handle) = held.take()
            && let Err(error) = self.let_go(&handle)
        {
            tracing::warn!(rank = self.rank, %error, "could not abort a communicator");
        }
        result
    }

    /// Puts one group of sends and receives on the stream.
    #[allow(unsafe_code)]
    fn start<'a>(
        &self,
        handle: &Handle,
        sends: impl Iterator<Item = (&'a Buffer, &'a usize)>,
        receives: impl Iterator<Item = (&'a Buffer, &'a usize)>,
    ) -> Result<()> {
        const BYTES: sys::ncclDataType_t = sys::ncclDataType_t::ncclUint8;
        let (comm, stream) = (handle.0.as_ptr(), self.memory.stream().cast());
        // SAFETY: the functions were found. The buffers hold the bytes they say and outlive the exchange: `with_handle`
        // aborts it if it is not seen to end.
        unsafe {
            started("ncclGroupStart", sys::ncclGroupStart())?;
            let mut queued = Ok(());
            for (buffer, to) in sends {
                let sent = sys::ncclSend(buffer.address() as *const _, buffer.bytes(), BYTES, *to as c_int, comm, stream);
                queued = queued.and(started("ncclSend", sent));
            }
            for (buffer, from) in receives {
                let received = sys::ncclRecv(buffer.address() as *mut _, buffer.bytes(), BYTES, *from as c_int, comm, stream);
                queued = queued.and(started("ncclRecv", received));
            }
            // A group that was begun is ended, whatever became of what is in it: it is the thread's, not the communicator's.
            let ended = started("ncclGroupEnd", sys::ncclGroupEnd());
            queued.and(ended)
        }
    }

    /// Waits until NCCL is done with what it was asked for: with an exchange, until it is on the stream.
    fn settle(&self, call: &'static str, handle: &Handle, deadline: Instant) -> Result<()> {
        self.wait(call, deadline, || Ok(!self.is_under_way(call, handle)?))
    }

    /// Waits until the stream is done.
    fn finish(&self, handle: &Handle, deadline: Instant) -> Result<()> {
        self.wait("cuStreamQuery", deadline, || {
            if stream_is_done(&*self.memory)? {
                return Ok(true);
            }
            self.is_under_way("ncclCommGetAsyncError", handle).map(|_| false)
        })
    }

    /// Whether NCCL is still at work on the host, and what went wrong since it was asked last.
    #[allow(unsafe_code)]
    fn is_under_way(&self, call: &'static str, handle: &Handle) -> Result<bool> {
        // Not as the type of the bindings: a library newer than they are may know more errors.
        let mut state: c_uint = 0;
        // SAFETY: the function was found; it writes one enum of C, an unsigned int.
        let asked = unsafe { sys::ncclCommGetAsyncError(handle.0.as_ptr(), (&raw mut state).cast()) };
        succeeded("ncclCommGetAsyncError", asked)?;
        match state {
            _ if state == ncclResult_t::ncclSuccess as c_uint => Ok(false),
            _ if state == ncclResult_t::ncclInProgress as c_uint => Ok(true),
            other => Err(Error::Gpu { call, reason: name_of(other) }),
        }
    }

    fn wait(&self, call: &'static str, deadline: Instant, mut done: impl FnMut() -> Result<bool>) -> Result<()> {
        let mut spins = 0;
        while !done()? {
            if let Err(lost) = (self.watch)() {
                // A peer may leave as soon as its part is done; then ours is done too.
                return if done()? { Ok(()) } else { Err(lost) };
            }
            if Instant::now() >= deadline {
                return Err(Error::Stalled { call, limit: self.limit });
            }
            spins += 1;
            if spins < SPINS { thread::yield_now() } else { thread::sleep(PAUSE) }
        }
        Ok(())
    }

    #[allow(unsafe_code)]
    fn let_go(&self, handle: &Handle) -> Result<()> {
        self.memory.bind()?;
        // SAFETY: the function was found; the handle is not used again, and no thread is inside NCCL with it.
        started("ncclCommAbort", unsafe { sys::ncclCommAbort(handle.0.as_ptr()) })
    }

    fn handle(&self) -> MutexGuard<'_, Option<Handle>> {
        self.handle.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for NcclComm {
    fn drop(&mut self) {
        if let Err(error) = self.abort() {
            tracing::warn!(rank = self.rank, %error, "could not abort a communicator");
        }
    }
}

impl fmt::Debug for NcclComm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "NcclComm(rank {} of {})", self.rank, self.size)
    }
}

/// Calls do not block, and the rest as the library has it.
fn config() -> sys::ncclConfig_t {
    sys::ncclConfig_t {
        size: size_of::<sys::ncclConfig_t>(),
        magic: MAGIC,
        version: CONFIG_VERSION,
        blocking: 0,
        cgaClusterSize: UNDEFINED,
        minCTAs: UNDEFINED,
        maxCTAs: UNDEFINED,
        netName: ptr::null(),
        splitShare: UNDEFINED,
        trafficClass: UNDEFINED,
        commName: ptr::null(),
        collnetEnable: UNDEFINED,
        CTAPolicy: UNDEFINED,
        shrinkShare: UNDEFINED,
        nvlsCTAs: UNDEFINED,
        nChannelsPerNetPeer: UNDEFINED,
        nvlinkCentricSched: UNDEFINED,
        graphUsageMode: UNDEFINED,
        numRmaCtx: UNDEFINED,
        maxP2pPeers: UNDEFINED,
    }
}

/// The environment goes before the configuration: with this one a lost rank could hold the others for ever.
fn refuse_blocking() -> Result<()> {
    match std::env::var("NCCL_COMM_BLOCKING") {
        Ok(value) if value != "0" => Err(Error::Gpu {
            call: "ncclCommInitRankConfig",
            reason: format!("NCCL_COMM_BLOCKING is {value:?}; communicators are not to block: set it to 0 or not at all"),
        }),
        _ => Ok(()),
    }
}

#[allow(unsafe_code)]
fn stream_is_done(memory: &dyn Memory) -> Result<bool> {
    // SAFETY: the function was found; the stream lives as long as the memory.
    match unsafe { cuStreamQuery(memory.stream().cast()) } {
        CUresult::CUDA_ERROR_NOT_READY => Ok(false),
        result => driver("cuStreamQuery", result).map(|()| true),
    }
}

/// A call that has done what it is for.
pub(super) fn succeeded(call: &'static str, result: ncclResult_t) -> Result<()> {
    match result {
        ncclResult_t::ncclSuccess => Ok(()),
        other => Err(Error::Gpu { call, reason: format!("{other:?}") }),
    }
}

/// A call that has done what it is for, or goes on with it.
fn started(call: &'static str, result: ncclResult_t) -> Result<()> {
    if result == ncclResult_t::ncclInProgress { Ok(()) } else { succeeded(call, result) }
}

fn name_of(code: c_uint) -> String {
    let known = [
        ncclResult_t::ncclUnhandledCudaError,
        ncclResult_t::ncclSystemError,
        ncclResult_t::ncclInternalError,
        ncclResult_t::ncclInvalidArgument,
        ncclResult_t::ncclInvalidUsage,
        ncclResult_t::ncclRemoteError,
        ncclResult_t::ncclTimeout,
    ];
    known.iter().find(|known| **known as c_uint == code).map_or_else(|| format!("error {code}"), |known| format!("{known:?}"))
}
