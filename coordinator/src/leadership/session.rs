//! A lease that is kept, and that is known to be lost before etcd gives it to anybody else.

use std::time::Duration;

use etcd_client::{Client, ConnectOptions};
use tokio::time::{Instant, timeout_at};
use tokio_util::sync::{CancellationToken, DropGuard};
use tonic::transport::Endpoint;
use tracing::warn;

use super::timeout;
use crate::{
    config::EtcdConfig,
    error::{Error, Result},
};

/// Longest wait for one answer of etcd that is not about the lease.
const CALL_DEADLINE: Duration = Duration::from_secs(2);
/// How often an idle connection is asked whether it is there.
const PING_INTERVAL: Duration = Duration::from_secs(1);

/// A connection to a member of etcd that answers, which notices when the other end is gone.
pub(crate) async fn connect(config: &EtcdConfig) -> Result<Client> {
    let mut options = ConnectOptions::new()
        .with_connect_timeout(CALL_DEADLINE)
        .with_keep_alive(PING_INTERVAL, CALL_DEADLINE)
        .with_keep_alive_while_idle(true);
    if let Some(tls) = config.tls.options()? {
        options = options.with_tls(tls);
    }
    if config.dial.is_tcp() {
        // Boxed, like what a test makes up: their futures are large.
        let key = super::leader_key(&config.prefix);
        return in_time(Box::pin(identity::etcd::connect(&config.endpoints, &options, &key))).await;
    }
    in_time(Box::pin(async {
        let endpoint = config.endpoints.first().cloned().unwrap_or_default();
        let endpoint = Endpoint::from_shared(endpoint)?
            .connect_timeout(CALL_DEADLINE)
            .http2_keep_alive_interval(PING_INTERVAL)
            .keep_alive_timeout(CALL_DEADLINE)
            .keep_alive_while_idle(true);
        let channel = config.dial.connect(endpoint).await?;
        Client::from_channel(etcd_client::Channel::Tonic(channel), Some(options)).await
    }))
    .await
}

pub(crate) async fn in_time<T>(call: impl Future<Output = Result<T, etcd_client::Error>>) -> Result<T> {
    match timeout(CALL_DEADLINE, call).await {
        Ok(answer) => Ok(answer?),
        Err(_) => Err(Error::WatchEnded("etcd does not answer".into())),
    }
}

/// A lease that a task keeps. Dropping it revokes it.
#[derive(Debug)]
pub(super) struct Lease {
    id: i64,
    lost: CancellationToken,
    drop: DropGuard,
}

impl Lease {
    pub(super) async fn grant(config: &EtcdConfig, ttl: Duration) -> Result<Self> {
        let mut client = connect(config).await?;
        // Counted from before it was asked for: etcd counts from later.
        let asked = Instant::now();
        let granted = in_time(client.lease_grant(ttl.as_secs() as i64, None)).await?;
        let id = granted.id();
        let (lost, released) = (CancellationToken::new(), CancellationToken::new());
        let keeper = Keeper { config: config.clone(), client, id, ttl, confirmed: asked };
        tokio::spawn(keeper.run(lost.clone(), released.clone()));
        Ok(Self { id, lost, drop: released.drop_guard() })
    }

    pub(super) fn id(&self) -> i64 {
        self.id
    }

    /// Cancelled when the lease may be over.
    pub(super) fn lost(&self) -> CancellationToken {
        self.lost.clone()
    }

    /// Returns when the lease may be over.
    pub(super) async fn until_lost(&self) {
        self.lost.cancelled().await;
    }

    /// What says that it is lost, and what gives it up when dropped.
    pub(super) fn keep(self) -> (CancellationToken, DropGuard) {
        (self.lost, self.drop)
    }
}

struct Keeper {
    config: EtcdConfig,
    client: Client,
    id: i64,
    ttl: Duration,
    /// When the newest request that etcd answered was sent: the lease lives at least `ttl` from then.
    confirmed: Instant,
}

impl Keeper {
    async fn run(mut self, lost: CancellationToken, released: CancellationToken) {
        let given_up = tokio::select! {
            biased;
            () = released.cancelled() => true,
            () = self.keep() => false,
        };
        // First whoever believes in it, then etcd: nobody writes under a lease that somebody else may have.
        lost.cancel();
        if given_up {
            // If it does not come through, the lease ends by itself.
            drop(in_time(self.client.lease_revoke(self.id)).await);
        }
    }

    /// Returns when the lease may be over.
    async fn keep(&mut self) {
        loop {
            let cause = match self.session().await {
                Ended::Expired => return warn!("etcd says that the lease has expired"),
                Ended::Broken(cause) => cause,
            };
            warn!(%cause, "keeping the lease alive was interrupted");
            // A new connection, as long as there is time.
            if timeout_at(self.give_up(), self.reconnect()).await.is_err() {
                return warn!("etcd did not come back before the lease may have expired");
            }
        }
    }

    /// A third of the lease before etcd may give the lead to somebody else.
    fn give_up(&self) -> Instant {
        self.confirmed + self.ttl * 2 / 3
    }

    /// To whichever member answers.
    async fn reconnect(&mut self) {
        loop {
            if let Ok(client) = connect(&self.config).await {
                self.client = client;
                return;
            }
            tokio::time::sleep(super::RETRY_PAUSE).await;
        }
    }

    /// A sixth of the lease for one answer: another member may still be asked before the lease must be given up.
    fn next_answer(&self) -> Instant {
        (Instant::now() + self.ttl / 6).min(self.give_up())
    }

    /// Keeps it alive over one stream.
    async fn session(&mut self) -> Ended {
        let asked = Instant::now();
        let (mut keeper, mut answers) = match timeout_at(self.next_answer(), self.client.lease_keep_alive(self.id)).await {
            Ok(Ok(stream)) => stream,
            Ok(Err(error)) => return Ended::Broken(error.to_string()),
            Err(_) => return Ended::silent(),
        };
        // Opening it has renewed the lease once.
        self.confirmed = asked;
        loop {
            tokio::time::sleep_until(self.confirmed + self.ttl / 3).await;
            let asked = Instant::now();
            if let Err(error) = keeper.keep_alive().await {
                return Ended::Broken(error.to_string());
            }
            match timeout_at(self.next_answer(), answers.message()).await {
                // This is how etcd says that there is no such lease any more.
                Ok(Ok(Some(answer))) if answer.ttl() <= 0 => return Ended::Expired,
                Ok(Ok(Some(_))) => self.confirmed = asked,
                Ok(Ok(None)) => return Ended::Broken("etcd closed the stream".into()),
                Ok(Err(error)) => return Ended::Broken(error.to_string()),
                Err(_) => return Ended::silent(),
            }
        }
    }
}

enum Ended {
    Expired,
    Broken(String),
}

impl Ended {
    fn silent() -> Self {
        Self::Broken("this member of etcd is silent".into())
    }
}
