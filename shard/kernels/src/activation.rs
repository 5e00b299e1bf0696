//! Pointwise functions of networks, in place.

/// GELU with the error function: `x Phi(x)`.
pub fn gelu(x: &mut [f32]) {
    for v in x {
        *v = 0.5 * *v * (1.0 + libm::erff(*v * core::f32::consts::FRAC_1_SQRT_2));
    }
}

/// GELU by its tanh approximation (`gelu_pytorch_tanh`, `gelu_new`).
pub fn gelu_tanh(x: &mut [f32]) {
    const ROOT: f32 = 0.797_884_6; // sqrt(2 / pi)
    for v in x {
        let inner = ROOT * (*v + 0.044_715 * *v * *v * *v);
        *v = 0.5 * *v * (1.0 + libm::tanhf(inner));
    }
}

/// `x sigmoid(1.702 x)`: CLIP's `quick_gelu`.
pub fn quick_gelu(x: &mut [f32]) {
    for v in x {
        *v /= 1.0 + libm::expf(-1.702 * *v);
    }
}

/// `x sigmoid(x)`.
pub fn silu(x: &mut [f32]) {
    for v in x {
        *v /= 1.0 + libm::expf(-*v);
    }
}

/// `max(x, 0)`.
pub fn relu(x: &mut [f32]) {
    for v in x {
        *v = v.max(0.0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_values() {
        let check = |f: fn(&mut [f32]), at: f32, expected: f32| {
            let mut x = [at];
            f(&mut x);
            assert!((x[0] - expected).abs() < 1e-6, "{} for {at}, expected {expected}", x[0]);
        };
        check(gelu, 1.0, 0.841_344_7);
        check(gelu_tanh, 1.0, 0.841_192);
        check(quick_gelu, 1.0, 0.845_795_8);
        check(silu, 1.0, 0.731_058_6);
        check(relu, -1.0, 0.0);
        for f in [gelu, gelu_tanh, quick_gelu, silu] {
            check(f, -100.0, 0.0);
            check(f, 100.0, 100.0);
        }
    }
}
