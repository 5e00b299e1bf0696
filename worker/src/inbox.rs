//! What waits here for a task: the outputs of the stages before it.
//!
//! Payloads and the command to run come on separate streams, in either order. What comes for a task that has not been
//! announced is kept for [`UNCLAIMED`]; what comes for an announced one waits for as long as the task does.

use std::collections::{BTreeMap, HashMap};
use std::time::{Duration, Instant};

use models::Payload;
use proto::v1::TaskRef;

use crate::{Error, Result};

/// Bytes of payloads that wait or are on their way in. Two of the largest, or the embeddings of 250 FLUX jobs.
const MAX_BYTES: u64 = 2 << 30;
/// How long a payload is kept whose task nobody has announced.
const UNCLAIMED: Duration = Duration::from_secs(60);

/// Names a task: [`TaskRef`] as a key.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct TaskId {
    pub(crate) job_id: String,
    pub(crate) stage: String,
    pub(crate) attempt: u32,
    pub(crate) group_id: String,
    pub(crate) epoch: u64,
}

/// Payloads by task. Pure: time is an argument.
#[derive(Debug)]
pub(crate) struct Inbox {
    max_bytes: u64,
    held: u64,
    tasks: HashMap<TaskId, Waiting>,
}

#[derive(Debug, Default)]
struct Waiting {
    announced: bool,
    since: Option<Instant>,
    /// By the stage they come from, with the bytes each counts for.
    parts: BTreeMap<String, (Payload, u64)>,
}

impl Default for Inbox {
    fn default() -> Self {
        Self::new(MAX_BYTES)
    }
}

impl Inbox {
    pub(crate) fn new(max_bytes: u64) -> Self {
        Self { max_bytes, held: 0, tasks: HashMap::new() }
    }

    /// Makes room for a payload that is on its way in. Given back by [`Self::release`], or kept by [`Self::insert`].
    pub(crate) fn reserve(&mut self, bytes: u64, now: Instant) -> Result<()> {
        self.expire(now);
        if self.held.saturating_add(bytes) > self.max_bytes {
            return Err(Error::InboxFull { held: self.held, bytes });
        }
        self.held += bytes;
        Ok(())
    }

    /// Gives back what a payload had reserved that will not come.
    pub(crate) fn release(&mut self, bytes: u64) {
        self.held = self.held.saturating_sub(bytes);
    }

    /// Holds a payload, for which `bytes` were reserved. The same again, from a sender that had no answer, changes nothing.
    pub(crate) fn insert(&mut self, task: TaskId, from_stage: &str, payload: Payload, bytes: u64, now: Instant) {
        let waiting = self.tasks.entry(task).or_default();
        waiting.since.get_or_insert(now);
        let before = waiting.parts.insert(from_stage.to_owned(), (payload, bytes));
        self.release(before.map_or(0, |(_, bytes)| bytes));
    }

    /// From now on payloads of `task` wait as long as it does.
    pub(crate) fn announce(&mut self, task: &TaskId) {
        self.tasks.entry(task.clone()).or_default().announced = true;
    }

    /// The payloads of an announced task, in the order of `stages`, if all are there.
    pub(crate) fn claim(&mut self, task: &TaskId, stages: &[String]) -> Option<Vec<Payload>> {
        let waiting = self.tasks.get_mut(task)?;
        if !stages.iter().all(|stage| waiting.parts.contains_key(stage)) {
            return None;
        }
        let claimed: Vec<_> = stages.iter().filter_map(|stage| waiting.parts.remove(stage)).collect();
        let bytes = claimed.iter().map(|(_, bytes)| bytes).sum();
        self.release(bytes);
        Some(claimed.into_iter().map(|(payload, _)| payload).collect())
    }

    /// Drops what is held for the tasks of which `over` is true.
    pub(crate) fn forget(&mut self, over: impl Fn(&TaskId) -> bool) {
        let mut freed = 0;
        self.tasks.retain(|task, waiting| {
            let keep = !over(task);
            freed += if keep { 0 } else { waiting.bytes() };
            keep
        });
        self.release(freed);
    }

