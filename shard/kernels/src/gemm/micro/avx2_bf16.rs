//! Pairs of bf16 on AVX2, which has no instruction for them: both of a pair are widened in registers and multiplied as floats, the later
//! one first. In assembler, because numbers too small to be normal count as zero here, which is a mode of the CPU that compiled code
//! must not see.
#![allow(unsafe_code)] // assembler and intrinsics on pointers

use std::arch::asm;
use std::arch::x86_64::{__m256, _mm256_castsi256_ps, _mm256_set1_epi32};

use super::avx2::{self, LANES, load, store, zero};
use super::{MicroKernel, Takes, Tile};

const MR: usize = 6;
const NR: usize = 2 * LANES;
/// The default, and inputs and results that are too small are zero.
pub(super) const FLUSHING: u32 = 0x1f80 | 0x8040;

pub(super) static KERNEL: MicroKernel = MicroKernel {
    name: "avx2_bf16",
    mr: MR,
    nr: NR,
    takes: Takes::Pairs,
    tile,
    lines: None,
    spin: avx2::spin,
    flops: avx2::KERNEL.flops,
};

/// # Safety
/// The CPU has AVX2 and FMA; the tile's pointers are good for what its documentation says.
unsafe fn tile(t: Tile) {
    // SAFETY: as promised by the caller.
    unsafe {
        match t.rows {
            1 => rows_1(t),
            2 => rows_2(t),
            3 => rows_3(t),
            4 => rows_4(t),
            5 => rows_5(t),
            _ => rows_6(t),
        }
    }
}

/// The products of one row with the columns in `b0` and `b1`, one of each pair; `{x}` is made from the pair by `$widen`.
macro_rules! products_of_row {
    ($row:literal, $left:ident, $right:ident, $widen:literal) => {
        concat!(
            "vbroadcastss {x}, dword ptr [{a} + 4 * ",
            $row,
            "]\n",
            $widen,
            "\n",
            "vfmadd231ps {",
            stringify!($left),
            "}, {x}, {b0}\n",
            "vfmadd231ps {",
            stringify!($right),
            "}, {x}, {b1}\n",
        )
    };
}

macro_rules! rows {
    ($name:ident, $count:literal, $($row:literal $left:ident $right:ident),*) => {
        /// # Safety
        /// As [`tile`], for a tile of as many rows.
        #[target_feature(enable = "avx2,fma")]
        unsafe fn $name(t: Tile) {
            // SAFETY: every pointer stays in `[k][MR]` of `a`, `[k][NR]` of `b` and `[rows][NR]` of `c`. The mode is as it was at the end.
            unsafe {
                let mut sums: [[__m256; 2]; $count] = [[zero(); 2]; $count];
                if !t.fresh {
                    for (row, sum) in sums.iter_mut().enumerate() {
                        let c = t.c.add(row * t.stride);
                        *sum = [load(c), load(c.add(LANES))];
                    }
                }
                if t.k > 0 {
                    let mut mode = [0u32, FLUSHING];
                    asm!(
                        "stmxcsr dword ptr [{mode}]",
                        "ldmxcsr dword ptr [{mode} + 4]",
                        ".p2align 5",
                        "2:",
                        "vandps {b0}, {upper}, ymmword ptr [{b}]",
                        "vandps {b1}, {upper}, ymmword ptr [{b} + 32]",
                        $(products_of_row!($row, $left, $right, "vandps {x}, {x}, {upper}"),)*
                        "vmovdqu {b0}, ymmword ptr [{b}]",
                        "vmovdqu {b1}, ymmword ptr [{b} + 32]",
                        "vpslld {b0}, {b0}, 16",
                        "vpslld {b1}, {b1}, 16",
                        $(products_of_row!($row, $left, $right, "vpslld {x}, {x}, 16"),)*
                        "add {a}, 4 * {mr}",
                        "add {b}, 4 * {nr}",
                        "dec {k}",
                        "jnz 2b",
                        "ldmxcsr dword ptr [{mode}]",
                        mr = const MR,
                        nr = const NR,
                        mode = in(reg) mode.as_mut_ptr(),
                        a = inout(reg) t.a => _,
                        b = inout(reg) t.b => _,
                        k = inout(reg) t.k => _,
                        upper = in(ymm_reg) _mm256_castsi256_ps(_mm256_set1_epi32(-0x1_0000)),
                        b0 = out(ymm_reg) _,
                        b1 = out(ymm_reg) _,
                        x = out(ymm_reg) _,
                        $($left = inout(ymm_reg) sums[$row][0], $right = inout(ymm_reg) sums[$row][1],)*
                        options(nostack),
                    );
                }
                for (row, sum) in sums.iter().enumerate() {
                    let c = t.c.add(row * t.stride);
                    store(c, sum[0]);
                    store(c.add(LANES), sum[1]);
                }
            }
        }
    };
}

rows!(rows_1, 1, 0 l0 r0);
rows!(rows_2, 2, 0 l0 r0, 1 l1 r1);
rows!(rows_3, 3, 0 l0 r0, 1 l1 r1, 2 l2 r2);
rows!(rows_4, 4, 0 l0 r0, 1 l1 r1, 2 l2 r2, 3 l3 r3);
rows!(rows_5, 5, 0 l0 r0, 1 l1 r1, 2 l2 r2, 3 l3 r3, 4 l4 r4);
rows!(rows_6, 6, 0 l0 r0, 1 l1 r1, 2 l2 r2, 3 l3 r3, 4 l4 r4, 5 l5 r5);
