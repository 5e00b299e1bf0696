//! What models are multiplied in.

use std::fmt;
use std::str::FromStr;
use std::sync::atomic::{AtomicBool, Ordering};

use candle_core::Device;

use super::host::has_kernels;
use crate::{Error, Result};

/// What layers whose weights are bf16 multiply in; on the CPU attention too.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Products {
    /// Weights are widened for each product: the reference's f32 numbers.
    #[default]
    F32,
    /// Inputs are rounded to bf16, sums are in f32, and the rest stays f32: several times as fast.
    Bf16,
}

static BF16: AtomicBool = AtomicBool::new(false);

impl Products {
    /// Makes it this process's way from now on. A worker is a process with one device.
    pub fn use_here(self) {
        BF16.store(self == Self::Bf16, Ordering::Relaxed);
    }

    /// Whether `device` has them. A CPU has those in bf16 if it has AVX-512 BF16 and computes by our kernels.
    ///
    /// # Errors
    /// [`Error::Operands`], which says what is missing.
    pub fn check(self, device: &Device) -> Result<()> {
        let lacks = |what: &str| Err(Error::Operands { reason: format!("`bf16` to multiply in: {what}") });
        match (self, device) {
            (Self::Bf16, Device::Cpu) if !has_kernels(device) => lacks("candle's operations for the CPU have no such products"),
            (Self::Bf16, Device::Cpu) if !kernels::cpu::has_bf16() => lacks("this CPU has no AVX-512 BF16"),
            _ => Ok(()),
        }
    }

    /// This process's way.
    pub(crate) fn here() -> Self {
        if BF16.load(Ordering::Relaxed) { Self::Bf16 } else { Self::F32 }
    }
}

impl FromStr for Products {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        match name {
            "f32" => Ok(Self::F32),
            "bf16" => Ok(Self::Bf16),
            _ => Err(Error::Operands { reason: format!("`{name}` to multiply in, which is neither f32 nor bf16") }),
        }
    }
}

impl fmt::Display for Products {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if *self == Self::Bf16 { "bf16" } else { "f32" })
    }
}
