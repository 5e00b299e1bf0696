//! What leaders report of tasks, and how jobs come to their end.

use proto::v1::{ForgetJob, JobFailure, JobState, TaskDone, TaskFailed, TaskProgress, TaskRef, control_request::Command};

use super::{
    Effect, LATE_REPORT_DEADLINE, State, estimate,
    job::{Job, TaskPhase},
    requeue::Why,
    spans, tally,
    work::shortened,
};

impl State {
    pub(super) fn task_started(&mut self, worker_id: &str, task: Option<&TaskRef>) -> Option<()> {
        let (number, stage) = self.current_task(worker_id, task)?;
        let task = self.jobs.get(number)?.tasks.get(&stage)?;
        if task.phase == TaskPhase::Sent {
            let group_id = task.group_id.clone();
            self.group_began(&group_id);
            self.jobs.get_mut(number)?.stage_started(&stage, self.now);
            self.job_changed(number);
        }
        Some(())
    }

    pub(super) fn task_progress(&mut self, worker_id: &str, report: &TaskProgress) -> Option<()> {
        let (number, stage) = self.current_task(worker_id, report.task.as_ref())?;
        let job = self.jobs.get_mut(number)?;
        job.saw_saved(&stage, report.saved_step, self.now);
        let group_id = job.tasks.get(&stage)?.group_id.clone();
        if job.stage_progressed(&stage, report.step, report.steps, self.now) {
            self.job_changed(number);
        }
        self.group_stepped(&group_id);
        Some(())
    }

    /// The group has done its part; that the output is not taken yet is no fault of it.
    pub(super) fn task_computed(&mut self, worker_id: &str, task: Option<&TaskRef>) -> Option<()> {
        self.task_started(worker_id, task)?;
        let (number, stage) = self.current_task(worker_id, task)?;
        let task = self.jobs.get(number)?.tasks.get(&stage)?;
        if !task.computed {
            let group_id = task.group_id.clone();
            self.group_stepped(&group_id);
            self.jobs.get_mut(number)?.tasks.get_mut(&stage)?.computed = true;
        }
        Some(())
    }

