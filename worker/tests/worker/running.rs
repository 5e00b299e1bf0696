//! A worker that runs within the test, and a coordinator's end of its control stream.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use parallel::device::Place;
use proto::v1::control_request::Command;
use proto::v1::control_response::Report;
use proto::v1::worker_service_client::WorkerServiceClient;
use proto::v1::{
    ControlRequest, ControlResponse, DescribeModel, GroupLost, Heartbeat, Holding, Lead, Registration, TaskDone, TaskFailed,
    TaskRef, model_described,
};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::{CancellationToken, DropGuard};
use tonic::{Status, Streaming};
use worker::config::{Config, Membership};
use worker::{Result, Worker};

use crate::coordinator::{Coordinator, PATIENCE};
use crate::model::Small;

/// A worker in this process.
pub(crate) struct Running {
    pub(crate) registration: Registration,
    stop: CancellationToken,
    hurry: CancellationToken,
    ended: tokio::task::JoinHandle<Result<()>>,
    /// Its own: dropped, it is as dead as after kill -9.
    runtime: Option<tokio::runtime::Runtime>,
}

impl Drop for Running {
    fn drop(&mut self) {
        self.runtime.take().unwrap().shutdown_background();
    }
}

/// How long a worker waits.
#[derive(Clone, Copy)]
pub(crate) struct Waits {
    pub(crate) drain: Duration,
    pub(crate) orphan: Duration,
}

impl Default for Waits {
    fn default() -> Self {
        Self { drain: Duration::from_millis(100), orphan: PATIENCE }
    }
}

impl Running {
    pub(crate) async fn start(coordinator: &Coordinator) -> Self {
        let url = format!("http://{}", coordinator.address());
        Self::with(Membership::Coordinator { url }, Waits::default()).await
    }

    pub(crate) async fn waiting(coordinator: &Coordinator, waits: Waits) -> Self {
        let url = format!("http://{}", coordinator.address());
        Self::with(Membership::Coordinator { url }, waits).await
    }

    pub(crate) async fn with(membership: Membership, waits: Waits) -> Self {
        let config = Config {
            identity: None,
            listen: "127.0.0.1:0".parse().unwrap(),
            data_listen: "127.0.0.1:0".parse().unwrap(),
            metrics_listen: None,
            advertise_host: None,
            membership,
            labels: BTreeMap::from([("role".into(), "any".into())]),
            worker_id: uuid::Uuid::new_v4().to_string(),
            place: Place::Cpu,
            threads: 1,
            prompt_cache_bytes: 0,
            adapter_cache_bytes: 0,
            load_timeout: PATIENCE,
            drain_timeout: waits.drain,
            orphan_grace: waits.orphan,
        };
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
        let worker = runtime.spawn(Worker::bind(config, Arc::new(Small))).await.unwrap().unwrap();
        let registration = worker.registration().clone();
        let (stop, hurry) = (CancellationToken::new(), CancellationToken::new());
        let ended = runtime.spawn(worker.run_until(stop.clone().cancelled_owned(), hurry.clone().cancelled_owned()));
        Self { registration, stop, hurry, ended, runtime: Some(runtime) }
    }

    pub(crate) fn address(&self) -> String {
        self.registration.address.clone()
    }

    /// The signal to stop.
    pub(crate) fn signal(&self) {
        self.stop.cancel();
    }

    /// The second signal to stop.
    pub(crate) fn hurry(&self) {
        self.hurry.cancel();
    }

    /// Stops it, and expects that to be quick.
    pub(crate) async fn stop(mut self) {
        self.signal();
        self.ended().await;
    }

    /// Expects it to end soon.
    pub(crate) async fn ended(&mut self) {
        tokio::time::timeout(Duration::from_secs(10), &mut self.ended).await.unwrap().unwrap().unwrap();
    }

    /// Opens the control stream of the first coordinator and takes the hello.
    pub(crate) async fn control(&self) -> Control {
        self.led(Lead { term: 1, ..Lead::default() }).await.0
    }

    /// Opens the control stream of a leader, and takes the hello and what is held.
    pub(crate) async fn led(&self, lead: Lead) -> (Control, Holding) {
        let mut control = self.say(Command::Lead(lead)).await;
        let hello = |report: &Report| if let Report::Hello(hello) = report { Some(hello.clone()) } else { None };
        assert_eq!(control.wait("hello", hello).await, self.registration);
        let holding = |report: &Report| if let Report::Holding(holding) = report { Some(holding.clone()) } else { None };
        let holding = control.wait("what is held", holding).await;
        assert!(matches!(control.seen[..], [Report::Hello(_), Report::Holding(_), ..]), "{:?}", control.seen);
        (control, holding)
    }

    /// Opens a control stream that begins with `first`.
    pub(crate) async fn say(&self, first: Command) -> Control {
        let deadline = Instant::now() + PATIENCE;
        let mut client = loop {
            match WorkerServiceClient::connect(format!("http://{}", self.address())).await {
                Ok(client) => break client,
                Err(error) => assert!(Instant::now() < deadline, "{error}"),
            }
        };
        let (commands, outgoing) = mpsc::channel(16);
        commands.send(ControlRequest { command: Some(first) }).await.unwrap();
        let reports = client.control(ReceiverStream::new(outgoing)).await.unwrap().into_inner();
        let beat = CancellationToken::new();
        let (beating, to_beat) = (beat.clone(), commands.clone());
        tokio::spawn(beating.run_until_cancelled_owned(async move {
            let mut tick = tokio::time::interval(Duration::from_secs(1));
            loop {
                tick.tick().await;
                let command = Some(Command::Heartbeat(Heartbeat {}));
                drop(to_beat.try_send(ControlRequest { command }));
            }
        }));
        Control { commands, reports, seen: Vec::new(), _beat: beat.drop_guard() }
    }
}

