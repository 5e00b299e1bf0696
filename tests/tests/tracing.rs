//! One trace from the client to the rank: spans of every process at a collector of OpenTelemetry, and the trace's name in logs.

#![allow(clippy::unwrap_used)] // helpers of tests are tests

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::process::Stdio;
use std::sync::{Arc, Mutex};

use identity::authority::{self, Existing};
use opentelemetry_proto::tonic::collector::trace::v1::trace_service_server::{TraceService, TraceServiceServer};
use opentelemetry_proto::tonic::collector::trace::v1::{ExportTraceServiceRequest, ExportTraceServiceResponse};
use opentelemetry_proto::tonic::common::v1::KeyValue;
use opentelemetry_proto::tonic::common::v1::any_value::Value;
use opentelemetry_proto::tonic::trace::v1::Span;
use proto::v1::{CreateJobRequest, GetJobRequest, JobSpec, JobState};
use tests::cluster::{Client, Cluster, atelier, eventually, tiny_flux};
use tokio_stream::wrappers::TcpListenerStream;
use tonic::transport::{Certificate, Identity, Server, ServerTlsConfig};
use tonic::{Request, Response, Status};

const STEPS: usize = 6;

/// Keeps what is exported to it: (service, span).
#[derive(Debug, Clone, Default)]
struct Collector(Arc<Mutex<Vec<(String, Span)>>>);

#[tonic::async_trait]
impl TraceService for Collector {
    async fn export(&self, request: Request<ExportTraceServiceRequest>) -> Result<Response<ExportTraceServiceResponse>, Status> {
        for of_process in request.into_inner().resource_spans {
            let attributes = of_process.resource.unwrap_or_default().attributes;
            let service = text(&attributes, "service.name");
            let spans = of_process.scope_spans.into_iter().flat_map(|scope| scope.spans);
            self.0.lock().unwrap().extend(spans.map(|span| (service.clone(), span)));
        }
        Ok(Response::new(ExportTraceServiceResponse::default()))
    }
}

impl Collector {
    async fn start() -> (Self, String) {
        let (collector, port) = Self::start_with(Server::builder()).await;
        (collector, format!("http://127.0.0.1:{port}"))
    }

    async fn start_with(mut server: Server) -> (Self, u16) {
        let collector = Self::default();
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let server = server.add_service(TraceServiceServer::new(collector.clone()));
        tokio::spawn(server.serve_with_incoming(TcpListenerStream::new(listener)));
        (collector, port)
    }

    /// One that speaks TLS and takes only whom the authority of this folder has signed.
    async fn start_secured(tls: &Path) -> (Self, String) {
        let file = |name: &str| std::fs::read(tls.join(name)).unwrap();
        let own = Identity::from_pem(file("coordinator.crt"), file("coordinator.key"));
        let config = ServerTlsConfig::new().identity(own).client_ca_root(Certificate::from_pem(file("ca.crt")));
        let (collector, port) = Self::start_with(Server::builder().tls_config(config).unwrap()).await;
        (collector, format!("https://localhost:{port}"))
    }

    /// The spans of a trace, each once: a process that had no answer may send them again.
    fn of(&self, trace_id: &str) -> Vec<(String, Span)> {
        let mut seen = BTreeSet::new();
        let spans = self.0.lock().unwrap().clone();
        spans.into_iter().filter(|(_, span)| hex(&span.trace_id) == trace_id && seen.insert(span.span_id.clone())).collect()
    }
}

