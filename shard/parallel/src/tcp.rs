//! Ranks that are processes, connected pairwise over TCP.
//!
//! Every pair of ranks of an epoch has one connection, made by a [`Security`] that says who may be at the other end; the higher rank dials. A thread per connection reads frames into a
//! queue, so a send never waits for the receiver's arithmetic. Another thread sends a heartbeat on every connection: a peer
//! whose process is gone shows by end of file at once, one that is stopped or cut off by silence within [`SILENCE`].

use std::collections::VecDeque;
use std::io::{self, BufReader, ErrorKind, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use candle_core::{DType, Device, Tensor};

use crate::mesh::Link;
use crate::{Error, Result};

/// A peer that says nothing for this long is lost. Five heartbeats and some.
pub const SILENCE: Duration = Duration::from_secs(3);
/// The first word may take as long as the peer waits for its own peers.
const FIRST_WORD: Duration = Duration::from_secs(60);
const HEARTBEAT: Duration = Duration::from_millis(500);
/// Longest frame: a whole activation of the largest model served (4608 x 21504 f32) is 0.4 GB.
const MAX_FRAME_BYTES: u64 = 1 << 30;
/// Most dimensions of a tensor in a frame.
const MAX_RANK: u8 = 8;
const MAGIC: [u8; 4] = *b"ATL1";
/// A dtype byte that no tensor has.
const BEAT: u8 = 0xff;

/// Which incarnation of which group a connection belongs to. Both ends must name the same.
#[derive(Clone, PartialEq, Eq)]
pub struct Rendezvous {
    /// The group.
    pub group_id: String,
    /// Its incarnation.
    pub epoch: u64,
    /// Known to the members of this epoch only.
    pub secret: Vec<u8>,
}

/// The first words on a connection: who dials, whom, and for what.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hello {
    /// The dialling rank.
    pub from: usize,
    /// The rank it wants.
    pub to: usize,
    /// For which group and epoch.
    pub rendezvous: Rendezvous,
}

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
    writer: Mutex<()>,
    inbox: Mutex<Inbox>,
    arrived: Condvar,
}

