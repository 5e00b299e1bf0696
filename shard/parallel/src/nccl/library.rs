//! Whether the vendor's libraries are there with all that is called of them. Asked before the first call: cudarc opens them when
//! they are used, and panics at a library or a function that is not there.

use std::ffi::c_int;

use cudarc::nccl::sys;

use super::comm::succeeded;
use crate::{Error, Result};

/// The oldest NCCL that will do, as it says its version: 2.17.0, since which the configuration begins as it does here.
pub const OLDEST_NCCL: i32 = 21_700;

/// What is called of libnccl.
const NCCL: [&str; 9] = [
    "ncclGetVersion",
    "ncclGetUniqueId",
    "ncclCommInitRankConfig",
    "ncclCommGetAsyncError",
    "ncclCommAbort",
    "ncclGroupStart",
    "ncclGroupEnd",
    "ncclSend",
    "ncclRecv",
];

/// What is called of libcuda.
const CUDA: [&str; 12] = [
    "cuInit",
    "cuDeviceGet",
    "cuDevicePrimaryCtxRetain",
    "cuDevicePrimaryCtxRelease_v2",
    "cuCtxSetCurrent",
    "cuStreamCreate",
    "cuStreamQuery",
    "cuStreamDestroy_v2",
    "cuMemAlloc_v2",
    "cuMemFree_v2",
    "cuMemcpyHtoD_v2",
    "cuMemcpyDtoH_v2",
];

/// Whether NCCL and what it needs of the driver can be called.
///
/// # Errors
/// [`Error::LibraryMissing`], [`Error::SymbolMissing`], [`Error::LibraryTooOld`].
#[allow(unsafe_code)]
pub(super) fn check_nccl() -> Result<()> {
    check_driver()?;
    find::nccl(&NCCL)?;
    let mut found: c_int = 0;
    // SAFETY: the function was found; it writes one int.
    succeeded("ncclGetVersion", unsafe { sys::ncclGetVersion(&mut found) })?;
    if found < OLDEST_NCCL {
        return Err(Error::LibraryTooOld { library: "nccl", found, needed: OLDEST_NCCL });
    }
    Ok(())
}

/// Whether what is called of the driver is there.
pub(super) fn check_driver() -> Result<()> {
    find::cuda(&CUDA)
}

#[cfg(not(feature = "cuda"))]
mod find {
    use cudarc::{driver, nccl};

    use crate::{Error, Result};

    /// Looks for `$names` in the library that cudarc opens.
    macro_rules! all_in {
        ($library:literal, $sys:path, $names:expr) => {{
            use $sys as sys;
            // SAFETY: asks the loader. The libraries' initialisers run, as they would at the first call.
            if !unsafe { sys::is_culib_present() } {
                return Err(Error::LibraryMissing { library: $library });
            }
            // SAFETY: the library is there, so it is opened (once, for the life of the process). Symbols are looked for and
            // not called, whatever type they have.
            let missing =
                $names.iter().find(|name| unsafe { sys::culib().get::<unsafe extern "C" fn()>(name.as_bytes()) }.is_err());
            missing.map_or(Ok(()), |symbol| Err(Error::SymbolMissing { library: $library, symbol }))
        }};
    }

    #[allow(unsafe_code)]
    pub(super) fn nccl(names: &[&'static str]) -> Result<()> {
        all_in!("nccl", nccl::sys, names)
    }

    #[allow(unsafe_code)]
    pub(super) fn cuda(names: &[&'static str]) -> Result<()> {
        all_in!("cuda", driver::sys, names)
    }
}

/// With candle's kernels the libraries are linked: a program that runs has them, with all that it calls.
#[cfg(feature = "cuda")]
mod find {
    use crate::Result;

    pub(super) fn nccl(_: &[&'static str]) -> Result<()> {
        Ok(())
    }

    pub(super) fn cuda(_: &[&'static str]) -> Result<()> {
        Ok(())
    }
}
