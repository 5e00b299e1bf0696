//! Tiles of a few rows by two vectors, every result a chain of its own in a register: one loop for all instruction sets.

/// Defines `KERNEL` and what it is made of. Beside it stand `LANES` of a vector, `Sums` and `Factors` (vectors), `CHAINS` (as many sums as
/// fill the units whatever an instruction's latency, and stay in registers), `SMALL` and `ONE` (factors of a sum that grows slowly), and
/// the instructions: `zero`, `load` and `store` of sums, `broadcast` and `factors`, which read factors, and `add_products`.
macro_rules! vector_kernel {
    ($name:literal, $features:literal, $takes:ident, rows: [$($fewer:literal)*], $mr:literal) => {
        const MR: usize = $mr;
        const NR: usize = 2 * LANES;
        /// A pair is two products.
        const FLOPS: usize = if matches!(Takes::$takes, Takes::Pairs) { 4 } else { 2 } * CHAINS * LANES;

        pub(super) static KERNEL: MicroKernel =
            MicroKernel { name: $name, mr: MR, nr: NR, takes: Takes::$takes, tile, lines: None, places: true, spin, flops: FLOPS };

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
            let mut sums: [[Sums; 2]; R] = [[zero(); 2]; R];
            let mut place = t.places.map_or(ptr::null(), |places| places.as_ptr().cast_const());
            // SAFETY: every pointer stays in `[k][MR]` of `a`, `[k][NR]` of `b`, or such rows at `k` places, and `[R][NR]` of `c`.
            unsafe {
                if !t.fresh {
                    for (row, sum) in sums.iter_mut().enumerate() {
                        let c = t.c.add(row * t.stride);
                        *sum = [load(c), load(c.add(LANES))];
                    }
                }
                let (mut a, mut b, mut panel, mut next, mut left) = (t.a, t.b, t.panel, t.sums, t.k);
                let [of_panel, of_next] = [t.panel, t.sums].map(|ahead| ahead.lines(BETWEEN_FETCHES));
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
                    panel.fetch::<_MM_HINT_T1>(of_panel);
                    next.fetch::<_MM_HINT_T0>(of_next);
                    left -= some;
                }
                for (row, sum) in sums.iter().enumerate() {
                    let c = t.c.add(row * t.stride);
                    store(c, sum[0]);
                    store(c.add(LANES), sum[1]);
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
