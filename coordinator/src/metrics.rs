//! What a coordinator shows by HTTP: `/metrics` for Prometheus, and `/targets`, where its `http_sd_configs` finds the workers.

use std::{
    collections::BTreeMap,
    net::SocketAddr,
    sync::{Arc, Mutex, OnceLock, PoisonError},
    time::{SystemTime, UNIX_EPOCH},
};

use telemetry::{CONTENT_TYPE, Page, Reply};
use tokio::{net::TcpListener, sync::watch};
use tokio_util::sync::CancellationToken;
use tracing::info;

use crate::{
    blobs::BlobStore,
    error::{Error, Result},
    runtime::Handle,
    store::Durable,
};

/// Reasons for which a job or a picture is not accepted, that are counted from the beginning.
const REFUSALS: [&str; 11] = [
    "BLOB_STORE_FULL",
    "BLOB_STORE_UNAVAILABLE",
    "DEADLINE_UNREACHABLE",
    "INVALID_REQUEST",
    "MODEL_BROKEN",
    "MODEL_NOT_FOUND",
    "MODEL_NOT_READY",
    "QUEUE_FULL",
    "REQUEST_ID_REUSED",
    "STORE_FAILED",
    "STORE_STALLED",
];

/// What a coordinator measures beside its state. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Meter(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    /// Seconds since 1970.
    started: f64,
    /// By reason; reasons are words of ours.
    refusals: Mutex<BTreeMap<&'static str, u64>>,
    /// Set once this coordinator leads.
    leads: OnceLock<Led>,
}

/// What a coordinator that leads has.
#[derive(Debug)]
struct Led {
    handle: Handle,
    durable: watch::Receiver<Durable>,
    blobs: BlobStore,
}

impl Default for Meter {
    fn default() -> Self {
        let started = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs_f64();
        let refusals = Mutex::new(REFUSALS.into_iter().map(|reason| (reason, 0)).collect());
        Self(Arc::new(Inner { started, refusals, leads: OnceLock::new() }))
    }
}

impl Meter {
    /// A job, or a picture, was not accepted.
    pub(crate) fn refused(&self, reason: &'static str) {
        *self.0.refusals.lock().unwrap_or_else(PoisonError::into_inner).entry(reason).or_default() += 1;
    }

    /// A picture was not taken: counted where it is the store's doing, and not what was sent.
    pub(crate) fn upload_failed(&self, error: &Error) {
        if matches!(error, Error::BlobStoreFull(_) | Error::BlobStorage { .. }) {
            self.refused(error.reason());
        }
    }

    /// From now on this coordinator leads.
    pub(crate) fn leads(&self, handle: Handle, durable: watch::Receiver<Durable>, blobs: BlobStore) {
        // A second time is the same coordinator's.
        drop(self.0.leads.set(Led { handle, durable, blobs }));
    }

    /// Serves until `stop`.
    pub(crate) async fn serve(self, listener: TcpListener, stop: CancellationToken) {
        let answer = move |path: String| {
            let meter = self.clone();
            Box::pin(async move {
                match path.as_str() {
                    "/metrics" => meter.page().await,
                    "/targets" => Some(meter.targets().await),
                    _ => None,
                }
            })
        };
        telemetry::serve(listener, answer, stop).await;
    }

    async fn page(&self) -> Option<Reply> {
        let mut page = Page::default();
        page.process(env!("CARGO_PKG_VERSION"), self.0.started);
        let leads = self.0.leads.get();
        let measured = match leads {
            Some(led) => led.handle.measure().await.ok(),
            None => None,
        };
        let help = "1: this coordinator leads; 0: it stands by, or is about to end.";
        page.gauge("atelier_leader", help, f64::from(u8::from(measured.is_some())));
        let failed = leads.is_some_and(|led| led.durable.borrow().failed.is_some());
        let help = "1: the store of jobs failed, and this coordinator ends.";
        page.gauge("atelier_store_failed", help, f64::from(u8::from(failed)));
        let refusals: Vec<_> = {
            let refusals = self.0.refusals.lock().unwrap_or_else(PoisonError::into_inner);
            refusals.iter().map(|(reason, count)| ([(*reason).to_owned()], *count as f64)).collect()
        };
        page.counters("atelier_refusals", "Jobs and pictures that were not accepted.", ["reason"], refusals);
        if let Some(led) = leads {
            led.blobs.measure(&mut page);
        }
        page.append(measured.unwrap_or_default());
        page.text().ok().map(|body| Reply { content_type: CONTENT_TYPE, body })
    }

    /// The workers that this coordinator knows, as Prometheus's `http_sd_configs` takes them. One that stands by knows none.
    async fn targets(&self) -> Reply {
        let workers = match self.0.leads.get() {
            Some(led) => led.handle.look(|state| state.metrics_addresses()).await.unwrap_or_default(),
            None => Vec::new(),
        };
        let groups: Vec<String> = workers
            .iter()
            .map(|(worker_id, address)| {
                format!("{{\"targets\":[{}],\"labels\":{{\"worker\":{}}}}}", json(address), json(worker_id))
            })
            .collect();
        Reply { content_type: "application/json", body: format!("[{}]", groups.join(",")) }
    }
}

/// Text as JSON writes it.
fn json(text: &str) -> String {
    let escaped: String = text
        .chars()
        .map(|c| match c {
            '"' | '\\' => format!("\\{c}"),
            c if c.is_control() => format!("\\u{:04x}", u32::from(c)),
            c => c.to_string(),
        })
        .collect();
    format!("\"{escaped}\"")
}

/// Listens for readers of metrics, if an address is named.
///
/// # Errors
/// When the port is taken.
pub async fn bind(address: Option<SocketAddr>) -> Result<Option<TcpListener>> {
    let Some(address) = address else {
        return Ok(None);
    };
    let taken = |source| Error::Io { what: format!("--metrics-listen: listen on {address}"), source };
    let listener = TcpListener::bind(address).await.map_err(taken)?;
    info!(address = %listener.local_addr().map_err(taken)?, "metrics are read at /metrics");
    Ok(Some(listener))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_is_json_whatever_it_holds() {
        assert_eq!(json("a\"b\\c\n"), r#""a\"b\\c\u000a""#);
    }

    #[tokio::test]
    async fn uploads_that_the_store_does_not_take_are_among_the_refusals() {
        let meter = Meter::default();
        meter.upload_failed(&Error::blob_storage("store a blob")(std::io::Error::other("503 Slow Down")));
        meter.upload_failed(&Error::BlobStoreFull(1));
        meter.upload_failed(&Error::invalid("header.byte_size", "is not that of the bytes"));
        let body = meter.page().await.unwrap().body;
        for (reason, count) in [("BLOB_STORE_UNAVAILABLE", 1), ("BLOB_STORE_FULL", 1), ("INVALID_REQUEST", 0)] {
            let line = format!("\natelier_refusals_total{{reason=\"{reason}\"}} {count}.0\n");
            assert!(body.contains(&line), "{line} is not in {body}");
        }
    }

    #[tokio::test]
    async fn a_coordinator_that_stands_by_says_so() {
        let meter = Meter::default();
        meter.refused("QUEUE_FULL");
        let body = meter.page().await.unwrap().body;
        assert!(body.contains("\natelier_leader 0.0\n"), "{body}");
        assert!(body.contains("\natelier_refusals_total{reason=\"QUEUE_FULL\"} 1.0\n"), "{body}");
        assert_eq!(meter.targets().await.body, "[]");
    }
}
