//! Control streams and payloads of a stand-in worker.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use futures::StreamExt;
use proto::v1::{
    ControlRequest, ControlResponse, Draining, GroupLost, GroupReady, Heartbeat, HeldRank, Holding, JoinGroup, LeaveGroup,
    ModelDescribed, PutPayloadRequest, PutPayloadResponse, Registration, RunTask, TaskRef, control_request::Command,
    control_response::Report, model_described::Outcome, put_payload_request, worker_service_server::WorkerService,
};
use tokio::sync::{Notify, mpsc};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status, Streaming};

use super::{HEARTBEAT, ORPHAN_GRACE, Pace, Shared, card, lock, task::Running};
use crate::world::Dial;

/// Reports that wait for the coordinator to read.
const MAX_REPORTS: usize = 1024;
/// How long it waits, when it is to go, for the coordinator to take over.
const DRAIN_DEADLINE: Duration = Duration::from_secs(10);
/// How long a payload waits for its task.
const EARLY_PAYLOAD: Duration = Duration::from_secs(10);

/// A task as a key.
pub(super) type TaskKey = (String, String, u32, String, u64);

pub(super) fn key(task: &TaskRef) -> TaskKey {
    (task.job_id.clone(), task.stage.clone(), task.attempt, task.group_id.clone(), task.epoch)
}

/// The worker; cheap to clone.
#[derive(Clone, Debug)]
pub(super) struct Fake {
    pub(super) registration: Registration,
    pub(super) pace: Pace,
    pub(super) dial: Dial,
    /// Cancelled when it dies.
    pub(super) life: CancellationToken,
    pub(super) held: Shared<Held>,
    /// Somebody should look again: a payload came, a task is to stop.
    pub(super) news: Arc<Notify>,
}

/// What it holds, across coordinators.
#[derive(Debug, Default)]
pub(super) struct Held {
    /// The newest coordinator's.
    term: u64,
    session: u64,
    /// Where that coordinator keeps pictures and checkpoints.
    home: String,
    /// It is to go.
    draining: bool,
    reports: Option<mpsc::Sender<Result<ControlResponse, Status>>>,
    ranks: BTreeMap<(String, u32), HeldRank>,
    pub(super) tasks: BTreeMap<TaskKey, Running>,
    /// Ends of tasks whose job was not forgotten, oldest first.
    ends: Vec<(String, Report)>,
    pub(super) payloads: BTreeMap<(TaskKey, String), [u8; 32]>,
}

impl Fake {
    pub(super) fn new(registration: Registration, pace: Pace, dial: Dial, life: CancellationToken) -> Self {
        Self { registration, pace, dial, life, held: Shared::default(), news: Arc::default() }
    }

    /// Tells the coordinator, if one listens.
    pub(super) fn report(&self, report: Report) {
        let held = lock(&self.held);
        if let Some(reports) = &held.reports {
            drop(reports.try_send(Ok(ControlResponse { report: Some(report) })));
        }
    }

    /// Tells how a task ended, now and to every coordinator that comes until the job is forgotten.
    pub(super) fn report_end(&self, task: &TaskRef, report: Report) {
        let mut held = lock(&self.held);
        held.tasks.remove(&key(task));
        held.payloads.retain(|(other, _), _| *other != key(task));
        held.ends.push((task.job_id.clone(), report.clone()));
        if let Some(reports) = &held.reports {
            drop(reports.try_send(Ok(ControlResponse { report: Some(report) })));
        }
    }

