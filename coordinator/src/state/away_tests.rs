//! Stories of control streams that break: the worker is back in a moment, and nothing was taken from it.

use proto::v1::{Holding, JobState, TaskDone, TaskProgress};

use super::{durable_tests::holdings, tests::*, *};

const TRANSFORMER: &str = "emoji/transformer/0";

fn away(cluster: &mut Cluster, worker: &str) {
    cluster.apply(Event::WorkerAway { worker_id: worker.into() });
}

fn back(cluster: &mut Cluster, worker: &str, holding: Holding) {
    cluster.join_holding(worker, holding);
}

/// A ready cluster with one job that is being denoised: the cluster, the job, its tasks, and the leader of the transformer.
fn denoising() -> (Cluster, String, Vec<(String, proto::v1::RunTask)>, String) {
    let mut cluster = Cluster::ready();
    let job = cluster.new_job();
    let tasks = cluster.tasks();
    cluster.start(stage(&tasks, "encode_text"));
    cluster.finish(stage(&tasks, "encode_text"));
    cluster.start(stage(&tasks, "denoise"));
    let leader = stage(&tasks, "denoise").0.clone();
    cluster.sent.clear();
    (cluster, job, tasks, leader)
}

/// What `worker` would say truthfully, with these of its tasks and whether each has begun.
fn holding(cluster: &Cluster, worker: &str, tasks: &[(String, proto::v1::RunTask, bool)]) -> Holding {
    holdings(cluster, tasks).remove(worker).unwrap_or_default()
}

fn led(tasks: &[(String, proto::v1::RunTask)], worker: &str, begun: &[&str]) -> Vec<(String, proto::v1::RunTask, bool)> {
    let mine = tasks.iter().filter(|(leader, task)| leader == worker && reference(task).stage != "encode_text");
    mine.map(|(leader, task)| (leader.clone(), task.clone(), begun.contains(&reference(task).stage.as_str()))).collect()
}

#[test]
fn a_worker_that_is_back_goes_on_with_its_groups_and_its_tasks() {
    let (mut cluster, job, tasks, leader) = denoising();
    let epoch = cluster.epoch(TRANSFORMER);
    let held = holding(&cluster, &leader, &led(&tasks, &leader, &["denoise"]));
    away(&mut cluster, &leader);
    back(&mut cluster, &leader, held);
    assert_eq!((cluster.epoch(TRANSFORMER), cluster.job(&job).attempt), (epoch, 1));
    assert!(cluster.sent.is_empty(), "nothing has to be said: {:?}", cluster.sent);
    for stage_id in ["denoise", "decode"] {
        cluster.start(stage(&tasks, stage_id));
        cluster.finish(stage(&tasks, stage_id));
    }
    assert_eq!(cluster.job(&job).state(), JobState::Succeeded);
}

#[test]
fn what_was_reported_meanwhile_is_made_good() {
    let (mut cluster, job, tasks, leader) = denoising();
    let mut held = holding(&cluster, &leader, &led(&tasks, &leader, &["denoise"]));
    let denoise = held.tasks.iter_mut().find(|held| held.task == stage(&tasks, "denoise").1.task).unwrap();
    (denoise.step, denoise.steps, denoise.saved_step) = (3, 4, 2);
    away(&mut cluster, &leader);
    back(&mut cluster, &leader, held);
    let events = cluster.state.events_after(&job, 0).unwrap().events;
    let told =
        events.iter().any(|event| matches!(&event.kind, Some(proto::v1::job_event::Kind::StageProgress(p)) if p.step == 3));
    assert!(told, "{events:?}");
}

#[test]
fn a_task_that_never_arrived_is_given_again() {
    let (mut cluster, job, tasks, leader) = denoising();
    let held = holding(&cluster, &leader, &[]);
    away(&mut cluster, &leader);
    back(&mut cluster, &leader, held);
    let again = cluster.tasks();
    let mine: Vec<_> = led(&tasks, &leader, &[]).into_iter().map(|(_, task, _)| task.task).collect();
    assert_eq!(again.iter().map(|(_, task)| task.task.clone()).collect::<Vec<_>>().len(), mine.len());
    assert!(again.iter().all(|(worker, task)| *worker == leader && mine.contains(&task.task)), "{again:?}");
    assert_eq!(cluster.job(&job).attempt, 1, "it is the same try");
}

#[test]
fn a_rank_that_is_gone_ends_the_epoch_and_the_job_waits_again() {
    let (mut cluster, job, _, leader) = denoising();
    let epoch = cluster.epoch(TRANSFORMER);
    away(&mut cluster, &leader);
    back(&mut cluster, &leader, Holding::default());
    cluster.tick(REFORM_PAUSE);
    assert_eq!((cluster.epoch(TRANSFORMER), cluster.job(&job).attempt), (epoch + 1, 2));
}

