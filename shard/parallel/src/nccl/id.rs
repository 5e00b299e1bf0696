//! What the ranks of a communicator find each other by.

use std::ffi::c_char;
use std::fmt;

use candle_core::{Device, Tensor};
use cudarc::nccl::sys;

use super::comm::succeeded;
use super::library;
use crate::{Error, Result};

const BYTES: usize = 128;

/// What the ranks of a communicator find each other by, made for one epoch of one group. A secret: who knows it can join, so
/// it is neither shown nor logged.
#[derive(Clone, PartialEq, Eq)]
pub struct UniqueId([u8; BYTES]);

impl UniqueId {
    /// A new one, from NCCL.
    ///
    /// # Errors
    /// When the library cannot be used.
    #[allow(unsafe_code)]
    pub fn new() -> Result<Self> {
        library::check_nccl()?;
        let mut id = sys::ncclUniqueId { internal: [0; BYTES] };
        // SAFETY: the symbol was found; NCCL fills the 128 bytes it is given.
        succeeded("ncclGetUniqueId", unsafe { sys::ncclGetUniqueId(&mut id) })?;
        Ok(Self(id.internal.map(|byte| byte as u8)))
    }

    /// As it travels between the ranks.
    pub(super) fn to_tensor(&self) -> Result<Tensor> {
        Ok(Tensor::from_slice(&self.0, BYTES, &Device::Cpu)?)
    }

    /// As it came from another rank.
    pub(super) fn from_tensor(words: &Tensor) -> Result<Self> {
        let bytes = words.to_vec1::<u8>().ok().and_then(|bytes| bytes.try_into().ok());
        bytes
            .map(Self)
            .ok_or_else(|| Error::Frame(format!("{:?} of {:?} is no id of a communicator", words.shape(), words.dtype())))
    }

    pub(super) fn raw(&self) -> sys::ncclUniqueId {
        sys::ncclUniqueId { internal: self.0.map(|byte| byte as c_char) }
    }
}

impl fmt::Debug for UniqueId {
    /// Without what it is.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("UniqueId(secret)")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_travels_and_does_not_show() {
        let id = UniqueId(std::array::from_fn(|i| i as u8));
        assert_eq!(UniqueId::from_tensor(&id.to_tensor().unwrap()).unwrap(), id);
        assert_eq!(format!("{id:?}"), "UniqueId(secret)");
    }

    #[test]
    fn words_that_are_no_id_are_refused_and_not_repeated() {
        let words = Tensor::from_slice(&[7u8; 127], 127, &Device::Cpu).unwrap();
        let error = UniqueId::from_tensor(&words).unwrap_err();
        assert!(matches!(&error, Error::Frame(_)) && !error.to_string().contains("7, 7"), "{error}");
    }
}
