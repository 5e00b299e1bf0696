//! One group: who holds which rank, how far the ranks are, and the tasks it has.

use std::collections::BTreeSet;

use proto::v1::{GroupState, GroupStatus};

use super::{FIRST_RETRY, LAST_RETRY, Millis, REFORM_PAUSE, stuck::Pace};
use crate::placement::{Members, WantedGroup};

/// A group that models.toml asks for, formed or not.
#[derive(Debug)]
pub(super) struct Group {
    pub(super) wanted: WantedGroup,
    /// Its place among all that are asked for.
    pub(super) order: usize,
    /// Most tasks at once.
    pub(super) limit: usize,
    /// Its incarnation. Counts up each time it forms.
    pub(super) epoch: u64,
    /// The newest epoch that any coordinator has begun, as far as it was written down.
    newest: u64,
    /// No epoch that begins is earlier.
    first_epoch: u64,
    pub(super) phase: GroupState,
    /// In rank order; empty while it waits.
    pub(super) members: Members,
    /// Why it ended last; empty once it is ready again.
    pub(super) problem: String,
    /// It forms no earlier than this.
    pub(super) retry_at: Millis,
    /// The tasks it has: number of the job and id of the stage.
    pub(super) tasks: BTreeSet<(u64, String)>,
    /// Its only job may be one that kills workers: no other is given to it meanwhile.
    pub(super) alone: bool,
    /// How it gets on.
    pub(super) pace: Pace,
    ranks: Vec<Rank>,
    /// Times it ended since it was ready last.
    failures: u32,
    /// Who held the ranks of the epoch that ended last.
    former: Members,
    /// Workers that could not load a rank of it since it was ready last: others go before them.
    passed_over: BTreeSet<String>,
}

#[derive(Debug, Default, Clone)]
struct Rank {
    ready: bool,
    loaded_bytes: u64,
    total_bytes: u64,
}

impl Group {
    pub(super) fn new(wanted: WantedGroup, limit: usize, newest: u64, first_epoch: u64) -> Self {
        Self {
            wanted,
            order: 0,
            limit,
            epoch: newest,
            newest,
            first_epoch,
            phase: GroupState::Waiting,
            members: Members::new(),
            problem: String::new(),
            retry_at: 0,
            tasks: BTreeSet::new(),
            alone: false,
            pace: Pace::default(),
            ranks: Vec::new(),
            failures: 0,
            former: Members::new(),
            passed_over: BTreeSet::new(),
        }
    }

    /// The next epoch begins with these members. Says whether there was nobody but such as could not load it.
    pub(super) fn begin(&mut self, members: Members) -> bool {
        self.epoch = (self.newest + 1).max(self.first_epoch);
        self.newest = self.epoch;
        self.phase = GroupState::Loading;
        // There was nobody else: all are tried once more.
        let again = members.iter().any(|member| self.passed_over.contains(member));
        if again {
            self.passed_over.clear();
        }
        self.ranks = vec![Rank::default(); members.len()];
        self.members = members;
        again
    }

    /// The newest epoch that there was.
    pub(super) fn newest_epoch(&self) -> u64 {
        self.newest.max(self.epoch)
    }

    /// An epoch may go on that an earlier coordinator began: none was begun after it.
    pub(super) fn may_adopt(&self, epoch: u64) -> bool {
        self.members.is_empty() && epoch >= self.newest
    }

    /// An epoch that an earlier coordinator began goes on.
    pub(super) fn adopt(&mut self, epoch: u64, members: Members) {
        self.epoch = epoch;
        self.phase = GroupState::Ready;
        self.ranks = vec![Rank { ready: true, ..Rank::default() }; members.len()];
        self.members = members;
        self.problem.clear();
    }

    /// A task is over.
    pub(super) fn release(&mut self, number: u64, stage: &str) {
        self.tasks.remove(&(number, stage.to_owned()));
        self.alone &= !self.tasks.is_empty();
    }

    /// The epoch is over. Gives back who were members, each once, and the tasks that were lost.
    pub(super) fn end(&mut self, problem: String) -> (BTreeSet<String>, BTreeSet<(u64, String)>) {
        self.phase = GroupState::Waiting;
        self.problem = problem;
        self.ranks.clear();
        self.alone = false;
        self.pace = Pace::default();
        self.former = std::mem::take(&mut self.members);
        (self.former.iter().cloned().collect(), std::mem::take(&mut self.tasks))
    }

    /// Waits before it forms again: shortly if it had worked, ever longer if it keeps failing.
    pub(super) fn pause(&mut self, now: Millis, was_ready: bool) {
        if was_ready {
            self.retry_at = now + REFORM_PAUSE;
            return;
        }
        let pause = FIRST_RETRY.saturating_mul(1 << self.failures.min(16)).min(LAST_RETRY);
        self.failures = self.failures.saturating_add(1);
        self.retry_at = now + pause;
    }

    /// A worker could not load its rank of this epoch, which may have ended by a peer's word before its own came.
    pub(super) fn cannot_load(&mut self, worker_id: &str, rank: u32, epoch: u64, cause: String) -> Option<()> {
        let members = if self.members.is_empty() { &self.former } else { &self.members };
        if self.epoch != epoch || members.get(rank as usize).is_none_or(|member| member != worker_id) {
            return None;
        }
        self.passed_over.insert(worker_id.to_owned());
        self.problem = cause;
        Some(())
    }

    /// Workers that others go before.
    pub(super) fn passed_over(&self) -> &BTreeSet<String> {
        &self.passed_over
    }

    /// `worker_id` holds `rank` in this very epoch.
    pub(super) fn is_rank(&self, worker_id: &str, rank: u32, epoch: u64) -> bool {
        self.phase != GroupState::Waiting
            && self.epoch == epoch
            && self.members.get(rank as usize).is_some_and(|member| member == worker_id)
    }

    /// A rank has its weights and its peers; with the last of them the group is ready.
    pub(super) fn rank_ready(&mut self, rank: u32) {
        if let Some(rank) = self.ranks.get_mut(rank as usize) {
            rank.ready = true;
            rank.loaded_bytes = rank.total_bytes;
        }
        if self.ranks.iter().all(|rank| rank.ready) {
            self.phase = GroupState::Ready;
            self.problem.clear();
            self.failures = 0;
            self.passed_over.clear();
        }
    }

    pub(super) fn rank_loading(&mut self, rank: u32, loaded_bytes: u64, total_bytes: u64) {
        if let Some(rank) = self.ranks.get_mut(rank as usize) {
            rank.loaded_bytes = loaded_bytes;
            rank.total_bytes = total_bytes;
        }
    }

    pub(super) fn is_ready(&self) -> bool {
        self.phase == GroupState::Ready
    }

    /// The worker of rank 0, which takes the group's commands.
    pub(super) fn leader(&self) -> Option<&str> {
        self.members.first().map(String::as_str)
    }

    pub(super) fn status(&self) -> GroupStatus {
        let sum = |bytes: fn(&Rank) -> u64| self.ranks.iter().map(bytes).fold(0, u64::saturating_add);
        GroupStatus {
            group_id: self.wanted.id.clone(),
            epoch: self.epoch,
            component: self.wanted.component.clone(),
            layout: Some(self.wanted.layout),
            worker_ids: self.members.clone(),
            state: self.phase as i32,
            loaded_bytes: sum(|rank| rank.loaded_bytes),
            total_bytes: sum(|rank| rank.total_bytes),
            running_tasks: self.tasks.len() as u32,
        }
    }
}
