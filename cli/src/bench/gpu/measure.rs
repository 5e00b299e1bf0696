//! One device: its own limit, attention, a step.

use std::time::{Duration, Instant};

use models::blocks::RankGroup;
use parallel::ops::Products;
use parallel::ops::kernels::limit;
use parallel::{DType, Device, Tensor, ops};

use super::Bench;
use super::report::Check;
use crate::bench::synthetic::flux::{BLOCKS, Flux};
use crate::bench::synthetic::{Checkpoint, Network};

/// Each figure's best of so many, after one that does not count.
const RUNS: usize = 5;
/// A side of the square product that is taken for a GPU's limit.
const SIDE: usize = 4096;
/// Two ways to add up the same: of numbers near 1.
const SAME_FORMULA: f64 = 1e-4;

/// Attention as models call it beside the formula written out, at the width and length of a step.
pub(super) fn attention(bench: &Bench) -> models::Result<Vec<Check>> {
    let (heads, tokens, width) = (bench.scale.heads, bench.scale.tokens(), 128);
    let random = || Tensor::randn(0f32, 1.0, (1, heads, tokens, width), &bench.device);
    let (q, k, v) = (random()?, random()?, random()?);
    let scale = 1.0 / (width as f64).sqrt();
    let ours = || Ok(ops::attention(&q, &k, &v, scale, None)?);
    let plain = || {
        let scores = (&q * scale)?.matmul(&k.t()?.contiguous()?)?;
        Ok(ops::softmax(&scores)?.matmul(&v)?)
    };
    let error = (ours()? - plain()?)?.abs()?.flatten_all()?.max(0)?.to_dtype(DType::F64)?.to_scalar::<f64>()?;
    let (ours, plain) = (best(&bench.device, ours)?, best(&bench.device, plain)?);
    let scores = (heads * tokens * tokens * 4) as f64 / 1e6;
    let shape = format!("{heads} heads, {tokens} tokens");
    Ok(vec![
        Check::within(format!("attention, {shape}: error"), error, SAME_FORMULA, "", format!("of {SAME_FORMULA:.0e} allowed")),
        Check::measured(
            format!("attention, {shape}"),
            milliseconds(ours),
            "ms",
            format!("{:.2} ms by the formula, which holds {scores:.1} MB of scores", milliseconds(plain)),
        ),
    ])
}

/// What a block of FLUX.1 does of what the device can, measured just before and after: in each way that the device multiplies.
pub(super) fn step(bench: &Bench, model: &Checkpoint<Flux>) -> models::Result<Vec<Check>> {
    let ways: &[Products] = if bench.on_cpu { &[Products::F32] } else { &[Products::F32, Products::Bf16] };
    let mut checks = Vec::new();
    for way in ways {
        checks.extend(way.scope(|| step_in(bench, model, *way))?);
    }
    Ok(checks)
}

fn step_in(bench: &Bench, model: &Checkpoint<Flux>, way: Products) -> models::Result<Vec<Check>> {
    let loaded = model.load(&RankGroup::solo().on(bench.device.clone()))?;
    let sample = loaded.forward()?;
    let finite = sample.sqr()?.sum_all()?.to_dtype(DType::F64)?.to_scalar::<f64>()?.is_finite();
    let before = limit_tflops(bench)?;
    let spent = best(&bench.device, || loaded.forward())?;
    let limit = before.max(limit_tflops(bench)?);
    let flops = bench.scale.flops();
    let [held, blocks] = [bench.scale.blocks, BLOCKS].map(|blocks| blocks.iter().sum::<usize>());
    let reached = flops / spent.as_secs_f64() / 1e12;
    let whole = spent.as_secs_f64() * blocks as f64 / held as f64;
    let what = format!("FLUX.1, width {}, {} tokens, products in {way}", bench.scale.width(), bench.scale.tokens());
    Ok(vec![
        Check::within(format!("{what}: finite"), if finite { 0.0 } else { f64::NAN }, 0.0, "", "every number of the output"),
        Check::measured(
            "the device's limit",
            limit,
            "TFLOP/s",
            if bench.on_cpu { "in registers" } else { "a product of 4096^3 in f32" },
        ),
        Check::measured(
            format!("{what}: {held} blocks"),
            reached,
            "TFLOP/s",
            format!(
                "{:.0} % of the limit; {:.2} ms, so {whole:.2} s for a step of {blocks} blocks",
                100.0 * reached / limit,
                milliseconds(spent)
            ),
        ),
    ])
}

fn limit_tflops(bench: &Bench) -> models::Result<f64> {
    if bench.on_cpu {
        return Ok(limit::gflops() / 1e3);
    }
    let x = Tensor::randn(0f32, 1.0, (SIDE, SIDE), &bench.device)?;
    let spent = best(&bench.device, || Ok(x.matmul(&x)?))?;
    Ok(2.0 * (SIDE as f64).powi(3) / spent.as_secs_f64() / 1e12)
}

/// The shortest of some runs, each until the device is done.
pub(super) fn best<T>(device: &Device, mut f: impl FnMut() -> models::Result<T>) -> models::Result<Duration> {
    let mut best = Duration::MAX;
    for run in 0..=RUNS {
        device.synchronize()?;
        let started = Instant::now();
        f()?;
        device.synchronize()?;
        if run > 0 {
            best = best.min(started.elapsed());
        }
    }
    Ok(best)
}

pub(super) fn milliseconds(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e3
}
