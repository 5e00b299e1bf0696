//! Stories of loss: workers die, drain and hang, coordinators change, urgent jobs come. No job is lost by it.

use proto::v1::{
    Draining, HeldRank, HeldTask, Holding, JobState, JoinGroup, ParkTask, Products, RunTask, TaskComputed, TaskDone, TaskParked,
    TaskProgress, model_described::Outcome,
};

use super::{job::Job, tests::*, *};
use crate::{checkpoints::Saved, error::Error, testing};

fn progress(cluster: &mut Cluster, (worker, task): &(String, RunTask), step: u32, saved_step: u32) {
    cluster.report(worker, Report::TaskProgress(TaskProgress { task: task.task.clone(), step, steps: 4, saved_step }));
}

fn finish_stored(cluster: &mut Cluster, (worker, task): &(String, RunTask)) {
    let done = TaskDone { task: task.task.clone(), seconds: 0.5, images: vec![], stored: true };
    cluster.report(worker, Report::TaskDone(done));
}

fn parks(cluster: &mut Cluster) -> Vec<(String, ParkTask)> {
    let mut parks = vec![];
    cluster.sent.retain(|(worker, command)| match command {
        Command::ParkTask(park) => {
            parks.push((worker.clone(), park.clone()));
            false
        }
        _ => true,
    });
    parks
}

fn answer_parks(cluster: &mut Cluster, saved_step: u32) {
    for (worker, park) in parks(cluster) {
        cluster.report(&worker, Report::TaskParked(TaskParked { task: park.task, saved_step }));
    }
}

/// Three workers, one of them spare, and a job in the middle of its denoising: step 2 of 4 is saved, and the text's embeddings.
pub(super) fn denoising() -> (Cluster, String, Vec<(String, RunTask)>) {
    let mut cluster = Cluster::ready();
    cluster.join("w3");
    let job = new_job(&mut cluster);
    let tasks = cluster.tasks();
    cluster.start(stage(&tasks, "encode_text"));
    finish_stored(&mut cluster, stage(&tasks, "encode_text"));
    cluster.start(stage(&tasks, "denoise"));
    progress(&mut cluster, stage(&tasks, "denoise"), 3, 2);
    (cluster, job, tasks)
}

fn new_job(cluster: &mut Cluster) -> String {
    let submission = cluster.submission();
    cluster.submit(submission).unwrap().id
}

fn finish_all(cluster: &mut Cluster) {
    for task in cluster.tasks().iter().rev() {
        cluster.start(task);
        cluster.finish(task);
    }
}

#[test]
fn a_job_goes_on_from_its_last_saved_step_and_does_not_encode_again() {
    let (mut cluster, job, tasks) = denoising();
    let leader = stage(&tasks, "denoise").0.clone();
    cluster.leave(&leader);
    cluster.all_ready();
    let again = cluster.tasks();
    let stages: Vec<_> = again.iter().map(|(_, task)| reference(task).stage.as_str()).collect();
    assert_eq!(stages, ["decode", "denoise"]);
    let denoise = &stage(&again, "denoise").1;
    assert_eq!((denoise.resume_step, &denoise.stored_inputs[..], denoise.inputs.len()), (2, &["encode_text".to_owned()][..], 0));
    assert_eq!((reference(denoise).attempt, &stage(&again, "decode").1.inputs[..]), (2, &["denoise".to_owned()][..]));
    for task in again.iter().rev() {
        cluster.start(task);
        cluster.finish(task);
    }
    assert_eq!(cluster.job(&job).state(), JobState::Succeeded);
    assert_eq!(cluster.records[&job].end.as_ref().unwrap().images.len(), 1);
}

#[test]
fn what_is_stored_while_a_stage_runs_does_not_make_its_steps_seem_slow() {
    let finish = |cluster: &mut Cluster, (worker, task): &(String, RunTask), seconds| {
        let done = TaskDone { task: task.task.clone(), seconds, images: vec![], stored: true };
        cluster.report(worker, Report::TaskDone(done));
    };
    let expected = |cluster: &Cluster| {
        let job = cluster.state.jobs.by_id("job1").unwrap();
        let fresh = Job::recovered(job.record(), 1);
        (cluster.state.tally.expected(&fresh, fresh.plan.stage("denoise").unwrap()) * 1e6).round() / 1e6
    };
    // Four steps at two seconds each, of which three were stored meanwhile.
    let (mut cluster, _, tasks) = denoising();
    progress(&mut cluster, stage(&tasks, "denoise"), 4, 3);
    finish(&mut cluster, stage(&tasks, "denoise"), 8.0);
    assert_eq!(expected(&cluster), 8.0);
    // A try that goes on after two of them.
    let (mut cluster, _, tasks) = denoising();
    cluster.leave(&stage(&tasks, "denoise").0);
    cluster.all_ready();
    let again = cluster.tasks();
    cluster.start(stage(&again, "denoise"));
    progress(&mut cluster, stage(&again, "denoise"), 4, 3);
    finish(&mut cluster, stage(&again, "denoise"), 4.0);
    assert_eq!(expected(&cluster), 8.0);
}

