//! Where the tensors are that NCCL carries.

use std::ffi::{c_int, c_void};
use std::fmt;
use std::ptr;
use std::sync::Arc;

use candle_core::{DType, Device, Shape, Tensor};
use cudarc::driver::sys;

use super::{driver, library};
use crate::{Error, Result};

/// Gives NCCL buffers in a GPU's memory for tensors, and the stream that it works on.
pub trait Memory: Send + Sync {
    /// Whether `x` is of those it is for.
    fn takes(&self, x: &Tensor) -> bool;
    /// Makes its device the calling thread's.
    fn bind(&self) -> Result<()>;
    /// The stream that its tensors are computed on.
    fn stream(&self) -> *mut c_void;
    /// `x`'s elements in the device's memory, one after the other.
    fn load(&self, x: &Tensor) -> Result<Buffer>;
    /// Room for a tensor.
    fn reserve(&self, shape: &Shape, dtype: DType) -> Result<Buffer>;
    /// The tensor whose elements have come.
    fn unload(&self, buffer: Buffer) -> Result<Tensor>;
}

/// A piece of a device's memory, which it keeps.
#[derive(Debug)]
pub struct Buffer {
    address: u64,
    shape: Shape,
    dtype: DType,
    kept: Kept,
}

#[derive(Debug)]
enum Kept {
    Block(Block),
    /// The device's own.
    #[cfg_attr(not(feature = "cuda"), allow(dead_code))]
    Tensor(Tensor),
}

impl Buffer {
    /// The memory of a tensor that lies at `address` of its device, whole and in order.
    #[cfg(feature = "cuda")]
    pub(super) fn of(tensor: Tensor, address: u64) -> Self {
        Self { address, shape: tensor.shape().clone(), dtype: tensor.dtype(), kept: Kept::Tensor(tensor) }
    }

    /// The tensor it is the memory of.
    #[cfg(feature = "cuda")]
    pub(super) fn into_tensor(self) -> Result<Tensor> {
        match self.kept {
            Kept::Tensor(tensor) => Ok(tensor),
            Kept::Block(_) => Err(Error::Operands { reason: "a buffer of another kind of memory".into() }),
        }
    }

    pub(super) fn address(&self) -> u64 {
        self.address
    }

    pub(super) fn bytes(&self) -> usize {
        self.shape.elem_count() * self.dtype.size_in_bytes()
    }
}

/// Tensors of the host, copied to the driver's memory and back for each exchange. For a build without candle's kernels: it is
/// how NCCL is tried with nothing but a driver, or a stand-in for one.
#[derive(Debug)]
pub struct DriverMemory(Arc<Driver>);

/// A context of the driver, and a stream in it.
struct Driver {
    device: c_int,
    context: sys::CUcontext,
    stream: sys::CUstream,
}

// SAFETY: handles of the driver may be used from any thread that makes the context its own, as `bind` does.
#[allow(unsafe_code)]
unsafe impl Send for Driver {}
// SAFETY: as above; nothing in it changes.
#[allow(unsafe_code)]
unsafe impl Sync for Driver {}

impl DriverMemory {
    /// On the GPU of that number.
    ///
    /// # Errors
    /// When there is no driver, or no such GPU.
    #[allow(unsafe_code)]
    pub fn open(ordinal: usize) -> Result<Self> {
        library::check_driver()?;
        let mut opened = Driver { device: 0, context: ptr::null_mut(), stream: ptr::null_mut() };
        // SAFETY: the functions were found; each writes one handle into what it is given.
        unsafe {
            driver("cuInit", sys::cuInit(0))?;
            driver("cuDeviceGet", sys::cuDeviceGet(&mut opened.device, ordinal as c_int))?;
            driver("cuDevicePrimaryCtxRetain", sys::cuDevicePrimaryCtxRetain(&mut opened.context, opened.device))?;
            // From here on dropping it gives back what there is.
            opened.bind()?;
            let flags = sys::CUstream_flags::CU_STREAM_NON_BLOCKING as u32;
            driver("cuStreamCreate", sys::cuStreamCreate(&mut opened.stream, flags))?;
        }
        Ok(Self(Arc::new(opened)))
    }
}

impl Driver {
    #[allow(unsafe_code)]
    fn bind(&self) -> Result<()> {
        // SAFETY: the context is this driver's and retained.
        driver("cuCtxSetCurrent", unsafe { sys::cuCtxSetCurrent(self.context) })
    }
}

impl Drop for Driver {
    #[allow(unsafe_code)]
    fn drop(&mut self) {
        if self.context.is_null() {
            return;
        }
        drop(self.bind());
        // SAFETY: made in `open`, and not used again. What they say is not acted on: the process is done with the GPU.
        unsafe {
            if !self.stream.is_null() {
                let _ = sys::cuStreamDestroy_v2(self.stream);
            }
            let _ = sys::cuDevicePrimaryCtxRelease_v2(self.device);
        }
    }
}

impl fmt::Debug for Driver {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "cuda:{}", self.device)
    }
}

/// Memory from `cuMemAlloc`.
#[derive(Debug)]
struct Block {
    address: sys::CUdeviceptr,
    of: Arc<Driver>,
}

impl Drop for Block {
    #[allow(unsafe_code)]
    fn drop(&mut self) {
        drop(self.of.bind());
        // SAFETY: allocated in `reserve`, and nothing is under way in it: an exchange is over when it returns.
        let _ = unsafe { sys::cuMemFree_v2(self.address) };
    }
}

impl Memory for DriverMemory {
    fn takes(&self, x: &Tensor) -> bool {
        x.device().is_cpu()
    }

    fn bind(&self) -> Result<()> {
        self.0.bind()
    }

    fn stream(&self) -> *mut c_void {
        self.0.stream.cast()
    }

    #[allow(unsafe_code)]
    fn load(&self, x: &Tensor) -> Result<Buffer> {
        let buffer = self.reserve(x.shape(), x.dtype())?;
        let mut bytes = Vec::with_capacity(buffer.bytes());
        crate::bytes::append(x, &mut bytes)?;
        // SAFETY: the block is as long as the bytes; the copy is over when the call returns.
        driver("cuMemcpyHtoD_v2", unsafe { sys::cuMemcpyHtoD_v2(buffer.address, bytes.as_ptr().cast(), bytes.len()) })?;
        Ok(buffer)
    }

    #[allow(unsafe_code)]
    fn reserve(&self, shape: &Shape, dtype: DType) -> Result<Buffer> {
        self.bind()?;
        let (mut address, bytes) = (0, shape.elem_count() * dtype.size_in_bytes());
        // SAFETY: the function was found; it writes one address.
        driver("cuMemAlloc_v2", unsafe { sys::cuMemAlloc_v2(&mut address, bytes) })?;
        Ok(Buffer { address, shape: shape.clone(), dtype, kept: Kept::Block(Block { address, of: self.0.clone() }) })
    }

    #[allow(unsafe_code)]
    fn unload(&self, buffer: Buffer) -> Result<Tensor> {
        let Kept::Block(block) = &buffer.kept else {
            return Err(Error::Operands { reason: "a buffer of another kind of memory".into() });
        };
        let mut bytes = vec![0u8; buffer.bytes()];
        // SAFETY: the block is as long as the bytes; the copy is over when the call returns.
        driver("cuMemcpyDtoH_v2", unsafe { sys::cuMemcpyDtoH_v2(bytes.as_mut_ptr().cast(), block.address, bytes.len()) })?;
        Ok(Tensor::from_raw_buffer(&bytes, buffer.dtype, buffer.shape.dims(), &Device::Cpu)?)
    }
}
