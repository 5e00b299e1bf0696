//! An adapter's two factors of one layer, as a rank holds them.

use candle_core::{DType, Device, Tensor};

use super::{Cut, Factors, Site};
use crate::collective::Collective;
use crate::convolution::{Conv2d, Placement};
use crate::linear::chunks;
use crate::ops::Matrix;
use crate::{Error, Result};

/// `B A`, for this rank's outputs.
pub(super) struct Pair {
    held: Held,
    /// alpha / rank
    pub(super) factor: f64,
}

enum Held {
    /// Of a linear layer.
    Matrices { a: Matrix, b: Matrix },
    /// Of a convolution: with as large a kernel, and of single pixels.
    Kernels { a: Conv2d, b: Conv2d },
}

impl Pair {
    /// This rank's slices of what is for `site`.
    pub(super) fn of(factors: &Factors, site: &Site, group: &dyn Collective, device: &Device) -> Result<Self> {
        let Factors { a, b, factor, .. } = factors;
        let shape = |name: &str, found: &Tensor, expected: [usize; 2]| {
            let name = format!("{}.{name}", site.name);
            if found.dims() == expected {
                return Ok(());
            }
            Err(Error::Shape { name, found: found.dims().to_vec(), expected: expected.to_vec() })
        };
        let rank = a.dim(0)?;
        shape("lora_A", a, [rank, site.width()])?;
        shape("lora_B", b, [site.d_out, rank])?;
        let (a, b) = (a.to_dtype(DType::F32)?, b.to_dtype(DType::F32)?);
        let b = match &site.cut {
            Cut::Whole | Cut::Inputs(_) => b,
            Cut::Outputs(parts) => slice(&b, 0, parts, group)?,
            Cut::Rows(rows) => {
                let mine = rows.iter().map(|rows| b.narrow(0, rows.start, rows.len())).collect::<Result<Vec<_>, _>>()?;
                Tensor::cat(&mine, 0)?
            }
        };
        // The file's factors are the host's; what is kept of them is where the layer multiplies.
        let (whole, b) = (|a: &Tensor| a.to_device(device), b.to_device(device)?);
        let held = match (site.kernel, &site.cut) {
            (Some(size), _) => {
                let a = whole(&a)?.reshape((rank, site.d_in, size, size))?; // [rank, C_in k k] -> [rank, C_in, k, k]
                let b = b.reshape((b.dim(0)?, rank, 1, 1))?; // [C_out/tp, rank] -> [C_out/tp, rank, 1, 1]
                Held::Kernels { a: Conv2d::of_factor(&a)?, b: Conv2d::of_factor(&b)? }
            }
            (None, Cut::Inputs(parts)) => {
                let pieces = chunks(parts, group.size(), group.rank());
                Held::Matrices { a: Matrix::in_chunks(&whole(&slice(&a, 1, parts, group)?)?, pieces)?, b: Matrix::new(&b)? }
            }
            (None, _) => Held::Matrices { a: Matrix::new(&whole(&a)?)?, b: Matrix::new(&b)? },
        };
        Ok(Self { held, factor: *factor })
    }

    /// `B (A x)`, in f32; `A x` is summed over `reduce`, of a layer whose inputs are divided.
    pub(super) fn product(&self, x: &Tensor, reduce: Option<&dyn Collective>) -> Result<Tensor> {
        let Held::Matrices { a, b } = &self.held else { return Err(other_layer()) };
        let inner = a.product(&x.to_dtype(DType::F32)?, None, None)?;
        let inner = match reduce {
            Some(group) => group.all_reduce(&inner)?,
            None => inner,
        };
        b.product(&inner, None, None)
    }

    /// `B (A x)`, in f32, where `A` is laid on `x: [items, C_in, H, W]` as `at` says.
    pub(super) fn convolved(&self, x: &Tensor, at: Placement) -> Result<Tensor> {
        let Held::Kernels { a, b } = &self.held else { return Err(other_layer()) };
        b.forward(&a.forward(&x.to_dtype(DType::F32)?, at)?, Placement::same(1))
    }
}

/// Factors are of their site's kind, and so are its layers, unless a linear one and a convolution were loaded by one name.
fn other_layer() -> Error {
    Error::Operands { reason: "factors of an adapter for a layer of another kind by the same name".into() }
}

/// This rank's share of every part packed along `dim`.
fn slice(x: &Tensor, dim: usize, parts: &[usize], group: &dyn Collective) -> Result<Tensor> {
    let (rank, tp) = (group.rank(), group.size());
    let mut start = 0;
    let mut mine = Vec::new();
    for part in parts {
        let (from, to) = (rank * part / tp, (rank + 1) * part / tp); // as the layers are, which may be uneven
        mine.push(x.narrow(dim, start + from, to - from)?);
        start += part;
    }
    Ok(Tensor::cat(&mine, dim)?.contiguous()?)
}