#[test]
fn a_finished_denoising_is_not_done_again_when_the_decoder_dies() {
    let (mut cluster, _, tasks) = denoising();
    finish_stored(&mut cluster, stage(&tasks, "denoise"));
    let decoder = stage(&tasks, "decode").clone();
    cluster.start(&decoder);
    cluster.leave(&decoder.0);
    cluster.all_ready();
    let again = cluster.tasks();
    assert_eq!(again.len(), 1);
    assert_eq!(again[0].1.stored_inputs, ["denoise"]);
}

#[test]
fn a_job_that_kills_three_workers_fails_and_its_neighbour_does_not() {
    let mut cluster = Cluster::ready();
    let (poison, neighbour) = (new_job(&mut cluster), new_job(&mut cluster));
    let mut deaths = 0;
    for life in 0..20 {
        let tasks = cluster.tasks();
        for task in tasks.iter().rev() {
            if reference(&task.1).job_id == poison && reference(&task.1).stage == "denoise" {
                cluster.start(task);
                continue;
            }
            cluster.start(task);
            if reference(&task.1).job_id != poison || reference(&task.1).stage == "encode_text" {
                finish_stored_or_last(&mut cluster, task);
            }
        }
        let Some((leader, _)) = tasks.iter().find(|(_, t)| reference(t).job_id == poison && reference(t).stage == "denoise")
        else {
            break;
        };
        cluster.leave(&leader.clone());
        deaths += 1;
        cluster.join(&format!("spare{life}"));
        cluster.all_ready();
    }
    finish_all(&mut cluster);
    let failed = cluster.job(&poison);
    assert_eq!((failed.state(), deaths), (JobState::Failed, MAX_LOSSES), "{failed:?}");
    let failure = failed.failure.unwrap();
    assert_eq!((failure.reason.as_str(), failure.stage.as_str()), ("TRIES_EXHAUSTED", "denoise"));
    assert!(failure.message.contains("connection closed"), "{}", failure.message);
    assert_eq!(cluster.job(&neighbour).state(), JobState::Succeeded);
}

fn finish_stored_or_last(cluster: &mut Cluster, task: &(String, RunTask)) {
    if task.1.outputs.is_empty() { cluster.finish(task) } else { finish_stored(cluster, task) }
}

#[test]
fn a_job_that_may_kill_workers_runs_alone_until_it_gets_further() {
    let mut cluster = Cluster::ready();
    let (first, second) = (new_job(&mut cluster), new_job(&mut cluster));
    for task in cluster.tasks().iter().rev().filter(|(_, task)| reference(task).stage != "decode") {
        cluster.start(task);
    }
    cluster.join("w3");
    cluster.leave("w2");
    cluster.all_ready();
    let alone = cluster.tasks();
    assert!(!alone.is_empty() && alone.iter().all(|(_, task)| reference(task).job_id == first));
    for task in alone.iter().rev() {
        cluster.start(task);
        cluster.finish(task);
    }
    assert_eq!(cluster.job(&first).state(), JobState::Succeeded);
    assert!(cluster.tasks().iter().all(|(_, task)| reference(task).job_id == second));
}

#[test]
fn a_draining_worker_hands_its_jobs_over_at_the_next_step_and_is_let_go() {
    let (mut cluster, job, tasks) = denoising();
    let leader = stage(&tasks, "denoise").0.clone();
    cluster.report(&leader, Report::Draining(Draining {}));
    assert!(!cluster.state.models()[0].ready, "nothing new is placed there");
    answer_parks(&mut cluster, 3);
    let waiting = cluster.job(&job);
    assert_eq!((waiting.state(), waiting.attempt), (JobState::Queued, 2));
    let left: Vec<_> = cluster.sent.iter().filter(|(w, c)| *w == leader && matches!(c, Command::LeaveGroup(_))).collect();
    assert!(!left.is_empty());
    let joins = cluster.joins();
    assert!(!joins.is_empty() && joins.iter().all(|(worker, _)| *worker != leader), "{joins:?}");
    for (worker, join) in joins {
        let JoinGroup { group_id, epoch, rank, .. } = join;
        cluster.report(&worker, Report::GroupReady(proto::v1::GroupReady { group_id, epoch, rank }));
    }
    let again = cluster.tasks();
    assert_eq!(stage(&again, "denoise").1.resume_step, 3);
    assert_eq!(cluster.records[&job].losses, 0, "nobody was lost");
}

