//! Connections in plain text, as a gRPC client makes them, that say so when the server speaks TLS.

use std::{
    error::Error,
    io,
    os::fd::AsFd,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll, ready},
};

use futures::future::BoxFuture;
use hyper_util::rt::TokioIo;
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::TcpStream,
};
use tonic::{
    Status,
    body::Body,
    codegen::http::{Request, Response},
    transport::{self, Channel, Endpoint, Uri},
};

/// What an alert of TLS begins with: how a server that speaks it answers one who does not. What a server of HTTP/2 says first
/// begins with 0, the length of its settings.
const ALERT: u8 = 0x15;
/// The port of an address that names none.
const HTTP: u16 = 80;

/// What a client is told of it.
const TOLD: &str = "the server speaks TLS: dial https://, with --tls-ca";

/// A channel whose calls say so when the server speaks TLS and was dialled in plain text.
#[derive(Debug, Clone)]
pub struct Dialled {
    channel: Channel,
    speaks_tls: Arc<AtomicBool>,
}

impl Dialled {
    /// Dials in plain text.
    ///
    /// # Errors
    /// When nobody is there.
    pub async fn plain(endpoint: Endpoint) -> Result<Self, transport::Error> {
        let speaks_tls = Arc::<AtomicBool>::default();
        let channel = endpoint.connect_with_connector(PlainConnector { speaks_tls: speaks_tls.clone() }).await?;
        Ok(Self { channel, speaks_tls })
    }
}

/// One that was dialled by TLS.
impl From<Channel> for Dialled {
    fn from(channel: Channel) -> Self {
        Self { channel, speaks_tls: Arc::default() }
    }
}

impl tower::Service<Request<Body>> for Dialled {
    type Response = Response<Body>;
    type Error = Box<dyn Error + Send + Sync>;
    type Future = BoxFuture<'static, Result<Self::Response, Self::Error>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        self.channel.poll_ready(cx).map_err(|error| told(&self.speaks_tls, error))
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        let (answer, speaks_tls) = (self.channel.call(request), self.speaks_tls.clone());
        Box::pin(async move { answer.await.map_err(|error| told(&speaks_tls, error)) })
    }
}

/// The calls of a connection that ends are cancelled, and do not say why it ended. Not as UNAVAILABLE: to try again is no use.
fn told(speaks_tls: &AtomicBool, error: transport::Error) -> Box<dyn Error + Send + Sync> {
    if speaks_tls.load(Ordering::Acquire) { Status::failed_precondition(TOLD).into() } else { error.into() }
}

/// Dials in plain text.
#[derive(Debug, Clone)]
struct PlainConnector {
    speaks_tls: Arc<AtomicBool>,
}

impl tower::Service<Uri> for PlainConnector {
    type Response = TokioIo<Plain>;
    type Error = io::Error;
    type Future = BoxFuture<'static, io::Result<Self::Response>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, uri: Uri) -> Self::Future {
        let speaks_tls = self.speaks_tls.clone();
        Box::pin(async move {
            let host = uri.host().unwrap_or_default().trim_matches(['[', ']']);
            let stream = TcpStream::connect((host, uri.port_u16().unwrap_or(HTTP))).await?;
            stream.set_nodelay(true)?;
            Ok(TokioIo::new(Plain { stream, heard: false, speaks_tls }))
        })
    }
}

/// A connection whose first answer is looked at.
#[derive(Debug)]
struct Plain {
    stream: TcpStream,
    /// Something was answered.
    heard: bool,
    speaks_tls: Arc<AtomicBool>,
}

impl Plain {
    /// What is written when the server has hung up is an error, and may come before its alert is read. Whether one is there is
    /// asked of the system itself: the runtime may not have heard of it yet.
    fn written(&self, result: Poll<io::Result<usize>>) -> Poll<io::Result<usize>> {
        if !matches!(result, Poll::Ready(Err(_))) || self.heard {
            return result;
        }
        let mut first = [0];
        let peeked =
            self.stream.as_fd().try_clone_to_owned().and_then(|socket| std::net::TcpStream::from(socket).peek(&mut first));
        if matches!(peeked, Ok(1)) && first == [ALERT] {
            self.speaks_tls.store(true, Ordering::Release);
        }
        result
    }
}

impl AsyncRead for Plain {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let before = buf.filled().len();
        ready!(Pin::new(&mut self.stream).poll_read(cx, buf))?;
        if let Some(first) = buf.filled().get(before)
            && !self.heard
        {
            if *first == ALERT {
                self.speaks_tls.store(true, Ordering::Release);
                return Poll::Ready(Err(io::Error::other(TOLD)));
            }
            self.heard = true;
        }
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Plain {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let result = Pin::new(&mut self.stream).poll_write(cx, buf);
        self.written(result)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }

    fn poll_write_vectored(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bufs: &[io::IoSlice<'_>]) -> Poll<io::Result<usize>> {
        let result = Pin::new(&mut self.stream).poll_write_vectored(cx, bufs);
        self.written(result)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }
}

#[cfg(test)]
mod tests {
    use tokio::{
        io::{AsyncReadExt, AsyncWriteExt},
        net::TcpListener,
    };
    use tower::Service;

    use super::*;

    /// What a client hears of a server that says `answer` in two parts, and whether it takes it for one that speaks TLS.
    async fn heard(answer: [&'static [u8]; 2]) -> (io::Result<Vec<u8>>, bool) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let server = tokio::spawn(async move {
            let (mut stream, _) = listener.accept().await.unwrap();
            for part in answer {
                stream.write_all(part).await.unwrap();
                stream.flush().await.unwrap();
            }
        });
        let uri = format!("http://{address}").parse().unwrap();
        let speaks_tls = Arc::<AtomicBool>::default();
        let mut stream = PlainConnector { speaks_tls: speaks_tls.clone() }.call(uri).await.unwrap().into_inner();
        let mut all = Vec::new();
        let ended = stream.read_to_end(&mut all).await;
        server.await.unwrap();
        (ended.map(|_| all), speaks_tls.load(Ordering::Acquire))
    }

    #[tokio::test]
    async fn a_server_that_answers_with_an_alert_speaks_tls() {
        let (ended, speaks_tls) = heard([&[0x15, 3, 3, 0, 2], &[2, 10]]).await;
        assert!(ended.is_err() && speaks_tls);
    }

    #[tokio::test]
    async fn an_alert_is_seen_by_who_only_writes_to_a_server_that_has_hung_up() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let uri = format!("http://{}", listener.local_addr().unwrap()).parse().unwrap();
        let speaks_tls = Arc::<AtomicBool>::default();
        let mut stream = PlainConnector { speaks_tls: speaks_tls.clone() }.call(uri).await.unwrap().into_inner();
        let (mut server, _) = listener.accept().await.unwrap();
        server.write_all(&[ALERT, 3, 3, 0, 2, 2, 10]).await.unwrap();
        drop(server);
        while stream.write_all(b"PRI").await.is_ok() {}
        assert!(speaks_tls.load(Ordering::Acquire));
    }

    #[tokio::test]
    async fn what_a_server_says_later_is_its_own_affair() {
        let (ended, speaks_tls) = heard([&[0, 0, 0], &[0x15]]).await;
        assert_eq!((ended.unwrap(), speaks_tls), (vec![0, 0, 0, 0x15], false));
        let (ended, speaks_tls) = heard([&[], &[]]).await;
        assert_eq!((ended.unwrap(), speaks_tls), (Vec::new(), false));
    }
}
