//! One control stream to each member: commands out, reports in, both in order.
//!
//! A worker is there, to the state, exactly as long as its stream is. When the stream breaks the worker has left; while
//! it is still a member it is dialled again, and then has joined anew.

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
use tonic::{Status, Streaming, transport::Endpoint};
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
    loop {
        let dialled = tokio::select! {
            biased;
            _ = &mut left => return,
            dialled = timeout(HELLO_DEADLINE, Connection::dial(&worker, &lines)) => dialled,
        };
        match dialled {
            Ok(Ok(connection)) => {
                pause = FIRST_PAUSE;
                if connection.serve(&worker, &lines.handle, &mut left).await.is_break() {
                    return;
                }
            }
            Ok(Err(cause)) => debug!(worker.id = worker.worker_id, cause, "dialling the worker failed"),
            Err(_) => warn!(worker.id = worker.worker_id, "worker does not say hello"),
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

    /// Lives as long as the stream. Breaks when the worker need not be dialled again.
    async fn serve(
        mut self,
        worker: &Registration,
        handle: &Handle,
        left: &mut oneshot::Receiver<String>,
    ) -> std::ops::ControlFlow<()> {
        let clogged = CancellationToken::new();
        let link = WorkerLink { commands: self.commands.clone(), clogged: clogged.clone() };
        let holding = std::mem::take(&mut self.holding);
        if handle.connected(worker.clone(), holding, link).await.is_err() {
            return std::ops::ControlFlow::Break(());
        }
        let (cause, next) = tokio::select! {
            biased;
            cause = left => {
                let cause = cause.unwrap_or_else(|_| "the coordinator is shutting down".into());
                (cause, std::ops::ControlFlow::Break(()))
            }
            () = clogged.cancelled() => ("it does not read its commands".into(), std::ops::ControlFlow::Continue(())),
            cause = self.exchange(&worker.worker_id, handle) => (cause, std::ops::ControlFlow::Continue(())),
        };
        match handle.disconnected(worker.worker_id.clone(), cause).await {
            Ok(()) => next,
            Err(_) => std::ops::ControlFlow::Break(()),
        }
    }

    /// Passes reports on and sends heartbeats; says why it ended.
    async fn exchange(mut self, worker_id: &str, handle: &Handle) -> String {
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
                                return "the coordinator is shutting down".into();
                            }
                        }
                        Ok(Some(ControlResponse { report: None })) => {}
                        Ok(None) => return "its control stream ended".into(),
                        Err(status) => return describe_break(&status),
                    }
                    deadline = Instant::now() + SILENCE;
                }
                // Last: what has come was not silence, however late it is read.
                () = sleep_until(deadline) => return format!("it was silent for {} s", SILENCE.as_secs()),
            }
        }
    }
}

fn describe_break(status: &Status) -> String {
    format!("its control stream broke: {}", status.message())
}

fn heartbeat() -> ControlRequest {
    ControlRequest { command: Some(Command::Heartbeat(Heartbeat {})) }
}
