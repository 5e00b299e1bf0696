//! A linear layer's weight, packed for the kernel that multiplies with it.

use std::fmt;
use std::sync::Arc;

use candle_core::{CpuStorage, DType, Device, Storage, Tensor};
use half::{bf16, f16};
use kernels::gemm::{BlockRows, Element, Epilogue, Layer, PackedInputs, PackedWeight, Piece, Rows, Source, linear_tree};

use super::Activation;
use super::blocks::Blocks;
use super::host::{has_kernels, ours, read, read_all, write};
use super::products::Products;
use crate::{Error, Result};

/// Into which chunks a product cuts its input: each lists the pieces (start and length) of an input row that it reads.
pub(crate) type Chunks = Vec<Vec<Piece>>;

/// Numbers as they are stored.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Values<'a> {
    F32(&'a [f32]),
    Bf16(&'a [bf16]),
    F16(&'a [f16]),
}

impl<'a> Values<'a> {
    /// Of the bytes of a file; `None` if they are of another type, or do not lie where this machine can read them.
    pub(crate) fn of(bytes: &'a [u8], dtype: DType) -> Option<Self> {
        match dtype {
            DType::F32 => bytemuck::try_cast_slice(bytes).ok().map(Self::F32),
            DType::BF16 => bytemuck::try_cast_slice(bytes).ok().map(Self::Bf16),
            DType::F16 => bytemuck::try_cast_slice(bytes).ok().map(Self::F16),
            _ => None,
        }
    }

    /// Packs the columns that `chunks` list of `n` rows of `k`.
    fn pack(self, [n, k]: [usize; 2], chunks: &Chunks, products: Products) -> PackedWeight {
        fn packed<T: Element>(data: &[T], [n, k]: [usize; 2], chunks: &Chunks) -> PackedWeight {
            PackedWeight::pack_pieces(Rows::new(data, n, k), &chunks.concat())
        }
        match (self, products.order()) {
            (Self::F32(data), _) => packed(data, [n, k], chunks),
            (Self::Bf16(data), Some(order)) => PackedWeight::pack_pairs(order, Rows::new(data, n, k), chunks),
            (Self::Bf16(data), None) => packed(data, [n, k], chunks),
            // As diffusers loads them in bf16.
            (Self::F16(data), Some(order)) => {
                let rounded: Vec<bf16> = data.iter().map(|w| bf16::from_f32(w.to_f32())).collect();
                PackedWeight::pack_pairs(order, Rows::new(&rounded, n, k), chunks)
            }
            (Self::F16(data), None) => packed(data, [n, k], chunks),
        }
    }
}

/// A weight `[d_out, d_in]`.
#[derive(Clone)]
pub(crate) struct Matrix {
    chunks: Arc<Chunks>,
    d_out: usize,
    weight: Weight,
}

#[derive(Clone)]
enum Weight {
    /// For our kernels: f32, 16 bits or blocks, multiplied in f32; or 16 bits or blocks, multiplied in bf16 or 8 bits.
    Packed(Arc<PackedWeight>),
    /// For candle's: one for each chunk.
    Whole(Vec<Tensor>),
    /// For candle's: all chunks one after the other, widened for each product.
    Blocks(Arc<Blocks>),
}

impl Matrix {
    /// Packs `weight`; its product is one sum over all of `d_in`.
    pub(crate) fn new(weight: &Tensor) -> Result<Self> {
        let d_in = weight.dim(1)?;
        Self::in_chunks(weight, vec![vec![(0, d_in)]])
    }

    /// Packs `weight`; its product adds the chunks' own products as a balanced tree.
    pub(crate) fn in_chunks(weight: &Tensor, chunks: Chunks) -> Result<Self> {
        Self::multiplied_in(Products::here(), weight, chunks)
    }

    fn multiplied_in(products: Products, weight: &Tensor, chunks: Chunks) -> Result<Self> {
        let (d_out, d_in) = weight.dims2()?;
        let packs = matches!(weight.dtype(), DType::F32 | DType::BF16 | DType::F16) && has_kernels(weight.device());
        let packed = packs.then(|| pack(weight, &chunks, products)).transpose()?;
        let weight = match packed {
            Some(packed) => Weight::Packed(Arc::new(packed)),
            None if chunks.len() == 1 && chunks[0] == [(0, d_in)] => Weight::Whole(vec![weight.clone()]),
            None => Weight::Whole(chunks.iter().map(|pieces| columns(weight, pieces)).collect::<Result<_>>()?),
        };
        Ok(Self { chunks: Arc::new(chunks), d_out, weight })
    }

    /// Packs `[d_out, k]` stored numbers for our kernels, without a copy between. `stored` says which of the k stored columns `chunks` are.
    pub(crate) fn of_stored(values: Values<'_>, [d_out, k]: [usize; 2], stored: &Chunks, chunks: Chunks) -> Self {
        let packed = values.pack([d_out, k], stored, Products::here());
        Self { chunks: Arc::new(chunks), d_out, weight: Weight::Packed(Arc::new(packed)) }
    }

    /// Takes in a weight in blocks, whose columns are those of the chunks, one after the other.
    pub(crate) fn of_blocks(rows: BlockRows, chunks: Chunks, device: &Device) -> Result<Self> {
        let d_out = rows.n();
        let weight = if has_kernels(device) {
            let products = Products::here();
            let bytes = if products == Products::Int8 { PackedWeight::bytes_of_blocks(rows, &chunks) } else { Err(rows) };
            Weight::Packed(Arc::new(bytes.unwrap_or_else(|rows| match products.order() {
                Some(order) => PackedWeight::pairs_of_blocks(order, rows, &chunks),
                None => rows.into(),
            })))
        } else {
            Weight::Blocks(Arc::new(Blocks::new(&rows, device)?))
        };
        Ok(Self { chunks: Arc::new(chunks), d_out, weight })
    }

    /// Holds the shape alone, where bytes are counted and nothing is computed.
    pub(crate) fn measured(weight: &Tensor) -> Result<Self> {
        Ok(Self { chunks: Arc::default(), d_out: weight.dim(0)?, weight: Weight::Whole(Vec::new()) })
    }

    /// `activation(x W^T + bias)`. `x: [.., d_in]`, `bias: [d_out]` give `[.., d_out]`, not yet rounded to `x`'s type: in f32 if that is
    /// what the kernel adds in.
    pub(crate) fn product(&self, x: &Tensor, bias: Option<&Tensor>, activation: Option<Activation>) -> Result<Tensor> {
        let mut shape = x.dims().to_vec();
        let Some(d_in) = shape.pop() else {
            return Err(Error::Operands { reason: "a number into a linear layer".to_owned() });
        };
        let rows = shape.iter().product();
        shape.push(self.d_out);
        let weights = match &self.weight {
            Weight::Packed(weight) => {
                if d_in != weight.k() {
                    return Err(Error::Operands { reason: format!("{d_in} features into a layer of {}", weight.k()) });
                }
                let bias = bias.map(super::vector).transpose()?;
                let epilogue = Epilogue { bias: bias.as_deref(), activation: activation.map(Activation::kernel) };
                return read(&x.to_dtype(DType::F32)?, |x| {
                    write(shape, |y| linear_tree(Rows::new(x, rows, d_in), &self.chunks, weight, epilogue, y))
                })?;
            }
            Weight::Whole(weights) => weights,
            Weight::Blocks(blocks) => &blocks.widened(&self.chunks)?,
        };
        let y = add(tree_product(&x.reshape((rows, d_in))?, &self.chunks, weights)?, bias)?.reshape(shape)?;
        activation.map_or(Ok(y.clone()), |activation| super::activate(&y, activation))
    }
}

/// Inputs that several layers have in common, or that one makes for the next: see [`PackedInputs`].
pub(crate) struct LaidOut {
    /// Without the last one, the features.
    shape: Vec<usize>,
    /// In which the features lie.
    chunks: Arc<Chunks>,
    inputs: PackedInputs,
}

/// Some features of a layer's inputs.
pub(crate) enum Features<'a> {
    /// As they are: `[.., d]`.
    Whole(&'a Tensor),
    /// `activation(x W^T + bias)`
    Layer { x: &'a LaidOut, weight: &'a Matrix, bias: Option<&'a Tensor>, activation: Option<Activation> },
}

impl Features<'_> {
    /// All sizes but the last.
    fn shape(&self) -> &[usize] {
        match self {
            Self::Whole(x) => x.dims().split_last().map_or(&[], |(_, shape)| shape),
            Self::Layer { x, .. } => &x.shape,
        }
    }
}

impl Matrix {
    /// Lays out what this is to be multiplied with, features side by side; `None` if that can only be done while it is multiplied. Of several
    /// layers the others [take](Self::takes) the same.
    pub(crate) fn lay_out(&self, features: &[Features<'_>]) -> Result<Option<LaidOut>> {
        let (Weight::Packed(weight), Some(first)) = (&self.weight, features.first()) else { return Ok(None) };
        let (shape, wholes) = (
            first.shape().to_vec(),
            features.iter().filter_map(|part| if let Features::Whole(x) = part { Some(*x) } else { None }),
        );
        let wholes: Vec<&Tensor> = wholes.collect();
        if !wholes.iter().all(|x| ours(x) && x.rank() > 0) || !features.iter().all(|part| part.shape() == shape) {
            return Ok(None);
        }
        let biases = features.iter().map(|part| match part {
            Features::Layer { bias: Some(bias), .. } => super::vector(bias).map(Some),
            _ => Ok(None),
        });
        let biases = biases.collect::<Result<Vec<_>>>()?;
        let (rows, mut columns) = (shape.iter().product(), 0);
        let inputs = read_all(&wholes, |slices| {
            let mut wholes = slices.iter().zip(&wholes);
            let mut sources = Vec::new();
            for (part, bias) in features.iter().zip(&biases) {
                sources.push(match part {
                    Features::Whole(_) => {
                        let (data, x) = wholes.next()?;
                        let width = *x.dims().last()?;
                        columns += width;
                        Source::Rows(Rows::new(data, rows, width), width)
                    }
                    Features::Layer { x, weight: matrix, activation, .. } => {
                        let Weight::Packed(weight) = &matrix.weight else { return None };
                        columns += weight.n();
                        let epilogue = Epilogue { bias: bias.as_deref(), activation: activation.map(Activation::kernel) };
                        Source::Layer(Layer { inputs: &x.inputs, weight, epilogue })
                    }
                });
            }
            if columns == weight.k() { PackedInputs::of(&sources, &self.chunks, weight) } else { None }
        })?;
        Ok(inputs.map(|inputs| LaidOut { shape, chunks: self.chunks.clone(), inputs }))
    }

    /// Whether [`Self::product_of`] can be of `x`.
    pub(crate) fn takes(&self, x: &LaidOut) -> bool {
        matches!(&self.weight, Weight::Packed(weight) if self.chunks == x.chunks && x.inputs.fit(weight))
    }

    /// As [`Self::product`] of the same inputs.
    ///
    /// # Errors
    /// [`Error::Operands`] of inputs that it does not [take](Self::takes).
    pub(crate) fn product_of(&self, x: &LaidOut, bias: Option<&Tensor>) -> Result<Tensor> {
        let Weight::Packed(weight) = &self.weight else {
            return Err(Error::Operands { reason: "inputs laid out for another kind of weight".to_owned() });
        };
        let bias = bias.map(super::vector).transpose()?;
        let epilogue = Epilogue { bias: bias.as_deref(), activation: None };
        write([x.shape.as_slice(), &[self.d_out]].concat(), |y| x.inputs.linear(weight, epilogue, y))
    }
}

/// `x: [rows, d_in]`, a weight for each chunk.
fn tree_product(x: &Tensor, chunks: &Chunks, weights: &[Tensor]) -> Result<Tensor> {
    let one = |(pieces, weight): (&Vec<Piece>, &Tensor)| {
        let x = columns(x, pieces)?;
        let (factor, weight) = match (weight.dtype(), weight.device()) {
            // Sums are in f32 all the same.
            (DType::BF16, device) if !device.is_cpu() && Products::here().narrow() => (x.to_dtype(DType::BF16)?, weight.clone()),
            // Halves would overflow as inputs, and candle's CPU has no products of 16 bits.
            (DType::BF16 | DType::F16, _) => (x.clone(), weight.to_dtype(x.dtype())?),
            _ => (x.clone(), weight.clone()),
        };
        Ok(factor.matmul(&weight.t()?)?.to_dtype(x.dtype())?)
    };
    tree_sum(chunks.iter().zip(weights).map(one).collect::<Result<_>>()?)
}

fn add(y: Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
    match bias {
        Some(bias) => Ok(y.broadcast_add(bias)?),
        None => Ok(y),
    }
}

fn pack(weight: &Tensor, chunks: &Chunks, products: Products) -> Result<PackedWeight> {
    let weight = weight.contiguous()?;
    let dims = weight.dims2()?;
    let (storage, layout) = weight.storage_and_layout();
    let (start, end) = layout.contiguous_offsets().unwrap_or_default();
    let values = match &*storage {
        Storage::Cpu(CpuStorage::F32(data)) => Values::F32(&data[start..end]),
        Storage::Cpu(CpuStorage::BF16(data)) => Values::Bf16(&data[start..end]),
        Storage::Cpu(CpuStorage::F16(data)) => Values::F16(&data[start..end]),
        _ => return Err(Error::Operands { reason: format!("a weight of {:?} to pack", weight.dtype()) }),
    };
    Ok(values.pack(dims.into(), chunks, products))
}

/// Some columns of `x: [rows, d]`, one piece after the other.
fn columns(x: &Tensor, pieces: &[Piece]) -> Result<Tensor> {
    if let [(0, len)] = pieces
        && *len == x.dim(1)?
    {
        return Ok(x.clone());
    }
    let pieces = pieces.iter().map(|(at, len)| x.narrow(1, *at, *len)).collect::<Result<Vec<_>, _>>()?;
    Ok(Tensor::cat(&pieces, 1)?.contiguous()?)
}

/// Adds a power of two of tensors as a balanced binary tree.
fn tree_sum(mut level: Vec<Tensor>) -> Result<Tensor> {
    while level.len() > 1 {
        level =
            level.chunks(2).map(|pair| if let [a, b] = pair { a + b } else { Ok(pair[0].clone()) }).collect::<Result<_, _>>()?;
    }
    level.pop().ok_or(Error::GroupSize { size: 0 })
}

impl fmt::Debug for Matrix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.weight {
            Weight::Packed(weight) => write!(f, "{weight:?} in {} chunks", self.chunks.len()),
            Weight::Whole(weights) => write!(f, "{} weights of {} outputs", weights.len(), self.d_out),
            Weight::Blocks(blocks) => write!(f, "{blocks:?} for {} chunks", self.chunks.len()),
        }
    }
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;

    #[test]
    fn candles_product_and_ours_agree() {
        let random = |dims: &[usize]| Tensor::randn(0f64, 1.0, dims, &Device::Cpu).unwrap();
        let (x, weight, bias) = (random(&[2, 3, 40]), random(&[17, 40]), random(&[17]));
        let eight: Chunks = (0..8).map(|c| vec![(2 * c, 2), (16 + 3 * c, 3)]).collect();
        for chunks in [vec![vec![(0, 40)]], eight] {
            // The columns come out of order in chunks, and the weight's with them.
            let theirs = Matrix::in_chunks(&weight, chunks.clone()).unwrap().product(&x, Some(&bias), None).unwrap();
            let narrow = |t: &Tensor| t.to_dtype(DType::F32).unwrap();
            let ours = Matrix::in_chunks(&narrow(&weight), chunks).unwrap();
            let ours = ours.product(&narrow(&x), Some(&narrow(&bias)), None).unwrap();
            assert_eq!(ours.dims(), [2, 3, 17]);
            let difference = (ours - narrow(&theirs)).unwrap().abs().unwrap().max_all().unwrap().to_scalar::<f32>().unwrap();
            assert!(difference < 1e-5, "differs by {difference}");
        }
    }

    #[test]
    fn bf16_activations_are_multiplied_in_f32_and_not_rounded() {
        let x = Tensor::randn(0f32, 1.0, (3, 40), &Device::Cpu).unwrap().to_dtype(DType::BF16).unwrap();
        let weight = Tensor::randn(0f32, 1.0, (17, 40), &Device::Cpu).unwrap().to_dtype(DType::BF16).unwrap();
        let narrow = Matrix::new(&weight).unwrap();
        let wide = Matrix::new(&weight.to_dtype(DType::F32).unwrap()).unwrap();
        let expected = wide.product(&x.to_dtype(DType::F32).unwrap(), None, None).unwrap();
        assert_eq!(narrow.product(&x, None, None).unwrap().to_vec2::<f32>().unwrap(), expected.to_vec2::<f32>().unwrap());
    }

    #[test]
    fn products_in_bf16_round_the_input_and_nothing_else() {
        let x = Tensor::randn(0f32, 1.0, (3, 40), &Device::Cpu).unwrap();
        let weight = Tensor::randn(0f32, 1.0, (17, 40), &Device::Cpu).unwrap().to_dtype(DType::BF16).unwrap();
        let eight: Chunks = (0..8).map(|c| vec![(2 * c, 2), (16 + 3 * c, 3)]).collect();
        for chunks in [vec![vec![(0, 40)]], eight] {
            let wide = Matrix::multiplied_in(Products::F32, &weight, chunks.clone()).unwrap();
            let rounded = x.to_dtype(DType::BF16).unwrap().to_dtype(DType::F32).unwrap();
            let largest = |t: Tensor| t.abs().unwrap().max_all().unwrap().to_scalar::<f32>().unwrap();
            for products in [Products::Bf16, Products::Amx] {
                let narrow = Matrix::multiplied_in(products, &weight, chunks.clone()).unwrap().product(&x, None, None).unwrap();
                assert!(largest((&narrow - wide.product(&rounded, None, None).unwrap()).unwrap()) < 1e-5);
                assert!(largest((narrow - wide.product(&x, None, None).unwrap()).unwrap()) > 1e-4);
            }
        }
    }

    #[test]
    fn weights_of_f16_are_rounded_for_products_in_bf16() {
        let x = Tensor::randn(0f32, 1.0, (3, 40), &Device::Cpu).unwrap();
        let weight = Tensor::randn(0f32, 1.0, (17, 40), &Device::Cpu).unwrap().to_dtype(DType::F16).unwrap();
        let rounded = weight.to_dtype(DType::BF16).unwrap();
        let product = |products, weight: &Tensor| {
            let matrix = Matrix::multiplied_in(products, weight, vec![vec![(0, 40)]]).unwrap();
            matrix.product(&x, None, None).unwrap().to_vec2::<f32>().unwrap()
        };
        for products in [Products::Bf16, Products::Amx, Products::Int8] {
            assert_eq!(product(products, &weight), product(products, &rounded));
        }
        assert_ne!(product(Products::F32, &weight), product(Products::F32, &rounded));
    }

    #[test]
    fn inputs_laid_out_for_one_order_of_additions_are_not_taken_for_another() {
        let random = |dims: &[usize]| Tensor::randn(0f32, 1.0, dims, &Device::Cpu).unwrap();
        let (x, weight) = (random(&[2, 3, 64]), random(&[32, 64]));
        let eight: Chunks = (0..8).map(|c| vec![(8 * c, 8)]).collect();
        let (one, tree) = (Matrix::new(&weight).unwrap(), Matrix::in_chunks(&weight, eight).unwrap());
        for (matrix, other) in [(&one, &tree), (&tree, &one)] {
            let laid_out = matrix.lay_out(&[Features::Whole(&x)]).unwrap().unwrap();
            assert!(matrix.takes(&laid_out) && matrix.clone().takes(&laid_out) && !other.takes(&laid_out));
            let bits = |y: Tensor| y.flatten_all().unwrap().to_vec1::<f32>().unwrap();
            assert_eq!(bits(matrix.product_of(&laid_out, None).unwrap()), bits(matrix.product(&x, None, None).unwrap()));
        }
        let narrow = random(&[2, 3, 63]);
        assert!(one.lay_out(&[Features::Whole(&narrow)]).unwrap().is_none(), "another width");
    }

    #[test]
    fn an_input_of_another_width_is_a_typed_error() {
        let matrix = Matrix::new(&Tensor::zeros((4, 8), DType::F32, &Device::Cpu).unwrap()).unwrap();
        let x = Tensor::zeros((2, 7), DType::F32, &Device::Cpu).unwrap();
        assert!(matches!(matrix.product(&x, None, None), Err(Error::Operands { .. })));
    }
}
