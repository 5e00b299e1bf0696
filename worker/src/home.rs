//! The coordinator's stores as a task reaches them: where they are may change while the task runs.

use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use identity::Role;
use tokio::time::{Instant, sleep, timeout};
use tonic::transport::Channel;
use tonic::{Code, Status};

use crate::dial::{CALL_TIMEOUT, Dial};
use crate::meters::Saves;
use crate::{Error, Result};

/// Pause after the first try; doubles with each.
const FIRST_PAUSE: Duration = Duration::from_millis(50);
/// Longest pause: a coordinator that comes back is found soon.
const LAST_PAUSE: Duration = Duration::from_secs(1);

/// The way to the coordinator, through its changes.
#[derive(Debug)]
pub(crate) struct Home {
    dial: Dial,
    /// Where the newest leader said it is.
    newest: Mutex<Option<String>>,
    /// How long a coordinator that is not there is called again.
    patience: Duration,
    /// How long writing to the checkpoint store took.
    pub(crate) saves: Saves,
}

impl Home {
    pub(crate) fn new(dial: Dial, patience: Duration) -> Self {
        Self { dial, newest: Mutex::default(), patience, saves: Saves::default() }
    }

    /// A new leader is at `address`; empty: where the tasks it gives say.
    pub(crate) fn moved(&self, address: String) {
        *self.newest.lock().unwrap_or_else(PoisonError::into_inner) = Some(address).filter(|address| !address.is_empty());
    }

    /// Calls the leader until it answers: where it says it is by then, else at `given`. A refusal is an answer.
    pub(crate) async fn call<T, F>(&self, given: &str, attempt: impl FnMut(Channel) -> F) -> Result<T>
    where
        F: Future<Output = Result<T, Status>>,
    {
        self.call_while(is_absence, given, attempt).await
    }

    /// As [`Self::call`], and a leader whose store is full is called again too: room is made as jobs are forgotten.
    pub(crate) async fn call_until_taken<T, F>(&self, given: &str, attempt: impl FnMut(Channel) -> F) -> Result<T>
    where
        F: Future<Output = Result<T, Status>>,
    {
        let again = |status: &Status| is_absence(status) || status.code() == Code::ResourceExhausted;
        self.call_while(again, given, attempt).await
    }

    async fn call_while<T, F>(
        &self,
        again: impl Fn(&Status) -> bool,
        given: &str,
        mut attempt: impl FnMut(Channel) -> F,
    ) -> Result<T>
    where
        F: Future<Output = Result<T, Status>>,
    {
        let give_up = Instant::now() + self.patience;
        let mut pause = FIRST_PAUSE;
        loop {
            let address = self.address(given);
            let tried = timeout(CALL_TIMEOUT, attempt(self.dial.channel(Role::Coordinator, &address)?)).await;
            let status = match tried.unwrap_or_else(|_| Err(Status::deadline_exceeded("no answer"))) {
                Ok(answer) => return Ok(answer),
                Err(status) => status,
            };
            if !again(&status) || Instant::now() + pause > give_up {
                return Err(Error::call(&address, &status));
            }
            sleep(pause).await;
            pause = (pause * 2).min(LAST_PAUSE);
        }
    }

    fn address(&self, given: &str) -> String {
        let newest = self.newest.lock().unwrap_or_else(PoisonError::into_inner);
        newest.clone().unwrap_or_else(|| given.to_owned())
    }
}

/// Whether nobody answered: a connection that could not be made, or broke under the call (which only this end knows of).
fn is_absence(status: &Status) -> bool {
    status.code() == Code::Unavailable || std::error::Error::source(status).is_some()
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::*;

    #[tokio::test]
    async fn a_coordinator_is_called_until_it_is_back_or_patience_is_over() {
        let tries = Cell::new(0);
        let attempt = |answer_at: u32| {
            tries.set(0);
            let tries = &tries;
            move |_: Channel| {
                tries.set(tries.get() + 1);
                let there = tries.get() == answer_at;
                async move { if there { Ok(()) } else { Err(Status::unavailable("")) } }
            }
        };
        let home = Home::new(Dial::default(), FIRST_PAUSE * 4);
        home.call("a:1", attempt(2)).await.unwrap();
        let absent = home.call("a:1", attempt(100)).await;
        assert!(matches!(absent, Err(Error::Call { code: Code::Unavailable, .. })));
        let refused = home.call("a:1", |_| async { Err::<(), _>(Status::failed_precondition("no")) }).await;
        assert!(matches!(refused, Err(Error::Call { code: Code::FailedPrecondition, .. })));
    }

    #[tokio::test]
    async fn a_store_that_is_full_is_called_again_by_whoever_has_a_result() {
        let home = Home::new(Dial::default(), FIRST_PAUSE * 4);
        let tries = Cell::new(0);
        let attempt = |_: Channel| {
            tries.set(tries.get() + 1);
            let tries = tries.get();
            async move { if tries < 3 { Err(Status::resource_exhausted("full")) } else { Ok(()) } }
        };
        home.call_until_taken("a:1", attempt).await.unwrap();
        let full = home.call_until_taken("a:1", |_| async { Err::<(), _>(Status::resource_exhausted("full")) }).await;
        assert!(matches!(full, Err(Error::Call { code: Code::ResourceExhausted, .. })), "not for ever");
        tries.set(0);
        assert!(home.call("a:1", attempt).await.is_err(), "all else may be done without");
    }

    #[test]
    fn the_newest_leader_says_where_it_is() {
        let home = Home::new(Dial::default(), FIRST_PAUSE);
        assert_eq!(home.address("given"), "given");
        home.moved("there".into());
        assert_eq!(home.address("given"), "there");
        home.moved(String::new());
        assert_eq!(home.address("given"), "given");
    }
}
