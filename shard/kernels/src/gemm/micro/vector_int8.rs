//! Tiles of a few rows by two vectors in 8 bits: whole numbers for each block, then floats. One loop for all instruction sets.

/// Defines `KERNELS`, one for each kind of [`Scales`](crate::gemm::bytes::Scales), and what they are made of. Beside it stand `LANES` of a
/// vector, `Ints` and `Floats` (vectors), `KEPT` (whether results stay in registers beside the whole numbers), `CHAINS` and `ONES` for the limit (as many sums as fill the units, and a word of ones), for each
/// kind `mr` (rows of a tile), `bytes` (see [`Bytes`](crate::gemm::bytes::Bytes)), `products`, which adds those of some groups to the sums of
/// `R` rows, and `step`, which multiplies at that speed, and the instructions: `ints` and `floats` of one number, `halves`, which reads,
/// `times`, `load`, `store`, `add_times`, which adds a product of floats, and `add_scaled`, which adds whole numbers times a scale to floats.
macro_rules! vector_int8_kernel {
    ($name:literal, $features:literal, rows: [$($fewer:literal)*], $mr:literal) => {
        const NR: usize = 2 * LANES;
        const STORED: u8 = Scales::Stored as u8;
        const NIBBLES: u8 = Scales::Nibbles as u8;
        const WHOLE: u8 = Scales::Whole as u8;
        const HALVES: u8 = Scales::Halves as u8;

        pub(super) static KERNELS: [MicroKernel; 4] = [
            kernel::<STORED>(),
            kernel::<NIBBLES>(),
            kernel::<WHOLE>(),
            kernel::<HALVES>(),
        ];

        const fn kernel<const SCALES: u8>() -> MicroKernel {
            let bytes = bytes(SCALES);
            MicroKernel {
                name: $name,
                mr: mr(SCALES),
                nr: NR,
                takes: Takes::Blocks(bytes),
                tile: tile::<SCALES>,
                chunks: false,
                lines: None,
                places: false,
                spin: spin::<SCALES>,
                flops: 2 * bytes.group * LANES * CHAINS,
            }
        }

        /// # Safety
        /// The CPU has what the kernel is for; the tile's pointers are good for what its documentation says.
        unsafe fn tile<const SCALES: u8>(t: Tile) {
            // SAFETY: as promised by the caller.
            unsafe {
                match t.rows {
                    $($fewer => rows::<$fewer, SCALES>(t),)*
                    _ => rows::<$mr, SCALES>(t),
                }
            }
        }

        /// # Safety
        /// As [`tile`], and `R` is the tile's number of rows.
        #[target_feature(enable = $features)]
        unsafe fn rows<const R: usize, const SCALES: u8>(t: Tile) {
            let (stored, parts, mr) = (SCALES == STORED, if SCALES == HALVES { 2 } else { 1 }, mr(SCALES));
            let groups = BLOCK / bytes(SCALES).group;
            // SAFETY: every pointer stays in `k` blocks of `a` and `b` and in `[R][NR]` of `c`.
            unsafe {
                let mut held = [[floats(0.0); 2]; R];
                if KEPT && !t.fresh {
                    for (row, held) in held.iter_mut().enumerate() {
                        let c = t.c.add(row * t.stride);
                        *held = [load(c), load(c.add(LANES))];
                    }
                }
                let (mut a, mut b) = (t.a.cast::<i32>(), t.b.cast::<u8>());
                let (mut ahead, of_ahead) = (t.ahead, t.ahead.lines(1));
                for block in 0..t.k {
                    ahead.fetch::<_MM_HINT_T1>(of_ahead);
                    // Below the groups: scales, what the excess of weights adds, taken off, and the sums of inputs.
                    let (of_rows, of_columns) = (a.add(groups * mr), b.add(BLOCK * NR));
                    for part in 0..parts {
                        let mut sums = [[ints(0); 2]; R];
                        for (row, sum) in sums.iter_mut().enumerate() {
                            *sum = [ints(*of_rows.add((1 + part) * mr + row)); 2];
                        }
                        products::<R, SCALES>(a, b, groups / parts, &mut sums);
                        (a, b) = (a.add(groups / parts * mr), b.add(BLOCK / parts * NR));
                        let made = of_columns.cast::<f32>().add(part * NR);
                        // One side after the other: all scales of both and the sums would not be in registers together.
                        for side in 0..2 {
                            let at = side * LANES;
                            let scale = if stored { halves(of_columns.add(2 * at)) } else { load(made.add(at)) };
                            let minimum = if stored { floats(0.0) } else { load(made.add(parts * NR + at)) };
                            for (row, sum) in sums.iter().enumerate() {
                                let of_row = floats(*of_rows.add(row).cast::<f32>());
                                let c = t.c.add(row * t.stride + at);
                                let before = match (KEPT, t.fresh && block + part == 0) {
                                    (true, _) => held[row][side],
                                    (false, true) => floats(0.0),
                                    (false, false) => load(c),
                                };
                                let mut after = add_scaled(before, sum[side], times(scale, of_row));
                                if !stored {
                                    let of_inputs = floats(*of_rows.add((1 + parts + part) * mr + row).cast::<f32>());
                                    after = add_times(after, minimum, of_inputs);
                                }
                                if KEPT {
                                    held[row][side] = after;
                                } else {
                                    store(c, after);
                                }
                            }
                        }
                    }
                    a = of_rows.add(if stored { 2 } else { 1 + 2 * parts } * mr);
                    b = of_columns.add(if stored { 2 } else { 8 * parts } * NR);
                }
                if KEPT || t.fresh && t.k == 0 {
                    for at in 0..2 * R {
                        store(t.c.add(at / 2 * t.stride + at % 2 * LANES), held[at / 2][at % 2]);
                    }
                }
            }
        }

        /// # Safety
        /// The CPU has what the kernel is for.
        #[target_feature(enable = $features)]
        unsafe fn spin<const SCALES: u8>(rounds: usize) -> f32 {
            let (x, mut sums) = (ints(std::hint::black_box(ONES)), [ints(0); CHAINS]);
            for _ in 0..rounds {
                for sum in &mut sums {
                    // What an instruction gives depends on the one before it, or all of them would be one.
                    *sum = step::<SCALES>(*sum, x, *sum);
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
