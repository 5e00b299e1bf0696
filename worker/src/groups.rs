//! The ranks this worker holds, and a tokio task beside each rank's thread that tells the coordinator how it is.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{SyncSender, sync_channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use models::blocks::Layout;
use models::registry::Limits;
use parallel::tcp::Rendezvous;
use proto::v1::control_response::Report;
use proto::v1::{GroupLoading, GroupLost, GroupReady, HeldRank, JoinGroup, LeaveGroup};
use tokio::sync::{oneshot, watch};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::backend::Backend;
use crate::cards::location;
use crate::inbox::TaskId;
use crate::memory::{Memory, Seats};
use crate::meters::RankMeter;
use crate::outbox::Reports;
use crate::rank::{CONNECT_TIMEOUT, Command, End, Seat, Status, Stop};
use crate::routes::{Routes, Seated};
use crate::{Error, Result, adapter_wire, control_wire, products};

/// Tasks a worker has at once, over all its groups. The coordinator keeps within `max_jobs` of each group; this is for when
/// it does not.
pub(crate) const MAX_TASKS: usize = 1024;
/// Commands on their way to a leader's thread: each task is started, parked and cancelled once.
const MAX_COMMANDS: usize = 3 * MAX_TASKS + 1;
/// How often loading is told at most.
const LOADING_INTERVAL: Duration = Duration::from_millis(200);
/// Most ranks in a group: each has a connection and a thread per peer.
const MAX_RANKS: usize = 64;
/// Most adapters of a model; the same as models.toml may name.
const MAX_ADAPTERS: usize = 256;
/// Most control networks of a model; the same as models.toml may name.
const MAX_CONTROLS: usize = 16;
/// Longest id of a group and longest secret; both are in the first words of a data connection.
const MAX_ID_BYTES: usize = 200;

/// The ranks this worker holds.
pub(crate) struct Groups {
    backend: Arc<dyn Backend>,
    routes: Arc<Routes>,
    caches: CacheBytes,
    load_timeout: Duration,
    reports: Reports,
    /// No more seats are taken.
    closed: AtomicBool,
    /// Seats are taken, and every rank that is held is ready.
    settled: watch::Sender<bool>,
    table: Mutex<Table>,
    attendants: TaskTracker,
}

/// Bytes that a rank keeps for jobs that come again.
#[derive(Clone, Copy, Debug)]
pub(crate) struct CacheBytes {
    /// Of prompt embeddings.
    pub(crate) prompts: usize,
    /// Of adapters.
    pub(crate) adapters: u64,
}

#[derive(Default)]
struct Table {
    /// By group and rank.
    held: HashMap<(String, usize), Held>,
    /// Whose weights are still there, of those that were held too.
    memory: Seats,
}

struct Held {
    /// As it was told to join, with what it multiplies in even if that was left out; the secret left out.
    join: JoinGroup,
    ready: Arc<AtomicBool>,
    epoch: u64,
    leader: Leader,
    stop: Arc<Stop>,
    meter: Arc<RankMeter>,
}

/// The way to a leader's thread.
#[derive(Clone)]
pub(crate) struct Leader {
    pub(crate) commands: SyncSender<Command>,
    /// Cancelled when the group's epoch is over.
    pub(crate) ended: CancellationToken,
    /// The model's directory.
    pub(crate) path: PathBuf,
    /// What the group is multiplied in.
    pub(crate) products: proto::v1::Products,
}

impl Groups {
    pub(crate) fn new(
        backend: Arc<dyn Backend>,
        routes: Arc<Routes>,
        caches: CacheBytes,
        load_timeout: Duration,
        reports: Reports,
    ) -> Arc<Self> {
        let attendants = TaskTracker::new();
        attendants.close();
        let (closed, table) = (AtomicBool::new(false), Mutex::default());
        let settled = watch::Sender::new(true);
        Arc::new(Self { backend, routes, caches, load_timeout, reports, closed, settled, table, attendants })
    }

    /// Takes no more seats.
    pub(crate) fn close(&self) {
        self.closed.store(true, Ordering::SeqCst);
        self.note_settled(&self.table());
    }

    /// Whether seats are taken and every rank that is held is ready.
    pub(crate) fn settled(&self) -> watch::Receiver<bool> {
        self.settled.subscribe()
    }

