//! Which rank an incoming data connection is for.
//!
//! A peer may dial before this worker was told to join: its connection waits, for a while and among few.

use std::collections::{HashMap, VecDeque};
use std::net::TcpListener;
use std::sync::mpsc::{self, Receiver, SyncSender};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use parallel::tcp::{self, Hello, Security, Wire};

use crate::{Error, Result};

/// Connections that may wait for a rank that has not been told to join: as many as a group of 64 ranks makes.
const MAX_EARLY: usize = 64;
/// How long one waits; joins of one group are sent in one go.
const EARLY: Duration = Duration::from_secs(10);
/// Connections on their way to one rank, which takes them as they come.
const MAX_PENDING: usize = 64;

type Connection = (Hello, Wire);

/// A rank as a peer names it: group, epoch, rank.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Seated {
    pub(crate) group_id: String,
    pub(crate) epoch: u64,
    pub(crate) rank: usize,
}

/// Which rank waits for which connections.
#[derive(Debug)]
pub(crate) struct Routes {
    table: Mutex<Table>,
    /// How connections between ranks are made.
    pub(crate) security: Arc<dyn Security>,
}

#[derive(Debug, Default)]
struct Table {
    waiting: HashMap<Seated, SyncSender<Connection>>,
    early: VecDeque<(Instant, Connection)>,
}

impl Routes {
    pub(crate) fn new(security: Arc<dyn Security>) -> Arc<Self> {
        Arc::new(Self { table: Mutex::default(), security })
    }

    /// Accepts connections on `listener` on a thread of its own, for as long as the process lives.
    pub(crate) fn listen(self: &Arc<Self>, listener: TcpListener) -> Result<()> {
        let (routes, security) = (self.clone(), self.security.clone());
        let serve = move || tcp::serve(&listener, &security, move |hello, stream| routes.route((hello, stream)));
        thread::Builder::new().name("data-listener".into()).spawn(serve).map(drop).map_err(Error::Thread)
    }

    /// From now on connections to `seat` go into the returned queue, those that came early first.
    pub(crate) fn expect(&self, seat: &Seated) -> Receiver<Connection> {
        let (sender, receiver) = mpsc::sync_channel(MAX_PENDING);
        let mut table = self.table();
        let (mine, others) = std::mem::take(&mut table.early).into_iter().partition(|(_, (hello, _))| Seated::of(hello) == *seat);
        table.early = others;
        let mine: VecDeque<_> = mine;
        for (_, connection) in mine {
            drop(sender.try_send(connection));
        }
        table.waiting.insert(seat.clone(), sender);
        receiver
    }

    /// Nobody waits at `seat` any more; a thread that does, wakes.
    pub(crate) fn forget(&self, seat: &Seated) {
        self.table().waiting.remove(seat);
    }

    fn route(&self, connection: Connection) {
        let seat = Seated::of(&connection.0);
        let mut table = self.table();
        table.early.retain(|(since, _)| since.elapsed() < EARLY);
        match table.waiting.get(&seat) {
            // Full only if a stranger dials for ever: its connections are dropped.
            Some(sender) => drop(sender.try_send(connection)),
            None if table.early.len() < MAX_EARLY => table.early.push_back((Instant::now(), connection)),
            None => tracing::warn!(group.id = seat.group_id, rank = seat.rank, "dropped an early data connection"),
        }
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Seated {
    fn of(hello: &Hello) -> Self {
        Self { group_id: hello.rendezvous.group_id.clone(), epoch: hello.rendezvous.epoch, rank: hello.to }
    }
}

#[cfg(test)]
mod tests {
    use std::net::TcpStream;

    use parallel::tcp::Rendezvous;

    use super::*;

    fn connection(group_id: &str, to: usize) -> Connection {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let stream = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let rendezvous = Rendezvous { group_id: group_id.into(), epoch: 1, secret: vec![1] };
        (Hello { from: 1, to, rendezvous }, Arc::new(stream))
    }

    #[test]
    fn a_connection_finds_its_rank_before_and_after_the_rank_is_there() {
        let routes = Routes::new(Arc::new(tcp::Plain));
        let seat = Seated { group_id: "g".into(), epoch: 1, rank: 0 };
        routes.route(connection("g", 0));
        routes.route(connection("other", 0));
        let accepted = routes.expect(&seat);
        routes.route(connection("g", 0));
        routes.route(connection("g", 1));
        assert_eq!(accepted.try_iter().count(), 2);
        routes.forget(&seat);
        assert!(matches!(accepted.try_recv(), Err(mpsc::TryRecvError::Disconnected)));
    }

    #[test]
    fn early_connections_are_bounded() {
        let routes = Routes::new(Arc::new(tcp::Plain));
        for _ in 0..MAX_EARLY + 3 {
            routes.route(connection("g", 0));
        }
        assert_eq!(routes.table().early.len(), MAX_EARLY);
    }
}
