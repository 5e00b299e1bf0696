//! Rotary embedding of the positions.

use parallel::{DType, Tensor};

use crate::mmdit::attention::Rope;
use crate::{Error, Result};

/// The base of the rotary frequencies.
const THETA: f64 = 10_000.0;

/// `FluxPosEmbed`: rotations by the ids of a token, one slice of a head per axis. In f64, as the reference.
#[derive(Debug)]
pub(super) struct FluxPosEmbed {
    /// Per axis.
    freqs: Vec<Vec<f64>>,
}

impl FluxPosEmbed {
    pub(super) fn new(axes_dim: &[usize]) -> Self {
        let freq = |i: usize, dim: usize| 1.0 / libm::pow(THETA, (2 * i) as f64 / dim as f64);
        Self { freqs: axes_dim.iter().map(|dim| (0..dim / 2).map(|i| freq(i, *dim)).collect()).collect() }
    }

    /// `ids: [L, 3]` gives tables of `[L, Dh/2]`, f32.
    pub(super) fn forward(&self, ids: &Tensor) -> Result<Rope> {
        let (l, axes) = ids.dims2()?;
        if axes != self.freqs.len() {
            return Err(Error::Invalid {
                field: "img_ids",
                reason: format!("{axes} ids per token, expected {}", self.freqs.len()),
            });
        }
        let (mut cos, mut sin) = (Vec::new(), Vec::new());
        for ids in ids.to_dtype(DType::F32)?.to_vec2::<f32>()? {
            for (pos, freqs) in ids.into_iter().zip(&self.freqs) {
                cos.extend(freqs.iter().map(|freq| libm::cos(f64::from(pos) * freq) as f32));
                sin.extend(freqs.iter().map(|freq| libm::sin(f64::from(pos) * freq) as f32));
            }
        }
        let width = self.freqs.iter().map(Vec::len).sum::<usize>(); // Dh/2
        Ok(Rope { cos: Tensor::from_vec(cos, (l, width), ids.device())?, sin: Tensor::from_vec(sin, (l, width), ids.device())? })
    }
}
