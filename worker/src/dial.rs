//! Calls to other processes: channels that are kept, and tries that are bounded.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use identity::{Dialled, Identity, Role};
use tokio::time::{Instant, sleep};
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Status};

use crate::{Error, Result};

/// Longest wait for a connection.
pub(crate) const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);
/// How long a call is tried again that finds nobody: a process that restarts is back sooner, one that does not is noticed
/// by the coordinator later.
const RETRY_FOR: Duration = Duration::from_secs(5);
/// Pause after the first try; doubles with each.
const FIRST_PAUSE: Duration = Duration::from_millis(50);
/// How long a call is tried again that finds a full inbox: longer than an inbox keeps what nobody claims.
const RETRY_FULL_FOR: Duration = Duration::from_secs(90);
/// Longest pause: room comes as tasks are claimed.
const LAST_PAUSE: Duration = Duration::from_secs(1);
/// Longest one try may take: a gigabyte at 20 MB/s.
pub(crate) const CALL_TIMEOUT: Duration = Duration::from_secs(60);
/// HTTP/2 windows: a chunk of payload is half a megabyte, and a real network has latency.
const WINDOW_BYTES: u32 = 4 << 20;
/// Pings show a peer that is gone without a word.
const KEEP_ALIVE: Duration = Duration::from_secs(2);
/// Channels kept; more processes than this and the oldest are dialled again.
const MAX_CHANNELS: usize = 256;

/// Channels by address. A channel connects when it is used, and again when it has broken.
#[derive(Debug, Default)]
pub(crate) struct Dial {
    channels: Mutex<HashMap<(Role, String), Channel>>,
    identity: Option<Identity>,
}

impl Dial {
    /// Connections that show `identity`, or plain ones.
    pub(crate) fn new(identity: Option<Identity>) -> Self {
        Self { channels: Mutex::default(), identity }
    }

    /// The channel to the coordinator or worker at host:port.
    pub(crate) fn channel(&self, role: Role, address: &str) -> Result<Channel> {
        let mut channels = self.channels.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(channel) = channels.get(&(role, address.to_owned())) {
            return Ok(channel.clone());
        }
        let endpoint = endpoint(address)?;
        let channel = match &self.identity {
            Some(identity) => endpoint.connect_with_connector_lazy(identity.connector(role)),
            None => endpoint.connect_lazy(),
        };
        if channels.len() >= MAX_CHANNELS {
            channels.clear();
        }
        channels.insert((role, address.to_owned()), channel.clone());
        Ok(channel)
    }
}

/// What every connection to another process of the cluster, at host:port, keeps to.
fn endpoint(address: &str) -> Result<Endpoint> {
    let endpoint = Endpoint::from_shared(format!("http://{address}"));
    let endpoint = endpoint.map_err(|_| Error::message("address", format!("`{address}` is no address")))?;
    Ok(endpoint
        .connect_timeout(CONNECT_TIMEOUT)
        .tcp_nodelay(true)
        .initial_stream_window_size(WINDOW_BYTES)
        .initial_connection_window_size(WINDOW_BYTES)
        .http2_keep_alive_interval(KEEP_ALIVE)
        .keep_alive_timeout(KEEP_ALIVE)
        .keep_alive_while_idle(true))
}

/// Connects to the coordinator at `url` now. An `https://` one is dialled with `identity`, which must be there.
pub(crate) async fn coordinator(url: &str, identity: Option<&Identity>) -> Result<Dialled, Status> {
    let address = url.split_once("://").map_or(url, |(_, address)| address);
    let endpoint = endpoint(address).map_err(|error| Status::invalid_argument(error.to_string()))?;
    let channel = match identity {
        Some(identity) => endpoint.connect_with_connector(identity.connector(Role::Coordinator)).await.map(Dialled::from),
        None => Dialled::plain(endpoint).await,
    };
    channel.map_err(|error| Status::unavailable(with_causes(&error)))
}

/// What a status says, and what caused it on this side: a connection that the other end closed.
pub(crate) fn reason(status: &Status) -> String {
    match std::error::Error::source(status) {
        Some(cause) => format!("{}: {}", status.message(), with_causes(cause)),
        None => status.message().to_owned(),
    }
}

/// An error with what caused it: which certificate was refused, and why.
fn with_causes(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text.push_str(&format!(": {cause}"));
        source = cause.source();
    }
    text
}

/// Calls `address` until it answers. A refusal is an answer, but for one of lack of room.
pub(crate) async fn call<T, F>(address: &str, attempt: impl FnMut() -> F) -> Result<T>
where
    F: Future<Output = Result<T, Status>>,
{
    call_for(RETRY_FOR, RETRY_FULL_FOR, address, attempt).await
}

async fn call_for<T, F>(retry_for: Duration, retry_full_for: Duration, address: &str, mut attempt: impl FnMut() -> F) -> Result<T>
where
    F: Future<Output = Result<T, Status>>,
{
    let began = Instant::now();
    let mut pause = FIRST_PAUSE;
    loop {
        let tried = tokio::time::timeout(CALL_TIMEOUT, attempt()).await;
        let status = match tried.unwrap_or_else(|_| Err(Status::deadline_exceeded("no answer"))) {
            Ok(answer) => return Ok(answer),
            Err(status) => status,
        };
        let patience = match status.code() {
            Code::Unavailable => retry_for,
            Code::ResourceExhausted => retry_full_for,
            _ => Duration::ZERO,
        };
        if began.elapsed() + pause > patience {
            return Err(Error::call(address, &status));
        }
        sleep(pause).await;
        pause = (pause * 2).min(LAST_PAUSE);
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::*;

    #[tokio::test]
    async fn only_an_absence_is_tried_again() {
        let tries = Cell::new(0);
        let answer = call("a", || {
            tries.set(tries.get() + 1);
            let tries = tries.get();
            async move { if tries < 4 { Err(Status::unavailable("")) } else { Ok(tries) } }
        });
        assert_eq!(answer.await.unwrap(), 4);
        tries.set(0);
        let refused: Result<()> = call("a", || {
            tries.set(tries.get() + 1);
            async { Err(Status::failed_precondition("no")) }
        })
        .await;
        assert!(matches!(refused, Err(Error::Call { code: Code::FailedPrecondition, .. })));
        assert_eq!(tries.get(), 1);
    }

    #[tokio::test]
    async fn an_absence_is_tried_for_a_bounded_time() {
        let tries = Cell::new(0);
        let absent: Result<()> = call_for(FIRST_PAUSE * 4, Duration::ZERO, "a", || {
            tries.set(tries.get() + 1);
            async { Err(Status::unavailable("")) }
        })
        .await;
        assert!(matches!(absent, Err(Error::Call { code: Code::Unavailable, .. })));
        assert!((2..=3).contains(&tries.get()), "{} tries", tries.get());
    }

    #[tokio::test]
    async fn a_full_inbox_is_tried_again_for_a_longer_time() {
        let tries = Cell::new(0);
        let mut full = || {
            tries.set(tries.get() + 1);
            let tries = tries.get();
            async move { if tries < 3 { Err(Status::resource_exhausted("full")) } else { Ok(tries) } }
        };
        assert_eq!(call_for(Duration::ZERO, FIRST_PAUSE * 8, "a", &mut full).await.unwrap(), 3);
        tries.set(0);
        let still_full = call_for(Duration::ZERO, FIRST_PAUSE / 2, "a", &mut full).await;
        assert!(matches!(still_full, Err(Error::Call { code: Code::ResourceExhausted, .. })));
    }
}
