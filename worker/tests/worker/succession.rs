//! One coordinator after the other: what goes on in between, and what the next one is told.

use proto::v1::control_request::Command;
use proto::v1::control_response::Report;
use proto::v1::{ForgetJob, Heartbeat, Lead, TaskRef};
use tonic::Code;
use tonic_types::StatusExt;

use crate::coordinator::{Coordinator, join, until};
use crate::job::Bench;
use crate::running::{Running, Waits};
use crate::task;

fn lead(term: u64, coordinator: &Coordinator) -> Lead {
    Lead { term, blob_address: coordinator.address() }
}

/// How tasks ended, of what was told so far.
fn ends(seen: &[Report]) -> Vec<Report> {
    let is_end = |report: &&Report| matches!(report, Report::TaskDone(_) | Report::TaskFailed(_) | Report::TaskParked(_));
    seen.iter().filter(is_end).cloned().collect()
}

#[tokio::test]
async fn a_job_goes_on_through_a_change_of_coordinators_and_its_end_is_told_to_the_next() {
    let coordinator = Coordinator::start().await;
    let mut bench = Bench::start(&coordinator, "transformer").await;
    let job = bench.job(&coordinator, "job", 1, 60);
    for run in job.whole() {
        bench.send(run).await;
    }
    bench.control.stepped(&job.denoise, 3).await;
    let encoded = Report::TaskDone(bench.control.done(&job.encode).await);
    let Bench { worker, control } = bench;
    drop(control);

    // At another address: where the tasks were told to store is nobody any more.
    let coordinator = coordinator.succeed().await;
    let (mut control, holding) = worker.led(lead(2, &coordinator)).await;
    let mut groups: Vec<_> = holding.ranks.iter().map(|rank| (rank.join.clone().unwrap(), rank.ready)).collect();
    groups.sort_by_key(|(join, _)| join.group_id.clone());
    let expected = [("e", "encoder"), ("t", "transformer"), ("v", "vae")].map(|(group_id, component)| {
        (proto::v1::JoinGroup { secret: Vec::new().into(), ..join(group_id, 1, component, &[&worker]) }, true)
    });
    assert_eq!(groups, expected);
    assert!(!holding.draining);
    let held = |task: &TaskRef| holding.tasks.iter().find(|held| held.task.as_ref() == Some(task)).unwrap();
    assert_eq!(holding.tasks.len(), 2, "{holding:?}");
    assert!(!held(&job.decode).started);
    let denoise = held(&job.denoise);
    assert!(denoise.started && (3..60).contains(&denoise.step) && denoise.steps == 60, "{denoise:?}");
    let since = denoise.step;

    let images = control.done(&job.decode).await.images;
    assert_eq!(images.len(), 2);
    assert!(images.iter().all(|image| coordinator.blob(&image.blob_id).len() as u64 == image.byte_size));
    assert!(control.done(&job.denoise).await.stored);
    let told = ends(&control.seen);
    assert_eq!(told.len(), 3, "each once: {told:?}");
    assert_eq!(told[0], encoded, "the same again");
    let steps: Vec<u32> =
        control.seen.iter().filter_map(|r| if let Report::TaskProgress(p) = r { Some(p.step) } else { None }).collect();
    assert!(steps.is_sorted() && steps.iter().all(|step| *step >= since), "{steps:?} since {since}");
    drop(control);

    let (mut control, holding) = worker.led(lead(3, &coordinator)).await;
    assert!(holding.tasks.is_empty(), "{holding:?}");
    control.done(&job.decode).await;
    assert_eq!(ends(&control.seen), told);
    // A task that is done is not done again.
    control.seen.clear();
    control.send(Command::RunTask(job.whole().remove(0))).await;
    assert_eq!(control.done(&job.decode).await.images, images);
    control.send(Command::ForgetJob(ForgetJob { job_id: "job".into() })).await;
    control.describe("none", "/nowhere/at/all").await.unwrap_err();
    drop(control);

    let (mut control, _) = worker.led(lead(3, &coordinator)).await;
    control.describe("none", "/nowhere/at/all").await.unwrap_err();
    assert!(ends(&control.seen).is_empty(), "{:?}", control.seen);
    worker.stop().await;
}

#[tokio::test]
async fn what_is_stored_while_no_coordinator_is_there_is_stored_when_one_is() {
    let coordinator = Coordinator::start().await;
    let mut bench = Bench::start(&coordinator, "transformer").await;
    let job = bench.job(&coordinator, "job", 1, 20);
    for run in job.whole() {
        bench.send(run).await;
    }
    bench.control.stepped(&job.denoise, 1).await;
    let Bench { worker, control } = bench;
    drop(control);
    let gone = coordinator.away();
    // Long enough for the picture to be drawn meanwhile, and harmless if it is not.
    tokio::time::sleep(std::time::Duration::from_millis(300)).await;
    let coordinator = gone.back().await;
    let (mut control, _) = worker.led(lead(2, &coordinator)).await;
    let images = control.done(&job.decode).await.images;
    assert!(images.iter().all(|image| coordinator.blob(&image.blob_id).len() as u64 == image.byte_size));
    assert!(control.done(&job.denoise).await.stored);
    worker.stop().await;
}

#[tokio::test]
async fn a_stream_of_an_older_term_or_of_nobody_is_refused() {
    let coordinator = Coordinator::start().await;
    let worker = Running::start(&coordinator).await;
    let (mut newest, _) = worker.led(lead(5, &coordinator)).await;
    for (first, reason) in [(Command::Lead(lead(4, &coordinator)), "STALE_TERM"), (Command::Heartbeat(Heartbeat {}), "NO_LEAD")] {
        let refused = worker.say(first).await.refused().await;
        assert_eq!(refused.code(), Code::FailedPrecondition, "{reason}");
        assert_eq!(refused.get_details_error_info().unwrap().reason, reason);
    }
    newest.describe("none", "/nowhere/at/all").await.unwrap_err();
    worker.stop().await;
}

#[tokio::test]
async fn a_newer_stream_of_the_same_term_takes_the_older_one_s_place_and_all_it_holds() {
    let coordinator = Coordinator::start().await;
    let worker = Running::waiting(&coordinator, Waits::default()).await;
    let (mut first, holding) = worker.led(lead(1, &coordinator)).await;
    assert!(holding.ranks.is_empty() && holding.tasks.is_empty());
    first.send(Command::JoinGroup(join("g", 1, "transformer", &[&worker]))).await;
    first.ready("g", 1).await;
    let task = task("denoise", "g", 1);
    first.send(Command::RunTask(crate::run(task.clone(), crate::ENDLESS))).await;
    first.stepped(&task, 1).await;
    let (mut second, holding) = worker.led(lead(1, &coordinator)).await;
    first.over().await;
    assert_eq!((holding.ranks.len(), holding.tasks.len()), (1, 1));
    second.stepped(&task, holding.tasks[0].step + 1).await;
    second.send(Command::CancelTask(proto::v1::CancelTask { task: Some(task.clone()) })).await;
    assert_eq!(second.failed(&task).await.reason, "CANCELLED");
    until("it is still a member", || coordinator.members().contains(&worker.registration)).await;
    worker.stop().await;
}
