//! Tiles of bf16 on AMX: an instruction multiplies 16 rows of 32 by 32 columns of 16. In assembler, since the compiler knows of no tiles.
#![allow(unsafe_code)] // assembler on pointers

use std::arch::asm;
use std::cell::Cell;
use std::mem::MaybeUninit;

use super::{Lines, MicroKernel, TILE_PAIRS, Takes, Tile};

/// Rows of a tile, and floats of one of its rows.
const SIDE: usize = 16;
const MR: usize = 2 * SIDE;
const NR: usize = 2 * SIDE;
/// Bytes from a row to the next: of inputs, and of weights.
const INPUT_STRIDE: usize = size_of::<f32>() * TILE_PAIRS;
const WEIGHT_STRIDE: usize = size_of::<f32>() * NR;
/// Pairs of which inputs and weights stay in the first-level cache together.
const KEPT: usize = 128;
/// Tiles that a round of `spin` multiplies.
const SPUN: usize = 4;

pub(super) static KERNEL: MicroKernel = MicroKernel {
    name: "amx",
    mr: MR,
    nr: NR,
    takes: Takes::Tiles,
    tile,
    chunks: false,
    lines: Some(lines),
    places: false,
    spin,
    flops: SPUN * 4 * SIDE * SIDE * TILE_PAIRS,
};

/// What `ldtilecfg` reads.
#[repr(C, align(64))]
struct Config {
    palette: u8,
    start_row: u8,
    reserved: [u8; 14],
    bytes_of_row: [u16; 16],
    rows: [u8; 16],
}

/// All eight tiles are whole ones.
static CONFIG: Config = {
    let (mut bytes_of_row, mut rows) = ([0; 16], [0; 16]);
    let mut tile = 0;
    while tile < 8 {
        (bytes_of_row[tile], rows[tile]) = (64, SIDE as u8);
        tile += 1;
    }
    Config { palette: 1, start_row: 0, reserved: [0; 14], bytes_of_row, rows }
};

/// Says once for each thread what tiles are like; nothing else in this process has any.
///
/// # Safety
/// The CPU has AMX, and the system lets this process use it.
#[inline]
unsafe fn configure() {
    thread_local! {
        static DONE: Cell<bool> = const { Cell::new(false) };
    }
    if !DONE.replace(true) {
        // SAFETY: as promised by the caller; the tiles are nobody's before.
        unsafe { asm!("ldtilecfg [{}]", in(reg) &raw const CONFIG, options(nostack, readonly)) };
    }
}

/// Results in one piece, for a tile of fewer rows.
#[repr(C, align(64))]
struct Aside([f32; MR * NR]);

/// # Safety
/// The CPU has AMX, and the system lets this process use it; the tile's pointers are good for what its documentation says.
unsafe fn tile(t: Tile) {
    // SAFETY: as promised by the caller; a tile of fewer rows grows in memory for all of them.
    unsafe {
        configure();
        if t.k == 0 {
            return if t.fresh {
                (0..t.rows).for_each(|row| t.c.add(row * t.stride).write_bytes(0, NR));
            };
        }
        if t.rows == MR {
            return match (t.ahead.lines(TILE_PAIRS), t.k <= KEPT) {
                (0, true) => four::<0>(&t),
                (0, false) => four_passing::<0>(&t),
                (1..4, true) => four::<3>(&t),
                (1..4, false) => four_passing::<3>(&t),
                (4..7, true) => four::<6>(&t),
                (4..7, false) => four_passing::<6>(&t),
                (7..17, true) => four::<16>(&t),
                (7..17, false) => four_passing::<16>(&t),
                (_, true) => four::<32>(&t),
                (_, false) => four_passing::<32>(&t),
            };
        }
        let mut aside = Aside([0.0; MR * NR]);
        let memory = aside.0.as_mut_ptr();
        if !t.fresh {
            (0..t.rows).for_each(|row| memory.add(row * NR).copy_from_nonoverlapping(t.c.add(row * t.stride), NR));
        }
        let whole = Tile { c: memory, stride: NR, ..t };
        if t.rows <= SIDE {
            two(&whole)
        } else {
            four::<32>(&whole)
        }
        (0..t.rows).for_each(|row| t.c.add(row * t.stride).copy_from_nonoverlapping(memory.add(row * NR), NR));
    }
}

