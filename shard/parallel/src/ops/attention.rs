//! Attention: ours on the CPU, candle's products elsewhere.

use candle_core::Tensor;
use kernels::attention::{Attention, Bias, Heads};

use super::host::{fill, ours, read};
use super::softmax;
use crate::{Error, Result};

/// Softmax attention. `q: [B, N, Lq, Dh]`, `k, v: [B, N, Lk, Dh]` give `[B, N, Lq, Dh]`.
///
/// `bias` is added to the scores and broadcasts to `[B, N, Lq, Lk]`: T5's relative positions, or a mask of 0 and `-inf`.
pub fn attention(q: &Tensor, k: &Tensor, v: &Tensor, scale: f64, bias: Option<&Tensor>) -> Result<Tensor> {
    if ours(q) && ours(k) && ours(v) && bias.is_none_or(ours) {
        return streamed(q, k, v, scale as f32, bias);
    }
    let scores = (q.contiguous()? * scale)?.matmul(&k.transpose(2, 3)?.contiguous()?)?;
    let scores = match bias {
        Some(bias) => scores.broadcast_add(bias)?,
        None => scores,
    };
    Ok(softmax(&scores)?.matmul(&v.contiguous()?)?)
}

fn streamed(q: &Tensor, k: &Tensor, v: &Tensor, scale: f32, bias: Option<&Tensor>) -> Result<Tensor> {
    let (b, n, queries, width) = q.dims4()?;
    let keys = k.dim(2)?;
    if k.dims() != [b, n, keys, width] || v.dims() != k.dims() {
        return Err(Error::Operands {
            reason: format!("attention of {:?} over keys {:?} and values {:?}", q.shape(), k.shape(), v.shape()),
        });
    }
    let of = Attention { heads: b * n, queries, keys, width, scale };
    let run = |bias: Option<Bias<'_>>| {
        let run = |q: &[f32], k: &[f32], v: &[f32]| {
            fill((b, n, queries, width), |y| {
                let (q, k, v) = (Heads::dense(q, queries, width), Heads::dense(k, keys, width), Heads::dense(v, keys, width));
                of.run(q, k, v, bias, y)
            })
        };
        read(q, |q| read(k, |k| read(v, |v| run(q, k, v))?)?)?
    };
    match bias {
        None => run(None),
        Some(bias) => {
            let bias = bias.contiguous()?;
            let spread = bias.broadcast_as((b, n, queries, keys))?;
            // The kernel reads a row's keys one after the other; any other broadcast is a stride of zero.
            let (bias, spread) = if spread.stride()[3] == 1 || keys <= 1 {
                (bias, spread)
            } else {
                let whole = spread.contiguous()?;
                (whole.clone(), whole)
            };
            let stride = spread.stride().to_vec();
            let starts: Vec<usize> = (0..b * n).map(|head| head / n * stride[0] + head % n * stride[1]).collect();
            read(&bias, |data| run(Some(Bias { data, starts: &starts, query_stride: stride[2] })))?
        }
    }
}
