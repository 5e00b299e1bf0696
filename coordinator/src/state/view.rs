//! What can be asked of the state. Nothing here changes it.

use std::collections::{BTreeMap, BTreeSet};

use prost::Message;
use proto::v1::{self, GroupState, JobEvent, ModelStatus, Registration, WorkerStatus};

use super::{State, group::Group, job::Job, model::Model, work::name};
use crate::{
    error::{Error, Result},
    request::blob_ids,
};

/// Events that a watcher gets in one reading.
pub const EVENTS_PER_PAGE: usize = 256;
/// Newest events that are told to all who watch: more than come at once.
const NEWEST_EVENTS: u64 = 8;
/// Jobs on a page when the client does not say.
const DEFAULT_PAGE: u32 = 50;
/// Jobs on a page at most.
const MAX_PAGE: u32 = 1000;
/// Bytes of the jobs on a page, so that prompts of any length fit one message.
const MAX_PAGE_BYTES: usize = proto::MAX_MESSAGE_BYTES * 3 / 4;

/// What happened to a job after some event.
#[derive(Debug)]
pub struct EventPage {
    /// Oldest first.
    pub events: Vec<JobEvent>,
    /// Nothing more will come.
    pub over: bool,
}

/// Who looks at jobs.
#[derive(Debug, Clone, Copy)]
pub struct Viewer<'a> {
    /// Whose jobs it sees whole.
    pub tenant: &'a str,
    /// It sees those of all others too, though not what they are to show.
    pub is_operator: bool,
}

impl<'a> From<&'a str> for Viewer<'a> {
    /// A tenant like any other.
    fn from(tenant: &'a str) -> Self {
        Self { tenant, is_operator: false }
    }
}

impl Viewer<'_> {
    fn sees(&self, job: &Job) -> bool {
        self.is_operator || *job.tenant == *self.tenant
    }

    /// Takes out what the viewer is not to see: prompts of others.
    pub fn hide(&self, job: &mut v1::Job) {
        if job.tenant == self.tenant {
            return;
        }
        if let Some(spec) = &mut job.spec {
            spec.prompt.clear();
            (spec.prompt_2, spec.prompt_3) = (None, None);
            (spec.negative_prompt, spec.negative_prompt_2, spec.negative_prompt_3) = (None, None, None);
        }
    }
}

impl State {
    /// The job as it is now.
    pub fn job(&self, job_id: &str) -> Result<v1::Job> {
        self.find(job_id).map(Job::view)
    }