fn text(attributes: &[KeyValue], key: &str) -> String {
    let found = attributes.iter().find(|attribute| attribute.key == key).and_then(|attribute| attribute.value.clone()?.value);
    match found {
        Some(Value::StringValue(text)) => text,
        other => panic!("{key} is {other:?} in {attributes:?}"),
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn models() -> String {
    format!("[[model]]\nname = \"tiny\"\npath = \"{}\"\n[model.components.transformer]\ntp = 2\n", tiny_flux().display())
}

fn spec(steps: usize) -> JobSpec {
    JobSpec {
        model: "tiny".into(),
        prompt: "a very secret fox".into(),
        width: Some(48),
        height: Some(32),
        num_inference_steps: Some(steps as u32),
        max_sequence_length: Some(16),
        ..JobSpec::default()
    }
}

/// The job's trace, when it is asked for with this `traceparent`.
async fn trace_of(client: &mut Client, traceparent: &str, steps: usize) -> (String, String) {
    let mut request = Request::new(CreateJobRequest { spec: Some(spec(steps)), ..CreateJobRequest::default() });
    request.metadata_mut().insert("traceparent", traceparent.parse().unwrap());
    let job = client.jobs.create_job(request).await.unwrap().into_inner().job.unwrap();
    (job.id, job.trace_id)
}

#[tokio::test(flavor = "multi_thread")]
async fn one_trace_leads_from_the_client_through_the_coordinator_to_the_ranks_and_is_named_in_their_logs() {
    let (collector, endpoint) = Collector::start().await;
    let variables = [
        ("OTEL_EXPORTER_OTLP_ENDPOINT", endpoint.as_str()),
        ("OTEL_BSP_SCHEDULE_DELAY", "100"),
        ("RUST_LOG", "info"),
        ("ATELIER_LOG_FORMAT", "json"),
        ("ATELIER_WORKER_LOG_FORMAT", "json"),
    ];
    let cluster = Cluster::start_with(&models(), &["", ""], None, &variables);
    let mut client = cluster.ready().await;
    let folder = tempfile::tempdir().unwrap();
    let trace_id = "0af7651916cd43dd8448eb211c80319c";
    generate(&cluster, folder.path(), trace_id, STEPS, &variables).await;

    let wanted: BTreeMap<(&str, &str), usize> = BTreeMap::from([
        (("atelier-client", "generate"), 1),
        (("atelier-coordinator", "job"), 1),
        (("atelier-coordinator", "queue"), 1),
        (("atelier-worker", "stage"), 4),
        (("atelier-worker", "inputs"), 4),
        // Stages without steps count as one.
        (("atelier-worker", "step"), STEPS + 3),
    ]);
    let spans = eventually("every span is exported", async || {
        let spans = collector.of(trace_id);
        let mut counts = BTreeMap::<(&str, &str), usize>::new();
        spans.iter().for_each(|(service, span)| *counts.entry((service, &span.name)).or_default() += 1);
        // On a machine that is very busy a group may be lost, and the job be tried again.
        wanted.iter().all(|(key, count)| counts.get(key) >= Some(count)).then_some(spans)
    })
    .await;
    let id = |name: &str| spans.iter().find(|(_, span)| span.name == name).map(|(_, span)| span.span_id.clone()).unwrap();
    let stages: Vec<Vec<u8>> =
        spans.iter().filter(|(_, span)| span.name == "stage").map(|(_, span)| span.span_id.clone()).collect();
    for (_, span) in &spans {
        let parent = &span.parent_span_id;
        let fits = match span.name.as_str() {
            "generate" => hex(parent) == "b7ad6b7169203331",
            "job" => *parent == id("generate"),
            "queue" | "stage" => *parent == id("job"),
            _ => stages.contains(parent),
        };
        assert!(fits, "{} is under {}", span.name, hex(parent));
        assert!(span.end_time_unix_nano >= span.start_time_unix_nano);
        if span.name == "step" {
            assert_eq!(text(&span.attributes, "rank"), "0");
        }
    }
    assert!(!format!("{spans:?}").contains("secret"), "a prompt is in a span");

    let says = |log: &str, message: &str| {
        let lines = log.lines().map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap()["fields"].clone());
        lines.filter(|fields| fields["message"] == message && fields["trace_id"] == trace_id).count()
    };
    eventually("the logs name the trace", async || {
        let log = cluster.log();
        let told = [
            says(&log, "job accepted"),
            says(&log, "a task was taken on"),
            says(&log, "a rank begins a task"),
            says(&log, "job over"),
        ];
        told.iter().zip([1, 4, 4, 1]).all(|(told, least)| *told >= least).then_some(())
    })
    .await;
    assert!(!cluster.log().contains("secret"), "a prompt is in a log");

    // A wrong name is no name: the job gets a trace of its own.
    let (_, other) = trace_of(&mut client, "00-0af7651916cd43dd8448eb211c80319c-0000000000000000-01", 1).await;
    assert!(other.len() == 32 && other != trace_id, "{other}");
}

/// `atelier generate` as a part of this trace, to its end.
async fn generate(cluster: &Cluster, folder: &Path, trace_id: &str, steps: usize, variables: &[(&str, &str)]) {
    let mut command = atelier();
    command.args(["generate", "a very secret fox", "--server", &cluster.address, "--size", "48x32", "--quiet"]);
    command.args(["--steps", &steps.to_string(), "--max-sequence-length", "16", "--out"]).arg(folder.join("fox.png"));
    command.envs(variables.iter().copied()).env("TRACEPARENT", format!("00-{trace_id}-b7ad6b7169203331-01"));
    command.stdout(Stdio::null());
    assert!(tokio::task::spawn_blocking(move || command.status().unwrap()).await.unwrap().success());
}

#[tokio::test(flavor = "multi_thread")]
async fn spans_go_to_a_collector_that_speaks_tls_from_those_whom_it_knows() {
    let folder = tempfile::tempdir().unwrap();
    let tls = folder.path().join("tls");
    authority::write(&tls, &["localhost".to_owned()], Existing::Refuse).unwrap();
    let (collector, endpoint) = Collector::start_secured(&tls).await;
    let cluster = Cluster::start(&models(), &["", ""], None);
    cluster.ready().await;
    let file = |name: &str| tls.join(name).into_os_string().into_string().unwrap();
    let (ca, cert, key) = (file("ca.crt"), file("client.crt"), file("client.key"));
    let nobody = [("OTEL_EXPORTER_OTLP_ENDPOINT", endpoint.as_str()), ("OTEL_EXPORTER_OTLP_CERTIFICATE", ca.as_str())];
    let known = [("OTEL_EXPORTER_OTLP_CLIENT_CERTIFICATE", cert.as_str()), ("OTEL_EXPORTER_OTLP_CLIENT_KEY", key.as_str())];
    let [refused, taken] = ["0af7651916cd43dd8448eb211c80319c", "4bf92f3577b34da6a3ce929d0e0e4736"];

    // A command that has ended has sent what it could.
    generate(&cluster, folder.path(), refused, 1, &nobody).await;
    assert!(collector.of(refused).is_empty(), "spans of somebody without a certificate");
    generate(&cluster, folder.path(), taken, 1, &[nobody, known].concat()).await;
    let names: Vec<String> = collector.of(taken).into_iter().map(|(_, span)| span.name).collect();
    assert_eq!(names, ["generate"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_keeps_its_trace_when_its_coordinator_is_killed() {
    let mut cluster = Cluster::start(&models(), &["", ""], None);
    let mut client = cluster.ready().await;
    let trace_id = "4bf92f3577b34da6a3ce929d0e0e4736";
    let (job_id, told) = trace_of(&mut client, &format!("00-{trace_id}-00f067aa0ba902b7-01"), 200).await;
    assert_eq!(told, trace_id);
    cluster.restart_coordinator();
    let mut client = cluster.client().await;
    let job = client.finish(&job_id).await;
    assert_eq!((job.state(), job.trace_id.as_str()), (JobState::Succeeded, trace_id));
    let asked = client.jobs.get_job(GetJobRequest { job_id }).await.unwrap().into_inner().job.unwrap();
    assert_eq!(asked.trace_id, trace_id);
}
