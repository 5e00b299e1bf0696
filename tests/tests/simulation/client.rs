//! The jobs, by seed, and whoever submits, watches, polls and cancels them.

use std::{cell::RefCell, future::Future, rc::Rc, time::Duration};

use coordinator::stand_in::POISON;
use futures::{StreamExt, TryStreamExt};
use object_store::ObjectStore;
use proto::v1::{
    CancelJobRequest, CreateJobRequest, GetJobRequest, JobSpec, ListJobsRequest, ListModelsRequest, WatchJobRequest,
    cluster_service_client::ClusterServiceClient, job_service_client::JobServiceClient,
};
use tokio::{
    task::spawn_local,
    time::{Instant, sleep, sleep_until, timeout},
};
use tonic::{
    Code, Status,
    transport::{Channel, Endpoint},
};
use uuid::Uuid;

use crate::{
    cluster::{MODEL, Machine},
    faults::{END, Random},
    history::History,
    net::{PORT, dial},
};

/// Jobs of a run.
const JOBS: u64 = 12;
/// A coordinator that takes longer to answer is not there.
const CONNECT_DEADLINE: Duration = Duration::from_secs(1);
/// A call that takes longer has failed.
const DEADLINE: Duration = Duration::from_secs(3);
/// A stream that says nothing for so long is given up.
const QUIET: Duration = Duration::from_secs(4);
/// Within this time of the last fault every job is over.
const PATIENCE: Duration = Duration::from_secs(60);
/// The janitor looks once a minute for checkpoints that were missed, and may have to look twice.
const JANITOR: Duration = Duration::from_secs(140);

type Seen = Rc<RefCell<History>>;

/// A job and what its client does with it.
#[derive(Debug, Clone)]
struct Plan {
    request: CreateJobRequest,
    /// When it is submitted first.
    at: Duration,
    /// It is submitted twice at once.
    twice: bool,
    /// It is submitted again so long after it was acknowledged.
    again: Option<Duration>,
    /// It is cancelled so long after it was acknowledged.
    cancel: Option<Duration>,
}

impl Plan {
    fn draw(random: &mut Random, index: u64) -> Self {
        let poison = random.once_in(12);
        let prompt = if poison { format!("{POISON} {index}") } else { format!("picture {index}") };
        let spec = JobSpec {
            model: MODEL.into(),
            prompt,
            seed: Some(random.within(0..1000)),
            num_inference_steps: Some(random.within(1..30) as u32),
            width: Some(64),
            height: Some(64),
            ..JobSpec::default()
        };
        let request_id = Uuid::from_u64_pair(random.next(), random.next()).to_string();
        let priority = if random.once_in(3) { random.within(0..10) as i32 } else { 0 };
        let timeout = random.once_in(5).then(|| random.millis(2_000..20_000)).and_then(|timeout| timeout.try_into().ok());
        Self {
            request: CreateJobRequest { request_id, spec: Some(spec), priority, timeout },
            at: random.millis(500..(END.as_millis() as u64 - 2000)),
            twice: random.once_in(4),
            again: random.once_in(3).then(|| random.millis(0..20_000)),
            cancel: random.once_in(5).then(|| random.millis(0..6_000)),
        }
    }

    fn id(&self) -> &str {
        &self.request.request_id
    }
}

/// All that clients do in a run, to its end.
pub(crate) async fn run(seed: u64, machine: Rc<Machine>, seen: Seen) -> turmoil::Result {
    let start = Instant::now();
    let mut random = Random::of(seed, 2);
    let mut tasks = Vec::new();
    for index in 0..JOBS {
        let plan = Plan::draw(&mut random, index);
        tasks.push(spawn_local(live(plan.clone(), start + plan.at, seen.clone())));
    }
    let polling = spawn_local(poll(seen.clone()));
    sleep_until(start + END).await;
    let over = start + END + PATIENCE;
    let all = async {
        for task in tasks {
            task.await.unwrap();
        }
    };
    if tokio::time::timeout_at(over, all).await.is_err() {
        let unfinished = seen.borrow().unfinished();
        seen.borrow_mut().violation(format!("not over {} s after the last fault: {unfinished:?}", PATIENCE.as_secs()));
        return Ok(());
    }
    // Whatever happened, the cluster serves.
    let last = Plan { twice: false, again: None, cancel: None, ..Plan::draw(&mut random, JOBS) };
    let mut last = Plan { at: Duration::ZERO, ..last };
    if let Some(spec) = &mut last.request.spec {
        spec.prompt = "the last picture".into();
    }
    last.request.timeout = None;
    let id = last.id().to_owned();
    if timeout(PATIENCE, Box::pin(live(last, Instant::now(), seen.clone()))).await.is_err() || !seen.borrow().has_succeeded(&id) {
        seen.borrow_mut().violation("the cluster does not serve after all is mended".into());
    }
    polling.abort();
    let _stopped = polling.await;
    at_the_end(&machine, &seen).await;
    Ok(())
}

