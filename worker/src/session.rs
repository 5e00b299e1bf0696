//! One coordinator's control stream: commands in, reports out. What was begun for it goes on when it ends, for a while: the
//! next coordinator takes it over.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use proto::v1::control_request::Command;
use proto::v1::control_response::Report;
use proto::v1::{
    ControlRequest, ControlResponse, DescribeModel, Heartbeat, Holding, Lead, ModelDescribed, Registration, model_described,
};
use tokio::time::{Instant, interval, sleep, sleep_until, timeout};
use tokio_util::sync::CancellationToken;
use tonic::Streaming;

use crate::cards::Cards;
use crate::error::status;
use crate::groups::Groups;
use crate::home::Home;
use crate::outbox::{Reports, Sender};
use crate::tasks::Tasks;
use crate::{Error, Result};

/// How often each side speaks.
const HEARTBEAT: Duration = Duration::from_secs(1);
/// A coordinator that says nothing for this long is gone.
const SILENCE: Duration = Duration::from_secs(5);
/// Longest time to tell a coordinator which ranks have left, when this worker goes.
const FAREWELL: Duration = Duration::from_secs(1);

/// Sessions, one at a time: the newest stream of the highest term counts. A second stream is the same coordinator back again
/// after its first broke unnoticed, or the next leader.
pub(crate) struct Sessions {
    pub(crate) hello: Registration,
    pub(crate) groups: Arc<Groups>,
    pub(crate) tasks: Arc<Tasks>,
    pub(crate) cards: Arc<Cards>,
    pub(crate) reports: Reports,
    pub(crate) home: Arc<Home>,
    /// How long what is held goes on without a coordinator.
    pub(crate) orphan_grace: Duration,
    /// Cancelled when the worker goes.
    pub(crate) stop: CancellationToken,
    pub(crate) leadership: Mutex<Leadership>,
    /// Held by the session whose commands are obeyed.
    pub(crate) turn: tokio::sync::Mutex<()>,
}

/// Who leads.
#[derive(Debug, Default)]
pub(crate) struct Leadership {
    /// The highest seen.
    term: u64,
    /// Cancelled when a newer stream takes the current one's place.
    replaced: CancellationToken,
}

impl Sessions {
    /// Lives as long as the stream, and then until a newer one comes or nobody has come in time.
    pub(crate) async fn serve(self: Arc<Self>, mut commands: Streaming<ControlRequest>, sender: Sender) {
        let (lead, replaced) = match self.first(&mut commands).await {
            Ok(led) => led,
            Err(error) => {
                tracing::warn!(%error, "refused a control stream");
                // The caller may be gone.
                return drop(sender.send(Err(status(&error))).await);
            }
        };
        let turn = self.turn.lock().await;
        if replaced.is_cancelled() {
            return;
        }
        self.home.moved(lead.blob_address);
        let line = self.reports.attach(sender.clone(), self.hello.clone(), || self.holding());
        tracing::info!(term = lead.term, "a coordinator has connected");
        let cause = tokio::select! {
            // First: once it is replaced, nothing that it says is obeyed.
            biased;
            () = replaced.cancelled() => "a newer stream takes its place",
            () = self.stop.cancelled() => "this worker is shutting down",
            cause = self.follow(commands, &sender) => cause,
        };
        tracing::info!(term = lead.term, cause, "a coordinator's stream is over");
        if self.stop.is_cancelled() {
            self.groups.leave_all();
            // A thread in the middle of a step takes longer than anybody waits.
            drop(timeout(FAREWELL, self.groups.all_left()).await);
        }
        self.reports.detach(&line);
        // The stream ends with its last sender.
        drop((line, sender, turn));
        tokio::select! {
            () = replaced.cancelled() => {}
            () = self.stop.cancelled() => {}
            () = sleep(self.orphan_grace) => self.give_up(),
        }
    }

    /// Who leads, and what is cancelled when somebody else does. Ends the stream before.
    async fn first(&self, commands: &mut Streaming<ControlRequest>) -> Result<(Lead, CancellationToken)> {
        let first = timeout(SILENCE, commands.message()).await;
        let Ok(Ok(Some(ControlRequest { command: Some(Command::Lead(lead)) }))) = first else { return Err(Error::NoLead) };
        let mut leadership = self.leadership.lock().unwrap_or_else(PoisonError::into_inner);
        if lead.term < leadership.term {
            return Err(Error::StaleTerm { term: lead.term, newest: leadership.term });
        }
        let replaced = CancellationToken::new();
        let before = std::mem::replace(&mut *leadership, Leadership { term: lead.term, replaced: replaced.clone() });
        before.replaced.cancel();
        Ok((lead, replaced))
    }

    fn holding(&self) -> Holding {
        Holding { ranks: self.groups.held(), tasks: self.tasks.held(), draining: self.groups.is_closed() }
    }

    /// No coordinator has come for what is held.
    fn give_up(&self) {
        tracing::warn!(seconds = self.orphan_grace.as_secs(), "no coordinator has come back, leaving all groups");
        self.tasks.forget_all();
        self.groups.leave_all();
    }

    async fn follow(&self, mut commands: Streaming<ControlRequest>, sender: &Sender) -> &'static str {
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
                            self.obey(command).await;
                        }
                        deadline = Instant::now() + SILENCE;
                    }
                    Ok(None) => return "it ended the stream",
                    Err(_) => return "the stream broke",
                },
            }
        }
    }

    async fn obey(&self, command: Command) {
        match command {
            Command::DescribeModel(ask) => self.describe(ask),
            Command::JoinGroup(join) => self.groups.join(join).await,
            Command::LeaveGroup(leave) => {
                self.groups.leave(&leave);
                self.tasks.forget_group(&leave.group_id, leave.epoch);
            }
            Command::RunTask(run) => self.tasks.run(run).await,
            Command::CancelTask(cancel) => self.tasks.cancel(cancel.task.unwrap_or_default()),
            Command::ParkTask(park) => self.tasks.park(park.task.unwrap_or_default()),
            Command::ForgetJob(job) => self.tasks.forget_job(&job.job_id),
            // Who leads was said first.
            Command::Heartbeat(_) | Command::Lead(_) => {}
        }
    }

    fn describe(&self, ask: DescribeModel) {
        let (cards, reports) = (self.cards.clone(), self.reports.clone());
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
