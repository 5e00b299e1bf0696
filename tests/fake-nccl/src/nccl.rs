//! libnccl: communicators that do not block.
#![allow(unsafe_code, non_snake_case)] // it is an interface of C
#![allow(clippy::missing_safety_doc)] // called as libnccl's document says

use std::cell::RefCell;
use std::ffi::{c_int, c_uint, c_void};
use std::io::Write;
use std::path::PathBuf;
use std::sync::atomic::{AtomicI32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

use crate::cuda::{Stream, is_allocated};
use crate::faults::{self, Fault};
use crate::transfer::Mailbox;

const SUCCESS: c_int = 0;
const SYSTEM_ERROR: c_int = 2;
const INVALID_ARGUMENT: c_int = 4;
const INVALID_USAGE: c_int = 5;
const REMOTE_ERROR: c_int = 6;
const IN_PROGRESS: c_int = 7;
/// Of no version so far.
const UNKNOWN: c_int = 77;
/// The only type that is carried here: `ncclUint8`.
const UINT8: c_int = 1;
const MAGIC: c_uint = 0xcafe_beef;
const ID_BYTES: usize = 128;

/// `ncclUniqueId`.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct UniqueId([u8; ID_BYTES]);

impl std::fmt::Debug for UniqueId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("UniqueId(..)")
    }
}

/// How `ncclConfig_t` begins.
#[repr(C)]
#[derive(Debug)]
pub struct Config {
    size: usize,
    magic: c_uint,
    version: c_uint,
    blocking: c_int,
}

/// `ncclComm`.
#[derive(Debug)]
pub struct Comm {
    state: Arc<State>,
    exchanges: AtomicU64,
    threads: Mutex<Vec<JoinHandle<()>>>,
}

#[derive(Debug)]
struct State {
    mailbox: Mailbox,
    size: usize,
    /// What `ncclCommGetAsyncError` says.
    said: AtomicI32,
}

/// A send or a receive in a group that is not ended.
struct Queued {
    comm: *const Comm,
    stream: *const Stream,
    peer: usize,
    address: u64,
    bytes: usize,
    sends: bool,
}

#[derive(Default)]
struct Group {
    depth: usize,
    queue: Vec<Queued>,
}

thread_local! {
    static GROUP: RefCell<Group> = RefCell::default();
}

/// One piece of an exchange, for the thread that does it.
struct Piece {
    peer: usize,
    address: u64,
    bytes: usize,
}

/// `ncclGetVersion`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ncclGetVersion(version: *mut c_int) -> c_int {
    // SAFETY: the caller gives room for one int.
    unsafe { *version = faults::version() };
    SUCCESS
}

/// `ncclGetUniqueId`: random, and noted in the folder so that a test can look for it where it should not be.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ncclGetUniqueId(id: *mut UniqueId) -> c_int {
    let mut bytes = [0; ID_BYTES];
    let random = std::fs::File::open("/dev/urandom").and_then(|mut source| std::io::Read::read_exact(&mut source, &mut bytes));
    let line = format!("{}\n", hex(&bytes));
    let noted = std::fs::OpenOptions::new().create(true).append(true).open(folder().join("ids"));
    if random.and(noted.and_then(|mut file| file.write_all(line.as_bytes()))).is_err() {
        return SYSTEM_ERROR;
    }
    // SAFETY: the caller gives room for one id.
    unsafe { *id = UniqueId(bytes) };
    SUCCESS
}

/// `ncclCommInitRankConfig`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ncclCommInitRankConfig(
    comm: *mut *mut Comm,
    size: c_int,
    id: UniqueId,
    rank: c_int,
    config: *mut Config,
) -> c_int {
    // SAFETY: the caller gives a configuration.
    let Config { magic, blocking, size: config_size, .. } = unsafe { &*config };
    if *magic != MAGIC || *blocking != 0 || *config_size < size_of::<Config>() || !(0..size).contains(&rank) {
        return INVALID_ARGUMENT;
    }
    let fault = faults::at(None);
    if fault == Some(Fault::Refuse) {
        return INVALID_USAGE;
    }
    let mailbox = Mailbox::new(folder().join(hex(&id.0[..16])), rank as usize, size as usize);
    let state = Arc::new(State { mailbox, size: size as usize, said: AtomicI32::new(IN_PROGRESS) });
    let joining = state.clone();
    let thread = std::thread::spawn(move || {
        let met = match fault {
            Some(Fault::Hang) => {
                joining.mailbox.hang();
                IN_PROGRESS
            }
            Some(Fault::Unknown) => UNKNOWN,
            Some(_) => SYSTEM_ERROR,
            None => match joining.mailbox.meet() {
                Ok(true) => SUCCESS,
                Ok(false) => IN_PROGRESS,
                Err(_) => SYSTEM_ERROR,
            },
        };
        joining.said.store(met, Ordering::SeqCst);
    });
    let made = Comm { state, exchanges: AtomicU64::new(0), threads: Mutex::new(vec![thread]) };
    // SAFETY: the caller gives room for one pointer; `ncclCommAbort` takes it back.
    unsafe { *comm = Box::into_raw(Box::new(made)) };
    IN_PROGRESS
}

/// `ncclCommGetAsyncError`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ncclCommGetAsyncError(comm: *const Comm, said: *mut c_int) -> c_int {
    // SAFETY: the caller gives a communicator that is not aborted, and room for one number.
    unsafe { *said = (&*comm).state.said.load(Ordering::SeqCst) };
    SUCCESS
}

