//! Puts the parts together: one port for clients and workers, and the tasks behind it.
//!
//! Long-lived tasks: the owner of the state (`runtime.rs`), the control manager with one task per worker
//! (`control.rs`), the etcd watch if there is etcd, the sweepers of blobs and checkpoints, and the server itself. All end
//! with `stop`.

use std::{io, path::PathBuf, sync::Arc, time::Duration};

use futures::Stream;
use identity::{Incoming, Peer, Port, Role};
use proto::v1::{
    Lead, blob_service_server::BlobServiceServer, cluster_service_server::ClusterServiceServer,
    job_service_server::JobServiceServer, membership_service_server::MembershipServiceServer,
};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::TcpListener,
    sync::mpsc,
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tonic::{
    service::interceptor::InterceptedService,
    transport::{
        Server,
        server::{Connected, Router},
    },
};
use tonic_health::{ServingStatus, server::HealthReporter};
use tracing::{info, warn};

use crate::{
    api::{ClusterApi, JobApi},
    auth::Authenticator,
    blobs::{BlobApi, BlobStore, Owners, UNUSED_BLOB_TTL},
    checkpoints::{CheckpointApi, CheckpointLimits, CheckpointStore, Done, DoneWith, Place},
    config::{Config, EtcdConfig},
    context::Context,
    control::{self, Lines},
    error::{Error, Result},
    leadership::{self, Led},
    live::LiveJobs,
    membership::{self, embedded::EmbeddedMembership},
    metrics::Meter,
    runtime::{Handle, JOB_SERVICE, Parts, health_service},
    standby,
    state::{Event, Key, SavedSteps, Settings, State},
    store::{EtcdStore, Journal, RealDisk, Recovered, StoreHandle},
    turns::Turns,
    world::Dial,
};

/// How often the store is swept.
const SWEEP_INTERVAL: Duration = Duration::from_secs(60);
/// How long calls in flight may take to end when the coordinator stops.
const DRAIN_DEADLINE: Duration = Duration::from_secs(3);
/// How often an idle connection is asked whether it is there, and how long it may take to answer.
const KEEPALIVE: (Duration, Duration) = (Duration::from_secs(10), Duration::from_secs(5));

/// Serves until `shutdown` is done, the store of jobs is broken, or another coordinator leads. The caller owns the socket
/// and the stop signal. With etcd, it first waits until it leads.
///
/// # Errors
/// When the data folder cannot be used, the store breaks, the lead is lost, or the server fails.
pub async fn run(config: Config, listener: TcpListener, shutdown: impl Future<Output = ()> + Send) -> Result<()> {
    run_measured(config, listener, None, shutdown).await
}

/// As [`run`]; metrics are read at the socket of [`crate::metrics::bind`], while it stands by too.
///
/// # Errors
/// As [`run`].
pub async fn run_measured(
    config: Config,
    listener: TcpListener,
    metrics: Option<TcpListener>,
    shutdown: impl Future<Output = ()> + Send,
) -> Result<()> {
    let (meter, over) = (Meter::default(), CancellationToken::new());
    let _over_on_return = over.clone().drop_guard();
    if let Some(metrics) = metrics {
        tokio::spawn(meter.clone().serve(metrics, over));
    }
    // What it holds over its awaits is some kilobytes.
    Box::pin(run_tcp(config, listener, meter, shutdown)).await
}

