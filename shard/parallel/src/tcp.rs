//! Ranks that are processes, connected pairwise over TCP.
//!
//! Every pair of ranks of an epoch has one connection, made by a [`Security`] that says who may be at the other end; the higher rank dials. A thread per connection reads frames into a
//! queue, so a send never waits for the receiver's arithmetic. Ranks of one host hand large tensors over in memory that they share,
//! and say on the connection where (`tcp/shared.rs`). Another thread sends a heartbeat on every connection: a peer
//! whose process is gone shows by end of file at once, one that is stopped or cut off by silence within [`SILENCE`].

use std::collections::VecDeque;
use std::io::{self, BufReader, ErrorKind, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use candle_core::{DType, Tensor};

use crate::mesh::{Link, lend_floats, not_floats};
use crate::{Error, Result, bytes};

mod frame;
mod hello;
mod shared;

use frame::{Frame, HEARTBEAT, Head, Offer};
use hello::dial;
pub use hello::{Hello, Rendezvous, accept, serve};
use shared::{Incoming, LEAST_BYTES, Outgoing};

/// A peer that says nothing for this long is lost. Five heartbeats and some.
pub const SILENCE: Duration = Duration::from_secs(3);
/// The first word may take as long as the peer waits for its own peers.
const FIRST_WORD: Duration = Duration::from_secs(60);
/// How often something is said.
const BEAT: Duration = Duration::from_millis(500);

/// A connection between two ranks: one thread reads it, and one at a time writes.
pub trait Stream: Send + Sync + std::fmt::Debug {
    /// Reads what is there, at least one byte; 0 at the end.
    ///
    /// # Errors
    /// Those of the connection.
    fn read(&self, buffer: &mut [u8]) -> io::Result<usize>;
    /// Writes all of `bytes`.
    ///
    /// # Errors
    /// Those of the connection.
    fn write_all(&self, bytes: &[u8]) -> io::Result<()>;
    /// What is below, for time limits and for the end.
    fn socket(&self) -> &TcpStream;
}

/// A connection that is shared by those who read it and those who write.
pub type Wire = Arc<dyn Stream>;

/// How a socket becomes a connection to somebody who is believed.
pub trait Security: Send + Sync + std::fmt::Debug {
    /// After `address` (host:port) was dialled.
    ///
    /// # Errors
    /// When it is not who it should be.
    fn dialled(&self, socket: TcpStream, address: &str) -> io::Result<Wire>;
    /// After somebody dialled this process.
    ///
    /// # Errors
    /// When it may not.
    fn accepted(&self, socket: TcpStream) -> io::Result<Wire>;
}

/// Plain text: whoever reaches a port is believed what it says.
#[derive(Clone, Copy, Debug)]
pub struct Plain;

impl Security for Plain {
    fn dialled(&self, socket: TcpStream, _: &str) -> io::Result<Wire> {
        Ok(Arc::new(socket))
    }

    fn accepted(&self, socket: TcpStream) -> io::Result<Wire> {
        Ok(Arc::new(socket))
    }
}

impl Stream for TcpStream {
    fn read(&self, buffer: &mut [u8]) -> io::Result<usize> {
        Read::read(&mut &*self, buffer)
    }

    fn write_all(&self, bytes: &[u8]) -> io::Result<()> {
        Write::write_all(&mut &*self, bytes)
    }

    fn socket(&self) -> &TcpStream {
        self
    }
}

/// A connection as a reader.
struct Reading<'a>(&'a dyn Stream);

impl Read for Reading<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.0.read(buffer)
    }
}

/// One end of a group whose ranks are processes.
#[derive(Debug)]
pub struct Tcp {
    rank: usize,
    peers: Vec<Option<Arc<Peer>>>,
}

#[derive(Debug)]
struct Peer {
    stream: Wire,
    writer: Mutex<Writer>,
    /// What the peer said of the memory that was offered: the reader hears it, and must not wait for the writer.
    answer: AtomicU8,
    inbox: Mutex<Inbox>,
    arrived: Condvar,
}

