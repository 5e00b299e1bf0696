//! One rank of one group, on a thread of its own: connect, load, then work until the group is over.
//!
//! Nothing here waits for tokio: commands come through a queue, and what becomes of a task goes into cells that take the
//! newest value ([`Sink`]), so a slow network never slows a step.

use std::collections::HashMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, TryRecvError};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use models::blocks::{Layout, RankGroup};
use models::control::ControlSource;
use models::lora::store::Sources;
use models::model_dir::Location;
use models::registry::{Limits, LoadProgress, Rank};
use models::stage::{Inputs, Stage, StageEvent, TaskKey};
use models::{Checkpoint, Payload, Request};
use parallel::ops::Products;
use parallel::tcp::{Hello, Rendezvous, Security, Tcp, Wire};
use tokio::sync::{oneshot, watch};

use crate::backend::{Backend, RankSpec};
use crate::counted::Counted;
use crate::memory::Memory;
use crate::meters::RankMeter;
use crate::spans::StageSpan;

/// How long the ranks of a group may take to find each other.
pub(crate) const CONNECT_TIMEOUT: Duration = Duration::from_secs(30);

/// What the leader's thread is told.
pub(crate) enum Command {
    /// Work on a task.
    Start { key: TaskKey, request: Box<Request>, inputs: Box<Inputs>, sink: Sink },
    /// Stop a task at its next step.
    Cancel { key: TaskKey },
    /// Stop a task at its next step, and give back what was done of it.
    Park { key: TaskKey },
    /// Look whether to stop: wakes a thread with nothing to do.
    Wake,
}

/// Where what becomes of a task goes.
pub(crate) struct Sink {
    pub(crate) progress: watch::Sender<Progress>,
    /// What has been done, after each step of a denoiser.
    pub(crate) states: watch::Sender<Option<Checkpoint>>,
    pub(crate) outcome: oneshot::Sender<Outcome>,
    pub(crate) began: Option<Instant>,
    /// When it began or made its last step.
    pub(crate) stepped: Option<(Instant, SystemTime)>,
    /// Its place in its job's trace.
    pub(crate) span: Option<Arc<StageSpan>>,
}

/// How far a task is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Progress {
    #[default]
    Waiting,
    Started,
    Step {
        step: usize,
        steps: usize,
    },
}

/// How a task ended.
pub(crate) enum Outcome {
    Done { payload: Payload, seconds: f64 },
    Failed { error: models::Error, step: usize },
}

/// How far a rank is.
#[derive(Clone, Debug)]
pub(crate) enum Status {
    Joining,
    Loading(LoadProgress),
    Ready,
}

/// Why a rank's thread ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct End {
    /// One word for programs.
    pub(crate) reason: &'static str,
    /// One sentence for people.
    pub(crate) message: String,
}

impl End {
    pub(crate) fn left() -> Self {
        Self { reason: "LEFT", message: "this rank was told to leave".into() }
    }

    pub(crate) fn internal(message: impl Into<String>) -> Self {
        Self { reason: "INTERNAL", message: message.into() }
    }

    pub(crate) fn load_failed(message: impl Into<String>) -> Self {
        Self { reason: "LOAD_FAILED", message: message.into() }
    }

    pub(crate) fn draining() -> Self {
        Self { reason: "DRAINING", message: "this worker is about to go".into() }
    }

    fn of(error: &models::Error) -> Self {
        let reason = if error.loses_group() { "PEER_LOST" } else { "INTERNAL" };
        Self { reason, message: error.to_string() }
    }
}

/// Tells a rank's thread to end, wherever it is.
#[derive(Debug, Default)]
pub(crate) struct Stop {
    asked: AtomicBool,
    link: Mutex<Option<Arc<Tcp>>>,
}

impl Stop {
    /// Ends the thread at its next turn; a collective that it waits in fails at once, here and on every peer.
    pub(crate) fn ask(&self) {
        self.asked.store(true, Ordering::SeqCst);
        if let Some(link) = self.take() {
            link.abort("a rank left the group");
        }
    }

    fn is_asked(&self) -> bool {
        self.asked.load(Ordering::SeqCst)
    }

    fn hold(&self, link: Arc<Tcp>) {
        *self.link.lock().unwrap_or_else(PoisonError::into_inner) = Some(link);
        if self.is_asked() {
            self.ask();
        }
    }

    fn take(&self) -> Option<Arc<Tcp>> {
        self.link.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}

/// All that a rank's thread is given.
pub(crate) struct Seat {
    pub(crate) rendezvous: Rendezvous,
    pub(crate) rank: usize,
    pub(crate) layout: Layout,
    pub(crate) data_addresses: Vec<String>,
    pub(crate) location: Location,
    pub(crate) component: String,
    pub(crate) fingerprint: String,
    /// What this rank multiplies in, whatever others of the process do.
    pub(crate) products: Products,
    pub(crate) limits: Limits,
    pub(crate) adapters: Sources,
    pub(crate) controls: Vec<ControlSource>,
    pub(crate) backend: Arc<dyn Backend>,
    pub(crate) accepted: Receiver<(Hello, Wire)>,
    pub(crate) security: Arc<dyn Security>,
    pub(crate) commands: Receiver<Command>,
    pub(crate) status: watch::Sender<Status>,
    pub(crate) stop: Arc<Stop>,
    pub(crate) meter: Arc<RankMeter>,
    /// Held while weights are: the next epoch's ranks wait for this one's memory.
    pub(crate) memory: Memory,
}

impl Seat {
    /// The whole life of the thread. A panic ends the rank, not the process.
    pub(crate) fn run(self) -> End {
        let (stop, products) = (self.stop.clone(), self.products);
        // All that it loads and computes is on this thread: its weights, its forwards, the adapters that jobs name.
        let ended = catch_unwind(AssertUnwindSafe(|| products.scope(|| self.connect_and_work())));
        // The peers must not wait for a rank that is gone.
        if let Some(link) = stop.take() {
            link.abort("a rank's thread ended");
        }
        match ended {
            _ if stop.is_asked() => End::left(),
            Ok(end) => end,
            Err(_) => End::internal("the rank's thread panicked"),
        }
    }

