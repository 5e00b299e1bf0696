//! candle's tensors on a GPU, where they are.

use std::ffi::c_void;

use candle_core::cuda_backend::CudaDType;
use candle_core::{CudaDevice, DType, Device, Shape, Storage, Tensor};
use cudarc::driver::{CudaStream, DevicePtr};

use super::memory::{Buffer, Memory};
use crate::{Error, Result};

/// candle's tensors on one GPU, where they are: nothing is copied. NCCL works on candle's own stream, so behind what makes the
/// tensor and before what uses the sum.
#[derive(Debug)]
pub struct CandleMemory(CudaDevice);

impl CandleMemory {
    /// Of that GPU.
    pub fn new(device: CudaDevice) -> Self {
        Self(device)
    }

    /// Where a whole tensor lies.
    fn address(&self, x: &Tensor) -> Result<u64> {
        let stream = self.0.cuda_stream();
        let (storage, layout) = x.storage_and_layout();
        let Storage::Cuda(storage) = &*storage else {
            return Err(Error::Operands { reason: format!("for a GPU a tensor of {:?}", x.device()) });
        };
        fn at<T: CudaDType>(storage: &candle_core::CudaStorage, stream: &CudaStream) -> Result<u64> {
            Ok(storage.as_cuda_slice::<T>()?.device_ptr(stream).0)
        }
        let start = match x.dtype() {
            DType::F32 => at::<f32>(storage, &stream)?,
            DType::BF16 => at::<half::bf16>(storage, &stream)?,
            DType::F16 => at::<half::f16>(storage, &stream)?,
            DType::F64 => at::<f64>(storage, &stream)?,
            DType::U32 => at::<u32>(storage, &stream)?,
            DType::I64 => at::<i64>(storage, &stream)?,
            DType::U8 => at::<u8>(storage, &stream)?,
            other => return Err(Error::Operands { reason: format!("between GPUs a tensor of {other:?}") }),
        };
        Ok(start + (layout.start_offset() * x.dtype().size_in_bytes()) as u64)
    }

    fn buffer(&self, x: Tensor) -> Result<Buffer> {
        let address = self.address(&x)?;
        Ok(Buffer::of(x, address))
    }
}

impl Memory for CandleMemory {
    fn takes(&self, x: &Tensor) -> bool {
        x.device().is_cuda()
    }

    fn bind(&self) -> Result<()> {
        let bound = self.0.cuda_stream().context().bind_to_thread();
        bound.map_err(|error| Error::Gpu { call: "cuCtxSetCurrent", reason: error.to_string() })
    }

    fn stream(&self) -> *mut c_void {
        self.0.cuda_stream().cu_stream().cast()
    }

    fn load(&self, x: &Tensor) -> Result<Buffer> {
        self.buffer(x.contiguous()?)
    }

    fn reserve(&self, shape: &Shape, dtype: DType) -> Result<Buffer> {
        self.buffer(Tensor::zeros(shape, dtype, &Device::Cuda(self.0.clone()))?)
    }

    fn unload(&self, buffer: Buffer) -> Result<Tensor> {
        buffer.into_tensor()
    }
}
