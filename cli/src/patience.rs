//! How long a coordinator that is away is waited for.

use std::time::{Duration, Instant};

use tonic::{Code, Status};

use crate::error::Error;

/// How long a coordinator that is away is waited for: a restart, or a new leader.
const AWAY: Duration = Duration::from_secs(60);
/// Pause between two tries.
const AWAY_PAUSE: Duration = Duration::from_millis(300);

/// From now on a coordinator that is away is waited for.
#[derive(Debug)]
pub(crate) struct Patience {
    until: Instant,
}

impl Default for Patience {
    fn default() -> Self {
        Self { until: Instant::now() + AWAY }
    }
}

impl Patience {
    /// Waits a moment if `status` says that the coordinator is away or stops, and not for too long.
    ///
    /// # Errors
    /// With what `status` says, when it says something else, or was said for too long.
    pub(crate) async fn wait(&self, status: Status) -> Result<(), Error> {
        // A cut connection is told as a transport error, which has the code UNKNOWN or CANCELLED.
        let away = matches!(status.code(), Code::Unavailable | Code::Unknown | Code::Cancelled);
        if !away || Instant::now() > self.until {
            return Err(status.into());
        }
        tokio::time::sleep(AWAY_PAUSE).await;
        Ok(())
    }
}
