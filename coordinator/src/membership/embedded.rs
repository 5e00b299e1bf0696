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
/// How long a worker whose stream broke may take to open another: it tries again within a moment, and its control stream, which
/// is the coordinator's own, tells whether it is there meanwhile.
const BACK_DEADLINE: Duration = Duration::from_secs(3);
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
                let ended = self.stay(&mut requests, &responses).await;
                drop((requests, responses));
                let cause = match ended {
                    Ended::Over(cause) => cause,
                    Ended::Broke(cause) => {
                        // What ends the coordinator ends the waiting.
                        _ = self.stop.run_until_cancelled(tokio::time::sleep(BACK_DEADLINE)).await;
                        format!("{cause}, and it did not come back within {} s", BACK_DEADLINE.as_secs())
                    }
                };
                self.members.lock().await.leave(worker_id, stream, cause).await;
            }
            // If the worker has gone too, there is nobody to tell.
            Err(error) => drop(responses.send(Err(status(&error))).await),
        }
    }

    /// Waits for the end of the membership and says why it ended.
    async fn stay(&self, requests: &mut Streaming<RegisterRequest>, responses: &mpsc::Sender<Reply>) -> Ended {
        let mut beat = tokio::time::interval(HEARTBEAT);
        let mut deadline = tokio::time::Instant::now() + SILENCE;
        loop {
            tokio::select! {
                biased;
                () = self.stop.cancelled() => return Ended::Over("the coordinator is shutting down".into()),
                () = tokio::time::sleep_until(deadline) => {
                    return Ended::Over(format!("it was silent for {} s", SILENCE.as_secs()));
                }
                // A full channel means that the worker does not read; its own silence decides.
                _ = beat.tick() => drop(responses.try_send(Ok(RegisterResponse {}))),
                request = requests.message() => match request {
                    Ok(Some(_)) => deadline = tokio::time::Instant::now() + SILENCE,
                    Ok(None) => return Ended::Over("it signed off".into()),
                    Err(error) => return Ended::Broke(format!("its registration broke: {}", error.message())),
                },
            }
        }
    }
}

/// Why a stream ended.
enum Ended {
    /// The worker is a member no longer.
    Over(String),
    /// It may be back at once.
    Broke(String),
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

#[cfg(test)]
mod tests {
    use proto::v1::{membership_service_client::MembershipServiceClient, membership_service_server::MembershipServiceServer};
    use tokio::{io::DuplexStream, time::Instant};
    use tonic::transport::{Endpoint, Server};

    use super::*;
    use crate::{testing, world::Dial};

    /// A membership within this process, and who comes and goes. Time passes when all wait.
    struct Cluster {
        changes: mpsc::Receiver<Change>,
        sockets: mpsc::Sender<std::io::Result<DuplexStream>>,
    }

    /// A worker's end of a registration.
    struct Member {
        beats: mpsc::Sender<RegisterRequest>,
        /// What its connection is; without it both ends have lost it.
        wire: tokio::task::AbortHandle,
        _responses: Streaming<RegisterResponse>,
    }

    impl Cluster {
        fn start() -> Self {
            let (told, changes) = mpsc::channel(8);
            let (sockets, incoming) = mpsc::channel(8);
            let membership = MembershipServiceServer::new(EmbeddedMembership::new(told, CancellationToken::new()));
            tokio::spawn(Server::builder().add_service(membership).serve_with_incoming(ReceiverStream::new(incoming)));
            Self { changes, sockets }
        }

        async fn register(&self, id: &str) -> Member {
            let [(ours, mut here), (mut there, theirs)] = [(); 2].map(|()| tokio::io::duplex(1 << 16));
            let wire = tokio::spawn(async move { tokio::io::copy_bidirectional(&mut here, &mut there).await }).abort_handle();
            self.sockets.send(Ok(theirs)).await.unwrap();
            let ours = std::sync::Mutex::new(Some(ours));
            let dial = Dial::through(move |_| {
                let ours = ours.lock().unwrap().take().ok_or(std::io::ErrorKind::ConnectionRefused);
                Box::pin(async move { Ok(Box::new(ours?) as Box<dyn crate::world::Io>) })
            });
            let channel = dial.connect(Endpoint::from_static("http://coordinator:1")).await.unwrap();
            let (beats, outgoing) = mpsc::channel(4);
            beats.try_send(RegisterRequest { registration: Some(testing::worker(id, "any")) }).unwrap();
            let called = MembershipServiceClient::new(channel).register(ReceiverStream::new(outgoing)).await;
            Member { beats, wire, _responses: called.unwrap().into_inner() }
        }

        async fn joined(&mut self) {
            assert!(matches!(self.changes.recv().await.unwrap(), Change::Joined(_)));
        }

        async fn left(&mut self) -> String {
            match self.changes.recv().await.unwrap() {
                Change::Left { cause, .. } => cause,
                joined @ Change::Joined(_) => panic!("{joined:?}"),
            }
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_worker_whose_registration_breaks_is_a_member_until_it_had_time_to_come_back() {
        let mut cluster = Cluster::start();
        let first = cluster.register("w1").await;
        cluster.joined().await;
        first.wire.abort();
        let again = cluster.register("w1").await;
        cluster.joined().await;
        assert!(timeout(BACK_DEADLINE + HEARTBEAT, cluster.changes.recv()).await.is_err(), "it came back, and has not left");
        again.wire.abort();
        let broke = Instant::now();
        let cause = cluster.left().await;
        assert!(cause.contains("it did not come back within 3 s"), "{cause}");
        assert!(broke.elapsed() >= BACK_DEADLINE);
    }

    #[tokio::test(start_paused = true)]
    async fn a_worker_that_signs_off_or_is_silent_has_left_at_once() {
        let mut cluster = Cluster::start();
        let member = cluster.register("w1").await;
        cluster.joined().await;
        let began = Instant::now();
        drop(member.beats);
        assert_eq!(cluster.left().await, "it signed off");
        assert!(began.elapsed() < BACK_DEADLINE);
        let _silent = cluster.register("w2").await;
        cluster.joined().await;
        let began = Instant::now();
        assert_eq!(cluster.left().await, "it was silent for 5 s");
        assert!(began.elapsed() < SILENCE + BACK_DEADLINE);
    }
}
