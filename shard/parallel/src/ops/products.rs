//! What models are multiplied in.

use std::cell::Cell;
use std::fmt;
use std::str::FromStr;

use candle_core::Device;
use kernels::cpu;
use kernels::gemm::Order;
use kernels::gemm::micro::has_fast_pairs;

use super::host::has_kernels;
use crate::{Error, Result};

/// What layers whose weights are of 16 bits or blocks multiply in; on the CPU attention and convolutions too. f16 is rounded to bf16 for it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Products {
    /// Weights are widened for each product: the reference's f32 numbers.
    #[default]
    F32,
    /// Inputs are rounded to bf16, sums are in f32, and the rest stays f32.
    Bf16,
    /// As [`Self::Bf16`], added in the order of AMX, which has other last bits: several times as fast on a CPU that has it, as slow as
    /// [`Self::F32`] on one that has not.
    Amx,
    /// Inputs of weights in blocks are rounded to 8 bits and a scale for each 32 of them, and multiplied with the weights' whole numbers; all
    /// else is as in [`Self::Bf16`], and so is a layer whose eighths are not of whole blocks.
    Int8,
}

thread_local! {
    static HERE: Cell<Products> = const { Cell::new(Products::F32) };
}

impl Products {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::F32, Self::Bf16, Self::Amx, Self::Int8];

    /// Runs `f`, in which this thread loads and computes in this way. A rank is a thread, from its first weight to its last forward: so
    /// ranks of several models in one process each have their own way. What `f` starts on other threads does not have it, unless they
    /// are given it in the same manner; the threads that kernels compute with need not be, since they are told all there is.
    pub fn scope<R>(self, f: impl FnOnce() -> R) -> R {
        /// Puts back what was, however the scope ends.
        struct Before(Products);
        impl Drop for Before {
            fn drop(&mut self) {
                HERE.set(self.0);
            }
        }
        let _before = Before(HERE.replace(self));
        f()
    }

    /// Whether `device` has them. A CPU has those of fewer bits if it has AVX2 (or more) and computes by our kernels; a GPU those in bf16.
    ///
    /// # Errors
    /// [`Error::Operands`], which says what is missing.
    pub fn check(self, device: &Device) -> Result<()> {
        let lacks = |what: &str| Err(Error::Operands { reason: format!("`{self}` to multiply in: {what}") });
        match (self, device) {
            (Self::F32, _) => Ok(()),
            (_, Device::Cpu) if !has_kernels(device) => lacks("candle's operations for the CPU have no such products"),
            (_, Device::Cpu) if cpu::path() == cpu::Path::Plain => lacks("this CPU has no AVX2"),
            (Self::Amx | Self::Int8, device) if !device.is_cpu() => lacks("only the CPU's kernels have them"),
            _ => Ok(()),
        }
    }

    /// Whether a CPU's kernels give these bits by other instructions than theirs, and so no faster than [`Self::F32`].
    pub fn is_imitated(self) -> bool {
        match self {
            Self::F32 | Self::Int8 => false,
            Self::Bf16 => !has_fast_pairs(),
            Self::Amx => !cpu::has_amx(),
        }
    }

    /// Whether bf16 is multiplied as it is.
    pub fn narrow(self) -> bool {
        self != Self::F32
    }

    /// In which order our kernels add products of bf16; `None` if there are none.
    pub(crate) fn order(self) -> Option<Order> {
        match self {
            Self::F32 => None,
            Self::Bf16 | Self::Int8 => Some(Order::Pairs),
            Self::Amx => Some(Order::Tiles),
        }
    }

    /// This thread's way: f32 out of any [`Self::scope`].
    pub fn here() -> Self {
        HERE.get()
    }

    /// As it is written.
    fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::Bf16 => "bf16",
            Self::Amx => "amx",
            Self::Int8 => "int8",
        }
    }
}

impl FromStr for Products {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        let unknown = || Error::Operands { reason: format!("`{name}` to multiply in, which is not f32, bf16, amx or int8") };
        Self::ALL.into_iter().find(|way| way.name() == name).ok_or_else(unknown)
    }
}

impl fmt::Display for Products {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

#[cfg(test)]
mod tests {
    use std::panic::{AssertUnwindSafe, catch_unwind};

    use super::*;

    #[test]
    fn a_way_is_that_of_its_scope_and_its_thread() {
        assert_eq!(Products::here(), Products::F32);
        Products::Bf16.scope(|| {
            Products::Amx.scope(|| assert_eq!(Products::here(), Products::Amx));
            assert!(catch_unwind(AssertUnwindSafe(|| Products::Int8.scope(|| panic!("in a scope")))).is_err());
            assert_eq!(Products::here(), Products::Bf16);
            let beside = std::thread::scope(|scope| scope.spawn(Products::here).join().unwrap());
            assert_eq!(beside, Products::F32);
        });
        assert_eq!(Products::here(), Products::F32);
    }
}
