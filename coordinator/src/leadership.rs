//! One coordinator leads. Several stand for it in etcd; one has the leader's key, under a lease, and its revision fences
//! every write (`store/etcd.rs`).
//!
//! ```text
//! {prefix}/leader = host:port of who leads              its create_revision is the term
//! ```
//!
//! The lease alone proves nothing: a process that was stopped may believe in it long after. So losing it is found by our
//! own clock here, early, and a write that comes too late is refused by etcd, always. etcd-client answers `Ok` with a
//! time of 0 once a lease has expired, and never reconnects: both count as the loss.

mod session;

use std::time::Duration;

use etcd_client::{Client, Compare, CompareOp, EventType, PutOptions, Txn, TxnOp, WatchOptions};
use tokio::time::{Instant, sleep, timeout};
use tokio_util::sync::{CancellationToken, DropGuard};
use tracing::{info, warn};

use crate::{
    config::EtcdConfig,
    error::{Error, Result},
};

pub(crate) use self::session::{connect, in_time};
#[cfg(test)]
pub(crate) mod tests;

/// How long the leader's key outlives its leader. Twice this is the longest that nobody leads.
pub const LEASE_TTL: Duration = Duration::from_secs(3);
/// Pause after a session with etcd ended.
pub(crate) const RETRY_PAUSE: Duration = Duration::from_millis(200);
/// How often etcd is asked whether a watch is up to date, and how long it may be silent.
const PROGRESS_INTERVAL: Duration = Duration::from_secs(1);
const SILENCE: Duration = Duration::from_secs(3);

/// The leader's key.
pub fn leader_key(prefix: &str) -> String {
    format!("{prefix}/leader")
}

/// What a write shows to be taken: the leader's key, as this leader made it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fence {
    /// The leader's key.
    pub key: String,
    /// Its create_revision.
    pub revision: i64,
}

impl Fence {
    /// True in etcd as long as this leader leads.
    pub(crate) fn compare(&self) -> Compare {
        Compare::create_revision(self.key.clone(), CompareOp::Equal, self.revision)
    }
}

/// This coordinator leads, until `lost`. Dropping it gives the lead up.
#[derive(Debug)]
pub struct Led {
    /// Grows from one leader to the next.
    pub term: u64,
    /// For every write.
    pub fence: Fence,
    /// Cancelled when this coordinator may lead no longer.
    pub lost: CancellationToken,
    _resign: DropGuard,
}

/// Waits until this coordinator leads. `address` is what others read in the leader's key: host:port for clients.
///
/// An etcd that is away is waited for.
///
/// # Errors
/// [`Error::Stopping`] when `stop` is cancelled first.
pub async fn campaign(config: &EtcdConfig, address: &str, stop: &CancellationToken) -> Result<Led> {
    let mut healthy = true;
    loop {
        let stood = tokio::select! {
            biased;
            () = stop.cancelled() => return Err(Error::Stopping),
            stood = stand(config, address) => stood,
        };
        match stood {
            Ok(led) => return Ok(led),
            Err(cause) => {
                if healthy {
                    warn!(%cause, "standing for the lead was interrupted, it begins anew");
                }
                healthy = false;
                sleep(RETRY_PAUSE).await;
            }
        }
    }
}

/// Who leads, if anybody does.
///
/// # Errors
/// [`Error::Etcd`], [`Error::WatchEnded`] if etcd does not answer in time.
pub async fn leader(config: &EtcdConfig) -> Result<Option<String>> {
    let mut client = connect(config).await?;
    let found = in_time(client.get(leader_key(&config.prefix), None)).await?;
    Ok(found.kvs().first().map(|entry| String::from_utf8_lossy(entry.value()).into_owned()))
}

/// Keeps `value` under `key` for as long as a lease lives; returns when it is lost.
///
/// # Errors
/// As [`leader`].
pub(crate) async fn hold_key(config: &EtcdConfig, key: &str, value: &impl prost::Message) -> Result<()> {
    let mut client = connect(config).await?;
    let lease = session::Lease::grant(config, LEASE_TTL).await?;
    in_time(client.put(key, value.encode_to_vec(), Some(PutOptions::new().with_lease(lease.id())))).await?;
    lease.until_lost().await;
    Ok(())
}

/// One session: a lease, and the key as soon as nobody has it.
async fn stand(config: &EtcdConfig, address: &str) -> Result<Led> {
    let mut client = connect(config).await?;
    let key = leader_key(&config.prefix);
    let lease = session::Lease::grant(config, LEASE_TTL).await?;
    info!(address, "standing for the lead");
    loop {
        let created = create(&mut client, &key, address, lease.id(), &lease.lost()).await?;
        if let Some(revision) = created {
            info!(term = revision, "this coordinator leads");
            let (lost, resign) = lease.keep();
            let term = u64::try_from(revision).map_err(|_| Error::WatchEnded("a revision below 0".into()))?;
            return Ok(Led { term, fence: Fence { key, revision }, lost, _resign: resign });
        }
        let lost = lease.lost();
        tokio::select! {
            biased;
            () = lost.cancelled() => return Err(Error::WatchEnded("the lease was lost".into())),
            freed = until_free(&mut client, &key) => freed?,
        }
    }
}

/// Creates the leader's key if there is none, and gives its revision. One that is ours already, since an answer was lost,
/// counts too: the lease in it is ours alone.
async fn create(client: &mut Client, key: &str, address: &str, lease: i64, lost: &CancellationToken) -> Result<Option<i64>> {
    let absent = Compare::create_revision(key, CompareOp::Equal, 0);
    let put = TxnOp::put(key, address, Some(PutOptions::new().with_lease(lease)));
    let txn = Txn::new().when([absent]).and_then([put]).or_else([TxnOp::get(key, None)]);
    let done = in_time(client.txn(txn)).await?;
    if lost.is_cancelled() {
        return Err(Error::WatchEnded("the lease was lost".into()));
    }
    if done.succeeded() {
        return Ok(done.header().map(|header| header.revision()));
    }
    let held = done.op_responses().into_iter().find_map(|response| match response {
        etcd_client::TxnOpResponse::Get(found) => found.kvs().first().map(|entry| (entry.lease(), entry.create_revision())),
        _ => None,
    });
    Ok(held.filter(|(of, _)| *of == lease).map(|(_, revision)| revision))
}

/// Waits until the key is gone.
async fn until_free(client: &mut Client, key: &str) -> Result<()> {
    let found = in_time(client.get(key, None)).await?;
    if found.kvs().is_empty() {
        return Ok(());
    }
    let revision = found.header().map_or(0, |header| header.revision());
    let options = WatchOptions::new().with_start_revision(revision + 1).with_progress_notify();
    let mut watch = in_time(client.watch(key, Some(options))).await?;
    let mut progress = tokio::time::interval(PROGRESS_INTERVAL);
    let mut deadline = Instant::now() + SILENCE;
    loop {
        tokio::select! {
            biased;
            () = tokio::time::sleep_until(deadline) => return Err(Error::WatchEnded("etcd is silent".into())),
            _ = progress.tick() => in_time(watch.request_progress()).await?,
            response = watch.message() => {
                let response = response?.ok_or_else(|| Error::WatchEnded("etcd closed it".into()))?;
                if response.canceled() || response.compact_revision() > 0 {
                    return Err(Error::WatchEnded(format!("etcd cancelled it: {}", response.cancel_reason())));
                }
                deadline = Instant::now() + SILENCE;
                if response.events().iter().any(|event| event.event_type() == EventType::Delete) {
                    return Ok(());
                }
            }
        }
    }
}
