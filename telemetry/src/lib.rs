//! What processes show of themselves: metrics that Prometheus reads, spans that go to a collector of OpenTelemetry, and logs.
//!
//! It may not know what is measured: models, jobs and groups are names that come with a value. Nothing here is on by itself. No
//! prompt, picture or key ever comes here.

mod export;
mod histogram;
pub mod log;
mod page;
mod serve;
mod tls;
mod trace;

pub use export::{Error, Span, flush, is_exporting, record, start_export};
pub use histogram::{Histogram, LONG, SHORT};
pub use page::{CONTENT_TYPE, Page};
pub use serve::{Reply, serve};
pub use trace::{SpanId, TRACEPARENT, TraceContext};