    /// Whether the job is the viewer's, or at least to be seen by it.
    ///
    /// # Errors
    /// [`Error::JobNotFound`] if not: nobody learns what others have.
    pub fn check_owner<'a>(&self, viewer: impl Into<Viewer<'a>>, job_id: &str) -> Result<()> {
        let job = self.find(job_id)?;
        if viewer.into().sees(job) { Ok(()) } else { Err(Error::JobNotFound(name(job_id))) }
    }

    /// The job as the viewer may see it.
    ///
    /// # Errors
    /// As [`Self::check_owner`].
    pub fn job_seen_by<'a>(&self, viewer: impl Into<Viewer<'a>>, job_id: &str) -> Result<v1::Job> {
        let viewer = viewer.into();
        self.check_owner(viewer, job_id)?;
        let mut job = self.job(job_id)?;
        viewer.hide(&mut job);
        Ok(job)
    }

    /// Whether a job of the tenant, which can be asked for, has taken or given this blob.
    pub fn has_blob(&self, tenant: &str, blob_id: &str) -> bool {
        let names = |job: &Job| {
            let given = job.images.iter().any(|image| image.blob_id == blob_id);
            given || blob_ids(&job.spec).any(|id| id == blob_id)
        };
        // Newest first: that is what is asked for.
        self.jobs.newest_before(tenant, u64::MAX).any(names)
    }

    /// A page of the jobs that the viewer sees, newest first, and the token of the next page.
    pub fn jobs<'a>(&self, viewer: impl Into<Viewer<'a>>, page_size: u32, page_token: &str) -> Result<(Vec<v1::Job>, String)> {
        let viewer = viewer.into();
        let below = match page_token {
            "" => u64::MAX,
            token => token.parse().map_err(|_| Error::invalid("page_token", "must be a next_page_token"))?,
        };
        let most = if page_size == 0 { DEFAULT_PAGE } else { page_size.min(MAX_PAGE) } as usize;
        let mut page: Vec<v1::Job> = Vec::new();
        let mut bytes = 0;
        let mut last = below;
        // Who sees all need not find one tenant's among them.
        let seen: Box<dyn Iterator<Item = &Job>> = match viewer.is_operator {
            true => Box::new(self.jobs.all_newest_before(below)),
            false => Box::new(self.jobs.newest_before(viewer.tenant, below)),
        };
        for job in seen {
            let mut view = job.view();
            viewer.hide(&mut view);
            bytes += view.encoded_len();
            if page.len() == most || (bytes > MAX_PAGE_BYTES && !page.is_empty()) {
                return Ok((page, last.to_string()));
            }
            last = job.number;
            page.push(view);
        }
        Ok((page, String::new()))
    }

    /// The job's events after `sequence`, as many as fit a page.
    pub fn events_after(&self, job_id: &str, sequence: u64) -> Result<EventPage> {
        let job = self.find(job_id)?;
        let events: Vec<JobEvent> = job.events_after(sequence).take(EVENTS_PER_PAGE).collect();
        let reached = events.last().map_or(sequence, |event| event.sequence);
        Ok(EventPage { over: job.is_over() && reached >= job.sequence(), events })
    }

    /// The job's newest events: the sequence number they come after, and all that came after it.
    pub fn newest_events(&self, job_id: &str) -> Result<(u64, EventPage)> {
        let after = self.find(job_id)?.sequence().saturating_sub(NEWEST_EVENTS);
        Ok((after, self.events_after(job_id, after)?))
    }

    /// The models, in the order of models.toml.
    pub fn models(&self) -> Vec<ModelStatus> {
        self.models
            .iter()
            .map(|model| ModelStatus {
                name: model.config.name.clone(),
                card: model.card.clone(),
                ready: self.is_ready(model),
                problem: self.problem(model),
                broken: !model.problem.is_empty(),
                groups: self.groups_of(model).map(Group::status).collect(),
                products: model.config.products as i32,
            })
            .collect()
    }

    /// The workers, by id.
    pub fn workers(&self) -> Vec<WorkerStatus> {
        let mut ranks: BTreeMap<&str, Vec<String>> = BTreeMap::new();
        for (id, group) in self.groups.iter() {
            for (rank, member) in group.members.iter().enumerate() {
                ranks.entry(member).or_default().push(format!("{id}/{rank}"));
            }
        }
        self.workers
            .values()
            .map(|worker| WorkerStatus {
                worker_id: worker.worker_id.clone(),
                address: worker.address.clone(),
                device: worker.device.clone(),
                labels: worker.labels.clone(),
                ranks: ranks.remove(worker.worker_id.as_str()).unwrap_or_default(),
                products: worker.products.clone(),
            })
            .collect()
    }

    /// (Worker, host:port of its metrics), of those that have any.
    pub fn metrics_addresses(&self) -> Vec<(String, String)> {
        let of = |worker: &Registration| (worker.worker_id.clone(), worker.metrics_address.clone());
        self.workers.values().filter(|worker| !worker.metrics_address.is_empty()).map(of).collect()
    }

    /// Blobs that jobs need: what those begin with that are not over, and what was made and not given up.
    pub fn blobs_in_use(&self) -> BTreeSet<String> {
        let mut in_use = BTreeSet::new();
        for job in self.jobs.iter() {
            // A job that is over is not begun anew.
            let inputs = blob_ids(&job.spec).filter(|_| !job.is_over());
            let results = job.images.iter().filter(|_| !job.pictures_dropped).map(|image| image.blob_id.as_str());
            in_use.extend(inputs.chain(results).filter(|id| !id.is_empty()).map(str::to_owned));
        }
        in_use
    }

    /// Reports of an epoch or an attempt that is over, since the start.
    pub fn stale_reports(&self) -> u64 {
        self.stale_reports
    }

    /// Every component has a group that is ready.
    pub(super) fn is_ready(&self, model: &Model) -> bool {
        let Some(card) = &model.card else {
            return false;
        };
        card.components.iter().all(|component| self.groups.is_ready(&model.config.name, &component.name))
    }

    fn problem(&self, model: &Model) -> String {
        if !model.problem.is_empty() || self.is_ready(model) {
            return model.problem.clone();
        }
        if model.card.is_none() {
            return if self.workers.is_empty() { "no worker is there" } else { "a worker reads its directory" }.into();
        }
        if self.settling.is_some() {
            return "this coordinator waits for the workers of the one before".into();
        }
        // A replica that waits for workers to come is no problem while another one serves.
        let is_missed = |group: &&Group| !self.groups.is_ready(&group.wanted.model, &group.wanted.component);
        let unready = self.groups_of(model).find(is_missed);
        unready.map(|group| self.group_problem(group)).unwrap_or_default()
    }

    fn group_problem(&self, group: &Group) -> String {
        let id = &group.wanted.id;
        let others = self.groups.iter().filter(|(other, other_group)| *other != id && group.wanted.excludes(&other_group.wanted));
        let taken: BTreeSet<&String> = others.flat_map(|(_, other)| &other.members).collect();
        let fits = |(id, worker): &(&String, &Registration)| group.wanted.accepts(worker) && !taken.contains(id);
        let eligible = self.workers.iter().filter(fits).count();
        let needed = if group.wanted.colocate { 1 } else { group.wanted.size() };
        match group.phase {
            GroupState::Waiting if eligible < needed => {
                let labels: Vec<String> = group.wanted.selector.iter().map(|(label, value)| format!("{label}={value}")).collect();
                let matching = if labels.is_empty() { String::new() } else { format!(" with {}", labels.join(",")) };
                let products = group.wanted.products;
                format!("{id}: needs {needed} workers{matching} that can multiply in {products}, {eligible} are free")
            }
            _ if !group.problem.is_empty() => format!("{id}: {}", group.problem),
            _ => format!("{id}: its ranks are loading"),
        }
    }

    fn groups_of<'a>(&'a self, model: &'a Model) -> impl Iterator<Item = &'a Group> {
        model.groups.iter().filter_map(|id| self.groups.get(id))
    }

    fn find(&self, job_id: &str) -> Result<&Job> {
        self.jobs.by_id(job_id).ok_or_else(|| Error::JobNotFound(name(job_id)))
    }
}
