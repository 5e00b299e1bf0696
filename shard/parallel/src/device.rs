//! Where a rank computes, and the link that fits: the one place that tells a CPU from a GPU for those above this crate.

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use candle_core::Device;

use crate::mesh::Link;
use crate::tcp::Tcp;
use crate::{Error, Result};

/// A device by its name: `cpu` or `cuda:N`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Place {
    /// The host's processor, all of it.
    #[default]
    Cpu,
    /// One NVIDIA GPU.
    Cuda {
        /// As the driver counts, from 0 (`CUDA_VISIBLE_DEVICES` renames them).
        ordinal: usize,
    },
}

impl Place {
    /// Makes the device ready.
    ///
    /// # Errors
    /// [`Error::Device`] when this build has no code for it, or the machine has no such device. Nothing else is taken in its
    /// place.
    pub fn open(self) -> Result<Device> {
        match self {
            Self::Cpu => Ok(Device::Cpu),
            Self::Cuda { ordinal } => open_cuda(ordinal).map_err(|reason| Error::Device { device: self.to_string(), reason }),
        }
    }
}

#[cfg(feature = "cuda")]
fn open_cuda(ordinal: usize) -> Result<Device, String> {
    // What follows the first line is where in candle it was noticed.
    let reason = |error: candle_core::Error| error.to_string().lines().next().unwrap_or_default().to_owned();
    Device::new_cuda(ordinal)
        .map_err(|error| format!("the driver does not give it: {}; `nvidia-smi` shows what there is", reason(error)))
}

#[cfg(not(feature = "cuda"))]
fn open_cuda(_: usize) -> Result<Device, String> {
    Err("this program was built without CUDA (`cargo build --release --features cuda` builds it with)".into())
}

impl FromStr for Place {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        let ordinal = |digits: &str| digits.bytes().all(|b| b.is_ascii_digit()).then(|| digits.parse().ok()).flatten();
        match name.split_once(':') {
            None if name == "cpu" => Ok(Self::Cpu),
            Some(("cuda", digits)) if let Some(ordinal) = ordinal(digits) => Ok(Self::Cuda { ordinal }),
            _ => Err(Error::Device { device: name.to_owned(), reason: "a device is `cpu` or `cuda:N`".into() }),
        }
    }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Cpu => f.write_str("cpu"),
            Self::Cuda { ordinal } => write!(f, "cuda:{ordinal}"),
        }
    }
}

/// The link of a rank that computes on `device`, over the connections it has with its peers: those themselves on the CPU,
/// with NCCL beside them on a GPU. Every rank of a group calls this, and all of them compute on the same kind of device.
///
/// # Errors
/// When NCCL cannot be used, or the ranks do not come together.
pub fn link(tcp: Arc<Tcp>, device: &Device) -> Result<Arc<dyn Link>> {
    match device {
        Device::Cpu => Ok(tcp),
        #[cfg(feature = "cuda")]
        Device::Cuda(device) => {
            let memory = Box::new(crate::nccl::CandleMemory::new(device.clone()));
            Ok(Arc::new(crate::nccl::NcclLink::connect(tcp, memory, crate::nccl::EXCHANGE_TIMEOUT)?))
        }
        other => Err(Error::Device { device: format!("{other:?}"), reason: "its ranks have no way to each other".into() }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_has_one_name() {
        for (name, place) in
            [("cpu", Place::Cpu), ("cuda:0", Place::Cuda { ordinal: 0 }), ("cuda:15", Place::Cuda { ordinal: 15 })]
        {
            assert_eq!(name.parse::<Place>().unwrap(), place);
            assert_eq!(place.to_string(), name);
        }
        for name in ["", "CPU", "cuda", "cuda:", "cuda:-1", "cuda:+1", "cuda:1:2", "gpu:0", "cpu:0", "cuda:99999999999999999999"]
        {
            assert!(matches!(name.parse::<Place>(), Err(Error::Device { device, .. }) if device == name), "{name}");
        }
    }

    #[cfg(not(feature = "cuda"))]
    #[test]
    fn a_build_without_cuda_says_so_and_takes_nothing_in_its_place() {
        let error = Place::Cuda { ordinal: 0 }.open().unwrap_err().to_string();
        assert!(error.contains("`cuda:0`") && error.contains("built without CUDA"), "{error}");
    }
}
