//! Flags in, the files of an identity out.

use std::{
    fs,
    net::IpAddr,
    path::{Path, PathBuf},
};

use crate::{Error, Identity, Result, Role};

/// The flags of a process that has a certificate. All three, or none.
#[derive(Debug, Clone, Default, clap::Args)]
pub struct TlsArgs {
    /// This process's certificate, with what leads to the authority (PEM). It is read again when it changes.
    #[arg(long, env = "ATELIER_TLS_CERT")]
    pub tls_cert: Option<PathBuf>,
    /// The certificate's private key (PEM).
    #[arg(long, env = "ATELIER_TLS_KEY")]
    pub tls_key: Option<PathBuf>,
    /// The authorities whose certificates are believed (PEM, one or several).
    #[arg(long, env = "ATELIER_TLS_CA")]
    pub tls_ca: Option<PathBuf>,
    /// Listen without TLS where other machines can reach it: whoever can, may use it.
    #[arg(long, env = "ATELIER_INSECURE", conflicts_with_all = ["tls_cert", "tls_key", "tls_ca"])]
    pub insecure: bool,
    /// Serve metrics where other machines can reach them: they are plain text with TLS too, and whoever can may read them.
    #[arg(long, env = "ATELIER_METRICS_INSECURE")]
    pub metrics_insecure: bool,
}

impl TlsArgs {
    /// The identity that the flags name, for a process of `role`; none without flags.
    ///
    /// # Errors
    /// When only some are given, or a file does not hold what it should.
    pub fn identity(&self, role: Role) -> Result<Option<Identity>> {
        let given = [("--tls-cert", &self.tls_cert), ("--tls-key", &self.tls_key), ("--tls-ca", &self.tls_ca)];
        match (&self.tls_cert, &self.tls_key, &self.tls_ca) {
            (None, None, None) => Ok(None),
            (Some(cert), Some(key), Some(ca)) => {
                let files = Files { own: Some((cert.clone(), key.clone())), ca: ca.clone() };
                Identity::open(files, role).map(Some)
            }
            _ => {
                let missing = given.iter().find(|(_, path)| path.is_none()).map_or("--tls-cert", |(flag, _)| flag);
                Err(Error::Incomplete { missing })
            }
        }
    }

    /// Refuses to listen at `address` of `flag` where that would let anybody in.
    ///
    /// # Errors
    /// [`Error::Open`] when other machines can reach it and there is neither TLS nor leave.
    pub fn check_listen(&self, flag: &'static str, address: IpAddr) -> Result<()> {
        if address.is_loopback() || self.insecure || self.tls_cert.is_some() {
            return Ok(());
        }
        Err(Error::Open { flag, address })
    }

    /// As [`Self::check_listen`], for a port that is plain with TLS too: that of metrics.
    ///
    /// # Errors
    /// [`Error::Plain`] when other machines can reach it and there is no leave.
    pub fn check_plain(&self, flag: &'static str, address: IpAddr) -> Result<()> {
        if address.is_loopback() || self.insecure || self.metrics_insecure {
            return Ok(());
        }
        Err(Error::Plain { flag, address })
    }
}

/// Where an identity is kept.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Files {
    /// Certificate and key; a client may have none.
    pub own: Option<(PathBuf, PathBuf)>,
    /// The authorities whose certificates are believed.
    pub ca: PathBuf,
}

/// What was in them.
#[derive(Clone, PartialEq, Eq)]
pub(crate) struct Contents {
    /// Certificate and key.
    pub(crate) own: Option<(Vec<u8>, Vec<u8>)>,
    pub(crate) ca: Vec<u8>,
}

impl Files {
    pub(crate) fn read(&self) -> Result<Contents> {
        let own = match &self.own {
            Some((cert, key)) => Some((read(cert)?, read(key)?)),
            None => None,
        };
        Ok(Contents { own, ca: read(&self.ca)? })
    }
}

fn read(path: &Path) -> Result<Vec<u8>> {
    fs::read(path).map_err(|source| Error::Read { path: path.to_owned(), source })
}
