//! Serves `CheckpointService`.

use futures::{Stream, StreamExt, stream};
use proto::v1::{
    GetCheckpointRequest, GetCheckpointResponse, PutCheckpointRequest, PutCheckpointResponse,
    checkpoint_service_server::{CheckpointService, CheckpointServiceServer},
};
use tonic::{Request, Response, Status, Streaming};

use super::{CheckpointError, CheckpointStore};

/// The store, to workers.
#[derive(Debug, Clone)]
pub struct CheckpointApi {
    store: CheckpointStore,
}

impl CheckpointApi {
    /// The service, ready to be added to a server.
    pub fn server(store: CheckpointStore) -> CheckpointServiceServer<Self> {
        CheckpointServiceServer::new(Self { store })
            .max_decoding_message_size(proto::MAX_MESSAGE_BYTES)
            .max_encoding_message_size(proto::MAX_MESSAGE_BYTES)
    }
}

#[tonic::async_trait]
impl CheckpointService for CheckpointApi {
    async fn put_checkpoint(
        &self,
        request: Request<Streaming<PutCheckpointRequest>>,
    ) -> Result<Response<PutCheckpointResponse>, Status> {
        let store = self.store.clone();
        // On a task of its own: a caller that goes away must not leave half an upload in S3.
        let put = tokio::spawn(async move { store.put(request.into_inner()).await });
        match put.await {
            Ok(done) => done.map(|()| Response::new(PutCheckpointResponse {})).map_err(Status::from),
            Err(_) => Err(Status::internal("the upload ended unexpectedly")),
        }
    }

    type GetCheckpointStream = stream::BoxStream<'static, Result<GetCheckpointResponse, Status>>;

    async fn get_checkpoint(
        &self,
        request: Request<GetCheckpointRequest>,
    ) -> Result<Response<Self::GetCheckpointStream>, Status> {
        let parts = self.store.get(request.into_inner().key).await?;
        Ok(Response::new(statuses(parts).boxed()))
    }
}

fn statuses<T>(parts: impl Stream<Item = Result<T, CheckpointError>>) -> impl Stream<Item = Result<T, Status>> {
    parts.map(|part| part.map_err(Status::from))
}
