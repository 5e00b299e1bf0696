//! The inbox, and what wakes the tasks that wait for it.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use models::Payload;
use tokio::sync::Notify;

use crate::Result;
use crate::inbox::{Inbox, TaskId};

/// Payloads for this worker's tasks.
#[derive(Debug, Default)]
pub(crate) struct Mail {
    inbox: Mutex<Inbox>,
    arrived: Notify,
}

/// Room in the inbox for a payload that is on its way in. Given back when it does not come.
pub(crate) struct Reservation<'a> {
    mail: &'a Mail,
    bytes: u64,
}

impl Mail {
    /// Makes room for `bytes`.
    pub(crate) fn reserve(&self, bytes: u64) -> Result<Reservation<'_>> {
        self.inbox().reserve(bytes, Instant::now())?;
        Ok(Reservation { mail: self, bytes })
    }

    /// From now on payloads of `task` wait as long as it does.
    pub(crate) fn announce(&self, task: &TaskId) {
        self.inbox().announce(task);
    }

    /// Drops what is held for the tasks of which `over` is true.
    pub(crate) fn forget(&self, over: impl Fn(&TaskId) -> bool) {
        self.inbox().forget(over);
    }

    /// The payloads of an announced task, in the order of `stages`, when all are there.
    pub(crate) async fn claim(&self, task: &TaskId, stages: &[String]) -> Vec<Payload> {
        loop {
            let arrived = self.arrived.notified();
            tokio::pin!(arrived);
            // From here on nothing that arrives is missed.
            arrived.as_mut().enable();
            if let Some(payloads) = self.inbox().claim(task, stages) {
                return payloads;
            }
            arrived.await;
        }
    }

    fn inbox(&self) -> MutexGuard<'_, Inbox> {
        self.inbox.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Reservation<'_> {
    /// Puts the payload where the room was.
    pub(crate) fn fill(mut self, task: TaskId, from_stage: &str, payload: Payload) {
        let bytes = std::mem::take(&mut self.bytes);
        self.mail.inbox().insert(task, from_stage, payload, bytes, Instant::now());
        self.mail.arrived.notify_waiters();
    }
}

impl Drop for Reservation<'_> {
    fn drop(&mut self) {
        self.mail.inbox().release(self.bytes);
    }
}