/// A job, from its submission to its end.
async fn live(plan: Plan, at: Instant, seen: Seen) {
    sleep_until(at).await;
    let twin = plan.twice.then(|| spawn_local(submit(plan.clone(), seen.clone())));
    submit(plan.clone(), seen.clone()).await;
    let (of_again, of_cancel) = (plan.clone(), plan.clone());
    let again = async {
        if let Some(after) = of_again.again {
            sleep(after).await;
            submit(of_again.clone(), seen.clone()).await;
            misuse(&of_again, &seen).await;
        }
    };
    let cancel = async {
        if let Some(after) = of_cancel.cancel {
            sleep(after).await;
            cancel(&of_cancel, &seen).await;
        }
    };
    tokio::join!(watch(&plan, &seen), again, cancel);
    if let Some(twin) = twin {
        twin.await.unwrap();
    }
}

/// Whichever coordinator is there; one that does not lead does not listen.
async fn connect(seen: &Seen) -> Result<(&'static str, Channel), Status> {
    let names = seen.borrow().coordinators();
    let mut last = Status::unavailable("nobody is there");
    for name in names {
        let endpoint = Endpoint::from_shared(format!("http://{name}:{PORT}")).unwrap();
        match timeout(CONNECT_DEADLINE, dial().connect(endpoint)).await {
            Ok(Ok(channel)) => {
                seen.borrow_mut().answers(name);
                return Ok((name, channel));
            }
            Ok(Err(error)) => last = Status::unavailable(error.to_string()),
            Err(_) => {}
        }
    }
    Err(last)
}

async fn jobs(seen: &Seen) -> Result<(&'static str, JobServiceClient<Channel>), Status> {
    connect(seen).await.map(|(name, channel)| (name, JobServiceClient::new(channel)))
}

async fn in_time<T>(call: impl Future<Output = Result<T, Status>>) -> Result<T, Status> {
    timeout(DEADLINE, call).await.unwrap_or_else(|_| Err(Status::unavailable("no answer in time")))
}

/// Asks again until there is an answer; codes that no repetition mends are for the caller.
async fn until_answered<T, F: Future<Output = Result<T, Status>>>(call: impl Fn() -> F) -> Result<T, Status> {
    loop {
        match in_time(call()).await {
            Err(status)
                if !matches!(
                    status.code(),
                    Code::NotFound
                        | Code::AlreadyExists
                        | Code::InvalidArgument
                        | Code::FailedPrecondition
                        | Code::DeadlineExceeded
                        | Code::DataLoss
                ) =>
            {
                sleep(Duration::from_millis(300)).await;
            }
            answer => return answer,
        }
    }
}

async fn submit(plan: Plan, seen: Seen) {
    let call = async || {
        let asked = History::now();
        let (from, mut client) = jobs(&seen).await?;
        Ok((from, asked, client.create_job(plan.request.clone()).await?.into_inner().job.unwrap_or_default()))
    };
    match until_answered(call).await {
        Ok((from, asked, job)) => {
            seen.borrow_mut().accepted(from, &plan.request, asked, &job);
        }
        // It would not be done in time, and it was not accepted before.
        Err(status) if status.code() == Code::DeadlineExceeded && plan.request.timeout.is_some() => {
            seen.borrow_mut().saw(format!("{} was refused: {}", plan.id(), status.message()));
        }
        Err(status) => seen.borrow_mut().violation(format!("{} was refused: {status}", plan.id())),
    }
}

/// The same request id for something else.
async fn misuse(plan: &Plan, seen: &Seen) {
    if seen.borrow().id(plan.id()).is_none() {
        return;
    }
    let mut request = plan.request.clone();
    if let Some(spec) = &mut request.spec {
        spec.prompt.push_str(", but another");
    }
    let answer = until_answered(async || Ok(jobs(seen).await?.1.create_job(request.clone()).await?.into_inner())).await;
    if !answer.as_ref().is_err_and(|status| status.code() == Code::AlreadyExists) {
        seen.borrow_mut().violation(format!("{} was taken for another job: {answer:?}", plan.id()));
    }
}