    fn expire(&mut self, now: Instant) {
        let mut freed = 0;
        self.tasks.retain(|task, waiting| {
            let old = waiting.since.is_some_and(|since| now.saturating_duration_since(since) > UNCLAIMED);
            if old && !waiting.announced {
                tracing::warn!(job.id = task.job_id, stage = task.stage, "dropped a payload that nobody claimed");
                freed += waiting.bytes();
            }
            !old || waiting.announced
        });
        self.release(freed);
    }
}

impl Waiting {
    fn bytes(&self) -> u64 {
        self.parts.values().map(|(_, bytes)| bytes).sum()
    }
}

impl From<TaskRef> for TaskId {
    fn from(task: TaskRef) -> Self {
        let TaskRef { job_id, stage, attempt, group_id, epoch } = task;
        Self { job_id, stage, attempt, group_id, epoch }
    }
}

impl From<TaskId> for TaskRef {
    fn from(task: TaskId) -> Self {
        let TaskId { job_id, stage, attempt, group_id, epoch } = task;
        Self { job_id, stage, attempt, group_id, epoch }
    }
}

#[cfg(test)]
mod tests {
    use parallel::Tensors;

    use super::*;

    fn task(job: &str) -> TaskId {
        TaskId { job_id: job.into(), stage: "denoise".into(), attempt: 1, group_id: "g".into(), epoch: 1 }
    }

    fn put(inbox: &mut Inbox, job: &str, from: &str, bytes: u64, now: Instant) {
        inbox.reserve(bytes, now).unwrap();
        inbox.insert(task(job), from, Payload::Conditioning(Tensors::new()), bytes, now);
    }

    #[test]
    fn a_task_is_given_its_inputs_when_all_are_there() {
        let (mut inbox, now) = (Inbox::new(100), Instant::now());
        let stages = ["clip".to_owned(), "t5".to_owned()];
        put(&mut inbox, "a", "t5", 10, now);
        inbox.announce(&task("a"));
        assert!(inbox.claim(&task("a"), &stages).is_none());
        put(&mut inbox, "b", "clip", 10, now);
        assert!(inbox.claim(&task("a"), &stages).is_none());
        put(&mut inbox, "a", "clip", 10, now);
        assert_eq!(inbox.claim(&task("a"), &stages).unwrap().len(), 2);
        assert_eq!(inbox.held, 10);
    }

    #[test]
    fn the_same_payload_again_is_counted_once() {
        let (mut inbox, now) = (Inbox::new(100), Instant::now());
        put(&mut inbox, "a", "t5", 40, now);
        put(&mut inbox, "a", "t5", 40, now);
        assert_eq!(inbox.held, 40);
    }

    #[test]
    fn a_full_inbox_refuses_until_there_is_room() {
        let (mut inbox, now) = (Inbox::new(100), Instant::now());
        put(&mut inbox, "a", "t5", 60, now);
        assert!(matches!(inbox.reserve(41, now), Err(Error::InboxFull { held: 60, bytes: 41 })));
        assert!(matches!(inbox.reserve(u64::MAX, now), Err(Error::InboxFull { .. })));
        inbox.forget(|task| task.job_id == "a");
        inbox.reserve(41, now).unwrap();
        inbox.release(41);
        assert_eq!(inbox.held, 0);
    }

    #[test]
    fn only_what_nobody_announced_grows_old() {
        let (mut inbox, now) = (Inbox::new(100), Instant::now());
        put(&mut inbox, "a", "t5", 30, now);
        put(&mut inbox, "b", "t5", 40, now);
        inbox.announce(&task("b"));
        inbox.reserve(0, now + UNCLAIMED * 2).unwrap();
        assert_eq!(inbox.held, 40);
        assert!(inbox.claim(&task("a"), &["t5".to_owned()]).is_none());
        assert!(inbox.claim(&task("b"), &["t5".to_owned()]).is_some());
    }
}