/// What the one who writes to a peer has.
#[derive(Debug, Default)]
struct Writer {
    outgoing: Option<Outgoing>,
    /// There is none to be had, or the peer does not find it.
    alone: bool,
}

/// [`Peer::answer`].
const NOT_YET: u8 = 0;
const TAKEN: u8 = 1;
const DECLINED: u8 = 2;

/// A tensor that has arrived.
#[derive(Debug)]
enum Arrived {
    Whole(Tensor),
    /// It lies in the sender's memory, at a place that was looked at, until it is read.
    Shared {
        memory: Arc<Incoming>,
        head: Head,
        at: u64,
    },
}

impl Arrived {
    fn tensor(self) -> Result<Tensor> {
        match self {
            Self::Whole(x) => Ok(x),
            Self::Shared { memory, head, at } => {
                let read = memory.read(at, head.bytes(), |data| head.tensor(data)).flatten();
                read.map_err(|error| Error::Frame(error.to_string()))
            }
        }
    }
}

#[derive(Debug, Default)]
struct Inbox {
    frames: VecDeque<Arrived>,
    lost: Option<String>,
}

impl Tcp {
    /// Joins `rank` of a group whose ranks listen at `addresses`. Lower ranks are dialled; connections of higher ranks come
    /// through `accepted`, which the owner of the listening socket feeds after [`accept`]. Waits until all are connected.
    ///
    /// # Errors
    /// [`Error::PeerLost`] with the first rank that is not connected by `deadline`.
    pub fn connect(
        rendezvous: &Rendezvous,
        rank: usize,
        addresses: &[String],
        accepted: &std::sync::mpsc::Receiver<(Hello, Wire)>,
        security: &dyn Security,
        deadline: Instant,
    ) -> Result<Self> {
        let mut streams: Vec<Option<Wire>> = (0..addresses.len()).map(|_| None).collect();
        for (to, address) in addresses.iter().enumerate().take(rank) {
            let hello = Hello { from: rank, to, rendezvous: rendezvous.clone() };
            streams[to] = Some(dial(address, &hello, security, deadline)?);
        }
        while let Some(missing) = (rank + 1..addresses.len()).find(|r| streams[*r].is_none()) {
            let lost = || Error::PeerLost { rank: missing, reason: "it did not connect in time".into() };
            let left = deadline.checked_duration_since(Instant::now()).ok_or_else(lost)?;
            let (hello, stream) = accepted.recv_timeout(left).map_err(|_| lost())?;
            if hello.rendezvous == *rendezvous && hello.to == rank && hello.from > rank && hello.from < addresses.len() {
                streams[hello.from] = Some(stream);
            }
        }
        let peers = streams.into_iter().enumerate().map(|(rank, stream)| stream.map(|s| Peer::start(rank, s)).transpose());
        let peers = peers.collect::<io::Result<Vec<_>>>().map_err(|e| Error::PeerLost { rank, reason: e.to_string() })?;
        start_heartbeat(&peers);
        Ok(Self { rank, peers })
    }

    /// Cuts every connection, so that this rank's thread and all peers wake with an error.
    pub fn abort(&self, reason: &str) {
        for peer in self.peers.iter().flatten() {
            peer.lose(reason);
        }
    }

    /// Whether all peers are there, as far as is known now.
    ///
    /// # Errors
    /// [`Error::PeerLost`] with the first that is not.
    pub fn check(&self) -> Result<()> {
        for (rank, peer) in self.peers.iter().enumerate() {
            if let Some(reason) = peer.as_ref().and_then(|peer| peer.inbox().lost.clone()) {
                return Err(Error::PeerLost { rank, reason });
            }
        }
        Ok(())
    }

