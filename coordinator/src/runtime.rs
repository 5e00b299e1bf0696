//! The one task that owns the [`State`]: takes messages one by one, carries out effects, wakes whoever watches.
//!
//! Everybody else holds a [`Handle`]. The task waits for nobody: a worker that does not read its commands is dropped,
//! and a slow watcher reads the job's log when it comes to it.

#[cfg(test)]
mod tests;

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

/// Answers and readings that wait until what they tell of is durable. More are refused, and can be asked again: a store that hangs
/// must not fill the memory.
const MAX_REPLIES: usize = 16 * 1024;
/// Deeds that wait, beyond which steps of jobs are not told: whoever watches is told of them with what comes next.
const MAX_WAITING: usize = 64 * 1024;
/// How long the store may take before clients are told that it does, rather than to wait: longer than any disk or election takes.
const STALLED: Duration = Duration::from_secs(10);
/// The name under which gRPC health tells whether this coordinator leads, and takes jobs.
pub(crate) const JOB_SERVICE: &str = "atelier.v1.JobService";

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

/// What a client is told, once it may be.
struct Told<T> {
    to: oneshot::Sender<Result<T>>,
    what: Result<T>,
}

trait Reply: Send {
    /// Somebody still waits for it.
    fn is_wanted(&self) -> bool;
    /// A client that has gone does not want to know.
    fn give(self: Box<Self>);
    fn refuse(self: Box<Self>, error: Error);
}

impl<T: Send> Reply for Told<T> {
    fn is_wanted(&self) -> bool {
        !self.to.is_closed()
    }

    fn give(self: Box<Self>) {
        drop(self.to.send(self.what));
    }

    fn refuse(self: Box<Self>, error: Error) {
        drop(self.to.send(Err(error)));
    }
}

/// Looks at the state, if it may; else says why not.
type Look = Box<dyn FnOnce(Result<&State>) -> Box<dyn Reply> + Send>;

enum Message {
    Client { event: Event, answer: oneshot::Sender<Result<Job>> },
    Read { look: Look, at_once: bool },
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
            replies: 0,
            stalled: false,
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
        self.ask(look, false).await
    }

    /// As [`Self::read`], of what need not be durable.
    pub(crate) async fn look<T: Send + 'static>(&self, look: impl FnOnce(&State) -> T + Send + 'static) -> Result<T> {
        self.ask(look, true).await
    }

    async fn ask<T: Send + 'static>(&self, look: impl FnOnce(&State) -> T + Send + 'static, at_once: bool) -> Result<T> {
        let (to, answer) = oneshot::channel();
        let look: Look = Box::new(move |state: Result<&State>| Box::new(Told { to, what: state.map(look) }));
        self.send(Message::Read { look, at_once }).await?;
        answer.await.map_err(|_| Error::Stopping)?
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
    Effect(Box<Effect>),
    Reply(Box<dyn Reply>),
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
    /// How many of them are replies.
    replies: usize,
    /// The store takes too long.
    stalled: bool,
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
                _ = tick.tick() => {
                    self.look_at_store().await;
                    self.apply(Event::Tick, None).await;
                }
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
            Message::Client { answer, .. } if self.stalled => drop(answer.send(Err(self.is_stalled()))),
            Message::Client { event, answer } => self.apply(event, Some(answer)).await,
            Message::Read { look, at_once: true } => look(Ok(&self.state)).give(),
            Message::Read { look, .. } if self.stalled => look(Err(self.is_stalled())).give(),
            Message::Read { look, .. } => {
                let reply = look(Ok(&self.state));
                self.commit(Deed::Reply(reply)).await;
            }
            Message::Measure(reply) => {
                let mut page = Page::default();
                self.state.measure(&mut page);
                self.writes.measure(&mut page);
                // A reader that has gone does not want to know.
                drop(reply.send(page));
            }
            Message::Follow { reply, .. } if self.stalled => drop(reply.send(Err(self.is_stalled()))),
            Message::Follow { job_id, after, reply } => {
                let what = self.follow(job_id, after);
                self.commit(Deed::Reply(Box::new(Told { to: reply, what }))).await;
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
                Effect::Answer(given) => {
                    let told = answer.take().map(|to| Told { to, what: given });
                    deeds.extend(told.map(|told| Deed::Reply(Box::new(told))));
                }
                Effect::JobChanged { job_id, over } => {
                    let tail = self.followers.any(&job_id).then(|| self.state.newest_events(&job_id).ok()).flatten();
                    let tail = tail.map(|(after, page)| Tail::new(after, page));
                    deeds.push(Deed::Tell { job_id, tail, over });
                }
                other => deeds.push(Deed::Effect(Box::new(other))),
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
            return self.carry_out(deed).await;
        }
        match deed {
            Deed::Reply(reply) if self.replies >= MAX_REPLIES => return reply.refuse(self.is_stalled()),
            Deed::Reply(_) => self.replies += 1,
            Deed::Tell { over: false, .. } if self.waiting.len() >= MAX_WAITING => return,
            _ => {}
        }
        self.waiting.push_back((self.written, deed));
    }

    /// What clients are told while nothing becomes durable.
    fn is_stalled(&self) -> Error {
        Error::StoreStalled { seconds: self.writes.waits().as_secs() }
    }

    /// Says so when the store takes too long, and when it does no longer. Nobody waits longer than that for an answer.
    async fn look_at_store(&mut self) {
        let stalled = self.writes.waits() > STALLED;
        if stalled != self.stalled {
            self.stalled = stalled;
            let status = if stalled { ServingStatus::NotServing } else { ServingStatus::Serving };
            self.health.set_service_status(JOB_SERVICE, status).await;
            if stalled {
                error!(seconds = STALLED.as_secs(), "the job store does not answer, nothing is accepted until it does");
            } else {
                info!("the job store answers again");
            }
        }
        if self.replies == 0 {
            return;
        }
        let mut kept = VecDeque::with_capacity(self.waiting.len());
        for (batch, deed) in std::mem::take(&mut self.waiting) {
            match deed {
                Deed::Reply(reply) if stalled => reply.refuse(self.is_stalled()),
                Deed::Reply(reply) if !reply.is_wanted() => {}
                deed => kept.push_back((batch, deed)),
            }
        }
        self.replies = kept.iter().filter(|(_, deed)| matches!(deed, Deed::Reply(_))).count();
        self.waiting = kept;
    }

    async fn release(&mut self) {
        let durable = self.durable.borrow().batch;
        self.writes.ended(durable);
        while let Some((_, deed)) = self.waiting.pop_front_if(|(batch, _)| *batch <= durable) {
            self.replies = self.replies.saturating_sub(usize::from(matches!(deed, Deed::Reply(_))));
            self.carry_out(deed).await;
        }
    }

    /// Nothing that waits will become durable: clients are told so, and nobody else is told anything.
    fn fail(&mut self, cause: String) -> Error {
        error!(cause, "the job store failed, nothing is accepted any more");
        for (_, deed) in self.waiting.drain(..) {
            if let Deed::Reply(reply) = deed {
                reply.refuse(Error::StoreFailed(cause.clone()));
            }
        }
        Error::StoreFailed(cause)
    }

    async fn carry_out(&mut self, deed: Deed) {
        match deed {
            Deed::Reply(reply) => reply.give(),
            Deed::Tell { job_id, tail, over } => {
                if over {
                    info!(job.id = job_id, trace_id = self.state.trace_id(&job_id), "job over");
                }
                self.followers.tell(&job_id, tail, over);
            }
            Deed::Effect(effect) => match *effect {
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
