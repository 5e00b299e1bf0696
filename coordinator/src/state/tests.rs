//! The machine, played by hand: every test is a short story of events.

use std::{collections::BTreeMap, path::PathBuf};

use proto::v1::{
    CancelTask, ForgetJob, GroupLost, GroupReady, GroupState, ImageResult, Job, JobState, JoinGroup, ModelDescribed, Products,
    RunTask, TaskDone, TaskFailed, TaskProgress, TaskRef, TaskStarted, job_event::Kind, model_described::Outcome,
};

use super::*;
use crate::{error::Error, models_file::ComponentConfig, testing};

/// A state, its clock, and the commands it sent.
pub(super) struct Cluster {
    pub(super) state: State,
    pub(super) now: Millis,
    pub(super) sent: Vec<(String, Command)>,
    pub(super) effects: Vec<Effect>,
    /// What a store would have, by job.
    pub(super) records: BTreeMap<String, JobRecord>,
    /// And by group.
    pub(super) epochs: BTreeMap<String, GroupRecord>,
    jobs: u32,
}

impl Cluster {
    /// One model whose transformer has two ranks on different workers.
    pub(super) fn new() -> Self {
        Self::with(|_| {}, Limits::default())
    }

    pub(super) fn with(change: impl FnOnce(&mut ModelConfig), limits: Limits) -> Self {
        let transformer = ComponentConfig { tp: 2, ..ComponentConfig::default() };
        let mut model = ModelConfig {
            name: "emoji".into(),
            path: PathBuf::from("/models/emoji"),
            refiner: None,
            max_batch: 4,
            max_jobs: 2,
            products: Products::F32,
            components: BTreeMap::from([("transformer".to_owned(), transformer)]),
            adapters: vec![],
            controls: vec![],
        };
        change(&mut model);
        let settings = Settings {
            models: vec![model],
            limits,
            blob_address: "coordinator:7700".into(),
            key: Key([7; 32]),
            max_record_bytes: None,
            term: 1,
            first_epoch: 1,
        };
        Self {
            state: State::new(settings),
            now: 1000,
            sent: vec![],
            effects: vec![],
            records: BTreeMap::new(),
            epochs: BTreeMap::new(),
            jobs: 0,
        }
    }

    /// Another coordinator leads: it knows what the store has, and no worker has come back yet.
    pub(super) fn restart(&mut self, saved: SavedSteps) {
        let mut settings = self.state.settings.clone();
        settings.term += 1;
        settings.first_epoch += 1_000_000;
        self.state = State::new(settings);
        self.sent.clear();
        self.state.recover(self.now, self.records.values().cloned().collect(), self.epochs.values().cloned().collect(), saved);
    }

    /// The same with two workers there, the card known, and every group ready.
    pub(super) fn ready() -> Self {
        Self::new().made_ready()
    }

    /// With two workers and whole groups.
    pub(super) fn made_ready(self) -> Self {
        let mut cluster = self;
        cluster.join("w1");
        cluster.join("w2");
        cluster.describe("w1");
        cluster.all_ready();
        cluster
    }

    pub(super) fn apply(&mut self, event: Event) -> Option<Result<Job>> {
        let mut answer = None;
        for effect in self.state.apply(self.now, event) {
            match effect {
                Effect::Send { worker_id, command } => self.sent.push((worker_id, command)),
                Effect::Answer(given) => answer = Some(given),
                Effect::Persist(record) => drop(self.records.insert(record.id.clone(), *record)),
                Effect::PersistGroup(record) => drop(self.epochs.insert(record.group_id.clone(), record)),
                Effect::Forget { job_id } => drop(self.records.remove(&job_id)),
                other => self.effects.push(other),
            }
        }
        answer
    }

    pub(super) fn join(&mut self, worker: &str) {
        self.join_holding(worker, Holding::default());
    }

    pub(super) fn join_holding(&mut self, worker: &str, holding: Holding) {
        self.apply(Event::WorkerJoined { worker: testing::worker(worker, "any"), holding });
    }

    pub(super) fn leave(&mut self, worker: &str) {
        self.apply(Event::WorkerLeft { worker_id: worker.into(), cause: "connection closed".into() });
    }

    pub(super) fn report(&mut self, worker: &str, report: Report) {
        self.apply(Event::Report { worker_id: worker.into(), report });
    }

