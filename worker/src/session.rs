//! One coordinator's control stream: commands in, reports out, and what was held for it is given up when it ends.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use proto::v1::control_request::Command;
use proto::v1::control_response::Report;
use proto::v1::{ControlRequest, ControlResponse, DescribeModel, Heartbeat, ModelDescribed, Registration, model_described};
use tokio::sync::mpsc;
use tokio::time::{Instant, interval, sleep_until};
use tokio_util::sync::CancellationToken;
use tonic::{Status, Streaming};

use crate::cards::Cards;
use crate::groups::{Groups, Reports};
use crate::tasks::Tasks;

/// How often each side speaks.
const HEARTBEAT: Duration = Duration::from_secs(1);
/// A coordinator that says nothing for this long is gone.
const SILENCE: Duration = Duration::from_secs(5);
/// Longest time to tell a coordinator which ranks have left, when this worker goes.
const FAREWELL: Duration = Duration::from_secs(1);

/// Sessions, one at a time: the newest stream counts. There is one coordinator; a second stream is that one back again
/// after its first broke unnoticed, or the next leader.
pub(crate) struct Sessions {
    pub(crate) hello: Registration,
    pub(crate) groups: Arc<Groups>,
    pub(crate) tasks: Arc<Tasks>,
    pub(crate) cards: Arc<Cards>,
    /// Cancelled when the worker goes.
    pub(crate) stop: CancellationToken,
    pub(crate) current: Mutex<CancellationToken>,
    /// Held by the session that counts, until it has given everything up.
    pub(crate) turn: tokio::sync::Mutex<()>,
}

impl Sessions {
    /// Lives as long as the stream.
    pub(crate) async fn serve(
        self: Arc<Self>,
        commands: Streaming<ControlRequest>,
        sender: mpsc::Sender<Result<ControlResponse, Status>>,
    ) {
        let reports = Reports::new(sender.clone());
        reports.send(Report::Hello(self.hello.clone())).await;
        let replaced = CancellationToken::new();
        let before = std::mem::replace(&mut *self.current.lock().unwrap_or_else(PoisonError::into_inner), replaced.clone());
        before.cancel();
        let _turn = self.turn.lock().await;
        tracing::info!("a coordinator has connected");
        let cause = tokio::select! {
            cause = self.follow(commands, &reports, &sender) => cause,
            () = replaced.cancelled() => "a newer stream takes its place",
            () = self.stop.cancelled() => "this worker is shutting down",
        };
        tracing::info!(cause, "a coordinator's stream is over, leaving its groups");
        self.groups.leave_all();
        self.tasks.forget_all();
        if self.stop.is_cancelled() {
            // A thread in the middle of a step takes longer than anybody waits.
            drop(tokio::time::timeout(FAREWELL, self.groups.all_left()).await);
        }
    }

    async fn follow(
        &self,
        mut commands: Streaming<ControlRequest>,
        reports: &Reports,
        sender: &mpsc::Sender<Result<ControlResponse, Status>>,
    ) -> &'static str {
        let mut beat = interval(HEARTBEAT);
        let mut deadline = Instant::now() + SILENCE;
        loop {
            tokio::select! {
                () = sleep_until(deadline) => return "it was silent",
                () = sender.closed() => return "it does not listen any more",
                // Where reports wait, no heartbeat is needed.
                _ = beat.tick() => drop(sender.try_send(Ok(ControlResponse { report: Some(Report::Heartbeat(Heartbeat {})) }))),
                command = commands.message() => match command {
                    Ok(Some(ControlRequest { command })) => {
                        if let Some(command) = command {
                            self.obey(command, reports).await;
                        }
                        deadline = Instant::now() + SILENCE;
                    }
                    Ok(None) => return "it ended the stream",
                    Err(_) => return "the stream broke",
                },
            }
        }
    }

    async fn obey(&self, command: Command, reports: &Reports) {
        match command {
            Command::DescribeModel(ask) => self.describe(ask, reports),
            Command::JoinGroup(join) => self.groups.join(join, reports).await,
            Command::LeaveGroup(leave) => {
                self.groups.leave(&leave);
                self.tasks.forget_group(&leave.group_id, leave.epoch);
            }
            Command::RunTask(run) => self.tasks.run(run, reports).await,
            Command::CancelTask(cancel) => self.tasks.cancel(cancel.task.unwrap_or_default()),
            Command::ForgetJob(job) => self.tasks.forget_job(&job.job_id),
            Command::Heartbeat(_) | Command::Lead(_) | Command::ParkTask(_) => {}
        }
    }

    fn describe(&self, ask: DescribeModel, reports: &Reports) {
        let (cards, reports) = (self.cards.clone(), reports.clone());
        tokio::spawn(async move {
            let model = ask.model.clone();
            let described = tokio::task::spawn_blocking(move || cards.describe(&ask)).await;
            let described = described.unwrap_or_else(|_| {
                let outcome = Some(model_described::Outcome::Error("reading the model panicked".into()));
                ModelDescribed { model, outcome }
            });
            reports.send(Report::ModelDescribed(described)).await;
        });
    }
}
