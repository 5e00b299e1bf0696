//! Tiles of a few rows by two vectors, every result a chain of its own in a register: one loop for all instruction sets.

/// Defines `KERNEL` and what it is made of. Beside it stand `LANES` of a vector, `Sums` and `Factors` (vectors), `CHAINS` (as many sums as
/// fill the units whatever an instruction's latency, and stay in registers), `SMALL` and `ONE` (factors of a sum that grows slowly), and
/// the instructions: `zero`, `load`, `store`, `splat` (of one number) and `add` of sums, `broadcast` and `factors`, which read factors, and
/// `add_products`.
macro_rules! vector_kernel {
    ($name:literal, $features:literal, $takes:ident, rows: [$($fewer:literal)*], $mr:literal) => {
        const MR: usize = $mr;
        const NR: usize = 2 * LANES;
        /// Of the caches, in a row of results.
        const LINES: usize = size_of::<[Sums; 2]>() / LINE;
        /// A pair is two products.
        const FLOPS: usize = if matches!(Takes::$takes, Takes::Pairs) { 4 } else { 2 } * CHAINS * LANES;

        pub(super) static KERNEL: MicroKernel =
            MicroKernel { name: $name, mr: MR, nr: NR, takes: Takes::$takes, tile, chunks: true, lines: None, places: true, spin, flops: FLOPS };

        /// # Safety
        /// The CPU has what the kernel is for; the tile's pointers are good for what its documentation says.
        unsafe fn tile(t: Tile) {
            // SAFETY: as promised by the caller.
            unsafe {
                match (t.rows, t.places.is_some()) {
                    $(($fewer, false) => rows::<$fewer, false>(t),)*
                    (_, false) => rows::<MR, false>(t),
                    $(($fewer, true) => rows::<$fewer, true>(t),)*
                    (_, true) => rows::<MR, true>(t),
                }
            }
        }

        /// # Safety
        /// As [`tile`], and `R` is the tile's number of rows, `AT` whether it has places.
        #[target_feature(enable = $features)]
        unsafe fn rows<const R: usize, const AT: bool>(t: Tile) {
            let (mut a, mut ahead, mut first_row) = (t.a, t.ahead, 0);
            let of_ahead = t.ahead.lines(BETWEEN_FETCHES);
            // SAFETY: every pointer stays in `[down][k][MR]` of `a`, `[k][NR]` of `b`, or such rows at `k` places, `[down R][NR]` of `c` and of what is
            // added, and `[waiting][MR][NR]`.
            unsafe {
                for _ in 0..t.down {
                    let (c, mut b, mut fetched, mut chunk) = (t.c.add(first_row * t.stride), t.b, 0, 0);
                    let mut place = t.places.map_or(ptr::null(), |places| places.as_ptr().cast_const());
                    loop {
                        let mut sums: [[Sums; 2]; R] = [[zero(); 2]; R];
                        if !t.fresh {
                            for (row, sum) in sums.iter_mut().enumerate() {
                                let c = c.add(row * t.stride);
                                *sum = [load(c), load(c.add(LANES))];
                            }
                        }
                        let mut left = *t.depths.add(chunk);
                        while left > 0 {
                            let some = left.min(BETWEEN_FETCHES);
                            for _ in 0..some {
                                let from = if AT { b.add(*place) } else { b };
                                let (b0, b1) = (factors(from), factors(from.add(LANES)));
                                for (row, sum) in sums.iter_mut().enumerate() {
                                    let x = broadcast(a.add(row));
                                    sum[0] = add_products(sum[0], x, b0);
                                    sum[1] = add_products(sum[1], x, b1);
                                }
                                a = a.add(MR);
                                if AT {
                                    place = place.add(1);
                                } else {
                                    b = b.add(NR);
                                }
                            }
                            ahead.fetch::<_MM_HINT_T1>(of_ahead);
                            if fetched < R {
                                t.results(first_row + fetched).fetch::<_MM_HINT_ET0>(LINES);
                                t.added(first_row + fetched).fetch::<_MM_HINT_T0>(LINES);
                                fetched += 1;
                            }
                            left -= some;
                        }
                        // Earlier chunks on the left: what waits the shortest first.
                        let (depth, merges) = (chunk.count_ones(), chunk.trailing_ones());
                        for level in (depth - merges..depth).rev() {
                            let waiting = t.waiting.add(level as usize * MR * NR);
                            for (row, sum) in sums.iter_mut().enumerate() {
                                let from = waiting.add(row * NR);
                                *sum = [add(load(from), sum[0]), add(load(from.add(LANES)), sum[1])];
                            }
                        }
                        chunk += 1;
                        if chunk < t.chunks {
                            let waiting = t.waiting.add((depth - merges) as usize * MR * NR);
                            for (row, sum) in sums.iter().enumerate() {
                                let to = waiting.add(row * NR);
                                store(to, sum[0]);
                                store(to.add(LANES), sum[1]);
                            }
                            continue;
                        }
                        if let Some(bias) = t.bias {
                            for (row, sum) in sums.iter_mut().enumerate() {
                                let bias = splat(bias.as_ptr().add(first_row + row));
                                *sum = [add(sum[0], bias), add(sum[1], bias)];
                            }
                        }
                        if let Some((more, stride)) = t.more {
                            for (row, sum) in sums.iter_mut().enumerate() {
                                let more = more.as_ptr().add((first_row + row) * stride);
                                *sum = [add(sum[0], load(more)), add(sum[1], load(more.add(LANES)))];
                            }
                        }
                        for (row, sum) in sums.iter().enumerate() {
                            let c = c.add(row * t.stride);
                            store(c, sum[0]);
                            store(c.add(LANES), sum[1]);
                        }
                        break;
                    }
                    first_row += R;
                }
            }
        }

        /// # Safety
        /// The CPU has what the kernel is for.
        #[target_feature(enable = $features)]
        pub(super) unsafe fn spin(rounds: usize) -> f32 {
            let (small, one) = (std::hint::black_box(SMALL), ONE);
            // SAFETY: each reads one float.
            let (x, y) = unsafe { (broadcast(&raw const small), broadcast(&raw const one)) };
            let mut sums = [zero(); CHAINS];
            for _ in 0..rounds {
                for sum in &mut sums {
                    *sum = add_products(*sum, x, y);
                }
            }
            let mut total = 0.0;
            for sum in sums {
                let mut out = [0f32; LANES];
                // SAFETY: as many floats as a vector has.
                unsafe { store(out.as_mut_ptr(), sum) };
                total += out.iter().sum::<f32>();
            }
            total
        }
    };
}
pub(super) use vector_kernel;