    pub(super) fn describe(&mut self, worker: &str) {
        let outcome = Some(Outcome::Card(testing::card("emoji")));
        self.report(worker, Report::ModelDescribed(ModelDescribed { model: "emoji".into(), outcome }));
    }

    /// Every rank that was asked to join says that it is ready.
    pub(super) fn all_ready(&mut self) {
        for (worker, join) in self.joins() {
            let JoinGroup { group_id, epoch, rank, .. } = join;
            self.report(&worker, Report::GroupReady(GroupReady { group_id, epoch, rank }));
        }
    }

    pub(super) fn tick(&mut self, millis: Millis) {
        self.now += millis;
        self.apply(Event::Tick);
    }

    pub(super) fn submission(&mut self) -> Submission {
        self.jobs += 1;
        Submission {
            job_id: format!("job{}", self.jobs),
            request_id: format!("00000000-0000-4000-8000-{:012}", self.jobs),
            tenant: String::new(),
            spec: testing::spec("emoji"),
            seed: 42,
            missing_blobs: vec![],
            blob_bytes: 0,
            priority: 0,
            timeout: None,
            trace: None,
        }
    }

    pub(super) fn submit(&mut self, submission: Submission) -> Result<Job> {
        self.apply(Event::Submit(Box::new(submission))).expect("every submission is answered")
    }

    pub(super) fn new_job(&mut self) -> String {
        let submission = self.submission();
        self.submit(submission).unwrap().id
    }

    pub(super) fn cancel(&mut self, job: &str) -> Job {
        self.apply(Event::Cancel { job_id: job.into() }).expect("every cancel is answered").unwrap()
    }

    /// Takes out the commands of one kind that were sent since the last time.
    fn take<T>(&mut self, kind: impl Fn(&Command) -> Option<T>) -> Vec<(String, T)> {
        let mut taken = vec![];
        self.sent.retain(|(worker, command)| match kind(command) {
            Some(command) => {
                taken.push((worker.clone(), command));
                false
            }
            None => true,
        });
        taken
    }

    pub(super) fn joins(&mut self) -> Vec<(String, JoinGroup)> {
        self.take(|command| if let Command::JoinGroup(join) = command { Some(join.clone()) } else { None })
    }

    pub(super) fn tasks(&mut self) -> Vec<(String, RunTask)> {
        self.take(|command| if let Command::RunTask(task) = command { Some(task.clone()) } else { None })
    }

    pub(super) fn cancels(&mut self) -> Vec<(String, CancelTask)> {
        self.take(|command| if let Command::CancelTask(task) = command { Some(task.clone()) } else { None })
    }

    pub(super) fn forgets(&mut self) -> Vec<(String, ForgetJob)> {
        self.take(|command| if let Command::ForgetJob(job) = command { Some(job.clone()) } else { None })
    }

    pub(super) fn job(&self, id: &str) -> Job {
        self.state.job(id).unwrap()
    }

    pub(super) fn epoch(&self, group: &str) -> u64 {
        self.state.groups[group].epoch
    }

    pub(super) fn start(&mut self, (worker, task): &(String, RunTask)) {
        self.report(worker, Report::TaskStarted(TaskStarted { task: task.task.clone() }));
    }

    pub(super) fn finish(&mut self, (worker, task): &(String, RunTask)) {
        let images = if task.outputs.is_empty() { vec![image()] } else { vec![] };
        self.report(worker, Report::TaskDone(TaskDone { task: task.task.clone(), seconds: 0.5, images, stored: false }));
    }

    pub(super) fn fail(&mut self, (worker, task): &(String, RunTask), reason: &str) {
        let (reason, message) = (reason.to_owned(), "because".to_owned());
        let failed = TaskFailed { task: task.task.clone(), reason, message, step: 1 };
        self.report(worker, Report::TaskFailed(failed));
    }
}

pub(super) fn image() -> ImageResult {
    ImageResult { blob_id: "b".repeat(64), sha256: "b".repeat(64), byte_size: 10, ..ImageResult::default() }
}

pub(super) fn reference(task: &RunTask) -> &TaskRef {
    task.task.as_ref().unwrap()
}

pub(super) fn stage<'a>(tasks: &'a [(String, RunTask)], id: &str) -> &'a (String, RunTask) {
    tasks.iter().find(|(_, task)| reference(task).stage == id).unwrap()
}

