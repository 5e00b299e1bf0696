//! Thousands of streams that watch jobs, in a process of their own: what they take is not taken for the coordinator's.

use std::io::Write;
use std::process::Stdio;
use std::sync::Arc;
use std::sync::Mutex;
use std::time::{SystemTime, UNIX_EPOCH};

use clap::Args;
use proto::v1::job_event::Kind;
use proto::v1::{JobEvent, WatchJobRequest};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::process::{Child, ChildStdin, ChildStdout, Command};
use tokio::sync::mpsc;

use super::super::table::percentile;
use crate::client::{Client, ServerArgs};
use crate::error::Error;

/// Watchers on one connection: HTTP/2 servers commonly allow 200 streams.
const STREAMS_PER_CONNECTION: usize = 200;

/// What the process is told.
#[derive(Debug, Args)]
pub(crate) struct WatchingArgs {
    #[command(flatten)]
    server: ServerArgs,
    #[arg(long)]
    streams: usize,
    /// Of the jobs, which the streams share.
    #[arg(long, value_delimiter = ',')]
    jobs: Vec<String>,
}

/// Progress that the streams saw.
#[derive(Debug, Default)]
pub(super) struct Seen {
    pub(super) events: f64,
    /// From the worker's report, as the coordinator took it, to the watcher.
    pub(super) late_p99_millis: f64,
}

/// The process that watches, as its parent sees it.
pub(super) struct Watching {
    child: Child,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
}

impl Watching {
    /// Returns when every stream has begun.
    pub(super) async fn start(server: &ServerArgs, streams: usize, jobs: &[String]) -> Result<Self, Error> {
        let mut child = Command::new(std::env::current_exe()?)
            .args(["bench", "watching", "--server", &server.server, "--streams", &streams.to_string(), "--jobs", &jobs.join(",")])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .kill_on_drop(true)
            .spawn()?;
        let (input, output) = (child.stdin.take(), child.stdout.take());
        let (Some(input), Some(output)) = (input, output) else { return Err(Error::Protocol("no pipes")) };
        let mut watching = Self { child, input, output: BufReader::new(output) };
        match watching.line().await?.as_str() {
            "watching" => Ok(watching),
            other => Err(Error::Up(format!("the process that watches said: {other}"))),
        }
    }

    /// What was seen since it was last asked.
    pub(super) async fn seen(&mut self) -> Result<Seen, Error> {
        self.input.write_all(b"\n").await?;
        let line = self.line().await?;
        let (events, late) = line.split_once(' ').ok_or(Error::Protocol("two figures"))?;
        let figure = |text: &str| text.parse().map_err(|_| Error::Protocol("a figure"));
        Ok(Seen { events: figure(events)?, late_p99_millis: figure(late)? })
    }

    pub(super) async fn stop(mut self) -> Result<(), Error> {
        drop(self.input);
        self.child.wait().await?;
        Ok(())
    }

    async fn line(&mut self) -> Result<String, Error> {
        let mut line = String::new();
        self.output.read_line(&mut line).await?;
        Ok(line.trim().to_owned())
    }
}

/// The process itself: ends when its parent does, or closes its standard input.
pub(crate) async fn run(args: WatchingArgs) -> Result<(), Error> {
    let late = Arc::new(Mutex::new(Vec::new()));
    let (began, mut begun) = mpsc::unbounded_channel();
    let mut client = Client::connect(&args.server).await?;
    for stream in 0..args.streams {
        if stream % STREAMS_PER_CONNECTION == 0 {
            client = Client::connect(&args.server).await?;
        }
        let job_id = args.jobs[stream % args.jobs.len()].clone();
        tokio::spawn(watch(client.clone(), job_id, late.clone(), began.clone()));
    }
    for _ in 0..args.streams {
        begun.recv().await.unwrap_or(Err(Error::Protocol("streams")))?;
    }
    println!("watching");
    let mut input = tokio::io::stdin();
    while matches!(input.read_u8().await, Ok(b'\n')) {
        let mut late = std::mem::take(&mut *late.lock().unwrap_or_else(std::sync::PoisonError::into_inner));
        println!("{} {}", late.len(), percentile(&mut late, 0.99));
        std::io::stdout().flush()?;
    }
    Ok(())
}

async fn watch(mut client: Client, job_id: String, late: Arc<Mutex<Vec<f64>>>, began: mpsc::UnboundedSender<Result<(), Error>>) {
    let request = WatchJobRequest { job_id, after_sequence: 0 };
    let mut events = match client.jobs.watch_job(request).await {
        Ok(events) => events.into_inner(),
        Err(status) => return drop(began.send(Err(status.into()))),
    };
    let mut began = Some(began);
    while let Ok(Some(response)) = events.message().await {
        if let Some(began) = began.take() {
            drop(began.send(Ok(())));
        }
        if let Some(millis) = response.event.as_ref().and_then(millis_late) {
            late.lock().unwrap_or_else(std::sync::PoisonError::into_inner).push(millis);
        }
    }
}

/// How long ago it happened, if it is a step.
fn millis_late(event: &JobEvent) -> Option<f64> {
    let (Some(Kind::StageProgress(_)), Some(time)) = (&event.kind, &event.time) else { return None };
    let happened = time.seconds as f64 * 1e3 + f64::from(time.nanos) / 1e6;
    Some(SystemTime::now().duration_since(UNIX_EPOCH).ok()?.as_secs_f64() * 1e3 - happened)
}
