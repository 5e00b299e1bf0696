//! Exponential and error function in plain arithmetic: the same code, and so the same bits, on every machine, and nothing
//! that keeps the compiler from running it on whole vectors. Multiplications are fused with additions by name: a chain a third
//! shorter on every processor that has the instruction (and slow on one that has not).

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
    let shifted = y.mul_add(core::f32::consts::LOG2_E, ROUND);
    let n = shifted - ROUND;
    let r = n.mul_add(-LN2_LOW, n.mul_add(-LN2_HIGH, y)); // |r| <= ln(2) / 2
    // Cephes' expf, in pairs: a chain half as long.
    let square = r * r;
    let p45 = r.mul_add(1.987_569_1e-4, 1.398_2e-3);
    let p23 = r.mul_add(8.333_452e-3, 4.166_579_6e-2);
    let p01 = r.mul_add(1.666_666_5e-1, 0.5);
    let p = p45.mul_add(square, p23).mul_add(square, p01);
    let p = p.mul_add(square, r + 1.0);
    let scale = f32::from_bits(shifted.to_bits().wrapping_add(127) << 23); // 2^n
    if x < LOW { 0.0 } else { p * scale }
}

/// `2^x` for an `x` that is not positive, within 4e-6 of itself: for what is rounded to bf16, a thousandth of which is next. Below -126,
/// where the result would be subnormal, it is 0.
#[inline(always)]
pub(crate) fn exp2_below(x: f32) -> f32 {
    // Fitted to be within 2.6e-6 of itself on -0.5..0.5.
    const OF_R: [f32; 4] = [0.055_917_86, 0.240_247_44, 0.693_121_8, 0.999_999_3];
    exp2_of(x, |r| OF_R.iter().fold(0.009_570_101f32, |sum, c| sum.mul_add(r, *c)))
}

/// `e^x` for an `x` that is not positive, within 2e-5 of itself, down to `e^-87`; for the rest see [`exp2_below`].
#[inline(always)]
pub(crate) fn rough_exp_below(x: f32) -> f32 {
    exp2_below(x * core::f32::consts::LOG2_E)
}

/// `2^x`, by a function that gives `2^r` for an `r` in -0.5..0.5.
#[inline(always)]
fn exp2_of(x: f32, of_r: impl Fn(f32) -> f32) -> f32 {
    const LOW: f32 = -126.0;
    // As in `exp`.
    const ROUND: f32 = 12_582_912.0;
    let shifted = if x < LOW { LOW } else { x } + ROUND;
    let r = x - (shifted - ROUND);
    let scale = f32::from_bits(shifted.to_bits().wrapping_add(127) << 23); // 2^n
    if x < LOW { 0.0 } else { of_r(r) * scale }
}

/// `1 / (1 + e^-x)`.
#[inline(always)]
pub fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + exp(-x))
}

/// The error function, within 4e-7.
#[inline(always)]
pub fn erf(x: f32) -> f32 {
    let far = 1.0 - erfc_of_size(x);
    far.copysign(x)
}

/// `1 + erf(x)`, to as many digits where it is nearly zero.
#[inline(always)]
pub fn one_and_erf(x: f32) -> f32 {
    let rest = erfc_of_size(x);
    if x < 0.0 { rest } else { 2.0 - rest }
}

/// What `erf(|x|)` lacks of one: two to the power of `|x|` times a polynomial in `|x|`, fitted to be within 2e-8 before rounding. No division.
#[inline(always)]
fn erfc_of_size(x: f32) -> f32 {
    const OF_SIZE: [f32; 7] =
        [4.454_972_8e-4, -1.489_410_9e-3, -7.746_756e-4, 2.825_371_8e-2, -0.148_481_64, -0.918_416_4, -1.627_908_6];
    // Fitted to be within 1e-7 of itself on -0.5..0.5, and one at zero.
    #[allow(clippy::approx_constant)] // a fitted number, which is near ln(2)
    const OF_R: [f32; 5] = [9.671_498e-3, 5.550_733_6e-2, 0.240_222_42, 0.693_147, 1.0];
    let size = x.abs();
    let sum = OF_SIZE.iter().fold(-4.535_722e-5_f32, |sum, c| sum.mul_add(size, *c));
    exp2_of(sum * size, |r| OF_R.iter().fold(1.326_466_4e-3_f32, |sum, c| sum.mul_add(r, *c)))
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
    fn exp2_below_is_within_4e_6() {
        for x in range(-126.0, 0.0) {
            let expected = f64::from(x).exp2();
            let error = (f64::from(exp2_below(x)) - expected).abs() / expected;
            assert!(error < 4e-6, "2^{x} is off by {error:e}");
        }
        assert_eq!([exp2_below(f32::NEG_INFINITY), exp2_below(-126.5)], [0.0, 0.0]);
        assert!(exp2_below(f32::NAN).is_nan());
    }

    #[test]
    fn rough_exp_below_is_within_2e_5() {
        for x in range(-87.0, 0.0) {
            let expected = f64::from(x).exp();
            let error = (f64::from(rough_exp_below(x)) - expected).abs() / expected;
            assert!(error < 2e-5, "e^{x} is off by {error:e}");
        }
        assert_eq!([rough_exp_below(0.0) > 0.999_99, rough_exp_below(f32::NEG_INFINITY) == 0.0], [true; 2]);
        assert!(rough_exp_below(f32::NAN).is_nan());
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
