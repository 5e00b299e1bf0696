//! The machine under any order of events: what must hold whatever happens, and that all comes to an end.

use std::collections::{BTreeMap, BTreeSet};

use proptest::prelude::*;
use proto::v1::{Draining, GroupLost, GroupReady, JobState, TaskDone, TaskFailed, TaskParked, TaskRef, TaskStarted};

use super::{job::TaskPhase, tests::*, *};

const WORKERS: [&str; 4] = ["w1", "w2", "w3", "w4"];

/// Something a client, a worker or the network does.
#[derive(Debug, Clone)]
enum Act {
    Join(usize),
    Leave(usize),
    /// Its control stream breaks.
    Away(usize),
    /// It is back, with the ranks that it should have and without tasks, if it was away; all of it is ready or none.
    Back(usize, bool),
    Submit,
    Cancel(usize),
    Wait(Millis),
    Drain(usize),
    /// Another coordinator takes over, and the workers come back with nothing.
    Restart,
    /// A worker answers one of the commands that were ever sent, in time or far too late.
    Answer {
        command: usize,
        how: usize,
    },
}

fn any_act() -> impl Strategy<Value = Act> {
    prop_oneof![
        2 => (0..WORKERS.len()).prop_map(Act::Join),
        1 => (0..WORKERS.len()).prop_map(Act::Leave),
        1 => (0..WORKERS.len()).prop_map(Act::Away),
        2 => (0..WORKERS.len(), any::<bool>()).prop_map(|(worker, ready)| Act::Back(worker, ready)),
        3 => Just(Act::Submit),
        1 => (0..8usize).prop_map(Act::Cancel),
        1 => (1..40_000u64).prop_map(Act::Wait),
        1 => (0..WORKERS.len()).prop_map(Act::Drain),
        1 => Just(Act::Restart),
        20 => (0..400usize, 0..10usize).prop_map(|(command, how)| Act::Answer { command, how }),
    ]
}

/// A cluster, everything it was ever told, and what was seen of its jobs.
struct Chaos {
    cluster: Cluster,
    commands: Vec<(String, Command)>,
    jobs: Vec<String>,
    ends: BTreeMap<String, v1::Job>,
    epochs: BTreeMap<String, u64>,
}

impl Chaos {
    fn new() -> Self {
        let cluster = Cluster::new();
        Self { cluster, commands: vec![], jobs: vec![], ends: BTreeMap::new(), epochs: BTreeMap::new() }
    }

    fn act(&mut self, act: &Act) {
        match act {
            Act::Join(worker) => self.cluster.join(WORKERS[*worker]),
            Act::Leave(worker) => self.cluster.leave(WORKERS[*worker]),
            Act::Away(worker) => drop(self.cluster.apply(Event::WorkerAway { worker_id: WORKERS[*worker].into() })),
            Act::Back(worker, ready) => self.back(WORKERS[*worker], *ready),
            Act::Submit => {
                let mut submission = self.cluster.submission();
                submission.priority = self.jobs.len() as i32 % 3;
                self.jobs.extend(self.cluster.submit(submission).map(|job| job.id));
            }
            Act::Cancel(job) => {
                if let Some(job) = self.jobs.get(*job).cloned() {
                    self.cluster.cancel(&job);
                }
            }
            Act::Wait(millis) => self.cluster.tick(*millis),
            Act::Drain(worker) => self.cluster.report(WORKERS[*worker], Report::Draining(Draining {})),
            Act::Restart => {
                let workers: Vec<String> = self.cluster.state.workers.keys().cloned().collect();
                self.cluster.restart(SavedSteps::new());
                workers.iter().for_each(|worker| self.cluster.join(worker));
            }
            Act::Answer { command, how } => {
                let answered = self.commands.get(command % self.commands.len().max(1)).cloned();
                if let Some((worker, command)) = answered {
                    self.answer(&worker, command, *how);
                }
            }
        }
        self.commands.append(&mut self.cluster.sent);
    }

    fn back(&mut self, worker: &str, ready: bool) {
        if !self.cluster.state.away.contains(worker) {
            return;
        }
        let mut holding = durable_tests::holdings(&self.cluster, &[]).remove(worker).unwrap_or_default();
        holding.ranks.iter_mut().for_each(|rank| rank.ready = ready);
        self.cluster.join_holding(worker, holding);
    }