    /// Waits for what comes next from a peer.
    fn next(&self, from: usize) -> Result<Arrived> {
        let peer = self.peer(from)?;
        let inbox = peer.arrived.wait_while(peer.inbox(), |i| i.frames.is_empty() && i.lost.is_none());
        let mut inbox = inbox.unwrap_or_else(PoisonError::into_inner);
        match (inbox.frames.pop_front(), &inbox.lost) {
            (Some(arrived), _) => Ok(arrived),
            (None, lost) => Err(Error::PeerLost { rank: from, reason: lost.clone().unwrap_or_default() }),
        }
    }

    fn peer(&self, rank: usize) -> Result<&Peer> {
        self.peers.get(rank).and_then(Option::as_deref).ok_or_else(|| Error::Frame(format!("there is no peer {rank}")))
    }
}

impl Link for Tcp {
    fn rank(&self) -> usize {
        self.rank
    }

    fn size(&self) -> usize {
        self.peers.len()
    }

    fn send(&self, x: &Tensor, to: usize) -> Result<()> {
        let peer = self.peer(to)?;
        let head = Head::of(x);
        let mut plain = Vec::new();
        head.encode(&mut plain)?;
        let sent = bytes::lend(x, |data| {
            let mut writer = peer.writer.lock().unwrap_or_else(PoisonError::into_inner);
            let frames = match peer.share(&mut writer, data) {
                Shared::At(at) => return peer.stream.write_all(&frame::shared(at, &plain)),
                Shared::Offered(offer) => [frame::encode_offer(&offer), plain].concat(),
                Shared::Not => plain,
            };
            peer.stream.write_all(&frames)?;
            peer.stream.write_all(data)
        })?;
        sent.map_err(|e| {
            peer.lose(&e.to_string());
            Error::PeerLost { rank: to, reason: e.to_string() }
        })
    }

    fn recv(&self, from: usize) -> Result<Tensor> {
        self.next(from)?.tensor()
    }

    fn recv_floats(&self, from: usize, len: usize, f: &mut dyn FnMut(&[f32])) -> Result<()> {
        let (memory, head, at) = match self.next(from)? {
            Arrived::Whole(x) => return lend_floats(&x, len, f),
            Arrived::Shared { memory, head, at } => (memory, head, at),
        };
        if head.dtype != DType::F32 || head.bytes() != len * size_of::<f32>() {
            return Err(not_floats(head.dtype, &head.shape, len));
        }
        let read = memory.read(at, head.bytes(), |data| match bytemuck::try_cast_slice(data) {
            Ok(floats) => {
                f(floats);
                Ok(())
            }
            Err(error) => Err(Error::Frame(format!("floats at {at} of shared memory: {error}"))),
        });
        read.map_err(|error| Error::Frame(error.to_string()))?
    }
}

impl Drop for Tcp {
    fn drop(&mut self) {
        // Frames already written still arrive: the peer reads to the end before it sees the close.
        for peer in self.peers.iter().flatten() {
            let _ = peer.stream.socket().shutdown(Shutdown::Write);
            peer.inbox().lost.get_or_insert_with(|| "this rank left the group".into());
            peer.arrived.notify_all();
        }
    }
}

/// How a tensor goes to a peer.
enum Shared {
    /// In memory, at this place.
    At(u64),
    /// Over the connection, for the last time if the peer takes this.
    Offered(Offer),
    /// Over the connection.
    Not,
}

impl Peer {
    fn start(rank: usize, stream: Wire) -> io::Result<Arc<Self>> {
        let socket = stream.socket();
        socket.set_nodelay(true)?;
        socket.set_read_timeout(Some(FIRST_WORD))?;
        socket.set_write_timeout(Some(SILENCE))?;
        let peer = Arc::new(Self {
            writer: Mutex::default(),
            answer: AtomicU8::new(NOT_YET),
            stream,
            inbox: Mutex::default(),
            arrived: Condvar::new(),
        });
        let reader = peer.clone();
        thread::Builder::new().name(format!("recv-rank-{rank}")).spawn(move || reader.read_frames())?;
        Ok(peer)
    }

