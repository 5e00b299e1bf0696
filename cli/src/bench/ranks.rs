//! Two ranks of one program, linked as those of two workers on one host are.

use std::net::TcpListener;
use std::sync::{Arc, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use parallel::mesh::{Link, Mesh};
use parallel::tcp::{self, Rendezvous, Tcp};
use parallel::{Collective, DType, Device, Error, Tensor, device};

use super::speed::Table;

/// Two ranks of one program on one machine meet at once, or there is something wrong.
const TO_MEET: Duration = Duration::from_secs(60);
/// Of a sum over two ranks: 2,304 tokens of FLUX.1.
const SUMMED: [usize; 2] = [2304, 3072];
/// The row's name.
const SUM: &str = "all_reduce";

/// A row: the sum over two ranks, beside the copies that it cannot do without, one each way.
pub(super) fn all_reduce(table: &Table) -> Result<(), models::Error> {
    let bytes = SUMMED.iter().product::<usize>() * DType::F32.size_in_bytes();
    let shape = format!("2 ranks, {:.0} MB", bytes as f64 / 1e6);
    if !table.wants(SUM, &shape) {
        return Ok(());
    }
    let rows = on_two([&Device::Cpu, &Device::Cpu], |link, device| {
        let mesh = Mesh::whole(link);
        let x = Tensor::full(1.5f32, &SUMMED, device)?;
        if mesh.rank() == 0 {
            // Each time the other rank is told whether there is one more.
            let once = || -> parallel::Result<()> {
                mesh.any(true)?;
                mesh.all_reduce(&x).map(drop)
            };
            once()?;
            let mut result = Ok(());
            let row = table.bytes(SUM, shape.clone(), 2 * 2 * bytes, || {
                if result.is_ok() {
                    result = once();
                }
            });
            result?;
            mesh.any(false)?;
            return Ok(Some(row));
        }
        while mesh.any(false)? {
            mesh.all_reduce(&x)?;
        }
        Ok(None)
    })?;
    rows.into_iter()
        .flatten()
        .try_for_each(|row| row.map_err(|source| Error::Io { path: "standard output".into(), source }.into()))
}

/// Does `f` on two ranks, threads here that are linked as workers are: by connections, and by NCCL beside them on GPUs.
pub(super) fn on_two<T: Send>(
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
