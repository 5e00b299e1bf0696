//! How the ranks of different workers know each other: by their workers' certificates.

use std::io;
use std::net::TcpStream;
use std::sync::Arc;

use identity::{Identity, Port, Role};
use parallel::tcp::{Plain, Security, Stream, Wire};

/// What connections between ranks are made with.
pub(crate) fn security(identity: Option<&Identity>) -> Arc<dyn Security> {
    match identity {
        Some(identity) => Arc::new(Workers(identity.clone())),
        None => Arc::new(Plain),
    }
}

/// Both ends show a worker's certificate.
#[derive(Debug)]
struct Workers(Identity);

#[derive(Debug)]
struct Secured(identity::Wire);

impl Security for Workers {
    fn dialled(&self, socket: TcpStream, address: &str) -> io::Result<Wire> {
        Ok(Arc::new(Secured(self.0.wire_to(Role::Worker, socket, address)?)))
    }

    fn accepted(&self, socket: TcpStream) -> io::Result<Wire> {
        Ok(Arc::new(Secured(self.0.wire_from(Port::RANKS, socket)?)))
    }
}

impl Stream for Secured {
    fn read(&self, buffer: &mut [u8]) -> io::Result<usize> {
        self.0.read(buffer)
    }

    fn write_all(&self, bytes: &[u8]) -> io::Result<()> {
        self.0.write_all(bytes)
    }

    fn socket(&self) -> &TcpStream {
        self.0.socket()
    }
}