    fn read_frames(self: Arc<Self>) {
        let mut stream = BufReader::with_capacity(64 << 10, Reading(&*self.stream));
        let (mut silent_so_far, mut incoming) = (true, None);
        loop {
            let frame = frame::decode(&mut stream).and_then(|frame| self.heard(frame, &mut incoming));
            if std::mem::take(&mut silent_so_far) && frame.is_ok() {
                let _ = self.stream.socket().set_read_timeout(Some(SILENCE));
            }
            match frame {
                Ok(Some(x)) => {
                    self.inbox().frames.push_back(x);
                    self.arrived.notify_all();
                }
                Ok(None) => {}
                Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {
                    return self.lose("it was silent for too long");
                }
                Err(e) if e.kind() == ErrorKind::UnexpectedEof => return self.lose("its connection was closed"),
                Err(e) => return self.lose(&e.to_string()),
            }
        }
    }

    /// A frame's tensor, if it is for one.
    fn heard(self: &Arc<Self>, frame: Frame, incoming: &mut Option<Arc<Incoming>>) -> io::Result<Option<Arrived>> {
        match frame {
            Frame::Beat => {}
            Frame::Tensor(x) => return Ok(Some(Arrived::Whole(x))),
            Frame::Shared { head, at } => {
                let memory = incoming.clone().ok_or_else(|| frame::invalid("a place in memory that is not shared".into()))?;
                memory.check(at, head.bytes())?;
                return Ok(Some(Arrived::Shared { memory, head, at }));
            }
            Frame::Offer(offer) => {
                let opened =
                    Incoming::open(&offer).inspect_err(|error| tracing::debug!(%error, "tensors go over the connection"));
                *incoming = opened.ok().map(Arc::new);
                let (peer, answer) = (self.clone(), frame::encode_answer(incoming.is_some()));
                // In a thread of its own: two readers that wait for two writers would wait for each other.
                thread::spawn(move || {
                    let _writing = peer.writer.lock().unwrap_or_else(PoisonError::into_inner);
                    if let Err(error) = peer.stream.write_all(&answer) {
                        peer.lose(&error.to_string());
                    }
                });
            }
            Frame::Answer(taken) => self.answer.store(if taken { TAKEN } else { DECLINED }, Ordering::Release),
        }
        Ok(None)
    }

    /// Hands `data` over in memory, if the peer has some of this rank's; otherwise sees to it that it soon has.
    fn share(&self, writer: &mut Writer, data: &[u8]) -> Shared {
        if data.len() < LEAST_BYTES || writer.alone {
            return Shared::Not;
        }
        match (&mut writer.outgoing, self.answer.load(Ordering::Acquire)) {
            (Some(outgoing), TAKEN) => {
                outgoing.take();
                if let Some(at) = outgoing.write(data) {
                    return Shared::At(at);
                }
                if !outgoing.is_small_for(data.len()) {
                    return Shared::Not; // too much is on its way
                }
            }
            (Some(_), NOT_YET) => return Shared::Not,
            (Some(_), _) => {
                (writer.alone, writer.outgoing) = (true, None);
                return Shared::Not;
            }
            (None, _) => {}
        }
        // What the peer has not read of the ring before this one stays there for it.
        self.answer.store(NOT_YET, Ordering::Release);
        writer.outgoing = Outgoing::new(data.len());
        writer.outgoing.as_ref().map_or(Shared::Not, |outgoing| Shared::Offered(outgoing.offer()))
    }

    fn lose(&self, reason: &str) {
        self.inbox().lost.get_or_insert_with(|| reason.to_owned());
        self.arrived.notify_all();
        let _ = self.stream.socket().shutdown(Shutdown::Both);
    }

