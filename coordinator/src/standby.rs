//! What a coordinator answers that does not lead: health says so, and every call is told to come back.

use std::{
    collections::HashMap,
    convert::Infallible,
    marker::PhantomData,
    task::{Context, Poll},
    time::Duration,
};

use futures::future::{Ready, ready};
use proto::v1::{
    blob_service_server::BlobServiceServer, checkpoint_service_server::CheckpointServiceServer,
    cluster_service_server::ClusterServiceServer, job_service_server::JobServiceServer,
};
use tokio::net::TcpListener;
use tonic::{
    Code, Status,
    body::Body,
    server::NamedService,
    transport::{Server, server::TcpIncoming},
};
use tonic_health::ServingStatus;
use tonic_types::{ErrorDetails, StatusExt};

use crate::{
    api::{ClusterApi, JobApi},
    blobs::BlobApi,
    checkpoints::CheckpointApi,
    error::{Error, Result},
};

/// When to come back: a new leader is found within two lease times.
const RETRY: Duration = Duration::from_secs(1);

/// Serves on `listener` until `over`.
pub(crate) async fn serve(listener: TcpListener, over: impl Future<Output = ()>) -> Result<()> {
    let (health, health_server) = tonic_health::server::health_reporter();
    health.set_service_status("atelier.v1.JobService", ServingStatus::NotServing).await;
    Server::builder()
        .add_service(health_server)
        .add_service(Standby::<JobServiceServer<JobApi>>::default())
        .add_service(Standby::<ClusterServiceServer<ClusterApi>>::default())
        .add_service(Standby::<BlobServiceServer<BlobApi>>::default())
        .add_service(Standby::<CheckpointServiceServer<CheckpointApi>>::default())
        .serve_with_incoming_shutdown(TcpIncoming::from(listener), over)
        .await
        .map_err(Error::from)
}

/// Stands in for a service.
struct Standby<S>(PhantomData<fn() -> S>);

impl<S> Default for Standby<S> {
    fn default() -> Self {
        Self(PhantomData)
    }
}

impl<S> Clone for Standby<S> {
    fn clone(&self) -> Self {
        Self::default()
    }
}

impl<S: NamedService> NamedService for Standby<S> {
    const NAME: &'static str = S::NAME;
}

impl<S, B> tower::Service<tonic::codegen::http::Request<B>> for Standby<S> {
    type Response = tonic::codegen::http::Response<Body>;
    type Error = Infallible;
    type Future = Ready<Result<Self::Response, Infallible>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, _: tonic::codegen::http::Request<B>) -> Self::Future {
        let mut details = ErrorDetails::with_error_info("NOT_LEADER", proto::ERROR_DOMAIN, HashMap::new());
        details.set_retry_info(Some(RETRY));
        let status = Status::with_error_details(Code::Unavailable, "another coordinator leads", details);
        ready(Ok(status.into_http()))
    }
}
