//! The client's end of a trace: a span for the command, whose name goes with the request.

use std::time::SystemTime;

use telemetry::{Span, SpanId, TRACEPARENT, TraceContext};

/// Names a trace that the command is to be a part of, as other programs do: a `traceparent`.
const VARIABLE: &str = "TRACEPARENT";

/// A command that asks for a job.
#[derive(Debug)]
pub(crate) struct Call {
    own: TraceContext,
    parent: SpanId,
    began: SystemTime,
}

impl Call {
    /// In the trace that the environment names; if it names none, in a new one.
    pub(crate) fn begin() -> Self {
        let given = std::env::var(VARIABLE).ok().and_then(|text| TraceContext::parse(&text));
        let words = ["client", &uuid::Uuid::new_v4().to_string()];
        let (own, parent) = match given {
            Some(outer) => (outer.under(&words), outer.span_id),
            None => (TraceContext::begin().under(&words), SpanId::default()),
        };
        Self { own, parent, began: SystemTime::now() }
    }

    /// The request with the name of the trace.
    pub(crate) fn tagged<T>(&self, message: T) -> tonic::Request<T> {
        let mut request = tonic::Request::new(message);
        if let Ok(value) = self.own.to_string().parse() {
            request.metadata_mut().insert(TRACEPARENT, value);
        }
        request
    }

    /// The command is over.
    pub(crate) fn ended(self, failed: bool) {
        telemetry::record(Span {
            name: "generate",
            context: self.own,
            parent: self.parent,
            start: self.began,
            end: SystemTime::now(),
            attributes: Vec::new(),
            failed: failed.then_some("FAILED".into()),
        });
    }
}
