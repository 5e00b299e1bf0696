//! `atelier top`: workers, groups, the queue and the jobs that run, as they are now; on a terminal again each second.

use std::io::{IsTerminal, Write as _};
use std::time::{Duration, SystemTime};

use clap::Args;
use proto::v1::job_event::Kind;
use proto::v1::{
    GroupState, GroupStatus, Job, JobState, ListJobsRequest, ListModelsRequest, ListWorkersRequest, ModelStatus, WatchJobRequest,
    WorkerStatus,
};

use crate::client::{Client, ServerArgs};
use crate::error::Error;

/// How often it is looked again.
const EVERY: Duration = Duration::from_secs(1);
/// Jobs that are looked at: the newest.
const PAGE: u32 = 200;
/// Jobs that are shown with their progress.
const SHOWN: usize = 15;
/// How long the events of a job that were told already may take to come.
const TOLD_WITHIN: Duration = Duration::from_millis(500);
/// The cursor to the upper left; then, behind what is written, nothing more.
const HOME: &str = "\x1b[H";
const CLEAR_LINE: &str = "\x1b[K\n";
const CLEAR_BELOW: &str = "\x1b[J";
/// A screen of its own, without a cursor; and back.
const ENTER: &str = "\x1b[?1049h\x1b[?25l";
const LEAVE: &str = "\x1b[?25h\x1b[?1049l";

#[derive(Debug, Args)]
pub(crate) struct TopArgs {
    #[command(flatten)]
    server: ServerArgs,
    /// Show it once, as it is now. So it is, too, when the output is no terminal.
    #[arg(long)]
    once: bool,
}

/// What the cluster said of itself at one moment.
#[derive(Debug, Default)]
struct Snapshot {
    workers: Vec<WorkerStatus>,
    models: Vec<ModelStatus>,
    jobs: Vec<Job>,
    /// How far each of the newest jobs that run is.
    progress: Vec<(String, Progress)>,
}

/// How far a job is.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct Progress {
    /// The stage that told of itself last.
    stage: String,
    step: u32,
    steps: u32,
}

pub(crate) async fn run(args: TopArgs) -> Result<(), Error> {
    let mut client = Client::connect(&args.server).await?;
    if args.once || !std::io::stdout().is_terminal() {
        print!("{}", text(&look(&mut client).await?, SystemTime::now()));
        return Ok(());
    }
    let _screen = Screen::enter()?;
    let mut tick = tokio::time::interval(EVERY);
    tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            _ = tick.tick() => {}
            () = crate::stop_signal() => return Ok(()),
        }
        let seen = tokio::select! {
            seen = look(&mut client) => seen,
            () = crate::stop_signal() => return Ok(()),
        };
        match seen {
            Ok(snapshot) => paint(&format!("{}\n{}", args.server.server, text(&snapshot, SystemTime::now())))?,
            // A coordinator that restarts is back soon; the connection makes itself anew.
            Err(error) => paint(&format!("{}\n{}", args.server.server, error.for_people()))?,
        }
    }
}

/// The terminal's other screen, until this is dropped.
struct Screen;

impl Screen {
    fn enter() -> Result<Self, Error> {
        print!("{ENTER}");
        std::io::stdout().flush()?;
        Ok(Self)
    }
}

impl Drop for Screen {
    fn drop(&mut self) {
        print!("{LEAVE}");
        // A terminal that is gone needs nothing.
        drop(std::io::stdout().flush());
    }
}

fn paint(text: &str) -> Result<(), Error> {
    let (rows, columns) = console::Term::stdout().size();
    let mut out = std::io::stdout().lock();
    write!(out, "{HOME}")?;
    for line in fitting(text, rows.into(), columns.into()) {
        write!(out, "{line}{CLEAR_LINE}")?;
    }
    write!(out, "{CLEAR_BELOW}")?;
    Ok(out.flush()?)
}