    fn inbox(&self) -> MutexGuard<'_, Inbox> {
        self.inbox.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Says the first word to every peer before it returns: from then on silence is noticed. The others follow from a thread of its own.
fn start_heartbeat(peers: &[Option<Arc<Peer>>]) {
    let peers: Vec<_> = peers.iter().flatten().map(Arc::downgrade).collect();
    let beat = move || {
        let alive: Vec<_> = peers.iter().filter_map(|p| p.upgrade()).filter(|p| p.inbox().lost.is_none()).collect();
        for peer in &alive {
            // A writer that is busy is a heartbeat of its own.
            if let Ok(writing) = peer.writer.try_lock()
                && let Err(e) = peer.stream.write_all(HEARTBEAT)
            {
                drop(writing);
                peer.lose(&e.to_string());
            }
        }
        !alive.is_empty()
    };
    beat();
    thread::spawn(move || {
        thread::sleep(BEAT);
        while beat() {
            thread::sleep(BEAT);
        }
    });
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;
    use std::sync::mpsc;

    use candle_core::Device;

    use super::*;
    use crate::Collective;
    use crate::mesh::Mesh;

    fn listen() -> (String, mpsc::Receiver<(Hello, Wire)>) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let (route, accepted) = mpsc::channel();
        let plain: Arc<dyn Security> = Arc::new(Plain);
        thread::spawn(move || serve(&listener, &plain, move |hello, stream| drop(route.send((hello, stream)))));
        (address, accepted)
    }

    fn rendezvous(secret: u8) -> Rendezvous {
        Rendezvous { group_id: "g".into(), epoch: 7, secret: vec![secret; 16] }
    }

    fn group(size: usize) -> Vec<Tcp> {
        let ends: Vec<_> = (0..size).map(|_| listen()).collect();
        let addresses: Vec<String> = ends.iter().map(|e| e.0.clone()).collect();
        let deadline = Instant::now() + Duration::from_secs(10);
        let ranks = ends.into_iter().enumerate().map(|(rank, (_, accepted))| {
            let addresses = addresses.clone();
            thread::spawn(move || Tcp::connect(&rendezvous(1), rank, &addresses, &accepted, &Plain, deadline).unwrap())
        });
        ranks.collect::<Vec<_>>().into_iter().map(|r| r.join().unwrap()).collect()
    }

    fn value(rank: usize) -> Tensor {
        Tensor::new(&[[0.1f32 * rank as f32, 1e7], [-1.0, 3.0]], &Device::Cpu).unwrap()
    }

    #[test]
    fn tcp_gives_the_bits_of_in_process() {
        let over_threads: Vec<_> = crate::InProcess::group(4).into_iter().map(|l| Arc::new(l) as Arc<dyn Link>).collect();
        let over_tcp: Vec<_> = group(4).into_iter().map(|l| Arc::new(l) as Arc<dyn Link>).collect();
        let sum = |links: Vec<Arc<dyn Link>>| -> Vec<Vec<Vec<f32>>> {
            let ranks: Vec<_> = links
                .into_iter()
                .map(|link| {
                    thread::spawn(move || {
                        let mesh = Mesh::whole(link);
                        mesh.all_reduce(&value(mesh.rank())).unwrap().to_vec2().unwrap()
                    })
                })
                .collect();
            ranks.into_iter().map(|r| r.join().unwrap()).collect()
        };
        assert_eq!(sum(over_threads), sum(over_tcp));
    }

    #[test]
    fn large_frames_cross_without_waiting_for_each_other() {
        let big = Tensor::zeros((1 << 20, 4), DType::F32, &Device::Cpu).unwrap();
        let ranks: Vec<_> = group(2)
            .into_iter()
            .map(|link| {
                let big = big.clone();
                thread::spawn(move || {
                    let mesh = Mesh::whole(Arc::new(link));
                    (0..3).all(|_| mesh.all_reduce(&big).unwrap().dims() == [1 << 20, 4])
                })
            })
            .collect();
        assert!(ranks.into_iter().all(|r| r.join().unwrap()));
    }

