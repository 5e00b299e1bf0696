//! A worker that speaks the whole protocol and draws nothing: for load tests, and for simulations in which thousands of
//! workers come and go.
//!
//! Its network is a chain of hashes. The text's embedding is the hash of the prompt, the first latents are a hash of that and
//! the seed, a step hashes the latents, and the picture is the last of them; what its group is multiplied in is hashed with all
//! of it. So a job that was resumed wrongly, given another job's tensors, or computed partly in one way and partly in another,
//! has another picture than [`picture`] says.

mod rpc;
mod service;
mod task;

use std::{io, sync::Arc, time::Duration};

use futures::Stream;
use proto::v1::{
    Component, JobSpec, ModelCard, Parameter, Products, RegisterRequest, Registration, StageKind, StageTemplate,
    membership_service_client::MembershipServiceClient, worker_service_server::WorkerServiceServer,
};
use sha2::{Digest, Sha256};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    sync::mpsc,
};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::transport::{Server, server::Connected};

use self::service::Fake;
use crate::{config::EtcdConfig, leadership, membership, world::Dial};

/// How often it says that it is there.
const HEARTBEAT: Duration = Duration::from_secs(1);
/// A prompt that contains this makes the worker end without a word when it denoises it.
pub const POISON: &str = "poison";
/// How long it keeps what it holds when no coordinator is there.
const ORPHAN_GRACE: Duration = Duration::from_secs(60);

/// How quick it is.
#[derive(Debug, Clone, Copy)]
pub struct Pace {
    /// To load a rank.
    pub load: Duration,
    /// For a text, a picture, or a denoising step.
    pub step: Duration,
    /// It keeps checkpoints and stage outputs at the coordinator.
    pub checkpoints: bool,
    /// It says of them what they were multiplied in. If not, it says f32 of all: that is broken on purpose.
    pub says_products: bool,
}

/// Where it says that it is there.
#[derive(Debug, Clone)]
pub enum Register {
    /// At the coordinator: host:port.
    Coordinator(String),
    /// In etcd, where any coordinator finds it.
    Etcd(EtcdConfig),
}

/// A worker that stands in for one that computes.
#[derive(Debug, Clone)]
pub struct StandIn {
    /// As it appears in the membership.
    pub registration: Registration,
    /// How quick it is.
    pub pace: Pace,
    /// How it reaches others.
    pub dial: Dial,
    /// Cancelled when it is to go: it hands over what it has, and ends.
    pub drain: CancellationToken,
}

impl StandIn {
    /// Serves on `incoming` and stays registered until `stop`, until it is drained, or until a poisoned prompt ends it.
    ///
    /// # Errors
    /// When the server fails.
    pub async fn run<S, C>(self, register: Register, incoming: S, stop: CancellationToken) -> Result<(), tonic::transport::Error>
    where
        S: Stream<Item = io::Result<C>>,
        C: AsyncRead + AsyncWrite + Connected + Unpin + Send + 'static,
    {
        let life = stop.child_token();
        let fake = Fake::new(self.registration.clone(), self.pace, self.dial.clone(), life.clone());
        let draining = tokio::spawn(fake.clone().drain(self.drain));
        let registering = tokio::spawn(stay_registered(register, self.registration, self.dial, life.clone()));
        let service = WorkerServiceServer::new(fake).max_decoding_message_size(proto::MAX_MESSAGE_BYTES);
        let served = tokio::select! {
            biased;
            served = Server::builder().add_service(service).serve_with_incoming(incoming) => served,
            // Open connections are cut, as by kill -9.
            () = life.cancelled() => Ok(()),
        };
        life.cancel();
        registering.abort();
        draining.abort();
        served
    }
}

async fn stay_registered(place: Register, registration: Registration, dial: Dial, life: CancellationToken) {
    while !life.is_cancelled() {
        match &place {
            Register::Coordinator(coordinator) => drop(register(coordinator, &registration, &dial).await),
            Register::Etcd(etcd) => drop(leadership::hold_key(etcd, &worker_key(etcd, &registration), &registration).await),
        }
        tokio::time::sleep(HEARTBEAT / 4).await;
    }
}

fn worker_key(etcd: &EtcdConfig, registration: &Registration) -> String {
    format!("{}{}", membership::etcd::workers_prefix(&etcd.prefix), registration.worker_id)
}