#[test]
fn a_job_runs_from_acceptance_to_its_picture() {
    let mut cluster = Cluster::ready();
    let job = cluster.new_job();
    let tasks = cluster.tasks();
    let stages: Vec<_> = tasks.iter().map(|(_, task)| reference(task).stage.as_str()).collect();
    assert_eq!(stages, ["decode", "denoise", "encode_text"], "downstream first");
    for task in tasks.iter().rev() {
        cluster.start(task);
        let progress = TaskProgress { task: task.1.task.clone(), step: 1, steps: 1, saved_step: 0 };
        cluster.report(&task.0, Report::TaskProgress(progress));
        cluster.finish(task);
    }
    let done = cluster.job(&job);
    assert_eq!((done.state(), done.images.len()), (JobState::Succeeded, 1));
    let events = cluster.state.events_after(&job, 0).unwrap();
    assert!(events.over);
    let sequences: Vec<u64> = events.events.iter().map(|event| event.sequence).collect();
    assert_eq!(sequences, (1..=12).collect::<Vec<_>>(), "queued, running, three of each stage, succeeded");
    assert_eq!(cluster.forgets().len(), 2, "each leader forgets it once");
    assert!(cluster.state.groups.values().all(|group| group.tasks.is_empty()));
}

#[test]
fn tasks_are_wired_to_the_leaders_of_the_next_stage() {
    let mut cluster = Cluster::ready();
    cluster.new_job();
    let tasks = cluster.tasks();
    let (_, encode) = stage(&tasks, "encode_text");
    let (leader, denoise) = stage(&tasks, "denoise");
    assert_eq!(encode.outputs[0].task, denoise.task);
    assert_eq!(encode.outputs[0].address, format!("{leader}:1"));
    assert_eq!(denoise.inputs, ["encode_text"]);
    assert_eq!(denoise.layout, "text_encoder=tp1x1,transformer=tp2x1,vae=tp1x1");
    assert_eq!(denoise.spec.as_ref().unwrap().seed, Some(42));
    assert!(stage(&tasks, "decode").1.outputs.is_empty());
}

#[test]
fn ranks_join_with_addresses_in_rank_order_and_a_secret_of_their_own() {
    let mut cluster = Cluster::new();
    cluster.join("w1");
    cluster.join("w2");
    cluster.describe("w1");
    let joins = cluster.joins();
    let transformer: Vec<_> = joins.iter().filter(|(_, join)| join.component == "transformer").collect();
    assert_eq!(transformer.iter().map(|(_, join)| join.rank).collect::<Vec<_>>(), [0, 1]);
    for (worker, join) in &transformer {
        assert_eq!(join.data_addresses[join.rank as usize], format!("{worker}:2"));
        assert_eq!(join.secret, transformer[0].1.secret);
    }
    let other = joins.iter().find(|(_, join)| join.component == "vae").unwrap();
    assert_ne!(other.1.secret, transformer[0].1.secret);
}

#[test]
fn a_lost_workers_jobs_wait_again_and_its_groups_form_in_the_next_epoch() {
    let mut cluster = Cluster::ready();
    cluster.join("w3");
    let job = cluster.new_job();
    let tasks = cluster.tasks();
    cluster.start(stage(&tasks, "encode_text"));
    let old = cluster.epoch("emoji/transformer/0");
    cluster.leave("w2");

    let waiting = cluster.job(&job);
    assert_eq!((waiting.state(), waiting.attempt), (JobState::Queued, 2));
    let events = cluster.state.events_after(&job, 0).unwrap().events;
    let Some(Kind::Requeued(again)) = &events[events.len() - 2].kind else { panic!("{events:?}") };
    assert_eq!((again.reason.as_str(), again.attempt), ("GROUP_LOST", 2));
    assert!(again.message.contains("emoji/transformer/0"), "{}", again.message);
    assert!(again.message.contains("worker w2 left: connection closed"), "{}", again.message);
    assert!(!cluster.cancels().is_empty(), "the other tasks of the job are stopped");
    let joins = cluster.joins();
    let members: Vec<_> = joins
        .iter()
        .filter(|(_, join)| join.group_id == "emoji/transformer/0" && join.epoch == old + 1)
        .map(|(worker, _)| worker.as_str())
        .collect();
    assert!(!members.contains(&"w2") && members.len() == 2, "{members:?}");
}

