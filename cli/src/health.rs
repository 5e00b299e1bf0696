//! `atelier health`: asks a process whether it serves, for probes where those of gRPC cannot be used since they speak no TLS.

use std::path::PathBuf;
use std::time::Duration;

use clap::Args;
use identity::{Dialled, Files, Identity, Role};
use tonic::transport::Endpoint;
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_health::pb::health_client::HealthClient;

use crate::error::Error;

/// Longest wait for an answer.
const DEADLINE: Duration = Duration::from_secs(5);

#[derive(Debug, Args)]
pub(crate) struct HealthArgs {
    /// host:port of a coordinator or a worker.
    #[arg(default_value = "127.0.0.1:7700")]
    address: String,
    /// What is asked for, such as atelier.v1.JobService or atelier.worker.Ready; without it, whether the process answers.
    #[arg(long, default_value = "")]
    service: String,
    /// It is a worker, and the certificate is a worker's.
    #[arg(long)]
    worker: bool,
    /// The authorities that its certificate is checked against (PEM); without it, the connection is plain.
    #[arg(long, env = "ATELIER_TLS_CA")]
    tls_ca: Option<PathBuf>,
    /// The certificate to show to a worker, a worker's own (PEM). A coordinator is asked without one.
    #[arg(long, env = "ATELIER_TLS_CERT")]
    tls_cert: Option<PathBuf>,
    /// Its private key (PEM).
    #[arg(long, env = "ATELIER_TLS_KEY")]
    tls_key: Option<PathBuf>,
}

/// An error unless it serves.
pub(crate) async fn run(args: HealthArgs) -> Result<(), Error> {
    let address = ["http://", "https://"].iter().find_map(|scheme| args.address.strip_prefix(scheme)).unwrap_or(&args.address);
    let url = format!("http://{}", address.trim_end_matches('/'));
    let connect = |source| Error::Connect { address: args.address.clone(), source };
    let endpoint = Endpoint::from_shared(url).map_err(connect)?.connect_timeout(DEADLINE).timeout(DEADLINE);
    let channel = match args.tls_ca {
        None => Dialled::plain(endpoint).await,
        Some(ca) => {
            let (own, role) =
                if args.worker { (args.tls_cert.zip(args.tls_key), Role::Worker) } else { (None, Role::Coordinator) };
            let identity = Identity::open(Files { own, ca }, role)?;
            endpoint.connect_with_connector(identity.connector(role)).await.map(Dialled::from)
        }
    };
    let mut client = HealthClient::new(channel.map_err(connect)?);
    let answer = client.check(HealthCheckRequest { service: args.service }).await?.into_inner();
    match answer.status() {
        ServingStatus::Serving => Ok(()),
        other => Err(Error::NotServing(other.as_str_name())),
    }
}
