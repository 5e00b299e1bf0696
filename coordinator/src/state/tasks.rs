//! What leaders report of tasks, and how jobs come to their end.

use std::collections::BTreeSet;

use proto::v1::{
    CancelTask, ForgetJob, JobFailure, JobState, TaskDone, TaskFailed, TaskProgress, TaskRef, control_request::Command,
};

use super::{Effect, LATE_REPORT_DEADLINE, State, job::TaskPhase, work::shortened};

impl State {
    pub(super) fn task_started(&mut self, worker_id: &str, task: Option<&TaskRef>) -> Option<()> {
        let (number, stage) = self.current_task(worker_id, task)?;
        let job = self.jobs.get_mut(number)?;
        if job.tasks.get(&stage)?.phase == TaskPhase::Sent {
            job.stage_started(&stage, self.now);
            self.job_changed(number);
        }
        Some(())
    }

    pub(super) fn task_progress(&mut self, worker_id: &str, report: &TaskProgress) -> Option<()> {
        let (number, stage) = self.current_task(worker_id, report.task.as_ref())?;
        let job = self.jobs.get_mut(number)?;
        if job.stage_progressed(&stage, report.step, report.steps, self.now) {
            self.job_changed(number);
        }
        Some(())
    }

    pub(super) fn task_done(&mut self, worker_id: &str, report: TaskDone) -> Option<()> {
        self.task_started(worker_id, report.task.as_ref())?;
        let (number, stage) = self.current_task(worker_id, report.task.as_ref())?;
        let job = self.jobs.get_mut(number)?;
        job.stage_finished(&stage, report.seconds, self.now);
        let is_sink = job.plan.consumers(&stage).next().is_none();
        if is_sink && report.images.is_empty() {
            let message = "the last stage ended without pictures".to_owned();
            self.end_job(number, End::Failed(JobFailure { reason: "INTERNAL".into(), message, stage }));
            return Some(());
        }
        if is_sink {
            job.images = report.images;
            job.deadline = Some(self.now + LATE_REPORT_DEADLINE);
        }
        self.release(number, &stage);
        self.job_changed(number);
        self.conclude(number);
        Some(())
    }

    pub(super) fn task_failed(&mut self, worker_id: &str, report: TaskFailed) -> Option<()> {
        let (number, stage) = self.current_task(worker_id, report.task.as_ref())?;
        self.release(number, &stage);
        let job = self.jobs.get_mut(number)?;
        job.end_task(&stage);
        if !job.images.is_empty() || job.cancelling {
            self.conclude(number);
            return Some(());
        }
        let message = shortened(&report.message);
        let failure = match report.reason.as_str() {
            // The group knows before its loss is reported; to clients it is one reason, whoever says it first.
            "PEER_LOST" | "STALE_EPOCH" => {
                let group_id = report.task.map(|task| task.group_id).unwrap_or_default();
                let message = format!("group {group_id} was lost: {message}");
                JobFailure { reason: "GROUP_LOST".into(), message, stage }
            }
            reason => JobFailure { reason: shortened(reason), message, stage },
        };
        self.end_job(number, End::Failed(failure));
        Some(())
    }

    /// A task went down with its group, and its job with it.
    pub(super) fn task_lost(&mut self, number: u64, stage: &str, message: String) {
        let Some(job) = self.jobs.get(number).filter(|job| !job.is_over()) else {
            return;
        };
        let end = match (job.images.is_empty(), job.cancelling) {
            (false, _) => End::Succeeded,
            (true, true) => End::Cancelled,
            (true, false) => End::Failed(JobFailure { reason: "GROUP_LOST".into(), message, stage: stage.to_owned() }),
        };
        self.end_job(number, end);
    }

    /// Ends the jobs whose workers owe a report for too long, and forgets those that ended long ago.
    pub(super) fn end_overdue_jobs(&mut self) {
        let overdue: Vec<u64> = self
            .jobs
            .iter()
            .filter(|job| job.deadline.is_some_and(|deadline| deadline <= self.now))
            .map(|job| job.number)
            .collect();
        for number in overdue {
            let has_images = self.jobs.get(number).is_some_and(|job| !job.images.is_empty());
            self.end_job(number, if has_images { End::Succeeded } else { End::Cancelled });
        }
        self.forget_old_jobs();
    }