#[test]
fn a_group_without_workers_enough_waits_for_a_new_one() {
    let mut cluster = Cluster::ready();
    cluster.leave("w2");
    assert!(cluster.state.models()[0].problem.contains("needs 2 workers that can multiply in f32, 1 are free"));
    cluster.join("w2-restarted");
    cluster.all_ready();
    assert!(cluster.state.models()[0].ready);
    assert_eq!(cluster.state.models()[0].problem, "");
}

#[test]
fn reports_of_an_old_epoch_change_nothing() {
    let mut cluster = Cluster::ready();
    let group_id = "emoji/transformer/0".to_owned();
    let epoch = cluster.epoch(&group_id);
    cluster.report("w2", Report::GroupLost(lost(&group_id, epoch - 1, "PEER_LOST")));
    cluster.report("w2", Report::GroupReady(GroupReady { group_id: group_id.clone(), epoch: epoch + 1, rank: 0 }));
    cluster.report("w1", Report::GroupLost(lost(&group_id, epoch, "PEER_LOST")));
    assert!(cluster.state.groups[group_id.as_str()].is_ready(), "rank 0 is on w2, not on w1");
    assert_eq!(cluster.state.stale_reports(), 3);
}

pub(super) fn lost(group_id: &str, epoch: u64, reason: &str) -> GroupLost {
    GroupLost { group_id: group_id.into(), epoch, rank: 0, reason: reason.into(), message: "no such file".into() }
}

#[test]
fn reports_of_another_attempt_epoch_group_or_worker_change_nothing() {
    let mut cluster = Cluster::ready();
    let job = cluster.new_job();
    let tasks = cluster.tasks();
    let (worker, decode) = stage(&tasks, "decode").clone();
    let changes: [fn(&mut TaskRef); 3] =
        [|task| task.attempt = 2, |task| task.epoch += 1, |task| task.group_id = "emoji/transformer/0".into()];
    for change in changes {
        let mut other = decode.clone();
        change(other.task.as_mut().unwrap());
        cluster.finish(&(worker.clone(), other));
    }
    cluster.finish(&("w9".to_owned(), decode));
    assert_eq!(cluster.job(&job).state(), JobState::Queued);
    assert_eq!(cluster.state.stale_reports(), 4);
}

#[test]
fn a_group_that_cannot_load_is_tried_again_ever_later() {
    let mut cluster = Cluster::ready();
    let group_id = "emoji/vae/0";
    let leader = cluster.state.groups[group_id].members[0].clone();
    cluster.report(&leader, Report::GroupLost(lost(group_id, cluster.epoch(group_id), "INTERNAL")));
    cluster.tick(REFORM_PAUSE);
    for pause in [1000, 2000, 4000, 8000, 16_000, 30_000, 30_000] {
        let epoch = cluster.epoch(group_id);
        assert_eq!(cluster.state.groups[group_id].phase, GroupState::Loading);
        let leader = cluster.state.groups[group_id].members[0].clone();
        cluster.report(&leader, Report::GroupLost(lost(group_id, epoch, "LOAD_FAILED")));
        assert!(cluster.state.models()[0].problem.contains("LOAD_FAILED: no such file"));
        cluster.tick(pause - 1);
        assert_eq!(cluster.epoch(group_id), epoch, "not before {pause} ms");
        cluster.tick(1);
        assert_eq!(cluster.epoch(group_id), epoch + 1, "after {pause} ms");
    }
}

