//! A worker whose control stream broke and that may be back in a moment: what it holds goes on meanwhile. When it is back, all that
//! may have been lost on the way, in either direction, is made good: its account of what it holds is compared with what is known
//! here, and commands are given again. Every command is safe to give twice.

use std::collections::BTreeSet;

use proto::v1::{
    CancelTask, ForgetJob, GroupState, HeldRank, HeldTask, Holding, LeaveGroup, ParkTask, Registration, TaskFailed, TaskProgress,
    TaskRef, control_request::Command, control_response::Report,
};

use super::{State, job::Job};

impl State {
    /// Nothing new is given to its groups, and nothing of theirs is taken away.
    pub(super) fn worker_away(&mut self, worker_id: &str) {
        if self.workers.contains_key(worker_id) {
            self.away.insert(worker_id.to_owned());
            self.groups.members_changed(worker_id);
        }
    }

    /// The worker is back, on a new stream, and says what it holds.
    pub(super) fn worker_back(&mut self, worker: Registration, holding: Holding) {
        let worker_id = worker.worker_id.clone();
        self.away.remove(&worker_id);
        self.workers.insert(worker_id.clone(), worker);
        // A question, or its answer, may be lost: it is asked again.
        self.models.iter_mut().for_each(|model| model.worker_left(&worker_id));
        if holding.draining {
            self.draining.insert(worker_id.clone());
        }
        self.compare_ranks(&worker_id, holding.ranks);
        self.compare_tasks(&worker_id, holding.tasks);
        self.groups.members_changed(&worker_id);
    }

    /// A rank that it should have and has not ends the epoch; one that it has and should not have is given up.
    fn compare_ranks(&mut self, worker_id: &str, mut held: Vec<HeldRank>) {
        let formed = self.groups.iter().filter(|(_, group)| group.phase != GroupState::Waiting);
        let expected: Vec<(String, u64, u32)> = formed
            .flat_map(|(id, group)| {
                let ranks = (0..).zip(&group.members).filter(|(_, member)| *member == worker_id);
                ranks.map(|(rank, _)| (id.clone(), group.epoch, rank))
            })
            .collect();
        let mut lost = BTreeSet::new();
        for (group_id, epoch, rank) in expected {
            let is_it = |held: &HeldRank| {
                held.join.as_ref().is_some_and(|join| join.group_id == group_id && join.epoch == epoch && join.rank == rank)
            };
            match held.iter().position(is_it).map(|at| held.swap_remove(at)) {
                Some(found) if found.ready => {
                    if let Some(group) = self.groups.get_mut(&group_id) {
                        group.rank_ready(rank);
                    }
                }
                Some(_) => {}
                None => drop(lost.insert(group_id)),
            }
        }
        for join in held.into_iter().filter_map(|rank| rank.join) {
            let leave = LeaveGroup { group_id: join.group_id, epoch: join.epoch };
            self.send(worker_id, Command::LeaveGroup(leave));
        }
        for group_id in lost {
            if let Some(group) = self.groups.get_mut(&group_id) {
                group.pause(self.now, group.is_ready());
            }
            self.end_epoch(&group_id, format!("worker {worker_id} is back without its rank"), false);
        }
    }

    /// What it works on is brought up to date, what it should work on and does not is given again.
    fn compare_tasks(&mut self, worker_id: &str, held: Vec<HeldTask>) {
        let mut known = BTreeSet::new();
        for HeldTask { task, started, step, steps, saved_step, stopping: _ } in held {
            let Some(task) = task else { continue };
            let Some(current) = self.current_task(worker_id, Some(&task)) else {
                let over = self.jobs.by_id(&task.job_id).is_none_or(Job::is_over);
                self.give_up_task(worker_id, task, over);
                continue;
            };
            if started {
                self.task_started(worker_id, Some(&task));
            }
            if steps > 0 {
                self.task_progress(worker_id, &TaskProgress { task: Some(task), step, steps, saved_step });
            }
            known.insert(current);
        }
        let led = self.groups.iter().filter(|(_, group)| group.leader() == Some(worker_id));
        let tasks: Vec<(u64, String)> = led.flat_map(|(_, group)| group.tasks.iter().cloned()).collect();
        for (number, stage) in tasks {
            let is_held = known.contains(&(number, stage.clone()));
            self.tell_again(worker_id, number, &stage, is_held);
        }
    }

    /// What the leader of a task may have missed: that it is to run it, or to stop. The end of a task that it does not hold and that
    /// ran follows by itself, and is told again to one who gives the task again.
    fn tell_again(&mut self, worker_id: &str, number: u64, stage: &str, is_held: bool) {
        let Some(job) = self.jobs.get(number) else { return };
        let Some(task) = job.tasks.get(stage) else { return };
        let task = job.task_ref(stage, task);
        if self.current_task(worker_id, Some(&task)).is_none() {
            return;
        }
        if !is_held && job.cancelling {
            // It never came there, and what is not there says nothing when it is told to stop.
            let message = "it was cancelled before its worker had it".to_owned();
            self.task_failed(worker_id, TaskFailed { task: Some(task), reason: "CANCELLED".into(), message, step: 0 });
            return;
        }
        let mut commands = Vec::new();
        if !is_held {
            let planned = job.plan.stage(stage);
            commands.extend(
                planned.and_then(|planned| self.run_task(job, planned, &self.layout(job))).map(|(_, run)| Command::RunTask(run)),
            );
        }
        if job.cancelling {
            commands.push(Command::CancelTask(CancelTask { task: Some(task) }));
        } else if job.parking.is_some() {
            commands.push(Command::ParkTask(ParkTask { task: Some(task) }));
        }
        for command in commands {
            self.send(worker_id, command);
        }
    }

    /// A worker keeps the end of a task until it is told that the job is over, and may have missed that: it is told again.
    pub(super) fn forget_if_over(&mut self, worker_id: &str, report: &Report) {
        let task: Option<&TaskRef> = match report {
            Report::TaskDone(done) => done.task.as_ref(),
            Report::TaskFailed(failed) => failed.task.as_ref(),
            Report::TaskParked(parked) => parked.task.as_ref(),
            _ => None,
        };
        let over = task.filter(|task| self.jobs.by_id(&task.job_id).is_none_or(Job::is_over));
        if let Some(job_id) = over.map(|task| task.job_id.clone()) {
            self.send(worker_id, Command::ForgetJob(ForgetJob { job_id }));
        }
    }
}
