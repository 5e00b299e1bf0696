//! The operations models are written in. Models call these and never candle's own layers, so that what is behind an
//! operation can change for every model at once: our kernels on the CPU, candle's on other devices.

use candle_core::{D, DType, Tensor};
/// What is behind the operations on the CPU, for those who measure it.
pub use kernels;
use kernels::{channels, heads, rope, rows};

use crate::{Error, Result};

mod attention;
mod blocks;
mod fourier;
pub(crate) mod host;
mod matrix;
mod products;

pub use attention::{attention, attention_of_tokens};
pub use fourier::{irfft2, rfft2};
pub use host::has_kernels;
use host::{map, ours, produce, read, read_all, write};
pub(crate) use matrix::{Chunks, Features, LaidOut, Matrix, Values};
pub use products::Products;

/// A pointwise function between two linear layers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Activation {
    /// GELU with the error function.
    Gelu,
    /// GELU by tanh; `gelu_new` and `gelu_pytorch_tanh` in configurations.
    #[serde(alias = "gelu_new", alias = "gelu_pytorch_tanh")]
    GeluTanh,
    /// CLIP's `x sigmoid(1.702 x)`.
    QuickGelu,
    /// `x sigmoid(x)`.
    Silu,
    /// `max(x, 0)`.
    Relu,
}

impl Activation {
    pub(crate) fn kernel(self) -> kernels::activation::Activation {
        use kernels::activation::Activation as Kernel;
        match self {
            Self::Gelu => Kernel::Gelu,
            Self::GeluTanh => Kernel::GeluTanh,
            Self::QuickGelu => Kernel::QuickGelu,
            Self::Silu => Kernel::Silu,
            Self::Relu => Kernel::Relu,
        }
    }
}

/// Applies `activation` to every element.
pub fn activate(x: &Tensor, activation: Activation) -> Result<Tensor> {
    if ours(x) {
        return map(x, |x| activation.kernel().apply_all(x));
    }
    Ok(match activation {
        Activation::Gelu => x.gelu_erf()?,
        Activation::GeluTanh => x.gelu()?,
        Activation::QuickGelu => (x * candle_nn::ops::sigmoid(&(x * 1.702)?)?)?,
        Activation::Silu => x.silu()?,
        Activation::Relu => x.relu()?,
    })
}

/// `x sigmoid(x)`.
pub fn silu(x: &Tensor) -> Result<Tensor> {
    activate(x, Activation::Silu)
}

/// Softmax over the last dimension.
pub fn softmax(x: &Tensor) -> Result<Tensor> {
    if !ours(x) {
        return Ok(candle_nn::ops::softmax_last_dim(&x.contiguous()?)?);
    }
    let width = x.dim(D::Minus1)?;
    map(x, |x| rows::softmax(x, width))
}

/// Layer norm over the last dimension, with an optional `weight` and `bias` of its size.
pub fn layer_norm(x: &Tensor, weight: Option<&Tensor>, bias: Option<&Tensor>, eps: f64) -> Result<Tensor> {
    if ours(x) {
        let width = x.dim(D::Minus1)?;
        let (weight, bias) = (weight.map(vector).transpose()?, bias.map(vector).transpose()?);
        return produce(x, |x, y| rows::layer_norm(x, y, width, weight.as_deref(), bias.as_deref(), eps as f32));
    }
    let centered = x.broadcast_sub(&x.mean_keepdim(D::Minus1)?)?;
    let variance = centered.sqr()?.mean_keepdim(D::Minus1)?;
    let mut y = centered.broadcast_div(&(variance + eps)?.sqrt()?)?;
    if let Some(weight) = weight {
        y = y.broadcast_mul(weight)?;
    }
    if let Some(bias) = bias {
        y = y.broadcast_add(bias)?;
    }
    Ok(y)
}

