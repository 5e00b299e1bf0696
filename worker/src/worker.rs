//! A worker, put together: what is listened on, what runs, and the order in which it ends.

use std::net::{SocketAddr, TcpListener};
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use identity::{Identity, Incoming, Port};
use proto::v1::Registration;
use tokio_util::sync::CancellationToken;
use tonic::transport::Server;

use crate::backend::{Backend, RegistryBackend};
use crate::cards::Cards;
use crate::config::{Config, Membership};
use crate::dial::Dial;
use crate::drain::Drain;
use crate::groups::{CacheBytes, Groups};
use crate::home::Home;
use crate::mail::Mail;
use crate::meters::Readings;
use crate::outbox::Reports;
use crate::routes::Routes;
use crate::service::Service;
use crate::session::{Leadership, Sessions};
use crate::task::Means;
use crate::tasks::Tasks;
use crate::{Error, Result, embedded, etcd, health, mesh, products, signals};

/// Longest time between the end of the drain and the end of [`Worker::run`].
const CALLS_END: Duration = Duration::from_secs(2);
/// HTTP/2 windows: a chunk of payload is half a megabyte, and a real network has latency.
const WINDOW_BYTES: u32 = 4 << 20;
/// Pings show a caller that is gone without a word.
const KEEP_ALIVE: Duration = Duration::from_secs(2);

/// Runs a worker with this program's models until `shutdown`, and drains it then; a signal after that cuts the drain short.
///
/// # Errors
/// When its device is not there, or when it cannot listen. A coordinator or etcd that is not there is waited for.
pub async fn run(config: Config, shutdown: impl Future<Output = ()>) -> Result<()> {
    // A second worker in one process computes on the first one's threads.
    if let Err(error) = rayon::ThreadPoolBuilder::new().num_threads(config.threads).build_global() {
        tracing::debug!(%error, "the threads to compute with are set already");
    }
    let device = config.place.open().map_err(|error| Error::Config { flag: "device", reason: error.to_string() })?;
    Worker::bind(config, Arc::new(RegistryBackend { device })).await?.run_until(shutdown, signals::stop()).await
}

/// A worker that listens.
pub struct Worker {
    listener: tokio::net::TcpListener,
    data_listener: TcpListener,
    metrics_listener: Option<tokio::net::TcpListener>,
    registration: Registration,
    membership: Membership,
    identity: Option<Identity>,
    groups: Arc<Groups>,
    routes: Arc<Routes>,
    cards: Arc<Cards>,
    reports: Reports,
    drain_timeout: Duration,
    orphan_grace: Duration,
}

impl Worker {
    /// Listens; nobody knows of it yet.
    ///
    /// # Errors
    /// When a port is taken.
    pub async fn bind(config: Config, backend: Arc<dyn Backend>) -> Result<Self> {
        let address = config.listen;
        let listen = |source| Error::Listen { address, source };
        let listener = tokio::net::TcpListener::bind(address).await.map_err(listen)?;
        let bound = listener.local_addr().map_err(listen)?;
        let address = config.data_listen;
        let listen = |source| Error::Listen { address, source };
        let data_listener = TcpListener::bind(address).map_err(listen)?;
        let data_bound = data_listener.local_addr().map_err(listen)?;
        let (metrics_listener, metrics_bound) = match config.metrics_listen {
            Some(address) => {
                let listen = |source| Error::Listen { address, source };
                let listener = tokio::net::TcpListener::bind(address).await.map_err(listen)?;
                let bound = listener.local_addr().map_err(listen)?;
                (Some(listener), Some(bound))
            }
            None => (None, None),
        };
        let registration = Registration {
            worker_id: config.worker_id,
            address: advertised(bound, config.advertise_host.as_deref()),
            data_address: advertised(data_bound, config.advertise_host.as_deref()),
            device: config.place.to_string(),
            labels: config.labels,
            products: products::able(&backend.device()),
            metrics_address: metrics_bound.map(|bound| advertised(bound, config.advertise_host.as_deref())).unwrap_or_default(),
        };
        let routes = Routes::new(mesh::security(config.identity.as_ref()));
        let reports = Reports::default();
        let caches = CacheBytes { prompts: config.prompt_cache_bytes, adapters: config.adapter_cache_bytes };
        let groups = Groups::new(backend.clone(), routes.clone(), caches, config.load_timeout, reports.clone());
        let (cards, membership) = (Cards::new(backend), config.membership);
        let Config { drain_timeout, orphan_grace, identity, .. } = config;
        Ok(Self {
            listener,
            data_listener,
            metrics_listener,
            registration,
            membership,
            identity,
            groups,
            routes,
            cards,
            reports,
            drain_timeout,
            orphan_grace,
        })
    }

    /// How it will appear in the membership.
    pub fn registration(&self) -> &Registration {
        &self.registration
    }

    /// Serves until `shutdown`. Then the coordinator is asked to take over what is done here, for a while; then this worker
    /// leaves the membership and what groups it still has, and ends.
    ///
    /// # Errors
    /// When the server fails.
    pub async fn run(self, shutdown: impl Future<Output = ()>) -> Result<()> {
        self.run_until(shutdown, std::future::pending()).await
    }

