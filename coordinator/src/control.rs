//! One control stream to each member: commands out, reports in, both in order.
//!
//! A worker is there, to the state, as long as its stream is. When the stream breaks it is away, and is dialled at once: a cut
//! connection is made good in a moment. When that fails it has left; while it is still a member it is dialled again, and then has
//! joined anew.

use std::{collections::BTreeMap, time::Duration};

use proto::v1::{
    ControlRequest, ControlResponse, Heartbeat, Holding, Lead, Registration, control_request::Command, control_response::Report,
    worker_service_client::WorkerServiceClient,
};
use tokio::{
    sync::{mpsc, oneshot},
    task::JoinHandle,
    time::{Instant, sleep_until, timeout},
};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::{Streaming, transport::Endpoint};
use tracing::{debug, warn};

use crate::{
    membership::Change,
    runtime::{Handle, WorkerLink},
    world::Dial,
};

/// Commands that wait for a worker: all tasks of as many jobs as a full engine holds, with room.
const MAX_COMMANDS: usize = 4096;
/// How often the coordinator speaks.
const HEARTBEAT: Duration = Duration::from_secs(1);
/// A worker that says nothing for this long is gone. Workers speak every second.
const SILENCE: Duration = Duration::from_secs(5);
/// Longest wait for a worker to answer the dial and say hello.
const HELLO_DEADLINE: Duration = Duration::from_secs(5);
/// How long a worker whose stream broke may take to be back on a new one. A process that died refuses the dial at once.
const BACK_DEADLINE: Duration = Duration::from_secs(2);
/// Pause after the first failed dial; doubles with each.
const FIRST_PAUSE: Duration = Duration::from_millis(100);
/// Longest pause between two dials.
const LAST_PAUSE: Duration = Duration::from_secs(5);

/// What every connection needs.
#[derive(Debug, Clone)]
pub(crate) struct Lines {
    pub(crate) handle: Handle,
    /// Said first on every stream.
    pub(crate) lead: Lead,
    pub(crate) dial: Dial,
}

/// Keeps a stream to every member, until `stop`.
pub(crate) async fn run(mut changes: mpsc::Receiver<Change>, lines: Lines, stop: CancellationToken) {
    let mut members: BTreeMap<String, Member> = BTreeMap::new();
    loop {
        let change = tokio::select! {
            biased;
            () = stop.cancelled() => break,
            change = changes.recv() => match change {
                Some(change) => change,
                None => break,
            },
        };
        match change {
            Change::Joined(registration) => {
                let worker_id = registration.worker_id.clone();
                if members.get(&worker_id).is_some_and(|member| member.registration == registration) {
                    continue;
                }
                if let Some(old) = members.remove(&worker_id) {
                    old.end("it registered anew".into()).await;
                }
                members.insert(worker_id, Member::start(registration, lines.clone()));
            }
            Change::Left { worker_id, cause } => {
                if let Some(member) = members.remove(&worker_id) {
                    member.end(cause).await;
                }
            }
        }
    }
    for (_, member) in members {
        member.end("the coordinator is shutting down".into()).await;
    }
}

struct Member {
    registration: Registration,
    left: oneshot::Sender<String>,
    task: JoinHandle<()>,
}

impl Member {
    fn start(registration: Registration, lines: Lines) -> Self {
        let (left, has_left) = oneshot::channel();
        let task = tokio::spawn(stay_connected(registration.clone(), lines, has_left));
        Self { registration, left, task }
    }

    /// Waits for the end, so that what comes next for this worker comes after it.
    async fn end(self, cause: String) {
        // The task may have ended by itself, with the coordinator.
        drop(self.left.send(cause));
        drop(self.task.await);
    }
}

/// Dials the worker, again and again, for as long as it is a member.
async fn stay_connected(worker: Registration, lines: Lines, mut left: oneshot::Receiver<String>) {
    let mut pause = FIRST_PAUSE;
    // Why it is away, while it is.
    let mut away: Option<String> = None;
    loop {
        let deadline = if away.is_some() { BACK_DEADLINE } else { HELLO_DEADLINE };
        let dialled = tokio::select! {
            biased;
            cause = &mut left => {
                if away.is_some() {
                    // The state may have ended before.
                    drop(lines.handle.disconnected(worker.worker_id.clone(), why_left(cause)).await);
                }
                return;
            }
            dialled = timeout(deadline, Connection::dial(&worker, &lines)) => dialled,
        };
        let failed = match dialled {
            Ok(Ok(connection)) => {
                pause = FIRST_PAUSE;
                away = match connection.serve(&worker, &lines.handle, &mut left).await {
                    Served::Over => return,
                    Served::Left => None,
                    Served::Away(cause) => {
                        warn!(worker.id = worker.worker_id, cause, "a control stream broke, dialling again");
                        Some(cause)
                    }
                };
                if away.is_some() {
                    continue;
                }
                None
            }
            Ok(Err(cause)) => Some(cause),
            Err(_) => Some(format!("it does not say hello within {} s", deadline.as_secs())),
        };
        if let Some(failed) = failed {
            debug!(worker.id = worker.worker_id, cause = failed, "dialling the worker failed");
            if let Some(cause) = away.take() {
                let cause = format!("{cause}, and it is not back: {failed}");
                if lines.handle.disconnected(worker.worker_id.clone(), cause).await.is_err() {
                    return;
                }
            }
        }
        tokio::select! {
            biased;
            _ = &mut left => return,
            () = tokio::time::sleep(pause) => pause = (pause * 2).min(LAST_PAUSE),
        }
    }
}

