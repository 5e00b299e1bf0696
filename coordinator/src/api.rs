//! What clients call: jobs and the cluster. Here errors become statuses, in one function.

use std::{collections::HashMap, sync::Arc, time::Duration};

use futures::{Stream, StreamExt, TryStreamExt, stream};
use proto::v1::{
    CancelJobRequest, CancelJobResponse, CreateJobRequest, CreateJobResponse, GetJobRequest, GetJobResponse, JobEvent, JobSpec,
    ListJobsRequest, ListJobsResponse, ListModelsRequest, ListModelsResponse, ListWorkersRequest, ListWorkersResponse,
    WatchJobRequest, WatchJobResponse, cluster_service_server::ClusterService, job_event::Kind, job_service_server::JobService,
};
use telemetry::{TRACEPARENT, TraceContext};
use tokio::sync::watch;
use tonic::{Code, Request, Response, Status};
use tonic_types::{ErrorDetails, StatusExt};
use tracing::{error, warn};
use uuid::Uuid;

use crate::{
    auth::Caller,
    blobs::{BlobStore, Owners},
    context::Context,
    error::{Error, Result, Violation},
    followers::Tail,
    metrics::Meter,
    request::{self, is_blob_id},
    runtime::Handle,
    state::{EventPage, Millis, State, Submission, Viewer},
    turns::{Turn, Turns},
};

/// Waits that are not worth a timer.
const SHORT: Duration = Duration::from_millis(1);
/// When to come back to a full queue or a full store: about the time of one picture.
const RETRY_LATER: Duration = Duration::from_secs(5);
/// When to come back to a model that is being read, or to a coordinator that restarts.
const RETRY_SOON: Duration = Duration::from_secs(1);

/// Bytes of the violations that a client is told of. A status travels in HTTP headers, of which clients take 16 KiB: the text in
/// the message, where each byte may take three, and twice in the details, where it takes a third more.
const MAX_VIOLATION_BYTES: usize = 2000;
/// Bytes of one of them: as many as say what is wrong.
const MAX_PROBLEM_BYTES: usize = 500;

/// The status a client gets for an error. Every one carries an `ErrorInfo`; those worth repeating a `RetryInfo`.
pub fn status(error: &Error) -> Status {
    let shown;
    let error = match error {
        Error::InvalidRequest(violations) => {
            shown = Error::InvalidRequest(fitting(violations));
            &shown
        }
        error => error,
    };
    let (code, retry) = match error {
        Error::InvalidRequest(_) | Error::InvalidRegistration(_) => (Code::InvalidArgument, None),
        Error::ModelNotFound(_) | Error::JobNotFound(_) | Error::BlobNotFound(_) => (Code::NotFound, None),
        Error::ModelNotReady(_) | Error::Stopping => (Code::Unavailable, Some(RETRY_SOON)),
        Error::DeadlineUnreachable { .. } => (Code::DeadlineExceeded, None),
        Error::StoreFailed(_) | Error::StoreStalled { .. } | Error::BlobStorage { .. } => (Code::Unavailable, Some(RETRY_LATER)),
        Error::ModelBroken { .. } => (Code::FailedPrecondition, None),
        Error::RequestIdReused(_) => (Code::AlreadyExists, None),
        Error::QueueFull(_) | Error::BlobStoreFull(_) => (Code::ResourceExhausted, Some(RETRY_LATER)),
        Error::TenantQueueFull { .. } => (Code::ResourceExhausted, Some(RETRY_LATER)),
        Error::TenantQuota { retry_millis, .. } => (Code::ResourceExhausted, Some(Duration::from_millis(*retry_millis))),
        Error::Unauthenticated { .. } => (Code::Unauthenticated, None),
        Error::Setting { .. }
        | Error::ModelsFile { .. }
        | Error::KeysFile { .. }
        | Error::Io { .. }
        | Error::Identity(_)
        | Error::Serve(_)
        | Error::Etcd(_)
        | Error::WatchEnded(_) => (Code::Internal, None),
    };
    let mut details = ErrorDetails::new();
    details.set_error_info(error.reason(), proto::ERROR_DOMAIN, facts(error));
    if let Some(delay) = retry {
        details.set_retry_info(Some(delay));
    }
    if let Error::InvalidRequest(violations) = error {
        for violation in violations {
            details.add_bad_request_violation(&violation.field, &violation.problem);
        }
    }
    match error {
        _ if code == Code::Internal => error!(error = %Chain(error), "request failed"),
        Error::BlobStorage { .. } => warn!(error = %Chain(error), "the store of pictures"),
        _ => {}
    }
    Status::with_error_details(code, error.to_string(), details)
}