    /// As [`Self::run`]; `hurry`, which begins to be waited for after `shutdown`, ends the wait for the coordinator.
    ///
    /// # Errors
    /// When the server fails.
    pub async fn run_until(self, shutdown: impl Future<Output = ()>, hurry: impl Future<Output = ()>) -> Result<()> {
        self.routes.listen(self.data_listener)?;
        let stop = CancellationToken::new();
        let mail = Arc::new(Mail::default());
        let home = Arc::new(Home::new(Dial::new(self.identity.clone()), self.orphan_grace));
        let (groups, reports) = (self.groups.clone(), self.reports.clone());
        let means = Means {
            groups: groups.clone(),
            mail: mail.clone(),
            dial: Dial::new(self.identity.clone()),
            home: home.clone(),
            next_key: AtomicU64::new(1),
        };
        let tasks = Tasks::new(means, reports.clone());
        if let Some(listener) = self.metrics_listener {
            let (readings, tasks) = (Readings { groups: groups.clone(), home: home.clone() }, tasks.clone());
            tokio::spawn(readings.serve(listener, tasks, reports.attached(), stop.clone()));
        }
        let drain = Drain { groups: groups.clone(), tasks: tasks.clone(), reports: reports.clone(), timeout: self.drain_timeout };
        let sessions = Sessions {
            hello: self.registration.clone(),
            groups,
            tasks,
            cards: self.cards,
            reports,
            home,
            orphan_grace: self.orphan_grace,
            stop: stop.clone(),
            leadership: Mutex::new(Leadership::default()),
            turn: tokio::sync::Mutex::default(),
        };
        let service = Service { sessions: Arc::new(sessions), groups: self.groups.clone(), mail };
        let incoming = Incoming::new(self.listener, self.identity.clone().map(|identity| (identity, Port::WORKER)));
        let serving = tokio::spawn(serve(incoming, service, stop.clone()));
        tracing::info!(
            worker.id = self.registration.worker_id,
            address = self.registration.address,
            data_address = self.registration.data_address,
            metrics_address = self.registration.metrics_address,
            "listening"
        );

        let leave = CancellationToken::new();
        let membership = tokio::spawn(match self.membership {
            Membership::Coordinator { url } => {
                futures::future::Either::Left(embedded::keep_registered(url, self.identity, self.registration, leave.clone()))
            }
            Membership::Etcd(place) => {
                futures::future::Either::Right(etcd::keep_registered(place, self.registration, leave.clone()))
            }
        });
        tokio::pin!(serving);
        let drained = async {
            shutdown.await;
            tracing::info!("draining");
            drain.run(hurry).await;
        };
        let ended = tokio::select! {
            () = drained => None,
            served = &mut serving => Some(served),
        };
        tracing::info!("shutting down");
        leave.cancel();
        drop(membership.await);
        stop.cancel();
        let ended = match ended {
            Some(served) => served,
            // Calls that do not end in time are cut.
            None => tokio::time::timeout(CALLS_END, &mut serving).await.unwrap_or(Ok(Ok(()))),
        };
        self.groups.leave_all();
        serving.abort();
        ended.unwrap_or(Err(Error::Panicked))
    }
}

async fn serve(incoming: Incoming, service: Service, stop: CancellationToken) -> Result<()> {
    let (health_reporter, health_server) = tonic_health::server::health_reporter();
    health_reporter.set_serving::<proto::v1::worker_service_server::WorkerServiceServer<Service>>().await;
    health_reporter.set_service_status(health::READY_SERVICE, tonic_health::ServingStatus::NotServing).await;
    let ready = health::tell_ready(health_reporter, service.groups.settled(), service.sessions.reports.attached());
    tokio::spawn(stop.clone().run_until_cancelled_owned(ready));
    let reflection = tonic_reflection::server::Builder::configure()
        .register_encoded_file_descriptor_set(proto::FILE_DESCRIPTOR_SET)
        .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
        .build_v1();
    let reflection = reflection.map_err(|error| Error::message("reflection", error.to_string()))?;
    Server::builder()
        .tcp_nodelay(true)
        .initial_stream_window_size(WINDOW_BYTES)
        .initial_connection_window_size(WINDOW_BYTES)
        .http2_keepalive_interval(Some(KEEP_ALIVE))
        .http2_keepalive_timeout(Some(KEEP_ALIVE))
        .add_service(health_server)
        .add_service(reflection)
        .add_service(service.into_server())
        .serve_with_incoming_shutdown(incoming, stop.cancelled_owned())
        .await?;
    Ok(())
}

/// host:port as others dial it.
fn advertised(bound: SocketAddr, host: Option<&str>) -> String {
    match host {
        Some(host) if host.contains(':') && !host.starts_with('[') => format!("[{host}]:{}", bound.port()),
        Some(host) => format!("{host}:{}", bound.port()),
        None => bound.to_string(),
    }
}

impl std::fmt::Debug for Worker {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Worker({})", self.registration.worker_id)
    }
}
