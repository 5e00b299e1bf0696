//! Attention: ours on the CPU; elsewhere candle's products, a block of queries at a time.
//!
//! candle's own flash attention is for f16 and bf16, takes no bias, and its build clones CUTLASS from a repository: it is not used.
//! A block of queries needs no more than its own rows of scores, so a picture of any size needs [`MOST_SCORES`] of them at once, not
//! the square of its tokens.

use candle_core::Tensor;
use kernels::attention::{Attention, Bias, Heads};
use kernels::memory::in_parts;

use super::host::{ours, read, write};
use super::products::Products;
use super::{merge_heads, softmax};
use crate::{Error, Result};

/// Most scores that are held at once, 128 MiB of them in f32 (and as much again for what softmax makes of them): FLUX.1's attention
/// over 4608 tokens would have 2 GB, and is done in 16 blocks of 303 queries, each a product that keeps a large GPU busy.
const MOST_SCORES: usize = 1 << 25;

/// Softmax attention. `q: [B, N, Lq, Dh]`, `k, v: [B, N, Lk, Dh]` give `[B, N, Lq, Dh]`.
///
/// `bias` is added to the scores and broadcasts to `[B, N, Lq, Lk]`: T5's relative positions, or a mask of 0 and `-inf`.
pub fn attention(q: &Tensor, k: &Tensor, v: &Tensor, scale: f64, bias: Option<&Tensor>) -> Result<Tensor> {
    if ours(q) && ours(k) && ours(v) && bias.is_none_or(ours) {
        return streamed(q, k, v, scale as f32, bias, Order::ByHead);
    }
    blocked(q, k, v, scale, bias, MOST_SCORES)
}

/// By candle's products, never with more than `most_scores` scores at once (or those of one query, if these are more).
fn blocked(q: &Tensor, k: &Tensor, v: &Tensor, scale: f64, bias: Option<&Tensor>, most_scores: usize) -> Result<Tensor> {
    let (b, n, queries, _) = q.dims4()?;
    let of_a_query = b * n * k.dim(2)?;
    let block = (most_scores / of_a_query.max(1)).clamp(1, queries.max(1));
    let (k, v) = (k.transpose(2, 3)?.contiguous()?, v.contiguous()?); // [B, N, Dh, Lk], [B, N, Lk, Dh]
    let rows = |start: usize| {
        let length = block.min(queries - start);
        let scores = (q.narrow(2, start, length)?.contiguous()? * scale)?.matmul(&k)?;
        let scores = match bias {
            Some(bias) => scores.broadcast_add(&rows_of(bias, start, length)?)?,
            None => scores,
        };
        Ok(softmax(&scores)?.matmul(&v)?)
    };
    if block >= queries {
        return rows(0);
    }
    let blocks = (0..queries).step_by(block).map(rows).collect::<Result<Vec<_>>>()?;
    Ok(Tensor::cat(&blocks, 2)?)
}

/// A bias for some of the queries; one that is the same for all of them stays as it is.
fn rows_of(bias: &Tensor, start: usize, length: usize) -> Result<Tensor> {
    match bias.dims() {
        [.., queries, _] if *queries > 1 => Ok(bias.narrow(bias.rank() - 2, start, length)?),
        _ => Ok(bias.clone()),
    }
}

/// As [`attention`] of heads as projections leave them: `q: [B, Lq, N, Dh]`, `k, v: [B, Lk, N, Dh]` give `[B, Lq, N Dh]`.
pub fn attention_of_tokens(q: &Tensor, k: &Tensor, v: &Tensor, scale: f64, bias: Option<&Tensor>) -> Result<Tensor> {
    if ours(q) && ours(k) && ours(v) && bias.is_none_or(ours) {
        return streamed(q, k, v, scale as f32, bias, Order::ByToken);
    }
    let heads = |x: &Tensor| x.transpose(1, 2)?.contiguous();
    merge_heads(&blocked(&heads(q)?, &heads(k)?, &heads(v)?, scale, bias, MOST_SCORES)?)
}

/// How heads lie.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Order {
    /// `[B, N, L, Dh]`
    ByHead,
    /// `[B, L, N, Dh]`
    ByToken,
}

impl Order {
    fn heads(self, data: &[f32], [heads, rows, width]: [usize; 3]) -> Heads<'_> {
        match self {
            Self::ByHead => Heads::dense(data, rows, width),
            Self::ByToken => Heads { data, head_stride: width, row_stride: heads * width },
        }
    }
}

