//! How etcd is reached: whichever of its members answers, by TLS with authorities and certificates of its own.

use std::{path::PathBuf, time::Duration};

use etcd_client::{Client, ConnectOptions};
use futures::{StreamExt, stream::FuturesUnordered};
use tonic::transport::{Certificate, ClientTlsConfig, Identity};

use crate::{Error, Result};

/// How much later than the one before it each member is asked.
const HEAD_START: Duration = Duration::from_millis(100);

/// A connection to one member of etcd, the first of `endpoints` that answers a read of `key` which the majority agrees on. One
/// that is cut off from the others, or from here, takes connections and says nothing, or for so long; so all are asked, the first
/// ones first.
///
/// # Errors
/// Why the last of them cannot be reached, when none can. Waits without end for one that is silent: bounded by the caller.
pub async fn connect(endpoints: &[String], options: &ConnectOptions, key: &str) -> Result<Client, etcd_client::Error> {
    let reach = async |number: u32, endpoint: &String| {
        tokio::time::sleep(HEAD_START * number).await;
        let mut client = Client::connect([endpoint], Some(options.clone())).await?;
        client.get(key, None).await?;
        Ok(client)
    };
    let mut asked: FuturesUnordered<_> = (0..).zip(endpoints).map(|(number, endpoint)| reach(number, endpoint)).collect();
    let mut last = Err(etcd_client::Error::InvalidArgs("no endpoints".into()));
    while let Some(reached) = asked.next().await {
        last = reached;
        if last.is_ok() {
            break;
        }
    }
    last
}

/// The flags of a process that talks to an etcd with TLS.
#[derive(Debug, Clone, Default, PartialEq, Eq, clap::Args)]
pub struct EtcdTls {
    /// The authorities that etcd's certificate is checked against (PEM). Its endpoints are https:// then.
    #[arg(long, env = "ATELIER_ETCD_CA")]
    pub etcd_ca: Option<PathBuf>,
    /// The certificate to show etcd (PEM).
    #[arg(long, env = "ATELIER_ETCD_CERT", requires_all = ["etcd_ca", "etcd_key"])]
    pub etcd_cert: Option<PathBuf>,
    /// Its private key (PEM).
    #[arg(long, env = "ATELIER_ETCD_KEY", requires_all = ["etcd_ca", "etcd_cert"])]
    pub etcd_key: Option<PathBuf>,
}

impl EtcdTls {
    /// What a connection that is made now takes: the files are read each time, so that new ones are used by the next.
    ///
    /// # Errors
    /// When a file cannot be read.
    pub fn options(&self) -> Result<Option<ClientTlsConfig>> {
        let read = |path: &PathBuf| std::fs::read(path).map_err(|source| Error::Read { path: path.clone(), source });
        let Some(ca) = &self.etcd_ca else {
            return Ok(None);
        };
        let mut options = ClientTlsConfig::new().ca_certificate(Certificate::from_pem(read(ca)?));
        if let (Some(cert), Some(key)) = (&self.etcd_cert, &self.etcd_key) {
            options = options.identity(Identity::from_pem(read(cert)?, read(key)?));
        }
        Ok(Some(options))
    }
}