    /// Whether no more seats are taken.
    pub(crate) fn is_closed(&self) -> bool {
        self.closed.load(Ordering::SeqCst)
    }

    /// Whether none is held.
    pub(crate) fn is_empty(&self) -> bool {
        self.table().held.is_empty()
    }

    /// The ranks that are held.
    pub(crate) fn held(&self) -> Vec<HeldRank> {
        let table = self.table();
        let ranks = table.held.values();
        ranks.map(|held| HeldRank { join: Some(held.join.clone()), ready: held.ready.load(Ordering::SeqCst) }).collect()
    }

    /// What the ranks that are held count, and whether each is ready.
    pub(crate) fn meters(&self) -> Vec<(Arc<RankMeter>, bool)> {
        let table = self.table();
        table.held.values().map(|held| (held.meter.clone(), held.ready.load(Ordering::SeqCst))).collect()
    }

    /// Takes a seat in a group. Older epochs of it end first.
    pub(crate) async fn join(self: &Arc<Self>, join: JoinGroup) {
        let refused = match check(&join) {
            Ok(layout) => self.sit_down(&join, layout).err(),
            Err(error) => Some(End::internal(error.to_string())),
        };
        if let Some(end) = refused {
            tracing::warn!(group.id = join.group_id, group.epoch = join.epoch, rank = join.rank, end.message, "refused to join");
            self.reports.send(lost(&join, end)).await;
        }
    }

    /// Gives a group up.
    pub(crate) fn leave(&self, leave: &LeaveGroup) {
        self.end_where(|group_id, held| *group_id == leave.group_id && held.epoch == leave.epoch);
    }

    /// Gives all groups up.
    pub(crate) fn leave_all(&self) {
        self.end_where(|_, _| true);
    }

    /// Returns when every rank's end has been told.
    pub(crate) async fn all_left(&self) {
        self.attendants.wait().await;
    }

    /// The way to the leader `task` is for, if it is here and in that epoch.
    pub(crate) fn leader(&self, task: &TaskId) -> Result<Leader> {
        let table = self.table();
        let held = table.held.get(&(task.group_id.clone(), 0)).filter(|held| held.epoch == task.epoch);
        let stale = || Error::StaleEpoch { group_id: task.group_id.clone(), epoch: task.epoch };
        held.map(|held| held.leader.clone()).ok_or_else(stale)
    }

    fn sit_down(self: &Arc<Self>, join: &JoinGroup, layout: Layout) -> Result<(), End> {
        let rank = join.rank as usize;
        let newest = self.table().held.iter().filter(|((id, _), _)| *id == join.group_id).map(|(_, held)| held.epoch).max();
        if let Some(newest) = newest.filter(|newest| *newest > join.epoch) {
            return Err(End::internal(format!("this worker holds epoch {newest} of the group")));
        }
        if self.is_held(join) {
            tracing::warn!(group.id = join.group_id, group.epoch = join.epoch, rank, "told to join twice");
            return Ok(());
        }
        if self.is_closed() {
            return Err(End::draining());
        }
        let device = self.backend.device();
        let products = products::of_join(join, &device).map_err(|error| End::load_failed(error.to_string()))?;
        if device.is_cpu() && products.is_imitated() {
            let group_id = &join.group_id;
            tracing::warn!(group.id = group_id, %products, "this CPU has no such instructions, or slow ones: the same bits, no faster than f32");
        }
        self.end_where(|group_id, held| *group_id == join.group_id && held.epoch < join.epoch);

        let seated = Seated { group_id: join.group_id.clone(), epoch: join.epoch, rank };
        let (commands, to_obey) = sync_channel(MAX_COMMANDS);
        let (status, watched) = watch::channel(Status::Joining);
        let (ended, end) = oneshot::channel();
        let stop = Arc::new(Stop::default());
        let (location, said) = (location(&join.path, &join.refiner_path), products::to_wire(products));
        let leader = Leader { commands, ended: CancellationToken::new(), path: location.path.clone(), products: said };
        let meter = RankMeter::new(&join.model, &join.component, &join.group_id, rank);
        let seat = Seat {
            rendezvous: Rendezvous { group_id: join.group_id.clone(), epoch: join.epoch, secret: join.secret.to_vec() },
            rank,
            layout,
            data_addresses: join.data_addresses.clone(),
            location,
            component: join.component.clone(),
            fingerprint: join.fingerprint.clone(),
            products,
            limits: self.limits(join),
            adapters: adapter_wire::sources(join, self.caches.adapters),
            controls: join.controls.iter().map(control_wire::source).collect(),
            backend: self.backend.clone(),
            accepted: self.routes.expect(&seated),
            security: self.routes.security.clone(),
            commands: to_obey,
            status,
            stop: stop.clone(),
            meter: meter.clone(),
            memory: self.memory(join),
        };
        // The attendant is gone only when the whole runtime is.
        let live = move || drop(ended.send(seat.run()));
        let name = format!("rank-{}-{rank}", join.group_id);
        if let Err(error) = thread::Builder::new().name(name).spawn(live) {
            self.routes.forget(&seated);
            return Err(End::internal(format!("could not start the rank's thread: {error}")));
        }
        tracing::info!(group.id = join.group_id, group.epoch = join.epoch, rank, component = join.component, "joining a group");
        let ready = Arc::new(AtomicBool::new(false));
        let shown = JoinGroup { secret: bytes::Bytes::new(), products: said.into(), ..join.clone() };
        let held = Held { join: shown, ready: ready.clone(), epoch: join.epoch, leader, stop: stop.clone(), meter };
        {
            let mut table = self.table();
            table.held.insert((join.group_id.clone(), rank), held);
            self.note_settled(&table);
        }
        let attendant = Attendant { groups: self.clone(), seated, stop, ready, status: watched, end };
        self.attendants.spawn(attendant.attend());
        Ok(())
    }

