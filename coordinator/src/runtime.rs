//! The one task that owns the [`State`]: takes messages one by one, carries out effects, wakes whoever watches.
//!
//! Everybody else holds a [`Handle`]. The task waits for nobody: a worker that does not read its commands is dropped,
//! and a slow watcher reads the job's log when it comes to it.

use std::{
    collections::HashMap,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use proto::v1::{ControlRequest, Job, JoinGroup, Registration, control_request::Command, control_response::Report};
use tokio::sync::{mpsc, oneshot, watch};
use tokio_util::sync::CancellationToken;
use tonic_health::{ServingStatus, server::HealthReporter};
use tracing::{info, warn};

use crate::{
    error::{Error, Result},
    state::{Effect, Event, EventPage, Millis, State, Submission},
};

/// Messages that wait for the task. A full channel slows whoever sends: reports, then clients.
const MAX_MESSAGES: usize = 4096;
/// How often time passes for the state: the finest of its deadlines is [`crate::state::REFORM_PAUSE`].
const TICK: Duration = Duration::from_millis(100);

/// Talks to the task that owns the state. Cheap to clone.
#[derive(Debug, Clone)]
pub(crate) struct Handle {
    messages: mpsc::Sender<Message>,
}

enum Message {
    Client { event: Event, answer: oneshot::Sender<Result<Job>> },
    Read(Box<dyn FnOnce(&State) + Send>),
    Follow { job_id: String, after: u64, reply: oneshot::Sender<Result<Followed>> },
    Connected { worker: Registration, link: WorkerLink },
    Happened(Event),
}

/// A job's next events, and what changes when there are more.
#[derive(Debug)]
pub(crate) struct Followed {
    pub(crate) page: EventPage,
    /// Changes, or closes, when it is worth reading again.
    pub(crate) changed: watch::Receiver<()>,
}

/// The way to a worker.
#[derive(Debug)]
pub(crate) struct WorkerLink {
    pub(crate) commands: mpsc::Sender<ControlRequest>,
    /// Cancelled when the worker does not read its commands.
    pub(crate) clogged: CancellationToken,
}

impl Handle {
    /// Starts the task. It ends when `stop` is cancelled; from then on every call is [`Error::Stopping`].
    pub(crate) fn spawn(state: State, health: HealthReporter, stop: CancellationToken) -> Self {
        let (messages, inbox) = mpsc::channel(MAX_MESSAGES);
        let owner = Owner { state, clock: Clock::start(), links: HashMap::new(), followers: HashMap::new(), health };
        tokio::spawn(owner.run(inbox, stop));
        Self { messages }
    }

    /// Accepts a job.
    pub(crate) async fn submit(&self, submission: Submission) -> Result<Job> {
        self.answer_to(Event::Submit(Box::new(submission))).await
    }

    /// Asks a job to stop.
    pub(crate) async fn cancel(&self, job_id: String) -> Result<Job> {
        self.answer_to(Event::Cancel { job_id }).await
    }

    /// Looks at the state.
    pub(crate) async fn read<T: Send + 'static>(&self, look: impl FnOnce(&State) -> T + Send + 'static) -> Result<T> {
        let (reply, answer) = oneshot::channel();
        // A client that has gone does not want to know.
        self.send(Message::Read(Box::new(move |state| drop(reply.send(look(state)))))).await?;
        answer.await.map_err(|_| Error::Stopping)
    }

    /// Reads a job's events after `after`.
    pub(crate) async fn follow(&self, job_id: String, after: u64) -> Result<Followed> {
        let (reply, answer) = oneshot::channel();
        self.send(Message::Follow { job_id, after, reply }).await?;
        answer.await.map_err(|_| Error::Stopping)?
    }

    /// A worker can be commanded from now on.
    pub(crate) async fn connected(&self, worker: Registration, link: WorkerLink) -> Result<()> {
        self.send(Message::Connected { worker, link }).await
    }

    /// A worker can no longer be commanded.
    pub(crate) async fn disconnected(&self, worker_id: String, cause: String) -> Result<()> {
        self.send(Message::Happened(Event::WorkerLeft { worker_id, cause })).await
    }

    /// A worker said something.
    pub(crate) async fn report(&self, worker_id: String, report: Report) -> Result<()> {
        self.send(Message::Happened(Event::Report { worker_id, report })).await
    }

    async fn answer_to(&self, event: Event) -> Result<Job> {
        let (answer, given) = oneshot::channel();
        self.send(Message::Client { event, answer }).await?;
        given.await.map_err(|_| Error::Stopping)?
    }

    async fn send(&self, message: Message) -> Result<()> {
        self.messages.send(message).await.map_err(|_| Error::Stopping)
    }
}