#[test]
fn ranks_and_tasks_that_it_should_not_have_are_given_up() {
    let (mut cluster, _, tasks, leader) = denoising();
    let mut held = holding(&cluster, &leader, &led(&tasks, &leader, &["denoise"]));
    let mut stale = held.ranks[0].clone();
    stale.join.as_mut().unwrap().epoch += 7;
    held.ranks.push(stale);
    let mut unknown = held.tasks[0].clone();
    unknown.task.as_mut().unwrap().job_id = "nobody's".into();
    held.tasks.push(unknown);
    away(&mut cluster, &leader);
    back(&mut cluster, &leader, held);
    let left = cluster.sent.iter().any(|(worker, command)| *worker == leader && matches!(command, Command::LeaveGroup(_)));
    assert!(left, "{:?}", cluster.sent);
    assert_eq!(cluster.cancels()[0].1.task.as_ref().unwrap().job_id, "nobody's");
    assert_eq!(cluster.forgets()[0].1.job_id, "nobody's");
}

#[test]
fn a_group_of_a_worker_that_is_away_is_given_nothing_new_and_stays_ready() {
    let mut cluster = Cluster::ready();
    let workers = cluster.state.groups[TRANSFORMER].members.clone();
    let held = holding(&cluster, &workers[0], &[]);
    away(&mut cluster, &workers[0]);
    let job = cluster.new_job();
    assert!(cluster.tasks().is_empty());
    assert!(cluster.state.models()[0].ready, "it is back in a moment");
    back(&mut cluster, &workers[0], held);
    assert_eq!(cluster.tasks().len(), 3);
    assert_eq!(cluster.job(&job).attempt, 1);
}

#[test]
fn one_who_asked_to_stop_meanwhile_is_told_when_it_is_back() {
    let (mut cluster, job, tasks, leader) = denoising();
    let held = holding(&cluster, &leader, &led(&tasks, &leader, &["denoise"]));
    away(&mut cluster, &leader);
    cluster.cancel(&job);
    assert!(!cluster.cancels().iter().any(|(worker, _)| *worker == leader), "it cannot be told yet");
    back(&mut cluster, &leader, held);
    assert!(cluster.cancels().iter().any(|(worker, cancel)| *worker == leader && cancel.task == stage(&tasks, "denoise").1.task));
}

#[test]
fn one_who_is_not_back_has_left() {
    let (mut cluster, job, _, leader) = denoising();
    away(&mut cluster, &leader);
    cluster.leave(&leader);
    assert_eq!(cluster.job(&job).attempt, 2);
    // And joins as a stranger later.
    cluster.join(&leader);
    cluster.tick(REFORM_PAUSE);
    cluster.all_ready();
    assert!(cluster.state.models()[0].ready);
}

#[test]
fn the_end_of_a_task_whose_job_is_over_is_forgotten_by_the_worker() {
    let (mut cluster, job, tasks, leader) = denoising();
    cluster.cancel(&job);
    let denoise = stage(&tasks, "denoise").1.task.clone();
    let cancelled = |task| proto::v1::TaskFailed { task, reason: "CANCELLED".into(), ..Default::default() };
    cluster.report(&leader, Report::TaskFailed(cancelled(denoise.clone())));
    assert_eq!(cluster.job(&job).state(), JobState::Cancelled);
    cluster.forgets();
    // It had not heard of it.
    let done = TaskDone { task: denoise.clone(), seconds: 1.0, images: vec![], stored: false };
    cluster.report(&leader, Report::TaskDone(done));
    assert_eq!(cluster.forgets(), [(leader.clone(), proto::v1::ForgetJob { job_id: job })]);
    let progress = TaskProgress { task: denoise, step: 1, steps: 4, saved_step: 0 };
    cluster.report(&leader, Report::TaskProgress(progress));
    assert!(cluster.forgets().is_empty(), "only an end is kept");
}

#[test]
fn a_cancelled_job_whose_task_never_arrived_ends_when_its_worker_is_back() {
    let (mut cluster, job, tasks, _) = denoising();
    cluster.start(stage(&tasks, "denoise"));
    cluster.finish(stage(&tasks, "denoise"));
    let decoder = stage(&tasks, "decode").0.clone();
    away(&mut cluster, &decoder);
    cluster.cancel(&job);
    assert_eq!(cluster.job(&job).state(), JobState::Running, "its worker may be at work on it");
    let held = holding(&cluster, &decoder, &[]);
    back(&mut cluster, &decoder, held);
    assert_eq!(cluster.job(&job).state(), JobState::Cancelled);
}
