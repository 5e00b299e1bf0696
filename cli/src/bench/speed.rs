//! `atelier bench kernels`: their speed, beside what the machine can do at most, measured in the same run.

use std::io::{self, Write};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use clap::Args;
use parallel::ops::kernels::activation::Activation;
use parallel::ops::kernels::attention::{Attention, Heads};
use parallel::ops::kernels::blocks::BlockType;
use parallel::ops::kernels::conv::{Conv2d, Geometry};
use parallel::ops::kernels::cpu::{self, Path};
use parallel::ops::kernels::gemm::{BlockRows, Epilogue, Order, PackedWeight, Piece, Rows, bf16, linear, linear_tree};
use parallel::ops::kernels::{limit, rows};
use serde::Serialize;

use super::ranks;
use crate::error::Error;

mod blocks;

/// How long a row is repeated; its best time counts.
const PER_ROW: Duration = Duration::from_millis(700);
/// What memory's limit is measured on: far over any cache.
const COPIED_BYTES: usize = 64 << 20;

#[derive(Debug, Args)]
pub(crate) struct KernelsArgs {
    /// Write one JSON object a line.
    #[arg(long)]
    json: bool,
    /// Also 4608 tokens (a picture of 1024 x 1024), which takes minutes on a small machine.
    #[arg(long)]
    full: bool,
    /// Only the rows whose operation and shape, written with a space between, start so: `linear`, or `attention 24 heads, 512 tokens`.
    #[arg(long, value_name = "NAME-OR-PREFIX")]
    only: Option<String>,
    /// Threads. Default: one for each core.
    #[arg(long)]
    threads: Option<usize>,
}

pub(super) fn run(args: &KernelsArgs) -> Result<(), Error> {
    let pool = rayon::ThreadPoolBuilder::new().num_threads(args.threads.unwrap_or(0)).build();
    let pool = pool.map_err(|e| Error::Flag { flag: "--threads", reason: e.to_string() })?;
    let table = pool.install(|| kernels(args))?;
    // Outside of the pool: its ranks are threads of their own.
    ranks::all_reduce(&table)?;
    match &args.only {
        Some(only) if table.written.load(Ordering::Relaxed) == 0 => {
            Err(Error::Flag { flag: "--only", reason: format!("no row starts with {only:?}; without the flag all are listed") })
        }
        _ => Ok(()),
    }
}

/// One line of the table.
#[derive(Serialize)]
struct Row {
    op: &'static str,
    shape: String,
    threads: usize,
    path: String,
    value: f64,
    unit: &'static str,
    limit: f64,
    ratio: f64,
}

/// Measures and prints rows.
pub(super) struct Table {
    json: bool,
    only: Option<String>,
    /// Rows so far.
    written: AtomicUsize,
}

/// What bounds an operation.
#[derive(Clone, Copy)]
enum Bound {
    Arithmetic,
    /// As [`Self::Arithmetic`], of bf16 in an order.
    Bf16(Order),
    /// Of bytes, with weights in such blocks.
    Int8(BlockType),
    Memory,
}

impl Bound {
    fn unit(self) -> &'static str {
        match self {
            Self::Arithmetic | Self::Bf16(_) => "GFLOP/s",
            Self::Int8(_) => "GOP/s",
            Self::Memory => "GB/s",
        }
    }

    fn measure(self) -> f64 {
        match self {
            Self::Arithmetic => limit::gflops(),
            Self::Bf16(order) => limit::gflops_bf16(order),
            Self::Int8(kind) => limit::gops_int8(kind),
            Self::Memory => limit::copy_gbps(COPIED_BYTES),
        }
    }
}

impl Table {
    /// Whether a row is to be measured: asked before what it needs is made, where that takes long.
    pub(super) fn wants(&self, op: &str, shape: &str) -> bool {
        self.only.as_ref().is_none_or(|only| format!("{op} {shape}").starts_with(only.as_str()))
    }

    /// A row that does `flops` operations.
    fn flops(&self, op: &'static str, shape: String, flops: usize, f: impl FnMut()) -> io::Result<()> {
        self.row(op, shape, flops, Bound::Arithmetic, f)
    }

    /// A row that reads and writes `bytes`.
    pub(super) fn bytes(&self, op: &'static str, shape: String, bytes: usize, f: impl FnMut()) -> io::Result<()> {
        self.row(op, shape, bytes, Bound::Memory, f)
    }