    /// The task a report is about, unless the report is of another attempt, epoch, or worker.
    fn current_task(&self, worker_id: &str, task: Option<&TaskRef>) -> Option<(u64, String)> {
        let report = task?;
        let job = self.jobs.by_id(&report.job_id)?;
        let task = job.tasks.get(&report.stage)?;
        let current = job.attempt == report.attempt
            && task.group_id == report.group_id
            && task.epoch == report.epoch
            && task.leader == worker_id
            && task.phase != TaskPhase::Ended;
        current.then(|| (job.number, report.stage.clone()))
    }

    /// Ends a job that has its pictures and all reports, or that was cancelled and of which nothing runs.
    fn conclude(&mut self, number: u64) {
        let Some(job) = self.jobs.get(number) else {
            return;
        };
        let has_task = |phase| job.tasks.values().any(|task| task.phase == phase);
        if !job.images.is_empty() {
            if !has_task(TaskPhase::Sent) && !has_task(TaskPhase::Running) {
                self.end_job(number, End::Succeeded);
            }
        } else if job.cancelling && !has_task(TaskPhase::Running) {
            self.end_job(number, End::Cancelled);
        }
    }

    /// The group has room for another task.
    fn release(&mut self, number: u64, stage: &str) {
        let task = self.jobs.get(number).and_then(|job| job.tasks.get(stage));
        if let Some(group) = task.and_then(|task| self.groups.get_mut(&task.group_id)) {
            group.tasks.remove(&(number, stage.to_owned()));
        }
    }

    pub(super) fn cancel_tasks(&mut self, number: u64) {
        let Some(job) = self.jobs.get(number) else {
            return;
        };
        let unfinished = job.tasks.iter().filter(|(_, task)| task.phase != TaskPhase::Ended);
        let commands: Vec<_> = unfinished.map(|(stage, task)| (task.leader.clone(), job.task_ref(stage, task))).collect();
        for (leader, task) in commands {
            self.send(&leader, Command::CancelTask(CancelTask { task: Some(task) }));
        }
    }

    pub(super) fn end_job(&mut self, number: u64, end: End) {
        if matches!(end, End::Failed(_)) {
            self.cancel_tasks(number);
        }
        let Some(job) = self.jobs.get_mut(number).filter(|job| !job.is_over()) else {
            return;
        };
        let tasks = std::mem::take(&mut job.tasks);
        let job_id = job.id.clone();
        job.deadline = None;
        match end {
            End::Succeeded => job.enter(JobState::Succeeded, self.now),
            End::Cancelled => job.enter(JobState::Cancelled, self.now),
            End::Failed(failure) => {
                job.failure = Some(failure);
                job.enter(JobState::Failed, self.now);
            }
        }
        self.jobs.finished(number);
        for (stage, task) in &tasks {
            if let Some(group) = self.groups.get_mut(&task.group_id) {
                group.tasks.remove(&(number, stage.clone()));
            }
        }
        let leaders: BTreeSet<&str> = tasks.values().map(|task| task.leader.as_str()).collect();
        for leader in leaders {
            self.send(leader, Command::ForgetJob(ForgetJob { job_id: job_id.clone() }));
        }
        self.queue.retain(|queued| *queued != number);
        self.job_changed(number);
        self.forget_old_jobs();
    }

    fn job_changed(&mut self, number: u64) {
        if let Some(job) = self.jobs.get(number) {
            self.effects.push(Effect::JobChanged { job_id: job.id.clone(), over: job.is_over() });
        }
    }

    /// Results may take half of the blob store: the other half is for what is on its way in.
    fn forget_old_jobs(&mut self) {
        self.jobs.forget_old(self.now, self.settings.limits.total_blob_bytes / 2);
    }
}

/// How a job ends.
pub(super) enum End {
    Succeeded,
    Failed(JobFailure),
    Cancelled,
}
