//! tonic over turmoil's network.

use std::{
    io,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll},
};

use coordinator::world::{Dial, Io};
use futures::{FutureExt, Stream, stream};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tonic::transport::{Uri, server::Connected};
use turmoil::net::{TcpListener, TcpStream};

/// Everybody listens here.
pub(crate) const PORT: u16 = 7700;

/// A connection that was accepted. It stands still from the moment that its process stops to listen, for then the process
/// is about to end: tonic tells its connections in no certain order, and a run must not depend on that.
pub(crate) struct Accepted {
    stream: TcpStream,
    ended: Arc<AtomicBool>,
}

impl Accepted {
    fn poll<T>(mut self: Pin<&mut Self>, act: impl FnOnce(Pin<&mut TcpStream>) -> Poll<T>) -> Poll<T> {
        if self.ended.load(Ordering::Relaxed) { Poll::Pending } else { act(Pin::new(&mut self.stream)) }
    }
}

impl Connected for Accepted {
    type ConnectInfo = ();

    fn connect_info(&self) {}
}

impl AsyncRead for Accepted {
    fn poll_read(self: Pin<&mut Self>, context: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        self.poll(|stream| stream.poll_read(context, buffer))
    }
}

impl AsyncWrite for Accepted {
    fn poll_write(self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        self.poll(|stream| stream.poll_write(context, bytes))
    }

    fn poll_flush(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.poll(|stream| stream.poll_flush(context))
    }

    fn poll_shutdown(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.poll(|stream| stream.poll_shutdown(context))
    }
}

/// Connections to this host.
pub(crate) async fn listen() -> io::Result<impl Stream<Item = io::Result<Accepted>>> {
    let listening = Listening { listener: TcpListener::bind(("0.0.0.0", PORT)).await?, ended: Arc::default() };
    Ok(stream::unfold(listening, async |listening| {
        let accepted = listening.listener.accept().await;
        Some((accepted.map(|(stream, _)| Accepted { stream, ended: listening.ended.clone() }), listening))
    }))
}

struct Listening {
    listener: TcpListener,
    ended: Arc<AtomicBool>,
}

impl Drop for Listening {
    fn drop(&mut self) {
        self.ended.store(true, Ordering::Relaxed);
    }
}

/// The way to other hosts.
pub(crate) fn dial() -> Dial {
    Dial::through(|uri: Uri| {
        async move {
            let host = uri.host().unwrap_or_default().to_owned();
            let stream = TcpStream::connect((host, uri.port_u16().unwrap_or(PORT))).await?;
            Ok(Box::new(stream) as Box<dyn Io>)
        }
        .boxed()
    })
}
