//! Membership in etcd: a key under a lease, for as long as this worker lives.
//!
//! etcd-client keeps no session: after the lease has expired its keep-alive answers `Ok` with a TTL of 0 for ever, with etcd
//! stopped it stays silent, and after a restart its stream has ended for good. So all of those mean that the lease is
//! lost, and a new one is taken.

use std::time::Duration;

use etcd_client::{Client, ConnectOptions, LeaseKeepAliveStream, LeaseKeeper, PutOptions};
use prost::Message;
use proto::v1::Registration;
use tokio::time::{Instant, interval, sleep, sleep_until, timeout};
use tokio_util::sync::CancellationToken;

use crate::config::EtcdPlace;
use crate::{Error, Result};

/// After this long without a word the worker is no member any more.
const TTL: Duration = Duration::from_secs(5);
/// How often the lease is renewed.
const KEEP_ALIVE: Duration = Duration::from_millis(5000 / 3);
/// Silence after which the lease counts as lost; the worker stops believing before etcd does.
const SILENCE: Duration = Duration::from_millis(5000 * 2 / 3);
/// Pause after the first failure; doubles with each.
const FIRST_PAUSE: Duration = Duration::from_millis(100);
/// Longest pause: an etcd that comes back is found soon.
const LAST_PAUSE: Duration = Duration::from_secs(2);
/// Longest wait for etcd to take note that this worker leaves.
const FAREWELL: Duration = Duration::from_millis(500);

/// Registers under `prefix`, again and again, until `stop`.
pub(crate) async fn keep_registered(place: EtcdPlace, registration: Registration, stop: CancellationToken) {
    let key = format!("{}/workers/{}", place.prefix, registration.worker_id);
    let mut pause = FIRST_PAUSE;
    while !stop.is_cancelled() {
        let mut session = None;
        let lost = tokio::select! {
            lost = stay(&place, &key, &registration, &mut session) => lost,
            () = stop.cancelled() => return farewell(session).await,
        };
        if session.is_some() {
            pause = FIRST_PAUSE;
        }
        let Err(error) = lost;
        tracing::warn!(key, %error, "not registered in etcd");
        tokio::select! {
            () = sleep(pause) => pause = (pause * 2).min(LAST_PAUSE),
            () = stop.cancelled() => {}
        }
    }
}

/// A lease that was granted.
struct Session {
    client: Client,
    lease: i64,
}

/// One lease, from its grant to its loss.
async fn stay(
    place: &EtcdPlace,
    key: &str,
    registration: &Registration,
    session: &mut Option<Session>,
) -> Result<std::convert::Infallible> {
    let mut options =
        ConnectOptions::new().with_connect_timeout(SILENCE).with_keep_alive(KEEP_ALIVE, SILENCE).with_keep_alive_while_idle(true);
    if let Some(tls) = place.tls.options()? {
        options = options.with_tls(tls);
    }
    let mut client = in_time(identity::etcd::connect(&place.endpoints, &options, key)).await?;
    let lease = in_time(client.lease_grant(TTL.as_secs() as i64, None)).await?.id();
    *session = Some(Session { client: client.clone(), lease });
    let options = PutOptions::new().with_lease(lease);
    in_time(client.put(key, registration.encode_to_vec(), Some(options))).await?;
    tracing::info!(key, "registered in etcd");
    let (keeper, answers) = in_time(client.lease_keep_alive(lease)).await?;
    keep(keeper, answers).await
}

async fn keep(mut keeper: LeaseKeeper, mut answers: LeaseKeepAliveStream) -> Result<std::convert::Infallible> {
    let mut tick = interval(KEEP_ALIVE);
    let mut deadline = Instant::now() + SILENCE;
    loop {
        tokio::select! {
            // First: when this process itself was stopped, an answer that waits is too late.
            biased;
            () = sleep_until(deadline) => return Err(Error::LeaseLost("etcd is silent")),
            _ = tick.tick() => keeper.keep_alive().await?,
            answer = answers.message() => match answer? {
                Some(answer) if answer.ttl() > 0 => deadline = Instant::now() + SILENCE,
                Some(_) => return Err(Error::LeaseLost("it has expired")),
                None => return Err(Error::LeaseLost("etcd ended the stream")),
            },
        }
    }
}

async fn farewell(session: Option<Session>) {
    if let Some(Session { mut client, lease }) = session {
        // If etcd is not there, the lease ends by itself.
        drop(timeout(FAREWELL, client.lease_revoke(lease)).await);
    }
}

async fn in_time<T>(call: impl Future<Output = Result<T, etcd_client::Error>>) -> Result<T> {
    Ok(timeout(SILENCE, call).await.map_err(|_| Error::LeaseLost("etcd is silent"))??)
}
