//! TLS to etcd, which has authorities and certificates of its own.

use std::path::PathBuf;

use tonic::transport::{Certificate, ClientTlsConfig, Identity};

use crate::{Error, Result};

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
