//! Membership in etcd: workers write under leases of their own, the coordinator reads.
//!
//! The layout, which the worker crate shares:
//!
//! ```text
//! {prefix}/workers/{worker_id} = Registration, protobuf-encoded        prefix: /atelier unless configured
//! ```
//!
//! etcd-client reconnects nothing, so this is our own session: list at revision R, watch from R + 1, and whatever ends
//! that (an error, a compaction, silence) leads to a new connection, a new list, and the difference. While etcd is
//! away, membership stays as it was: nobody leaves because nobody can be asked.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use etcd_client::{Client, ConnectOptions, EventType, GetOptions, KeyValue, WatchOptions, WatchResponse, WatchStream};
use prost::Message;
use proto::v1::Registration;
use tokio::{
    sync::mpsc,
    time::{Instant, timeout},
};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use super::{Change, check};
use crate::{
    config::EtcdConfig,
    error::{Error, Result},
};

/// Longest wait for one answer of etcd.
const CALL_DEADLINE: Duration = Duration::from_secs(3);
/// How often etcd is asked whether the watch is up to date.
const PROGRESS_INTERVAL: Duration = Duration::from_secs(1);
/// A watch that says nothing for this long, though asked, is dead.
const SILENCE: Duration = Duration::from_secs(5);
/// Pause between two sessions.
const RETRY_PAUSE: Duration = Duration::from_millis(500);
/// A worker that is gone when etcd comes back may only have lost its lease with the outage: it gets this long to
/// register again before it counts as left.
const REJOIN_GRACE: Duration = Duration::from_secs(10);

/// Folder of the workers' keys.
pub fn workers_prefix(prefix: &str) -> String {
    format!("{prefix}/workers/")
}

/// Tells `changes` who comes and goes, until `stop`.
pub async fn watch(config: EtcdConfig, changes: mpsc::Sender<Change>, stop: CancellationToken) {
    let mut members =
        Members { folder: workers_prefix(&config.prefix), changes, known: BTreeMap::new(), missing: BTreeMap::new() };
    let mut healthy = true;
    loop {
        let ended = tokio::select! {
            () = stop.cancelled() => return,
            ended = session(&config, &mut members, &mut healthy) => ended,
        };
        if let Err(cause) = ended
            && healthy
        {
            warn!(%cause, "etcd is away, membership stays as it was");
            healthy = false;
        }
        tokio::select! {
            () = stop.cancelled() => return,
            () = tokio::time::sleep(RETRY_PAUSE) => {}
        }
    }
}

/// One connection: list, then watch until something ends it.
async fn session(config: &EtcdConfig, members: &mut Members, healthy: &mut bool) -> Result<()> {
    let mut options = ConnectOptions::new()
        .with_connect_timeout(CALL_DEADLINE)
        .with_keep_alive(PROGRESS_INTERVAL, CALL_DEADLINE)
        .with_keep_alive_while_idle(true);
    if let Some(tls) = config.tls.options()? {
        options = options.with_tls(tls);
    }
    let mut client = in_time(Client::connect(&config.endpoints, Some(options))).await?;
    let listed = in_time(client.get(members.folder.clone(), Some(GetOptions::new().with_prefix()))).await?;
    let revision = listed.header().map_or(0, |header| header.revision());
    members.listed(listed.kvs()).await;

    let options = WatchOptions::new().with_prefix().with_start_revision(revision + 1).with_progress_notify();
    let mut watch = in_time(client.watch(members.folder.clone(), Some(options))).await?;
    if !*healthy {
        info!("etcd is back");
        *healthy = true;
    }
    follow(&mut watch, members).await
}