    fn is_held(&self, join: &JoinGroup) -> bool {
        let table = self.table();
        let held = table.held.get(&(join.group_id.clone(), join.rank as usize));
        held.is_some_and(|held| held.epoch == join.epoch)
    }

    fn limits(&self, join: &JoinGroup) -> Limits {
        let Limits { max_batch, max_jobs, .. } = Limits::default();
        let or = |given: u32, default| if given == 0 { default } else { given as usize };
        Limits {
            max_batch: or(join.max_batch, max_batch),
            max_jobs: or(join.max_jobs, max_jobs),
            prompt_cache_bytes: self.caches.prompts,
        }
    }

    fn memory(&self, join: &JoinGroup) -> Memory {
        self.table().memory.take(&join.group_id, join.epoch)
    }

    fn end_where(&self, which: impl Fn(&String, &Held) -> bool) {
        let ended: Vec<_> = {
            let mut table = self.table();
            let ended = table.held.extract_if(|(group_id, _), held| which(group_id, held)).collect();
            self.note_settled(&table);
            ended
        };
        for ((group_id, rank), held) in ended {
            self.routes.forget(&Seated { group_id, epoch: held.epoch, rank });
            held.end();
        }
    }

    /// Takes a rank out whose thread has ended by itself.
    fn ended(&self, seated: &Seated, stop: &Arc<Stop>) {
        self.routes.forget(seated);
        let key = (seated.group_id.clone(), seated.rank);
        let mut table = self.table();
        if table.held.get(&key).is_some_and(|held| Arc::ptr_eq(&held.stop, stop))
            && let Some(held) = table.held.remove(&key)
        {
            self.note_settled(&table);
            drop(table);
            held.end();
        }
    }