    pub(super) fn task_done(&mut self, worker_id: &str, report: TaskDone) -> Option<()> {
        self.task_started(worker_id, report.task.as_ref())?;
        let (number, stage) = self.current_task(worker_id, report.task.as_ref())?;
        let job = self.jobs.get_mut(number)?;
        let task = job.tasks.get(&stage)?;
        let (group_id, computed) = (task.group_id.clone(), task.computed);
        // What is saved by now is in the time that it took.
        let units = tally::units(job, job.plan.stage(&stage)?, task.resumed_step);
        let model = job.spec.model.clone();
        // Those that shared the group's time with it took their part of it.
        let beside = self.running_in(&group_id);
        self.tally.stage_done(&model, &stage, report.seconds, beside, units);
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
            let overdue = self.now + LATE_REPORT_DEADLINE;
            job.overdue = Some(overdue);
            self.due.insert((overdue, number));
        } else if report.stored {
            job.saved.outputs.insert(stage.clone());
        }
        // Otherwise its step was taken note of when it was made.
        if !computed {
            self.group_stepped(&group_id);
        }
        self.release(number, &stage);
        self.job_changed(number);
        self.finish_parking(number);
        self.conclude(number);
        Some(())
    }

    pub(super) fn task_failed(&mut self, worker_id: &str, report: TaskFailed) -> Option<()> {
        let (number, stage) = self.current_task(worker_id, report.task.as_ref())?;
        let (reason, message) = (shortened(&report.reason), shortened(&report.message));
        let job = self.jobs.get_mut(number)?;
        let kept_for = (job.images.is_empty(), job.cancelling);
        match reason.as_str() {
            // The group knows before its loss is reported; for the coordinator it is lost from now on.
            "PEER_LOST" | "STALE_EPOCH" if kept_for == (true, false) => {
                let group_id = job.tasks.get(&stage)?.group_id.clone();
                if let Some(group) = self.groups.get_mut(&group_id) {
                    group.pause(self.now, true);
                }
                self.end_epoch(&group_id, message, false);
                return Some(());
            }
            // Nobody is lost: a store that is away or full, or a worker that has as much as it takes.
            "STORE_UNAVAILABLE" | "OVERLOADED" if kept_for == (true, false) => {
                self.postpone(number, &stage, reason, message);
                return Some(());
            }
            // Whoever should have taken the output is gone; the worker that made it is well.
            "PAYLOAD_REFUSED" if kept_for == (true, false) => {
                if self.count_loss(number, &stage, &message) {
                    self.requeue(number, Why::GroupLost, message);
                }
                return Some(());
            }
            // Somebody else's command, from before this coordinator led.
            "CANCELLED" if kept_for == (true, false) && job.parking.is_none() => {
                self.stopped_unasked(number, &stage);
                return Some(());
            }
            "CHECKPOINT_LOST" if kept_for == (true, false) => {
                self.checkpoint_lost(number, &stage, &message);
                return Some(());
            }
            _ => {}
        }
        self.release(number, &stage);
        let job = self.jobs.get_mut(number)?;
        job.end_task(&stage);
        if job.parking.is_some() && reason == "CANCELLED" {
            self.finish_parking(number);
        } else if kept_for == (true, false) {
            self.end_job(number, End::Failed(JobFailure { reason, message, stage }));
        }
        self.conclude(number);
        Some(())
    }

    /// Ends the jobs whose time is up or whose workers owe a report for too long, and forgets those that ended long ago.
    pub(super) fn end_overdue_jobs(&mut self) {
        while let Some((due, number)) = self.due.first().copied().filter(|(due, _)| *due <= self.now) {
            self.due.remove(&(due, number));
            let Some(job) = self.jobs.get_mut(number).filter(|job| !job.is_over()) else {
                continue;
            };
            if job.rests_until.take_if(|until| *until <= self.now).is_some() {
                self.queue.wake(number);
            }
            let has_images = !job.images.is_empty();
            if job.overdue.is_some_and(|overdue| overdue <= self.now) {
                self.end_job(number, if has_images { End::Succeeded } else { End::Cancelled });
            } else if job.deadline.is_some_and(|deadline| deadline <= self.now) && !has_images {
                if job.cancelling {
                    self.end_job(number, End::Cancelled);
                    continue;
                }
                let stage = job.tasks.iter().find(|(_, task)| task.phase == TaskPhase::Running);
                let stage = stage.map(|(stage, _)| stage.clone()).unwrap_or_default();
                let message = "the picture was not there in the time that was asked for".to_owned();
                self.end_job(number, End::Failed(JobFailure { reason: "DEADLINE_EXCEEDED".into(), message, stage }));
            }
        }
        self.forget_old_jobs();
    }

    /// From now on its deadline is seen to.
    pub(super) fn watch_deadline(&mut self, job: &Job) {
        if let Some(deadline) = job.deadline {
            self.due.insert((deadline, job.number));
        }
    }

    /// The task a report is about, unless the report is of another attempt, epoch, or worker.
    pub(super) fn current_task(&self, worker_id: &str, task: Option<&TaskRef>) -> Option<(u64, String)> {
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
    pub(super) fn conclude(&mut self, number: u64) {
        let Some(job) = self.jobs.get(number) else {
            return;
        };
        if !job.images.is_empty() {
            if !job.has_task(TaskPhase::Sent) && !job.has_task(TaskPhase::Running) {
                self.end_job(number, End::Succeeded);
            }
        } else if job.cancelling && !job.has_task(TaskPhase::Running) {
            self.end_job(number, End::Cancelled);
        }
    }

    /// How many tasks the group works on.
    fn running_in(&self, group_id: &str) -> usize {
        let tasks = self.groups.get(group_id).into_iter().flat_map(|group| &group.tasks);
        let phase = |(number, stage): &(u64, String)| Some(self.jobs.get(*number)?.tasks.get(stage)?.phase);
        tasks.filter(|task| phase(task) == Some(TaskPhase::Running)).count()
    }

    /// The group has room for another task.
    pub(super) fn release(&mut self, number: u64, stage: &str) {
        let task = self.jobs.get(number).and_then(|job| job.tasks.get(stage));
        if let Some(group) = task.and_then(|task| self.groups.get_mut(&task.group_id)) {
            group.release(number, stage);
        }
    }

    pub(super) fn end_job(&mut self, number: u64, end: End) {
        if matches!(end, End::Failed(_)) {
            self.cancel_tasks(number);
        }
        self.release_all(number);
        let Some(job) = self.jobs.get_mut(number).filter(|job| !job.is_over()) else {
            return;
        };
        self.queue.remove(&job.spec.model, number);
        job.tasks.clear();
        job.overdue = None;
        let (job_id, told) = (job.id.clone(), std::mem::take(&mut job.told));
        match end {
            End::Succeeded => {
                // A try that took up another's work says nothing of the whole.
                if job.attempt == 1 {
                    let took = self.now.saturating_sub(job.placed);
                    self.costs.entry(job.spec.model.clone()).or_default().saw(estimate::work(job), took);
                }
                job.enter(JobState::Succeeded, self.now);
            }
            End::Cancelled => job.enter(JobState::Cancelled, self.now),
            End::Failed(failure) => {
                job.failure = Some(Box::new(failure));
                job.enter(JobState::Failed, self.now);
            }
        }
        self.tally.ended(job);
        self.spans.extend(spans::ended(job));
        self.jobs.finished(number);
        self.persist(number);
        for worker in told {
            self.send(&worker, Command::ForgetJob(ForgetJob { job_id: job_id.clone() }));
        }
        self.effects.push(Effect::DropCheckpoints { job_id, goes_on: false });
        self.job_changed(number);
        self.forget_old_jobs();
    }

    /// The job as it is now is written down before anything that follows is told to anybody.
    pub(super) fn persist(&mut self, number: u64) {
        if let Some(job) = self.jobs.get(number) {
            self.effects.push(Effect::Persist(Box::new(job.record())));
        }
    }

    pub(super) fn job_changed(&mut self, number: u64) {
        if let Some(job) = self.jobs.get(number) {
            self.effects.push(Effect::JobChanged { job_id: job.id.clone(), over: job.is_over() });
        }
    }

    /// Of jobs that are over, gives up the oldest pictures beyond what may be kept, and forgets those that are too old or too many.
    fn forget_old_jobs(&mut self) {
        for number in self.jobs.drop_pictures(self.settings.limits.total_blob_bytes) {
            self.persist(number);
        }
        let forgotten = self.jobs.forget_old(self.now, &self.settings.limits);
        self.effects.extend(forgotten.into_iter().map(|job_id| Effect::Forget { job_id }));
    }
}

/// How a job ends.
pub(super) enum End {
    Succeeded,
    Failed(JobFailure),
    Cancelled,
}
