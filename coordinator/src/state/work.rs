//! Jobs are accepted, placed, sent to their groups, cancelled, and come to their end.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use prost::Message;
use proto::v1::{
    self, CancelTask, Destination, ForgetJob, JobFailure, JobState, Layout, RunTask, TaskDone,
    TaskFailed, TaskProgress, TaskRef, control_request::Command,
};
use sha2::{Digest, Sha256};

use super::{
    CANCEL_DEADLINE, Effect, LATE_REPORT_DEADLINE, State, Submission,
    job::{Job, NewJob, Task, TaskPhase},
};
use crate::{
    error::{Error, Result},
    placement::{self, Placement, Replica},
    plan::{Plan, Stage},
    request::{self, Context, Request},
};

/// Characters kept of what a worker says went wrong. A status travels in HTTP headers, twice and encoded: more would
/// not fit the 16 KiB that clients take.
const MAX_CAUSE_CHARS: usize = 400;
/// Characters kept of a name that is not ours.
const MAX_NAME_CHARS: usize = 64;

impl State {
    pub(super) fn submit(&mut self, submission: Submission) -> Result<v1::Job> {
        let Submission {
            job_id,
            request_id,
            spec,
            seed,
            missing_blobs,
        } = submission;
        request::check_request_id(&request_id)?;
        let fingerprint: [u8; 32] = Sha256::digest(spec.encode_to_vec()).into();
        if let Some(job) = self.jobs.by_request(&request_id) {
            let same = job.fingerprint == fingerprint;
            return if same {
                Ok(job.view())
            } else {
                Err(Error::RequestIdReused(request_id))
            };
        }
        let model = self
            .models
            .iter()
            .find(|model| model.config.name == spec.model);
        let card = model
            .ok_or_else(|| Error::ModelNotFound(name(&spec.model)))?
            .card()?;
        let context = Context {
            seed,
            max_pixels: self.settings.limits.pixels,
            missing_blobs: &missing_blobs,
        };
        let request = Request::parse(spec, card, context)?;
        let limit = self.settings.limits.queued_jobs;
        if self.queue.len() >= limit {
            return Err(Error::QueueFull(limit));
        }
        let plan = Plan::new(&request, card);
        let new = NewJob {
            id: job_id,
            request_id,
            fingerprint,
            spec: request.into_spec(),
            plan,
        };
        let job = self.jobs.add(new, self.now);
        self.queue.push_back(job.number);
        Ok(job.view())
    }

    pub(super) fn cancel(&mut self, job_id: &str) -> Result<v1::Job> {
        let not_found = || Error::JobNotFound(name(job_id));
        let number = self.jobs.by_id(job_id).ok_or_else(not_found)?.number;
        let job = self.jobs.get_mut(number).ok_or_else(not_found)?;
        if !job.is_over() && !job.cancelling {
            job.cancelling = true;
            if job.is_placed() {
                job.deadline = Some(self.now + CANCEL_DEADLINE);
                self.cancel_tasks(number);
            } else {
                self.end_job(number, End::Cancelled);
            }
        }
        self.jobs.get(number).map(Job::view).ok_or_else(not_found)
    }

    /// Starts every job that finds its groups, first come first served within a model.
    pub(super) fn start_jobs(&mut self) {
        let mut blocked = BTreeSet::new();
        let mut waiting = VecDeque::new();
        for number in std::mem::take(&mut self.queue) {
            let Some(job) = self.jobs.get(number) else {
                continue;
            };
            let model = job.spec.model.clone();
            if blocked.contains(&model) || !self.start(number) {
                blocked.insert(model);
                waiting.push_back(number);
            }
        }
        self.queue = waiting;
    }

    fn start(&mut self, number: u64) -> bool {
        let Some(placement) = self.place(number) else {
            return false;
        };
        let Some(job) = self.jobs.get_mut(number) else {
            return false;
        };
        for (stage, group_id) in placement {
            let Some(group) = self.groups.get_mut(&group_id) else {
                continue;
            };
            let leader = group.leader().unwrap_or_default().to_owned();
            group.tasks.insert((number, stage.clone()));
            job.tasks
                .insert(stage, Task::new(group_id, group.epoch, leader));
        }
        self.send_tasks(number);
        true
    }

    fn place(&self, number: u64) -> Option<Placement> {
        let job = self.jobs.get(number)?;
        let model = self
            .models
            .iter()
            .find(|model| model.config.name == job.spec.model)?;
        let groups = model.groups.iter().filter_map(|id| self.groups.get(id));
        let ready: Vec<_> = groups
            .filter(|group| group.is_ready())
            .map(|group| Replica {
                group_id: &group.wanted.id,
                component: &group.wanted.component,
                tasks: group.tasks.len(),
                limit: group.limit,
            })
            .collect();
        placement::place(&job.plan, &ready)
    }

