//! Jobs are accepted, placed, sent to their groups, and asked to stop.

use std::collections::{BTreeMap, BTreeSet};

use prost::Message;
use proto::v1::{self, Destination, RunTask, control_request::Command};
use sha2::{Digest, Sha256};

use super::{
    CANCEL_DEADLINE, Millis, State, Submission, estimate,
    job::{Job, NewJob, Task},
    jobs::most_kept,
    spans,
    tasks::End,
    tenants::TenantLimits,
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
        let Submission { job_id, request_id, tenant, spec, seed, missing_blobs, blob_bytes, priority, timeout, trace } =
            submission;
        request::check_request_id(&request_id)?;
        request::check_urgency(priority, timeout)?;
        let fingerprint = fingerprint(&spec, priority, timeout);
        if let Some(job) = self.jobs.by_request(&tenant, &request_id) {
            let same = job.fingerprint == fingerprint;
            return if same { Ok(job.view()) } else { Err(Error::RequestIdReused(request_id)) };
        }
        let model = self.model(&spec.model).ok_or_else(|| Error::ModelNotFound(name(&spec.model)))?;
        let (card, products) = (model.card()?, model.config.products);
        let context = Context { seed, max_pixels: self.settings.limits.pixels, missing_blobs: &missing_blobs };
        let request = Request::parse(spec, card, context)?;
        let limit = self.settings.limits.queued_jobs;
        if !self.queue.has_room(&tenant, limit) {
            return Err(Error::QueueFull(limit));
        }
        let (plan, pixels_per_image) = (Plan::new(&request, card), card.pixels_per_image);
        let plan = self.jobs.share(plan);
        let deadline = timeout.map(|timeout| self.now.saturating_add(timeout));
        let spec = request.into_spec();
        let of = tenant.as_str().into();
        let new = NewJob {
            id: job_id,
            request_id,
            tenant: of,
            fingerprint,
            spec,
            products,
            pixels_per_image,
            plan,
            priority,
            deadline,
            trace,
        };
        let job = Job::new(self.jobs.next_number(), new, self.now);
        if let Some(timeout) = timeout
            && let Some(predicted) = self.predicted_millis(&job)
            && predicted > timeout
        {
            return Err(Error::DeadlineUnreachable { timeout, predicted });
        }
        self.check_room(&job, blob_bytes)?;
        let bytes = job.record().encoded_len();
        if let Some(limit) = self.settings.max_record_bytes.filter(|limit| bytes > *limit) {
            return Err(Error::invalid("spec", format!("takes {bytes} bytes; the store of jobs takes {limit}")));
        }
        let weight = self.admit(&tenant, estimate::pixel_steps(&job))?;
        self.watch_deadline(&job);
        let (number, view) = (job.number, job.view());
        self.tally.accepted(&job.spec.model);
        self.queue.add(&job.spec.model, priority, number, &job.tenant, estimate::pixel_steps(&job), weight);
        self.jobs.add(job);
        self.persist(number);
        Ok(view)
    }

    pub(super) fn cancel(&mut self, job_id: &str) -> Result<v1::Job> {
        let not_found = || Error::JobNotFound(name(job_id));
        let number = self.jobs.by_id(job_id).ok_or_else(not_found)?.number;
        let job = self.jobs.get_mut(number).ok_or_else(not_found)?;
        if !job.is_over() && !job.cancelling {
            job.cancelling = true;
            if job.is_placed() {
                let overdue = self.now + CANCEL_DEADLINE;
                job.overdue = Some(overdue);
                self.due.insert((overdue, number));
                self.persist(number);
                self.cancel_tasks(number);
            } else {
                self.end_job(number, End::Cancelled);
            }
        }
        self.jobs.get(number).map(Job::view).ok_or_else(not_found)
    }

    /// The job's pictures will find room in a store of blobs that holds `blob_bytes`, beside as many of finished jobs as are kept.
    fn check_room(&self, job: &Job, blob_bytes: u64) -> Result<()> {
        let limits = &self.settings.limits;
        let all = limits.total_blob_bytes;
        let (needed, most) = (estimate::picture_bytes(job, limits.blob_bytes), all - most_kept(all));
        if needed > most {
            let problem =
                format!("pictures of so many pixels may take {needed} bytes; the store of pictures has {most} for them");
            return Err(Error::invalid("spec", problem));
        }
        if blob_bytes.saturating_add(needed) > all {
            return Err(Error::BlobStoreFull(all));
        }
        Ok(())
    }

    /// Counts a job against what its tenant may use, and gives the tenant's weight.
    fn admit(&mut self, tenant: &str, work: u64) -> Result<u32> {
        let limits = self.tenants.limits(tenant);
        if let Some(most) = limits.max_queued.filter(|most| self.queue.waiting(tenant) >= *most) {
            return Err(Error::TenantQueueFull { tenant: tenant.to_owned(), limit: most });
        }
        self.tenants.charge(tenant, work, self.now).map_err(|retry_millis| Error::TenantQuota {
            tenant: tenant.to_owned(),
            limit: limits.quota.map_or(0, |quota| quota.per_second),
            retry_millis,
        })?;
        Ok(limits.weight)
    }

    pub(super) fn set_tenants(&mut self, limits: BTreeMap<String, TenantLimits>) {
        let before = self.tenants.names();
        self.tenants.set(limits);
        for tenant in before.into_iter().chain(self.tenants.names()) {
            self.queue.hold(&tenant, self.tenants.is_at_cap(&tenant));
        }
    }

    /// The job has its place; its tenant may have as many as it can.
    pub(super) fn note_placed(&mut self, number: u64) {
        self.jobs.placed(number);
        if let Some(job) = self.jobs.get(number) {
            self.tenants.placed(&job.tenant);
            self.queue.hold(&job.tenant, self.tenants.is_at_cap(&job.tenant));
        }
    }

    /// The job, which had a place, has none any more.
    pub(super) fn note_unplaced(&mut self, number: u64) {
        self.jobs.unplaced(number);
        if let Some(job) = self.jobs.get(number) {
            self.tenants.unplaced(&job.tenant);
            self.queue.hold(&job.tenant, self.tenants.is_at_cap(&job.tenant));
        }
    }

    /// Starts every job that finds its groups, in the order of the queue within a model.
    pub(super) fn start_jobs(&mut self) {
        for model in self.queue.models() {
            while let Some(number) = self.queue.first(&model) {
                if !self.start(number) {
                    self.make_room(number);
                    break;
                }
            }
        }
    }

    fn start(&mut self, number: u64) -> bool {
        let Some(placement) = self.place(number) else {
            return false;
        };
        let Some(job) = self.jobs.get_mut(number) else {
            return false;
        };
        self.queue.take(&job.spec.model, number);
        self.spans.extend(spans::waited(job, self.now));
        job.placed = self.now;
        job.saved_at = self.now;
        self.tally.placed(&job.spec.model, self.now.saturating_sub(job.queued));
        for (stage, group_id) in placement {
            let Some(group) = self.groups.get_mut(&group_id) else {
                continue;
            };
            let leader = group.leader().unwrap_or_default().to_owned();
            let resumed_step = job.saved.steps.get(&stage).copied().unwrap_or_default();
            group.tasks.insert((number, stage.clone()));
            group.alone |= job.suspect;
            job.told.insert(leader.clone());
            job.tasks.insert(stage, Task::new(group_id, group.epoch, leader, resumed_step));
        }
        self.note_placed(number);
        self.groups.refresh(&self.draining, &self.away);
        self.send_tasks(number);
        true
    }

    fn place(&self, number: u64) -> Option<Placement> {
        let job = self.jobs.get(number)?;
        let remaining = job.remaining();
        let components: BTreeSet<&str> = remaining.stages.iter().map(|stage| stage.component.as_str()).collect();
        let best = components.iter().flat_map(|component| {
            let able = self.groups.with_room(&job.spec.model, component);
            // More of the least busy than the job has stages cannot be chosen.
            able.take(remaining.stages.len()).filter(|group| !job.suspect || group.tasks.is_empty())
        });
        let ready: Vec<_> = best
            .map(|group| Replica {
                group_id: &group.wanted.id,
                component: &group.wanted.component,
                tasks: group.tasks.len(),
                limit: group.limit,
            })
            .collect();
        placement::place(&remaining, &ready)
    }

    /// Downstream first, so that whoever gets an output already knows the task that waits for it.
    fn send_tasks(&mut self, number: u64) {
        let Some(job) = self.jobs.get(number) else {
            return;
        };
        let layout = self.layout(job);
        let commands: Vec<_> = job.plan.stages.iter().rev().filter_map(|stage| self.run_task(job, stage, &layout)).collect();
        for (leader, task) in commands {
            self.send(&leader, Command::RunTask(task));
        }
    }

    pub(super) fn run_task(&self, job: &Job, stage: &Stage, layout: &str) -> Option<(String, RunTask)> {
        let task = job.tasks.get(&stage.id)?;
        let destination = |consumer: &Stage| {
            let task = job.tasks.get(&consumer.id)?;
            let address = self.workers.get(&task.leader)?.address.clone();
            Some(Destination { task: Some(job.task_ref(&consumer.id, task)), address })
        };
        let model = self.model(&job.spec.model)?;
        let card = model.card.as_ref()?;
        let command = RunTask {
            task: Some(job.task_ref(&stage.id, task)),
            kind: stage.kind as i32,
            spec: Some(job.spec.clone()),
            inputs: stage.inputs.iter().filter(|input| job.tasks.contains_key(*input)).cloned().collect(),
            outputs: job.plan.consumers(&stage.id).filter_map(destination).collect(),
            layout: layout.to_owned(),
            blob_address: self.settings.blob_address.clone(),
            model_digest: card.digest.clone(),
            stored_inputs: stage.inputs.iter().filter(|input| !job.tasks.contains_key(*input)).cloned().collect(),
            resume_step: task.resumed_step,
            with_pictures: stage.with_pictures,
            with_controls: stage.with_controls,
            adapter_digests: model.adapter_digests(&job.spec),
            control_digests: model.control_digests(&job.spec),
            traceparent: job.span().map(|span| span.to_string()).unwrap_or_default(),
        };
        Some((task.leader.clone(), command))
    }

    /// How each component of the job is cut: "text_encoder=tp1x1,transformer=tp2x2xcfg2".
    pub(super) fn layout(&self, job: &Job) -> String {
        // Of all its stages, those too that an earlier try had done: what is written into a picture does not depend on tries.
        let components: BTreeSet<&str> = job.plan.stages.iter().map(|stage| stage.component.as_str()).collect();
        let configured = self.model(&job.spec.model).map(|model| &model.config.components);
        let layout = |name: &str| configured.and_then(|components| components.get(name)).cloned().unwrap_or_default().layout();
        let parts: Vec<String> = components.iter().map(|name| format!("{name}={}", layout(name))).collect();
        parts.join(",")
    }
}

/// What makes two requests the same.
fn fingerprint(spec: &v1::JobSpec, priority: i32, timeout: Option<Millis>) -> [u8; 32] {
    let urgency = Sha256::new().chain_update(priority.to_le_bytes()).chain_update(timeout.unwrap_or_default().to_le_bytes());
    Sha256::new().chain_update(urgency.finalize()).chain_update(spec.encode_to_vec()).finalize().into()
}

/// Text from outside, cut to a length that can be kept and shown.
pub(super) fn shortened(text: &str) -> String {
    text.chars().take(MAX_CAUSE_CHARS).collect()
}

/// A name from outside that may be nobody's, cut to the length of a name.
pub(super) fn name(text: &str) -> String {
    text.chars().take(MAX_NAME_CHARS).collect()
}