#[test]
fn a_job_that_is_cancelled_while_it_is_handed_over_does_not_come_back() {
    let (mut cluster, job, tasks) = denoising();
    let leader = stage(&tasks, "denoise").0.clone();
    cluster.report(&leader, Report::Draining(Draining {}));
    cluster.cancel(&job);
    for task in ["decode", "denoise"] {
        cluster.fail(stage(&tasks, task), "CANCELLED");
    }
    assert_eq!(cluster.job(&job).state(), JobState::Cancelled);
    assert_eq!(cluster.state.queue.len(), 0);
}

#[test]
fn an_urgent_job_takes_the_place_of_a_running_one_at_a_step_boundary() {
    let mut cluster = Cluster::ready();
    let (older, younger) = (new_job(&mut cluster), new_job(&mut cluster));
    for task in cluster.tasks().iter().rev().filter(|(_, task)| reference(task).stage == "denoise") {
        cluster.start(task);
    }
    let urgent = Submission { priority: 10, ..cluster.submission() };
    let urgent = cluster.submit(urgent).unwrap().id;
    let parked = parks(&mut cluster);
    assert!(!parked.is_empty() && parked.iter().all(|(_, park)| park.task.as_ref().unwrap().job_id == younger));
    for (worker, park) in parked {
        cluster.report(&worker, Report::TaskParked(TaskParked { task: park.task, saved_step: 2 }));
    }
    let placed = cluster.tasks();
    assert!(placed.iter().all(|(_, task)| reference(task).job_id == urgent), "{placed:?}");
    for task in placed.iter().rev() {
        cluster.start(task);
        cluster.finish(task);
    }
    let back = cluster.tasks();
    let denoise = &stage(&back, "denoise").1;
    assert_eq!((reference(denoise).job_id.as_str(), denoise.resume_step), (younger.as_str(), 2));
    assert_eq!(cluster.job(&older).attempt, 1);
}

#[test]
fn a_job_that_is_late_ends_with_its_deadline() {
    let mut cluster = Cluster::ready();
    let submission = Submission { timeout: Some(5000), ..cluster.submission() };
    let job = cluster.submit(submission).unwrap();
    assert!(job.deadline.is_some());
    let tasks = cluster.tasks();
    cluster.start(stage(&tasks, "encode_text"));
    cluster.tick(4999);
    assert_eq!(cluster.job(&job.id).state(), JobState::Running);
    cluster.tick(1);
    assert_eq!(cluster.job(&job.id).failure.unwrap().reason, "DEADLINE_EXCEEDED");
    assert!(!cluster.cancels().is_empty());
}

#[test]
fn a_job_that_cannot_be_in_time_is_refused_at_once() {
    let mut cluster = Cluster::ready();
    let job = new_job(&mut cluster);
    cluster.tick(8000);
    finish_all(&mut cluster);
    assert_eq!(cluster.job(&job).state(), JobState::Succeeded);
    let hasty = Submission { timeout: Some(1000), ..cluster.submission() };
    assert!(matches!(cluster.submit(hasty), Err(Error::DeadlineUnreachable { timeout: 1000, predicted: 8000 })));
    let patient = Submission { timeout: Some(9000), ..cluster.submission() };
    assert!(cluster.submit(patient).is_ok());
}

#[test]
fn a_group_that_makes_no_step_is_ended_though_its_workers_answer() {
    let (mut cluster, job, tasks) = denoising();
    cluster.tick(5000);
    assert_eq!(cluster.job(&job).attempt, 1);
    cluster.tick(100);
    assert_eq!(cluster.job(&job).attempt, 2);
    let ended = cluster.effects.iter().find_map(|effect| match effect {
        Effect::GroupLost { group_id, cause, .. } => Some((group_id.as_str(), cause.as_str())),
        _ => None,
    });
    assert_eq!(ended, Some(("emoji/transformer/0", "it made no step for 5.1 s")));
    assert_eq!(reference(&stage(&tasks, "denoise").1).attempt, 1);
}