struct Owner {
    state: State,
    clock: Clock,
    links: HashMap<String, WorkerLink>,
    /// By job; only those somebody has asked for and that are not over.
    followers: HashMap<String, watch::Sender<()>>,
    health: HealthReporter,
}

impl Owner {
    async fn run(mut self, mut inbox: mpsc::Receiver<Message>, stop: CancellationToken) {
        let mut tick = tokio::time::interval(TICK);
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                () = stop.cancelled() => return,
                _ = tick.tick() => self.apply(Event::Tick, None).await,
                message = inbox.recv() => match message {
                    Some(message) => self.take(message).await,
                    None => return,
                },
            }
        }
    }

    async fn take(&mut self, message: Message) {
        match message {
            Message::Client { event, answer } => self.apply(event, Some(answer)).await,
            Message::Read(look) => look(&self.state),
            Message::Follow { job_id, after, reply } => drop(reply.send(self.follow(job_id, after))),
            Message::Connected { worker, link } => {
                info!(worker.id = worker.worker_id, worker.address = worker.address, "worker connected");
                self.links.insert(worker.worker_id.clone(), link);
                self.apply(Event::WorkerJoined(worker), None).await;
            }
            Message::Happened(event) => {
                if let Event::WorkerLeft { worker_id, cause } = &event {
                    warn!(worker.id = worker_id, cause, "worker left");
                    self.links.remove(worker_id);
                }
                self.apply(event, None).await;
            }
        }
    }

    async fn apply(&mut self, event: Event, mut answer: Option<oneshot::Sender<Result<Job>>>) {
        for effect in self.state.apply(self.clock.now(), event) {
            match effect {
                Effect::Send { worker_id, command } => self.send(&worker_id, command),
                Effect::Answer(given) => {
                    if let Some(answer) = answer.take() {
                        drop(answer.send(given));
                    }
                }
                Effect::JobChanged { job_id, over } => self.wake_followers(&job_id, over),
                Effect::ModelReady { model, ready } => self.announce(&model, ready).await,
                Effect::GroupLost { group_id, epoch, cause } => {
                    warn!(group.id = group_id, group.epoch = epoch, cause, "group lost");
                }
            }
        }
    }

    fn send(&mut self, worker_id: &str, command: Command) {
        let Some(link) = self.links.get(worker_id) else {
            return;
        };
        if let Command::JoinGroup(join) = &command {
            let JoinGroup { group_id, epoch, rank, .. } = join;
            info!(group.id = group_id, group.epoch = epoch, rank, worker.id = worker_id, "rank asked to join");
        }
        if link.commands.try_send(ControlRequest { command: Some(command) }).is_err() {
            link.clogged.cancel();
        }
    }

    fn follow(&mut self, job_id: String, after: u64) -> Result<Followed> {
        let page = self.state.events_after(&job_id, after)?;
        let changed = if page.over {
            watch::channel(()).1
        } else {
            self.followers.entry(job_id).or_insert_with(|| watch::channel(()).0).subscribe()
        };
        Ok(Followed { page, changed })
    }

    fn wake_followers(&mut self, job_id: &str, over: bool) {
        if over {
            info!(job.id = job_id, "job over");
            // Dropping the sender wakes them a last time.
            self.followers.remove(job_id);
        } else if let Some(followers) = self.followers.get(job_id) {
            followers.send_replace(());
        }
    }

    async fn announce(&self, model: &str, ready: bool) {
        info!(model, ready, "model readiness changed");
        let status = if ready { ServingStatus::Serving } else { ServingStatus::NotServing };
        self.health.set_service_status(health_service(model), status).await;
    }
}

/// The name under which gRPC health tells whether a model is ready.
pub(crate) fn health_service(model: &str) -> String {
    format!("model/{model}")
}

/// Wall-clock time that never goes back.
struct Clock {
    at_start: Duration,
    start: Instant,
}

impl Clock {
    fn start() -> Self {
        let at_start = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        Self { at_start, start: Instant::now() }
    }

    fn now(&self) -> Millis {
        u64::try_from((self.at_start + self.start.elapsed()).as_millis()).unwrap_or(u64::MAX)
    }
}