macro_rules! four {
    ($name:ident, $load:literal) => {
        /// 32 rows by 32 columns, inputs read by `$load`, and `LINES` of what is read soon fetched with every tile.
        ///
        /// # Safety
        /// As [`tile`], with `k` of at least one tile, and 32 rows of `c`.
        unsafe fn $name<const LINES: usize>(t: &Tile) {
            // SAFETY: every pointer stays in `[k / 16][MR][16]` of `a`, `[k][NR]` of `b` and `[MR][NR]` of `c`.
            unsafe {
                let c_stride = size_of::<f32>() * t.stride;
                let below = t.c.add(SIDE * t.stride);
                asm!(
                    "test {fresh:e}, {fresh:e}",
                    "jz 2f",
                    "tilezero tmm0",
                    "tilezero tmm1",
                    "tilezero tmm2",
                    "tilezero tmm3",
                    "jmp 3f",
                    "2:",
                    "tileloadd tmm0, [{c} + {cs}]",
                    "tileloadd tmm1, [{c} + {cs} + 64]",
                    "tileloadd tmm2, [{below} + {cs}]",
                    "tileloadd tmm3, [{below} + {cs} + 64]",
                    ".p2align 5",
                    "3:",
                    concat!($load, " tmm4, [{a} + {sa}]"),
                    "tileloadd tmm6, [{b} + {sb}]",
                    "tileloadd tmm7, [{b} + {sb} + 64]",
                    "tdpbf16ps tmm0, tmm4, tmm6",
                    concat!($load, " tmm5, [{a} + {sa} + 1024]"),
                    "tdpbf16ps tmm1, tmm4, tmm7",
                    "tdpbf16ps tmm2, tmm5, tmm6",
                    ".rept {lines}",
                    "prefetcht1 [{ahead}]",
                    "add {ahead}, 64",
                    ".endr",
                    "tdpbf16ps tmm3, tmm5, tmm7",
                    "add {a}, 2048",
                    "add {b}, 2048",
                    "dec {k}",
                    "jnz 3b",
                    "tilestored [{c} + {cs}], tmm0",
                    "tilestored [{c} + {cs} + 64], tmm1",
                    "tilestored [{below} + {cs}], tmm2",
                    "tilestored [{below} + {cs} + 64], tmm3",
                    a = inout(reg) t.a => _,
                    b = inout(reg) t.b => _,
                    c = in(reg) t.c,
                    below = in(reg) below,
                    cs = in(reg) c_stride,
                    sa = in(reg) INPUT_STRIDE,
                    sb = in(reg) WEIGHT_STRIDE,
                    k = inout(reg) t.k / TILE_PAIRS => _,
                    fresh = in(reg) u32::from(t.fresh),
                    ahead = inout(reg) t.ahead.from => _,
                    lines = const LINES,
                    out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                    out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
                    options(nostack),
                );
            }
        }
    };
}

four!(four, "tileloadd");
// Inputs that are too long to stay in the first-level cache beside the weights had better not push those out.
four!(four_passing, "tileloaddt1");

/// 16 rows by 32 columns.
///
/// # Safety
/// As [`four`], with 16 rows of `c`.
unsafe fn two(t: &Tile) {
    // SAFETY: as in `four`, of the upper half of `a` and `c`.
    unsafe {
        asm!(
            "test {fresh:e}, {fresh:e}",
            "jz 2f",
            "tilezero tmm0",
            "tilezero tmm1",
            "jmp 3f",
            "2:",
            "tileloadd tmm0, [{c} + {cs}]",
            "tileloadd tmm1, [{c} + {cs} + 64]",
            "3:",
            "tileloadd tmm4, [{a} + {sa}]",
            "tileloadd tmm6, [{b} + {sb}]",
            "tileloadd tmm7, [{b} + {sb} + 64]",
            "tdpbf16ps tmm0, tmm4, tmm6",
            "tdpbf16ps tmm1, tmm4, tmm7",
            "add {a}, 2048",
            "add {b}, 2048",
            "dec {k}",
            "jnz 3b",
            "tilestored [{c} + {cs}], tmm0",
            "tilestored [{c} + {cs} + 64], tmm1",
            a = inout(reg) t.a => _,
            b = inout(reg) t.b => _,
            c = in(reg) t.c,
            cs = in(reg) size_of::<f32>() * t.stride,
            sa = in(reg) INPUT_STRIDE,
            sb = in(reg) WEIGHT_STRIDE,
            k = inout(reg) t.k / TILE_PAIRS => _,
            fresh = in(reg) u32::from(t.fresh),
            out("tmm0") _, out("tmm1") _, out("tmm4") _, out("tmm6") _, out("tmm7") _,
            options(nostack),
        );
    }
}