    async fn obey(self, mut commands: Streaming<ControlRequest>, sender: mpsc::Sender<Result<ControlResponse, Status>>) {
        let first = commands.message().await;
        let Ok(Some(ControlRequest { command: Some(Command::Lead(lead)) })) = first else {
            return drop(sender.try_send(Err(Status::failed_precondition("the first command must be lead"))));
        };
        let session = {
            let mut held = lock(&self.held);
            if lead.term < held.term {
                return drop(sender.try_send(Err(Status::failed_precondition("a newer coordinator leads"))));
            }
            held.term = lead.term;
            held.home = lead.blob_address;
            held.session += 1;
            let tasks = held.tasks.values().map(Running::held).collect();
            let holding = Holding { ranks: held.ranks.values().cloned().collect(), tasks, draining: held.draining };
            let ends: Vec<Report> = held.ends.iter().map(|(_, report)| report.clone()).collect();
            let reports = [Report::Hello(self.registration.clone()), Report::Holding(holding)].into_iter().chain(ends);
            for report in reports {
                drop(sender.try_send(Ok(ControlResponse { report: Some(report) })));
            }
            held.reports = Some(sender.clone());
            held.session
        };
        let mut beat = tokio::time::interval(HEARTBEAT);
        let mut silence = 0;
        loop {
            tokio::select! {
                biased;
                () = self.life.cancelled() => return,
                _ = beat.tick() => {
                    silence += 1;
                    drop(sender.try_send(Ok(ControlResponse { report: Some(Report::Heartbeat(Heartbeat {})) })));
                    if silence > 5 || sender.is_closed() {
                        break;
                    }
                }
                message = commands.message() => match message {
                    Ok(Some(ControlRequest { command })) if lock(&self.held).session == session => {
                        silence = 0;
                        if let Some(command) = command {
                            self.command(command);
                        }
                    }
                    _ => break,
                },
            }
        }
        self.wait_for_another(session).await;
    }

    /// At `drain`, waits until the coordinator has taken over what is held, and ends.
    pub(super) async fn drain(self, drain: CancellationToken) {
        drain.cancelled().await;
        lock(&self.held).draining = true;
        self.report(Report::Draining(Draining {}));
        let give_up = tokio::time::Instant::now() + DRAIN_DEADLINE;
        let holds = || {
            let held = lock(&self.held);
            !(held.ranks.is_empty() && held.tasks.is_empty())
        };
        while holds() && tokio::time::Instant::now() < give_up {
            tokio::time::sleep(HEARTBEAT / 10).await;
        }
        // What it said last is still on its way.
        tokio::time::sleep(HEARTBEAT / 10).await;
        self.life.cancel();
    }

    /// Where the coordinator keeps things: the newest one, or else the one that gave the task.
    pub(super) fn home(&self, given: &str) -> String {
        let newest = lock(&self.held).home.clone();
        if newest.is_empty() { given.to_owned() } else { newest }
    }

    /// Without a coordinator everything is given up after a while.
    async fn wait_for_another(&self, session: u64) {
        {
            let mut held = lock(&self.held);
            if held.session != session {
                return;
            }
            held.reports = None;
        }
        tokio::time::sleep(ORPHAN_GRACE).await;
        let mut held = lock(&self.held);
        if held.session == session {
            held.ranks.clear();
            held.tasks.values().for_each(Running::cancel);
            held.ends.clear();
        }
    }

    fn command(&self, command: Command) {
        match command {
            Command::DescribeModel(question) => {
                let outcome = Some(Outcome::Card(card(&question.model)));
                self.report(Report::ModelDescribed(ModelDescribed { model: question.model, outcome }));
            }
            Command::JoinGroup(join) => self.join(join),
            Command::LeaveGroup(leave) => self.leave(leave),
            Command::RunTask(run) => self.accept(run),
            Command::CancelTask(cancel) => self.with_task(cancel.task, Running::cancel),
            Command::ParkTask(park) => self.with_task(park.task, Running::park),
            Command::ForgetJob(job) => {
                let mut held = lock(&self.held);
                held.ends.retain(|(other, _)| *other != job.job_id);
                held.tasks.values().filter(|task| task.is_of(&job.job_id)).for_each(Running::cancel);
            }
            Command::Heartbeat(_) | Command::Lead(_) => {}
        }
    }

    fn with_task(&self, task: Option<TaskRef>, act: fn(&Running)) {
        if let Some(running) = task.and_then(|task| lock(&self.held).tasks.get(&key(&task)).cloned()) {
            act(&running);
        }
    }

