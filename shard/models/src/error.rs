//! What can go wrong with a model or a stage.

use std::path::PathBuf;

use crate::Checkpoint;

/// Everything that can fail in a model.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Below the models: tensors, weights, ranks.
    #[error(transparent)]
    Parallel(#[from] parallel::Error),
    /// A file of a model's directory cannot be used.
    #[error("`{}`: {reason}", path.display())]
    ModelDir {
        /// The file or folder.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// Another model than the one that is meant: what every worker has in one place is not the same.
    #[error("`{}` has another `{name}` than the one that was described: this worker's files differ, and its part would fit no other's", path.display())]
    Differs {
        /// The component, or the control network.
        name: String,
        /// The model's directory, or the network's.
        path: PathBuf,
    },
    /// A value in a configuration that this implementation does not have.
    #[error("`{field}` = {value} is not supported")]
    Unsupported {
        /// The field of the configuration.
        field: String,
        /// What it says.
        value: String,
    },
    /// A value of the request that the stage cannot work with.
    #[error("{field}: {reason}")]
    Invalid {
        /// The field of the request.
        field: &'static str,
        /// What is wrong with it.
        reason: String,
    },
    /// A text that the tokenizer refuses.
    #[error("the tokenizer failed: {0}")]
    Tokenizer(String),
    /// A stage was given something it does not take.
    #[error("stage {stage} cannot take a {got} payload")]
    Payload {
        /// The stage.
        stage: &'static str,
        /// What it was given.
        got: &'static str,
    },
    /// Another rank of the group could not do its part of a forward.
    #[error("{reason}")]
    Rank {
        /// What that rank said.
        reason: String,
    },
    /// An adapter that a rank of the group cannot use.
    #[error("adapter `{name}`: {reason}")]
    Adapter {
        /// Its name.
        name: String,
        /// Why.
        reason: String,
    },
    /// A control network that a job cannot be given.
    #[error("control `{name}`: {reason}")]
    Control {
        /// Its name.
        name: String,
        /// Why.
        reason: String,
    },
    /// A checkpoint that does not fit the job it is to be taken up in.
    #[error("checkpoint: {field} {reason}")]
    Checkpoint {
        /// The step or the tensor.
        field: String,
        /// What is wrong with it.
        reason: String,
    },
    /// The job was stopped on purpose, to go on from here elsewhere or later.
    #[error("the job was parked")]
    Parked(Option<Box<Checkpoint>>),
    /// The job was cancelled.
    #[error("the job was cancelled")]
    Cancelled,
}

impl Error {
    pub(crate) fn checkpoint(field: impl Into<String>, reason: impl Into<String>) -> Self {
        Error::Checkpoint { field: field.into(), reason: reason.into() }
    }

    /// Whether the group can go on after this: a rank is lost otherwise.
    pub fn loses_group(&self) -> bool {
        matches!(self, Error::Parallel(error) if error.loses_group())
    }
}

impl From<candle_core::Error> for Error {
    fn from(e: candle_core::Error) -> Self {
        Error::Parallel(e.into())
    }
}

/// The crate's result.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Refuses a number of a configuration unless it `fits` the others.
pub(crate) fn check_fits(field: &str, value: usize, fits: bool) -> Result<()> {
    if fits { Ok(()) } else { Err(Error::Unsupported { field: field.into(), value: value.to_string() }) }
}
