//! Membership at the coordinator itself: a stream that is open for as long as this worker is a member.

use std::time::Duration;

use identity::Identity;
use proto::v1::membership_service_client::MembershipServiceClient;
use proto::v1::{RegisterRequest, RegisterResponse, Registration};
use tokio::sync::mpsc;
use tokio::time::{Instant, interval, sleep, sleep_until, timeout};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::{Status, Streaming};

use crate::dial;

/// How often this worker speaks.
const HEARTBEAT: Duration = Duration::from_secs(1);
/// A coordinator that says nothing for this long is gone.
const SILENCE: Duration = Duration::from_secs(5);
/// Heartbeats that wait to be sent; when they do, the connection is broken anyway.
const MAX_BEATS: usize = 4;
/// Pause after the first failure; doubles with each.
const FIRST_PAUSE: Duration = Duration::from_millis(100);
/// Longest pause: a coordinator that comes back is found soon.
const LAST_PAUSE: Duration = Duration::from_secs(3);
/// Longest wait for the coordinator to take note that this worker leaves.
const FAREWELL: Duration = Duration::from_millis(500);

/// Registers at `url`, again and again, until `stop`.
pub(crate) async fn keep_registered(
    url: String,
    identity: Option<Identity>,
    registration: Registration,
    stop: CancellationToken,
) {
    let (mut pause, mut failed) = (FIRST_PAUSE, false);
    while !stop.is_cancelled() {
        let began = Instant::now();
        let ended = stay(&url, identity.as_ref(), &registration, &stop).await;
        if stop.is_cancelled() {
            return;
        }
        if began.elapsed() > SILENCE {
            pause = FIRST_PAUSE;
        }
        match ended {
            Ok(cause) => {
                tracing::warn!(url, cause, "no longer registered");
                failed = false;
            }
            // Once: a certificate that is refused must be seen, and a coordinator that is away for long fills no log.
            Err(status) if !failed => {
                tracing::warn!(url, error = dial::reason(&status), "could not register, and goes on trying");
                failed = true;
            }
            Err(status) => tracing::debug!(url, error = dial::reason(&status), "could not register"),
        }
        tokio::select! {
            () = sleep(pause) => pause = (pause * 2).min(LAST_PAUSE),
            () = stop.cancelled() => {}
        }
    }
}

/// One registration, from the dial to its end.
async fn stay(
    url: &str,
    identity: Option<&Identity>,
    registration: &Registration,
    stop: &CancellationToken,
) -> Result<&'static str, Status> {
    let (beats, outgoing) = mpsc::channel(MAX_BEATS);
    drop(beats.try_send(RegisterRequest { registration: Some(registration.clone()) }));
    let call = async {
        let channel = dial::coordinator(url, identity).await?;
        MembershipServiceClient::new(channel).register(ReceiverStream::new(outgoing)).await
    };
    let responses = tokio::select! {
        responses = timeout(SILENCE, call) => responses.map_err(|_| Status::unavailable("no answer"))??.into_inner(),
        () = stop.cancelled() => return Ok("this worker is shutting down"),
    };
    tracing::info!(url, "registered");
    beat(responses, beats, stop).await
}

async fn beat(
    mut responses: Streaming<RegisterResponse>,
    beats: mpsc::Sender<RegisterRequest>,
    stop: &CancellationToken,
) -> Result<&'static str, Status> {
    let mut tick = interval(HEARTBEAT);
    let mut deadline = Instant::now() + SILENCE;
    loop {
        tokio::select! {
            () = stop.cancelled() => break,
            () = sleep_until(deadline) => return Ok("the coordinator is silent"),
            _ = tick.tick() => drop(beats.try_send(RegisterRequest { registration: None })),
            response = responses.message() => match response? {
                Some(_) => deadline = Instant::now() + SILENCE,
                None => return Ok("the coordinator ended the stream"),
            },
        }
    }
    drop(beats);
    let noted = async { while let Ok(Some(_)) = responses.message().await {} };
    drop(timeout(FAREWELL, noted).await);
    Ok("this worker is shutting down")
}