#[test]
fn a_worker_that_cannot_load_a_group_is_passed_over_while_there_are_others() {
    let mut cluster = Cluster::ready();
    let group_id = "emoji/transformer/0";
    cluster.join("w3");
    let members = |cluster: &Cluster| cluster.state.groups[group_id].members.clone();
    // The worker that holds a rank cannot load it.
    let cannot = |cluster: &mut Cluster, worker: &str, rank| {
        let lost = GroupLost { rank, ..lost(group_id, cluster.epoch(group_id), "LOAD_FAILED") };
        cluster.report(worker, Report::GroupLost(lost));
    };
    let first = members(&cluster);
    // A peer's word comes first, and says nothing of the cause.
    let epoch = cluster.epoch(group_id);
    cluster.report(&first[0], Report::GroupLost(lost(group_id, epoch, "PEER_LOST")));
    let stale = cluster.state.stale_reports();
    cannot(&mut cluster, &first[1], 1);
    assert_eq!(cluster.state.stale_reports(), stale);
    assert!(cluster.state.models()[0].problem.contains(&format!("rank 1 on worker {}: LOAD_FAILED", first[1])));
    cannot(&mut cluster, &first[0], 1);
    assert_eq!(cluster.state.stale_reports(), stale + 1, "it was another worker's rank");

    cluster.tick(LAST_RETRY);
    let second = members(&cluster);
    assert!(second.len() == 2 && !second.contains(&first[1]), "{second:?} after {first:?}");
    // Nobody else is left: all are asked once more, and one that cannot is passed over again.
    cannot(&mut cluster, &second[0], 0);
    cluster.tick(LAST_RETRY);
    let third = members(&cluster);
    assert_eq!(third.len(), 2);
    cannot(&mut cluster, &third[0], 0);
    cluster.tick(LAST_RETRY);
    assert!(!members(&cluster).contains(&third[0]));
    cluster.all_ready();
    assert!(cluster.state.groups[group_id].passed_over().is_empty(), "a group that was ready begins with all");
}

#[test]
fn a_queued_job_is_cancelled_at_once() {
    let mut cluster = Cluster::new();
    cluster.join("w1");
    cluster.describe("w1");
    let job = cluster.new_job();
    assert_eq!(cluster.cancel(&job).state(), JobState::Cancelled);
    assert!(cluster.state.queue.len() == 0);
    assert_eq!(cluster.cancel(&job).state(), JobState::Cancelled, "twice is once");
}

#[test]
fn a_running_job_is_cancelled_when_its_running_task_has_stopped() {
    let mut cluster = Cluster::ready();
    let job = cluster.new_job();
    let tasks = cluster.tasks();
    cluster.start(stage(&tasks, "encode_text"));
    cluster.finish(stage(&tasks, "encode_text"));
    cluster.start(stage(&tasks, "denoise"));
    assert_eq!(cluster.cancel(&job).state(), JobState::Running);
    let told: Vec<_> = cluster.cancels().into_iter().map(|(_, cancel)| cancel.task.unwrap().stage).collect();
    assert_eq!(told, ["decode", "denoise"]);
    cluster.fail(stage(&tasks, "decode"), "CANCELLED");
    assert_eq!(cluster.job(&job).state(), JobState::Running, "denoise still runs");
    cluster.fail(stage(&tasks, "denoise"), "CANCELLED");
    assert_eq!(cluster.job(&job).state(), JobState::Cancelled);
    assert!(cluster.job(&job).failure.is_none());
}

#[test]
fn a_cancelled_job_does_not_wait_for_its_workers_for_ever() {
    let mut cluster = Cluster::ready();
    let job = cluster.new_job();
    let tasks = cluster.tasks();
    cluster.start(stage(&tasks, "encode_text"));
    cluster.cancel(&job);
    cluster.tick(CANCEL_DEADLINE - 1);
    assert_eq!(cluster.job(&job).state(), JobState::Running);
    cluster.tick(1);
    assert_eq!(cluster.job(&job).state(), JobState::Cancelled);
}

#[test]
fn cancelling_a_finished_job_leaves_it_as_it_is() {
    let mut cluster = Cluster::ready();
    let job = cluster.new_job();
    for task in cluster.tasks().iter().rev() {
        cluster.finish(task);
    }
    assert_eq!(cluster.cancel(&job).state(), JobState::Succeeded);
}

#[test]
fn a_failed_task_fails_the_job_with_its_reason_and_stops_the_others() {
    let mut cluster = Cluster::ready();
    let job = cluster.new_job();
    let tasks = cluster.tasks();
    cluster.start(stage(&tasks, "encode_text"));
    cluster.fail(stage(&tasks, "encode_text"), "INVALID_IMAGE");
    let failure = cluster.job(&job).failure.unwrap();
    assert_eq!((failure.reason.as_str(), failure.stage.as_str()), ("INVALID_IMAGE", "encode_text"));
    assert_eq!(cluster.cancels().len(), 2);
    cluster.finish(stage(&tasks, "decode"));
    assert_eq!(cluster.job(&job).state(), JobState::Failed, "a late result changes nothing");
}

