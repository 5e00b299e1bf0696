//! Pairs of bf16 by instructions for floats, two for each of a pair: of a CPU that has none for pairs, or slow ones. Weights are widened in
//! registers, inputs were when they were packed; the later one of a pair is multiplied first. In assembler, because numbers too small to be
//! normal count as zero here, which is a mode of the CPU that compiled code must not see.

/// The default, and inputs and results that are too small are zero.
pub(super) const FLUSHING: u32 = 0x1f80 | 0x8040;

/// Defines `KERNEL` and what it is made of: two functions for each number of rows, each of which adds a row to those before it; the second
/// is for rows of weights that lie at places. `$upper` and
/// `$lower` load the later and the earlier ones of a vector of pairs. Beside it stand `MR`, `LANES` of a vector, `Sums`, `upper`, which is a
/// mask of the later ones, `zero`, `load` and `store` of sums, and `SPIN` and `FLOPS` for the limit.
macro_rules! pairs_kernel {
    ($name:literal, $features:literal, $class:ident, $upper:expr, $lower:expr,
        $($count:literal $rows:ident $at:ident $row:literal $left:ident $right:ident;)*) => {
        const NR: usize = 2 * LANES;

        pub(super) static KERNEL: MicroKernel = MicroKernel {
            name: $name,
            mr: MR,
            nr: NR,
            takes: Takes::PairsByFloats,
            tile,
            chunks: false,
            lines: None,
            places: true,
            spin: SPIN,
            flops: FLOPS,
        };

        /// # Safety
        /// The CPU has what the kernel is for; the tile's pointers are good for what its documentation says.
        unsafe fn tile(t: Tile) {
            // SAFETY: as promised by the caller.
            unsafe {
                match (t.rows, t.places) {
                    $(($count, None) => $rows(t, NonNull::dangling()),)*
                    $(($count, Some(places)) => $at(t, places),)*
                    (rows, _) => unreachable!("{rows} rows"),
                }
            }
        }

        pairs_kernel!(@each $features, $class, [$upper, $lower], [] $($count $rows $at $row $left $right;)*);
    };
    (@each $features:literal, $class:ident, $loads:tt, [$($before:tt)*]) => {};
    (@each $features:literal, $class:ident, $loads:tt, [$($before:tt)*]
        $count:literal $rows:ident $at:ident $row:literal $left:ident $right:ident; $($more:tt)*) => {
        pairs_kernel!(@rows $features, $class, $loads, ["", "add {b}, 4 * {nr}"], $count $rows $($before)* $row $left $right;);
        pairs_kernel!(
            @rows $features, $class, $loads, ["mov {place}, qword ptr [{places}]\nadd {places}, 8", ""],
            $count $at $($before)* $row $left $right;
        );
        pairs_kernel!(@each $features, $class, $loads, [$($before)* $row $left $right;] $($more)*);
    };
    (@rows $features:literal, $class:ident, [$upper:expr, $lower:expr], [$place:literal, $passed:literal],
        $count:literal $rows:ident $($row:literal $left:ident $right:ident;)*) => {
        /// # Safety
        /// As [`tile`], for a tile of as many rows, with its places or without.
        #[target_feature(enable = $features)]
        unsafe fn $rows(t: Tile, places: NonNull<usize>) {
            // SAFETY: every pointer stays in `[k][2][MR]` of `a`, `[k][NR]` of `b`, or such rows at `k` places, and `[rows][NR]` of `c`; fetching
            // does nothing but fetch. The mode is as it was at the end.
            unsafe {
                let mut sums: [[Sums; 2]; $count] = [[zero(); 2]; $count];
                if !t.fresh {
                    for (row, sum) in sums.iter_mut().enumerate() {
                        let c = t.c.add(row * t.stride);
                        *sum = [load(c), load(c.add(LANES))];
                    }
                }
                if t.k > 0 {
                    let mut mode = [0u32, FLUSHING];
                    asm!(
                        "/* {places} {nr}: of one of the two */",
                        "stmxcsr dword ptr [{mode}]",
                        "ldmxcsr dword ptr [{mode} + 4]",
                        ".p2align 5",
                        "2:",
                        $place,
                        "prefetcht1 [{ahead}]",
                        $upper,
                        $(pairs_kernel!(@row $row 0 $left $right),)*
                        "add {ahead}, {of_ahead}",
                        $lower,
                        $(pairs_kernel!(@row $row 1 $left $right),)*
                        "add {a}, 8 * {mr}",
                        $passed,
                        "dec {k}",
                        "jnz 2b",
                        "ldmxcsr dword ptr [{mode}]",
                        mr = const MR,
                        nr = const NR,
                        places = inout(reg) places.as_ptr() => _,
                        place = inout(reg) 0usize => _,
                        mode = in(reg) mode.as_mut_ptr(),
                        a = inout(reg) t.a => _,
                        b = inout(reg) t.b => _,
                        k = inout(reg) t.k => _,
                        ahead = inout(reg) t.ahead.from => _,
                        of_ahead = in(reg) t.ahead.of_each,
                        upper = in($class) upper(),
                        b0 = out($class) _,
                        b1 = out($class) _,
                        x = out($class) _,
                        $($left = inout($class) sums[$row][0], $right = inout($class) sums[$row][1],)*
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
    // The products of one row with the columns in `b0` and `b1`, of one of each pair.
    (@row $row:literal $which:literal $left:ident $right:ident) => {
        concat!(
            "vbroadcastss {x}, dword ptr [{a} + 4 * ", $row, " + 4 * {mr} * ", $which, "]\n",
            "vfmadd231ps {", stringify!($left), "}, {x}, {b0}\n",
            "vfmadd231ps {", stringify!($right), "}, {x}, {b1}\n",
        )
    };
}
pub(super) use pairs_kernel;