    #[test]
    fn a_rank_that_leaves_wakes_the_others() {
        let mut ranks = group(3);
        drop(ranks.pop());
        for link in ranks {
            let started = Instant::now();
            assert!(matches!(link.recv(2), Err(Error::PeerLost { rank: 2, .. })));
            assert!(started.elapsed() < SILENCE);
        }
    }

    #[test]
    fn a_connection_with_another_secret_is_not_believed() {
        let (address, accepted) = listen();
        let addresses = vec![address.clone(), "127.0.0.1:1".into()];
        let hello = Hello { from: 1, to: 0, rendezvous: rendezvous(2) };
        let _stream = dial(&address, &hello, &Plain, Instant::now()).unwrap();
        let result = Tcp::connect(&rendezvous(1), 0, &addresses, &accepted, &Plain, Instant::now() + Duration::from_millis(300));
        assert!(matches!(result, Err(Error::PeerLost { rank: 1, .. })), "{result:?}");
    }

    /// Sends tensors of several sizes both ways at once, each a ring of its own, and takes them.
    fn swap(links: [Tcp; 2]) {
        let tensor = |i: usize| {
            let len = [3, 20_000, 300_000, 17_000, 1 << 20, 40][i % 6] + i;
            Tensor::arange(0f32, len as f32, &Device::Cpu).unwrap().affine(1.0, i as f64).unwrap()
        };
        thread::scope(|scope| {
            for link in &links {
                scope.spawn(move || {
                    let peer = 1 - link.rank();
                    for i in 0..60 {
                        link.send(&tensor(i), peer).unwrap();
                        // Sometimes several are on their way.
                        if i % 5 == 4 {
                            for j in i - 4..=i {
                                let got = link.recv(peer).unwrap();
                                assert_eq!(got.to_vec1::<f32>().unwrap(), tensor(j).to_vec1::<f32>().unwrap(), "tensor {j}");
                            }
                        }
                    }
                });
            }
        });
    }

    #[test]
    fn large_tensors_go_through_memory_on_one_host() {
        let links: [Tcp; 2] = group(2).try_into().unwrap();
        let peers: Vec<Arc<Peer>> = links.iter().map(|link| link.peers.iter().flatten().next().unwrap().clone()).collect();
        swap(links);
        for peer in peers {
            let mut writer = peer.writer.lock().unwrap();
            let data = vec![7; LEAST_BYTES];
            assert!(!writer.alone && matches!(peer.share(&mut writer, &data), Shared::At(_)));
            assert!(matches!(peer.share(&mut writer, &data[1..]), Shared::Not), "small ones do not");
        }
    }

    #[test]
    fn without_memory_to_share_they_go_over_the_connection() {
        let links: [Tcp; 2] = group(2).try_into().unwrap();
        for link in &links {
            for peer in link.peers.iter().flatten() {
                // As a peer in another container: it finds nothing.
                let mut writer = peer.writer.lock().unwrap();
                writer.outgoing = Outgoing::new(LEAST_BYTES);
                peer.answer.store(DECLINED, Ordering::Release);
            }
        }
        let peer = links[0].peers.iter().flatten().next().unwrap().clone();
        swap(links);
        assert!(peer.writer.lock().unwrap().alone);
    }

    #[test]
    fn a_stopped_writer_does_not_block_for_ever() {
        // A peer that says one word and then neither reads nor writes is lost by silence.
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let (_route, accepted) = mpsc::channel();
        let addresses = [address, String::new()];
        let link =
            Tcp::connect(&rendezvous(1), 1, &addresses, &accepted, &Plain, Instant::now() + Duration::from_secs(5)).unwrap();
        let (silent, _) = listener.accept().unwrap();
        // The first word was said before `connect` returned: a rank that is stopped from here on is missed.
        let mut words = vec![0; 1024];
        let said = Read::read(&mut &silent, &mut words).unwrap();
        assert_eq!(words[said - 1..said], *HEARTBEAT);
        silent.write_all(HEARTBEAT).unwrap();
        assert!(matches!(link.recv(0), Err(Error::PeerLost { rank: 0, .. })));
    }
}
