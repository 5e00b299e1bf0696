//! The one task that owns the [`State`]: takes messages one by one, carries out effects, wakes whoever watches.
//!
//! Everybody else holds a [`Handle`]. The task waits for nobody: a worker that does not read its commands is dropped,
//! and a slow watcher reads the job's log when it comes to it.

use std::{
    collections::{BTreeMap, VecDeque},
    sync::Arc,
    time::Duration,
};

use proto::v1::{ControlRequest, Holding, Job, JoinGroup, Registration, control_request::Command, control_response::Report};
use telemetry::Page;
use tokio::{
    sync::{mpsc, oneshot, watch},
    task::JoinHandle,
};
use tokio_util::sync::CancellationToken;
use tonic_health::{ServingStatus, server::HealthReporter};
use tracing::{error, info, warn};

use crate::{
    checkpoints::DoneWith,
    context::Context,
    error::{Error, Result},
    followers::{Followers, Tail},
    live::LiveJobs,
    state::{Effect, Event, EventPage, State, Submission, TenantLimits},
    store::{Change, Durable, StoreHandle, Writes},
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

/// What the task works with.
pub(crate) struct Parts {
    pub(crate) state: State,
    pub(crate) context: Arc<Context>,
    pub(crate) health: HealthReporter,
    pub(crate) store: StoreHandle,
    pub(crate) live: LiveJobs,
    /// Where jobs go whose checkpoints are not needed any more.
    pub(crate) done_with: DoneWith,
}

/// Hands out what was read.
type Show = Box<dyn FnOnce() + Send>;

enum Message {
    Client { event: Event, answer: oneshot::Sender<Result<Job>> },
    Read(Box<dyn FnOnce(&State) -> Show + Send>),
    Follow { job_id: String, after: u64, reply: oneshot::Sender<Result<Followed>> },
    Measure(oneshot::Sender<Page>),
    Connected { worker: Registration, holding: Holding, link: WorkerLink },
    Happened(Event),
}

/// A job's next events, and what changes when there are more.
#[derive(Debug)]
pub(crate) struct Followed {
    pub(crate) page: EventPage,
    /// What comes next, if this was all; closes when the coordinator stops, or after the job's last event.
    pub(crate) next: Option<watch::Receiver<Tail>>,
}

/// The way to a worker.
#[derive(Debug)]
pub(crate) struct WorkerLink {
    pub(crate) commands: mpsc::Sender<ControlRequest>,
    /// Cancelled when the worker does not read its commands.
    pub(crate) clogged: CancellationToken,
}

impl Handle {
    /// Starts the task. It ends when `stop` is cancelled, or with an error when the store is broken; from then on every call
    /// is [`Error::Stopping`].
    pub(crate) fn spawn(parts: Parts, stop: CancellationToken) -> (Self, JoinHandle<Result<()>>) {
        let (messages, inbox) = mpsc::channel(MAX_MESSAGES);
        let Parts { state, context, health, store, live, done_with } = parts;
        let durable = store.durable();
        let owner = Owner {
            state,
            context,
            links: BTreeMap::new(),
            followers: Followers::default(),
            health,
            store,
            durable,
            live,
            written: 0,
            writes: Writes::default(),
            waiting: VecDeque::new(),
            done_with,
        };
        (Self { messages }, tokio::spawn(owner.run(inbox, stop)))
    }

    /// Accepts a job.
    pub(crate) async fn submit(&self, submission: Submission) -> Result<Job> {
        self.answer_to(Event::Submit(Box::new(submission))).await
    }

    /// Asks a job to stop.
    pub(crate) async fn cancel(&self, job_id: String) -> Result<Job> {
        self.answer_to(Event::Cancel { job_id }).await
    }

    /// What tenants may use from now on.
    pub(crate) async fn tenants(&self, limits: BTreeMap<String, TenantLimits>) -> Result<()> {
        self.send(Message::Happened(Event::Tenants(limits))).await
    }

    /// Looks at the state.
    pub(crate) async fn read<T: Send + 'static>(&self, look: impl FnOnce(&State) -> T + Send + 'static) -> Result<T> {
        let (reply, answer) = oneshot::channel();
        // A client that has gone does not want to know.
        let read = move |state: &State| -> Show {
            let seen = look(state);
            Box::new(move || drop(reply.send(seen)))
        };
        self.send(Message::Read(Box::new(read))).await?;
        answer.await.map_err(|_| Error::Stopping)
    }

    /// What Prometheus is told. It waits for nothing to be durable: a store that hangs is to be seen.
    pub(crate) async fn measure(&self) -> Result<Page> {
        let (reply, answer) = oneshot::channel();
        self.send(Message::Measure(reply)).await?;
        answer.await.map_err(|_| Error::Stopping)
    }

    /// Reads a job's events after `after`.
    pub(crate) async fn follow(&self, job_id: String, after: u64) -> Result<Followed> {
        let (reply, answer) = oneshot::channel();
        self.send(Message::Follow { job_id, after, reply }).await?;
        answer.await.map_err(|_| Error::Stopping)?
    }

    /// A worker can be commanded from now on.
    pub(crate) async fn connected(&self, worker: Registration, holding: Holding, link: WorkerLink) -> Result<()> {
        self.send(Message::Connected { worker, holding, link }).await
    }

    /// A worker cannot be commanded for the moment; [`Self::connected`] or [`Self::disconnected`] follows within seconds.
    pub(crate) async fn away(&self, worker_id: String) -> Result<()> {
        self.send(Message::Happened(Event::WorkerAway { worker_id })).await
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

/// Something to be done once all that was written before it is durable.
enum Deed {
    Effect(Effect),
    Answer {
        answer: oneshot::Sender<Result<Job>>,
        given: Result<Job>,
    },
    /// Hands a client what it asked to read.
    Show(Show),
    /// Tells those who watch a job, if there are any.
    Tell {
        job_id: String,
        tail: Option<Tail>,
        over: bool,
    },
}

struct Owner {
    state: State,
    context: Arc<Context>,
    links: BTreeMap<String, WorkerLink>,
    followers: Followers,
    health: HealthReporter,
    store: StoreHandle,
    durable: watch::Receiver<Durable>,
    live: LiveJobs,
    /// The newest batch that was given to the store.
    written: u64,
    /// How long batches take to be durable.
    writes: Writes,
    /// In order, each with the batch it waits for.
    waiting: VecDeque<(u64, Deed)>,
    /// Jobs whose checkpoints are not needed any more.
    done_with: DoneWith,
}

impl Owner {
    /// Ends with an error when the store is broken.
    async fn run(mut self, mut inbox: mpsc::Receiver<Message>, stop: CancellationToken) -> Result<()> {
        let mut tick = tokio::time::interval(TICK);
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                biased;
                () = stop.cancelled() => return Ok(()),
                _ = tick.tick() => self.apply(Event::Tick, None).await,
                changed = self.durable.changed() => {
                    let failed = self.durable.borrow_and_update().failed.clone();
                    let failed = failed.or_else(|| changed.is_err().then(|| "its thread has ended".to_owned()));
                    if let Some(cause) = failed {
                        return Err(self.fail(cause));
                    }
                    self.release().await;
                }
                message = inbox.recv() => match message {
                    Some(message) => self.take(message).await,
                    None => return Ok(()),
                },
            }
        }
    }

    async fn take(&mut self, message: Message) {
        match message {
            Message::Client { event, answer } => self.apply(event, Some(answer)).await,
            Message::Read(look) => {
                let show = look(&self.state);
                self.commit(Deed::Show(show)).await;
            }
            Message::Measure(reply) => {
                let mut page = Page::default();
                self.state.measure(&mut page);
                self.writes.measure(&mut page);
                // A reader that has gone does not want to know.
                drop(reply.send(page));
            }
            Message::Follow { job_id, after, reply } => {
                let followed = self.follow(job_id, after);
                self.commit(Deed::Show(Box::new(move || drop(reply.send(followed))))).await;
            }
            Message::Connected { worker, holding, link } => {
                info!(worker.id = worker.worker_id, worker.address = worker.address, "worker connected");
                self.links.insert(worker.worker_id.clone(), link);
                self.apply(Event::WorkerJoined { worker, holding }, None).await;
            }
            Message::Happened(event) => {
                match &event {
                    Event::WorkerAway { worker_id } => drop(self.links.remove(worker_id)),
                    Event::WorkerLeft { worker_id, cause } => {
                        warn!(worker.id = worker_id, cause, "worker left");
                        self.links.remove(worker_id);
                    }
                    _ => {}
                }
                self.apply(event, None).await;
            }
        }
    }

    /// What is to be written goes to the store at once; all else waits until it is durable, in order. So nobody is ever
    /// told, or told to do, anything that a crash could take back.
    async fn apply(&mut self, event: Event, mut answer: Option<oneshot::Sender<Result<Job>>>) {
        let mut changes = Vec::new();
        let mut deeds = Vec::new();
        let effects = self.state.apply(self.context.now(), event);
        self.state.take_spans().into_iter().for_each(telemetry::record);
        for effect in effects {
            match effect {
                Effect::Persist(record) => {
                    self.live.note(&record);
                    changes.push(Change::Put(record));
                }
                Effect::PersistGroup(record) => changes.push(Change::Group(record)),
                Effect::Forget { job_id } => changes.push(Change::Forget { job_id }),
                Effect::Answer(given) => deeds.extend(answer.take().map(|answer| Deed::Answer { answer, given })),
                Effect::JobChanged { job_id, over } => {
                    let tail = self.followers.any(&job_id).then(|| self.state.newest_events(&job_id).ok()).flatten();
                    let tail = tail.map(|(after, page)| Tail::new(after, page));
                    deeds.push(Deed::Tell { job_id, tail, over });
                }
                other => deeds.push(Deed::Effect(other)),
            }
        }
        if !changes.is_empty() {
            self.written = self.store.write(changes);
            self.writes.began(self.written);
        }
        for deed in deeds {
            self.commit(deed).await;
        }
    }

    async fn commit(&mut self, deed: Deed) {
        if self.waiting.is_empty() && self.durable.borrow().batch >= self.written {
            self.carry_out(deed).await;
        } else {
            self.waiting.push_back((self.written, deed));
        }
    }

    async fn release(&mut self) {
        let durable = self.durable.borrow().batch;
        self.writes.ended(durable);
        while let Some((_, deed)) = self.waiting.pop_front_if(|(batch, _)| *batch <= durable) {
            self.carry_out(deed).await;
        }
    }

    /// Nothing that waits will become durable: clients are told so, and nobody else is told anything.
    fn fail(&mut self, cause: String) -> Error {
        error!(cause, "the job store failed, nothing is accepted any more");
        for (_, deed) in self.waiting.drain(..) {
            if let Deed::Answer { answer, .. } = deed {
                drop(answer.send(Err(Error::StoreFailed(cause.clone()))));
            }
        }
        Error::StoreFailed(cause)
    }

    async fn carry_out(&mut self, deed: Deed) {
        match deed {
            Deed::Answer { answer, given } => drop(answer.send(given)),
            Deed::Show(show) => show(),
            Deed::Tell { job_id, tail, over } => {
                if over {
                    info!(job.id = job_id, trace_id = self.state.trace_id(&job_id), "job over");
                }
                self.followers.tell(&job_id, tail, over);
            }
            Deed::Effect(effect) => match effect {
                Effect::Send { worker_id, command } => self.send(&worker_id, command),
                Effect::ModelReady { model, ready } => self.announce(&model, ready).await,
                Effect::GroupLost { group_id, epoch, cause } => {
                    warn!(group.id = group_id, group.epoch = epoch, cause, "group lost");
                }
                Effect::DropCheckpoints { job_id, goes_on: false } => self.done_with.with_job(job_id),
                // Said before the next try is given to workers: what they store of it comes later.
                Effect::DropCheckpoints { job_id, goes_on: true } => self.done_with.with_what_there_is(job_id),
                Effect::Persist(_)
                | Effect::PersistGroup(_)
                | Effect::Forget { .. }
                | Effect::Answer(_)
                | Effect::JobChanged { .. } => {}
            },
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
        let at_the_end = page.events.is_empty() && !page.over;
        let next = at_the_end.then(|| self.followers.subscribe(job_id));
        Ok(Followed { page, next })
    }

    async fn announce(&mut self, model: &str, ready: bool) {
        info!(model, ready, "model readiness changed");
        let status = if ready { ServingStatus::Serving } else { ServingStatus::NotServing };
        self.health.set_service_status(health_service(model), status).await;
    }
}

/// The name under which gRPC health tells whether a model is ready.
pub(crate) fn health_service(model: &str) -> String {
    format!("model/{model}")
}