    /// A row that changes `y`, which is `x` each time: what is done again and again to its own result ends in numbers so small
    /// that processors are slow with them.
    fn in_place(
        &self,
        op: &'static str,
        shape: String,
        x: &[f32],
        y: &mut [f32],
        mut f: impl FnMut(&mut [f32]),
    ) -> io::Result<()> {
        let timed = || {
            y.copy_from_slice(x);
            let start = Instant::now();
            f(y);
            start.elapsed()
        };
        self.timed(op, shape, 2 * size_of_val(x), Bound::Memory, timed)
    }

    fn row(&self, op: &'static str, shape: String, amount: usize, bound: Bound, mut f: impl FnMut()) -> io::Result<()> {
        self.timed(op, shape, amount, bound, || limit::best_of(1, &mut f))
    }

    /// The limit is measured before and after: a machine with other work changes from minute to minute.
    fn timed(&self, op: &'static str, shape: String, amount: usize, bound: Bound, f: impl FnMut() -> Duration) -> io::Result<()> {
        if !self.wants(op, &shape) {
            return Ok(());
        }
        self.written.fetch_add(1, Ordering::Relaxed);
        let before = bound.measure();
        let value = amount as f64 / best(f).as_secs_f64() / 1e9;
        let limit = before.max(bound.measure());
        let (threads, path) = (rayon::current_num_threads(), format!("{:?}", cpu::path()).to_lowercase());
        let row = Row { op, shape, threads, path, value, unit: bound.unit(), limit, ratio: value / limit };
        let mut out = io::stdout().lock();
        if self.json {
            writeln!(out, "{}", serde_json::json!(row))
        } else {
            writeln!(out, "{op:<20} {:<22} {value:>8.1} {:<8} {limit:>8.1} {:>6.2}", row.shape, row.unit, row.ratio)
        }
    }
}

/// The best time of as many runs as fit.
fn best(mut f: impl FnMut() -> Duration) -> Duration {
    let (begin, mut best) = (Instant::now(), Duration::MAX);
    loop {
        best = best.min(f());
        if begin.elapsed() > PER_ROW {
            return best;
        }
    }
}

/// All rows of one process, and the table for more.
fn kernels(args: &KernelsArgs) -> io::Result<Table> {
    let table = Table { json: args.json, only: args.only.clone(), written: AtomicUsize::new(0) };
    if !args.json {
        println!("{} threads, {:?}; each row's best of {PER_ROW:?}", rayon::current_num_threads(), cpu::path());
        println!("{:<20} {:<22} {:>8} {:<8} {:>8} {:>6}", "op", "shape", "", "", "limit", "ratio");
    }
    let tokens: &[usize] = if args.full { &[64, 512, 1536, 4608] } else { &[64, 512, 1536] };
    linears(&table, tokens, args.full)?;
    blocks::linears(&table, tokens)?;
    attentions(&table, &tokens[1..])?;
    convolutions(&table)?;
    passes(&table)?;
    Ok(table)
}

/// A product with one weight and the same cut in eight as ranks cut it; in f32 and in 8 bits.
const LINEARS: [&str; 4] = ["linear", "linear, eight chunks", "linear int8", "linear int8, eight"];

/// The rows of products in bf16 in one order.
struct Narrow {
    order: Order,
    linears: [&'static str; 2],
    attention: &'static str,
    conv: &'static str,
}

const PAIRS: Narrow = Narrow {
    order: Order::Pairs,
    linears: ["linear bf16", "linear bf16, eight"],
    attention: "attention bf16",
    conv: "conv 3x3 bf16",
};
const TILES: Narrow = Narrow {
    order: Order::Tiles,
    linears: ["linear amx", "linear amx, eight"],
    attention: "attention amx",
    conv: "conv 3x3 amx",
};

/// What this CPU is better at than at f32, or as good.
fn narrow() -> &'static [Narrow] {
    match cpu::path() {
        Path::Plain => &[],
        _ if cpu::has_amx() => &[PAIRS, TILES],
        _ => &[PAIRS],
    }
}

fn linear_shape(m: usize, k: usize, n: usize) -> String {
    format!("{m} x {k} x {n}")
}