    fn connect_and_work(self) -> End {
        let group = match self.connect() {
            Ok(group) => group,
            Err(error) => return End::of(&error),
        };
        let _memory = self.memory.wait();
        if self.stop.is_asked() {
            return End::left();
        }
        let spec = RankSpec {
            location: &self.location,
            component: &self.component,
            fingerprint: &self.fingerprint,
            group,
            limits: self.limits,
            adapters: self.adapters.clone(),
            controls: self.controls.clone(),
        };
        let rank = self.backend.load(spec, &mut |progress| {
            self.meter.loads(progress.clone());
            self.status.send_replace(Status::Loading(progress));
        });
        let rank = match rank {
            Ok(rank) => rank,
            Err(error) if error.loses_group() => return End::of(&error),
            Err(error) => return End::load_failed(with_sources(&error)),
        };
        self.status.send_replace(Status::Ready);
        match rank {
            Rank::Leader(stage) => self.lead(stage),
            Rank::Follower(follower) => End::of(&follower.run()),
        }
    }

    fn connect(&self) -> models::Result<RankGroup> {
        if self.layout == Layout::SOLO {
            return Ok(RankGroup::solo());
        }
        let deadline = Instant::now() + CONNECT_TIMEOUT;
        let link = Tcp::connect(&self.rendezvous, self.rank, &self.data_addresses, &self.accepted, &*self.security, deadline)?;
        let link = Arc::new(link);
        self.stop.hold(link.clone());
        let link = parallel::device::link(link, &self.backend.device())?;
        RankGroup::new(Arc::new(Counted { link, traffic: self.meter.traffic.clone() }), self.layout)
    }

    /// The leader: one turn of the stage after the other, commands in between.
    fn lead(&self, mut stage: Box<dyn Stage>) -> End {
        let mut sinks = HashMap::new();
        loop {
            loop {
                match self.commands.try_recv() {
                    Ok(command) => obey(command, &mut *stage, &mut sinks),
                    Err(TryRecvError::Empty) => break,
                    Err(TryRecvError::Disconnected) => return End::left(),
                }
            }
            if self.stop.is_asked() {
                return End::left();
            }
            let turned = stage.turn(&mut |event| deliver(event, &mut sinks, &self.meter));
            self.meter.forwards(stage.forwards());
            match turned {
                Ok(true) => {}
                Ok(false) => match self.commands.recv() {
                    Ok(command) => obey(command, &mut *stage, &mut sinks),
                    Err(_) => return End::left(),
                },
                Err(error) => return End::of(&error),
            }
        }
    }
}

fn obey(command: Command, stage: &mut dyn Stage, sinks: &mut HashMap<TaskKey, Sink>) {
    match command {
        Command::Start { key, request, inputs, sink } => {
            sinks.insert(key, sink);
            stage.start(key, *request, *inputs);
        }
        Command::Cancel { key } => stage.cancel(key),
        Command::Park { key } => stage.park(key),
        Command::Wake => {}
    }
}

fn deliver(event: StageEvent<'_>, sinks: &mut HashMap<TaskKey, Sink>, meter: &RankMeter) {
    match event {
        StageEvent::Started { key } => {
            if let Some(sink) = sinks.get_mut(&key) {
                let now = Instant::now();
                (sink.began, sink.stepped) = (Some(now), Some((now, SystemTime::now())));
                if let Some(span) = &sink.span {
                    tracing::info!(
                        trace_id = span.trace_id(),
                        group.id = meter.group_id,
                        rank = meter.rank,
                        "a rank begins a task"
                    );
                }
                sink.progress.send_replace(Progress::Started);
            }
        }
        StageEvent::Step { key, step, steps, state } => {
            if let Some(sink) = sinks.get_mut(&key) {
                let now = Instant::now();
                if let Some((before, since)) = sink.stepped.replace((now, SystemTime::now())) {
                    meter.stepped(now.duration_since(before));
                    if let Some(span) = &sink.span {
                        span.stepped(step, steps, since);
                    }
                }
                if let Some(state) = state {
                    sink.states.send_replace(Some(state.checkpoint()));
                }
                sink.progress.send_replace(Progress::Step { step, steps });
            }
        }
        StageEvent::Done { key, payload } => {
            if let Some(sink) = sinks.remove(&key) {
                let seconds = sink.began.map_or(0.0, |began| began.elapsed().as_secs_f64());
                // Nobody listens when the task was given up meanwhile.
                drop(sink.outcome.send(Outcome::Done { payload, seconds }));
            }
        }
        StageEvent::Failed { key, error, step } => {
            if let Some(sink) = sinks.remove(&key) {
                drop(sink.outcome.send(Outcome::Failed { error, step }));
            }
        }
    }
}

/// An error and what caused it, in one line.
fn with_sources(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text = format!("{text}: {cause}");
        source = cause.source();
    }
    text
}
