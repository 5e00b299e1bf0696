//! What `atelier jobs show` says of a job: as it is, and what happened to it.

use std::time::{Duration, SystemTime};

use proto::v1::job_event::Kind;
use proto::v1::{Job, JobEvent, JobState, ListModelsRequest, Products, StageProgress, WatchJobRequest};

use crate::client::Client;
use crate::error::Error;
use crate::list::{job_line, state};

/// How long events that were told already may take to come.
const TOLD_WITHIN: Duration = Duration::from_secs(2);
/// Lines of what happened: the newest.
const LINES: usize = 24;

/// Shows a job.
pub(crate) async fn show(client: &mut Client, job: &Job) -> Result<(), Error> {
    let events = events(client, job).await?;
    let problem = if job.state() == JobState::Queued { problem(client, job).await } else { None };
    lines(job, &events, problem.as_deref(), SystemTime::now()).iter().for_each(|line| println!("{line}"));
    Ok(())
}

/// What has happened to the job until it was looked at.
async fn events(client: &mut Client, job: &Job) -> Result<Vec<JobEvent>, Error> {
    let mut told = client.jobs.watch_job(WatchJobRequest { job_id: job.id.clone(), after_sequence: 0 }).await?.into_inner();
    let mut events = Vec::new();
    // What is not told by then is left out.
    let read = async {
        while let Ok(Some(message)) = told.message().await {
            let Some(event) = message.event else { continue };
            let is_last = event.sequence >= job.sequence;
            events.push(event);
            if is_last {
                return;
            }
        }
    };
    drop(tokio::time::timeout(TOLD_WITHIN, read).await);
    Ok(events)
}

/// Why the job's model cannot be used now, if it cannot and that is to be had at once.
pub(crate) async fn problem(client: &mut Client, job: &Job) -> Option<String> {
    let name = &job.spec.as_ref()?.model;
    let asked = tokio::time::timeout(TOLD_WITHIN, client.cluster.list_models(ListModelsRequest {})).await;
    let models = asked.ok()?.ok()?.into_inner().models;
    models.into_iter().find(|model| model.name == *name).map(|model| model.problem).filter(|problem| !problem.is_empty())
}

/// All that is said of a job.
fn lines(job: &Job, events: &[JobEvent], problem: Option<&str>, now: SystemTime) -> Vec<String> {
    let mut lines = vec![job_line(job)];
    lines.push(format!("  accepted {}, {}", time(job.create_time), ages(job, now)));
    let tenant = if job.tenant.is_empty() { String::new() } else { format!(", of tenant {}", job.tenant) };
    let deadline = job.deadline.map(|deadline| format!(", deadline {}", time(Some(deadline)))).unwrap_or_default();
    lines.push(format!("  try {}, priority {}{deadline}{tenant}", job.attempt, job.priority));
    if !job.trace_id.is_empty() {
        lines.push(format!("  trace {}", job.trace_id));
    }
    if job.products() != Products::Unspecified {
        lines.push(format!("  multiplied in {}", job.products()));
    }
    lines.extend(problem.map(|problem| format!("  it waits: {problem}")));
    let happened = happened(events);
    if happened.len() > LINES {
        lines.push("  ...".into());
    }
    lines.extend(happened.iter().skip(happened.len().saturating_sub(LINES)).map(|line| format!("  {line}")));
    if let Some(failure) = &job.failure {
        let stage = if failure.stage.is_empty() { String::new() } else { format!(" in {}", failure.stage) };
        lines.push(format!("  {} ({}{stage})", failure.message, failure.reason));
    }
    for image in &job.images {
        let (media, bytes) = (&image.media_type, image.byte_size);
        lines.push(format!("  {}x{} {media} {bytes} bytes, blob {}", image.width, image.height, image.blob_id));
    }
    if job.pictures_dropped {
        lines.push("  its pictures made room for those of later jobs, and may be gone".into());
    } else if !job.images.is_empty() {
        lines.push(format!("  `atelier jobs fetch {}` writes them", job.id));
    }
    lines
}

/// How old the job is, or how long it took.
fn ages(job: &Job, now: SystemTime) -> String {
    let at = |time: Option<prost_types::Timestamp>| time.and_then(|time| SystemTime::try_from(time).ok());
    let Some(accepted) = at(job.create_time) else {
        return "at an unknown time".into();
    };
    let since = |then: SystemTime| seconds(then.duration_since(accepted).unwrap_or_default());
    match at(job.finish_time) {
        Some(finished) => format!("{} after {}", state(job.state()), since(finished)),
        None => format!("{} ago", since(now)),
    }
}

fn seconds(age: Duration) -> String {
    match age.as_secs() {
        0..120 => format!("{:.1} s", age.as_secs_f64()),
        120..7200 => format!("{} min", age.as_secs() / 60),
        _ => format!("{} h", age.as_secs() / 3600),
    }
}

/// To the second, in UTC.
fn time(time: Option<prost_types::Timestamp>) -> String {
    time.map(|time| prost_types::Timestamp { nanos: 0, ..time }.to_string()).unwrap_or_default()
}