    /// To be called whenever what it depends on has changed; under the lock, so that the newest is told last.
    fn note_settled(&self, table: &Table) {
        let settled = !self.is_closed() && table.held.values().all(|held| held.ready.load(Ordering::SeqCst));
        self.settled.send_if_modified(|told| std::mem::replace(told, settled) != settled);
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Held {
    fn end(self) {
        self.stop.ask();
        self.leader.ended.cancel();
        // When the queue is full the thread is not asleep, and sees that it was asked.
        drop(self.leader.commands.try_send(Command::Wake));
    }
}

/// Beside a rank's thread: tells what it does until it ends.
struct Attendant {
    groups: Arc<Groups>,
    seated: Seated,
    stop: Arc<Stop>,
    ready: Arc<AtomicBool>,
    status: watch::Receiver<Status>,
    end: oneshot::Receiver<End>,
}

impl Attendant {
    async fn attend(mut self) {
        let end = self.until_end().await;
        let Seated { group_id, epoch, rank } = self.seated.clone();
        self.groups.ended(&self.seated, &self.stop);
        tracing::info!(group.id = group_id, group.epoch = epoch, rank, end.reason, end.message, "a rank ended");
        let End { reason, message } = end;
        let lost = GroupLost { group_id, epoch, rank: rank as u32, reason: reason.into(), message };
        self.groups.reports.send(Report::GroupLost(lost)).await;
    }

    async fn until_end(&mut self) -> End {
        let timeout = CONNECT_TIMEOUT + self.groups.load_timeout;
        let deadline = tokio::time::sleep(timeout);
        tokio::pin!(deadline);
        let mut tick = tokio::time::interval(LOADING_INTERVAL);
        let mut told = None;
        let mut ready = false;
        loop {
            tokio::select! {
                end = &mut self.end => return end.unwrap_or_else(|_| End::internal("the rank's thread vanished")),
                () = &mut deadline, if !ready => {
                    return End::load_failed(format!("it was not ready within {} s", timeout.as_secs()));
                }
                _ = tick.tick(), if !ready => {}
                changed = self.status.changed(), if !ready => if changed.is_err() {
                    // The thread lets go of its status last but for its end.
                    return (&mut self.end).await.unwrap_or_else(|_| End::internal("the rank's thread vanished"));
                }
            }
            let status = self.status.borrow_and_update().clone();
            let (group_id, epoch, rank) = (self.seated.group_id.clone(), self.seated.epoch, self.seated.rank as u32);
            match status {
                Status::Joining => {}
                Status::Loading(progress) => {
                    let read = progress.read();
                    if told != Some(read) {
                        told = Some(read);
                        let (loaded_bytes, total_bytes) = (read, progress.total);
                        let loading = GroupLoading { group_id, epoch, rank, loaded_bytes, total_bytes };
                        self.groups.reports.send(Report::GroupLoading(loading)).await;
                    }
                }
                Status::Ready => {
                    ready = true;
                    // Before it is told: a coordinator that comes between the two learns it twice.
                    self.ready.store(true, Ordering::SeqCst);
                    self.groups.note_settled(&self.groups.table());
                    tracing::info!(group.id = group_id, group.epoch = epoch, rank, "a rank is ready");
                    self.groups.reports.send(Report::GroupReady(GroupReady { group_id, epoch, rank })).await;
                }
            }
        }
    }
}

fn lost(join: &JoinGroup, end: End) -> Report {
    Report::GroupLost(GroupLost {
        group_id: join.group_id.clone(),
        epoch: join.epoch,
        rank: join.rank,
        reason: end.reason.into(),
        message: end.message,
    })
}

/// What every rank relies on.
fn check(join: &JoinGroup) -> Result<Layout> {
    let id = &join.group_id;
    if id.is_empty() || id.len() > MAX_ID_BYTES || id.chars().any(char::is_control) {
        return Err(Error::message("group_id", format!("must have 1 to {MAX_ID_BYTES} bytes, none of them a control character")));
    }
    if join.adapters.len() > MAX_ADAPTERS {
        return Err(Error::message("adapters", format!("may be {MAX_ADAPTERS} at most")));
    }
    if join.controls.len() > MAX_CONTROLS {
        return Err(Error::message("controls", format!("may be {MAX_CONTROLS} at most")));
    }
    if join.secret.len() > MAX_ID_BYTES {
        return Err(Error::message("secret", format!("may have {MAX_ID_BYTES} bytes at most")));
    }
    let layout = join.layout.unwrap_or_default();
    let ranks = usize::try_from(layout.ranks()).ok().filter(|ranks| (1..=MAX_RANKS).contains(ranks));
    let layout = Layout::new(layout.tp as usize, layout.block_ranges as usize).with_cfg_parallel(layout.lanes() as usize);
    let ranks = ranks.ok_or_else(|| Error::message("layout", format!("must have 1 to {MAX_RANKS} ranks")))?;
    if join.rank as usize >= ranks || (ranks > 1 && join.data_addresses.len() != ranks) {
        return Err(Error::message("rank", format!("{} of {ranks}, with {} addresses", join.rank, join.data_addresses.len())));
    }
    Ok(layout)
}