    /// Downstream first, so that whoever gets an output already knows the task that waits for it.
    fn send_tasks(&mut self, number: u64) {
        let Some(job) = self.jobs.get(number) else {
            return;
        };
        let layout = self.layout(job);
        let commands: Vec<_> = job
            .plan
            .stages
            .iter()
            .rev()
            .filter_map(|stage| self.run_task(job, stage, &layout))
            .collect();
        for (leader, task) in commands {
            self.send(&leader, Command::RunTask(task));
        }
    }

    fn run_task(&self, job: &Job, stage: &Stage, layout: &str) -> Option<(String, RunTask)> {
        let task = job.tasks.get(&stage.id)?;
        let destination = |consumer: &Stage| {
            let task = job.tasks.get(&consumer.id)?;
            let address = self.workers.get(&task.leader)?.address.clone();
            Some(Destination {
                task: Some(job.task_ref(&consumer.id, task)),
                address,
            })
        };
        let card = self
            .models
            .iter()
            .find(|model| model.config.name == job.spec.model)?
            .card
            .as_ref()?;
        let command = RunTask {
            task: Some(job.task_ref(&stage.id, task)),
            kind: stage.kind as i32,
            spec: Some(job.spec.clone()),
            inputs: stage.inputs.clone(),
            outputs: job
                .plan
                .consumers(&stage.id)
                .filter_map(destination)
                .collect(),
            layout: layout.to_owned(),
            blob_address: self.settings.blob_address.clone(),
            model_digest: card.digest.clone(),
        };
        Some((task.leader.clone(), command))
    }

    /// How each component of the job is cut: "text_encoder=tp1x1,transformer=tp2x2".
    fn layout(&self, job: &Job) -> String {
        let layouts: BTreeMap<&str, Layout> = job
            .tasks
            .values()
            .filter_map(|task| self.groups.get(&task.group_id))
            .map(|group| (group.wanted.component.as_str(), group.wanted.layout))
            .collect();
        let parts: Vec<String> = layouts
            .iter()
            .map(|(name, cut)| format!("{name}=tp{}x{}", cut.tp, cut.block_ranges))
            .collect();
        parts.join(",")
    }

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
            self.end_job(
                number,
                End::Failed(JobFailure {
                    reason: "INTERNAL".into(),
                    message,
                    stage,
                }),
            );
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
                JobFailure {
                    reason: "GROUP_LOST".into(),
                    message,
                    stage,
                }
            }
            reason => JobFailure {
                reason: shortened(reason),
                message,
                stage,
            },
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
            (true, false) => End::Failed(JobFailure {
                reason: "GROUP_LOST".into(),
                message,
                stage: stage.to_owned(),
            }),
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
            let has_images = self
                .jobs
                .get(number)
                .is_some_and(|job| !job.images.is_empty());
            self.end_job(
                number,
                if has_images {
                    End::Succeeded
                } else {
                    End::Cancelled
                },
            );
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

    fn cancel_tasks(&mut self, number: u64) {
        let Some(job) = self.jobs.get(number) else {
            return;
        };
        let unfinished = job
            .tasks
            .iter()
            .filter(|(_, task)| task.phase != TaskPhase::Ended);
        let commands: Vec<_> = unfinished
            .map(|(stage, task)| (task.leader.clone(), job.task_ref(stage, task)))
            .collect();
        for (leader, task) in commands {
            self.send(
                &leader,
                Command::CancelTask(CancelTask { task: Some(task) }),
            );
        }
    }

    fn end_job(&mut self, number: u64, end: End) {
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
            self.send(
                leader,
                Command::ForgetJob(ForgetJob {
                    job_id: job_id.clone(),
                }),
            );
        }
        self.queue.retain(|queued| *queued != number);
        self.job_changed(number);
        self.forget_old_jobs();
    }

    fn job_changed(&mut self, number: u64) {
        if let Some(job) = self.jobs.get(number) {
            self.effects.push(Effect::JobChanged {
                job_id: job.id.clone(),
                over: job.is_over(),
            });
        }
    }

    /// Results may take half of the blob store: the other half is for what is on its way in.
    fn forget_old_jobs(&mut self) {
        self.jobs
            .forget_old(self.now, self.settings.limits.total_blob_bytes / 2);
    }
}

/// How a job ends.
enum End {
    Succeeded,
    Failed(JobFailure),
    Cancelled,
}

/// Text from outside, cut to a length that can be kept and shown.
pub(super) fn shortened(text: &str) -> String {
    text.chars().take(MAX_CAUSE_CHARS).collect()
}

/// A name from outside that may be nobody's, cut to the length of a name.
pub(super) fn name(text: &str) -> String {
    text.chars().take(MAX_NAME_CHARS).collect()
}
