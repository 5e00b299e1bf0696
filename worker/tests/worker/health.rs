//! What a worker says of itself by gRPC health.

use proto::v1::control_request::Command;
use proto::v1::{JoinGroup, LeaveGroup};
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_health::pb::health_client::HealthClient;
use worker::health::READY_SERVICE;

use crate::coordinator::{Coordinator, PATIENCE, join};
use crate::running::{Running, Waits};

/// Returns when the worker says so of `service`.
async fn says(worker: &Running, service: &str, expected: ServingStatus) {
    let channel =
        tonic::transport::Endpoint::from_shared(format!("http://{}", worker.address())).unwrap().connect().await.unwrap();
    let mut states = HealthClient::new(channel).watch(HealthCheckRequest { service: service.into() }).await.unwrap().into_inner();
    let reached = async {
        while let Some(state) = states.message().await.unwrap() {
            if state.status() == expected {
                return;
            }
        }
        panic!("the stream ended");
    };
    tokio::time::timeout(PATIENCE, reached).await.unwrap_or_else(|_| panic!("{service:?} is not {expected:?}"));
}

#[tokio::test]
async fn a_worker_is_ready_when_a_coordinator_leads_it_and_every_rank_it_holds_is() {
    let coordinator = Coordinator::start().await;
    let waits = Waits { drain: PATIENCE, orphan: PATIENCE };
    let (mut a, b) = (Running::waiting(&coordinator, waits).await, Running::start(&coordinator).await);
    says(&a, "", ServingStatus::Serving).await;
    says(&a, READY_SERVICE, ServingStatus::NotServing).await;
    let (mut to_a, to_b) = (a.control().await, b.control().await);
    says(&a, READY_SERVICE, ServingStatus::Serving).await;

    // The first rank waits for its peer.
    let pair = |rank| Command::JoinGroup(JoinGroup { rank, ..join("pair", 1, "transformer", &[&a, &b]) });
    to_a.send(pair(0)).await;
    says(&a, READY_SERVICE, ServingStatus::NotServing).await;
    to_b.send(pair(1)).await;
    to_a.ready("pair", 1).await;
    says(&a, READY_SERVICE, ServingStatus::Serving).await;

    a.signal();
    says(&a, READY_SERVICE, ServingStatus::NotServing).await;
    says(&a, "", ServingStatus::Serving).await;
    to_a.send(Command::LeaveGroup(LeaveGroup { group_id: "pair".into(), epoch: 1 })).await;
    a.ended().await;
    b.stop().await;
}
