//! Spans on their way to a collector of OpenTelemetry, by OTLP over gRPC.
//!
//! Off unless the standard variables name a collector. A span is recorded whole, once it is over, under ids that its makers
//! derive ([`crate::TraceContext::under`]): so a span begun by a process that is gone can be ended by another.

use std::{borrow::Cow, sync::OnceLock, time::SystemTime};

use opentelemetry::{
    InstrumentationScope, KeyValue, SpanId, TraceFlags, TraceId, Value,
    trace::{SpanContext, SpanKind, Status, TraceState},
};
use opentelemetry_otlp::{ExporterBuildError, SpanExporter, WithTonicConfig};
use opentelemetry_sdk::{
    Resource,
    trace::{BatchSpanProcessor, SpanData, SpanProcessor},
};

use crate::{TraceContext, tls};

/// Either names a collector: <http://host:4317>, or <https://host:4317>.
const ENDPOINTS: [&str; 2] = ["OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT"];
/// Either may name the protocol.
const PROTOCOLS: [&str; 2] = ["OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL"];
/// `true`: nothing is exported.
const DISABLED: &str = "OTEL_SDK_DISABLED";

static EXPORT: OnceLock<BatchSpanProcessor> = OnceLock::new();

/// Why spans cannot be exported.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// Another protocol is asked for.
    #[error("{variable}: this program speaks grpc, not {value:?}; name an endpoint of that and leave the variable out")]
    Protocol {
        /// Where it is asked for.
        variable: &'static str,
        /// What is.
        value: String,
    },
    /// The exporter cannot be made of what the variables say.
    #[error("the variables OTEL_EXPORTER_OTLP_*")]
    Exporter(#[from] ExporterBuildError),
    /// A file of certificates or of a key.
    #[error("{variable}: read {path}")]
    File {
        /// Where it is named.
        variable: &'static str,
        /// The file.
        path: String,
        /// Why not.
        source: std::io::Error,
    },
    /// A certificate without its key, or the other way about.
    #[error("{missing}: is missing; a certificate and its key go together")]
    Incomplete {
        /// What is not set.
        missing: &'static str,
    },
    /// Twice in one process.
    #[error("spans are exported already")]
    Twice,
}

/// What happened, from its beginning to its end.
#[derive(Debug, Clone)]
pub struct Span {
    /// What; one of few words.
    pub name: &'static str,
    /// Its trace, and its own id in it.
    pub context: TraceContext,
    /// The span it is a part of; zero: of none.
    pub parent: crate::SpanId,
    /// When it began.
    pub start: SystemTime,
    /// When it ended.
    pub end: SystemTime,
    /// Names and numbers only: models, stages, groups, ids; never a prompt.
    pub attributes: Vec<(&'static str, Cow<'static, str>)>,
    /// One word for programs, if it failed.
    pub failed: Option<Cow<'static, str>>,
}

/// Exports from now on if the environment names a collector. `service` is what the process is called unless OTEL_SERVICE_NAME
/// says otherwise. To be called in a runtime of tokio. Gives whether it does.
///
/// # Errors
/// When what the environment says cannot be done.
pub fn start_export(service: &'static str, variable: impl Fn(&str) -> Option<String>) -> Result<bool, Error> {
    let set = |name: &str| variable(name).filter(|value| !value.is_empty());
    let disabled = set(DISABLED).is_some_and(|value| value.eq_ignore_ascii_case("true"));
    let Some(endpoint) = ENDPOINTS.iter().find_map(|name| set(name)).filter(|_| !disabled) else {
        return Ok(false);
    };
    for name in PROTOCOLS {
        if let Some(value) = set(name).filter(|value| value != "grpc") {
            return Err(Error::Protocol { variable: name, value });
        }
    }
    let mut exporter = SpanExporter::builder().with_tonic();
    if endpoint.starts_with("https://") {
        exporter = exporter.with_tls_config(tls::of(set)?);
    }
    let mut exporter = exporter.build()?;
    let named = set("OTEL_SERVICE_NAME").unwrap_or_else(|| service.to_owned());
    let resource = Resource::builder().with_service_name(named).build();
    opentelemetry_sdk::trace::SpanExporter::set_resource(&mut exporter, &resource);
    let mut processor = BatchSpanProcessor::builder(exporter).build();
    processor.set_resource(&resource);
    EXPORT.set(processor).map_err(|_| Error::Twice)?;
    Ok(true)
}

/// Whether anybody wants spans.
pub fn is_exporting() -> bool {
    EXPORT.get().is_some()
}

/// Hands a span over; waits for nothing. Those of traces that are not to be recorded are left out, and those for which the queue
/// has no room.
pub fn record(span: Span) {
    if let Some(export) = EXPORT.get()
        && span.context.sampled
    {
        export.on_end(data(span));
    }
}

/// Sends what is left; waits for the collector, for a while. To be called before the process ends, where it may block.
pub fn flush() {
    if let Some(export) = EXPORT.get()
        && let Err(error) = export.shutdown()
    {
        tracing::warn!(%error, "the last spans could not be sent");
    }
}

fn data(span: Span) -> SpanData {
    let Span { name, context, parent, start, end, attributes, failed } = span;
    let flags = if context.sampled { TraceFlags::SAMPLED } else { TraceFlags::default() };
    let span_id = SpanId::from_bytes(context.span_id);
    let value = |text: Cow<'static, str>| Value::from(text.into_owned());
    SpanData {
        span_context: SpanContext::new(TraceId::from_bytes(context.trace_id), span_id, flags, false, TraceState::NONE),
        parent_span_id: SpanId::from_bytes(parent),
        parent_span_is_remote: false,
        span_kind: SpanKind::Internal,
        name: name.into(),
        start_time: start,
        // A clock that was set back in between makes it short, not negative.
        end_time: end.max(start),
        attributes: attributes.into_iter().map(|(key, text)| KeyValue::new(key, value(text))).collect(),
        dropped_attributes_count: 0,
        events: opentelemetry_sdk::trace::SpanEvents::default(),
        links: opentelemetry_sdk::trace::SpanLinks::default(),
        status: failed.map_or(Status::Unset, Status::error),
        instrumentation_scope: InstrumentationScope::builder("atelier").build(),
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use super::*;

    fn start(variables: &[(&str, &str)]) -> Result<bool, Error> {
        let variables: HashMap<&str, &str> = variables.iter().copied().collect();
        start_export("test", |name| variables.get(name).map(|value| (*value).to_owned()))
    }

    #[test]
    fn nothing_is_exported_unless_a_collector_is_named() {
        assert!(!start(&[]).unwrap());
        assert!(!start(&[(ENDPOINTS[1], "")]).unwrap());
        assert!(!start(&[(ENDPOINTS[1], "http://127.0.0.1:1"), (DISABLED, "true")]).unwrap());
        assert!(!is_exporting());
    }

    #[test]
    fn a_protocol_that_is_not_spoken_is_an_error_that_names_its_variable() {
        let error = start(&[(ENDPOINTS[0], "http://127.0.0.1:1"), (PROTOCOLS[1], "http/json")]).unwrap_err();
        assert!(error.to_string().starts_with("OTEL_EXPORTER_OTLP_PROTOCOL: "), "{error}");
    }
}
