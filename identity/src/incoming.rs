//! Connections as a gRPC server takes them: plain ones, or only those that showed who they are.

use std::{
    io,
    net::SocketAddr,
    pin::Pin,
    task::{Context, Poll},
    time::Duration,
};

use futures::{Stream, StreamExt, future::BoxFuture, stream::FuturesUnordered};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::{TcpListener, TcpStream},
    time::timeout,
};
use tokio_rustls::{TlsAcceptor, server::TlsStream};
use tonic::{Extensions, Status, transport::server::Connected};

use crate::{Identity, Port, Role, verify::role_of};

/// Handshakes under way at a time; while there are as many, nobody else is accepted.
const MAX_HANDSHAKES: usize = 256;
/// Longest handshake: two round trips and a signature.
const HANDSHAKE_DEADLINE: Duration = Duration::from_secs(10);
/// What gRPC speaks.
const PROTOCOLS: [&[u8]; 1] = [b"h2"];

/// The connections of a listener. With an identity, a connection comes out when its handshake is over; one that fails is
/// dropped, and no other waits for it.
pub struct Incoming {
    listener: TcpListener,
    security: Option<(Identity, Port)>,
    handshakes: FuturesUnordered<BoxFuture<'static, io::Result<Socket>>>,
}

impl Incoming {
    /// Of `listener`; without `security`, in plain text.
    pub fn new(listener: TcpListener, security: Option<(Identity, Port)>) -> Self {
        Self { listener, security, handshakes: FuturesUnordered::new() }
    }
}

impl Stream for Incoming {
    type Item = io::Result<Socket>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        loop {
            while self.handshakes.len() < MAX_HANDSHAKES {
                let (stream, address) = match self.listener.poll_accept(cx) {
                    Poll::Ready(Ok(accepted)) => accepted,
                    Poll::Ready(Err(error)) => return Poll::Ready(Some(Err(error))),
                    Poll::Pending => break,
                };
                drop(stream.set_nodelay(true));
                match &self.security {
                    None => return Poll::Ready(Some(Ok(Socket { address, stream: Either::Plain(stream) }))),
                    Some((identity, port)) => {
                        let handshake = shake_hands(identity.clone(), *port, stream, address);
                        self.handshakes.push(Box::pin(handshake));
                    }
                }
            }
            match self.handshakes.poll_next_unpin(cx) {
                Poll::Ready(Some(Ok(socket))) => return Poll::Ready(Some(Ok(socket))),
                Poll::Ready(Some(Err(error))) => tracing::debug!(%error, "refused a connection"),
                Poll::Ready(None) | Poll::Pending => return Poll::Pending,
            }
        }
    }
}

async fn shake_hands(identity: Identity, port: Port, stream: TcpStream, address: SocketAddr) -> io::Result<Socket> {
    let config = identity.server(port, &PROTOCOLS).map_err(io::Error::other)?;
    let stream = timeout(HANDSHAKE_DEADLINE, TlsAcceptor::from(config).accept(stream)).await??;
    Ok(Socket { address, stream: Either::Tls(Box::new(stream)) })
}

/// A connection that was accepted.
#[derive(Debug)]
pub struct Socket {
    address: SocketAddr,
    stream: Either,
}

#[derive(Debug)]
enum Either {
    Plain(TcpStream),
    Tls(Box<TlsStream<TcpStream>>),
}

/// Who is at the other end. It is among the extensions of every request of the connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Peer {
    /// Where from.
    pub address: SocketAddr,
    /// The connection is TLS.
    pub secure: bool,
    /// What its certificate says, if it showed one.
    pub role: Option<Role>,
}

impl Peer {
    /// Refuses a request on a TLS connection whose other end is none of `roles`. In plain text nobody shows a role, and the
    /// network is trusted.
    ///
    /// # Errors
    /// `PERMISSION_DENIED`, with the roles that may.
    pub fn check(extensions: &Extensions, roles: &[Role]) -> Result<(), Status> {
        match extensions.get::<Self>() {
            Some(peer) if peer.secure && !peer.role.is_some_and(|role| roles.contains(&role)) => {
                let names: Vec<&str> = roles.iter().map(|role| role.name()).collect();
                Err(Status::permission_denied(format!("this is for a certificate of: {}", names.join(", "))))
            }
            _ => Ok(()),
        }
    }
}

impl Connected for Socket {
    type ConnectInfo = Peer;

    fn connect_info(&self) -> Peer {
        let role = match &self.stream {
            Either::Plain(_) => None,
            Either::Tls(stream) => stream.get_ref().1.peer_certificates().and_then(<[_]>::first).and_then(role_of),
        };
        Peer { address: self.address, secure: matches!(self.stream, Either::Tls(_)), role }
    }
}

impl AsyncRead for Socket {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        match &mut self.stream {
            Either::Plain(stream) => Pin::new(stream).poll_read(cx, buf),
            Either::Tls(stream) => Pin::new(stream).poll_read(cx, buf),
        }
    }
}

impl AsyncWrite for Socket {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        match &mut self.stream {
            Either::Plain(stream) => Pin::new(stream).poll_write(cx, buf),
            Either::Tls(stream) => Pin::new(stream).poll_write(cx, buf),
        }
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut self.stream {
            Either::Plain(stream) => Pin::new(stream).poll_flush(cx),
            Either::Tls(stream) => Pin::new(stream).poll_flush(cx),
        }
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut self.stream {
            Either::Plain(stream) => Pin::new(stream).poll_shutdown(cx),
            Either::Tls(stream) => Pin::new(stream).poll_shutdown(cx),
        }
    }

    fn poll_write_vectored(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bufs: &[io::IoSlice<'_>]) -> Poll<io::Result<usize>> {
        match &mut self.stream {
            Either::Plain(stream) => Pin::new(stream).poll_write_vectored(cx, bufs),
            Either::Tls(stream) => Pin::new(stream).poll_write_vectored(cx, bufs),
        }
    }

    fn is_write_vectored(&self) -> bool {
        match &self.stream {
            Either::Plain(stream) => stream.is_write_vectored(),
            Either::Tls(stream) => stream.is_write_vectored(),
        }
    }
}

impl std::fmt::Debug for Incoming {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Incoming({})", if self.security.is_some() { "tls" } else { "plain" })
    }
}