#[test]
fn a_checkpoint_that_is_gone_means_beginning_anew() {
    let (mut cluster, job, tasks) = denoising();
    cluster.leave(&stage(&tasks, "denoise").0.clone());
    cluster.all_ready();
    let again = cluster.tasks();
    cluster.fail(stage(&again, "denoise"), "CHECKPOINT_LOST");
    let told = cluster.effects.iter().any(|effect| matches!(effect, Effect::DropCheckpoints { goes_on: true, .. }));
    assert!(told, "and not what is stored from now on");
    let anew = cluster.tasks();
    assert_eq!((anew.len(), stage(&anew, "denoise").1.resume_step), (3, 0));
    assert_eq!(cluster.job(&job).attempt, 3);
}

#[test]
fn a_store_that_is_away_or_full_puts_a_job_off_and_fails_none() {
    let (mut cluster, job, tasks) = denoising();
    finish_stored(&mut cluster, stage(&tasks, "denoise"));
    let mut decode = stage(&tasks, "decode").clone();
    for time in 0..MAX_POSTPONES {
        cluster.start(&decode);
        cluster.fail(&decode, if time % 2 == 0 { "STORE_UNAVAILABLE" } else { "OVERLOADED" });
        let waiting = cluster.job(&job);
        assert_eq!((waiting.state(), cluster.records[&job].losses), (JobState::Queued, 0), "nobody was lost");
        let pause = (1000 << time.min(16)).min(60_000);
        cluster.tick(pause - 1);
        assert!(cluster.tasks().is_empty(), "not before {pause} ms");
        cluster.tick(1);
        decode = stage(&cluster.tasks(), "decode").clone();
    }
    let other = new_job(&mut cluster);
    cluster.fail(&decode, "STORE_UNAVAILABLE");
    let failure = cluster.job(&job).failure.unwrap();
    assert_eq!((failure.reason.as_str(), failure.stage.as_str()), ("STORE_UNAVAILABLE", "decode"), "nor for ever");
    assert!(failure.message.contains("put off 30 times") && failure.message.contains("because"), "{}", failure.message);
    finish_all(&mut cluster);
    assert_eq!(cluster.job(&other).state(), JobState::Succeeded);
}

#[test]
fn a_job_that_is_put_off_can_be_cancelled_and_is_no_place_in_anybodys_way() {
    let (mut cluster, job, tasks) = denoising();
    cluster.fail(stage(&tasks, "denoise"), "STORE_UNAVAILABLE");
    let next = new_job(&mut cluster);
    assert!(cluster.tasks().iter().all(|(_, task)| reference(task).job_id == next));
    assert_eq!(cluster.cancel(&job).state(), JobState::Cancelled);
    cluster.tick(1000);
    assert!(cluster.tasks().is_empty());
    assert_eq!(cluster.state.queue.len(), 0);
}

#[test]
fn a_group_whose_output_is_not_taken_is_not_stuck() {
    let (mut cluster, job, tasks) = denoising();
    let denoise = stage(&tasks, "denoise");
    for _ in 0..10 {
        cluster.tick(4000);
        cluster.report(&denoise.0, Report::TaskComputed(TaskComputed { task: denoise.1.task.clone() }));
    }
    cluster.tick(60_000);
    assert_eq!(cluster.job(&job).attempt, 1);
    finish_stored(&mut cluster, denoise);
    cluster.start(stage(&tasks, "decode"));
    cluster.finish(stage(&tasks, "decode"));
    assert_eq!(cluster.job(&job).state(), JobState::Succeeded);
}

#[test]
fn an_answer_never_comes_before_the_record_it_tells_of() {
    let mut cluster = Cluster::ready();
    let submission = cluster.submission();
    let effects = cluster.state.apply(2000, Event::Submit(Box::new(submission)));
    let place = |wanted: fn(&Effect) -> bool| effects.iter().position(wanted).unwrap();
    let written = place(|effect| matches!(effect, Effect::Persist(_)));
    assert!(written < place(|effect| matches!(effect, Effect::Answer(_))));
    assert!(written < place(|effect| matches!(effect, Effect::Send { .. })));
}

