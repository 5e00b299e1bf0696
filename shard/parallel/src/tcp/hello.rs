//! How two ranks find each other: the first words on a connection.

use std::io::{self, ErrorKind, Read};
use std::net::{TcpListener, TcpStream};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use super::{Reading, SILENCE, Security, Wire};
use crate::{Error, Result};

/// Of a way to sum that all ranks of a group must share.
const MAGIC: [u8; 4] = *b"ATL2";

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

pub(super) fn dial(address: &str, hello: &Hello, security: &dyn Security, deadline: Instant) -> Result<Wire> {
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

impl std::fmt::Debug for Rendezvous {
    /// Without the secret.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} epoch {}", self.group_id, self.epoch)
    }
}