    fn join(&self, join: JoinGroup) {
        let seat = (join.group_id.clone(), join.rank);
        let newer = |held: &Held| {
            let ranks = held.ranks.iter().filter(|((group, _), _)| *group == join.group_id);
            ranks.filter_map(|(_, rank)| rank.join.as_ref()).any(|other| other.epoch > join.epoch)
        };
        let refusal = {
            let held = lock(&self.held);
            let newer = newer(&held).then_some(("INTERNAL", "a newer epoch is held"));
            held.draining.then_some(("DRAINING", "this worker is going")).or(newer)
        };
        if let Some((reason, message)) = refusal {
            let JoinGroup { group_id, epoch, rank, .. } = join;
            let lost = GroupLost { group_id, epoch, rank, reason: reason.into(), message: message.into() };
            return self.report(Report::GroupLost(lost));
        }
        self.end_tasks(|task| task.group_id == join.group_id && task.epoch < join.epoch);
        lock(&self.held).ranks.insert(seat.clone(), HeldRank { join: Some(join.clone()), ready: false });
        let fake = self.clone();
        tokio::spawn(async move {
            tokio::time::sleep(fake.pace.load).await;
            let ready = {
                let mut held = lock(&fake.held);
                let rank = held.ranks.get_mut(&seat);
                rank.filter(|rank| rank.join.as_ref().is_some_and(|held| held.epoch == join.epoch)).map(|rank| rank.ready = true)
            };
            if ready.is_some() {
                let (group_id, epoch, rank) = (join.group_id, join.epoch, join.rank);
                fake.report(Report::GroupReady(GroupReady { group_id, epoch, rank }));
            }
        });
    }

    fn leave(&self, leave: LeaveGroup) {
        let of_epoch =
            |rank: &HeldRank| rank.join.as_ref().is_some_and(|join| join.group_id == leave.group_id && join.epoch == leave.epoch);
        lock(&self.held).ranks.retain(|_, rank| !of_epoch(rank));
        self.end_tasks(|task| task.group_id == leave.group_id && task.epoch == leave.epoch);
    }

    fn end_tasks(&self, which: impl Fn(&TaskRef) -> bool) {
        lock(&self.held).tasks.values().filter(|task| which(task.task())).for_each(Running::cancel);
    }

    fn accept(&self, run: RunTask) {
        let Some(task) = run.task.clone() else {
            return;
        };
        let running = {
            let mut held = lock(&self.held);
            let leads = held.ranks.get(&(task.group_id.clone(), 0)).and_then(|rank| rank.join.as_ref());
            let Some(products) = leads.filter(|join| join.epoch == task.epoch).map(JoinGroup::products) else {
                drop(held);
                return self.report_end(&task, super::task::failed(&task, "STALE_EPOCH", "the group is not held here"));
            };
            if held.tasks.contains_key(&key(&task)) {
                return;
            }
            let running = Running::new(task.clone(), products, self.news.clone());
            held.tasks.insert(key(&task), running.clone());
            running
        };
        tokio::spawn(self.clone().run(run, running));
    }
}

#[tonic::async_trait]
impl WorkerService for Fake {
    type ControlStream = ReceiverStream<Result<ControlResponse, Status>>;

    async fn control(&self, request: Request<Streaming<ControlRequest>>) -> Result<Response<Self::ControlStream>, Status> {
        let (sender, reports) = mpsc::channel(MAX_REPORTS);
        tokio::spawn(self.clone().obey(request.into_inner(), sender));
        Ok(Response::new(ReceiverStream::new(reports)))
    }

    async fn put_payload(&self, request: Request<Streaming<PutPayloadRequest>>) -> Result<Response<PutPayloadResponse>, Status> {
        let (mut header, mut bytes) = (None, Vec::new());
        let mut parts = request.into_inner();
        while let Some(part) = parts.next().await {
            match part?.part {
                Some(put_payload_request::Part::Header(first)) => header = Some(first),
                Some(put_payload_request::Part::Chunk(chunk)) => bytes.extend_from_slice(&chunk),
                None => {}
            }
        }
        let header = header.ok_or_else(|| Status::invalid_argument("header: is missing"))?;
        let task = header.task.ok_or_else(|| Status::invalid_argument("header.task: is missing"))?;
        let bytes = <[u8; 32]>::try_from(bytes).map_err(|_| Status::invalid_argument("chunk: must have 32 bytes"))?;
        let place = (key(&task), header.from_stage);
        lock(&self.held).payloads.insert(place.clone(), bytes);
        self.news.notify_waiters();
        let fake = self.clone();
        tokio::spawn(async move {
            tokio::time::sleep(EARLY_PAYLOAD).await;
            let mut held = lock(&fake.held);
            if !held.tasks.contains_key(&place.0) {
                held.payloads.remove(&place);
            }
        });
        Ok(Response::new(PutPayloadResponse {}))
    }
}
