//! Exponential and error function in plain arithmetic: the same code, and so the same bits, on every machine, and nothing
//! that keeps the compiler from running it on whole vectors.

/// `e^x`, within 2 units in the last place. Below -87.3, where the result would be subnormal, it is 0; above 88.3 it stays
/// at `e^88.3`.
#[inline(always)]
pub fn exp(x: f32) -> f32 {
    const LOW: f32 = -87.3;
    const HIGH: f32 = 88.3;
    // 1.5 * 2^23: adding it rounds to an integer, which then stands in the low bits.
    const ROUND: f32 = 12_582_912.0;
    const LN2_HIGH: f32 = 0.693_359_4;
    const LN2_LOW: f32 = -2.121_944_4e-4;
    // Comparisons rather than `clamp`: NaN passes through.
    let y = if x > HIGH { HIGH } else { x };
    let y = if y < LOW { LOW } else { y };
    let shifted = y * core::f32::consts::LOG2_E + ROUND;
    let n = shifted - ROUND;
    let r = (y - n * LN2_HIGH) - n * LN2_LOW; // |r| <= ln(2) / 2
    // Cephes' expf, in pairs: a chain half as long.
    let square = r * r;
    let p45 = 1.987_569_1e-4 * r + 1.398_2e-3;
    let p23 = 8.333_452e-3 * r + 4.166_579_6e-2;
    let p01 = 1.666_666_5e-1 * r + 0.5;
    let p = (p45 * square + p23) * square + p01;
    let p = p * square + (r + 1.0);
    let scale = f32::from_bits(shifted.to_bits().wrapping_add(127) << 23); // 2^n
    if x < LOW { 0.0 } else { p * scale }
}

/// `1 / (1 + e^-x)`.
#[inline(always)]
pub fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + exp(-x))
}

/// The error function, within 4e-7.
#[inline(always)]
pub fn erf(x: f32) -> f32 {
    // A rational function in x^2, as in Eigen and XLA; it loses digits where the result is nearly one.
    const ABOVE: [f32; 7] =
        [-2.726_142_3e-10, 2.770_681_4e-8, -2.101_024e-6, -5.692_506_4e-5, -7.349_906_4e-4, -2.954_6e-3, -1.609_603_3e-2];
    const BELOW: [f32; 5] = [-1.456_607_2e-5, -2.133_740_6e-4, -1.682_827e-3, -7.373_329_3e-3, -1.426_473_9e-2];
    let square = x * x;
    let above = ABOVE.iter().fold(0.0, |sum, c| sum * square + c);
    let below = BELOW.iter().fold(0.0, |sum, c| sum * square + c);
    // There, one less the continued fraction of what is missing (Abramowitz and Stegun, 7.1.14).
    const SQRT_PI: f32 = 1.772_453_9;
    let size = x.abs();
    let fraction = size + 0.5 / (size + 1.0 / (size + 1.5 / (size + 2.0 / size)));
    let far = 1.0 - exp(-square) / (SQRT_PI * fraction);
    if size > 2.75 { far.copysign(x) } else { x * above / below }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn range(from: f32, to: f32) -> impl Iterator<Item = f32> {
        (0..=100_000).map(move |i| from + (to - from) * i as f32 / 100_000.0)
    }

    #[test]
    fn exp_is_within_two_units() {
        for x in range(-87.0, 88.0) {
            let expected = f64::from(x).exp();
            let error = (f64::from(exp(x)) - expected).abs() / expected;
            assert!(error < 2.0 * f64::from(f32::EPSILON), "exp({x}) is off by {error:e}");
        }
        assert_eq!([exp(0.0), exp(-0.0), exp(f32::NEG_INFINITY), exp(-100.0)], [1.0, 1.0, 0.0, 0.0]);
        assert!(exp(f32::NAN).is_nan() && exp(1000.0).is_finite());
    }

    #[test]
    fn erf_is_within_4e_7() {
        for x in range(-6.0, 6.0) {
            let error = (erf(x) - libm::erff(x)).abs();
            assert!(error < 4e-7, "erf({x}) is off by {error:e}");
        }
        assert!(erf(f32::NAN).is_nan());
    }
}
