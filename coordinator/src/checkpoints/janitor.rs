//! What is not needed any more is removed beside all else: an object store takes its time for it.

use tokio::sync::mpsc;
use tracing::debug;

use super::CheckpointStore;

/// Jobs of which something waits to be removed: all that may be cancelled at once. Of more, a sweep finds what is left.
const MAX_DONE: usize = 4096;

/// Where it is said. Cheap to clone.
#[derive(Debug, Clone)]
pub(crate) struct DoneWith {
    checkpoints: CheckpointStore,
    jobs: mpsc::Sender<Done>,
}

/// A job, and what of it is not needed any more.
#[derive(Debug)]
pub(crate) struct Done {
    job_id: String,
    /// What was written before this.
    before: u64,
}

impl DoneWith {
    /// And what is to be given to [`Done::remove`], one by one.
    pub(crate) fn new(checkpoints: CheckpointStore) -> (Self, mpsc::Receiver<Done>) {
        let (jobs, done) = mpsc::channel(MAX_DONE);
        (Self { checkpoints, jobs }, done)
    }

    /// The job is over: nothing of it is kept, what is being written neither.
    pub(crate) fn with_job(&self, job_id: String) {
        self.tell(Done { job_id, before: u64::MAX });
    }

    /// What there is of the job by now is no good. The job goes on, and what it stores from now on is kept.
    pub(crate) fn with_what_there_is(&self, job_id: String) {
        let before = self.checkpoints.next_write();
        self.tell(Done { job_id, before });
    }

    fn tell(&self, done: Done) {
        // A job that goes on overwrites, or supersedes, what is left of it.
        if let Err(error) = self.jobs.try_send(done) {
            debug!(%error, "checkpoints are not removed at once");
        }
    }
}

impl Done {
    /// Removes it.
    pub(crate) async fn remove(self, checkpoints: &CheckpointStore) {
        checkpoints.forget_before(&self.job_id, self.before).await;
    }
}