/// A coordinator's end of a control stream.
pub(crate) struct Control {
    commands: mpsc::Sender<ControlRequest>,
    reports: Streaming<ControlResponse>,
    /// Everything that was reported, but for heartbeats.
    pub(crate) seen: Vec<Report>,
    _beat: DropGuard,
}

impl Control {
    pub(crate) async fn send(&self, command: Command) {
        self.commands.send(ControlRequest { command: Some(command) }).await.unwrap();
    }

    /// The first report that `pick` takes, of those that came and those that will.
    pub(crate) async fn wait<T>(&mut self, what: &str, pick: impl Fn(&Report) -> Option<T>) -> T {
        let deadline = tokio::time::Instant::now() + PATIENCE;
        let mut looked_at = 0;
        loop {
            if let Some(found) = self.seen[looked_at..].iter().find_map(&pick) {
                return found;
            }
            looked_at = self.seen.len();
            let message = tokio::time::timeout_at(deadline, self.reports.message()).await;
            match message.unwrap_or_else(|_| panic!("waited in vain for {what}; came: {:#?}", self.seen)) {
                Ok(Some(ControlResponse { report: Some(Report::Heartbeat(_)) })) => {}
                Ok(Some(ControlResponse { report: Some(report) })) => self.seen.push(report),
                other => panic!("the stream ended while waiting for {what}: {other:?}"),
            }
        }
    }

    pub(crate) async fn ready(&mut self, group_id: &str, epoch: u64) {
        let pick = |report: &Report| match report {
            Report::GroupReady(ready) if ready.group_id == group_id && ready.epoch == epoch => Some(()),
            _ => None,
        };
        self.wait("a ready group", pick).await;
    }

    pub(crate) async fn lost(&mut self, group_id: &str, epoch: u64) -> GroupLost {
        let pick = |report: &Report| match report {
            Report::GroupLost(lost) if lost.group_id == group_id && lost.epoch == epoch => Some(lost.clone()),
            _ => None,
        };
        self.wait("a lost group", pick).await
    }

    pub(crate) async fn stepped(&mut self, task: &TaskRef, at_least: u32) {
        let pick = |report: &Report| match report {
            Report::TaskProgress(p) if p.task.as_ref() == Some(task) && p.step >= at_least => Some(()),
            _ => None,
        };
        self.wait("a step", pick).await;
    }

    pub(crate) async fn done(&mut self, task: &TaskRef) -> TaskDone {
        let pick = |report: &Report| match report {
            Report::TaskDone(done) if done.task.as_ref() == Some(task) => Some(Ok(done.clone())),
            Report::TaskFailed(failed) if failed.task.as_ref() == Some(task) => Some(Err(failed.clone())),
            _ => None,
        };
        self.wait("the end of a task", pick).await.unwrap()
    }

    pub(crate) async fn failed(&mut self, task: &TaskRef) -> TaskFailed {
        let pick = |report: &Report| match report {
            Report::TaskFailed(failed) if failed.task.as_ref() == Some(task) => Some(failed.clone()),
            _ => None,
        };
        let failed = self.wait("a failed task", pick).await;
        assert!(!failed.message.contains("secret"), "{failed:?}");
        failed
    }

    pub(crate) async fn parked(&mut self, task: &TaskRef) -> u32 {
        let pick = |report: &Report| match report {
            Report::TaskParked(parked) if parked.task.as_ref() == Some(task) => Some(Ok(parked.saved_step)),
            Report::TaskFailed(failed) if failed.task.as_ref() == Some(task) => Some(Err(failed.clone())),
            _ => None,
        };
        self.wait("a parked task", pick).await.unwrap()
    }

    /// How the stream was refused.
    pub(crate) async fn refused(mut self) -> Status {
        loop {
            match tokio::time::timeout(PATIENCE, self.reports.message()).await.unwrap() {
                Ok(Some(ControlResponse { report: Some(Report::Heartbeat(_)) })) => {}
                Ok(other) => panic!("not refused: {other:?}"),
                Err(status) => return status,
            }
        }
    }

    /// Returns when the worker has ended the stream.
    pub(crate) async fn over(mut self) {
        while let Ok(Some(_)) = tokio::time::timeout(PATIENCE, self.reports.message()).await.unwrap() {}
    }

    pub(crate) async fn describe(&mut self, model: &str, path: &str) -> Result<(), String> {
        self.send(Command::DescribeModel(DescribeModel { model: model.into(), path: path.into(), ..DescribeModel::default() }))
            .await;
        let pick = |report: &Report| match report {
            Report::ModelDescribed(described) if described.model == model => described.outcome.clone(),
            _ => None,
        };
        match self.wait("a card", pick).await {
            model_described::Outcome::Card(_) => Ok(()),
            model_described::Outcome::Error(reason) => Err(reason),
        }
    }
}