struct Connection {
    commands: mpsc::Sender<ControlRequest>,
    reports: Streaming<ControlResponse>,
    holding: Holding,
}

impl Connection {
    async fn dial(worker: &Registration, lines: &Lines) -> Result<Self, String> {
        let endpoint = Endpoint::from_shared(format!("http://{}", worker.address))
            .map_err(|error| error.to_string())?
            .connect_timeout(HELLO_DEADLINE)
            .tcp_nodelay(true)
            .http2_keep_alive_interval(HEARTBEAT)
            .keep_alive_timeout(SILENCE)
            .keep_alive_while_idle(true);
        let channel = lines.dial.connect(endpoint).await.map_err(|error| error.to_string())?;
        let mut client = WorkerServiceClient::new(channel)
            .max_decoding_message_size(proto::MAX_MESSAGE_BYTES)
            .max_encoding_message_size(proto::MAX_MESSAGE_BYTES);
        let (commands, outgoing) = mpsc::channel(MAX_COMMANDS);
        // Sent before the call: workers wait for it before they answer.
        drop(commands.try_send(ControlRequest { command: Some(Command::Lead(lines.lead.clone())) }));
        let call = client.control(ReceiverStream::new(outgoing)).await;
        let mut reports = call.map_err(|status| status.message().to_owned())?.into_inner();
        match reports.message().await.map(|hello| hello.and_then(|hello| hello.report)) {
            Ok(Some(Report::Hello(hello))) if hello.worker_id == worker.worker_id => {}
            Ok(Some(Report::Hello(hello))) => return Err(format!("another worker is there: {}", hello.worker_id)),
            Ok(_) => return Err("the first message was no hello".to_owned()),
            Err(status) => return Err(status.message().to_owned()),
        }
        match reports.message().await.map(|message| message.and_then(|message| message.report)) {
            Ok(Some(Report::Holding(holding))) => Ok(Self { commands, reports, holding }),
            Ok(_) => Err("the second message does not say what it holds".to_owned()),
            Err(status) => Err(status.message().to_owned()),
        }
    }

    /// Lives as long as the stream.
    async fn serve(mut self, worker: &Registration, handle: &Handle, left: &mut oneshot::Receiver<String>) -> Served {
        let clogged = CancellationToken::new();
        let link = WorkerLink { commands: self.commands.clone(), clogged: clogged.clone() };
        let holding = std::mem::take(&mut self.holding);
        if handle.connected(worker.clone(), holding, link).await.is_err() {
            return Served::Over;
        }
        let worker_id = worker.worker_id.clone();
        let (told, next) = tokio::select! {
            biased;
            cause = left => (handle.disconnected(worker_id, why_left(cause)).await, Served::Over),
            () = clogged.cancelled() => {
                (handle.disconnected(worker_id, "it does not read its commands".into()).await, Served::Left)
            }
            ended = self.exchange(&worker_id, handle) => match ended {
                Ended::Broke(cause) => (handle.away(worker_id).await, Served::Away(cause)),
                Ended::Silent => {
                    let cause = format!("it was silent for {} s", SILENCE.as_secs());
                    (handle.disconnected(worker_id, cause).await, Served::Left)
                }
                Ended::Stopping => return Served::Over,
            },
        };
        if told.is_ok() { next } else { Served::Over }
    }

    /// Passes reports on and sends heartbeats; says why it ended.
    async fn exchange(mut self, worker_id: &str, handle: &Handle) -> Ended {
        let mut beat = tokio::time::interval(HEARTBEAT);
        let mut deadline = Instant::now() + SILENCE;
        loop {
            tokio::select! {
                biased;
                // Where commands wait, no heartbeat is needed.
                _ = beat.tick() => drop(self.commands.try_send(heartbeat())),
                message = self.reports.message() => {
                    match message {
                        Ok(Some(ControlResponse { report: Some(report) })) => {
                            if !matches!(report, Report::Heartbeat(_))
                                && handle.report(worker_id.to_owned(), report).await.is_err()
                            {
                                return Ended::Stopping;
                            }
                        }
                        Ok(Some(ControlResponse { report: None })) => {}
                        Ok(None) => return Ended::Broke("its control stream ended".into()),
                        Err(status) => return Ended::Broke(format!("its control stream broke: {}", status.message())),
                    }
                    deadline = Instant::now() + SILENCE;
                }
                // Last: what has come was not silence, however late it is read.
                () = sleep_until(deadline) => return Ended::Silent,
            }
        }
    }
}

/// What becomes of a worker after its stream.
enum Served {
    /// It need not be dialled again.
    Over,
    /// It has left, and may join anew.
    Left,
    /// It may be back at once; this is why it is away.
    Away(String),
}

/// Why a stream ended.
enum Ended {
    Broke(String),
    Silent,
    /// The coordinator is.
    Stopping,
}

fn why_left(cause: Result<String, oneshot::error::RecvError>) -> String {
    cause.unwrap_or_else(|_| "the coordinator is shutting down".into())
}

fn heartbeat() -> ControlRequest {
    ControlRequest { command: Some(Command::Heartbeat(Heartbeat {})) }
}
