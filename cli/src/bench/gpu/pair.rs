//! Two devices: the same numbers as one, and the speed at which they add up.

use models::blocks::{Layout, RankGroup};
use parallel::mesh::Mesh;
use parallel::{Collective, DType, Device, Tensor, ops};

use super::Bench;
use super::measure::{best, milliseconds};
use super::report::Check;
use crate::bench::ranks::on_two;
use crate::bench::synthetic::Checkpoint;
use crate::bench::synthetic::flux::Flux;

/// Of the largest value of the output: sums of f32 in another order. Our own kernels have one order.
const SAME_ON_GPUS: f64 = 1e-4;

/// A network held by two ranks, against the whole of it.
pub(super) fn equivalence(bench: &Bench, peer: &Device, model: &Checkpoint<Flux>) -> models::Result<Vec<Check>> {
    let whole = model.load(&RankGroup::solo().on(bench.device.clone()))?.forward()?.to_device(&Device::Cpu)?;
    let halves = on_two([&bench.device, peer], |link, device| {
        let group = RankGroup::new(link, Layout::new(2, 1))?.on(device.clone());
        Ok(model.load(&group)?.forward()?.to_device(&Device::Cpu)?)
    })?;
    let largest = largest(&whole)?;
    let (allowed, why) = if ops::has_kernels(&bench.device) {
        (0.0, "the same bits")
    } else {
        (SAME_ON_GPUS, "1e-4 of the largest value allowed")
    };
    let ranks = halves.iter().enumerate();
    ranks
        .map(|(rank, half)| {
            Ok(Check::within(format!("tp 2 equals tp 1, rank {rank}"), difference(half, &whole)? / largest, allowed, "", why))
        })
        .collect()
}

/// What the ranks of a block add up, twice a block.
pub(super) fn all_reduce(bench: &Bench, peer: &Device) -> models::Result<Vec<Check>> {
    let shape = (bench.scale.tokens(), bench.scale.width());
    let bytes = (shape.0 * shape.1 * DType::F32.size_in_bytes()) as f64;
    let results = on_two([&bench.device, peer], |link, device| {
        let mesh = Mesh::whole(link);
        let mine = Tensor::full(mesh.rank() as f32 + 1.0, shape, device)?;
        let sum = mesh.all_reduce(&mine)?;
        let three = Tensor::full(3f32, shape, &Device::Cpu)?;
        let error = difference(&sum.to_device(&Device::Cpu)?, &three)?;
        Ok((error, best(device, || Ok(mesh.all_reduce(&mine)?))?))
    })?;
    let error = results.iter().map(|(error, _)| *error).fold(0.0, f64::max);
    let spent = results.iter().map(|(_, spent)| *spent).max().unwrap_or_default();
    let (megabytes, what) = (bytes / 1e6, "all_reduce of two");
    Ok(vec![
        Check::within(format!("{what}: error"), error, 0.0, "", "1 + 2 = 3 everywhere"),
        Check::measured(
            what,
            bytes / spent.as_secs_f64() / 1e9,
            "GB/s",
            format!("{megabytes:.1} MB in {:.3} ms", milliseconds(spent)),
        ),
    ])
}

fn largest(x: &Tensor) -> models::Result<f64> {
    Ok(x.abs()?.flatten_all()?.max(0)?.to_dtype(DType::F64)?.to_scalar::<f64>()?)
}

fn difference(a: &Tensor, b: &Tensor) -> models::Result<f64> {
    largest(&(a - b)?)
}
