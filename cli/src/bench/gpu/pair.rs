//! Two devices: the same numbers as one, and the speed at which they add up.

use std::net::TcpListener;
use std::sync::{Arc, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use parallel::mesh::{Link, Mesh};
use parallel::tcp::{self, Rendezvous, Tcp};
use parallel::{Collective, DType, Device, Error, Solo, Tensor, device, ops};

use super::Bench;
use super::measure::{best, milliseconds};
use super::report::Check;
use crate::bench::synthetic::Checkpoint;
use crate::bench::synthetic::flux::Flux;

/// Two ranks of one program on one machine meet at once, or there is something wrong.
const TO_MEET: Duration = Duration::from_secs(60);
/// Of the largest value of the output: sums of f32 in another order. Our own kernels have one order.
const SAME_ON_GPUS: f64 = 1e-4;

/// A network held by two ranks, against the whole of it.
pub(super) fn equivalence(bench: &Bench, peer: &Device, model: &Checkpoint<Flux>) -> models::Result<Vec<Check>> {
    let whole = model.load(Arc::new(Solo), &bench.device)?.forward()?.to_device(&Device::Cpu)?;
    let halves = on_two([&bench.device, peer], |link, device| {
        Ok(model.load(Arc::new(Mesh::whole(link)), device)?.forward()?.to_device(&Device::Cpu)?)
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

/// Does `f` on two ranks, threads here that are linked as workers are: by connections, and by NCCL beside them on GPUs.
fn on_two<T: Send>(
    devices: [&Device; 2],
    f: impl Fn(Arc<dyn Link>, &Device) -> models::Result<T> + Sync,
) -> models::Result<Vec<T>> {
    let lost = |reason: &str| Error::PeerLost { rank: 0, reason: reason.to_owned() };
    let secret = uuid::Uuid::new_v4().into_bytes().to_vec();
    let rendezvous = Rendezvous { group_id: "bench".into(), epoch: 1, secret };
    let (mut addresses, mut accepted) = (Vec::new(), Vec::new());
    for _ in devices {
        let (address, connections) = listen().map_err(|error| lost(&error.to_string()))?;
        addresses.push(address);
        accepted.push(connections);
    }
    let (rendezvous, addresses, f) = (&rendezvous, &addresses, &f);
    let run = move |rank: usize, device: &Device, accepted: mpsc::Receiver<_>| {
        let tcp = Tcp::connect(rendezvous, rank, addresses, &accepted, &tcp::Plain, Instant::now() + TO_MEET)?;
        let link = device::link(Arc::new(tcp), device)?;
        // The link is kept until both are done: a rank that leaves counts as lost.
        Ok::<_, models::Error>((f(link.clone(), device)?, link))
    };
    let results: Vec<_> = thread::scope(|scope| {
        let ranks = devices.into_iter().zip(accepted).enumerate();
        let ranks: Vec<_> = ranks.map(|(rank, (device, accepted))| scope.spawn(move || run(rank, device, accepted))).collect();
        ranks.into_iter().map(|rank| rank.join().unwrap_or_else(|_| Err(lost("its thread panicked").into()))).collect()
    });
    results.into_iter().map(|result| result.map(|(done, _link)| done)).collect()
}

type Connections = mpsc::Receiver<(tcp::Hello, tcp::Wire)>;

/// A port of this machine alone, and what dials it.
fn listen() -> std::io::Result<(String, Connections)> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let address = listener.local_addr()?.to_string();
    let (route, accepted) = mpsc::channel();
    let plain: Arc<dyn tcp::Security> = Arc::new(tcp::Plain);
    thread::spawn(move || tcp::serve(&listener, &plain, move |hello, stream| drop(route.send((hello, stream)))));
    Ok((address, accepted))
}

fn largest(x: &Tensor) -> models::Result<f64> {
    Ok(x.abs()?.flatten_all()?.max(0)?.to_dtype(DType::F64)?.to_scalar::<f64>()?)
}

fn difference(a: &Tensor, b: &Tensor) -> models::Result<f64> {
    largest(&(a - b)?)
}
