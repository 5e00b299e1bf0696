//! All jobs: by number, by id, by the client's request id, and the finished ones by age.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, VecDeque},
    hash::{BuildHasher, RandomState},
    sync::Arc,
};

use hashbrown::HashTable;

use super::{Millis, job::Job};
use crate::{config::Limits, plan::Plan};

/// Every job that can be asked for.
#[derive(Debug, Default)]
pub(super) struct Jobs {
    /// Boxed: nodes of a tree that grows at its end are half empty.
    by_number: BTreeMap<u64, Box<Job>>,
    /// Numbers by what jobs have themselves: there may be many, and a copy of each name would be a tenth of all that is kept.
    by_id: HashTable<u64>,
    /// By tenant and its id for the request: no tenant learns of another's.
    by_request: HashTable<u64>,
    hasher: RandomState,
    by_tenant: HashMap<Arc<str>, Numbers>,
    /// Oldest end first.
    finished: VecDeque<u64>,
    /// Those of them whose pictures are kept, in the same order.
    pictured: VecDeque<u64>,
    /// Bytes of the pictures of finished jobs that are kept.
    result_bytes: u64,
    last_number: u64,
    /// One of each kind that any job has had: a few for each model.
    plans: Vec<Arc<Plan>>,
    /// Priorities of the jobs that are placed, with how many there are, by model.
    running: BTreeMap<String, BTreeMap<i32, usize>>,
}

/// Of the store of pictures, 1 / so many is for results under way, beside those that are kept and the half that clients may fill.
const UNDER_WAY_PART: u64 = 16;

/// Bytes of a store of pictures that those of finished jobs may keep.
pub(super) fn most_kept(total_blob_bytes: u64) -> u64 {
    total_blob_bytes / 2 - total_blob_bytes / UNDER_WAY_PART
}

/// How many numbers of a tenant are looked through at least before those are dropped whose job is forgotten.
const MANY: usize = 64;

/// Of a tenant's jobs, and of some that are forgotten: those are dropped when there are twice as many as last time, so that each is
/// looked at about once.
#[derive(Debug, Default)]
struct Numbers {
    all: BTreeSet<u64>,
    kept: usize,
}

impl Numbers {
    fn add(&mut self, number: u64, known: &BTreeMap<u64, Box<Job>>) {
        self.all.insert(number);
        if self.all.len() >= MANY.max(2 * self.kept) {
            self.all.retain(|number| known.contains_key(number));
            self.kept = self.all.len();
        }
    }
}

impl Jobs {
    /// The plan, as all jobs with the same one hold it.
    pub(super) fn share(&mut self, plan: Plan) -> Arc<Plan> {
        if let Some(known) = self.plans.iter().find(|known| ***known == plan) {
            return known.clone();
        }
        let plan = Arc::new(plan);
        self.plans.push(plan.clone());
        plan
    }

    /// The number of the next job.
    pub(super) fn next_number(&self) -> u64 {
        self.last_number + 1
    }

    /// Makes room for so many, which come one after the other.
    pub(super) fn reserve(&mut self, jobs: usize) {
        // The tables are empty: nothing is hashed again.
        self.by_id.reserve(jobs, |_| 0);
        self.by_request.reserve(jobs, |_| 0);
    }

    /// Takes a job in; its number is above all others' or it was recovered.
    pub(super) fn add(&mut self, job: Job) {
        let number = job.number;
        self.last_number = self.last_number.max(number);
        let over = job.is_over();
        let (of_id, of_request) = (self.id_hash(&job.id), self.request_hash(&job.tenant, &job.request_id));
        let tenant = job.tenant.clone();
        self.by_number.insert(number, Box::new(job));
        self.by_tenant.entry(tenant).or_default().add(number, &self.by_number);
        let (jobs, hasher) = (&self.by_number, &self.hasher);
        let again = |number: &u64| jobs.get(number).map_or(0, |job| hasher.hash_one(job.id.as_str()));
        self.by_id.insert_unique(of_id, number, again);
        let again = |number: &u64| jobs.get(number).map_or(0, |job| hasher.hash_one((&*job.tenant, job.request_id.as_str())));
        self.by_request.insert_unique(of_request, number, again);
        if over {
            self.finished(number);
        }
    }

    fn id_hash(&self, id: &str) -> u64 {
        self.hasher.hash_one(id)
    }

    fn request_hash(&self, tenant: &str, request_id: &str) -> u64 {
        self.hasher.hash_one((tenant, request_id))
    }

    pub(super) fn get(&self, number: u64) -> Option<&Job> {
        self.by_number.get(&number).map(Box::as_ref)
    }

    pub(super) fn get_mut(&mut self, number: u64) -> Option<&mut Job> {
        self.by_number.get_mut(&number).map(Box::as_mut)
    }

