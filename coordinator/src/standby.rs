//! What a coordinator answers that does not lead: health says so, and every call is told to come back.

use std::{
    collections::HashMap,
    convert::Infallible,
    marker::PhantomData,
    task::{Context, Poll},
    time::Duration,
};

use futures::future::{Ready, ready};
use identity::Incoming;
use proto::v1::{
    blob_service_server::BlobServiceServer, checkpoint_service_server::CheckpointServiceServer,
    cluster_service_server::ClusterServiceServer, job_service_server::JobServiceServer,
};
use tonic::{Code, Status, body::Body, server::NamedService, transport::Server};
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

/// How long a connection lasts. Behind one address for several coordinators, the next one may reach the leader.
const CONNECTION_AGE: Duration = Duration::from_secs(2);

/// Serves `incoming` until `over`.
pub(crate) async fn serve(incoming: Incoming, over: impl Future<Output = ()>) -> Result<()> {
    let (health, health_server) = tonic_health::server::health_reporter();
    health.set_service_status("atelier.v1.JobService", ServingStatus::NotServing).await;
    Server::builder()
        .max_connection_age(CONNECTION_AGE)
        .add_service(health_server)
        .add_service(Standby::<JobServiceServer<JobApi>>::default())
        .add_service(Standby::<ClusterServiceServer<ClusterApi>>::default())
        .add_service(Standby::<BlobServiceServer<BlobApi>>::default())
        .add_service(Standby::<CheckpointServiceServer<CheckpointApi>>::default())
        .serve_with_incoming_shutdown(incoming, over)
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

#[cfg(test)]
mod tests {
    use tokio::{
        io::{AsyncReadExt, AsyncWriteExt},
        net::{TcpListener, TcpStream},
        time::timeout,
    };

    use super::*;

    /// An HTTP/2 client's first words: the preface and empty settings.
    const HELLO: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0";
    const GOAWAY: u8 = 7;

    #[tokio::test]
    async fn a_client_that_reached_a_standby_is_sent_away_to_connect_anew() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let mut client = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        tokio::spawn(serve(Incoming::new(listener, None), std::future::pending()));
        client.write_all(HELLO).await.unwrap();
        let sent_away = async {
            loop {
                // Length, type, flags, stream.
                let mut head = [0; 9];
                client.read_exact(&mut head).await.unwrap();
                if head[3] == GOAWAY {
                    return;
                }
                let mut body = vec![0; u32::from_be_bytes([0, head[0], head[1], head[2]]) as usize];
                client.read_exact(&mut body).await.unwrap();
            }
        };
        timeout(CONNECTION_AGE * 10, sent_away).await.expect("a standby keeps its clients");
    }
}