/// As many violations as a status carries, and how many more there are.
fn fitting(violations: &[Violation]) -> Vec<Violation> {
    let mut bytes = 0;
    let shortened = violations.iter().map(|Violation { field, problem }| {
        let cut = |text: &str| match text.floor_char_boundary(MAX_PROBLEM_BYTES) {
            end if end < text.len() => format!("{}…", &text[..end]),
            _ => text.to_owned(),
        };
        Violation::new(cut(field), cut(problem))
    });
    let mut told: Vec<Violation> = shortened
        .take_while(|violation| {
            bytes += violation.field.len() + violation.problem.len();
            bytes <= MAX_VIOLATION_BYTES
        })
        .collect();
    if let Some(next) = violations.get(told.len()) {
        let more = violations.len() - told.len();
        told.push(Violation::new(&next.field[..next.field.floor_char_boundary(MAX_PROBLEM_BYTES)], format!("… and {more} more")));
    }
    told
}

/// What programs may want to know of an error.
fn facts(error: &Error) -> HashMap<String, String> {
    let of = |tenant: &String, limit: String| [("tenant".to_owned(), tenant.clone()), ("limit".to_owned(), limit)].into();
    match error {
        Error::TenantQueueFull { tenant, limit } => of(tenant, format!("{limit} jobs waiting")),
        Error::TenantQuota { tenant, limit, .. } => of(tenant, format!("{limit} pixel-steps a second")),
        _ => HashMap::new(),
    }
}

/// An error with what caused it.
struct Chain<'a>(&'a Error);

impl std::fmt::Display for Chain<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}", self.0)?;
        let mut source = std::error::Error::source(self.0);
        while let Some(cause) = source {
            write!(f, ": {cause}")?;
            source = cause.source();
        }
        Ok(())
    }
}

/// Serves `JobService`.
#[derive(Debug, Clone)]
pub(crate) struct JobApi {
    pub(crate) handle: Handle,
    pub(crate) blobs: BlobStore,
    pub(crate) owners: Owners,
    pub(crate) context: Arc<Context>,
    pub(crate) meter: Meter,
    /// Of those who watch.
    pub(crate) turns: Turns,
}

impl JobApi {
    async fn create(&self, caller: &Caller, request: CreateJobRequest, trace: TraceContext) -> Result<CreateJobResponse> {
        let tenant = caller.tenant()?;
        let spec = request.spec.ok_or_else(|| Error::invalid("spec", "is missing"))?;
        request::check_request_id(&request.request_id)?;
        // Parsing makes one of the several ways to write a UUID; a client without one cannot retry.
        let request_id = Uuid::try_parse(&request.request_id).unwrap_or_else(|_| self.context.uuid());
        let submission = Submission {
            job_id: self.context.uuid().to_string(),
            request_id: request_id.to_string(),
            seed: self.context.noise_seed(),
            priority: request.priority,
            timeout: request.timeout.map(millis).transpose()?,
            missing_blobs: self.missing_blobs(&tenant, &spec).await?,
            blob_bytes: self.blobs.bytes(),
            tenant: tenant.to_string(),
            spec,
            trace: Some(trace),
        };
        let mut accepted = self.handle.submit(submission.clone()).await;
        if matches!(accepted, Err(Error::BlobStoreFull(_))) {
            self.blobs.clear_unused(self.handle.read(State::blobs_in_use)).await;
            accepted = self.handle.submit(Submission { blob_bytes: self.blobs.bytes(), ..submission }).await;
        }
        let job = accepted?;
        tracing::info!(
            job.id = job.id,
            trace_id = job.trace_id,
            model = job.spec.as_ref().map(|spec| spec.model.as_str()),
            "job accepted"
        );
        Ok(CreateJobResponse { job: Some(job) })
    }

    /// The fields that name a picture which is not there, or not the tenant's.
    async fn missing_blobs(&self, tenant: &Arc<str>, spec: &JobSpec) -> Result<Vec<String>> {
        let mut missing = Vec::new();
        // A job that names more is refused for that.
        for (field, id) in request::blobs(spec).take(request::MAX_BLOBS + 1) {
            if is_blob_id(id) && !(self.blobs.holds(id).await? && self.has_blob(tenant, id).await?) {
                missing.push(field);
            }
        }
        Ok(missing)
    }

    async fn has_blob(&self, tenant: &Arc<str>, id: &str) -> Result<bool> {
        if tenant.is_empty() || self.owners.has(tenant, id) {
            return Ok(true);
        }
        let (tenant, id) = (tenant.clone(), id.to_owned());
        self.handle.read(move |state| state.has_blob(&tenant, &id)).await
    }

