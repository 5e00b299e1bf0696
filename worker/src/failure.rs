//! Why a task ended without output, in the words of the coordinator.

use proto::v1::control_response::Report;
use proto::v1::{TaskFailed, TaskRef};
use tonic::Code;

use crate::Error;

/// Why a task ended without output.
#[derive(Debug)]
pub(crate) struct Failure {
    /// One word for programs.
    pub(crate) reason: &'static str,
    /// One sentence for people; never holds the prompt.
    pub(crate) message: String,
    step: usize,
}

impl Failure {
    pub(crate) fn new(reason: &'static str, message: impl Into<String>) -> Self {
        Self { reason, message: message.into(), step: 0 }
    }

    pub(crate) fn cancelled(step: usize) -> Self {
        Self { step, ..Self::new("CANCELLED", "the task was cancelled") }
    }

    pub(crate) fn lost() -> Self {
        Self::new("PEER_LOST", "the group is over")
    }

    /// What was stored is needed, and is not to be had or not what it should be: the stage has to begin anew.
    pub(crate) fn checkpoint_lost(error: &Error) -> Self {
        Self::new("CHECKPOINT_LOST", error.to_string())
    }

    /// Another worker did not take a payload, though it was asked for long.
    pub(crate) fn refused(error: &Error) -> Self {
        let is_full = matches!(error, Error::Call { code: Code::ResourceExhausted, .. });
        Self::new(if is_full { "OVERLOADED" } else { "PAYLOAD_REFUSED" }, error.to_string())
    }

    /// The coordinator did not give or take a picture, though it was asked for long: nothing is wrong with the picture, and the job
    /// may be tried again.
    pub(crate) fn of_store(error: &Error) -> Self {
        match error {
            // What broke under a call has a code of this side.
            Error::Call {
                code: Code::Unavailable | Code::ResourceExhausted | Code::DeadlineExceeded | Code::Unknown | Code::Cancelled,
                ..
            } => Self::new("STORE_UNAVAILABLE", error.to_string()),
            error => Self::new("PAYLOAD_REFUSED", error.to_string()),
        }
    }

    pub(crate) fn internal(error: &Error) -> Self {
        Self::new("INTERNAL", error.to_string())
    }

    pub(crate) fn of_model(error: &models::Error, step: usize) -> Self {
        let (reason, message) = match error {
            models::Error::Cancelled => return Self::cancelled(step),
            models::Error::Adapter { .. } => ("ADAPTER_UNUSABLE", error.to_string()),
            models::Error::Control { .. } => ("CONTROL_UNUSABLE", error.to_string()),
            models::Error::Checkpoint { .. } => ("CHECKPOINT_LOST", error.to_string()),
            models::Error::Invalid { field, .. } if field.contains("image") => ("INVALID_IMAGE", error.to_string()),
            models::Error::Invalid { .. } => ("INVALID_REQUEST", error.to_string()),
            error if error.loses_group() => ("PEER_LOST", error.to_string()),
            // What a tokenizer says may quote its text.
            models::Error::Tokenizer(_) => ("INTERNAL", "the tokenizer failed".into()),
            error => ("INTERNAL", error.to_string()),
        };
        Self { step, ..Self::new(reason, message) }
    }

    pub(crate) fn report(self, task: TaskRef) -> Report {
        let Self { reason, message, step } = self;
        Report::TaskFailed(TaskFailed { task: Some(task), reason: reason.into(), message, step: step as u32 })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_store_that_is_away_or_full_is_no_fault_of_a_job() {
        let call = |code| Error::Call { address: "a:1".into(), code, message: "not now".into() };
        for code in [Code::Unavailable, Code::ResourceExhausted, Code::DeadlineExceeded, Code::Unknown] {
            assert_eq!(Failure::of_store(&call(code)).reason, "STORE_UNAVAILABLE");
        }
        assert_eq!(Failure::of_store(&call(Code::Internal)).reason, "PAYLOAD_REFUSED", "another try, and not for ever");
        let refused = [Code::ResourceExhausted, Code::FailedPrecondition].map(|code| Failure::refused(&call(code)).reason);
        assert_eq!(refused, ["OVERLOADED", "PAYLOAD_REFUSED"]);
    }
}
