//! Ctrl-C while a job is asked for, waited for and fetched: the first one cancels the job, the second leaves at once.

use std::convert::Infallible;
use std::pin::pin;
use std::time::Duration;

use proto::v1::CancelJobRequest;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::watch;
use tonic::Status;

use crate::client::Client;
use crate::error::Error;
use crate::patience::Patience;

/// Longest wait for the answer to a wish to cancel.
const CANCEL_ANSWER: Duration = Duration::from_secs(10);
/// How long a job may take to stop once that is asked for. The coordinator ends it after two minutes, whatever its workers say.
const STOPS_WITHIN: Duration = Duration::from_secs(150);

/// What comes within this time is the same press: whoever passes a signal on may send it to the group of processes too.
const SAME_PRESS: Duration = Duration::from_millis(300);

/// How far a command is with its job.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Reached {
    /// Nothing was asked for yet.
    Nothing,
    /// A job is asked for, and nobody has said that it is accepted.
    Asking,
    /// There is a job of this id.
    Accepted(String),
}

/// Does `work` to its end, unless Ctrl-C is pressed. What it has reached is told by `reached`.
pub(crate) async fn unless_stopped(
    client: &Client,
    reached: &watch::Sender<Reached>,
    work: impl Future<Output = Result<(), Error>>,
) -> Result<(), Error> {
    // Listens until the end: one that is pressed between two waits counts too.
    let mut presses = signal(SignalKind::interrupt())?;
    let mut work = pin!(work);
    tokio::select! {
        ended = &mut work => return ended,
        () = pressed(&mut presses) => {}
    }
    if *reached.borrow() == Reached::Nothing {
        return Err(Error::Interrupted("no job was asked for".into()));
    }
    eprintln!("cancelling; Ctrl-C once more leaves at once");
    // The work goes on meanwhile: it learns whether the job is accepted, and how it ends.
    tokio::select! {
        ended = &mut work => ended,
        Err(error) = cancel(client.clone(), reached.subscribe()) => Err(error),
        () = pressed_again(&mut presses) => Err(left(reached)),
        () = tokio::time::sleep(STOPS_WITHIN) => Err(left(reached)),
    }
}

async fn pressed(presses: &mut Signal) {
    if presses.recv().await.is_none() {
        // Nobody can press any more.
        std::future::pending().await
    }
}

async fn pressed_again(presses: &mut Signal) {
    tokio::time::sleep(SAME_PRESS).await;
    tokio::select! {
        biased;
        _ = presses.recv() => {}
        () = std::future::ready(()) => {}
    }
    pressed(presses).await;
}

/// Asks for the job's end, as soon as it is known which it is, across restarts of the coordinator. Returns only when that cannot be.
async fn cancel(mut client: Client, mut reached: watch::Receiver<Reached>) -> Result<Infallible, Error> {
    let accepted = reached.wait_for(|reached| matches!(reached, Reached::Accepted(_))).await.map(|reached| reached.clone());
    let Ok(Reached::Accepted(job_id)) = accepted else {
        return std::future::pending().await;
    };
    let patience = Patience::default();
    loop {
        let asked = client.jobs.cancel_job(CancelJobRequest { job_id: job_id.clone() });
        let answer = tokio::time::timeout(CANCEL_ANSWER, asked).await;
        match answer.unwrap_or_else(|_| Err(Status::unavailable("the coordinator does not answer"))) {
            Ok(_) => return std::future::pending().await,
            Err(status) => patience.wait(status).await?,
        }
    }
}

/// What is left behind.
fn left(reached: &watch::Sender<Reached>) -> Error {
    Error::Interrupted(match &*reached.borrow() {
        Reached::Accepted(id) => format!("job {id} may still run: `atelier jobs cancel {id}` ends it"),
        Reached::Nothing | Reached::Asking => "the job may have been accepted: `atelier jobs` shows it then".into(),
    })
}
