//! Everything that can go wrong in the coordinator, one variant per cause, with the facts.
//!
//! An error says what failed. What a client is told (code, retry) is decided in one place: [`crate::api::status`].

use std::{io, path::PathBuf};

/// A result whose error is the crate's own.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What went wrong. Holds no prompt, ever.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// Fields of a request that cannot be taken: all of them, not the first.
    #[error("{}", describe(.0))]
    InvalidRequest(Vec<Violation>),
    /// A model that is not in models.toml.
    #[error("no model is named {0:?}")]
    ModelNotFound(String),
    /// No worker has read the model yet.
    #[error("model {0:?}: no worker has described it yet")]
    ModelNotReady(String),
    /// The model cannot be served until somebody repairs it.
    #[error("model {model:?} cannot be served: {problem}")]
    ModelBroken {
        /// Its name.
        model: String,
        /// What is wrong with it.
        problem: String,
    },
    /// A request id came again with another body.
    #[error("request_id {0} was used for another request")]
    RequestIdReused(String),
    /// As many jobs wait as may wait.
    #[error("the queue holds {0} jobs, which is its limit")]
    QueueFull(usize),
    /// A tenant has as many jobs waiting as it may.
    #[error("tenant {tenant:?} has {limit} jobs waiting, which is its limit")]
    TenantQueueFull {
        /// Whose limit.
        tenant: String,
        /// Jobs.
        limit: usize,
    },
    /// A tenant has used what it may for now.
    #[error("tenant {tenant:?} has used its quota of {limit} pixel-steps a second")]
    TenantQuota {
        /// Whose limit.
        tenant: String,
        /// Pixel-steps a second.
        limit: u64,
        /// When there will be enough for this job.
        retry_millis: u64,
    },
    /// Nobody whom this coordinator knows.
    #[error("{problem}")]
    Unauthenticated {
        /// The word programs act on.
        reason: &'static str,
        /// For people; never what was shown.
        problem: &'static str,
    },
    /// What is known of the model says that the picture cannot be there in time.
    #[error("the picture is expected in {predicted} ms, later than the {timeout} ms asked for")]
    DeadlineUnreachable {
        /// Milliseconds the client would wait.
        timeout: u64,
        /// Milliseconds it would take.
        predicted: u64,
    },
    /// What was accepted cannot be made durable: nothing is accepted any more.
    #[error("the job store failed: {0}")]
    StoreFailed(String),
    /// What was accepted before is not durable yet: nobody is told anything until it is.
    #[error("the job store has not answered for {seconds} s")]
    StoreStalled {
        /// How long the oldest change has waited.
        seconds: u64,
    },
    /// No such job, or it is over and was dropped.
    #[error("no job has the id {0:?}")]
    JobNotFound(String),
    /// No such blob, or it was dropped.
    #[error("no blob has the id {0:?}")]
    BlobNotFound(String),
    /// All bytes that may be stored are stored.
    #[error("the blob store is full: its limit is {0} bytes")]
    BlobStoreFull(u64),
    /// The disk or the object store that pictures are kept in. It may be well again in a moment.
    #[error("the store of pictures is not to be used for now: {what}")]
    BlobStorage {
        /// What was tried.
        what: String,
        /// What came of it.
        source: io::Error,
    },
    /// A worker's registration or heartbeat that makes no sense.
    #[error("registration refused: {0}")]
    InvalidRegistration(String),
    /// The coordinator is shutting down.
    #[error("the coordinator is shutting down")]
    Stopping,
    /// A setting that cannot be right.
    #[error("{setting}: {problem}")]
    Setting {
        /// The flag.
        setting: &'static str,
        /// What is wrong with its value.
        problem: String,
    },
    /// models.toml says something that cannot be right.
    #[error("{}:{line}: {problem}", path.display())]
    ModelsFile {
        /// The file.
        path: PathBuf,
        /// The line, from 1.
        line: usize,
        /// The field and what is wrong with it.
        problem: String,
    },
    /// The file of keys says something that cannot be right.
    #[error("{}: {problem}", path.display())]
    KeysFile {
        /// The file.
        path: PathBuf,
        /// The field and what is wrong with it; never a key.
        problem: String,
    },
    /// The disk.
    #[error("{what}")]
    Io {
        /// What was tried.
        what: String,
        /// What came of it.
        source: io::Error,
    },
    /// Certificates, keys, and addresses that need them.
    #[error(transparent)]
    Identity(#[from] identity::Error),
    /// The gRPC server.
    #[error("the gRPC server failed")]
    Serve(#[from] tonic::transport::Error),
    /// etcd.
    #[error("etcd: {0}")]
    Etcd(#[from] etcd_client::Error),
    /// etcd stopped telling us what changes.
    #[error("the etcd watch ended: {0}")]
    WatchEnded(String),
}

/// One field and why it cannot be taken.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Violation {
    /// The field's path in the request, such as `spec.width`.
    pub field: String,
    /// What is wrong with it; never the prompt.
    pub problem: String,
}

impl Violation {
    /// A violation of `field`.
    pub fn new(field: impl Into<String>, problem: impl Into<String>) -> Self {
        Self { field: field.into(), problem: problem.into() }
    }
}

impl Error {
    /// A single field that cannot be taken.
    pub fn invalid(field: impl Into<String>, problem: impl Into<String>) -> Self {
        Self::InvalidRequest(vec![Violation::new(field, problem)])
    }

    /// Wraps an I/O error with what was tried: `.map_err(Error::io("..."))`.
    pub(crate) fn io(what: impl Into<String>) -> impl FnOnce(io::Error) -> Self {
        let what = what.into();
        move |source| Self::Io { what, source }
    }

    /// As [`Self::io`], of what pictures are kept in.
    pub(crate) fn blob_storage(what: impl Into<String>) -> impl FnOnce(io::Error) -> Self {
        let what = what.into();
        move |source| Self::BlobStorage { what, source }
    }

    /// The word programs act on (`ErrorInfo.reason`).
    pub fn reason(&self) -> &'static str {
        match self {
            Self::InvalidRequest(_) => "INVALID_REQUEST",
            Self::ModelNotFound(_) => "MODEL_NOT_FOUND",
            Self::ModelNotReady(_) => "MODEL_NOT_READY",
            Self::ModelBroken { .. } => "MODEL_BROKEN",
            Self::RequestIdReused(_) => "REQUEST_ID_REUSED",
            Self::QueueFull(_) => "QUEUE_FULL",
            Self::TenantQueueFull { .. } => "TENANT_QUEUE_FULL",
            Self::TenantQuota { .. } => "TENANT_QUOTA",
            Self::Unauthenticated { reason, .. } => reason,
            Self::DeadlineUnreachable { .. } => "DEADLINE_UNREACHABLE",
            Self::StoreFailed(_) => "STORE_FAILED",
            Self::StoreStalled { .. } => "STORE_STALLED",
            Self::JobNotFound(_) => "JOB_NOT_FOUND",
            Self::BlobNotFound(_) => "BLOB_NOT_FOUND",
            Self::BlobStoreFull(_) => "BLOB_STORE_FULL",
            Self::BlobStorage { .. } => "BLOB_STORE_UNAVAILABLE",
            Self::InvalidRegistration(_) => "INVALID_REGISTRATION",
            Self::Stopping => "STOPPING",
            Self::Setting { .. } | Self::ModelsFile { .. } | Self::KeysFile { .. } | Self::Identity(_) => "INVALID_CONFIGURATION",
            Self::Io { .. } | Self::Serve(_) | Self::Etcd(_) | Self::WatchEnded(_) => "INTERNAL",
        }
    }
}

fn describe(violations: &[Violation]) -> String {
    let texts: Vec<String> = violations.iter().map(|v| format!("{}: {}", v.field, v.problem)).collect();
    texts.join("; ")
}