/// `ncclCommAbort`: when it returns, nothing of it is under way.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ncclCommAbort(comm: *mut Comm) -> c_int {
    // SAFETY: the caller gives a communicator, once.
    let comm = unsafe { Box::from_raw(comm) };
    comm.state.mailbox.give_up();
    for thread in comm.threads.lock().unwrap_or_else(PoisonError::into_inner).drain(..) {
        drop(thread.join());
    }
    if faults::abort_fails() { SYSTEM_ERROR } else { SUCCESS }
}

/// `ncclGroupStart`.
#[unsafe(no_mangle)]
pub extern "C" fn ncclGroupStart() -> c_int {
    GROUP.with_borrow_mut(|group| group.depth += 1);
    SUCCESS
}

/// `ncclGroupEnd`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ncclGroupEnd() -> c_int {
    let queue = GROUP.with_borrow_mut(|group| {
        group.depth = group.depth.saturating_sub(1);
        if group.depth == 0 { std::mem::take(&mut group.queue) } else { Vec::new() }
    });
    // SAFETY: what is queued was given to `ncclSend` and `ncclRecv` by this thread since the group began.
    unsafe { run(queue) }
}

/// `ncclSend`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ncclSend(
    from: *const c_void,
    count: usize,
    kind: c_int,
    peer: c_int,
    comm: *const Comm,
    stream: *const Stream,
) -> c_int {
    let piece = Queued { comm, stream, peer: peer as usize, address: from as u64, bytes: count, sends: true };
    // SAFETY: as the caller gave it.
    unsafe { queue(piece, kind) }
}

/// `ncclRecv`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ncclRecv(
    to: *mut c_void,
    count: usize,
    kind: c_int,
    peer: c_int,
    comm: *const Comm,
    stream: *const Stream,
) -> c_int {
    let piece = Queued { comm, stream, peer: peer as usize, address: to as u64, bytes: count, sends: false };
    // SAFETY: as the caller gave it.
    unsafe { queue(piece, kind) }
}

unsafe fn queue(piece: Queued, kind: c_int) -> c_int {
    // SAFETY: the caller gives a communicator that is not aborted.
    let size = unsafe { (&*piece.comm).state.size };
    if kind != UINT8 || piece.peer >= size || !is_allocated(piece.address, piece.bytes) {
        return INVALID_ARGUMENT;
    }
    GROUP.with_borrow_mut(|group| {
        if group.depth == 0 {
            // The real one takes a send alone; ours never makes one.
            return INVALID_USAGE;
        }
        group.queue.push(piece);
        SUCCESS
    })
}

/// Begins an exchange: taken up at once, done later.
unsafe fn run(queue: Vec<Queued>) -> c_int {
    let Some(first) = queue.first() else { return SUCCESS };
    // SAFETY: communicator and stream are the caller's, and outlive what is under way on them: the caller aborts before.
    let (comm, stream) = unsafe { (&*first.comm, &*first.stream) };
    let fault = faults::at(Some(comm.exchanges.fetch_add(1, Ordering::SeqCst)));
    if fault == Some(Fault::Refuse) {
        return INVALID_USAGE;
    }
    let (sends, receives): (Vec<Queued>, Vec<Queued>) = queue.into_iter().partition(|piece| piece.sends);
    let piece = |queued: Queued| Piece { peer: queued.peer, address: queued.address, bytes: queued.bytes };
    let (sends, receives): (Vec<Piece>, Vec<Piece>) =
        (sends.into_iter().map(piece).collect(), receives.into_iter().map(piece).collect());
    let state = comm.state.clone();
    state.said.store(IN_PROGRESS, Ordering::SeqCst);
    stream.under_way.fetch_add(1, Ordering::SeqCst);
    let thread = std::thread::spawn(move || {
        let later = match fault {
            Some(Fault::Unknown) => UNKNOWN,
            Some(Fault::Error | Fault::Abort) => REMOTE_ERROR,
            _ => SUCCESS,
        };
        state.said.store(later, Ordering::SeqCst);
        if fault.is_some() {
            state.mailbox.hang();
            return;
        }
        if transfer(&state, &sends, &receives) {
            stream.under_way.fetch_sub(1, Ordering::SeqCst);
        }
    });
    comm.threads.lock().unwrap_or_else(PoisonError::into_inner).push(thread);
    IN_PROGRESS
}

/// Whether all was sent and has come; otherwise it stays under way for ever, as on the real one, or an error is told.
fn transfer(state: &State, sends: &[Piece], receives: &[Piece]) -> bool {
    for piece in sends {
        // SAFETY: the caller's buffer, which is in use until the stream is done or the communicator aborted.
        let bytes = unsafe { std::slice::from_raw_parts(piece.address as *const u8, piece.bytes) };
        if state.mailbox.send(piece.peer, bytes).is_err() {
            state.said.store(SYSTEM_ERROR, Ordering::SeqCst);
            return false;
        }
    }
    for piece in receives {
        match state.mailbox.receive(piece.peer) {
            Ok(Some(bytes)) if bytes.len() == piece.bytes => {
                // SAFETY: as above; nobody else writes there meanwhile.
                unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), piece.address as *mut u8, bytes.len()) };
            }
            Ok(None) => return false,
            _ => {
                state.said.store(SYSTEM_ERROR, Ordering::SeqCst);
                return false;
            }
        }
    }
    true
}

fn folder() -> PathBuf {
    std::env::var_os("FAKE_NCCL_DIR").map(PathBuf::from).unwrap_or_default()
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
