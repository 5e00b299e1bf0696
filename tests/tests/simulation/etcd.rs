//! An etcd that stands in for the real one: keys with revisions, transactions, leases and watches, as far as the coordinator uses
//! them, over the simulated network. What it has acknowledged outlives its crashes, as an etcd's raft log does.

mod keys;
mod server;

use std::{
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use etcd_client::proto::{PbKvServer, PbLeaseServer, PbWatchServer};
use tokio::sync::Notify;
use tonic::transport::Server;

use self::keys::Keys;
use crate::net::listen;

/// How often leases are looked at.
const LEASE_TICK: Duration = Duration::from_millis(100);

/// What outlives the process; cheap to clone.
#[derive(Debug, Clone)]
pub(crate) struct Etcd {
    keys: Arc<Mutex<Keys>>,
    /// Watches look again. They are woken in the order they came, which `tokio::sync::watch` does not promise.
    written: Arc<Notify>,
}

impl Etcd {
    /// Nothing is in it. One that is `careless` takes writes of leaders that lead no more.
    pub(crate) fn new(careless: bool) -> Self {
        Self { keys: Arc::new(Mutex::new(Keys::new(careless))), written: Arc::default() }
    }

    fn lock(&self) -> MutexGuard<'_, Keys> {
        self.keys.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// One life of its process.
    pub(crate) async fn serve(self) -> turmoil::Result {
        // Every lease begins anew with its leader, as in etcd.
        self.lock().renew_all(now());
        let expiring = self.clone();
        tokio::spawn(async move {
            loop {
                tokio::time::sleep(LEASE_TICK).await;
                expiring.lock().expire(now());
                expiring.written.notify_waiters();
            }
        });
        let server = Server::builder()
            .add_service(PbKvServer::new(self.clone()))
            .add_service(PbLeaseServer::new(self.clone()))
            .add_service(PbWatchServer::new(self));
        server.serve_with_incoming(listen().await?).await?;
        Ok(())
    }
}

fn now() -> Duration {
    turmoil::sim_elapsed().unwrap_or_default()
}
