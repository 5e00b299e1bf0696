//! What a task tells in its job's trace: a span for the stage, one for the wait for its inputs, and one for each step, which the
//! rank's thread records itself.

use std::borrow::Cow;
use std::time::SystemTime;

use proto::v1::RunTask;
use telemetry::{Span, SpanId, TraceContext};

use crate::inbox::TaskId;

/// A stage's place in its job's trace.
#[derive(Debug)]
pub(crate) struct StageSpan {
    /// The stage's own span.
    context: TraceContext,
    parent: SpanId,
    attributes: Vec<(&'static str, Cow<'static, str>)>,
    began: SystemTime,
}

impl StageSpan {
    /// Of a task that was taken on now, if it belongs to a trace.
    pub(crate) fn of(run: &RunTask, id: &TaskId) -> Option<Self> {
        let job = TraceContext::parse(&run.traceparent)?;
        let (attempt, epoch) = (id.attempt.to_string(), id.epoch.to_string());
        let model = run.spec.as_ref().map(|spec| spec.model.clone()).unwrap_or_default();
        Some(Self {
            context: job.under(&["stage", &id.stage, &attempt]),
            parent: job.span_id,
            attributes: vec![
                ("job.id", id.job_id.clone().into()),
                ("model", model.into()),
                ("stage", id.stage.clone().into()),
                ("job.attempt", attempt.into()),
                ("group.id", id.group_id.clone().into()),
                ("group.epoch", epoch.into()),
            ],
            began: SystemTime::now(),
        })
    }

    /// The name of the trace.
    pub(crate) fn trace_id(&self) -> String {
        self.context.id()
    }

    /// The task is over; `failed` says why, in a word.
    pub(crate) fn ended(&self, failed: Option<&'static str>) {
        telemetry::record(Span {
            name: "stage",
            context: self.context,
            parent: self.parent,
            start: self.began,
            end: SystemTime::now(),
            attributes: self.attributes.clone(),
            failed: failed.map(Cow::Borrowed),
        });
    }

    /// Its inputs have come.
    pub(crate) fn prepared(&self) {
        self.part("inputs", &["inputs"], self.began, Vec::new());
    }

    /// The group's leader, in its rank's thread, made a step that began then.
    pub(crate) fn stepped(&self, step: usize, steps: usize, start: SystemTime) {
        // Strings are made for those only who want them.
        if !telemetry::is_exporting() {
            return;
        }
        let (step, steps) = (step.to_string(), steps.to_string());
        let words = ["step", step.as_str()];
        let more = vec![("rank", Cow::Borrowed("0")), ("step", step.clone().into()), ("steps", steps.into())];
        self.part("step", &words, start, more);
    }

    fn part(&self, name: &'static str, words: &[&str], start: SystemTime, more: Vec<(&'static str, Cow<'static, str>)>) {
        let mut attributes = self.attributes.clone();
        attributes.extend(more);
        telemetry::record(Span {
            name,
            context: self.context.under(&[words, &[&hex(self.context.span_id)]].concat()),
            parent: self.context.span_id,
            start,
            end: SystemTime::now(),
            attributes,
            failed: None,
        });
    }
}

/// Names a span among words.
fn hex(id: SpanId) -> String {
    format!("{:016x}", u64::from_be_bytes(id))
}