fn linears(table: &Table, tokens: &[usize], full: bool) -> io::Result<()> {
    let wide: &[_] = if full { &[(3072, 21504), (15360, 3072)] } else { &[] };
    for &(k, n) in [(3072, 3072), (3072, 12288), (12288, 3072)].iter().chain(wide) {
        let ops = || narrow().iter().flat_map(|narrow| narrow.linears).chain(LINEARS);
        let wanted = |&&m: &&usize| ops().any(|op| table.wants(op, &linear_shape(m, k, n)));
        let tokens: Vec<usize> = tokens.iter().filter(wanted).copied().collect();
        if tokens.is_empty() {
            continue;
        }
        let weight = values(n * k);
        let eighths: Vec<[Piece; 1]> = (0..8).map(|chunk| [(chunk * k / 8, k / 8)]).collect();
        let packed = PackedWeight::pack(Rows::new(&weight, n, k), k);
        let rounded: Vec<bf16> = weight.into_iter().map(bf16::from_f32).collect();
        let rounded = Rows::new(&rounded, n, k);
        let pack = |chunks: &[[Piece; 1]], order| PackedWeight::pack_pairs(order, rounded, chunks);
        let narrow: Vec<_> = narrow().iter().map(|of| (of, [pack(&[[(0, k)]], of.order), pack(&eighths, of.order)])).collect();
        let blocks = eight_bits(n, k);
        let bytes = (!narrow.is_empty()).then(|| PackedWeight::bytes_of_blocks(blocks, &eighths)).and_then(Result::ok);
        for m in tokens {
            let (x, mut y) = (values(m * k), vec![0.0; m * n]);
            let (x, shape, flops) = (Rows::new(&x, m, k), linear_shape(m, k, n), 2 * m * k * n);
            table.flops(LINEARS[0], shape.clone(), flops, || {
                linear(x, &packed, Epilogue::default(), &mut y);
            })?;
            table.flops(LINEARS[1], shape.clone(), flops, || {
                linear_tree(x, &eighths, &packed, Epilogue::default(), &mut y);
            })?;
            let nothing = Epilogue::default();
            for (Narrow { order, linears: [one, tree], .. }, [whole, eight]) in &narrow {
                let bound = Bound::Bf16(*order);
                table.row(one, shape.clone(), flops, bound, || {
                    linear(x, whole, nothing, &mut y);
                })?;
                table.row(tree, shape.clone(), flops, bound, || {
                    linear_tree(x, &eighths, eight, nothing, &mut y);
                })?;
            }
            if let Some(bytes) = &bytes {
                table.row(LINEARS[2], shape.clone(), flops, Bound::Int8(BlockType::Q8_0), || {
                    linear(x, bytes, nothing, &mut y);
                })?;
                table.row(LINEARS[3], shape, flops, Bound::Int8(BlockType::Q8_0), || {
                    linear_tree(x, &eighths, bytes, nothing, &mut y);
                })?;
            }
        }
    }
    Ok(())
}

fn attentions(table: &Table, tokens: &[usize]) -> io::Result<()> {
    let (heads, width) = (24, 128);
    for &l in tokens {
        let of = Attention { heads, queries: l, keys: l, width, scale: 0.088, side_by_side: true };
        let (x, mut y) = (values(heads * l * width), vec![0.0; heads * l * width]);
        // As projections leave them.
        let x = Heads { data: &x, head_stride: width, row_stride: heads * width };
        let (shape, flops) = (format!("{heads} heads, {l} tokens"), 4 * heads * l * l * width);
        table.flops("attention", shape.clone(), flops, || {
            of.run(None, x, x, x, None, &mut y);
        })?;
        for &Narrow { order, attention, .. } in narrow() {
            table.row(attention, shape.clone(), flops, Bound::Bf16(order), || {
                of.run(Some(order), x, x, x, None, &mut y);
            })?;
        }
    }
    Ok(())
}

/// `x: [channels, area]`, normed, as a convolution in bf16 takes it.
fn in_pairs(x: &[f32], [channels, area]: [usize; 2]) -> Vec<f32> {
    let mut pairs = vec![0.0; x.len() / 2];
    let affine = [vec![1.0; channels], vec![0.0; channels]];
    rows::group_norm_in_pairs(x, &mut pairs, [32, area], [&affine[0], &affine[1]], 1e-6, None);
    pairs
}

