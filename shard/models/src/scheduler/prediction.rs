//! From a network's output to the picture that it predicts.

use parallel::{DType, Tensor};
use serde_json::json;

use super::fields::{Fields, refused};
use super::noise_schedule::Prediction;
use super::steps::sum;
use crate::Result;

/// How a predicted picture is kept within bounds.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Bounds {
    /// It is not.
    None,
    /// `clip_sample`: to minus and plus this.
    Clip(f64),
    /// `thresholding` (C. Saharia et al., <https://arxiv.org/abs/2205.11487>): to the quantile `ratio` of each item's absolute values, at least 1 and at
    /// most `max`, and divided by it.
    Dynamic {
        /// Which quantile.
        ratio: f64,
        /// Most it may be.
        max: f64,
    },
}

impl Bounds {
    /// Of a scheduler that has `thresholding` alone.
    pub(super) fn thresholding(fields: Fields<'_>) -> Result<Self> {
        if !fields.flag("thresholding", false)? {
            return Ok(Self::None);
        }
        let ratio = fields.number("dynamic_thresholding_ratio", 0.995)?;
        if !(0.0..=1.0).contains(&ratio) {
            return Err(refused("dynamic_thresholding_ratio", &json!(ratio)));
        }
        let max = fields.number("sample_max_value", 1.0)?;
        if max >= 1.0 { Ok(Self::Dynamic { ratio, max }) } else { Err(refused("sample_max_value", &json!(max))) }
    }

    /// Of one that has `clip_sample` as well, which is `clips` unless the file says it.
    pub(super) fn read(fields: Fields<'_>, clips: bool) -> Result<Self> {
        let thresholding = Self::thresholding(fields)?;
        if thresholding != Self::None || !fields.flag("clip_sample", clips)? {
            return Ok(thresholding);
        }
        let range = fields.number("clip_sample_range", 1.0)?;
        if range > 0.0 { Ok(Self::Clip(range)) } else { Err(refused("clip_sample_range", &json!(range))) }
    }

    pub(super) fn apply(self, sample: Tensor) -> Result<Tensor> {
        match self {
            Self::None => Ok(sample),
            Self::Clip(range) => Ok(sample.clamp(-range, range)?),
            Self::Dynamic { ratio, max } => {
                let items = (0..sample.dim(0)?).map(|item| threshold(&sample.narrow(0, item, 1)?, ratio, max));
                Ok(Tensor::cat(&items.collect::<Result<Vec<_>>>()?, 0)?)
            }
        }
    }
}

fn threshold(item: &Tensor, ratio: f64, max: f64) -> Result<Tensor> {
    let mut sizes = item.abs()?.flatten_all()?.to_dtype(DType::F32)?.to_vec1::<f32>()?;
    sizes.sort_by(f32::total_cmp);
    let last = sizes.len().saturating_sub(1);
    let place = ratio * last as f64;
    let (low, high) = (sizes[place as usize], sizes[(place as usize + 1).min(last)]);
    let quantile = f64::from(low) + f64::from(high - low) * place.fract();
    let s = quantile.clamp(1.0, max);
    Ok((item.clamp(-s, s)? / s)?)
}

/// The picture and the noise that a network's output stands for, where `sample` is `alpha` of the picture and `sigma` of the noise.
#[derive(Debug)]
pub(super) struct Predicted {
    pub(super) original: Tensor,
    pub(super) epsilon: Tensor,
}

/// Of `model_output` at `sample`.
pub(super) fn predicted(
    prediction: Prediction,
    [alpha, sigma]: [f64; 2],
    model_output: &Tensor,
    sample: &Tensor,
) -> Result<Predicted> {
    Ok(match prediction {
        Prediction::Epsilon => Predicted {
            original: (sum(&[(1.0, sample), (-sigma, model_output)])? / alpha)?,
            epsilon: model_output.to_dtype(DType::F32)?,
        },
        Prediction::Sample => Predicted {
            original: model_output.to_dtype(DType::F32)?,
            epsilon: (sum(&[(1.0, sample), (-alpha, model_output)])? / sigma)?,
        },
        Prediction::V => Predicted {
            original: sum(&[(alpha, sample), (-sigma, model_output)])?,
            epsilon: sum(&[(alpha, model_output), (sigma, sample)])?,
        },
        Prediction::Flow => Predicted {
            original: sum(&[(1.0, sample), (-sigma, model_output)])?,
            epsilon: sum(&[(1.0, sample), (1.0 - sigma, model_output)])?,
        },
    })
}
