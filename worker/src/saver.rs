//! Beside a denoising task: stores its newest state, again and again, and never makes it wait.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use models::Checkpoint;
use tokio::sync::watch;
use tokio_util::task::AbortOnDropHandle;

use crate::checkpoints::Store;

/// Stores what comes through `states` until it is dropped. One state is on its way and one waits, the newest; those between
/// are not stored. `saved` is the newest step that is durable.
pub(crate) fn keep_saving(
    store: Store,
    stage: String,
    states: watch::Receiver<Option<Checkpoint>>,
    saved: Arc<AtomicU32>,
) -> AbortOnDropHandle<()> {
    AbortOnDropHandle::new(tokio::spawn(save_newest(store, stage, states, saved)))
}

async fn save_newest(store: Store, stage: String, mut states: watch::Receiver<Option<Checkpoint>>, saved: Arc<AtomicU32>) {
    let mut failing = false;
    while states.changed().await.is_ok() {
        let Some(checkpoint) = states.borrow_and_update().clone() else { continue };
        match store.put_state(&stage, checkpoint).await {
            Ok(step) => {
                saved.fetch_max(step, Ordering::SeqCst);
                failing = false;
            }
            // Said once: with each further step it would be the same again.
            Err(error) if !failing => {
                failing = true;
                tracing::warn!(stage, %error, "the state of a task could not be stored; it goes on without");
            }
            Err(error) => tracing::debug!(stage, %error, "the state of a task could not be stored"),
        }
    }
}
