//! Pointwise functions of networks.

use crate::cpu::vectorised;
use crate::memory::{Output, seen};
use crate::{math, threads};

/// A pointwise function after a linear layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activation {
    /// GELU with the error function: `x Phi(x)`.
    Gelu,
    /// GELU by its tanh approximation (`gelu_pytorch_tanh`, `gelu_new`).
    GeluTanh,
    /// `x sigmoid(1.702 x)`: CLIP's `quick_gelu`.
    QuickGelu,
    /// `x sigmoid(x)`.
    Silu,
    /// `max(x, 0)`.
    Relu,
}

impl Activation {
    /// Applies it in place, on this thread.
    pub fn apply(self, x: &mut [f32]) {
        match self {
            Self::Gelu => gelu(x),
            Self::GeluTanh => gelu_tanh(x),
            Self::QuickGelu => quick_gelu(x),
            Self::Silu => silu(x),
            Self::Relu => relu(x),
        }
    }

    /// Applies it in place, on all threads.
    pub fn apply_all(self, x: &mut [f32]) {
        threads::over_rows(x, 1, |_, part| self.apply(part));
    }
}

/// `y = left activation(right)` where `x: [rows, 2 width]` holds `left` and `right` side by side (geglu), and `y: [rows, width]`.
pub fn gated<'a>(x: &[f32], y: &'a mut (impl Output + ?Sized), width: usize, activation: Activation) -> &'a mut [f32] {
    let y = y.unread();
    assert_eq!(x.len(), 2 * y.len(), "two halves of {width}");
    threads::over_rows(&mut *y, width, |first, y| {
        for (x, y) in x[2 * first * width..].chunks_exact(2 * width).zip(y.chunks_exact_mut(width)) {
            let (left, right) = x.split_at(width);
            let y = y.write_copy_of_slice(right);
            activation.apply(y);
            multiply(y, left);
        }
    });
    #[allow(unsafe_code)] // floats from here on
    // SAFETY: every row is written.
    unsafe {
        seen(y)
    }
}

vectorised! {
    fn multiply(y: &mut [f32], by: &[f32]) {
        y.iter_mut().zip(by).for_each(|(y, by)| *y *= *by);
    }
}

vectorised! {
    fn gelu(x: &mut [f32]) {
        for v in x {
            *v *= 0.5 * math::one_and_erf(*v * core::f32::consts::FRAC_1_SQRT_2);
        }
    }
}

vectorised! {
    fn gelu_tanh(x: &mut [f32]) {
        const TWICE_ROOT: f32 = 2.0 * 0.797_884_6; // 2 sqrt(2 / pi)
        for v in x {
            // 0.5 (1 + tanh(u)) = sigmoid(2 u)
            *v *= math::sigmoid(TWICE_ROOT * (*v + 0.044_715 * *v * *v * *v));
        }
    }
}

vectorised! {
    fn quick_gelu(x: &mut [f32]) {
        for v in x {
            *v *= math::sigmoid(1.702 * *v);
        }
    }
}

vectorised! {
    fn silu(x: &mut [f32]) {
        for v in x {
            *v *= math::sigmoid(*v);
        }
    }
}

vectorised! {
    fn relu(x: &mut [f32]) {
        for v in x {
            *v = if *v < 0.0 { 0.0 } else { *v };
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::Activation::{Gelu, GeluTanh, QuickGelu, Relu, Silu};
    use super::*;

    const ALL: [Activation; 5] = [Gelu, GeluTanh, QuickGelu, Silu, Relu];

    /// By the C library's functions, in f64.
    fn reference(activation: Activation, x: f32) -> f32 {
        let x = f64::from(x);
        let sigmoid = |x: f64| 1.0 / (1.0 + libm::exp(-x));
        let y = match activation {
            Gelu => 0.5 * x * (1.0 + libm::erf(x / 2f64.sqrt())),
            GeluTanh => 0.5 * x * (1.0 + libm::tanh((2.0 / std::f64::consts::PI).sqrt() * (x + 0.044_715 * x.powi(3)))),
            QuickGelu => x * sigmoid(1.702 * x),
            Silu => x * sigmoid(x),
            Relu => x.max(0.0),
        };
        y as f32
    }

    proptest! {
        #[test]
        fn equals_its_reference(x in prop::collection::vec(-20f32..20.0, 0..70)) {
            for activation in ALL {
                let mut y = x.clone();
                activation.apply_all(&mut y);
                for (x, y) in x.iter().zip(&y) {
                    let expected = reference(activation, *x);
                    prop_assert!((y - expected).abs() <= 1e-6 + 1e-6 * expected.abs(), "{activation:?}({x}) is {y}, not {expected}");
                }
            }
        }

        #[test]
        fn a_value_does_not_depend_on_its_place(x in prop::collection::vec(-9f32..9.0, 1..40)) {
            for activation in ALL {
                let mut together = x.clone();
                activation.apply(&mut together);
                for (x, y) in x.iter().zip(&together) {
                    let mut alone = [*x];
                    activation.apply(&mut alone);
                    prop_assert_eq!(alone[0].to_bits(), y.to_bits());
                }
            }
        }
    }

    #[test]
    fn far_ends_are_zero_and_the_identity() {
        for activation in ALL {
            let mut x = [-100.0, 100.0, f32::NAN];
            activation.apply(&mut x);
            assert!(x[0].abs() < 1e-6 && x[1] == 100.0 && x[2].is_nan(), "{activation:?}: {x:?}");
        }
    }

    #[test]
    fn gated_multiplies_the_left_half() {
        let mut y = [0.0; 4];
        gated(&[1.0, 2.0, 3.0, -4.0, 5.0, 6.0, 7.0, 8.0], &mut y[..], 2, Relu);
        assert_eq!(y, [3.0, 0.0, 35.0, 48.0]);
    }
}