/// What happened to a job, a line each; of a stage's steps only the newest.
fn happened(events: &[JobEvent]) -> Vec<String> {
    let mut lines = Vec::new();
    let mut newest: Option<(String, &StageProgress)> = None;
    let step = |(at, made): (String, &StageProgress)| format!("{at} {} is at step {} of {}", made.stage, made.step, made.steps);
    for event in events {
        let at = time(event.time);
        let line = match &event.kind {
            Some(Kind::StageProgress(made)) => {
                newest = Some((at, made));
                continue;
            }
            Some(Kind::StageStarted(began)) => {
                let from = if began.resumed_step > 0 { format!(" from step {} on", began.resumed_step) } else { String::new() };
                format!("{at} {} began on {}{from}", began.stage, began.group_id)
            }
            Some(Kind::StageFinished(ended)) => {
                newest = newest.filter(|(_, made)| made.stage != ended.stage);
                format!("{at} {} took {:.2} s", ended.stage, ended.seconds)
            }
            Some(Kind::Requeued(again)) => {
                lines.extend(newest.take().map(step));
                format!("{at} waited again, as try {}: {} ({})", again.attempt, again.message, again.reason)
            }
            Some(Kind::StateChanged(_)) | None => continue,
        };
        lines.push(line);
    }
    lines.extend(newest.map(step));
    lines
}

#[cfg(test)]
mod tests {
    use proto::v1::{JobRequeued, JobSpec, StageFinished, StageStarted};

    use super::*;

    fn timestamp(seconds: i64) -> Option<prost_types::Timestamp> {
        Some(prost_types::Timestamp { seconds, nanos: 5_000_000 })
    }

    #[test]
    fn a_job_says_its_age_its_try_and_why_it_waited_again() {
        let spec = Some(JobSpec { model: "tiny".into(), prompt: "a secret".into(), ..JobSpec::default() });
        let job = Job {
            id: "j".into(),
            state: JobState::Queued as i32,
            spec,
            create_time: timestamp(1_000_000_000),
            deadline: timestamp(1_000_000_600),
            priority: 3,
            attempt: 2,
            tenant: "studio".into(),
            ..Job::default()
        };
        let kinds = [
            Kind::StageStarted(StageStarted { stage: "denoise".into(), group_id: "tiny/transformer/0".into(), resumed_step: 0 }),
            Kind::StageProgress(StageProgress { stage: "denoise".into(), step: 1, steps: 9 }),
            Kind::StageProgress(StageProgress { stage: "denoise".into(), step: 2, steps: 9 }),
            Kind::Requeued(JobRequeued { reason: "GROUP_LOST".into(), message: "worker w2 left".into(), attempt: 2 }),
            Kind::StageStarted(StageStarted { stage: "denoise".into(), group_id: "tiny/transformer/0".into(), resumed_step: 2 }),
            Kind::StageProgress(StageProgress { stage: "denoise".into(), step: 9, steps: 9 }),
            Kind::StageFinished(StageFinished { stage: "denoise".into(), seconds: 1.5 }),
        ];
        let event = |(i, kind)| JobEvent { sequence: i as u64 + 1, time: timestamp(1_000_000_001), kind: Some(kind) };
        let events: Vec<JobEvent> = kinds.into_iter().enumerate().map(event).collect();
        let now = SystemTime::UNIX_EPOCH + Duration::from_secs(1_000_000_300);
        let lines = lines(&job, &events, Some("tiny/vae/0: needs 1 workers"), now);
        let expected = [
            "  accepted 2001-09-09T01:46:40Z, 4 min ago",
            "  try 2, priority 3, deadline 2001-09-09T01:56:40Z, of tenant studio",
            "  it waits: tiny/vae/0: needs 1 workers",
            "  2001-09-09T01:46:41Z denoise began on tiny/transformer/0",
            "  2001-09-09T01:46:41Z denoise is at step 2 of 9",
            "  2001-09-09T01:46:41Z waited again, as try 2: worker w2 left (GROUP_LOST)",
            "  2001-09-09T01:46:41Z denoise began on tiny/transformer/0 from step 2 on",
            "  2001-09-09T01:46:41Z denoise took 1.50 s",
        ];
        assert_eq!(lines[1..], expected);
        assert!(!lines.concat().contains("secret"), "prompts stay private");
    }

    #[test]
    fn of_very_many_things_that_happened_the_newest_are_shown() {
        let event = |sequence: u64| {
            let again = JobRequeued { reason: "DRAINED".into(), message: String::new(), attempt: sequence as u32 };
            JobEvent { sequence, time: timestamp(1), kind: Some(Kind::Requeued(again)) }
        };
        let events: Vec<JobEvent> = (1..=100).map(event).collect();
        let lines = lines(&Job::default(), &events, None, SystemTime::now());
        assert!(lines.contains(&"  ...".to_owned()) && lines.last().unwrap().contains("as try 100"), "{lines:?}");
        assert_eq!(lines.iter().filter(|line| line.contains("waited again")).count(), LINES);
    }
}
