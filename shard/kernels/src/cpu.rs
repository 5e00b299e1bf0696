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

/// Compiles a function of plain Rust twice, as it stands and for AVX2, and calls what the CPU has. Rust never fuses a
/// multiplication with an addition by itself, so both give the same bits.
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
