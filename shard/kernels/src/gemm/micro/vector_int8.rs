//! Tiles of a few rows by two vectors in 8 bits: whole numbers for each block, then floats. One loop for all instruction sets.

/// Defines `KERNEL` and what it is made of. Beside it stand `LANES` of a vector, `BYTES` (how the instructions want them), `Ints` and
/// `Floats` (vectors), `CHAINS` and `ONES` for the limit (as many sums as fill the units, and a word of ones), and the instructions: `ints`
/// and `floats` of one number, `weights` and `halves`, which read, `add_products` of a block, `times`, `load`, `store`, and `add_scaled`,
/// which adds whole numbers times a scale to floats.
macro_rules! vector_int8_kernel {
    ($name:literal, $features:literal, rows: [$($fewer:literal)*], $mr:literal) => {
        const MR: usize = $mr;
        const NR: usize = 2 * LANES;
        const GROUPS: usize = BLOCK / BYTES.group;

        pub(super) static KERNEL: MicroKernel = MicroKernel {
            name: $name,
            mr: MR,
            nr: NR,
            takes: Takes::Blocks(BYTES),
            tile,
            lines: None,
            spin,
            flops: 2 * BYTES.group * LANES * CHAINS,
        };

        /// # Safety
        /// The CPU has what the kernel is for; the tile's pointers are good for what its documentation says.
        unsafe fn tile(t: Tile) {
            // SAFETY: as promised by the caller.
            unsafe {
                match t.rows {
                    $($fewer => rows::<$fewer>(t),)*
                    _ => rows::<MR>(t),
                }
            }
        }

        /// # Safety
        /// As [`tile`], and `R` is the tile's number of rows.
        #[target_feature(enable = $features)]
        unsafe fn rows<const R: usize>(t: Tile) {
            // SAFETY: every pointer stays in `k` blocks of `a` and `b` and in `[R][NR]` of `c`.
            unsafe {
                let (mut a, mut b) = (t.a.cast::<i32>(), t.b.cast::<u8>());
                for block in 0..t.k {
                    // Below the scales: what the excess of weights adds, taken off.
                    let excess = a.add((GROUPS + 1) * MR);
                    let mut sums = [[ints(0); 2]; R];
                    for (row, sum) in sums.iter_mut().enumerate() {
                        *sum = [ints(*excess.add(row)); 2];
                    }
                    for _ in 0..GROUPS {
                        let (b0, b1) = (weights(b), weights(b.add(BYTES.group * LANES)));
                        for (row, sum) in sums.iter_mut().enumerate() {
                            let x = ints(*a.add(row));
                            sum[0] = add_products(sum[0], x, b0);
                            sum[1] = add_products(sum[1], x, b1);
                        }
                        (a, b) = (a.add(MR), b.add(BYTES.group * NR));
                    }
                    let scales = [halves(b), halves(b.add(2 * LANES))];
                    for (row, sum) in sums.iter().enumerate() {
                        let scale = floats(*a.add(row).cast::<f32>());
                        for (side, sum) in sum.iter().enumerate() {
                            let c = t.c.add(row * t.stride + side * LANES);
                            let before = if t.fresh && block == 0 { floats(0.0) } else { load(c) };
                            store(c, add_scaled(before, *sum, times(scales[side], scale)));
                        }
                    }
                    (a, b) = (a.add(2 * MR), b.add(2 * NR));
                }
                if t.fresh && t.k == 0 {
                    for at in 0..2 * R {
                        store(t.c.add(at / 2 * t.stride + at % 2 * LANES), floats(0.0));
                    }
                }
            }
        }

        /// # Safety
        /// The CPU has what the kernel is for.
        #[target_feature(enable = $features)]
        unsafe fn spin(rounds: usize) -> f32 {
            let (x, mut sums) = (ints(std::hint::black_box(ONES)), [ints(0); CHAINS]);
            for _ in 0..rounds {
                for sum in &mut sums {
                    // What an instruction gives depends on the one before it, or all of them would be one.
                    *sum = add_products(*sum, x, *sum);
                }
            }
            let total = sums.iter().fold(floats(0.0), |total, sum| add_scaled(total, *sum, floats(1.0)));
            let mut out = [0f32; LANES];
            // SAFETY: as many floats as a vector has.
            unsafe { store(out.as_mut_ptr(), total) };
            out.iter().sum()
        }
    };
}
pub(super) use vector_int8_kernel;