    async fn get(&self, caller: &Caller, request: GetJobRequest) -> Result<GetJobResponse> {
        let (tenant, is_operator) = (caller.tenant()?, caller.is_operator);
        let look = move |state: &State| state.job_seen_by(Viewer { tenant: &tenant, is_operator }, &request.job_id);
        let job = self.handle.read(look).await??;
        Ok(GetJobResponse { job: Some(job) })
    }

    async fn list(&self, caller: &Caller, request: ListJobsRequest) -> Result<ListJobsResponse> {
        let (tenant, is_operator) = (caller.tenant()?, caller.is_operator);
        let look =
            move |state: &State| state.jobs(Viewer { tenant: &tenant, is_operator }, request.page_size, &request.page_token);
        let (jobs, next_page_token) = self.handle.read(look).await??;
        Ok(ListJobsResponse { jobs, next_page_token })
    }

    async fn cancel(&self, caller: &Caller, request: CancelJobRequest) -> Result<CancelJobResponse> {
        let (tenant, is_operator, job_id) = (caller.tenant()?, caller.is_operator, request.job_id.clone());
        let (owner, theirs) = (tenant.clone(), job_id.clone());
        self.handle.read(move |state| state.check_owner(Viewer { tenant: &owner, is_operator }, &theirs)).await??;
        let mut job = self.handle.cancel(job_id).await?;
        Viewer { tenant: &tenant, is_operator }.hide(&mut job);
        if job.tenant != *tenant {
            tracing::info!(job.id = job.id, tenant = job.tenant, operator = &*tenant, "job cancelled by an operator");
        }
        Ok(CancelJobResponse { job: Some(job) })
    }
}

fn millis(timeout: prost_types::Duration) -> Result<Millis> {
    let negative = |_| Error::invalid("timeout", "must not be negative");
    Ok(u64::try_from(Duration::try_from(timeout).map_err(negative)?.as_millis()).unwrap_or(u64::MAX))
}

fn is_progress(event: &JobEvent) -> bool {
    matches!(event.kind, Some(Kind::StageProgress(_)))
}

/// One who is told every event of a job, once and in order, at its own pace.
struct Watcher {
    handle: Handle,
    job_id: String,
    /// The last event it was told.
    reached: u64,
    next: Option<watch::Receiver<Tail>>,
    over: bool,
    turn: Turn,
}

impl Watcher {
    /// The events that come next; none when there will be no more.
    async fn read(&mut self) -> Result<Vec<JobEvent>> {
        while !self.over {
            let page = match self.told().await {
                Some(page) => page,
                None => {
                    let followed = self.handle.follow(self.job_id.clone(), self.reached).await?;
                    self.next = followed.next;
                    followed.page
                }
            };
            self.over = page.over;
            if let Some(last) = page.events.last() {
                self.reached = last.sequence;
                return Ok(page.events);
            }
        }
        Ok(vec![])
    }

    /// What all who watch are told, if this one has kept up with it.
    async fn told(&mut self) -> Option<EventPage> {
        let next = self.next.as_mut()?;
        // Closed: the coordinator stops, or all was told; asking it tells which.
        next.changed().await.ok()?;
        let news = next.borrow_and_update().events_after(self.reached)?;
        let wait = self.turn.wait();
        if news.over || wait < SHORT || !news.events.iter().all(is_progress) {
            return Some(news);
        }
        tokio::time::sleep(wait).await;
        next.borrow_and_update().events_after(self.reached)
    }

    fn events(self) -> impl Stream<Item = Result<JobEvent>> {
        let pages = stream::try_unfold(self, async |mut watcher: Self| {
            let events = watcher.read().await?;
            Ok::<_, Error>((!events.is_empty()).then(|| (stream::iter(events.into_iter().map(Ok)), watcher)))
        });
        pages.try_flatten()
    }
}

#[tonic::async_trait]
impl JobService for JobApi {
    async fn create_job(&self, request: Request<CreateJobRequest>) -> Result<Response<CreateJobResponse>, Status> {
        let caller = Caller::of(request.extensions());
        let given = request.metadata().get(TRACEPARENT).and_then(|value| value.to_str().ok()).and_then(TraceContext::parse);
        let trace = given.unwrap_or_else(|| TraceContext::from_random(*self.context.uuid().as_bytes()));
        let created = self.create(&caller, request.into_inner(), trace).await;
        respond(created.inspect_err(|error| self.meter.refused(error.reason())))
    }

    async fn get_job(&self, request: Request<GetJobRequest>) -> Result<Response<GetJobResponse>, Status> {
        let caller = Caller::of(request.extensions());
        respond(self.get(&caller, request.into_inner()).await)
    }

    async fn list_jobs(&self, request: Request<ListJobsRequest>) -> Result<Response<ListJobsResponse>, Status> {
        let caller = Caller::of(request.extensions());
        respond(self.list(&caller, request.into_inner()).await)
    }

