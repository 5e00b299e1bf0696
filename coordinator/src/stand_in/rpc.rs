//! Calls to the coordinator and to other workers.

use std::time::Duration;

use bytes::Bytes;
use proto::v1::{
    BlobHeader, CheckpointHeader, CheckpointKey, Destination, GetCheckpointRequest, ImageResult, PayloadHeader,
    PutCheckpointRequest, PutPayloadRequest, TensorHeader, UploadBlobRequest, blob_service_client::BlobServiceClient,
    checkpoint_service_client::CheckpointServiceClient, get_checkpoint_response, put_checkpoint_request, put_payload_request,
    upload_blob_request, worker_service_client::WorkerServiceClient,
};
use sha2::{Digest, Sha256};
use tonic::{
    Request, Status,
    metadata::MetadataValue,
    transport::{Channel, Endpoint},
};

use crate::world::Dial;

/// A call that takes longer has failed.
const DEADLINE: Duration = Duration::from_secs(5);

pub(super) async fn connect(dial: &Dial, address: &str) -> Result<Channel, Status> {
    let endpoint = Endpoint::from_shared(format!("http://{address}")).map_err(|error| Status::internal(error.to_string()))?;
    let endpoint = endpoint.connect_timeout(DEADLINE).tcp_nodelay(true);
    let connecting = tokio::time::timeout(DEADLINE, dial.connect(endpoint)).await;
    connecting.map_err(|_| Status::unavailable("nobody answers"))?.map_err(|error| Status::unavailable(error.to_string()))
}

async fn in_time<T>(call: impl Future<Output = Result<T, Status>>) -> Result<T, Status> {
    tokio::time::timeout(DEADLINE, call).await.map_err(|_| Status::unavailable("no answer in time"))?
}

/// One tensor of bytes.
fn tensor(bytes: &[u8]) -> TensorHeader {
    TensorHeader { name: "state".into(), dtype: "u8".into(), shape: vec![bytes.len() as u64] }
}

pub(super) async fn put_payload(dial: &Dial, to: &Destination, from_stage: &str, kind: &str, bytes: &[u8]) -> Result<(), Status> {
    let header = PayloadHeader {
        task: to.task.clone(),
        from_stage: from_stage.into(),
        kind: kind.into(),
        tensors: vec![tensor(bytes)],
        sha256: Sha256::digest(bytes).to_vec().into(),
    };
    let parts = [put_payload_request::Part::Header(header), put_payload_request::Part::Chunk(Bytes::copy_from_slice(bytes))];
    let parts = parts.map(|part| PutPayloadRequest { part: Some(part) });
    let mut next = WorkerServiceClient::new(connect(dial, &to.address).await?);
    in_time(next.put_payload(tokio_stream::iter(parts))).await.map(drop)
}

pub(super) async fn put_checkpoint(dial: &Dial, address: &str, key: CheckpointKey, bytes: &[u8]) -> Result<(), Status> {
    let header = CheckpointHeader {
        kind: if key.step > 0 { "denoise_state" } else { "latents" }.into(),
        key: Some(key),
        tensors: vec![tensor(bytes)],
        sha256: Sha256::digest(bytes).to_vec().into(),
        byte_size: bytes.len() as u64,
        model_digest: "d".repeat(64),
    };
    let parts =
        [put_checkpoint_request::Part::Header(header), put_checkpoint_request::Part::Chunk(Bytes::copy_from_slice(bytes))];
    let parts = parts.map(|part| PutCheckpointRequest { part: Some(part) });
    let mut client = CheckpointServiceClient::new(connect(dial, address).await?);
    in_time(client.put_checkpoint(tokio_stream::iter(parts))).await.map(drop)
}

/// The step of what was stored, which may be a later one than was asked for, and the state itself.
pub(super) async fn get_checkpoint(dial: &Dial, address: &str, key: CheckpointKey) -> Result<(u32, [u8; 32]), Status> {
    let mut client = CheckpointServiceClient::new(connect(dial, address).await?);
    let mut parts = in_time(client.get_checkpoint(GetCheckpointRequest { key: Some(key) })).await?.into_inner();
    let (mut step, mut bytes) = (0, Vec::new());
    while let Some(response) = in_time(parts.message()).await? {
        match response.part {
            Some(get_checkpoint_response::Part::Header(header)) => step = header.key.unwrap_or_default().step,
            Some(get_checkpoint_response::Part::Chunk(chunk)) => bytes.extend_from_slice(&chunk),
            None => {}
        }
    }
    let state = <[u8; 32]>::try_from(bytes).map_err(|_| Status::data_loss("a state has 32 bytes"))?;
    Ok((step, state))
}

pub(super) async fn upload(dial: &Dial, address: &str, picture: [u8; 32]) -> Result<ImageResult, Status> {
    let header = BlobHeader { byte_size: 32, sha256: String::new(), media_type: "image/png".into() };
    let parts = [upload_blob_request::Part::Header(header), upload_blob_request::Part::Chunk(Bytes::copy_from_slice(&picture))];
    let parts = parts.map(|part| UploadBlobRequest { part: Some(part) });
    let mut blobs = BlobServiceClient::new(connect(dial, address).await?);
    let mut upload = Request::new(tokio_stream::iter(parts));
    upload.metadata_mut().insert(proto::RESULT, MetadataValue::from_static("1"));
    let blob_id = in_time(blobs.upload_blob(upload)).await?.into_inner().blob_id;
    Ok(ImageResult { sha256: blob_id.clone(), blob_id, width: 64, height: 64, media_type: "image/png".into(), byte_size: 32 })
}