/// As much of a text as a terminal can show: a longer line would be two, and one line more would move all others.
fn fitting(text: &str, rows: usize, columns: usize) -> impl Iterator<Item = String> {
    text.lines().take(rows.saturating_sub(1)).map(move |line| line.chars().take(columns).collect())
}

async fn look(client: &mut Client) -> Result<Snapshot, Error> {
    let workers = client.cluster.list_workers(ListWorkersRequest {}).await?.into_inner().workers;
    let models = client.cluster.list_models(ListModelsRequest {}).await?.into_inner().models;
    let request = ListJobsRequest { page_size: PAGE, ..ListJobsRequest::default() };
    let jobs = client.jobs.list_jobs(request).await?.into_inner().jobs;
    let mut progress = Vec::new();
    for job in jobs.iter().filter(|job| job.state() == JobState::Running).take(SHOWN) {
        progress.push((job.id.clone(), how_far(client, job).await?));
    }
    Ok(Snapshot { workers, models, jobs, progress })
}

/// Reads the job's newest events: those from a page back until it was listed.
async fn how_far(client: &mut Client, job: &Job) -> Result<Progress, Error> {
    let request = WatchJobRequest { job_id: job.id.clone(), after_sequence: job.sequence.saturating_sub(8) };
    let mut events = client.jobs.watch_job(request).await?.into_inner();
    let mut progress = Progress::default();
    // What is not told by then is not waited for: the job goes on, and so does the view.
    let read = async {
        while let Ok(Some(message)) = events.message().await {
            let Some(event) = message.event else { continue };
            let sequence = event.sequence;
            progress.note(event.kind);
            if sequence >= job.sequence {
                return;
            }
        }
    };
    drop(tokio::time::timeout(TOLD_WITHIN, read).await);
    Ok(progress)
}

impl Progress {
    fn note(&mut self, kind: Option<Kind>) {
        match kind {
            Some(Kind::StageStarted(started)) => {
                *self = Self { stage: started.stage, step: started.resumed_step, steps: 0 };
            }
            Some(Kind::StageProgress(made)) => *self = Self { stage: made.stage, step: made.step, steps: made.steps },
            _ => {}
        }
    }

    fn bar(&self) -> String {
        const WIDTH: u64 = 20;
        if self.steps == 0 {
            return self.stage.clone();
        }
        let full = (u64::from(self.step) * WIDTH / u64::from(self.steps)).min(WIDTH) as usize;
        let bar: String = "#".repeat(full) + &".".repeat(WIDTH as usize - full);
        format!("{:<16} [{bar}] {}/{}", self.stage, self.step, self.steps)
    }
}