/// `layer_norm(x) (1 + scale) + shift`: adaptive layer norm. `x: [B, L, D]`, `shift, scale: [B, D]`.
pub fn layer_norm_modulate(x: &Tensor, shift: &Tensor, scale: &Tensor, eps: f64) -> Result<Tensor> {
    let (b, l, d) = x.dims3()?;
    if ours(x) && shift.dims() == [b, d] && scale.dims() == [b, d] {
        let (shift, scale) = (vector(shift)?, vector(scale)?);
        return produce(x, |x, y| rows::layer_norm_modulate(x, y, [l, d], &shift, &scale, eps as f32));
    }
    let y = layer_norm(x, None, None, eps)?;
    let y = y.broadcast_mul(&(scale.unsqueeze(1)? + 1.0)?)?;
    Ok(y.broadcast_add(&shift.unsqueeze(1)?)?)
}

/// `x / sqrt(mean(x^2) + eps) weight` over the last dimension.
pub fn rms_norm(x: &Tensor, weight: &Tensor, eps: f64) -> Result<Tensor> {
    if !ours(x) {
        return Ok(candle_nn::ops::rms_norm(&x.contiguous()?, weight, eps as f32)?);
    }
    let weight = vector(weight)?;
    produce(x, |x, y| rows::rms_norm(x, y, &weight, eps as f32))
}

/// Group norm of `x: [B, C, ..]` with `weight, bias: [C]`, then `activation`.
pub fn group_norm(x: &Tensor, groups: usize, affine: [&Tensor; 2], eps: f64, activation: Option<Activation>) -> Result<Tensor> {
    let dims = x.dims().to_vec();
    let [weight, bias] = affine;
    if ours(x) {
        let spatial = dims[2..].iter().product();
        let (weight, bias) = (vector(weight)?, vector(bias)?);
        let activation = activation.map(Activation::kernel);
        return produce(x, |x, y| rows::group_norm(x, y, [groups, spatial], [&weight, &bias], eps as f32, activation));
    }
    let grouped = x.reshape((dims[0], groups, x.elem_count() / (dims[0] * groups).max(1)))?;
    let mut column = vec![1; dims.len()];
    column[1] = dims[1];
    let y = layer_norm(&grouped, None, None, eps)?.reshape(dims)?;
    let y = y.broadcast_mul(&weight.reshape(column.as_slice())?)?.broadcast_add(&bias.reshape(column)?)?;
    activation.map_or(Ok(y.clone()), |activation| activate(&y, activation))
}

/// As [`group_norm`] of an f32 tensor of the CPU, rounded to bf16: `[B, C / 2, ..]`, whose floats have two channels in their bits, as a
/// convolution takes it. Groups are of whole pairs.
pub(crate) fn group_norm_in_pairs(
    x: &Tensor,
    groups: usize,
    affine: [&Tensor; 2],
    eps: f64,
    activation: Option<Activation>,
) -> Result<Tensor> {
    let mut dims = x.dims().to_vec();
    let spatial = dims[2..].iter().product();
    dims[1] /= 2;
    let [weight, bias] = [vector(affine[0])?, vector(affine[1])?];
    let activation = activation.map(Activation::kernel);
    let norm =
        |x: &[f32]| write(dims, |y| rows::group_norm_in_pairs(x, y, [groups, spatial], [&weight, &bias], eps as f32, activation));
    read(x, norm)?
}

/// RMS norm over the channels of every place of `x: [B, C, ..]` with `weight: [C]`, then `activation`. Where all channels are zero,
/// so is the output.
pub fn rms_norm_channels(x: &Tensor, weight: &Tensor, activation: Option<Activation>) -> Result<Tensor> {
    let dims = x.dims().to_vec();
    let (channels, places) = (dims[1], dims[2..].iter().product());
    if ours(x) {
        let weight = vector(weight)?;
        let activation = activation.map(Activation::kernel);
        return produce(x, |x, y| channels::rms_norm(x, y, [channels, places], &weight, activation));
    }
    let length = x.sqr()?.sum_keepdim(1)?.sqrt()?.maximum(channels::LEAST_LENGTH)?;
    let mut column = vec![1; dims.len()];
    column[1] = channels;
    let y = (x.broadcast_div(&length)? * (channels as f64).sqrt())?.broadcast_mul(&weight.reshape(column)?)?;
    activation.map_or(Ok(y.clone()), |activation| activate(&y, activation))
}

