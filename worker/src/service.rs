//! The gRPC service of a worker: control by the coordinator, payloads from other workers.

use std::sync::Arc;
use std::time::Duration;

use identity::{Peer, Role};
use proto::v1::put_payload_request::Part;
use proto::v1::worker_service_server::{WorkerService, WorkerServiceServer};
use proto::v1::{ControlRequest, ControlResponse, PutPayloadRequest, PutPayloadResponse};
use tokio::time::timeout;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};

use crate::error::status;
use crate::groups::Groups;
use crate::inbox::TaskId;
use crate::mail::Mail;
use crate::outbox;
use crate::payload_wire::Incoming;
use crate::session::Sessions;
use crate::{Error, Result};

/// A sender of a payload that says nothing for this long has gone, and its room in the inbox is given back.
const SENDER_SILENCE: Duration = Duration::from_secs(10);

/// Serves `WorkerService`.
pub(crate) struct Service {
    pub(crate) sessions: Arc<Sessions>,
    pub(crate) groups: Arc<Groups>,
    pub(crate) mail: Arc<Mail>,
}

impl Service {
    /// With the limits every message keeps.
    pub(crate) fn into_server(self) -> WorkerServiceServer<Self> {
        WorkerServiceServer::new(self)
            .max_decoding_message_size(proto::MAX_MESSAGE_BYTES)
            .max_encoding_message_size(proto::MAX_MESSAGE_BYTES)
    }

    async fn receive(&self, mut parts: Streaming<PutPayloadRequest>) -> Result<()> {
        let Some(Part::Header(mut header)) = next(&mut parts).await? else {
            return Err(Error::message("header", "must come first"));
        };
        let task = header.task.take().map(TaskId::from).ok_or_else(|| Error::message("header.task", "is missing"))?;
        self.groups.leader(&task)?;
        let from_stage = std::mem::take(&mut header.from_stage);
        let mut incoming = Incoming::new(header)?;
        let room = self.mail.reserve(incoming.byte_size())?;
        while let Some(part) = next(&mut parts).await? {
            match part {
                Part::Chunk(chunk) => incoming.push(&chunk)?,
                Part::Header(_) => return Err(Error::message("header", "came twice")),
            }
        }
        let payload = tokio::task::spawn_blocking(move || incoming.finish()).await.map_err(|_| Error::Panicked)??;
        // The group may have been given up meanwhile.
        self.groups.leader(&task)?;
        room.fill(task, &from_stage, payload);
        Ok(())
    }
}

/// The next part; `None` at the end.
async fn next(parts: &mut Streaming<PutPayloadRequest>) -> Result<Option<Part>> {
    let message = timeout(SENDER_SILENCE, parts.message()).await;
    let message = message.map_err(|_| Error::message("chunk", format!("none came for {} s", SENDER_SILENCE.as_secs())))?;
    match message.map_err(|status| Error::message("chunk", format!("the stream broke: {}", status.message())))? {
        Some(PutPayloadRequest { part: Some(part) }) => Ok(Some(part)),
        Some(PutPayloadRequest { part: None }) => Err(Error::message("part", "is missing")),
        None => Ok(None),
    }
}

#[tonic::async_trait]
impl WorkerService for Service {
    type ControlStream = ReceiverStream<Result<ControlResponse, Status>>;

    async fn control(&self, request: Request<Streaming<ControlRequest>>) -> Result<Response<Self::ControlStream>, Status> {
        Peer::check(request.extensions(), &[Role::Coordinator])?;
        let (reports, stream) = outbox::queue();
        tokio::spawn(self.sessions.clone().serve(request.into_inner(), reports));
        Ok(Response::new(ReceiverStream::new(stream)))
    }

    async fn put_payload(&self, request: Request<Streaming<PutPayloadRequest>>) -> Result<Response<PutPayloadResponse>, Status> {
        Peer::check(request.extensions(), &[Role::Worker])?;
        match self.receive(request.into_inner()).await {
            Ok(()) => Ok(Response::new(PutPayloadResponse {})),
            Err(error) => {
                tracing::warn!(%error, "refused a payload");
                Err(status(&error))
            }
        }
    }
}