/// The whole view, for a moment.
fn text(seen: &Snapshot, now: SystemTime) -> String {
    let mut lines = Vec::new();
    let count = |state: JobState| seen.jobs.iter().filter(|job| job.state() == state).count();
    let groups: Vec<&GroupStatus> = seen.models.iter().flat_map(|model| &model.groups).collect();
    let ready = groups.iter().filter(|group| group.state() == GroupState::Ready).count();
    let more = if seen.jobs.len() == PAGE as usize { format!(" (of the newest {PAGE})") } else { String::new() };
    lines.push(format!(
        "{} workers, {ready} of {} groups ready; jobs: {} queued, {} running, {} succeeded, {} failed{more}",
        seen.workers.len(),
        groups.len(),
        count(JobState::Queued),
        count(JobState::Running),
        count(JobState::Succeeded),
        count(JobState::Failed)
    ));
    lines.push(format!("\n{:<38} {:<6} {:<20} RANKS", "WORKER", "DEVICE", "LABELS"));
    for worker in &seen.workers {
        let mut labels: Vec<String> =
            worker.labels.iter().filter(|(key, _)| *key != "host").map(|(key, value)| format!("{key}={value}")).collect();
        labels.sort();
        let (id, device, ranks) = (&worker.worker_id, &worker.device, worker.ranks.join(" "));
        lines.push(format!("{id:<38} {device:<6} {:<20} {ranks}", labels.join(",")));
    }
    lines.push(format!("\n{:<36} {:<9} {:<22} TASKS", "GROUP", "STATE", "CUT"));
    for group in groups {
        let cut = group.layout.unwrap_or_default().in_words();
        lines.push(format!("{:<36} {:<9} {cut:<22} {}", group.group_id, state(group), group.running_tasks));
    }
    for model in seen.models.iter().filter(|model| !model.problem.is_empty()) {
        lines.push(format!("{}: {}", model.name, model.problem));
    }
    lines.push(format!("\n{:<36} {:<8} {:<16} {:>6}  PROGRESS", "JOB", "STATE", "MODEL", "AGE"));
    let unfinished = seen.jobs.iter().filter(|job| matches!(job.state(), JobState::Queued | JobState::Running));
    // Those that run first, each the newest first.
    let mut shown: Vec<&Job> = unfinished.collect();
    shown.sort_by_key(|job| job.state() != JobState::Running);
    for job in shown.iter().take(SHOWN) {
        let progress = seen.progress.iter().find(|(id, _)| *id == job.id).map(|(_, progress)| progress.bar()).unwrap_or_default();
        let (word, model) = (word(job), job.spec.as_ref().map(|spec| spec.model.as_str()).unwrap_or_default());
        lines.push(format!("{:<36} {word:<8} {model:<16} {:>5}s  {progress}", job.id, age(job, now)));
    }
    if shown.len() > SHOWN {
        lines.push(format!("and {} more", shown.len() - SHOWN));
    }
    lines.push(String::new());
    lines.join("\n")
}

fn state(group: &GroupStatus) -> String {
    match group.state() {
        GroupState::Ready => "ready".into(),
        GroupState::Loading => {
            format!("{} %", group.loaded_bytes.saturating_mul(100).checked_div(group.total_bytes).unwrap_or(0).min(100))
        }
        GroupState::Waiting | GroupState::Unspecified => "waiting".into(),
    }
}

fn word(job: &Job) -> &'static str {
    if job.state() == JobState::Running { "running" } else { "queued" }
}

/// Seconds since it was accepted.
fn age(job: &Job, now: SystemTime) -> u64 {
    let accepted = job.create_time.and_then(|time| SystemTime::try_from(time).ok());
    accepted.and_then(|accepted| now.duration_since(accepted).ok()).unwrap_or_default().as_secs()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_job_that_runs_is_shown_before_those_that_wait_and_with_its_steps() {
        let job = |id: &str, state: JobState| Job { id: id.into(), state: state as i32, ..Job::default() };
        let progress = Progress { stage: "denoise".into(), step: 5, steps: 20 };
        let seen = Snapshot {
            jobs: vec![job("waits", JobState::Queued), job("runs", JobState::Running), job("over", JobState::Succeeded)],
            progress: vec![("runs".into(), progress)],
            ..Snapshot::default()
        };
        let text = text(&seen, SystemTime::now());
        assert!(text.starts_with("0 workers, 0 of 0 groups ready; jobs: 1 queued, 1 running, 1 succeeded, 0 failed\n"), "{text}");
        let line = |start: &str| text.lines().position(|line| line.starts_with(start));
        assert!(line("runs") < line("waits") && line("over").is_none(), "{text}");
        assert!(text.contains("denoise          [#####...............] 5/20"), "{text}");
    }

    #[test]
    fn no_more_is_painted_than_the_terminal_shows() {
        let shown: Vec<String> = fitting("abcd\nef\ngh", 3, 3).collect();
        assert_eq!(shown, ["abc", "ef"]);
    }

    #[test]
    fn progress_is_of_the_newest_event() {
        let mut progress = Progress::default();
        let made = |step| Some(Kind::StageProgress(proto::v1::StageProgress { stage: "denoise".into(), step, steps: 4 }));
        progress.note(made(1));
        progress.note(made(2));
        assert_eq!(progress.bar(), "denoise          [##########..........] 2/4");
        assert_eq!(Progress { stage: "decode".into(), ..Progress::default() }.bar(), "decode");
    }
}
