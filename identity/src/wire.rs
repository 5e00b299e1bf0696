//! TLS for threads that block: one reads while others write.
//!
//! The session is locked for arithmetic only, never while the socket blocks, so that a writer does not wait for words that
//! the reader waits for. Records leave in the order in which they were made: the lock of the writers is held from the one to
//! the other.

use std::{
    io::{self, ErrorKind, Read, Write},
    net::TcpStream,
    sync::{Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use rustls::{ClientConnection, Connection, ServerConnection, pki_types::ServerName};

use crate::{Identity, Port, Role};

/// Longest wait for the other end's next word in a handshake.
const HANDSHAKE_SILENCE: Duration = Duration::from_secs(3);
/// Plain bytes that are made into records in one go.
const CHUNK: usize = 64 << 10;

/// A connection whose other end showed who it is.
pub struct Wire {
    socket: TcpStream,
    session: Mutex<Connection>,
    writing: Mutex<()>,
    received: Mutex<Received>,
}

/// Bytes from the socket that are not decrypted yet.
struct Received {
    buffer: Box<[u8]>,
    from: usize,
    to: usize,
}

impl Identity {
    /// Shows itself to, and checks, the server of `role` at the other end of a connection to `address` (host:port).
    ///
    /// # Errors
    /// When it is someone else, or says nothing for three seconds.
    pub fn wire_to(&self, role: Role, socket: TcpStream, address: &str) -> io::Result<Wire> {
        let host = address.rsplit_once(':').map_or(address, |(host, _)| host).trim_matches(['[', ']']);
        let name = ServerName::try_from(host.to_owned()).map_err(|error| io::Error::new(ErrorKind::InvalidInput, error))?;
        let config = self.client(role, false, &[]).map_err(io::Error::other)?;
        let session = ClientConnection::new(config, name).map_err(io::Error::other)?;
        Wire::shake_hands(socket, session.into())
    }

    /// Shows itself to, and checks, whoever connected to `port`.
    ///
    /// # Errors
    /// When it may not, or says nothing for three seconds.
    pub fn wire_from(&self, port: Port, socket: TcpStream) -> io::Result<Wire> {
        let config = self.server(port, &[]).map_err(io::Error::other)?;
        let session = ServerConnection::new(config).map_err(io::Error::other)?;
        Wire::shake_hands(socket, session.into())
    }
}

impl Wire {
    fn shake_hands(mut socket: TcpStream, mut session: Connection) -> io::Result<Self> {
        socket.set_nodelay(true)?;
        socket.set_read_timeout(Some(HANDSHAKE_SILENCE))?;
        socket.set_write_timeout(Some(HANDSHAKE_SILENCE))?;
        session.set_buffer_limit(None);
        while session.is_handshaking() || session.wants_write() {
            session.complete_io(&mut socket)?;
        }
        let received = Received { buffer: vec![0; CHUNK].into_boxed_slice(), from: 0, to: 0 };
        Ok(Self { socket, session: Mutex::new(session), writing: Mutex::default(), received: Mutex::new(received) })
    }

    /// The connection below.
    pub fn socket(&self) -> &TcpStream {
        &self.socket
    }

    /// Reads what is there, at least one byte; 0 at the end.
    ///
    /// # Errors
    /// Those of the socket, and what is wrong with the records.
    pub fn read(&self, into: &mut [u8]) -> io::Result<usize> {
        let mut received = lock(&self.received);
        let received = &mut *received;
        loop {
            let mut session = lock(&self.session);
            match session.reader().read(into) {
                Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                read => return read,
            }
            if received.from < received.to {
                let mut rest = &received.buffer[received.from..received.to];
                received.from += session.read_tls(&mut rest)?;
                session.process_new_packets().map_err(|error| io::Error::new(ErrorKind::InvalidData, error))?;
                continue;
            }
            drop(session);
            (received.from, received.to) = (0, (&self.socket).read(&mut received.buffer)?);
            if received.to == 0 {
                return Ok(0);
            }
        }
    }

    /// Writes all of `bytes`.
    ///
    /// # Errors
    /// Those of the socket.
    pub fn write_all(&self, bytes: &[u8]) -> io::Result<()> {
        let _writing = lock(&self.writing);
        let mut records = Vec::new();
        for chunk in bytes.chunks(CHUNK) {
            records.clear();
            let mut session = lock(&self.session);
            session.writer().write_all(chunk)?;
            while session.wants_write() {
                session.write_tls(&mut records)?;
            }
            drop(session);
            (&self.socket).write_all(&records)?;
        }
        Ok(())
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl std::fmt::Debug for Wire {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Wire({:?})", self.socket)
    }
}
