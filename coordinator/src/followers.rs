//! What those who watch a job are told as it happens: thousands may, and the owner of the state is asked by none of them.

use std::{collections::BTreeMap, sync::Arc};

use proto::v1::JobEvent;
use tokio::sync::watch;

use crate::state::EventPage;

/// A job's newest events.
#[derive(Debug, Clone)]
pub(crate) struct Tail {
    /// All later events than this one are here.
    after: u64,
    events: Arc<[JobEvent]>,
    over: bool,
}

impl Tail {
    /// `page` is all that came after `sequence`.
    pub(crate) fn new(after: u64, page: EventPage) -> Self {
        Self { after, events: page.events.into(), over: page.over }
    }

    /// Knows of nothing.
    fn nothing() -> Self {
        Self { after: u64::MAX, events: Arc::default(), over: false }
    }

    /// What comes after `sequence`, unless some of it is no longer here.
    pub(crate) fn events_after(&self, sequence: u64) -> Option<EventPage> {
        (self.after <= sequence).then(|| {
            let events = self.events.iter().filter(|event| event.sequence > sequence).cloned().collect();
            EventPage { events, over: self.over }
        })
    }
}

/// By job; only those that somebody waits for, and that are not over.
#[derive(Debug, Default)]
pub(crate) struct Followers(BTreeMap<String, watch::Sender<Tail>>);

impl Followers {
    /// For one who has read all there is of a job that goes on.
    pub(crate) fn subscribe(&mut self, job_id: String) -> watch::Receiver<Tail> {
        self.0.entry(job_id).or_insert_with(|| watch::channel(Tail::nothing()).0).subscribe()
    }

    /// Whether anybody waits for the job.
    pub(crate) fn any(&self, job_id: &str) -> bool {
        self.0.get(job_id).is_some_and(|told| told.receiver_count() > 0)
    }

    /// Tells all of them. Of a job that is over they are told for the last time.
    pub(crate) fn tell(&mut self, job_id: &str, tail: Option<Tail>, over: bool) {
        if let (Some(told), Some(tail)) = (self.0.get(job_id), tail) {
            told.send_replace(tail);
        }
        if over {
            self.0.remove(job_id);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tail(after: u64, sequences: &[u64], over: bool) -> Tail {
        let event = |sequence: &u64| JobEvent { sequence: *sequence, ..JobEvent::default() };
        Tail::new(after, EventPage { events: sequences.iter().map(event).collect(), over })
    }

    fn sequences(page: Option<EventPage>) -> Option<Vec<u64>> {
        page.map(|page| page.events.iter().map(|event| event.sequence).collect())
    }

    #[test]
    fn a_tail_tells_what_is_new_or_that_it_does_not_reach_back_so_far() {
        let tail = tail(4, &[5, 6, 9], false);
        assert_eq!(sequences(tail.events_after(4)), Some(vec![5, 6, 9]));
        assert_eq!(sequences(tail.events_after(6)), Some(vec![9]));
        assert_eq!(sequences(tail.events_after(9)), Some(vec![]));
        assert_eq!(sequences(tail.events_after(3)), None, "5 may not be the next");
        assert_eq!(sequences(Tail::nothing().events_after(7)), None);
    }

    #[tokio::test]
    async fn the_last_is_told_after_the_job_is_over() {
        let mut followers = Followers::default();
        let mut told = followers.subscribe("j".into());
        assert!(followers.any("j") && !followers.any("k"));
        followers.tell("j", Some(tail(0, &[1], true)), true);
        assert!(!followers.any("j"));
        assert!(told.changed().await.is_ok());
        assert_eq!(told.borrow_and_update().events_after(0).map(|page| (page.events.len(), page.over)), Some((1, true)));
        assert!(told.changed().await.is_err(), "nothing follows");
    }
}