async fn cancel(plan: &Plan, seen: &Seen) {
    let Some(job_id) = seen.borrow().id(plan.id()) else { return };
    let call = async || {
        let request = CancelJobRequest { job_id: job_id.clone() };
        let asked = History::now();
        let (from, mut client) = jobs(seen).await?;
        match client.cancel_job(request).await {
            Ok(response) => Ok((from, asked, response.into_inner().job)),
            Err(status) if status.code() == Code::NotFound => Ok((from, asked, None)),
            Err(status) => Err(status),
        }
    };
    match until_answered(call).await {
        Ok((from, asked, Some(job))) => seen.borrow_mut().cancelled(from, plan.id(), asked, &job),
        Ok((from, _, None)) => seen.borrow_mut().forgotten(from, plan.id(), "CancelJob"),
        Err(status) => seen.borrow_mut().violation(format!("{} cannot be cancelled: {status}", plan.id())),
    }
}

/// Watches a job until it is over, from one stream to the next.
async fn watch(plan: &Plan, seen: &Seen) {
    let Some(job_id) = seen.borrow().id(plan.id()) else { return };
    loop {
        let after_sequence = seen.borrow().watched(plan.id());
        let request = WatchJobRequest { job_id: job_id.clone(), after_sequence };
        if let Ok((from, mut client)) = jobs(seen).await {
            match in_time(async { Ok(client.watch_job(request).await?.into_inner()) }).await {
                Ok(mut events) => {
                    while let Ok(Ok(Some(response))) = timeout(QUIET, events.message()).await {
                        seen.borrow_mut().event(from, plan.id(), &response.event.unwrap_or_default());
                    }
                }
                Err(status) if status.code() == Code::NotFound => seen.borrow_mut().forgotten(from, plan.id(), "WatchJob"),
                Err(_) => {}
            }
        }
        if !seen.borrow().unfinished().iter().any(|request_id| request_id == plan.id()) {
            return;
        }
        sleep(Duration::from_millis(300)).await;
    }
}

/// Reads everything now and then.
async fn poll(seen: Seen) {
    loop {
        sleep(Duration::from_millis(700)).await;
        let Ok((from, channel)) = in_time(connect(&seen)).await else { continue };
        let mut cluster = ClusterServiceClient::new(channel.clone());
        if let Ok(models) = in_time(cluster.list_models(ListModelsRequest {})).await {
            seen.borrow_mut().models(from, &models.into_inner().models);
        }
        let mut client = JobServiceClient::new(channel);
        let ids = seen.borrow().ids();
        for (request_id, job_id) in ids {
            let asked = History::now();
            match in_time(client.get_job(GetJobRequest { job_id })).await {
                Ok(response) => {
                    let job = response.into_inner().job.unwrap_or_default();
                    seen.borrow_mut().read(from, &request_id, asked, &job);
                }
                Err(status) if status.code() == Code::NotFound => seen.borrow_mut().forgotten(from, &request_id, "GetJob"),
                Err(_) => break,
            }
        }
    }
}

/// Nothing is left of jobs that are over.
async fn at_the_end(machine: &Machine, seen: &Seen) {
    let list = async || {
        let (from, mut client) = jobs(seen).await?;
        Ok((from, client.list_jobs(ListJobsRequest { page_size: 1000, ..Default::default() }).await?.into_inner().jobs))
    };
    let asked = History::now();
    let (from, listed) = until_answered(list).await.unwrap_or_default();
    let ids = seen.borrow().ids();
    for (request_id, job_id) in ids {
        match listed.iter().filter(|job| job.request_id == request_id).collect::<Vec<_>>().as_slice() {
            [job] if job.id == job_id => seen.borrow_mut().read(from, &request_id, asked, job),
            other => seen.borrow_mut().violation(format!("{request_id} is listed as {other:?}")),
        }
    }
    let models = async || {
        let (from, channel) = connect(seen).await?;
        let listed = ClusterServiceClient::new(channel).list_models(ListModelsRequest {}).await?;
        Ok((from, listed.into_inner().models))
    };
    let end = Instant::now() + JANITOR;
    loop {
        let (from, models) = until_answered(models).await.unwrap_or_default();
        seen.borrow_mut().models(from, &models);
        let groups: Vec<_> = models.iter().flat_map(|model| &model.groups).collect();
        let busy: Vec<_> = groups.iter().filter(|group| group.running_tasks > 0).collect();
        let prefix = object_store::path::Path::from("checkpoints");
        let left: Vec<_> =
            machine.objects.list(Some(&prefix)).map_ok(|object| object.location).boxed().try_collect().await.unwrap_or_default();
        if busy.is_empty() && left.is_empty() && models.iter().all(|model| model.ready) && !groups.is_empty() {
            return;
        }
        if Instant::now() >= end {
            return seen.borrow_mut().violation(format!("at the end {busy:?} are busy, {left:?} are left, {models:?}"));
        }
        sleep(Duration::from_secs(1)).await;
    }
}