#[test]
fn no_worker_is_asked_to_join_before_the_epoch_is_written_down() {
    let mut cluster = Cluster::new();
    cluster.join("w1");
    let outcome = Some(Outcome::Card(testing::card("emoji")));
    let report = Report::ModelDescribed(proto::v1::ModelDescribed { model: "emoji".into(), outcome });
    let effects = cluster.state.apply(2000, Event::Report { worker_id: "w1".into(), report });
    let mut written = BTreeMap::new();
    let mut joins = 0;
    for effect in effects {
        match effect {
            Effect::PersistGroup(record) => drop(written.insert(record.group_id, record.epoch)),
            Effect::Send { command: Command::JoinGroup(join), .. } => {
                assert_eq!(written.get(&join.group_id), Some(&join.epoch));
                joins += 1;
            }
            _ => {}
        }
    }
    assert!(joins > 0);
}

/// What the checkpoint store has of `job`: stages with the step of a state, or 0 for an output.
pub(super) fn saved(job: &str, steps: &[(&str, u32)]) -> SavedSteps {
    let saved = |(stage, step): &(&str, u32)| Saved { stage: (*stage).to_owned(), step: *step, products: Products::F32 };
    SavedSteps::from([(job.to_owned(), steps.iter().map(saved).collect())])
}

/// What each worker of `cluster` would say it holds: all ranks ready, and the given tasks.
pub(super) fn holdings(cluster: &Cluster, tasks: &[(String, RunTask, bool)]) -> BTreeMap<String, Holding> {
    let mut holdings: BTreeMap<String, Holding> = BTreeMap::new();
    for (id, group) in cluster.state.groups.iter() {
        for (rank, member) in (0..).zip(&group.members) {
            let join = JoinGroup {
                group_id: id.clone(),
                epoch: group.epoch,
                path: "/models/emoji".into(),
                component: group.wanted.component.clone(),
                layout: Some(group.wanted.layout),
                products: group.wanted.products.into(),
                rank,
                ..JoinGroup::default()
            };
            holdings.entry(member.clone()).or_default().ranks.push(HeldRank { join: Some(join), ready: true });
        }
    }
    for (worker, task, started) in tasks {
        let held = HeldTask { task: task.task.clone(), started: *started, step: 3, steps: 4, saved_step: 2, stopping: false };
        holdings.entry(worker.clone()).or_default().tasks.push(held);
    }
    holdings
}

#[test]
fn what_runs_goes_on_under_a_new_coordinator() {
    let (mut cluster, job, tasks) = denoising();
    let seen = cluster.job(&job).sequence;
    let (denoise, decode) = (stage(&tasks, "denoise").clone(), stage(&tasks, "decode").clone());
    let held = [(denoise.0.clone(), denoise.1.clone(), true), (decode.0.clone(), decode.1.clone(), false)];
    let mut holdings = holdings(&cluster, &held);
    let epoch = cluster.epoch("emoji/transformer/0");
    cluster.restart(saved(&job, &[("encode_text", 0), ("denoise", 2)]));
    for worker in ["w1", "w2", "w3"] {
        cluster.join_holding(worker, holdings.remove(worker).unwrap_or_default());
    }
    cluster.describe("w1");
    finish_stored(&mut cluster, &denoise);
    assert!(cluster.joins().is_empty(), "nothing is formed while workers come back");
    cluster.tick(SETTLE);
    assert_eq!(cluster.epoch("emoji/transformer/0"), epoch, "the group goes on");
    assert!(cluster.joins().is_empty() && cluster.tasks().is_empty() && cluster.cancels().is_empty());
    cluster.start(&decode);
    cluster.finish(&decode);
    let done = cluster.job(&job);
    assert_eq!((done.state(), done.attempt), (JobState::Succeeded, 1));
    let events = cluster.state.events_after(&job, seen).unwrap().events;
    assert!(events.len() >= 3 && events.iter().all(|event| event.sequence >= 2 << 20), "all of it is new to a watcher");
}

#[test]
fn after_an_epoch_that_was_taken_over_comes_none_that_an_earlier_coordinator_may_have_begun() {
    let (mut cluster, _, tasks) = denoising();
    let leader = stage(&tasks, "denoise").0.clone();
    let mut holdings = holdings(&cluster, &[]);
    let before = cluster.epoch("emoji/transformer/0");
    cluster.restart(SavedSteps::new());
    for worker in ["w1", "w2", "w3"] {
        cluster.join_holding(worker, holdings.remove(worker).unwrap_or_default());
    }
    cluster.describe("w1");
    cluster.tick(SETTLE);
    assert_eq!(cluster.epoch("emoji/transformer/0"), before, "taken over");
    cluster.leave(&leader);
    cluster.tick(REFORM_PAUSE);
    assert!(cluster.epoch("emoji/transformer/0") >= cluster.state.settings.first_epoch);
}