    pub(super) fn by_id(&self, id: &str) -> Option<&Job> {
        let is = |number: &u64| self.get(*number).is_some_and(|job| job.id == id);
        self.by_id.find(self.id_hash(id), is).and_then(|number| self.get(*number))
    }

    pub(super) fn by_request(&self, tenant: &str, request_id: &str) -> Option<&Job> {
        let is = |number: &u64| self.get(*number).is_some_and(|job| *job.tenant == *tenant && job.request_id == request_id);
        self.by_request.find(self.request_hash(tenant, request_id), is).and_then(|number| self.get(*number))
    }

    /// A tenant's, newest first, beginning below `number`.
    pub(super) fn newest_before(&self, tenant: &str, number: u64) -> impl Iterator<Item = &Job> {
        let numbers = self.by_tenant.get(tenant).into_iter();
        numbers.flat_map(move |numbers| numbers.all.range(..number).rev()).filter_map(|number| self.get(*number))
    }

    /// Of all tenants, newest first, beginning below `number`.
    pub(super) fn all_newest_before(&self, number: u64) -> impl Iterator<Item = &Job> {
        self.by_number.range(..number).rev().map(|(_, job)| &**job)
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = &Job> {
        self.by_number.values().map(Box::as_ref)
    }

    /// The job was placed.
    pub(super) fn placed(&mut self, number: u64) {
        if let Some(job) = self.by_number.get(&number) {
            *self.running.entry(job.spec.model.clone()).or_default().entry(job.priority).or_default() += 1;
        }
    }

    /// The job, which was placed, is not any more.
    pub(super) fn unplaced(&mut self, number: u64) {
        if let Some(job) = self.by_number.get(&number).map(Box::as_ref)
            && let Some(running) = self.running.get_mut(&job.spec.model)
            && let Some(count) = running.get_mut(&job.priority)
        {
            *count -= 1;
            if *count == 0 {
                running.remove(&job.priority);
            }
        }
    }

    /// How many jobs of `model` are placed.
    pub(super) fn running(&self, model: &str) -> usize {
        self.running.get(model).map_or(0, |running| running.values().sum())
    }

    /// The lowest priority among the jobs of `model` that are placed.
    pub(super) fn least_urgent_running(&self, model: &str) -> Option<i32> {
        self.running.get(model)?.first_key_value().map(|(priority, _)| *priority)
    }

    /// The job has come to its end; from now on it ages.
    pub(super) fn finished(&mut self, number: u64) {
        self.finished.push_back(number);
        let bytes = self.get(number).filter(|job| !job.pictures_dropped).map_or(0, Job::result_bytes);
        if bytes > 0 {
            self.pictured.push_back(number);
            self.result_bytes += bytes;
        }
    }

    /// Bytes of the pictures of finished jobs that are kept.
    #[cfg(test)]
    pub(super) fn result_bytes(&self) -> u64 {
        self.result_bytes
    }

    /// Gives up pictures of finished jobs, the oldest first, until all that are kept take no more than they may of a store of
    /// `total_blob_bytes`. The jobs themselves stay, and so do their request ids. Says whose pictures they were.
    pub(super) fn drop_pictures(&mut self, total_blob_bytes: u64) -> Vec<u64> {
        let most = most_kept(total_blob_bytes);
        let mut dropped = Vec::new();
        // The newest are kept whatever they weigh: their client has not read them yet.
        while self.result_bytes > most && self.pictured.len() > 1 {
            dropped.extend(self.drop_oldest_pictures());
        }
        dropped
    }

    fn drop_oldest_pictures(&mut self) -> Option<u64> {
        let number = self.pictured.pop_front()?;
        let job = self.by_number.get_mut(&number)?;
        self.result_bytes = self.result_bytes.saturating_sub(job.result_bytes());
        job.pictures_dropped = true;
        Some(number)
    }

    /// Forgets finished jobs that are too old or too many. Gives back their ids.
    pub(super) fn forget_old(&mut self, now: Millis, limits: &Limits) -> Vec<String> {
        let mut forgotten = Vec::new();
        while let Some(job) = self.finished.front().and_then(|number| self.by_number.get(number)) {
            let age = now.saturating_sub(job.finished.unwrap_or(now));
            if age < limits.finished_job_age && self.finished.len() <= limits.finished_jobs {
                break;
            }
            forgotten.push(job.id.clone());
            let (of_id, of_request) = (self.id_hash(&job.id), self.request_hash(&job.tenant, &job.request_id));
            if let Some(number) = self.finished.pop_front() {
                if self.pictured.front() == Some(&number) {
                    self.drop_oldest_pictures();
                }
                for (index, hash) in [(&mut self.by_id, of_id), (&mut self.by_request, of_request)] {
                    if let Ok(entry) = index.find_entry(hash, |known| *known == number) {
                        entry.remove();
                    }
                }
                self.by_number.remove(&number);
            }
        }
        forgotten
    }
}