/// # Safety
/// The CPU has AMX, and the system lets this process use it; the pointers are good for what [`Lines`] says.
unsafe fn lines(l: Lines) {
    let mut aside = MaybeUninit::<Aside>::uninit();
    let whole = l.rows == MR;
    let (c, stride) = if whole { (l.c, l.stride) } else { (aside.as_mut_ptr().cast(), NR) };
    // SAFETY: as promised by the caller; a tile of fewer rows is made in memory for all of them.
    unsafe {
        configure();
        asm!(
            "tilezero tmm0",
            "tilezero tmm1",
            "tilezero tmm2",
            "tilezero tmm3",
            ".p2align 5",
            "2:",
            "mov {upper}, qword ptr [{steps}]",
            "lea {upper}, [{a} + 4 * {upper}]",
            "lea {lower}, [{upper} + {half}]",
            "tileloadd tmm4, [{upper} + {sa}]",
            "tileloadd tmm6, [{b} + {sb}]",
            "tileloadd tmm7, [{b} + {sb} + 64]",
            "tdpbf16ps tmm0, tmm4, tmm6",
            "tileloadd tmm5, [{lower} + {sa}]",
            "tdpbf16ps tmm1, tmm4, tmm7",
            "tdpbf16ps tmm2, tmm5, tmm6",
            "tdpbf16ps tmm3, tmm5, tmm7",
            "add {steps}, 8",
            "add {b}, 2048",
            "dec {count}",
            "jnz 2b",
            "lea {lower}, [{c} + {below}]",
            "tilestored [{c} + {cs}], tmm0",
            "tilestored [{c} + {cs} + 64], tmm1",
            "tilestored [{lower} + {cs}], tmm2",
            "tilestored [{lower} + {cs} + 64], tmm3",
            a = in(reg) l.a,
            steps = inout(reg) l.steps => _,
            upper = out(reg) _,
            lower = out(reg) _,
            half = in(reg) size_of::<f32>() * SIDE * l.apart,
            b = inout(reg) l.b => _,
            c = in(reg) c,
            below = in(reg) size_of::<f32>() * SIDE * stride,
            cs = in(reg) size_of::<f32>() * stride,
            sa = in(reg) size_of::<f32>() * l.apart,
            sb = in(reg) WEIGHT_STRIDE,
            count = inout(reg) l.count => _,
            out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
            out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
            options(nostack),
        );
        for row in (0..l.rows).take_while(|_| !whole) {
            l.c.add(row * l.stride).copy_from_nonoverlapping(c.add(row * NR), NR);
        }
    }
}

/// # Safety
/// The CPU has AMX, and the system lets this process use it.
unsafe fn spin(rounds: usize) -> f32 {
    // Numbers of both signs between one and two, which differ.
    let number = |i: usize| f32::from_bits(0x3f80_3f80 ^ ((i as u32).wrapping_mul(0x9e37_79b1) & 0x807f_807f));
    let mut memory = Aside(std::array::from_fn(number));
    // SAFETY: as promised by the caller; `memory` has a whole tile, before and after.
    unsafe {
        configure();
        asm!(
            "tileloadd tmm4, [{m} + {stride}]",
            "tileloadd tmm5, [{m} + {stride} + 1024]",
            "tileloadd tmm6, [{m} + {stride} + 2048]",
            "tileloadd tmm7, [{m} + {stride} + 3072]",
            "tilezero tmm0",
            "tilezero tmm1",
            "tilezero tmm2",
            "tilezero tmm3",
            ".p2align 5",
            "2:",
            "tdpbf16ps tmm0, tmm4, tmm6",
            "tdpbf16ps tmm1, tmm4, tmm7",
            "tdpbf16ps tmm2, tmm5, tmm6",
            "tdpbf16ps tmm3, tmm5, tmm7",
            "dec {rounds}",
            "jnz 2b",
            "tilestored [{m} + {stride}], tmm0",
            "tilestored [{m} + {stride} + 1024], tmm3",
            m = in(reg) memory.0.as_mut_ptr(),
            stride = in(reg) INPUT_STRIDE,
            rounds = inout(reg) rounds.max(1) => _,
            out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
            out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
            options(nostack),
        );
    }
    memory.0.iter().sum()
}
