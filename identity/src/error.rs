//! What can be wrong with an identity.

use std::{io, path::PathBuf};

use crate::Role;

/// A result whose error is the crate's own.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What went wrong. Never holds a key.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// Some of the flags that go together are missing.
    #[error("{missing}: is missing; --tls-cert, --tls-key and --tls-ca go together")]
    Incomplete {
        /// The first flag that is not given.
        missing: &'static str,
    },
    /// A port that others can reach would be open to all.
    #[error(
        "{flag}: {address} can be reached from other machines, and without TLS anybody could use it; give --tls-cert, --tls-key and --tls-ca (`atelier certs` makes some), or --insecure"
    )]
    Open {
        /// The flag that names the address.
        flag: &'static str,
        /// The address.
        address: std::net::IpAddr,
    },
    /// A port that is plain in any case, and that others can reach.
    #[error(
        "{flag}: {address} can be reached from other machines, and this port is plain text with TLS too; give a loopback address, or --metrics-insecure"
    )]
    Plain {
        /// The flag that names the address.
        flag: &'static str,
        /// The address.
        address: std::net::IpAddr,
    },
    /// A file that cannot be read.
    #[error("read {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A file that holds something else.
    #[error("{}: {problem}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        problem: String,
    },
    /// A certificate for something else.
    #[error("{}: is no certificate of a {role}: {} is not among its URIs", path.display(), role.uri())]
    Role {
        /// The file.
        path: PathBuf,
        /// The role that it should have.
        role: Role,
    },
    /// A file that is there already.
    #[error("{} is there already; --renew makes new certificates by the same authority, --force replaces all", path.display())]
    Exists {
        /// The file.
        path: PathBuf,
    },
    /// A file that cannot be written.
    #[error("write {}", path.display())]
    Write {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A certificate that cannot be made.
    #[error("make a certificate: {0}")]
    Make(#[from] rcgen::Error),
    /// The thread that looks at the files.
    #[error("start the thread that follows the certificates")]
    Thread(#[source] io::Error),
}
