//! What an earlier coordinator had begun to take away, a new one does not take for going on.

use proto::v1::{Holding, JobState, RunTask, TaskFailed, TaskParked};

use super::{durable_tests::*, tests::*, *};

type Tasks = Vec<(String, RunTask)>;

/// A new coordinator leads; the workers hold the denoising and the decoding, changed by `change`, and say `then` right after.
fn taken_over(
    change: impl FnOnce(&mut BTreeMap<String, Holding>),
    then: impl FnOnce(&RunTask) -> Option<Report>,
) -> (Cluster, String) {
    let (mut cluster, job, tasks) = denoising();
    let (denoise, decode) = (stage(&tasks, "denoise").clone(), stage(&tasks, "decode").clone());
    let held = [(denoise.0.clone(), denoise.1.clone(), true), (decode.0.clone(), decode.1, false)];
    let mut holdings = holdings(&cluster, &held);
    change(&mut holdings);
    cluster.restart(saved(&job, &[("encode_text", 0), ("denoise", 2)]));
    for worker in ["w1", "w2", "w3"] {
        cluster.join_holding(worker, holdings.remove(worker).unwrap_or_default());
    }
    cluster.describe("w1");
    if let Some(report) = then(&denoise.1) {
        cluster.report(&denoise.0, report);
    }
    cluster.tick(SETTLE);
    (cluster, job)
}

fn failed(task: &RunTask, attempt: u32) -> Report {
    let task = task.task.clone().map(|task| proto::v1::TaskRef { attempt, ..task });
    Report::TaskFailed(TaskFailed { task, reason: "CANCELLED".into(), message: String::new(), step: 3 })
}

/// It goes on from step 2 as try `attempt`, and ends well.
fn goes_on(mut cluster: Cluster, job: &str, attempt: u32) {
    let again: Tasks = cluster.tasks();
    let denoise = &stage(&again, "denoise").1;
    assert_eq!((again.len(), denoise.resume_step, reference(denoise).attempt), (2, 2, attempt));
    for task in again.iter().rev() {
        cluster.start(task);
        cluster.finish(task);
    }
    let done = cluster.job(job);
    assert_eq!((done.state(), done.attempt), (JobState::Succeeded, attempt));
}

#[test]
fn a_task_that_was_told_to_stop_is_not_taken_over() {
    let stopping = |holdings: &mut BTreeMap<String, Holding>| {
        let tasks = holdings.values_mut().flat_map(|holding| &mut holding.tasks);
        tasks.filter(|held| held.started).for_each(|held| held.stopping = true);
    };
    let (cluster, job) = taken_over(stopping, |_| None);
    goes_on(cluster, &job, 2);
}

#[test]
fn a_task_that_stops_though_nobody_said_so_goes_on_in_a_new_try() {
    let (cluster, job) = taken_over(|_| {}, |denoise| Some(failed(denoise, 1)));
    goes_on(cluster, &job, 2);
    let parked = |denoise: &RunTask| Some(Report::TaskParked(TaskParked { task: denoise.task.clone(), saved_step: 2 }));
    let (cluster, job) = taken_over(|_| {}, parked);
    goes_on(cluster, &job, 2);
}

#[test]
fn no_try_bears_the_number_of_one_whose_end_a_worker_still_keeps() {
    let nothing_held = |holdings: &mut BTreeMap<String, Holding>| holdings.values_mut().for_each(|holding| holding.tasks.clear());
    let (cluster, job) = taken_over(nothing_held, |denoise| Some(failed(denoise, 3)));
    goes_on(cluster, &job, 4);
    // Nor does an older one go on beside it.
    let (cluster, job) = taken_over(|_| {}, |denoise| Some(failed(denoise, 2)));
    goes_on(cluster, &job, 3);
}

