//! What a person at the command line is told.

use tonic_types::{FieldViolation, StatusExt};

/// Everything that ends a command.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    /// The server refused.
    #[error("the server refused")]
    Status(#[from] Box<tonic::Status>),
    /// The server cannot be reached.
    #[error("could not reach the server at {address}; is it up? (`atelier up` starts one)")]
    Connect {
        address: String,
        #[source]
        source: tonic::transport::Error,
    },
    /// It answers, and does not serve.
    #[error("it says {0}")]
    NotServing(&'static str),
    /// The job came to its end without pictures.
    #[error("the job {}", .0)]
    Job(String),
    /// Nobody answers any more, and the job was accepted.
    #[error(
        "nobody answers any more; job {job} may go on: `atelier jobs show {job}` and `atelier jobs fetch {job}` tell, once somebody does"
    )]
    Away {
        job: String,
        #[source]
        source: Box<tonic::Status>,
    },
    /// A person pressed Ctrl-C.
    #[error("interrupted: {0}")]
    Interrupted(String),
    /// What a job made is not there any more.
    #[error("the pictures of job {0} are not kept any more: they were too old, or made room for those of later jobs")]
    PictureGone(String),
    /// A file, or an address to listen at.
    #[error("{path}")]
    File { path: String, source: std::io::Error },
    /// The system.
    #[error(transparent)]
    Io(#[from] std::io::Error),
    /// A flag.
    #[error("{flag}: {reason}")]
    Flag { flag: &'static str, reason: String },
    /// A process of `up`.
    #[error("{0}")]
    Up(String),
    /// The coordinator.
    #[error(transparent)]
    Coordinator(#[from] coordinator::error::Error),
    /// A worker.
    #[error(transparent)]
    Worker(#[from] worker::error::Error),
    /// Spans cannot be exported.
    #[error("exporting spans")]
    Telemetry(#[from] telemetry::Error),
    /// Certificates and keys.
    #[error(transparent)]
    Identity(#[from] identity::Error),
    /// A model's files.
    #[error(transparent)]
    Models(#[from] models::Error),
    /// A check-list that is not all right.
    #[error("{failed} of the checks failed")]
    Checks { failed: usize },
    /// A message that should not have come.
    #[error("the server sent something unexpected: {0}")]
    Protocol(&'static str),
}

impl From<tonic::Status> for Error {
    fn from(status: tonic::Status) -> Self {
        Error::Status(Box::new(status))
    }
}

impl Error {
    /// The error and its causes; of a refusal, every field that was wrong.
    pub(crate) fn for_people(&self) -> String {
        // A refusal's causes are of this side: a connection that broke.
        let (mut text, mut source) = match self {
            Error::Status(status) => (status_text(status), std::error::Error::source(&**status)),
            _ => (format!("error: {self}"), std::error::Error::source(self)),
        };
        while let Some(cause) = source {
            text.push_str(&format!("\n  because: {cause}"));
            source = cause.source();
        }
        text
    }
}

fn status_text(status: &tonic::Status) -> String {
    let details = status.get_error_details();
    let reason = details.error_info().map_or_else(|| format!("{:?}", status.code()), |info| info.reason.clone());
    let mut text = format!("error: {} ({reason})", status.message());
    // The message of a coordinator has them all already; that of something before it may not.
    let said = |violation: &&FieldViolation| !status.message().contains(&violation.description);
    for violation in details.bad_request().iter().flat_map(|b| &b.field_violations).filter(said) {
        text.push_str(&format!("\n  {}: {}", violation.field, violation.description));
    }
    if let Some(delay) = details.retry_info().and_then(|r| r.retry_delay) {
        text.push_str(&format!("\n  try again in {:.0} s", delay.as_secs_f64()));
    }
    text
}