fn convolutions(table: &Table) -> io::Result<()> {
    for (channels, side) in [(128, 128), (512, 64)] {
        let conv = Conv2d::pack(&values(channels * channels * 9), [channels, channels, 3], None);
        let geometry = Geometry::same([side, side], 3);
        let (x, mut y) = (values(channels * side * side), vec![0.0; channels * side * side]);
        let (shape, flops) = (format!("{channels} x {side} x {side}"), 2 * channels * channels * 9 * side * side);
        table.flops("conv 3x3", shape.clone(), flops, || {
            conv.run(&x, geometry, None, &mut y);
        })?;
        let weight: Vec<bf16> = values(channels * channels * 9).into_iter().map(bf16::from_f32).collect();
        for &Narrow { order, conv: op, .. } in narrow() {
            let conv = Conv2d::pack_pairs(order, &weight, [channels, channels, 3], None);
            // As autoencoders hand it on, if they can: in bf16.
            let pairs = conv.takes_pairs().then(|| in_pairs(&x, [channels, side * side]));
            table.row(op, shape.clone(), flops, Bound::Bf16(order), || {
                match &pairs {
                    Some(pairs) => conv.run_pairs(pairs, geometry, None, &mut y),
                    None => conv.run(&x, geometry, None, &mut y),
                };
            })?;
        }
    }
    Ok(())
}

/// What reads and writes each element once.
fn passes(table: &Table) -> io::Result<()> {
    let (tokens, width) = (4608, 3072);
    let (x, mut y, weight) = (values(tokens * width), values(tokens * width), values(width));
    let (shape, bytes) = (format!("{tokens} x {width}"), 8 * tokens * width);
    let modulate = |y: &mut [f32]| {
        rows::layer_norm_modulate(&x, y, [tokens, width], &weight, &weight, 1e-6);
    };
    table.bytes("layer norm, modulate", shape.clone(), bytes, || modulate(&mut y))?;
    table.bytes("rms norm", shape.clone(), bytes, || {
        rows::rms_norm(&x, &mut y, &weight, 1e-6);
    })?;
    table.in_place("softmax", shape.clone(), &x, &mut y, |y| rows::softmax(y, width))?;
    for (op, activation) in [("gelu", Activation::Gelu), ("gelu tanh", Activation::GeluTanh), ("silu", Activation::Silu)] {
        table.in_place(op, shape.clone(), &x, &mut y, |y| activation.apply_all(y))?;
    }
    let (channels, spatial) = (128, 128 * 128);
    let (x, y, affine) = (&x[..channels * spatial], &mut y[..channels * spatial], [&weight[..channels], &weight[..channels]]);
    let silu = Some(Activation::Silu);
    table.bytes("group norm, silu", "128 x 128 x 128".into(), 8 * x.len(), || {
        rows::group_norm(x, y, [32, spatial], affine, 1e-6, silu);
    })
}

/// A weight in `Q8_0`, of blocks that differ.
#[allow(clippy::single_range_in_vec_init)] // lists of ranges are meant
fn eight_bits(n: usize, k: usize) -> BlockRows {
    let mut data: Vec<u8> = (0..n * k / 32 * 34).map(|i| (i.wrapping_mul(7919) % 1013) as u8).collect();
    data.chunks_exact_mut(34).for_each(|block| block[..2].copy_from_slice(&[0, 0x10])); // half a thousandth
    BlockRows::of(BlockType::Q8_0, &data, k, &[0..n], &[0..k])
}

/// Numbers in -1..1 without a pattern that arithmetic could profit from.
fn values(n: usize) -> Vec<f32> {
    (0..n).map(|i| (i.wrapping_mul(7919) % 1013) as f32 / 507.0 - 1.0).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_chosen_by_how_they_start() {
        let wants = |only: Option<&str>, op, shape| {
            Table { json: true, only: only.map(str::to_owned), written: AtomicUsize::new(0) }.wants(op, shape)
        };
        assert!(wants(None, "linear", "64 x 3072 x 3072"));
        assert!(wants(Some("linear"), "linear, eight chunks", "64 x 3072 x 3072"));
        assert!(wants(Some("linear 64 x"), "linear", "64 x 3072 x 3072"));
        assert!(!wants(Some("linear 64 x"), "linear, eight chunks", "64 x 3072 x 3072"));
        assert!(!wants(Some("linear 512 x"), "linear", "64 x 3072 x 3072"));
    }
}