/// Heads of some tokens, as a projection leaves them.
#[derive(Clone, Copy, Debug)]
pub struct HeadStream<'a> {
    /// `[B, L, N, Dh]`
    pub x: &'a Tensor,
    /// The weight of an RMS norm of each head, `[Dh]`.
    pub norm: Option<&'a Tensor>,
}

/// The streams' heads one after the other, `[B, L, N, Dh]` of all their tokens: normed, and with cosines and sines `[L, Dh/2]` (or
/// `[B, L, Dh/2]`, one table per item) rotated in f32, whatever their type.
pub fn join_heads(streams: &[HeadStream<'_>], eps: f64, rope: Option<[&Tensor; 2]>) -> Result<Tensor> {
    let Some(HeadStream { x: first, .. }) = streams.first() else {
        return Err(Error::Operands { reason: "no heads to join".to_owned() });
    };
    let (b, _, n, dh) = first.dims4()?;
    let tokens = streams.iter().map(|stream| stream.x.dim(1)).collect::<Result<Vec<_>, _>>()?;
    let fits = streams.iter().zip(&tokens).all(|(stream, tokens)| ours(stream.x) && stream.x.dims() == [b, *tokens, n, dh]);
    if !fits || !rope.is_none_or(|tables| tables.into_iter().all(ours)) {
        return join_heads_by_steps(streams, eps, rope);
    }
    let norms = streams.iter().map(|stream| stream.norm.map(vector).transpose()).collect::<Result<Vec<_>>>()?;
    let tables = match rope {
        Some([cos, sin]) => Some([vector(cos)?, vector(sin)?]),
        None => None,
    };
    let xs: Vec<&Tensor> = streams.iter().map(|stream| stream.x).collect();
    let shape = (b, tokens.iter().sum::<usize>(), n, dh);
    read_all(&xs, |xs| {
        let parts = xs.iter().zip(&tokens).zip(&norms);
        let parts: Vec<_> =
            parts.map(|((x, tokens), norm)| heads::Stream { x, tokens: *tokens, norm: norm.as_deref() }).collect();
        let tables = tables.as_ref().map(|[cos, sin]| [cos.as_slice(), sin]);
        write(shape, |y| heads::join(&parts, y, [n, dh], eps as f32, tables))
    })?
}

fn join_heads_by_steps(streams: &[HeadStream<'_>], eps: f64, rope: Option<[&Tensor; 2]>) -> Result<Tensor> {
    let normed = streams.iter().map(|stream| match stream.norm {
        Some(weight) => rms_norm(stream.x, weight, eps),
        None => Ok(stream.x.clone()),
    });
    let x = Tensor::cat(&normed.collect::<Result<Vec<_>>>()?, 1)?;
    let Some([cos, sin]) = rope else { return Ok(x) };
    let (b, l, n, dh) = x.dims4()?;
    let pairs = x.to_dtype(DType::F32)?.reshape((b, l, n, dh / 2, 2))?; // [B, L, N, Dh/2, 2]
    let (x0, x1) = (pairs.narrow(4, 0, 1)?.squeeze(4)?, pairs.narrow(4, 1, 1)?.squeeze(4)?);
    let (cos, sin) = (cos.unsqueeze(cos.rank() - 1)?, sin.unsqueeze(sin.rank() - 1)?); // [.., L, 1, Dh/2]
    let y0 = (x0.broadcast_mul(&cos)? - x1.broadcast_mul(&sin)?)?;
    let y1 = (x1.broadcast_mul(&cos)? + x0.broadcast_mul(&sin)?)?;
    Ok(Tensor::stack(&[y0, y1], 4)?.reshape((b, l, n, dh))?.to_dtype(x.dtype())?)
}

/// Rotates pairs that lie half a head apart. `x: [B, N, L, Dh]`; `cos, sin: [L, Dh/2]` (or `[B, L, Dh/2]`, one table per item).
pub fn rope_halves(x: &Tensor, cos: &Tensor, sin: &Tensor) -> Result<Tensor> {
    let (_, n, l, dh) = x.dims4()?;
    if ours(x) && ours(cos) && ours(sin) {
        let (cos, sin) = (vector(cos)?, vector(sin)?);
        return produce(x, |x, y| rope::rope_halves(x, y, [n, l, dh], &cos, &sin));
    }
    let (x0, x1) = (x.narrow(3, 0, dh / 2)?, x.narrow(3, dh / 2, dh / 2)?);
    let table = |t: &Tensor| if t.rank() == 3 { t.unsqueeze(1) } else { Ok(t.clone()) };
    let (cos, sin) = (table(cos)?, table(sin)?);
    let y0 = (x0.broadcast_mul(&cos)? - x1.broadcast_mul(&sin)?)?;
    let y1 = (x1.broadcast_mul(&cos)? + x0.broadcast_mul(&sin)?)?;
    Ok(Tensor::cat(&[y0, y1], 3)?)
}

/// Nearest-neighbour upsampling of `x: [B, C, H, W]` to twice its height and width.
pub fn upsample_nearest2x(x: &Tensor) -> Result<Tensor> {
    let (_, _, h, w) = x.dims4()?;
    Ok(x.upsample_nearest2d(2 * h, 2 * w)?)
}

/// `x: [B, C, H, W]` with `by` more rows and columns on each side, mirrored at the outermost ones, which are not repeated
/// (`padding_mode="reflect"`).
///
/// # Errors
/// [`Error::Operands`] when a side is not longer than `by`.
pub fn reflect(x: &Tensor, by: usize) -> Result<Tensor> {
    let (b, c, h, w) = x.dims4()?;
    if by >= h || by >= w {
        return Err(Error::Operands { reason: format!("a border of {by} around {h} x {w} that mirrors it") });
    }
    if ours(x) {
        let shape = (b, c, h + 2 * by, w + 2 * by);
        return read(x, |x| write(shape, |y| kernels::mirror::reflect(x, y, [h, w], by)))?;
    }
    let index = |side: usize| {
        let at = |i: usize| {
            if i < by {
                by - i
            } else if i < by + side {
                i - by
            } else {
                2 * side + by - 2 - i
            }
        };
        Tensor::new((0..side + 2 * by).map(|i| at(i) as u32).collect::<Vec<_>>(), x.device())
    };
    Ok(x.index_select(&index(h)?, 2)?.index_select(&index(w)?, 3)?)
}

/// `x + gate * y`. `x, y: [B, L, D]`, `gate: [B, D]`.
pub fn gated(x: &Tensor, gate: &Tensor, y: &Tensor) -> Result<Tensor> {
    let (b, l, d) = x.dims3()?;
    if ours(x) && ours(y) && gate.dims() == [b, d] && y.dims() == [b, l, d] {
        let gate = vector(gate)?;
        return read(y, |of| produce(x, |x, y| rows::gated(x, &gate, of, y, [l, d])))?;
    }
    Ok((x + y.broadcast_mul(&gate.unsqueeze(1)?)?)?)
}

/// GEGLU: `left gelu(right)` of the two halves of `x: [.., 2 D]`, `[.., D]`.
pub fn geglu(x: &Tensor) -> Result<Tensor> {
    let width = x.dim(D::Minus1)? / 2;
    if ours(x) {
        let mut shape = x.dims().to_vec();
        shape[x.rank() - 1] = width;
        return read(x, |x| write(shape, |y| kernels::activation::gated(x, y, width, Activation::Gelu.kernel())))?;
    }
    let half = |at: usize| x.narrow(D::Minus1, at * width, width);
    Ok((half(0)? * activate(&half(1)?.contiguous()?, Activation::Gelu)?)?)
}

/// `x: [B, C, ..]` plus a number for each channel, `by: [B, C]`.
pub fn shift_channels(x: &Tensor, by: &Tensor) -> Result<Tensor> {
    let (b, c) = by.dims2()?;
    let mut column = vec![1; x.rank()];
    (column[0], column[1]) = (b, c);
    if ours(x) && x.dims()[..2] == [b, c] {
        let (places, by) = (x.dims()[2..].iter().product(), vector(by)?);
        return produce(x, |x, y| channels::shift(x, y, places, &by));
    }
    Ok(x.broadcast_add(&by.reshape(column)?)?)
}

/// `[B, L, D1]` and `[B, L, D2]` give `[B, L, D1 + D2]`.
pub fn join(a: &Tensor, b: &Tensor) -> Result<Tensor> {
    let ((items, l, first), (_, _, second)) = (a.dims3()?, b.dims3()?);
    if ours(a) && ours(b) && b.dims() == [items, l, second] {
        let shape = (items, l, first + second);
        return read(a, |a| read(b, |b| write(shape, |y| rows::join([a, b], [first, second], y))))??;
    }
    Ok(Tensor::cat(&[a, b], 2)?)
}

/// `[B, L, N Dh] -> [B, N, L, Dh]`.
pub fn split_heads(x: &Tensor, heads: usize) -> Result<Tensor> {
    let (b, l, d) = x.dims3()?;
    Ok(x.reshape((b, l, heads, d / heads))?.transpose(1, 2)?.contiguous()?)
}

/// `[B, N, L, Dh] -> [B, L, N Dh]`.
pub fn merge_heads(x: &Tensor) -> Result<Tensor> {
    let (b, n, l, dh) = x.dims4()?;
    Ok(x.transpose(1, 2)?.contiguous()?.reshape((b, l, n * dh))?)
}

/// All elements of a small tensor: a norm's weights, a table.
pub(crate) fn vector(x: &Tensor) -> Result<Vec<f32>> {
    read(&x.to_dtype(DType::F32)?, <[f32]>::to_vec)
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;

    fn close(a: &Tensor, b: &Tensor) {
        let difference = (a - b).unwrap().abs().unwrap().max_all().unwrap().to_scalar::<f32>().unwrap();
        assert!(difference < 1e-5, "differs by {difference}");
    }

    #[test]
    fn attention_equals_the_plain_formula() {
        let make = |l: usize| Tensor::randn(0f32, 1.0, (2, 3, l, 8), &Device::Cpu).unwrap();
        let (q, k, v) = (make(5), make(7), make(7));
        let scores = (q.matmul(&k.t().unwrap()).unwrap() * 0.25).unwrap();
        let expected = candle_nn::ops::softmax(&scores, 3).unwrap().matmul(&v).unwrap();
        close(&attention(&q, &k, &v, 0.25, None).unwrap(), &expected);
    }

    #[test]
    fn a_bias_broadcasts_as_candle_does_it() {
        let make = |dims: &[usize]| Tensor::randn(0f32, 1.0, dims, &Device::Cpu).unwrap();
        let (q, k, v) = (make(&[2, 3, 5, 8]), make(&[2, 3, 7, 8]), make(&[2, 3, 7, 8]));
        let scores = (q.matmul(&k.t().unwrap()).unwrap() * 0.25).unwrap();
        let turned = make(&[1, 3, 7, 5]).transpose(2, 3).unwrap();
        for bias in [make(&[1, 1, 1, 7]), make(&[1, 3, 5, 7]), make(&[2, 1, 1, 7]), make(&[2, 3, 5, 1]), turned] {
            let biased = scores.broadcast_add(&bias).unwrap();
            let expected = candle_nn::ops::softmax(&biased, 3).unwrap().matmul(&v).unwrap();
            close(&attention(&q, &k, &v, 0.25, Some(&bias)).unwrap(), &expected);
        }
    }

    #[test]
    fn norms_equal_candles() {
        let x = (Tensor::randn(3f32, 2.0, (2, 5, 48), &Device::Cpu).unwrap() * 3.0).unwrap();
        let w = Tensor::randn(1f32, 0.1, 48, &Device::Cpu).unwrap();
        let b = Tensor::randn(0f32, 0.1, 48, &Device::Cpu).unwrap();
        close(&rms_norm(&x, &w, 1e-6).unwrap(), &candle_nn::ops::rms_norm_slow(&x, &w, 1e-6).unwrap());
        close(&layer_norm(&x, Some(&w), Some(&b), 1e-6).unwrap(), &candle_nn::ops::layer_norm_slow(&x, &w, &b, 1e-6).unwrap());
    }

    #[test]
    fn ropes_equal_candles() {
        let x = Tensor::randn(0f32, 1.0, (2, 3, 5, 8), &Device::Cpu).unwrap();
        let angle = Tensor::randn(0f32, 1.0, (5, 4), &Device::Cpu).unwrap();
        let (cos, sin) = (angle.cos().unwrap(), angle.sin().unwrap());
        let turned = |x: &Tensor| x.transpose(1, 2).unwrap().contiguous().unwrap();
        let of_tokens = turned(&x);
        let stream = HeadStream { x: &of_tokens, norm: None };
        let interleaved = turned(&join_heads(&[stream], 1e-6, Some([&cos, &sin])).unwrap());
        close(&interleaved, &candle_nn::rotary_emb::rope_i(&x, &cos, &sin).unwrap());
        close(&rope_halves(&x, &cos, &sin).unwrap(), &candle_nn::rotary_emb::rope(&x, &cos, &sin).unwrap());
    }

    #[test]
    fn heads_are_joined_alike_by_candle_and_by_us() {
        let random = |dims: &[usize]| Tensor::randn(0f32, 1.0, dims, &Device::Cpu).unwrap();
        let (text, image, weight, angle) = (random(&[2, 3, 2, 8]), random(&[2, 4, 2, 8]), random(&[8]), random(&[7, 4]));
        let (cos, sin) = (angle.cos().unwrap(), angle.sin().unwrap());
        let streams = [HeadStream { x: &text, norm: Some(&weight) }, HeadStream { x: &image, norm: None }];
        for rope in [None, Some([&cos, &sin])] {
            let ours = join_heads(&streams, 1e-6, rope).unwrap();
            assert_eq!(ours.dims(), [2, 7, 2, 8]);
            close(&ours, &join_heads_by_steps(&streams, 1e-6, rope).unwrap());
        }
    }

    #[test]
    fn halves_and_channels_are_joined_alike_by_candle_and_by_us() {
        let random = |dims: &[usize]| Tensor::randn(0f32, 1.0, dims, &Device::Cpu).unwrap();
        let wide = |x: &Tensor| x.to_dtype(DType::F64).unwrap();
        let narrow = |x: Result<Tensor>| x.unwrap().to_dtype(DType::F32).unwrap();
        let halves = random(&[2, 5, 14]);
        assert_eq!(geglu(&halves).unwrap().dims(), [2, 5, 7]);
        close(&geglu(&halves).unwrap(), &narrow(geglu(&wide(&halves))));
        let (x, by) = (random(&[2, 3, 4, 5]), random(&[2, 3]));
        close(&shift_channels(&x, &by).unwrap(), &narrow(shift_channels(&wide(&x), &wide(&by))));
    }

    #[test]
    fn channels_are_normed_alike_by_candle_and_by_us() {
        let x = Tensor::randn(0f32, 2.0, (2, 5, 3, 4), &Device::Cpu).unwrap();
        let weight = Tensor::randn(1f32, 0.1, 5, &Device::Cpu).unwrap();
        let [wide, wide_weight] = [&x, &weight].map(|t| t.to_dtype(DType::F64).unwrap());
        let theirs = rms_norm_channels(&wide, &wide_weight, Some(Activation::Silu)).unwrap().to_dtype(DType::F32).unwrap();
        close(&rms_norm_channels(&x, &weight, Some(Activation::Silu)).unwrap(), &theirs);
    }
}
