//! A TCP proxy that breaks connections on demand: cut, half-open, slow. Stands between processes on one host, where a real network
//! would.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinHandle;

/// Bytes taken at once.
const CHUNK: usize = 16 << 10;

/// What is done to every connection, old and new.
#[derive(Clone, Copy, Debug, Default)]
struct Faults {
    /// Connections of before this number was reached are closed.
    cuts: u64,
    /// New ones are closed at once.
    refuses: bool,
    /// Nothing passes, and nobody is told: what a lost route looks like.
    stalls: bool,
    /// Each chunk waits for so long.
    delay: Duration,
}

/// Passes connections at one address on to another. Ends with its last connection closed when it is dropped.
#[derive(Debug)]
pub struct Proxy {
    faults: Arc<watch::Sender<Faults>>,
    accepting: JoinHandle<()>,
}

impl Proxy {
    /// Listens at `listen` and passes on to `upstream`.
    ///
    /// # Panics
    /// When nobody can listen there.
    pub async fn start(listen: SocketAddr, upstream: SocketAddr) -> Self {
        let listener = TcpListener::bind(listen).await.expect("the proxy's address is free");
        let faults = Arc::new(watch::Sender::new(Faults::default()));
        let told = faults.clone();
        let accepting = tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                if !told.borrow().refuses {
                    tokio::spawn(pass(client, upstream, told.subscribe()));
                }
            }
        });
        Self { faults, accepting }
    }

    /// Closes every connection. New ones pass.
    pub fn cut(&self) {
        self.faults.send_modify(|faults| faults.cuts += 1);
    }

    /// Closes new connections at once, or no longer.
    pub fn refuse(&self, refuses: bool) {
        self.faults.send_modify(|faults| faults.refuses = refuses);
    }

    /// Lets nothing pass, without closing anything, or lets it pass again.
    pub fn stall(&self, stalls: bool) {
        self.faults.send_modify(|faults| faults.stalls = stalls);
    }

    /// Delays each chunk of up to 16 KiB: latency, and so throughput.
    pub fn delay(&self, delay: Duration) {
        self.faults.send_modify(|faults| faults.delay = delay);
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.accepting.abort();
        self.cut();
    }
}

async fn pass(client: TcpStream, upstream: SocketAddr, mut faults: watch::Receiver<Faults>) {
    let Ok(server) = TcpStream::connect(upstream).await else { return };
    let born = faults.borrow_and_update().cuts;
    let ((from_client, to_client), (from_server, to_server)) = (client.into_split(), server.into_split());
    let both = async {
        tokio::join!(one_way(from_client, to_server, faults.clone()), one_way(from_server, to_client, faults.clone()));
    };
    let mut cut = faults.clone();
    tokio::select! {
        () = both => {}
        // An error means that the proxy is gone.
        _ = cut.wait_for(|faults| faults.cuts != born) => {}
    }
}

async fn one_way(mut from: OwnedReadHalf, mut to: OwnedWriteHalf, mut faults: watch::Receiver<Faults>) {
    let mut chunk = vec![0; CHUNK];
    while let Ok(read @ 1..) = from.read(&mut chunk).await {
        let delay = match faults.wait_for(|faults| !faults.stalls).await {
            Ok(faults) => faults.delay,
            Err(_) => return,
        };
        if !delay.is_zero() {
            tokio::time::sleep(delay).await;
        }
        if to.write_all(&chunk[..read]).await.is_err() {
            return;
        }
    }
    // The other direction may go on.
    let _ = to.shutdown().await;
}