async fn run_tcp(config: Config, listener: TcpListener, meter: Meter, shutdown: impl Future<Output = ()> + Send) -> Result<()> {
    let local = listener.local_addr().map_err(Error::io("read the listener's address"))?;
    let address = config.advertise.clone().unwrap_or_else(|| local.to_string());
    let (_temporary, folder) = data_folder(&config)?;
    let mut shutdown = Box::pin(shutdown);
    let (store, takes_over, led) = match &config.etcd {
        None => {
            let journal = folder.join("journal");
            let takes_over = journal.exists();
            let opened = tokio::task::spawn_blocking(move || Journal::open(&journal, Arc::new(RealDisk))).await;
            (opened.map_err(|_| Error::StoreFailed("opening the journal panicked".into()))??, takes_over, None)
        }
        Some(etcd) => {
            let stopped = CancellationToken::new();
            let led = tokio::select! {
                biased;
                led = stand_by(&config, etcd, &address, &listener, &stopped) => led?,
                () = &mut shutdown => return Ok(()),
            };
            (EtcdStore::open(etcd, &led).await?, true, Some(led))
        }
    };
    let blobs = match &config.object_store {
        Some(place) => BlobStore::open_remote(&folder.join("incoming"), place, &config.limits).await?,
        None => BlobStore::open(&folder.join("blobs"), &config.limits)?,
    };
    let lost = led.as_ref().map_or_else(CancellationToken::new, |led| led.lost.clone());
    let place = config.object_store.clone().unwrap_or_else(|| Place::Folder(folder.join("objects")));
    let dial = config.identity.as_ref().map_or_else(Dial::tcp, Dial::to_workers);
    let incoming = incoming(&config, listener);
    let world = World { context: Arc::new(Context::system()), dial, store, takes_over, lost, blobs, place, address, meter };
    Box::pin(run_in(config, world, incoming, shutdown)).await
}

/// Waits until this coordinator leads; meanwhile calls are told to come back.
async fn stand_by(
    config: &Config,
    etcd: &EtcdConfig,
    address: &str,
    listener: &TcpListener,
    stop: &CancellationToken,
) -> Result<Led> {
    let _stop_on_return = stop.clone().drop_guard();
    let clone = || {
        use std::os::fd::AsFd;
        let socket = std::net::TcpListener::from(listener.as_fd().try_clone_to_owned()?);
        TcpListener::from_std(socket)
    };
    let over = CancellationToken::new();
    let listener = clone().map_err(Error::io("share the listener"))?;
    let waiting = standby::serve(incoming(config, listener), over.clone().cancelled_owned());
    tokio::pin!(waiting);
    tokio::select! {
        biased;
        led = leadership::campaign(etcd, address, stop) => {
            over.cancel();
            // Calls that go on do so on connections of their own.
            drop(tokio::time::timeout(DRAIN_DEADLINE, waiting).await);
            led
        }
        ended = &mut waiting => Err(ended.err().unwrap_or(Error::Stopping)),
    }
}

/// The connections of clients and workers, secured if this coordinator has an identity.
fn incoming(config: &Config, listener: TcpListener) -> Incoming {
    Incoming::new(listener, config.identity.clone().map(|identity| (identity, Port::COORDINATOR)))
}

/// Where a coordinator finds itself: what it shares with others, and how it reaches them.
#[derive(Debug)]
pub struct World {
    /// Time and randomness.
    pub context: Arc<Context>,
    /// How workers are reached.
    pub dial: Dial,
    /// The store of jobs, and what was in it.
    pub store: (StoreHandle, Recovered),
    /// Another coordinator may have led before: its workers are waited for.
    pub takes_over: bool,
    /// Cancelled when another coordinator may lead.
    pub lost: CancellationToken,
    /// Pictures.
    pub blobs: BlobStore,
    /// Where checkpoints are.
    pub place: Place,
    /// host:port at which workers reach this coordinator.
    pub address: String,
    /// What is measured beside the state.
    pub meter: Meter,
}

