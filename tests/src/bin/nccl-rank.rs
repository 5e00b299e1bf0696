//! One rank of a group, as a process of its own, for tests/tests/nccl.rs: connects, adds a communicator, does what it is told, and
//! says on standard output what came of it, a line each.
//!
//! `nccl-rank FOLDER RANK SIZE LIMIT_MS TASK`. With real libraries on a machine with a GPU a rank it is the same program.

use std::net::TcpListener;
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::mpsc;
use std::time::{Duration, Instant};

use models::blocks::{Layout, RankGroup};
use models::model_dir::ModelDir;
use models::registry::{self, Limits, LoadSpec, Rank};
use parallel::mesh::{Link, Mesh};
use parallel::nccl::{DriverMemory, NcclLink};
use parallel::tcp::{self, Rendezvous, Tcp};
use parallel::{Collective, Device, Error, Tensor};
use tests::nccl::{self, PATIENCE};

struct Arguments {
    folder: String,
    rank: usize,
    size: usize,
    limit: Duration,
    task: String,
}

fn main() -> ExitCode {
    tracing_subscriber::fmt().with_max_level(tracing_subscriber::filter::LevelFilter::TRACE).with_writer(std::io::stderr).init();
    let mut words = std::env::args().skip(1);
    let mut word = || words.next().unwrap_or_default();
    let (folder, rank, size, limit, task) = (word(), word().parse(), word().parse(), word().parse(), word());
    let (Ok(rank), Ok(size), Ok(limit)) = (rank, size, limit) else {
        eprintln!("nccl-rank FOLDER RANK SIZE LIMIT_MS TASK");
        return ExitCode::FAILURE;
    };
    let arguments = Arguments { folder, rank, size, limit: Duration::from_millis(limit), task };
    match run(&arguments) {
        Ok(()) => println!("done"),
        Err(error) => println!("{}", nccl::line_of(&error)),
    }
    ExitCode::SUCCESS
}

fn run(arguments: &Arguments) -> Result<(), Error> {
    match arguments.task.as_str() {
        "collectives" => {
            let link = connect(arguments, 1)?;
            eprintln!("{link:?}");
            for (name, value) in nccl::collectives(&Mesh::whole(link.clone()))? {
                println!("{name} {value}");
            }
            ring(arguments, &link)?;
            meet_again(&link)
        }
        "model" => model(arguments),
        // Until something goes wrong; then in the next epoch, to which a rank may come that was not in the first.
        task @ ("recover" | "return") => {
            if task == "recover"
                && let Err(error) = connect(arguments, 1).and_then(|link| exchange_for_ever(&link))
            {
                println!("{}", nccl::line_of(&error));
            }
            let link = connect(arguments, 2)?;
            let mine = Tensor::new(&[arguments.rank as u32 + 1], &Device::Cpu)?;
            println!("sum {}", nccl::show(&Mesh::whole(link.clone()).all_reduce(&mine)?)?);
            meet_again(&link)
        }
        _ => exchange_for_ever(&connect(arguments, 1)?),
    }
}

/// The group of an epoch: listens, tells the others where by a file, connects.
fn connect(arguments: &Arguments, epoch: u64) -> Result<Arc<NcclLink>, Error> {
    let io = |source| Error::Io { path: arguments.folder.clone().into(), source };
    let listener = TcpListener::bind("127.0.0.1:0").map_err(io)?;
    let place = |rank: usize| Path::new(&arguments.folder).join(format!("address-{epoch}-{rank}"));
    let draft = Path::new(&arguments.folder).join(format!("draft-{epoch}-{}", arguments.rank));
    std::fs::write(&draft, listener.local_addr().map_err(io)?.to_string()).map_err(io)?;
    std::fs::rename(draft, place(arguments.rank)).map_err(io)?;
    let (route, accepted) = mpsc::channel();
    let plain: Arc<dyn tcp::Security> = Arc::new(tcp::Plain);
    std::thread::spawn(move || tcp::serve(&listener, &plain, move |hello, stream| drop(route.send((hello, stream)))));

    let deadline = Instant::now() + PATIENCE;
    let mut addresses = Vec::new();
    for rank in 0..arguments.size {
        addresses.push(loop {
            match std::fs::read_to_string(place(rank)) {
                Ok(address) => break address,
                Err(source) if Instant::now() > deadline => return Err(io(source)),
                Err(_) => std::thread::yield_now(),
            }
        });
    }
    let rendezvous = Rendezvous { group_id: "group".into(), epoch, secret: vec![7; 16] };
    let tcp = Arc::new(Tcp::connect(&rendezvous, arguments.rank, &addresses, &accepted, &tcp::Plain, deadline)?);
    // A GPU each where there are as many.
    let memory = Box::new(DriverMemory::open(arguments.rank)?);
    Ok(Arc::new(NcclLink::connect(tcp, memory, arguments.limit)?))
}

/// A tensor to the next rank and one from the previous, in one group of a send and a receive.
fn ring(arguments: &Arguments, link: &NcclLink) -> Result<(), Error> {
    let Arguments { rank, size, .. } = *arguments;
    let mine = Tensor::full(rank as f32, (3, 5), &Device::Cpu)?;
    let came = link.comm().exchange(&mine, &[(rank + 1) % size], &[(rank + size - 1) % size])?;
    println!("ring {}", nccl::show(&came[0])?);
    Ok(())
}

/// So that no rank is gone while another still takes what it sent. By the host's connections, on which a word that was sent arrives
/// whatever becomes of the sender; in an exchange a peer that is done and gone counts as lost.
fn meet_again(link: &Arc<NcclLink>) -> Result<(), Error> {
    let others = || (0..link.size()).filter(|other| *other != link.rank());
    let word = Tensor::new(&[0u8], &Device::Cpu)?;
    others().try_for_each(|other| link.send(&word, other))?;
    others().try_for_each(|other| link.recv(other).map(drop))
}

fn exchange_for_ever(link: &Arc<NcclLink>) -> Result<(), Error> {
    let mesh = Mesh::whole(link.clone());
    println!("joined");
    let mut x = Tensor::new(&[1f32, 2.0, 3.0], &Device::Cpu)?;
    loop {
        x = (mesh.all_reduce(&x)? * 0.5)?;
    }
}

/// The bundled model's larger text encoder, held together.
fn model(arguments: &Arguments) -> Result<(), Error> {
    let link = connect(arguments, 1)?;
    let load = || {
        let dir = ModelDir::open(&nccl::bundled())?;
        let group = RankGroup::new(link.clone(), Layout::new(arguments.size, 1))?;
        let spec = LoadSpec { dir: &dir, component: nccl::ENCODER, group, device: Device::Cpu, limits: Limits::default() };
        registry::load(spec, &mut |_| ())
    };
    match load().map_err(|error| Error::Frame(error.to_string()))? {
        Rank::Leader(mut stage) => println!("embeds {}", nccl::encode(&mut *stage)?),
        Rank::Follower(follower) => drop(follower.run()),
    }
    Ok(())
}