async fn follow(watch: &mut WatchStream, members: &mut Members) -> Result<()> {
    let mut progress = tokio::time::interval(PROGRESS_INTERVAL);
    let mut deadline = Instant::now() + SILENCE;
    loop {
        tokio::select! {
            () = tokio::time::sleep_until(deadline) => return Err(Error::WatchEnded("etcd is silent".into())),
            _ = progress.tick() => {
                members.give_up_missing().await;
                in_time(watch.request_progress()).await?;
            }
            response = watch.message() => {
                let response = response?.ok_or_else(|| Error::WatchEnded("etcd closed it".into()))?;
                deadline = Instant::now() + SILENCE;
                members.watched(&response).await?;
            }
        }
    }
}

async fn in_time<T>(call: impl Future<Output = Result<T, etcd_client::Error>>) -> Result<T> {
    match timeout(CALL_DEADLINE, call).await {
        Ok(answer) => Ok(answer?),
        Err(_) => Err(Error::WatchEnded("etcd does not answer".into())),
    }
}

/// What was told to `changes`, which is what the next list is compared with.
struct Members {
    folder: String,
    changes: mpsc::Sender<Change>,
    known: BTreeMap<String, Registration>,
    /// Known, but not in the last list; they leave at that time.
    missing: BTreeMap<String, Instant>,
}

impl Members {
    async fn listed(&mut self, entries: &[KeyValue]) {
        let mut present = BTreeSet::new();
        for entry in entries {
            if let Some(registration) = self.decode(entry) {
                present.insert(registration.worker_id.clone());
                self.put(registration).await;
            }
        }
        let deadline = Instant::now() + REJOIN_GRACE;
        for worker_id in self.known.keys().filter(|id| !present.contains(*id)) {
            self.missing.entry(worker_id.clone()).or_insert(deadline);
        }
    }

    async fn watched(&mut self, response: &WatchResponse) -> Result<()> {
        if response.canceled() || response.compact_revision() > 0 {
            return Err(Error::WatchEnded(format!("etcd cancelled it: {}", response.cancel_reason())));
        }
        for event in response.events() {
            let Some(entry) = event.kv() else { continue };
            match event.event_type() {
                EventType::Put => {
                    if let Some(registration) = self.decode(entry) {
                        self.put(registration).await;
                    }
                }
                EventType::Delete => {
                    let worker_id = self.worker_id(entry).to_owned();
                    self.remove(&worker_id, "its registration in etcd ended").await;
                }
            }
        }
        Ok(())
    }

    async fn put(&mut self, registration: Registration) {
        self.missing.remove(&registration.worker_id);
        if self.known.get(&registration.worker_id) != Some(&registration) {
            self.known.insert(registration.worker_id.clone(), registration.clone());
            // Nobody listens only while the coordinator shuts down.
            drop(self.changes.send(Change::Joined(registration)).await);
        }
    }

    async fn remove(&mut self, worker_id: &str, cause: &str) {
        self.missing.remove(worker_id);
        if self.known.remove(worker_id).is_some() {
            drop(self.changes.send(Change::Left { worker_id: worker_id.to_owned(), cause: cause.to_owned() }).await);
        }
    }

    async fn give_up_missing(&mut self) {
        let now = Instant::now();
        let gone: Vec<String> = self.missing.iter().filter(|(_, deadline)| **deadline <= now).map(|(id, _)| id.clone()).collect();
        for worker_id in gone {
            self.remove(&worker_id, "it was no longer in etcd when etcd came back").await;
        }
    }

    fn worker_id<'a>(&self, entry: &'a KeyValue) -> &'a str {
        entry.key_str().ok().and_then(|key| key.strip_prefix(self.folder.as_str())).unwrap_or_default()
    }

    /// The registration, or nothing if the entry is not one: somebody else wrote it.
    fn decode(&self, entry: &KeyValue) -> Option<Registration> {
        let registration = Registration::decode(entry.value()).ok()?;
        let fits = registration.worker_id == self.worker_id(entry) && check(&registration).is_ok();
        if !fits {
            warn!(worker.id = self.worker_id(entry), "registration in etcd makes no sense and is ignored");
        }
        fits.then_some(registration)
    }
}
