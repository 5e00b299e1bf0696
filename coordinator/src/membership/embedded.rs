//! Membership without etcd: a worker keeps a stream open to the coordinator for as long as it is a member.

use std::{collections::HashMap, sync::Arc, time::Duration};

use proto::v1::{RegisterRequest, RegisterResponse, Registration, membership_service_server::MembershipService};
use tokio::{
    sync::{Mutex, mpsc},
    time::timeout,
};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status, Streaming};

use super::{Change, check};
use crate::{
    api::status,
    error::{Error, Result},
};

/// A worker that says nothing for this long has left. Workers speak every second.
pub const SILENCE: Duration = Duration::from_secs(5);
/// How often the coordinator speaks.
const HEARTBEAT: Duration = Duration::from_secs(1);

/// Serves `MembershipService`.
#[derive(Debug, Clone)]
pub struct EmbeddedMembership {
    members: Arc<Mutex<Members>>,
    stop: CancellationToken,
}

/// Behind one lock, so that a stream which ends late cannot take back what a newer one said.
#[derive(Debug)]
struct Members {
    changes: mpsc::Sender<Change>,
    /// The stream that counts for each worker.
    streams: HashMap<String, u64>,
    last_stream: u64,
}

impl EmbeddedMembership {
    /// Tells `changes` who comes and goes, until `stop`.
    pub fn new(changes: mpsc::Sender<Change>, stop: CancellationToken) -> Self {
        let members = Members { changes, streams: HashMap::new(), last_stream: 0 };
        Self { members: Arc::new(Mutex::new(members)), stop }
    }

    /// Lives as long as the stream. What is wrong with the first message ends it.
    async fn serve(self, mut requests: Streaming<RegisterRequest>, responses: mpsc::Sender<Reply>) {
        match first_message(&mut requests).await {
            Ok(registration) => {
                let worker_id = registration.worker_id.clone();
                let stream = self.members.lock().await.join(registration).await;
                let cause = self.stay(&mut requests, &responses).await;
                self.members.lock().await.leave(worker_id, stream, cause).await;
            }
            // If the worker has gone too, there is nobody to tell.
            Err(error) => drop(responses.send(Err(status(&error))).await),
        }
    }

    /// Waits for the end of the membership and says why it ended.
    async fn stay(&self, requests: &mut Streaming<RegisterRequest>, responses: &mpsc::Sender<Reply>) -> String {
        let mut beat = tokio::time::interval(HEARTBEAT);
        let mut deadline = tokio::time::Instant::now() + SILENCE;
        loop {
            tokio::select! {
                biased;
                () = self.stop.cancelled() => return "the coordinator is shutting down".into(),
                () = tokio::time::sleep_until(deadline) => return format!("it was silent for {} s", SILENCE.as_secs()),
                // A full channel means that the worker does not read; its own silence decides.
                _ = beat.tick() => drop(responses.try_send(Ok(RegisterResponse {}))),
                request = requests.message() => match request {
                    Ok(Some(_)) => deadline = tokio::time::Instant::now() + SILENCE,
                    Ok(None) => return "it signed off".into(),
                    Err(error) => return format!("its registration broke: {}", error.message()),
                },
            }
        }
    }
}

type Reply = Result<RegisterResponse, Status>;

async fn first_message(requests: &mut Streaming<RegisterRequest>) -> Result<Registration> {
    let refuse = |problem: &str| Error::InvalidRegistration(problem.to_owned());
    let first = timeout(SILENCE, requests.message()).await.map_err(|_| refuse("none came"))?;
    let first = first.map_err(|error| refuse(error.message()))?.ok_or_else(|| refuse("the stream was empty"))?;
    let registration = first.registration.ok_or_else(|| refuse("the first message must hold it"))?;
    check(&registration)?;
    Ok(registration)
}

impl Members {
    async fn join(&mut self, registration: Registration) -> u64 {
        self.last_stream += 1;
        self.streams.insert(registration.worker_id.clone(), self.last_stream);
        // Nobody listens only while the coordinator shuts down.
        drop(self.changes.send(Change::Joined(registration)).await);
        self.last_stream
    }

    async fn leave(&mut self, worker_id: String, stream: u64, cause: String) {
        if self.streams.get(&worker_id) == Some(&stream) {
            self.streams.remove(&worker_id);
            drop(self.changes.send(Change::Left { worker_id, cause }).await);
        }
    }
}

#[tonic::async_trait]
impl MembershipService for EmbeddedMembership {
    type RegisterStream = ReceiverStream<Reply>;

    async fn register(&self, request: Request<Streaming<RegisterRequest>>) -> Result<Response<Self::RegisterStream>, Status> {
        let (responses, stream) = mpsc::channel(4);
        tokio::spawn(self.clone().serve(request.into_inner(), responses));
        Ok(Response::new(ReceiverStream::new(stream)))
    }
}
