//! What a worker says of itself to whoever runs it, by gRPC health: `""` says that the process answers, and [`READY_SERVICE`]
//! whether it can be counted on.

use tokio::sync::watch;
use tonic_health::ServingStatus;
use tonic_health::server::HealthReporter;

/// Serving: a coordinator leads this worker, every rank it holds is ready, and it is not about to go. A worker that holds no
/// rank yet is ready too: it waits to be given one.
pub const READY_SERVICE: &str = "atelier.worker.Ready";

/// Keeps [`READY_SERVICE`] up to date for as long as the worker lives.
pub(crate) async fn tell_ready(health: HealthReporter, mut settled: watch::Receiver<bool>, mut led: watch::Receiver<bool>) {
    loop {
        let (is_settled, is_led) = (*settled.borrow_and_update(), *led.borrow_and_update());
        let status = if is_settled && is_led { ServingStatus::Serving } else { ServingStatus::NotServing };
        health.set_service_status(READY_SERVICE, status).await;
        let changed = tokio::select! {
            changed = settled.changed() => changed,
            changed = led.changed() => changed,
        };
        if changed.is_err() {
            return;
        }
    }
}
