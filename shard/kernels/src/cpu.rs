//! What this process's CPU can do.

use std::sync::OnceLock;

/// An instruction set the kernels are written for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Path {
    /// Whatever the compiler makes of plain Rust: the reference.
    Plain,
    /// 256-bit vectors with fused multiply-add.
    Avx2,
    /// As [`Self::Avx2`], and products in 512-bit vectors.
    Avx512,
}

/// The best path this CPU has. Found once.
pub fn path() -> Path {
    static PATH: OnceLock<Path> = OnceLock::new();
    *PATH.get_or_init(|| {
        #[cfg(target_arch = "x86_64")]
        if std::arch::is_x86_feature_detected!("avx2") && std::arch::is_x86_feature_detected!("fma") {
            return if std::arch::is_x86_feature_detected!("avx512f") { Path::Avx512 } else { Path::Avx2 };
        }
        Path::Plain
    })
}

/// Whether this CPU has what code for 512-bit vectors is compiled for.
#[cfg(target_arch = "x86_64")]
pub(crate) fn has_wide_vectors() -> bool {
    use std::arch::is_x86_feature_detected as has;

    static WIDE: OnceLock<bool> = OnceLock::new();
    *WIDE.get_or_init(|| path() == Path::Avx512 && has!("avx512bw") && has!("avx512dq") && has!("avx512vl"))
}

/// Whether this CPU multiplies pairs of bf16 (AVX-512 BF16), twice as many in an instruction as f32.
pub fn has_bf16() -> bool {
    #[cfg(target_arch = "x86_64")]
    {
        path() == Path::Avx512 && std::arch::is_x86_feature_detected!("avx512bf16")
    }
    #[cfg(not(target_arch = "x86_64"))]
    {
        false
    }
}

/// Whether this CPU multiplies tiles of bf16 (AMX), and the system lets this process: it is asked once.
pub fn has_amx() -> bool {
    #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
    {
        static ALLOWED: OnceLock<bool> = OnceLock::new();
        *ALLOWED.get_or_init(|| path() == Path::Avx512 && amx::is_there() && amx::is_allowed())
    }
    #[cfg(not(all(target_arch = "x86_64", target_os = "linux")))]
    {
        false
    }
}

#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
#[allow(unsafe_code)] // what the standard library does not detect yet
mod amx {
    use std::arch::x86_64::__cpuid_count;

    /// In EDX of leaf 7: AMX-BF16 and AMX-TILE.
    const BITS: u32 = 1 << 22 | 1 << 24;
    const ARCH_REQ_XCOMP_PERM: libc::c_long = 0x1023;
    const XFEATURE_XTILEDATA: libc::c_long = 18;

    pub(super) fn is_there() -> bool {
        __cpuid_count(7, 0).edx & BITS == BITS
    }

    /// A thread's state with tiles is 8 KiB larger: Linux gives it to processes that ask.
    pub(super) fn is_allowed() -> bool {
        // SAFETY: it only says that this process is going to use tiles.
        unsafe { libc::syscall(libc::SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0 }
    }
}

/// Whether this CPU multiplies bytes (AVX-512 VNNI), four in an instruction for each f32.
pub fn has_int8() -> bool {
    #[cfg(target_arch = "x86_64")]
    {
        path() == Path::Avx512 && std::arch::is_x86_feature_detected!("avx512vnni")
    }
    #[cfg(not(target_arch = "x86_64"))]
    {
        false
    }
}

/// Whether this CPU widens halves.
#[cfg(target_arch = "x86_64")]
pub(crate) fn has_halves() -> bool {
    std::arch::is_x86_feature_detected!("f16c")
}

/// Asks for memory that is soon to be read, in the second-level cache; nothing waits for it.
#[inline(always)]
pub(crate) fn fetch(bytes: &[u8]) {
    #[cfg(target_arch = "x86_64")]
    for line in bytes.chunks(64) {
        use std::arch::x86_64::{_MM_HINT_T1, _mm_prefetch};
        #[allow(unsafe_code)] // an intrinsic on a pointer
        // SAFETY: the instruction only hints, and is part of every x86-64.
        unsafe {
            _mm_prefetch::<_MM_HINT_T1>(line.as_ptr().cast());
        }
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = bytes;
}

/// Compiles a function of plain Rust three times, as it stands, for AVX2 and for AVX-512, and calls what the CPU has. Rust never fuses a
/// multiplication with an addition by itself, so all give the same bits.
macro_rules! vectorised {
    ($(#[$doc:meta])* $vis:vis fn $name:ident($($arg:ident: $ty:ty),* $(,)?) $(-> $out:ty)? $body:block) => {
        $(#[$doc])*
        $vis fn $name($($arg: $ty),*) $(-> $out)? {
            #[inline(always)]
            fn plain($($arg: $ty),*) $(-> $out)? $body

            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx2,fma")]
            fn avx2($($arg: $ty),*) $(-> $out)? {
                plain($($arg),*)
            }

            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]
            fn avx512($($arg: $ty),*) $(-> $out)? {
                plain($($arg),*)
            }

            #[cfg(target_arch = "x86_64")]
            if $crate::cpu::has_wide_vectors() {
                #[allow(unsafe_code)] // a call to code for more than the baseline CPU
                // SAFETY: the CPU has all of them.
                return unsafe { avx512($($arg),*) };
            }
            #[cfg(target_arch = "x86_64")]
            if $crate::cpu::path() != $crate::cpu::Path::Plain {
                #[allow(unsafe_code)] // a call to code for more than the baseline CPU
                // SAFETY: the CPU has AVX2 and FMA, or `path` would not say so.
                return unsafe { avx2($($arg),*) };
            }
            plain($($arg),*)
        }
    };
}
pub(crate) use vectorised;
