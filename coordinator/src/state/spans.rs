//! What is told of jobs in traces: a span for each wait and, at the end, one for the whole job. Kept here until the owner of the
//! state takes them; a machine without I/O sends nothing.

use std::{
    borrow::Cow,
    time::{Duration, UNIX_EPOCH},
};

use telemetry::Span;

use super::{Millis, State, job::Job, tally::ending};

impl State {
    /// The spans that ended since this was asked last.
    pub fn take_spans(&mut self) -> Vec<Span> {
        std::mem::take(&mut self.spans)
    }

    /// The name of a job's trace; empty: it has none, or there is no such job.
    pub fn trace_id(&self, job_id: &str) -> String {
        let trace = self.jobs.by_id(job_id).and_then(|job| job.trace);
        trace.map(|trace| trace.id()).unwrap_or_default()
    }
}

/// A job that waited has its groups.
pub(super) fn waited(job: &Job, now: Millis) -> Option<Span> {
    let own = job.span().filter(|own| own.sampled)?;
    let attempt = job.attempt.to_string();
    Some(Span {
        name: "queue",
        context: own.under(&["queue", &attempt]),
        parent: own.span_id,
        start: time(job.queued),
        end: time(now),
        attributes: attributes(job, attempt),
        failed: None,
    })
}

/// A job is over.
pub(super) fn ended(job: &Job) -> Option<Span> {
    let own = job.span().filter(|own| own.sampled)?;
    let mut attributes = attributes(job, job.attempt.to_string());
    attributes.push(("job.state", ending(job.state).into()));
    Some(Span {
        name: "job",
        context: own,
        parent: job.trace?.span_id,
        start: time(job.created()),
        end: time(job.finished?),
        attributes,
        failed: job.failure.as_ref().map(|failure| failure.reason.clone().into()),
    })
}

fn attributes(job: &Job, attempt: String) -> Vec<(&'static str, Cow<'static, str>)> {
    vec![("job.id", job.id.clone().into()), ("model", job.spec.model.clone().into()), ("job.attempt", attempt.into())]
}

fn time(millis: Millis) -> std::time::SystemTime {
    UNIX_EPOCH + Duration::from_millis(millis)
}