#[test]
fn a_whole_group_does_not_go_on_if_a_newer_epoch_of_it_was_begun() {
    let (mut cluster, _, tasks) = denoising();
    let leader = stage(&tasks, "denoise").0.clone();
    // As they were before the leader was taken for lost, which only its coordinator knew of.
    let mut holdings = holdings(&cluster, &[]);
    let before = cluster.epoch("emoji/transformer/0");
    cluster.leave(&leader);
    cluster.tick(REFORM_PAUSE);
    let newer = cluster.epoch("emoji/transformer/0");
    assert!(newer > before, "{newer}");
    cluster.restart(SavedSteps::new());
    // Its clock was set back.
    cluster.state.settings.first_epoch = 1;
    for worker in ["w1", "w2", "w3"] {
        cluster.join_holding(worker, holdings.remove(worker).unwrap_or_default());
    }
    cluster.describe("w1");
    cluster.tick(SETTLE);
    assert!(cluster.epoch("emoji/transformer/0") > newer);
    let told = cluster.sent.iter().any(|(worker, command)| {
        matches!(command, Command::LeaveGroup(leave) if leave.group_id == "emoji/transformer/0" && leave.epoch == before)
            && *worker == leader
    });
    assert!(told, "its ranks are told to leave");
}

#[test]
fn a_job_whose_worker_did_not_come_back_begins_a_new_try_from_its_checkpoint() {
    let (mut cluster, job, tasks) = denoising();
    let leader = stage(&tasks, "denoise").0.clone();
    let decode = stage(&tasks, "decode").clone();
    let mut holdings = holdings(&cluster, &[(decode.0.clone(), decode.1, false)]);
    cluster.restart(saved(&job, &[("encode_text", 0), ("denoise", 2)]));
    let others: Vec<&str> = ["w1", "w2", "w3"].into_iter().filter(|worker| *worker != leader).collect();
    for worker in &others {
        cluster.join_holding(worker, holdings.remove(*worker).unwrap_or_default());
    }
    cluster.describe(others[0]);
    cluster.tick(SETTLE);
    let waiting = cluster.job(&job);
    assert_eq!((waiting.state(), waiting.attempt), (JobState::Queued, 2));
    assert!(cluster.sent.iter().any(|(_, c)| matches!(c, Command::LeaveGroup(l) if l.group_id == "emoji/transformer/0")));
    cluster.all_ready();
    let again = cluster.tasks();
    assert_eq!((again.len(), stage(&again, "denoise").1.resume_step), (2, 2));
}

#[test]
fn a_worker_that_comes_back_late_gives_up_what_has_begun_anew() {
    let (mut cluster, _, tasks) = denoising();
    let denoise = stage(&tasks, "denoise").clone();
    let holding = holdings(&cluster, &[(denoise.0.clone(), denoise.1, true)]).remove(&denoise.0).unwrap();
    cluster.leave(&denoise.0);
    cluster.sent.clear();
    cluster.join_holding(&denoise.0, holding);
    let told: Vec<_> = cluster.sent.iter().filter(|(worker, _)| *worker == denoise.0).map(|(_, command)| command).collect();
    assert!(told.iter().any(|command| matches!(command, Command::LeaveGroup(_))), "{told:?}");
    assert!(told.iter().any(|command| matches!(command, Command::CancelTask(_))), "{told:?}");
}

#[test]
fn a_job_that_the_store_cannot_hold_is_refused_before_it_is_accepted() {
    let mut cluster = Cluster::ready();
    cluster.state.settings.max_record_bytes = Some(6000);
    let mut submission = cluster.submission();
    submission.spec.prompt = "p".repeat(6000);
    assert!(matches!(cluster.submit(submission), Err(Error::InvalidRequest(violations)) if violations[0].field == "spec"));
    assert!(cluster.records.is_empty());
}

#[test]
fn a_finished_job_is_found_again_by_its_request() {
    let mut cluster = Cluster::ready();
    let submission = cluster.submission();
    let first = cluster.submit(submission.clone()).unwrap();
    finish_all(&mut cluster);
    let done = cluster.job(&first.id);
    cluster.restart(SavedSteps::new());
    assert_eq!(cluster.submit(submission).unwrap(), done);
}