#[test]
fn a_task_whose_input_nobody_sends_any_more_is_not_taken_over() {
    // The denoising was stored, and its worker died before it had handed it to the decoding, which waits.
    let (mut cluster, job, tasks) = denoising();
    let (denoise, decode) = (stage(&tasks, "denoise").clone(), stage(&tasks, "decode").clone());
    let mut holdings = holdings(&cluster, &[(decode.0.clone(), decode.1, false)]);
    cluster.restart(saved(&job, &[("encode_text", 0), ("denoise", 0)]));
    let others: Vec<&str> = ["w1", "w2", "w3"].into_iter().filter(|worker| *worker != denoise.0).collect();
    for worker in &others {
        cluster.join_holding(worker, holdings.remove(*worker).unwrap_or_default());
    }
    cluster.describe(others[0]);
    cluster.tick(SETTLE);
    cluster.all_ready();
    let again = cluster.tasks();
    let task = &stage(&again, "decode").1;
    assert_eq!((again.len(), &task.stored_inputs[..], reference(task).attempt), (1, &["denoise".to_owned()][..], 2));
}

/// Two jobs that wait, and a new coordinator whose model has no `refiner`, which the first one needs. Of it `saved` is there.
fn refiner_removed(saved: impl FnOnce(&str) -> SavedSteps) -> (Cluster, [String; 2]) {
    let mut cluster = Cluster::new();
    cluster.join("w1");
    cluster.describe("w1");
    let jobs = [cluster.new_job(), cluster.new_job()];
    let stages = &mut cluster.records.get_mut(&jobs[0]).unwrap().stages;
    let at = stages.iter().position(|stage| stage.id == "decode").unwrap();
    let mut refine = stages[at - 1].clone();
    (refine.id, refine.component, refine.inputs) = ("refine".into(), "refiner".into(), vec!["denoise".into()]);
    stages[at].inputs = vec!["refine".into()];
    stages.insert(at, refine);
    cluster.restart(saved(&jobs[0]));
    cluster.join("w1");
    cluster.join("w2");
    cluster.describe("w1");
    cluster.tick(SETTLE);
    cluster.all_ready();
    (cluster, jobs)
}

#[test]
fn a_job_that_needs_what_its_model_has_no_longer_fails_and_those_behind_it_go_on() {
    let (mut cluster, [gone, next]) = refiner_removed(|_| SavedSteps::new());
    let failed = cluster.job(&gone);
    let failure = failed.failure.clone().unwrap_or_default();
    assert_eq!(
        (failed.state(), failure.reason.as_str(), failure.stage.as_str()),
        (JobState::Failed, "INVALID_REQUEST", "refine")
    );
    assert!(failure.message.contains("\"refine\"") && failure.message.contains("\"refiner\""), "{}", failure.message);
    assert!(cluster.records[&gone].end.is_some(), "it is written down");
    let tasks = cluster.tasks();
    assert!(tasks.len() == 3 && tasks.iter().all(|(_, task)| reference(task).job_id == next), "{tasks:?}");
}

#[test]
fn a_job_that_is_done_with_what_its_model_has_no_longer_goes_on() {
    let (mut cluster, [job, _]) = refiner_removed(|job| saved(job, &[("refine", 0)]));
    let tasks: Tasks = cluster.tasks().into_iter().filter(|(_, task)| reference(task).job_id == job).collect();
    assert_eq!((tasks.len(), &tasks[0].1.stored_inputs[..]), (1, &["refine".to_owned()][..]));
    cluster.start(&tasks[0]);
    cluster.fail(&tasks[0], "CHECKPOINT_LOST");
    assert_eq!(cluster.job(&job).failure.unwrap().stage, "refine", "and now it is not");
}

#[test]
fn a_cancelled_job_whose_deadline_passed_while_nobody_led_is_cancelled() {
    let mut cluster = Cluster::ready();
    let submission = Submission { timeout: Some(5000), ..cluster.submission() };
    let job = cluster.submit(submission).unwrap().id;
    let tasks = cluster.tasks();
    cluster.start(stage(&tasks, "encode_text"));
    cluster.cancel(&job);
    cluster.tick(5001);
    assert_eq!(cluster.job(&job).state(), JobState::Cancelled);
}