#[test]
fn reports_that_overtake_each_other_on_two_streams_end_the_job_once_and_whole() {
    let mut cluster = Cluster::ready();
    let job = cluster.new_job();
    let tasks = cluster.tasks();
    cluster.finish(stage(&tasks, "encode_text"));
    cluster.finish(stage(&tasks, "decode"));
    assert_eq!(cluster.job(&job).state(), JobState::Running, "denoise has not reported yet");
    cluster.finish(stage(&tasks, "denoise"));
    assert_eq!(cluster.job(&job).state(), JobState::Succeeded);
}

#[test]
fn a_picture_that_is_there_is_not_lost_with_a_late_report() {
    let mut cluster = Cluster::ready();
    let job = cluster.new_job();
    let tasks = cluster.tasks();
    cluster.finish(stage(&tasks, "decode"));
    cluster.tick(LATE_REPORT_DEADLINE);
    assert_eq!(cluster.job(&job).state(), JobState::Succeeded);
}

#[test]
fn the_same_request_is_the_same_job_and_another_body_is_refused() {
    let mut cluster = Cluster::ready();
    let submission = cluster.submission();
    let first = cluster.submit(submission.clone()).unwrap();
    let again = cluster.submit(Submission { job_id: "other".into(), seed: 43, ..submission.clone() }).unwrap();
    assert_eq!(again.id, first.id);
    let mut changed = submission;
    changed.spec.prompt = "a blue car".into();
    assert!(matches!(cluster.submit(changed), Err(Error::RequestIdReused(_))));
}

#[test]
fn the_queue_is_bounded() {
    let mut cluster = Cluster::with(|_| {}, Limits { queued_jobs: 2, ..Limits::default() });
    cluster.join("w1");
    cluster.describe("w1");
    cluster.new_job();
    cluster.new_job();
    let third = cluster.submission();
    assert!(matches!(cluster.submit(third), Err(Error::QueueFull(2))));
}

#[test]
fn a_group_takes_no_more_jobs_than_its_engine_holds() {
    let mut cluster = Cluster::ready();
    let jobs = [cluster.new_job(), cluster.new_job(), cluster.new_job()];
    let tasks = cluster.tasks();
    assert_eq!(tasks.len(), 6, "max_jobs is 2");
    cluster.finish(stage(&tasks, "denoise"));
    let next = cluster.tasks();
    assert_eq!(reference(&next[0].1).job_id, jobs[2], "room in the engine, though the first job still decodes");
}

#[test]
fn a_job_for_a_model_that_is_not_known_yet_is_turned_away() {
    let mut cluster = Cluster::new();
    let early = cluster.submission();
    assert!(matches!(cluster.submit(early.clone()), Err(Error::ModelNotReady(_))));
    let mut unknown = early;
    unknown.spec.model = "other".into();
    assert!(matches!(cluster.submit(unknown), Err(Error::ModelNotFound(_))));
}

#[test]
fn a_model_that_one_worker_cannot_read_is_asked_of_another() {
    let mut cluster = Cluster::new();
    cluster.join("w1");
    let outcome = Some(Outcome::Error("no such directory".into()));
    cluster.report("w1", Report::ModelDescribed(ModelDescribed { model: "emoji".into(), outcome }));
    let refused = cluster.submission();
    assert!(matches!(cluster.submit(refused), Err(Error::ModelBroken { .. })));
    assert_eq!(cluster.state.models()[0].problem, "worker w1: no such directory");
    cluster.join("w2");
    cluster.describe("w2");
    cluster.all_ready();
    assert!(cluster.state.models()[0].ready);
}

#[test]
fn a_worker_that_leaves_while_it_reads_a_model_is_replaced() {
    let mut cluster = Cluster::new();
    cluster.join("w1");
    cluster.join("w2");
    cluster.sent.clear();
    cluster.leave("w1");
    assert!(matches!(&cluster.sent[..], [(worker, Command::DescribeModel(_))] if worker == "w2"));
}

#[test]
fn a_cut_that_does_not_fit_the_card_is_the_models_problem() {
    let wrong = ComponentConfig { tp: 2, ..ComponentConfig::default() };
    let change = |model: &mut ModelConfig| {
        model.components.insert("vae".into(), wrong);
    };
    let mut cluster = Cluster::with(change, Limits::default());
    cluster.join("w1");
    cluster.describe("w1");
    let expected = "model \"emoji\": components.vae.tp = 2: must be one of 1";
    assert_eq!(cluster.state.models()[0].problem, expected);
    let job = cluster.submission();
    assert!(matches!(cluster.submit(job), Err(Error::ModelBroken { .. })));
}