/// As [`run`], in a given world: connections come from `incoming`.
///
/// # Errors
/// As [`run`].
pub async fn run_in<S, C>(config: Config, world: World, incoming: S, shutdown: impl Future<Output = ()> + Send) -> Result<()>
where
    S: Stream<Item = io::Result<C>>,
    C: AsyncRead + AsyncWrite + Connected + Unpin + Send + 'static,
{
    let World { context, dial, store: (store, recovered), takes_over, lost, blobs, place, address, meter } = world;
    let Recovered { jobs, groups, term } = recovered;
    let settings = Settings {
        models: config.models.clone(),
        limits: config.limits,
        blob_address: address.clone(),
        key: Key(context.key()),
        max_record_bytes: store.max_accepted_bytes(),
        term,
        // No group forms a thousand times a second. Where epochs are written down, nothing hangs on the clock.
        first_epoch: context.now(),
    };
    let mut state = State::new(settings);
    let authenticator = Authenticator::open(&config.auth)?;
    // Known before the jobs of an earlier coordinator are put in order. There is nothing yet that it could have an effect on.
    drop(state.apply(context.now(), Event::Tenants(authenticator.limits())));
    let live = LiveJobs::default();
    jobs.iter().for_each(|record| live.note(record));
    let is_live = live.clone();
    let checkpoints =
        CheckpointStore::open(&place, CheckpointLimits::default(), Arc::new(move |job_id| is_live.contains(job_id))).await?;
    if takes_over {
        let saved: SavedSteps = live.all().into_iter().map(|job_id| (job_id.clone(), checkpoints.list(&job_id))).collect();
        state.recover(context.now(), jobs, groups, saved);
    }

    let stop = CancellationToken::new();
    let _stop_on_return = stop.clone().drop_guard();
    let (health, health_server) = tonic_health::server::health_reporter();
    announce(&health, &config).await;
    let (done_with, not_needed) = DoneWith::new(checkpoints.clone());
    let durable = store.durable();
    let parts = Parts { state, context: context.clone(), health, store, live: live.clone(), done_with };
    let (handle, owner) = Handle::spawn(parts, stop.clone());
    meter.leads(handle.clone(), durable, blobs.clone());

    let tasks = TaskTracker::new();
    let (changes, changed) = mpsc::channel(membership::MAX_CHANGES);
    let lines = Lines { handle: handle.clone(), lead: Lead { term, blob_address: address.clone() }, dial };
    tasks.spawn(control::run(changed, lines, stop.clone()));
    tasks.spawn(sweep(blobs.clone(), handle.clone(), stop.clone()));
    tasks.spawn(clear(checkpoints.clone(), not_needed, live, stop.clone()));

    let mut server = Server::builder()
        .tcp_nodelay(true)
        .http2_keepalive_interval(Some(KEEPALIVE.0))
        .http2_keepalive_timeout(Some(KEEPALIVE.1));
    tasks.spawn(authenticator.clone().follow(config.auth.clone(), handle.clone(), stop.clone()));
    let owners = Owners::default();
    let pictures = BlobApi { store: blobs.clone(), handle: handle.clone(), owners: owners.clone(), meter: meter.clone() };
    let jobs = JobApi { handle: handle.clone(), blobs, owners, context, meter, turns: Turns::default() };
    let mut router = services(&mut server, handle, pictures, jobs, authenticator)?
        .add_service(health_server)
        .add_service(InterceptedService::new(CheckpointApi::server(checkpoints), only_workers));
    match config.etcd {
        Some(etcd) => drop(tasks.spawn(membership::etcd::watch(etcd, changes, stop.clone()))),
        None => {
            let embedded = MembershipServiceServer::new(EmbeddedMembership::new(changes, stop.clone()));
            let embedded = embedded.max_decoding_message_size(proto::MAX_MESSAGE_BYTES);
            router = router.add_service(InterceptedService::new(embedded, only_workers));
        }
    }
    info!(address, models = config.models.len(), term, "coordinator serves");
    let broken = async {
        match owner.await {
            Ok(Ok(())) => std::future::pending().await,
            Ok(Err(error)) => error,
            Err(_) => Error::StoreFailed("the owner of the state panicked".into()),
        }
    };
    let ended = tokio::select! {
        biased;
        served = serve(router, incoming, shutdown, &stop) => served,
        error = broken => Err(error),
        () = lost.cancelled() => Err(Error::StoreFailed("another coordinator leads".into())),
    };

    stop.cancel();
    tasks.close();
    // Whatever does not end in time ends with the process.
    drop(tokio::time::timeout(DRAIN_DEADLINE, tasks.wait()).await);
    info!("coordinator stopped");
    ended
}

/// Serves until `shutdown`; then streams end, and calls in flight get a moment.
async fn serve<S, C>(
    router: Router,
    incoming: S,
    shutdown: impl Future<Output = ()> + Send,
    stop: &CancellationToken,
) -> Result<()>
where
    S: Stream<Item = io::Result<C>>,
    C: AsyncRead + AsyncWrite + Connected + Unpin + Send + 'static,
{
    let serving = router.serve_with_incoming_shutdown(incoming, stop.cancelled());
    tokio::pin!(serving);
    tokio::select! {
        biased;
        ended = &mut serving => return Ok(ended?),
        () = shutdown => stop.cancel(),
    }
    match tokio::time::timeout(DRAIN_DEADLINE, serving).await {
        Ok(ended) => Ok(ended?),
        // A client that keeps a stream open, such as a health watch, cannot keep the coordinator up.
        Err(_) => Ok(()),
    }
}