fn streamed(q: &Tensor, k: &Tensor, v: &Tensor, scale: f32, bias: Option<&Tensor>, order: Order) -> Result<Tensor> {
    let by_token = order == Order::ByToken;
    let dims = |x: &Tensor| x.dims4().map(|(b, n, l, width)| if by_token { [b, l, n, width] } else { [b, n, l, width] });
    let ([b, n, queries, width], [_, _, keys, _]) = (dims(q)?, dims(k)?);
    if dims(k)? != [b, n, keys, width] || v.dims() != k.dims() {
        return Err(Error::Operands {
            reason: format!("attention of {:?} over keys {:?} and values {:?}", q.shape(), k.shape(), v.shape()),
        });
    }
    let of = Attention { heads: n, queries, keys, width, scale, side_by_side: by_token };
    let products = Products::here().order();
    let shape = if by_token { vec![b, queries, n * width] } else { vec![b, n, queries, width] };
    let run = |bias: Option<(&[f32], &[usize], usize)>| {
        let items = |q: &[f32], k: &[f32], v: &[f32]| {
            write(shape.clone(), |y| {
                in_parts(y, n * queries * width, |item, y| {
                    let (of_q, of_k) = (item * n * queries * width, item * n * keys * width);
                    let q = order.heads(&q[of_q..], [n, queries, width]);
                    let [k, v] = [k, v].map(|x| order.heads(&x[of_k..], [n, keys, width]));
                    let bias =
                        bias.map(|(data, starts, query_stride)| Bias { data, starts: &starts[item * n..][..n], query_stride });
                    of.run(products, q, k, v, bias, y)
                })
            })
        };
        read(q, |q| read(k, |k| read(v, |v| items(q, k, v))?)?)?
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
            read(&bias, |data| run(Some((data, &starts, stride[2]))))?
        }
    }
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;

    fn random(dims: &[usize]) -> Tensor {
        Tensor::randn(0f32, 1.0, dims, &Device::Cpu).unwrap()
    }

    fn plain(q: &Tensor, k: &Tensor, v: &Tensor, scale: f64, bias: Option<&Tensor>) -> Tensor {
        let scores = (q.matmul(&k.t().unwrap()).unwrap() * scale).unwrap();
        let scores = bias.map_or(scores.clone(), |bias| scores.broadcast_add(bias).unwrap());
        candle_nn::ops::softmax(&scores, 3).unwrap().matmul(v).unwrap()
    }

    #[test]
    fn attention_by_blocks_is_attention_whatever_their_size() {
        let (q, k, v) = (random(&[2, 3, 11, 8]), random(&[2, 3, 7, 8]), random(&[2, 3, 7, 8]));
        let biases = [vec![1, 1, 1, 7], vec![1, 3, 11, 7], vec![2, 1, 1, 7], vec![2, 3, 11, 1], vec![11, 7], vec![7]];
        for bias in std::iter::once(None).chain(biases.iter().map(|dims| Some(random(dims)))) {
            let expected = plain(&q, &k, &v, 0.25, bias.as_ref());
            // A query has 42 scores: one at a time though that is too many, several with some left over, all.
            for most_scores in [1, 42, 4 * 42, 10 * 42, 11 * 42, usize::MAX] {
                let got = blocked(&q, &k, &v, 0.25, bias.as_ref(), most_scores).unwrap();
                assert_eq!(got.dims(), [2, 3, 11, 8]);
                let error = (got - &expected).unwrap().abs().unwrap().max_all().unwrap().to_scalar::<f32>().unwrap();
                assert!(error < 1e-5, "{most_scores} scores, bias {bias:?}: differs by {error}");
            }
        }
    }

    #[test]
    fn tokens_are_attended_as_heads_are() {
        let (q, k, v) = (random(&[2, 3, 11, 8]), random(&[2, 3, 7, 8]), random(&[2, 3, 7, 8]));
        let [by_token_q, by_token_k, by_token_v] = [&q, &k, &v].map(|x| x.transpose(1, 2).unwrap().contiguous().unwrap());
        let bits = |x: Tensor| x.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        for bias in [None, Some(random(&[2, 1, 1, 7])), Some(random(&[2, 3, 11, 7]))] {
            let by_head = merge_heads(&attention(&q, &k, &v, 0.25, bias.as_ref()).unwrap()).unwrap();
            let by_token = attention_of_tokens(&by_token_q, &by_token_k, &by_token_v, 0.25, bias.as_ref()).unwrap();
            assert_eq!(by_token.dims(), [2, 11, 24]);
            assert_eq!(bits(by_token), bits(by_head), "{bias:?}");
        }
    }

    #[test]
    fn attention_by_blocks_of_nothing_is_nothing() {
        let (q, k) = (random(&[1, 2, 0, 8]), random(&[1, 2, 7, 8]));
        assert_eq!(blocked(&q, &k, &k, 1.0, None, 64).unwrap().dims(), [1, 2, 0, 8]);
    }

    #[test]
    fn queries_that_lie_apart_are_attended_alike() {
        // As heads lie before they are put in order.
        let x = random(&[1, 9, 2, 8]).transpose(1, 2).unwrap();
        let whole = blocked(&x, &x, &x, 0.3, None, usize::MAX).unwrap();
        let parts = blocked(&x, &x, &x, 0.3, None, 2 * 2 * 9).unwrap();
        let error = (whole - parts).unwrap().abs().unwrap().max_all().unwrap().to_scalar::<f32>().unwrap();
        assert!(error < 1e-6, "differs by {error}");
    }
}