    fn answer(&mut self, worker: &str, command: Command, how: usize) {
        let cluster = &mut self.cluster;
        match command {
            Command::DescribeModel(_) => cluster.describe(worker),
            Command::JoinGroup(join) => {
                let (group_id, epoch, rank) = (join.group_id, join.epoch, join.rank);
                if how == 0 {
                    let (reason, message) = ("PEER_LOST".to_owned(), "gone".to_owned());
                    cluster.report(worker, Report::GroupLost(GroupLost { group_id, epoch, rank, reason, message }));
                } else {
                    cluster.report(worker, Report::GroupReady(GroupReady { group_id, epoch, rank }));
                }
            }
            Command::RunTask(task) => match how {
                0 => cluster.fail(&(worker.to_owned(), task), "INTERNAL"),
                1 | 2 => cluster.start(&(worker.to_owned(), task)),
                3 => {
                    cluster.start(&(worker.to_owned(), task.clone()));
                    cluster.fail(&(worker.to_owned(), task), "STORE_UNAVAILABLE");
                }
                _ => cluster.finish(&(worker.to_owned(), task)),
            },
            Command::CancelTask(cancel) => {
                let failed = TaskFailed { task: cancel.task, reason: "CANCELLED".into(), ..TaskFailed::default() };
                cluster.report(worker, Report::TaskFailed(failed));
            }
            Command::ParkTask(park) => {
                let saved_step = how as u32 % 3;
                cluster.report(worker, Report::TaskParked(TaskParked { task: park.task, saved_step }));
            }
            Command::LeaveGroup(_) | Command::ForgetJob(_) | Command::Heartbeat(_) | Command::Lead(_) => {}
        }
    }

    /// Workers come, answer everything, and time passes, until nothing is left to do.
    fn settle(&mut self) {
        for worker in WORKERS {
            if self.cluster.state.draining.contains(worker) || self.cluster.state.away.contains(worker) {
                self.cluster.leave(worker);
            }
            if !self.cluster.state.workers.contains_key(worker) {
                self.cluster.join(worker);
            }
        }
        // A job a round, and some for groups that fail on the way.
        for _ in 0..self.jobs.len() + 20 {
            self.commands.append(&mut self.cluster.sent);
            for (worker, command) in std::mem::take(&mut self.commands) {
                self.answer(&worker, command, 9);
            }
            self.cluster.tick(LAST_RETRY);
        }
    }

    fn check(&mut self) -> Result<(), TestCaseError> {
        let state = &self.cluster.state;
        let mut owed = BTreeSet::new();
        for job in state.jobs.iter() {
            let sequences: Vec<u64> = job.events_after(0).map(|event| event.sequence).collect();
            prop_assert!(sequences.is_sorted_by(|a, b| a < b) && sequences.last() <= Some(&job.sequence()));
            // A recovered job's number is above its events until something happens to it.
            prop_assert!(!job.is_over() || sequences.last() == Some(&job.sequence()));
            prop_assert_eq!(state.queue.contains(job.number), !job.is_over() && !job.is_placed());
            prop_assert!(!job.is_over() || !job.is_placed());
            let running = job.tasks.iter().filter(|(_, task)| task.phase != TaskPhase::Ended);
            owed.extend(running.map(|(stage, task)| (task.group_id.clone(), task.epoch, job.number, stage.clone())));
            prop_assert!(self.cluster.records.contains_key(&job.id));
            if job.is_over() {
                let end = self.ends.entry(job.id.clone()).or_insert_with(|| job.view());
                prop_assert_eq!(&job.view(), &*end, "what is over stays as it is");
                prop_assert!(self.cluster.records[&job.id].end.is_some(), "and is written down");
                prop_assert_eq!(end.state() == JobState::Succeeded, !end.images.is_empty());
            }
        }
        let mut held = BTreeSet::new();
        for (id, group) in state.groups.iter() {
            let tasks = group.tasks.iter().map(|(job, stage)| (id.clone(), group.epoch, *job, stage.clone()));
            held.extend(tasks);
            prop_assert!(group.members.iter().all(|member| state.workers.contains_key(member)));
            prop_assert!(group.tasks.len() <= group.limit);
            let last = self.epochs.insert(id.clone(), group.epoch).unwrap_or_default();
            prop_assert!(group.epoch >= last);
        }
        prop_assert_eq!(owed, held, "groups have exactly the tasks that jobs wait for");
        Ok(())
    }
}

proptest! {
    #[test]
    fn whatever_happens_nothing_is_lost_and_everything_ends(acts in prop::collection::vec(any_act(), 1..300)) {
        let mut chaos = Chaos::new();
        for act in &acts {
            chaos.act(act);
            chaos.check()?;
        }
        chaos.settle();
        chaos.check()?;
        prop_assert!(chaos.cluster.state.models()[0].ready, "{}", chaos.cluster.state.models()[0].problem);
        for job in chaos.cluster.state.jobs.iter() {
            prop_assert!(job.is_over(), "{:?}", job);
        }
    }

    #[test]
    fn reports_of_things_that_never_were_change_nothing(
        job_id in "[a-z0-9]{0,4}", stage in "[a-z]{0,4}", attempt: u32, epoch: u64, rank: u32,
    ) {
        let mut cluster = Cluster::ready();
        let group_id = "emoji/vae/0".to_owned();
        let task = Some(TaskRef { job_id, stage, attempt, group_id: group_id.clone(), epoch });
        cluster.report("w1", Report::TaskStarted(TaskStarted { task: task.clone() }));
        cluster.report("w1", Report::TaskDone(TaskDone { task, seconds: f64::NAN, images: vec![], stored: false }));
        cluster.report("w9", Report::GroupReady(GroupReady { group_id, epoch, rank }));
        prop_assert_eq!(cluster.state.stale_reports(), 3);
        prop_assert!(cluster.state.models()[0].ready);
    }
}