#[derive(Debug, Default)]
struct Inbox {
    frames: VecDeque<Tensor>,
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
        let frame = encode(x)?;
        let _writing = peer.writer.lock().unwrap_or_else(PoisonError::into_inner);
        peer.stream.write_all(&frame).map_err(|e| {
            peer.lose(&e.to_string());
            Error::PeerLost { rank: to, reason: e.to_string() }
        })
    }

    fn recv(&self, from: usize) -> Result<Tensor> {
        let peer = self.peer(from)?;
        let inbox = peer.arrived.wait_while(peer.inbox(), |i| i.frames.is_empty() && i.lost.is_none());
        let mut inbox = inbox.unwrap_or_else(PoisonError::into_inner);
        match (inbox.frames.pop_front(), &inbox.lost) {
            (Some(x), _) => Ok(x),
            (None, lost) => Err(Error::PeerLost { rank: from, reason: lost.clone().unwrap_or_default() }),
        }
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

impl Peer {
    fn start(rank: usize, stream: Wire) -> io::Result<Arc<Self>> {
        let socket = stream.socket();
        socket.set_nodelay(true)?;
        socket.set_read_timeout(Some(FIRST_WORD))?;
        socket.set_write_timeout(Some(SILENCE))?;
        let peer = Arc::new(Self { writer: Mutex::default(), stream, inbox: Mutex::default(), arrived: Condvar::new() });
        let reader = peer.clone();
        thread::Builder::new().name(format!("recv-rank-{rank}")).spawn(move || reader.read_frames())?;
        Ok(peer)
    }

    fn read_frames(&self) {
        let mut stream = BufReader::with_capacity(64 << 10, Reading(&*self.stream));
        let mut silent_so_far = true;
        loop {
            let frame = decode(&mut stream);
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

    fn lose(&self, reason: &str) {
        self.inbox().lost.get_or_insert_with(|| reason.to_owned());
        self.arrived.notify_all();
        let _ = self.stream.socket().shutdown(Shutdown::Both);
    }

    fn inbox(&self) -> MutexGuard<'_, Inbox> {
        self.inbox.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Reads who dials on a fresh connection, before anything else is believed of it.
///
/// # Errors
/// When the words are not ours, or do not come within [`SILENCE`].
pub fn accept(socket: TcpStream, security: &dyn Security) -> io::Result<(Hello, Wire)> {
    socket.set_read_timeout(Some(SILENCE))?;
    let wire = security.accepted(socket)?;
    wire.socket().set_read_timeout(Some(SILENCE))?;
    let mut stream = Reading(&*wire);
    let mut head = [0; 4 + 8 + 4 + 4 + 2 + 2];
    stream.read_exact(&mut head)?;
    if head[..4] != MAGIC {
        return Err(io::Error::new(ErrorKind::InvalidData, "not a rank of a group"));
    }
    let word = |at: usize| u32::from_le_bytes([head[at], head[at + 1], head[at + 2], head[at + 3]]) as usize;
    let short = |at: usize| usize::from(u16::from_le_bytes([head[at], head[at + 1]]));
    let epoch = word(4) as u64 | (word(8) as u64) << 32;
    let mut group_id = vec![0; short(20)];
    let mut secret = vec![0; short(22)];
    stream.read_exact(&mut group_id)?;
    stream.read_exact(&mut secret)?;
    let group_id = String::from_utf8(group_id).map_err(|e| io::Error::new(ErrorKind::InvalidData, e))?;
    let hello = Hello { from: word(12), to: word(16), rendezvous: Rendezvous { group_id, epoch, secret } };
    Ok((hello, wire))
}

/// Accepts connections on `listener` for ever and hands each to `route`, which knows who waits for it.
pub fn serve(listener: &TcpListener, security: &Arc<dyn Security>, route: impl Fn(Hello, Wire) + Clone + Send + 'static) {
    for stream in listener.incoming() {
        let (route, security) = (route.clone(), security.clone());
        match stream {
            // Each in a thread of its own: a connection that says nothing must not hold up the next.
            Ok(stream) => drop(thread::spawn(move || match accept(stream, &*security) {
                Ok((hello, stream)) => route(hello, stream),
                Err(error) => tracing::warn!(%error, "refused a data connection"),
            })),
            Err(error) => tracing::warn!(%error, "could not accept a data connection"),
        }
    }
}

fn dial(address: &str, hello: &Hello, security: &dyn Security, deadline: Instant) -> Result<Wire> {
    loop {
        let attempt = TcpStream::connect(address).and_then(|socket| {
            let stream = security.dialled(socket, address)?;
            stream.write_all(&encode_hello(hello))?;
            Ok(stream)
        });
        match attempt {
            Ok(stream) => return Ok(stream),
            Err(e) if Instant::now() >= deadline => return Err(Error::PeerLost { rank: hello.to, reason: e.to_string() }),
            // The peer may not have been told to join yet.
            Err(_) => thread::sleep(Duration::from_millis(50)),
        }
    }
}

fn encode_hello(hello: &Hello) -> Vec<u8> {
    let Rendezvous { group_id, epoch, secret } = &hello.rendezvous;
    let mut out = MAGIC.to_vec();
    out.extend(epoch.to_le_bytes());
    out.extend((hello.from as u32).to_le_bytes());
    out.extend((hello.to as u32).to_le_bytes());
    out.extend((group_id.len() as u16).to_le_bytes());
    out.extend((secret.len() as u16).to_le_bytes());
    out.extend(group_id.as_bytes());
    out.extend(secret);
    out
}

fn start_heartbeat(peers: &[Option<Arc<Peer>>]) {
    let peers: Vec<_> = peers.iter().flatten().map(Arc::downgrade).collect();
    thread::spawn(move || {
        loop {
            thread::sleep(HEARTBEAT);
            let alive: Vec<_> = peers.iter().filter_map(|p| p.upgrade()).filter(|p| p.inbox().lost.is_none()).collect();
            if alive.is_empty() {
                return;
            }
            for peer in alive {
                // A writer that is busy is a heartbeat of its own.
                if let Ok(writing) = peer.writer.try_lock()
                    && let Err(e) = peer.stream.write_all(&[BEAT])
                {
                    drop(writing);
                    peer.lose(&e.to_string());
                }
            }
        }
    });
}

const DTYPES: [DType; 7] = [DType::F32, DType::BF16, DType::F16, DType::I64, DType::U32, DType::U8, DType::F64];

/// dtype (1 byte), rank (1), dims (8 each), data, all little endian.
fn encode(x: &Tensor) -> Result<Vec<u8>> {
    let dtype =
        DTYPES.iter().position(|d| *d == x.dtype()).ok_or_else(|| Error::Frame(format!("{:?} does not travel", x.dtype())))?;
    let mut out = Vec::with_capacity(2 + 8 * x.rank() + x.elem_count() * x.dtype().size_in_bytes());
    out.push(dtype as u8);
    out.push(x.rank() as u8);
    for dim in x.dims() {
        out.extend((*dim as u64).to_le_bytes());
    }
    crate::bytes::append(x, &mut out)?;
    Ok(out)
}

/// The next tensor, or `None` for a heartbeat.
fn decode(stream: &mut impl Read) -> io::Result<Option<Tensor>> {
    let invalid = |what: String| io::Error::new(ErrorKind::InvalidData, what);
    let mut byte = [0];
    stream.read_exact(&mut byte)?;
    if byte[0] == BEAT {
        return Ok(None);
    }
    let dtype = *DTYPES.get(usize::from(byte[0])).ok_or_else(|| invalid(format!("dtype {}", byte[0])))?;
    stream.read_exact(&mut byte)?;
    if byte[0] > MAX_RANK {
        return Err(invalid(format!("a tensor of {} dimensions", byte[0])));
    }
    let mut shape = Vec::new();
    let mut bytes = dtype.size_in_bytes() as u64;
    for _ in 0..byte[0] {
        let mut dim = [0; 8];
        stream.read_exact(&mut dim)?;
        let dim = u64::from_le_bytes(dim);
        bytes = bytes.checked_mul(dim).filter(|b| *b <= MAX_FRAME_BYTES).ok_or_else(|| invalid("an oversized tensor".into()))?;
        shape.push(dim as usize);
    }
    let mut data = vec![0; bytes as usize];
    stream.read_exact(&mut data)?;
    Tensor::from_raw_buffer(&data, dtype, &shape, &Device::Cpu).map(Some).map_err(|e| invalid(e.to_string()))
}

impl std::fmt::Debug for Rendezvous {
    /// Without the secret.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} epoch {}", self.group_id, self.epoch)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

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

    #[test]
    fn a_frame_that_claims_too_much_is_refused() {
        let mut frame = vec![0, 2];
        frame.extend(u64::MAX.to_le_bytes());
        frame.extend(2u64.to_le_bytes());
        assert_eq!(decode(&mut frame.as_slice()).unwrap_err().kind(), ErrorKind::InvalidData);
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
        silent.write_all(&[BEAT]).unwrap();
        assert!(matches!(link.recv(0), Err(Error::PeerLost { rank: 0, .. })));
    }
}