    async fn cancel_job(&self, request: Request<CancelJobRequest>) -> Result<Response<CancelJobResponse>, Status> {
        let caller = Caller::of(request.extensions());
        respond(self.cancel(&caller, request.into_inner()).await)
    }

    type WatchJobStream = stream::BoxStream<'static, Result<WatchJobResponse, Status>>;

    async fn watch_job(&self, request: Request<WatchJobRequest>) -> Result<Response<Self::WatchJobStream>, Status> {
        let caller = Caller::of(request.extensions());
        let (tenant, is_operator) = (caller.tenant().map_err(|error| status(&error))?, caller.is_operator);
        let WatchJobRequest { job_id, after_sequence } = request.into_inner();
        // A job that is not there is told before the stream begins.
        self.get(&caller, GetJobRequest { job_id: job_id.clone() }).await.map_err(|error| status(&error))?;
        let (handle, turn) = (self.handle.clone(), self.turns.take());
        let watcher = Watcher { handle, job_id, reached: after_sequence, next: None, over: false, turn };
        let responses = watcher.events().map_ok(move |mut event| {
            if let Some(Kind::StateChanged(job)) = &mut event.kind {
                Viewer { tenant: &tenant, is_operator }.hide(job);
            }
            WatchJobResponse { event: Some(event) }
        });
        Ok(Response::new(responses.map_err(|error| status(&error)).boxed()))
    }
}

/// Serves `ClusterService`.
#[derive(Debug, Clone)]
pub(crate) struct ClusterApi {
    pub(crate) handle: Handle,
}

#[tonic::async_trait]
impl ClusterService for ClusterApi {
    async fn list_models(&self, _: Request<ListModelsRequest>) -> Result<Response<ListModelsResponse>, Status> {
        let models = self.handle.read(|state| state.models()).await;
        respond(models.map(|models| ListModelsResponse { models }))
    }

    async fn list_workers(&self, _: Request<ListWorkersRequest>) -> Result<Response<ListWorkersResponse>, Status> {
        let workers = self.handle.read(|state| state.workers()).await;
        respond(workers.map(|workers| ListWorkersResponse { workers }))
    }
}

fn respond<T>(result: Result<T>) -> Result<Response<T>, Status> {
    result.map(Response::new).map_err(|error| status(&error))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_error_says_its_reason_and_domain() {
        let status = status(&Error::ModelNotFound("flux".into()));
        let details = status.get_error_details();
        let info = details.error_info().unwrap();
        assert_eq!((status.code(), info.reason.as_str()), (Code::NotFound, "MODEL_NOT_FOUND"));
        assert_eq!(info.domain, proto::ERROR_DOMAIN);
    }

    #[test]
    fn every_wrong_field_is_a_violation() {
        let violations = vec![Violation::new("spec.width", "odd"), Violation::new("spec.height", "odd")];
        let details = status(&Error::InvalidRequest(violations)).get_error_details();
        let fields: Vec<_> = details.bad_request().unwrap().field_violations.iter().map(|v| v.field.clone()).collect();
        assert_eq!(fields, ["spec.width", "spec.height"]);
    }

    #[test]
    fn whatever_is_wrong_with_a_request_fits_the_headers_of_an_answer() {
        for (count, problem) in [(1, "ä".repeat(100_000)), (8, "%".repeat(1000)), (10_000, "is odd".to_owned())] {
            let violations = (0..count).map(|number| Violation::new(format!("spec.loras[{number}].name"), &*problem)).collect();
            let status = status(&Error::InvalidRequest(violations));
            let told = status.get_error_details().bad_request().unwrap().field_violations.clone();
            assert_eq!(told[0].field, "spec.loras[0].name");
            let last = &told[told.len() - 1].description;
            let more: Option<usize> = last.strip_prefix("… and ").and_then(|last| last.strip_suffix(" more")?.parse().ok());
            assert_eq!(told.len() - usize::from(more.is_some()) + more.unwrap_or_default(), count, "{last}");
            let answer = status.into_http::<tonic::body::Body>();
            let bytes: usize = answer.headers().iter().map(|(name, value)| name.as_str().len() + value.len()).sum();
            assert!(bytes < 14 << 10, "{count}: {bytes} bytes");
        }
    }

    #[test]
    fn what_may_be_repeated_says_when() {
        let storage = Error::blob_storage("store a blob")(std::io::Error::other("503 Slow Down"));
        assert_eq!(status(&storage).code(), Code::Unavailable);
        for error in [Error::QueueFull(1), Error::ModelNotReady("emoji".into()), Error::Stopping, storage] {
            assert!(status(&error).get_error_details().retry_info().is_some(), "{error}");
        }
        assert!(status(&Error::RequestIdReused("r".into())).get_error_details().retry_info().is_none());
    }
}
