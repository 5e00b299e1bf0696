//! What can go wrong in a worker, and the one place where that becomes a gRPC status.

use std::collections::HashMap;

use tonic::{Code, Status};
use tonic_types::{ErrorDetails, StatusExt};

/// Everything that can fail in the worker's own work. What fails in a model is [`models::Error`].
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A flag that cannot be used.
    #[error("--{flag}: {reason}")]
    Config {
        /// The flag.
        flag: &'static str,
        /// What is wrong with it.
        reason: String,
    },
    /// Certificates, keys, and addresses that need them.
    #[error(transparent)]
    Identity(#[from] identity::Error),
    /// A port that cannot be listened on.
    #[error("could not listen on {address}")]
    Listen {
        /// The address.
        address: std::net::SocketAddr,
        /// Why.
        source: std::io::Error,
    },
    /// The gRPC server ended by itself.
    #[error("the gRPC server failed")]
    Serve(#[from] tonic::transport::Error),
    /// A thread that cannot be started.
    #[error("could not start a thread")]
    Thread(#[source] std::io::Error),
    /// A message that lacks something, or holds what it may not.
    #[error("{field}: {reason}")]
    Message {
        /// The field.
        field: String,
        /// What is wrong with it.
        reason: String,
    },
    /// A group, or an incarnation of it, that this worker does not lead.
    #[error("this worker does not lead group {group_id} in epoch {epoch}")]
    StaleEpoch {
        /// The group.
        group_id: String,
        /// The incarnation.
        epoch: u64,
    },
    /// A coordinator that does not lead any more.
    #[error("term {term} is over: this worker follows term {newest}")]
    StaleTerm {
        /// Its term.
        term: u64,
        /// The highest term seen.
        newest: u64,
    },
    /// A control stream that does not say who leads.
    #[error("a control stream begins with Lead")]
    NoLead,
    /// Payloads that nobody has claimed yet fill the inbox.
    #[error("the inbox holds {held} bytes and cannot take {bytes} more")]
    InboxFull {
        /// Bytes it holds.
        held: u64,
        /// Bytes that came.
        bytes: u64,
    },
    /// A blob that is not what its id says, or too large.
    #[error("blob {blob_id}: {reason}")]
    Blob {
        /// The blob.
        blob_id: String,
        /// What is wrong with it.
        reason: String,
    },
    /// Another process refused a call, or could not be reached in time.
    #[error("{address} answered {code:?}: {message}")]
    Call {
        /// Who was called.
        address: String,
        /// What it said.
        code: Code,
        /// In words.
        message: String,
    },
    /// etcd failed.
    #[error(transparent)]
    Etcd(#[from] etcd_client::Error),
    /// etcd does not answer, or says that the lease is over.
    #[error("the lease is lost: {0}")]
    LeaseLost(&'static str),
    /// Below: tensors and pictures.
    #[error(transparent)]
    Model(#[from] models::Error),
    /// A thread of computation panicked.
    #[error("a computation panicked")]
    Panicked,
}

/// The crate's result.
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    pub(crate) fn message(field: impl Into<String>, reason: impl Into<String>) -> Self {
        Error::Message { field: field.into(), reason: reason.into() }
    }

    pub(crate) fn call(address: &str, status: &Status) -> Self {
        Error::Call { address: address.to_owned(), code: status.code(), message: status.message().to_owned() }
    }

    /// The word that programs act on.
    fn reason(&self) -> (Code, &'static str) {
        match self {
            Error::Message { .. } | Error::Blob { .. } => (Code::InvalidArgument, "INVALID_PAYLOAD"),
            Error::StaleEpoch { .. } => (Code::FailedPrecondition, "STALE_EPOCH"),
            Error::StaleTerm { .. } => (Code::FailedPrecondition, "STALE_TERM"),
            Error::NoLead => (Code::FailedPrecondition, "NO_LEAD"),
            Error::InboxFull { .. } => (Code::ResourceExhausted, "INBOX_FULL"),
            _ => (Code::Internal, "INTERNAL"),
        }
    }
}

/// An error as the caller of this worker sees it.
pub(crate) fn status(error: &Error) -> Status {
    let (code, reason) = error.reason();
    let details = ErrorDetails::with_error_info(reason, proto::ERROR_DOMAIN, HashMap::new());
    Status::with_error_details(code, error.to_string(), details)
}
