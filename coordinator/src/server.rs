//! Puts the parts together: one port for clients and workers, and the tasks behind it.
//!
//! Long-lived tasks: the owner of the state (`runtime.rs`), the control manager with one task per worker
//! (`control.rs`), the etcd watch if there is etcd, the sweeper of blobs, and the server itself. All end with `stop`.

use std::{
    path::{Path, PathBuf},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use proto::v1::{
    blob_service_server::BlobServiceServer, cluster_service_server::ClusterServiceServer, job_service_server::JobServiceServer,
    membership_service_server::MembershipServiceServer,
};
use tokio::{net::TcpListener, sync::mpsc};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tonic::transport::{
    Server,
    server::{Router, TcpIncoming},
};
use tonic_health::{ServingStatus, server::HealthReporter};
use tracing::info;
use uuid::Uuid;

use crate::{
    api::{ClusterApi, JobApi},
    blobs::{BlobApi, BlobStore, UNUSED_BLOB_TTL},
    config::Config,
    control,
    error::{Error, Result},
    membership::{self, embedded::EmbeddedMembership},
    runtime::{Handle, health_service},
    state::{Key, Settings, State},
};

/// How often the store is swept.
const SWEEP_INTERVAL: Duration = Duration::from_secs(60);
/// How long calls in flight may take to end when the coordinator stops.
const DRAIN_DEADLINE: Duration = Duration::from_secs(3);
/// How often an idle connection is asked whether it is there, and how long it may take to answer.
const KEEPALIVE: (Duration, Duration) = (Duration::from_secs(10), Duration::from_secs(5));

/// Serves until `shutdown` is done. The caller owns the socket and the stop signal.
pub async fn run(config: Config, listener: TcpListener, shutdown: impl Future<Output = ()> + Send) -> Result<()> {
    let local = listener.local_addr().map_err(Error::io("read the listener's address"))?;
    let (_temporary, folder) = data_folder(config.data_dir.as_deref())?;
    let blobs = match &config.object_store {
        Some(place) => BlobStore::open_remote(&folder.join("incoming"), place, &config.limits).await?,
        None => BlobStore::open(&folder.join("blobs"), &config.limits)?,
    };
    let settings = Settings {
        models: config.models.clone(),
        limits: config.limits,
        blob_address: config.advertise.clone().unwrap_or_else(|| local.to_string()),
        key: random_key(),
        first_epoch: first_epoch(),
    };

    let stop = CancellationToken::new();
    let _stop_on_return = stop.clone().drop_guard();
    let (health, health_server) = tonic_health::server::health_reporter();
    announce(&health, &config).await;
    let handle = Handle::spawn(State::new(settings), health, stop.clone());

    let tasks = TaskTracker::new();
    let (changes, changed) = mpsc::channel(membership::MAX_CHANGES);
    tasks.spawn(control::run(changed, handle.clone(), stop.clone()));
    tasks.spawn(sweep(blobs.clone(), handle.clone(), stop.clone()));

    let mut server = Server::builder()
        .tcp_nodelay(true)
        .http2_keepalive_interval(Some(KEEPALIVE.0))
        .http2_keepalive_timeout(Some(KEEPALIVE.1));
    let mut router = services(&mut server, handle, blobs)?.add_service(health_server);
    match config.etcd {
        Some(etcd) => drop(tasks.spawn(membership::etcd::watch(etcd, changes, stop.clone()))),
        None => {
            let embedded = MembershipServiceServer::new(EmbeddedMembership::new(changes, stop.clone()));
            router = router.add_service(embedded.max_decoding_message_size(proto::MAX_MESSAGE_BYTES));
        }
    }
    info!(address = %local, models = config.models.len(), "coordinator serves");
    serve(router, listener, shutdown, &stop).await?;

    tasks.close();
    // Whatever does not end in time ends with the process.
    drop(tokio::time::timeout(DRAIN_DEADLINE, tasks.wait()).await);
    info!("coordinator stopped");
    Ok(())
}

/// Serves until `shutdown`; then streams end, and calls in flight get a moment.
async fn serve(
    router: Router,
    listener: TcpListener,
    shutdown: impl Future<Output = ()> + Send,
    stop: &CancellationToken,
) -> Result<()> {
    let incoming = TcpIncoming::from(listener).with_nodelay(Some(true));
    let serving = router.serve_with_incoming_shutdown(incoming, stop.cancelled());
    tokio::pin!(serving);
    tokio::select! {
        ended = &mut serving => return Ok(ended?),
        () = shutdown => stop.cancel(),
    }
    match tokio::time::timeout(DRAIN_DEADLINE, serving).await {
        Ok(ended) => Ok(ended?),
        // A client that keeps a stream open, such as a health watch, cannot keep the coordinator up.
        Err(_) => Ok(()),
    }
}

fn services(server: &mut Server, handle: Handle, blobs: BlobStore) -> Result<Router> {
    let jobs = JobServiceServer::new(JobApi { handle: handle.clone(), blobs: blobs.clone() })
        .max_decoding_message_size(proto::MAX_MESSAGE_BYTES)
        .max_encoding_message_size(proto::MAX_MESSAGE_BYTES);
    let cluster = ClusterServiceServer::new(ClusterApi { handle })
        .max_decoding_message_size(proto::MAX_MESSAGE_BYTES)
        .max_encoding_message_size(proto::MAX_MESSAGE_BYTES);
    let blobs = BlobServiceServer::new(BlobApi { store: blobs })
        .max_decoding_message_size(proto::MAX_MESSAGE_BYTES)
        .max_encoding_message_size(proto::MAX_MESSAGE_BYTES);
    let reflection = tonic_reflection::server::Builder::configure()
        .register_encoded_file_descriptor_set(proto::FILE_DESCRIPTOR_SET)
        .build_v1()
        .map_err(|error| Error::io("read the descriptors")(std::io::Error::other(error)))?;
    Ok(server.add_service(jobs).add_service(cluster).add_service(blobs).add_service(reflection))
}

async fn announce(health: &HealthReporter, config: &Config) {
    health.set_service_status("atelier.v1.JobService", ServingStatus::Serving).await;
    for model in &config.models {
        health.set_service_status(health_service(&model.name), ServingStatus::NotServing).await;
    }
}

async fn sweep(blobs: BlobStore, handle: Handle, stop: CancellationToken) {
    let mut interval = tokio::time::interval(SWEEP_INTERVAL);
    loop {
        tokio::select! {
            () = stop.cancelled() => return,
            _ = interval.tick() => {}
        }
        let Ok(in_use) = handle.read(|state| state.blobs_in_use()).await else {
            return;
        };
        blobs.sweep(&in_use, UNUSED_BLOB_TTL).await;
    }
}

/// The folder for data; a temporary one is removed when it is dropped.
fn data_folder(configured: Option<&Path>) -> Result<(Option<tempfile::TempDir>, PathBuf)> {
    if let Some(folder) = configured {
        return Ok((None, folder.to_owned()));
    }
    let temporary = tempfile::Builder::new().prefix("atelier-").tempdir().map_err(Error::io("make a temporary folder"))?;
    let folder = temporary.path().to_owned();
    Ok((Some(temporary), folder))
}

fn random_key() -> Key {
    let mut key = [0; 32];
    // Two UUIDs hold 244 bits from the operating system's generator, and no further dependency.
    key[..16].copy_from_slice(Uuid::new_v4().as_bytes());
    key[16..].copy_from_slice(Uuid::new_v4().as_bytes());
    Key(key)
}

/// Grows from one life of the coordinator to the next, so that a worker never sees an epoch twice: no group forms a
/// thousand times a second.
fn first_epoch() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(now.as_millis()).unwrap_or(u64::MAX)
}
