//! Weights in blocks: as we multiply with them, and as candle does.

use std::io;

use candle_core::quantized::{GgmlDType, QMatMul, QTensor};
use candle_core::{Device, Module, Tensor};
use parallel::ops::kernels::blocks::BlockType;
use parallel::ops::kernels::cpu;
use parallel::ops::kernels::gemm::{BlockRows, Epilogue, Order, PackedWeight, Rows, linear};

use super::{Bound, Table, linear_shape, values};

/// A format: of ours, of candle's, and the names of their rows: ours in f32, by AMX and with inputs in bytes, and candle's, whose inputs are
/// in bytes.
const FORMATS: [(BlockType, GgmlDType, [&str; 4]); 3] = [
    (BlockType::Q8_0, GgmlDType::Q8_0, ["linear q8_0", "linear q8_0 amx", "linear q8_0 int8", "candle's linear q8_0"]),
    (BlockType::Q4K, GgmlDType::Q4K, ["linear q4_k", "linear q4_k amx", "linear q4_k int8", "candle's linear q4_k"]),
    (BlockType::Q6K, GgmlDType::Q6K, ["linear q6_k", "linear q6_k amx", "linear q6_k int8", "candle's linear q6_k"]),
];
const K: usize = 3072;
const N: usize = 12288;

/// Products in f32 with what blocks hold, in 8 bits where we have them, and in candle's way.
pub(super) fn linears(table: &Table, tokens: &[usize]) -> io::Result<()> {
    for format @ (.., names) in FORMATS {
        let wanted = |m: &usize| names.into_iter().any(|op| table.wants(op, &linear_shape(*m, K, N)));
        if tokens.iter().any(wanted) {
            rows(table, tokens, format).map_err(io::Error::other)?;
        }
    }
    Ok(())
}

#[allow(clippy::single_range_in_vec_init)] // lists of ranges are meant
fn rows(
    table: &Table,
    tokens: &[usize],
    (kind, theirs, [ours, by_amx, in_bytes, candles]): (BlockType, GgmlDType, [&'static str; 4]),
) -> candle_core::Result<()> {
    let weight = QTensor::quantize(&Tensor::from_vec(values(N * K), (N, K), &Device::Cpu)?, theirs)?;
    let rows = BlockRows::of(kind, &weight.data()?, K, &[0..N], &[0..K]);
    let bytes = PackedWeight::bytes_of_blocks(rows.clone(), &[[(0, K)]]).ok();
    let tiles = cpu::has_amx().then(|| PackedWeight::pairs_of_blocks(Order::Tiles, rows.clone(), &[[(0, K)]]));
    let (packed, weight) = (PackedWeight::from(rows), QMatMul::from_qtensor(weight)?);
    for &m in tokens {
        let (x, mut y, shape, flops) = (values(m * K), vec![0.0; m * N], linear_shape(m, K, N), 2 * m * K * N);
        let of = Rows::new(&x, m, K);
        table.row(ours, shape.clone(), flops, Bound::Arithmetic, || {
            linear(of, &packed, Epilogue::default(), &mut y);
        })?;
        if let Some(tiles) = &tiles {
            table.row(by_amx, shape.clone(), flops, Bound::Bf16(Order::Tiles), || {
                linear(of, tiles, Epilogue::default(), &mut y);
            })?;
        }
        if let Some(bytes) = &bytes {
            table.row(in_bytes, shape.clone(), flops, Bound::Int8(kind), || {
                linear(of, bytes, Epilogue::default(), &mut y);
            })?;
        }
        let (x, mut result) = (Tensor::from_slice(&x, (m, K), &Device::Cpu)?, Ok(()));
        table.row(candles, shape, flops, Bound::Int8(kind), || result = weight.forward(&x).map(drop))?;
        result?;
    }
    Ok(())
}
