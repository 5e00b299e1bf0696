//! The coordinator's checkpoint store: outputs of stages, and the states of denoisers.

use std::sync::Arc;

use futures::stream;
use models::{Checkpoint, Payload};
use proto::v1::checkpoint_service_client::CheckpointServiceClient;
use proto::v1::get_checkpoint_response::Part;
use proto::v1::{CheckpointKey, GetCheckpointRequest, GetCheckpointResponse, Products, RunTask};
use sha2::{Digest, Sha256};
use tokio::time::Instant;
use tonic::transport::Channel;
use tonic::{Status, Streaming};

use crate::blobs::hex;
use crate::home::Home;
use crate::payload_wire::{DENOISE_STATE, Incoming, Outgoing};
use crate::{Error, Result};

/// The store as one job sees it.
#[derive(Clone, Debug)]
pub(crate) struct Store {
    home: Arc<Home>,
    address: String,
    job_id: String,
    /// What the group is multiplied in, whose task it is.
    products: Products,
    /// Of the model and of the job's adapters.
    model_digest: String,
}

impl Store {
    /// For the job of `run`, on a group that multiplies in `products`.
    pub(crate) fn of(run: &RunTask, job_id: &str, products: Products, home: &Arc<Home>) -> Self {
        let (address, job_id, model_digest) = (run.blob_address.clone(), job_id.to_owned(), weights_digest(run));
        Self { home: home.clone(), address, job_id, products, model_digest }
    }

    /// Stores what a denoiser has done. It is durable when this returns.
    pub(crate) async fn put_state(&self, stage: &str, checkpoint: Checkpoint) -> Result<u32> {
        let step = checkpoint.step as u32;
        let encoded = tokio::task::spawn_blocking(move || Outgoing::encode(DENOISE_STATE, &checkpoint.tensors)).await;
        self.put(stage, step, &encoded.map_err(|_| Error::Panicked)??).await?;
        Ok(step)
    }

    /// Stores a stage's output. It is durable when this returns.
    pub(crate) async fn put_output(&self, stage: &str, output: &Outgoing) -> Result<()> {
        self.put(stage, 0, output).await
    }

    /// What a denoiser had done by `step`, or by a later one.
    pub(crate) async fn state(&self, stage: &str, step: u32) -> Result<Checkpoint> {
        self.get(stage, step, Incoming::finish_state).await
    }

    /// What a stage gave.
    pub(crate) async fn output(&self, stage: &str) -> Result<Payload> {
        self.get(stage, 0, Incoming::finish).await
    }

    async fn put(&self, stage: &str, step: u32, body: &Outgoing) -> Result<()> {
        let (key, began) = (self.key(stage, step), Instant::now());
        let answer = self.home.call(&self.address, |channel| {
            let messages = body.checkpoint_messages(key.clone(), &self.model_digest);
            let mut client = client(channel);
            async move { client.put_checkpoint(stream::iter(messages)).await }
        });
        let stored = answer.await.map(drop);
        self.home.saves.took(began.elapsed(), stored.is_ok());
        stored
    }

    async fn get<T: Send + 'static>(
        &self,
        stage: &str,
        step: u32,
        finish: impl FnOnce(Incoming) -> Result<T> + Send + 'static,
    ) -> Result<T> {
        let key = self.key(stage, step);
        let incoming = self.home.call(&self.address, |channel| {
            let (key, mut client) = (key.clone(), client(channel));
            async move {
                let request = GetCheckpointRequest { key: Some(key.clone()) };
                collect(client.get_checkpoint(request).await?.into_inner(), &key, &self.model_digest).await
            }
        });
        let incoming = incoming.await??;
        tokio::task::spawn_blocking(move || finish(incoming)).await.map_err(|_| Error::Panicked)?
    }

    fn key(&self, stage: &str, step: u32) -> CheckpointKey {
        CheckpointKey { job_id: self.job_id.clone(), stage: stage.to_owned(), step, products: self.products.into() }
    }
}

/// What names the weights that a job runs with: the model's digest, or one of it and the adapters' and control networks'.
fn weights_digest(run: &RunTask) -> String {
    if run.adapter_digests.is_empty() && run.control_digests.is_empty() {
        return run.model_digest.clone();
    }
    let mut digest = Sha256::new().chain_update(&run.model_digest);
    for adapter in &run.adapter_digests {
        digest.update(b" ");
        digest.update(adapter);
    }
    for control in &run.control_digests {
        digest.update(b" control ");
        digest.update(control);
    }
    hex(&digest.finalize())
}

fn client(channel: Channel) -> CheckpointServiceClient<Channel> {
    CheckpointServiceClient::new(channel)
        .max_decoding_message_size(proto::MAX_MESSAGE_BYTES)
        .max_encoding_message_size(proto::MAX_MESSAGE_BYTES)
}

/// The outer error may be worth another try; the inner one says that the checkpoint is not what was asked for.
async fn collect(
    mut parts: Streaming<GetCheckpointResponse>,
    key: &CheckpointKey,
    model_digest: &str,
) -> Result<Result<Incoming>, Status> {
    let mut incoming: Option<Incoming> = None;
    while let Some(message) = parts.message().await? {
        let taken = match (message.part, &mut incoming) {
            (Some(Part::Header(header)), None) => {
                Incoming::of_checkpoint(header, key, model_digest).map(|begun| incoming = Some(begun))
            }
            (Some(Part::Chunk(chunk)), Some(incoming)) => incoming.push(&chunk),
            _ => Err(Error::message("part", "is out of order")),
        };
        if let Err(error) = taken {
            return Ok(Err(error));
        }
    }
    Ok(incoming.ok_or_else(|| Error::message("header", "is missing")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn other_adapters_are_other_weights() {
        let run = |adapters: &[&str]| RunTask {
            model_digest: "m".into(),
            adapter_digests: adapters.iter().map(|digest| (*digest).to_owned()).collect(),
            ..RunTask::default()
        };
        assert_eq!(weights_digest(&run(&[])), "m");
        let digests = [run(&["a"]), run(&["b"]), run(&["a", "b"]), run(&["b", "a"])].map(|run| weights_digest(&run));
        assert!(digests.iter().all(|digest| digest.len() == 64));
        assert_eq!(digests.iter().collect::<std::collections::BTreeSet<_>>().len(), 4);
    }
}
