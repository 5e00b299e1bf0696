//! Weights in ggml's blocks where candle multiplies: they are widened for each product, by candle's own operation on the device. Its
//! products with blocks themselves are not used: they round activations to 8 bits.

use std::borrow::Cow;
use std::fmt;
use std::ops::Range;

use candle_core::quantized::{QStorage, QTensor};
use candle_core::{Device, Tensor};
use kernels::gemm::{BlockRows, Piece};

use super::matrix::Chunks;
use crate::Result;
use crate::checkpoint::candles;

/// A weight `[d_out, d_in]`, its rows whole blocks of which runs of columns count.
pub(super) struct Blocks {
    weight: QTensor,
    runs: Vec<Range<usize>>,
}

impl Blocks {
    pub(super) fn new(rows: &BlockRows, device: &Device) -> Result<Self> {
        let kind = rows.kind();
        let stored = rows.data().len() / rows.n().max(1) / kind.bytes() * kind.values();
        let storage = QStorage::from_data(Cow::Borrowed(rows.data()), device, candles(kind))?;
        Ok(Self { weight: QTensor::new(storage, (rows.n(), stored))?, runs: rows.runs().collect() })
    }

    /// As f32, one for each chunk.
    pub(super) fn widened(&self, chunks: &Chunks) -> Result<Vec<Tensor>> {
        let wide = self.weight.dequantize(&self.weight.device())?;
        let parts = self.runs.iter().map(|run| wide.narrow(1, run.start, run.len())).collect::<Result<Vec<_>, _>>()?;
        let packed = Tensor::cat(&parts, 1)?;
        let mut start = 0;
        let chunk = |pieces: &Vec<Piece>| {
            let len = pieces.iter().map(|(_, len)| len).sum();
            let chunk = packed.narrow(1, start, len)?;
            start += len;
            Ok(chunk)
        };
        chunks.iter().map(chunk).collect()
    }
}

impl fmt::Debug for Blocks {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Blocks({:?} {:?})", self.weight.shape(), self.weight.dtype())
    }
}

#[cfg(test)]
#[allow(clippy::single_range_in_vec_init)] // lists of ranges are meant
mod tests {
    use kernels::blocks::BlockType;

    use super::*;

    /// Bytes of a random weight, quantised by candle.
    fn quantised(kind: BlockType, shape: (usize, usize)) -> QTensor {
        let weight = Tensor::randn(0f32, 0.5, shape, &Device::Cpu).unwrap();
        QTensor::quantize(&weight, candles(kind)).unwrap()
    }

    #[test]
    fn every_format_is_widened_as_by_candle() {
        for kind in BlockType::ALL {
            let weight = quantised(kind, (6, 512));
            let mut wide = vec![f32::NAN; 6 * 512];
            kind.widen(&weight.data().unwrap(), &mut wide);
            let theirs = weight.dequantize(&Device::Cpu).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
            assert_eq!(wide, theirs, "{kind:?}");
        }
    }

    #[test]
    fn the_chunks_are_the_columns_of_the_whole() {
        let weight = quantised(BlockType::Q4K, (5, 768));
        let wide = weight.dequantize(&Device::Cpu).unwrap();
        let columns = [384..576, 0..100];
        let rows = BlockRows::of(BlockType::Q4K, &weight.data().unwrap(), 768, std::slice::from_ref(&(1..4)), &columns);
        let chunks = vec![vec![(0, 192)], vec![(192, 60), (252, 40)]];
        let got = Blocks::new(&rows, &Device::Cpu).unwrap().widened(&chunks).unwrap();
        let wide = wide.narrow(0, 1, 3).unwrap();
        for (got, columns) in got.iter().zip([384..576, 0..100]) {
            let expected = wide.narrow(1, columns.start, columns.len()).unwrap();
            assert_eq!(got.to_vec2::<f32>().unwrap(), expected.to_vec2::<f32>().unwrap());
        }
    }
}
