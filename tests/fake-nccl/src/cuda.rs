//! libcuda: memory of the host, and streams that are busy while an exchange is under way.
#![allow(unsafe_code, non_snake_case)] // it is an interface of C
#![allow(clippy::missing_safety_doc)] // called as libcuda's document says

use std::alloc::{Layout, alloc, dealloc};
use std::collections::HashMap;
use std::ffi::{c_int, c_uint, c_void};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, OnceLock, PoisonError};

const SUCCESS: c_int = 0;
const INVALID_VALUE: c_int = 1;
const OUT_OF_MEMORY: c_int = 2;
const INVALID_DEVICE: c_int = 101;
const INVALID_CONTEXT: c_int = 201;
const NOT_READY: c_int = 600;
/// How many GPUs there are.
const DEVICES: c_int = 8;

thread_local! {
    static CONTEXT: std::cell::Cell<usize> = const { std::cell::Cell::new(0) };
}

/// What was allocated: address to bytes.
fn blocks() -> &'static Mutex<HashMap<u64, usize>> {
    static BLOCKS: OnceLock<Mutex<HashMap<u64, usize>>> = OnceLock::new();
    BLOCKS.get_or_init(Mutex::default)
}

/// A stream: how many exchanges are under way on it.
#[derive(Debug, Default)]
pub struct Stream {
    pub(crate) under_way: AtomicUsize,
}

/// Whether `bytes` from `address` on are within something that was allocated.
pub(crate) fn is_allocated(address: u64, bytes: usize) -> bool {
    let blocks = blocks().lock().unwrap_or_else(PoisonError::into_inner);
    blocks.iter().any(|(start, len)| *start <= address && address + bytes as u64 <= start + *len as u64)
}

/// `cuInit`.
#[unsafe(no_mangle)]
pub extern "C" fn cuInit(_flags: c_uint) -> c_int {
    SUCCESS
}

/// `cuDeviceGet`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuDeviceGet(device: *mut c_int, ordinal: c_int) -> c_int {
    if !(0..DEVICES).contains(&ordinal) {
        return INVALID_DEVICE;
    }
    // SAFETY: the caller gives room for one device.
    unsafe { *device = ordinal };
    SUCCESS
}

/// `cuDevicePrimaryCtxRetain`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuDevicePrimaryCtxRetain(context: *mut *mut c_void, device: c_int) -> c_int {
    // A number, never followed.
    let handle = (device as usize + 1) as *mut c_void;
    // SAFETY: the caller gives room for one context.
    unsafe { *context = handle };
    SUCCESS
}

/// `cuDevicePrimaryCtxRelease_v2`.
#[unsafe(no_mangle)]
pub extern "C" fn cuDevicePrimaryCtxRelease_v2(_device: c_int) -> c_int {
    SUCCESS
}

/// `cuCtxSetCurrent`.
#[unsafe(no_mangle)]
pub extern "C" fn cuCtxSetCurrent(context: *mut c_void) -> c_int {
    CONTEXT.set(context as usize);
    SUCCESS
}

/// Calls on a thread without a context are the commonest mistake with the real one.
fn without_context() -> bool {
    CONTEXT.get() == 0
}

/// `cuStreamCreate`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuStreamCreate(stream: *mut *mut c_void, _flags: c_uint) -> c_int {
    if without_context() {
        return INVALID_CONTEXT;
    }
    // SAFETY: the caller gives room for one stream; `cuStreamDestroy_v2` takes it back.
    unsafe { *stream = Box::into_raw(Box::<Stream>::default()).cast() };
    SUCCESS
}

/// `cuStreamQuery`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuStreamQuery(stream: *mut c_void) -> c_int {
    // SAFETY: the caller gives a stream of ours that is not destroyed.
    let stream = unsafe { &*stream.cast::<Stream>() };
    match stream.under_way.load(Ordering::SeqCst) {
        _ if without_context() => INVALID_CONTEXT,
        0 => SUCCESS,
        _ => NOT_READY,
    }
}

/// `cuStreamDestroy_v2`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuStreamDestroy_v2(stream: *mut c_void) -> c_int {
    // SAFETY: the caller gives a stream of ours, once. One that is still in use is left alone.
    unsafe {
        if (&*stream.cast::<Stream>()).under_way.load(Ordering::SeqCst) == 0 {
            drop(Box::from_raw(stream.cast::<Stream>()));
        }
    }
    SUCCESS
}

/// `cuMemAlloc_v2`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemAlloc_v2(address: *mut u64, bytes: usize) -> c_int {
    if without_context() {
        return INVALID_CONTEXT;
    }
    let Ok(layout) = Layout::from_size_align(bytes, 256) else { return INVALID_VALUE };
    if bytes == 0 {
        return INVALID_VALUE;
    }
    // SAFETY: the layout has a size.
    let block = unsafe { alloc(layout) };
    if block.is_null() {
        return OUT_OF_MEMORY;
    }
    blocks().lock().unwrap_or_else(PoisonError::into_inner).insert(block as u64, bytes);
    // SAFETY: the caller gives room for one address.
    unsafe { *address = block as u64 };
    SUCCESS
}

/// `cuMemFree_v2`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemFree_v2(address: u64) -> c_int {
    let Some(bytes) = blocks().lock().unwrap_or_else(PoisonError::into_inner).remove(&address) else { return INVALID_VALUE };
    let Ok(layout) = Layout::from_size_align(bytes, 256) else { return INVALID_VALUE };
    // SAFETY: allocated above with this layout, and taken from the table only once.
    unsafe { dealloc(address as *mut u8, layout) };
    SUCCESS
}

/// `cuMemcpyHtoD_v2`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemcpyHtoD_v2(to: u64, from: *const c_void, bytes: usize) -> c_int {
    if !is_allocated(to, bytes) {
        return INVALID_VALUE;
    }
    // SAFETY: `to` is allocated as far as that; the caller answers for `from`.
    unsafe { std::ptr::copy_nonoverlapping(from.cast::<u8>(), to as *mut u8, bytes) };
    SUCCESS
}

/// `cuMemcpyDtoH_v2`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemcpyDtoH_v2(to: *mut c_void, from: u64, bytes: usize) -> c_int {
    if !is_allocated(from, bytes) {
        return INVALID_VALUE;
    }
    // SAFETY: `from` is allocated as far as that; the caller answers for `to`.
    unsafe { std::ptr::copy_nonoverlapping(from as *const u8, to.cast::<u8>(), bytes) };
    SUCCESS
}