async fn register(coordinator: &str, registration: &Registration, dial: &Dial) -> Result<(), tonic::Status> {
    let mut client = MembershipServiceClient::new(rpc::connect(dial, coordinator).await?);
    let (sender, requests) = mpsc::channel(4);
    drop(sender.try_send(RegisterRequest { registration: Some(registration.clone()) }));
    let mut responses = client.register(ReceiverStream::new(requests)).await?.into_inner();
    let mut beat = tokio::time::interval(HEARTBEAT);
    loop {
        tokio::select! {
            biased;
            _ = beat.tick() => {
                if sender.try_send(RegisterRequest { registration: None }).is_err() {
                    return Ok(());
                }
            }
            heard = tokio::time::timeout(5 * HEARTBEAT, responses.message()) => match heard {
                Ok(Ok(Some(_))) => {}
                _ => return Ok(()),
            },
        }
    }
}

/// What the picture of a job is whose model is multiplied in `products`, however often it was interrupted.
pub fn picture(spec: &JobSpec, products: Products) -> [u8; 32] {
    let mut latents = first_latents(&embedding(spec, products), spec);
    for _ in 0..spec.num_inference_steps() {
        latents = next_latents(&latents, products);
    }
    decoded(&latents, products)
}

fn embedding(spec: &JobSpec, products: Products) -> [u8; 32] {
    Sha256::new().chain_update(b"text").chain_update(products.name()).chain_update(&spec.prompt).finalize().into()
}

fn decoded(latents: &[u8; 32], products: Products) -> [u8; 32] {
    Sha256::new().chain_update(b"picture").chain_update(products.name()).chain_update(latents).finalize().into()
}

fn first_latents(embedding: &[u8; 32], spec: &JobSpec) -> [u8; 32] {
    Sha256::new().chain_update(embedding).chain_update(spec.seed().to_le_bytes()).finalize().into()
}

fn next_latents(latents: &[u8; 32], products: Products) -> [u8; 32] {
    Sha256::new().chain_update(products.name()).chain_update(latents).finalize().into()
}

/// The card of the model it serves, whatever the directory.
pub fn card(model: &str) -> ModelCard {
    let stage = |id: &str, kind: StageKind, component: &str, inputs: &[&str]| StageTemplate {
        id: id.into(),
        kind: kind as i32,
        component: component.into(),
        inputs: inputs.iter().map(|input| (*input).to_owned()).collect(),
        condition: 0,
        with_pictures: false,
        with_controls: false,
        replaces: String::new(),
    };
    let component = |name: &str| Component {
        name: name.into(),
        weight_bytes: 1,
        tp_options: vec![1, 2, 4, 8],
        max_block_ranges: 8,
        fingerprint: String::new(),
    };
    let number = |name: &str, minimum, maximum, default| Parameter {
        name: name.into(),
        minimum,
        maximum,
        default_value: Some(default),
        ..Parameter::default()
    };
    ModelCard {
        name: model.into(),
        digest: "d".repeat(64),
        components: ["text_encoder", "transformer", "vae"].map(component).to_vec(),
        stages: vec![
            stage("encode_text", StageKind::EncodeText, "text_encoder", &[]),
            stage("denoise", StageKind::Denoise, "transformer", &["encode_text"]),
            stage("decode", StageKind::Decode, "vae", &["denoise"]),
        ],
        parameters: vec![
            number("width", 16.0, 4096.0, 64.0),
            number("height", 16.0, 4096.0, 64.0),
            number("num_inference_steps", 1.0, 1000.0, 4.0),
        ],
        max_pixels: 1 << 24,
        ..ModelCard::default()
    }
}

/// A worker of this id at an address.
pub fn registration(worker_id: &str, address: &str) -> Registration {
    Registration {
        worker_id: worker_id.into(),
        address: address.into(),
        data_address: address.into(),
        device: "cpu".into(),
        products: Products::ALL.map(i32::from).to_vec(),
        ..Registration::default()
    }
}

/// What its parts share.
type Shared<T> = Arc<std::sync::Mutex<T>>;

fn lock<T>(shared: &Shared<T>) -> std::sync::MutexGuard<'_, T> {
    shared.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_picture_tells_its_prompt_seed_steps_and_products_apart() {
        let spec = JobSpec { prompt: "a car".into(), seed: Some(1), num_inference_steps: Some(4), ..JobSpec::default() };
        let others = [
            JobSpec { prompt: "a cat".into(), ..spec.clone() },
            JobSpec { seed: Some(2), ..spec.clone() },
            JobSpec { num_inference_steps: Some(5), ..spec.clone() },
        ];
        let first = picture(&spec, Products::F32);
        assert!(others.iter().all(|other| picture(other, Products::F32) != first));
        assert_ne!(picture(&spec, Products::Bf16), first);
    }
}