#[test]
fn finished_jobs_are_forgotten_at_their_age_with_their_pictures() {
    let limits = Limits { finished_job_age: 60_000, ..Limits::default() };
    let mut cluster = Cluster::with(|_| {}, limits).made_ready();
    let job = cluster.new_job();
    for task in cluster.tasks().iter().rev() {
        cluster.finish(task);
    }
    assert!(cluster.state.blobs_in_use().contains(&"b".repeat(64)));
    cluster.tick(60_000 - 1);
    assert!(cluster.state.job(&job).is_ok());
    cluster.tick(1);
    assert!(matches!(cluster.state.job(&job), Err(Error::JobNotFound(_))));
    assert!(cluster.state.blobs_in_use().is_empty());
}

#[test]
fn only_so_many_finished_jobs_are_kept_the_newest() {
    let limits = Limits { finished_jobs: 2, ..Limits::default() };
    let mut cluster = Cluster::with(|_| {}, limits).made_ready();
    let jobs: Vec<String> = (0..3)
        .map(|_| {
            let job = cluster.new_job();
            for task in cluster.tasks().iter().rev() {
                cluster.finish(task);
            }
            job
        })
        .collect();
    assert!(matches!(cluster.state.job(&jobs[0]), Err(Error::JobNotFound(_))));
    assert!(jobs[1..].iter().all(|job| cluster.state.job(job).is_ok()));
}

#[test]
fn readiness_is_announced_once_each_way() {
    let mut cluster = Cluster::ready();
    cluster.new_job();
    cluster.leave("w1");
    let said: Vec<bool> = cluster
        .effects
        .iter()
        .filter_map(|effect| if let Effect::ModelReady { ready, .. } = effect { Some(*ready) } else { None })
        .collect();
    assert_eq!(said, [true, false]);
}

#[test]
fn pages_of_jobs_are_newest_first_and_complete() {
    let mut cluster = Cluster::ready();
    let jobs: Vec<String> = (0..5).map(|_| cluster.new_job()).collect();
    let (mut seen, mut token) = (vec![], String::new());
    loop {
        let (page, next) = cluster.state.jobs("", 2, &token).unwrap();
        seen.extend(page.into_iter().map(|job| job.id));
        if next.is_empty() {
            break;
        }
        token = next;
    }
    assert_eq!(seen, jobs.into_iter().rev().collect::<Vec<_>>());
}

#[test]
fn a_page_of_long_prompts_fits_one_message() {
    let mut cluster = Cluster::ready();
    for _ in 0..20 {
        let mut submission = cluster.submission();
        submission.spec.prompt = "馬".repeat(32_000);
        cluster.submit(submission).unwrap();
    }
    let (page, next) = cluster.state.jobs("", 1000, "").unwrap();
    let bytes: usize = page.iter().map(prost::Message::encoded_len).sum();
    assert!(bytes < proto::MAX_MESSAGE_BYTES && !page.is_empty() && !next.is_empty());
}

#[test]
fn a_watcher_that_resumes_at_any_event_misses_none_and_sees_none_twice() {
    let mut cluster = Cluster::ready();
    let job = cluster.new_job();
    let tasks = cluster.tasks();
    let mut seen = vec![];
    let mut read = |cluster: &Cluster| {
        let page = cluster.state.events_after(&job, seen.len() as u64).unwrap();
        seen.extend(page.events);
        page.over
    };
    for task in tasks.iter().rev() {
        cluster.start(task);
        assert!(!read(&cluster));
        cluster.finish(task);
    }
    assert!(read(&cluster));
    let whole = cluster.state.events_after(&job, 0).unwrap().events;
    assert_eq!(seen, whole);
    let last = whole.last().unwrap();
    assert!(matches!(&last.kind, Some(Kind::StateChanged(job)) if job.state() == JobState::Succeeded));
}

#[test]
fn a_repeated_registration_is_a_new_life_of_the_worker() {
    let mut cluster = Cluster::ready();
    let epoch = cluster.epoch("emoji/transformer/0");
    cluster.join("w1");
    assert_eq!(cluster.epoch("emoji/transformer/0"), epoch + 1);
}
