//! The time between the signal to stop and the end: the coordinator takes over what this worker does.

use std::sync::Arc;
use std::time::Duration;

use proto::v1::Draining;
use proto::v1::control_response::Report;

use crate::groups::Groups;
use crate::outbox::Reports;
use crate::tasks::Tasks;

/// What is to be empty before a worker goes.
pub(crate) struct Drain {
    pub(crate) groups: Arc<Groups>,
    pub(crate) tasks: Arc<Tasks>,
    pub(crate) reports: Reports,
    pub(crate) timeout: Duration,
}

impl Drain {
    /// Asks the coordinator to take over, and returns when it has: its parking and leaving are obeyed like any other command.
    /// Returns too when nobody is there to take over, when it takes too long, or at `hurry`.
    pub(crate) async fn run(self, hurry: impl Future<Output = ()>) {
        self.groups.close();
        let asked = async {
            self.reports.send(Report::Draining(Draining {})).await;
            self.empty().await;
        };
        let cause = tokio::select! {
            // First: an idle worker without a coordinator is both.
            biased;
            () = asked => "nothing is left here",
            () = self.reports.detached() => "no coordinator is there to take over",
            () = tokio::time::sleep(self.timeout) => "the coordinator did not take over in time",
            () = hurry => "it was asked for again",
        };
        tracing::info!(cause, "drained");
    }

    /// Returns when no rank is held, no task runs, and the end of each was told.
    async fn empty(&self) {
        loop {
            self.tasks.all_over().await;
            self.groups.all_left().await;
            // A task may have come meanwhile for a rank that was still here.
            if self.tasks.is_empty() && self.groups.is_empty() {
                return;
            }
            tokio::task::yield_now().await;
        }
    }
}