fn services(server: &mut Server, handle: Handle, blobs: BlobApi, jobs: JobApi, authenticator: Authenticator) -> Result<Router> {
    let jobs = JobServiceServer::new(jobs)
        .max_decoding_message_size(proto::MAX_MESSAGE_BYTES)
        .max_encoding_message_size(proto::MAX_MESSAGE_BYTES);
    let cluster = ClusterServiceServer::new(ClusterApi { handle })
        .max_decoding_message_size(proto::MAX_MESSAGE_BYTES)
        .max_encoding_message_size(proto::MAX_MESSAGE_BYTES);
    let blobs = BlobServiceServer::new(blobs)
        .max_decoding_message_size(proto::MAX_MESSAGE_BYTES)
        .max_encoding_message_size(proto::MAX_MESSAGE_BYTES);
    let reflection = tonic_reflection::server::Builder::configure()
        .register_encoded_file_descriptor_set(proto::FILE_DESCRIPTOR_SET)
        .build_v1()
        .map_err(|error| Error::io("read the descriptors")(std::io::Error::other(error)))?;
    let jobs = InterceptedService::new(jobs, authenticator.clone());
    let cluster = InterceptedService::new(cluster, authenticator.clone());
    let blobs = InterceptedService::new(blobs, authenticator);
    Ok(server.add_service(jobs).add_service(cluster).add_service(blobs).add_service(reflection))
}

/// What only workers may call.
#[allow(clippy::result_large_err)] // as tonic has it
fn only_workers(request: tonic::Request<()>) -> std::result::Result<tonic::Request<()>, tonic::Status> {
    Peer::check(request.extensions(), &[Role::Worker])?;
    Ok(request)
}

async fn announce(health: &HealthReporter, config: &Config) {
    health.set_service_status(JOB_SERVICE, ServingStatus::Serving).await;
    for model in &config.models {
        health.set_service_status(health_service(&model.name), ServingStatus::NotServing).await;
    }
}

async fn sweep(blobs: BlobStore, handle: Handle, stop: CancellationToken) {
    let mut interval = tokio::time::interval(SWEEP_INTERVAL);
    loop {
        tokio::select! {
            biased;
            () = stop.cancelled() => return,
            _ = interval.tick() => {}
        }
        match handle.read(|state| state.blobs_in_use()).await {
            Ok(in_use) => blobs.sweep(&in_use, UNUSED_BLOB_TTL).await,
            Err(Error::StoreStalled { .. }) => {}
            Err(_) => return,
        }
    }
}

/// Removes the checkpoints that are not needed any more: at once, and now and then those that were missed.
async fn clear(checkpoints: CheckpointStore, mut not_needed: mpsc::Receiver<Done>, live: LiveJobs, stop: CancellationToken) {
    let mut interval = tokio::time::interval(SWEEP_INTERVAL);
    loop {
        tokio::select! {
            biased;
            () = stop.cancelled() => return,
            _ = interval.tick() => checkpoints.sweep(&live.all()).await,
            done = not_needed.recv() => match done {
                Some(done) => done.remove(&checkpoints).await,
                None => return,
            },
        }
    }
}

/// The folder for data; a temporary one is removed when it is dropped.
fn data_folder(config: &Config) -> Result<(Option<tempfile::TempDir>, PathBuf)> {
    if let Some(folder) = &config.data_dir {
        return Ok((None, folder.clone()));
    }
    match (config.etcd.is_some(), config.object_store.is_some()) {
        (false, false) => warn!("no data folder is named: jobs and pictures are gone when this coordinator ends"),
        (false, true) => warn!("no data folder and no etcd is named: jobs are gone when this coordinator ends"),
        (true, false) => warn!("no data folder and no object store is named: pictures are gone when this coordinator ends"),
        (true, true) => {}
    }
    let temporary = tempfile::Builder::new().prefix("atelier-").tempdir().map_err(Error::io("make a temporary folder"))?;
    let folder = temporary.path().to_owned();
    Ok((Some(temporary), folder))
}
