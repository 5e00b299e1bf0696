//! A checkpoint store in memory, which can fail and damage what it holds.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use bytes::Bytes;
use proto::v1::checkpoint_service_server::CheckpointService;
use proto::v1::{
    CheckpointHeader, GetCheckpointRequest, GetCheckpointResponse, PutCheckpointRequest, PutCheckpointResponse,
    get_checkpoint_response, put_checkpoint_request,
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};

type Held = BTreeMap<(String, String, u32), (CheckpointHeader, Bytes)>;

#[derive(Clone, Default)]
pub(crate) struct Checkpoints {
    held: Arc<Mutex<Held>>,
    broken: Arc<AtomicBool>,
}

impl Checkpoints {
    /// Steps of a stage that are held; 0 is its output.
    pub(crate) fn steps(&self, job_id: &str, stage: &str) -> Vec<u32> {
        let held = self.held.lock().unwrap();
        held.keys().filter(|(job, s, _)| job == job_id && s == stage).map(|(.., step)| *step).collect()
    }

    /// From now on nothing can be put, or all again.
    pub(crate) fn break_down(&self, broken: bool) {
        self.broken.store(broken, Ordering::SeqCst);
    }

    /// Changes what is held of a step.
    pub(crate) fn change(&self, job_id: &str, stage: &str, step: u32, change: impl Fn(&mut CheckpointHeader, &mut Vec<u8>)) {
        let mut held = self.held.lock().unwrap();
        let (header, bytes) = held.get_mut(&(job_id.into(), stage.into(), step)).unwrap();
        let mut changed = bytes.to_vec();
        change(header, &mut changed);
        *bytes = changed.into();
    }

    /// A copy of all that is held, as another store.
    pub(crate) fn fork(&self) -> Held {
        self.held.lock().unwrap().clone()
    }

    /// Holds what a fork held.
    pub(crate) fn restore(&self, held: &Held) {
        *self.held.lock().unwrap() = held.clone();
    }
}

#[tonic::async_trait]
impl CheckpointService for Checkpoints {
    type GetCheckpointStream = ReceiverStream<Result<GetCheckpointResponse, Status>>;

    async fn put_checkpoint(
        &self,
        request: Request<Streaming<PutCheckpointRequest>>,
    ) -> Result<Response<PutCheckpointResponse>, Status> {
        let mut parts = request.into_inner();
        let (mut header, mut bytes) = (CheckpointHeader::default(), Vec::new());
        while let Some(part) = parts.message().await? {
            match part.part.unwrap() {
                put_checkpoint_request::Part::Header(h) => header = h,
                put_checkpoint_request::Part::Chunk(chunk) => bytes.extend_from_slice(&chunk),
            }
        }
        if self.broken.load(Ordering::SeqCst) {
            return Err(Status::resource_exhausted("the disk is full"));
        }
        assert_eq!(header.byte_size, bytes.len() as u64);
        let key = header.key.clone().unwrap();
        self.held.lock().unwrap().insert((key.job_id, key.stage, key.step), (header, bytes.into()));
        Ok(Response::new(PutCheckpointResponse {}))
    }

    async fn get_checkpoint(
        &self,
        request: Request<GetCheckpointRequest>,
    ) -> Result<Response<Self::GetCheckpointStream>, Status> {
        let key = request.into_inner().key.unwrap();
        let found = self.held.lock().unwrap().get(&(key.job_id, key.stage, key.step)).cloned();
        let (header, bytes) = found.ok_or_else(|| Status::not_found("there is no such checkpoint"))?;
        let (parts, stream) = tokio::sync::mpsc::channel(4);
        for part in [get_checkpoint_response::Part::Header(header), get_checkpoint_response::Part::Chunk(bytes)] {
            drop(parts.try_send(Ok(GetCheckpointResponse { part: Some(part) })));
        }
        Ok(Response::new(ReceiverStream::new(stream)))
    }
}
