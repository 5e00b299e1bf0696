//! Tiles of bf16 on AVX2: the bits of AMX where there is none. As in [`super::vector_pairs`], in assembler, because numbers too small to be
//! normal count as zero here, which is a mode of the CPU that compiled code must not see.
#![allow(unsafe_code)] // assembler and intrinsics on pointers

use std::arch::asm;

use super::avx2::{self, LANES};
use super::vector_pairs::FLUSHING;
use super::{MicroKernel, TILE_PAIRS, Takes, Tile};

const MR: usize = 6;
const NR: usize = 2 * LANES;

pub(super) static KERNEL: MicroKernel = MicroKernel {
    name: "avx2_tiles",
    mr: MR,
    nr: NR,
    takes: Takes::Tiles,
    tile,
    chunks: false,
    lines: None,
    places: false,
    spin: avx2::spin,
    flops: avx2::KERNEL.flops,
};

/// # Safety
/// The CPU has AVX2 and FMA; the tile's pointers are good for what its documentation says.
unsafe fn tile(t: Tile) {
    // The sums, and of the tile that is passed those of the later ones of its pairs.
    let mut memory = [[[0f32; NR]; MR]; 2];
    let wanted = if t.fresh { 0 } else { t.rows };
    for (row, sums) in memory[0].iter_mut().enumerate().take(wanted) {
        // SAFETY: a row of the results.
        unsafe { sums.as_mut_ptr().copy_from_nonoverlapping(t.c.add(row * t.stride), NR) };
    }
    if t.k > 0 {
        // SAFETY: as promised by the caller; absent rows have places in `a` and in `memory`.
        unsafe { add_products(&t, memory.as_mut_ptr().cast()) };
    }
    for (row, sums) in memory[0].iter().enumerate().take(t.rows) {
        // SAFETY: a row of the results.
        unsafe { t.c.add(row * t.stride).copy_from_nonoverlapping(sums.as_ptr(), NR) };
    }
}

/// Something for each row: its number, and the registers of the halves of its sums.
macro_rules! each_row {
    ($each:ident) => {
        concat!(
            $each!("0", "ymm0", "ymm1"),
            $each!("1", "ymm2", "ymm3"),
            $each!("2", "ymm4", "ymm5"),
            $each!("3", "ymm6", "ymm7"),
            $each!("4", "ymm8", "ymm9"),
            $each!("5", "ymm10", "ymm11"),
        )
    };
}

macro_rules! zero {
    ($row:literal, $left:literal, $right:literal) => {
        concat!("vxorps ", $left, ", ", $left, ", ", $left, "\n", "vxorps ", $right, ", ", $right, ", ", $right, "\n")
    };
}

/// The products of a row with the columns in ymm12 and ymm13; `$widen` makes ymm14 of two pairs the ones that are multiplied.
macro_rules! products {
    ($widen:literal, $row:literal, $left:literal, $right:literal) => {
        concat!(
            "vbroadcastss ymm14, dword ptr [{a} + 64 * ",
            $row,
            "]\n",
            $widen,
            "\n",
            "vfmadd231ps ",
            $left,
            ", ymm14, ymm12\n",
            "vfmadd231ps ",
            $right,
            ", ymm14, ymm13\n",
        )
    };
}

macro_rules! later {
    ($row:literal, $left:literal, $right:literal) => {
        products!("vandps ymm14, ymm14, ymm15", $row, $left, $right)
    };
}

macro_rules! earlier {
    ($row:literal, $left:literal, $right:literal) => {
        products!("vpslld ymm14, ymm14, 16", $row, $left, $right)
    };
}

/// Puts a row's sums into the second half of `memory`.
macro_rules! keep {
    ($row:literal, $left:literal, $right:literal) => {
        concat!(
            "vmovups ymmword ptr [{memory} + 64 * (6 + ",
            $row,
            ")], ",
            $left,
            "\n",
            "vmovups ymmword ptr [{memory} + 64 * (6 + ",
            $row,
            ") + 32], ",
            $right,
            "\n"
        )
    };
}

/// Adds what was kept, and both to what is in the first half.
macro_rules! add {
    ($row:literal, $left:literal, $right:literal) => {
        concat!(
            add!(half $row, $left, ""),
            add!(half $row, $right, " + 32"),
        )
    };
    (half $row:literal, $sums:literal, $at:literal) => {
        concat!(
            "vaddps ", $sums, ", ", $sums, ", ymmword ptr [{memory} + 64 * (6 + ", $row, ")", $at, "]\n",
            "vaddps ", $sums, ", ", $sums, ", ymmword ptr [{memory} + 64 * ", $row, $at, "]\n",
            "vmovups ymmword ptr [{memory} + 64 * ", $row, $at, "], ", $sums, "\n",
        )
    };
}

/// # Safety
/// The CPU has AVX2 and FMA; `k` is of whole tiles, one at least; `memory` is `[2][MR][NR]`.
unsafe fn add_products(t: &Tile, memory: *mut f32) {
    let mut mode = [0u32, FLUSHING];
    // SAFETY: every pointer stays in `[k / 16][MR][16]` of `a`, `[k][NR]` of `b` and in `memory`. The mode is as it was at the end.
    unsafe {
        asm!(
            "stmxcsr dword ptr [{mode}]",
            "ldmxcsr dword ptr [{mode} + 4]",
            "vpcmpeqd ymm15, ymm15, ymm15",
            "vpslld ymm15, ymm15, 16",
            "2:",
            each_row!(zero),
            "mov {pairs:e}, {tile_pairs}",
            ".p2align 5",
            "3:",
            "vandps ymm12, ymm15, ymmword ptr [{b}]",
            "vandps ymm13, ymm15, ymmword ptr [{b} + 32]",
            each_row!(later),
            "add {a}, 4",
            "add {b}, 4 * {nr}",
            "dec {pairs:e}",
            "jnz 3b",
            each_row!(keep),
            each_row!(zero),
            "sub {a}, 4 * {tile_pairs}",
            "sub {b}, 4 * {nr} * {tile_pairs}",
            "mov {pairs:e}, {tile_pairs}",
            ".p2align 5",
            "4:",
            "vmovdqu ymm12, ymmword ptr [{b}]",
            "vmovdqu ymm13, ymmword ptr [{b} + 32]",
            "vpslld ymm12, ymm12, 16",
            "vpslld ymm13, ymm13, 16",
            each_row!(earlier),
            "add {a}, 4",
            "add {b}, 4 * {nr}",
            "dec {pairs:e}",
            "jnz 4b",
            each_row!(add),
            "add {a}, 4 * {tile_pairs} * ({mr} - 1)",
            "dec {tiles}",
            "jnz 2b",
            "ldmxcsr dword ptr [{mode}]",
            mr = const MR,
            nr = const NR,
            tile_pairs = const TILE_PAIRS,
            mode = in(reg) mode.as_mut_ptr(),
            memory = in(reg) memory,
            a = inout(reg) t.a => _,
            b = inout(reg) t.b => _,
            tiles = inout(reg) t.k / TILE_PAIRS => _,
            pairs = out(reg) _,
            out("ymm0") _, out("ymm1") _, out("ymm2") _, out("ymm3") _, out("ymm4") _, out("ymm5") _, out("ymm6") _, out("ymm7") _,
            out("ymm8") _, out("ymm9") _, out("ymm10") _, out("ymm11") _, out("ymm12") _, out("ymm13") _, out("ymm14") _, out("ymm15") _,
            options(nostack),
        );
    }
}
