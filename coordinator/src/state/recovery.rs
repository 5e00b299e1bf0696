//! What a new coordinator takes over: jobs from the store, and the ranks and tasks that workers still hold.
//!
//! For a moment after its start ([`SETTLE`]) it accepts jobs but forms no group and starts nothing: workers come back and
//! say what they hold. A group of which every rank came back in its newest epoch goes on; so does a job of which every task is
//! accounted for. All else begins a new epoch or a new try.

use std::collections::{BTreeMap, BTreeSet};

use proto::v1::{
    CancelTask, ControlFolder, ForgetJob, GroupRecord, HeldRank, HeldTask, Holding, JobRecord, JobState, LeaveGroup, TaskRef,
    control_request::Command, control_response::Report,
};

use super::{
    Millis, State, estimate,
    job::{Job, Task, TaskPhase},
    requeue::Why,
    tasks::End,
};
use crate::{checkpoints::Saved, placement::Members, plan::Plan};

/// How long a new coordinator waits for the workers of the one before.
pub const SETTLE: Millis = 2000;
/// How much longer it waits for the cards of its models, without which it knows no group.
const SETTLE_FOR_CARDS: Millis = 8000;

/// Kept while workers come back.
#[derive(Debug)]
pub(super) struct Settling {
    until: Millis,
    /// By worker.
    holdings: BTreeMap<String, Holding>,
    /// What workers said of tasks meanwhile, in order.
    reports: Vec<(String, Report)>,
}

/// What the checkpoint store has, by job.
pub type SavedSteps = BTreeMap<String, Vec<Saved>>;

impl State {
    /// Takes over from an earlier coordinator: records of jobs and groups in any order, and what is saved of jobs that are not
    /// over.
    pub fn recover(&mut self, now: Millis, records: Vec<JobRecord>, groups: Vec<GroupRecord>, mut saved: SavedSteps) {
        self.now = self.now.max(now);
        self.epochs = groups.into_iter().map(|record| (record.group_id, record.epoch)).collect();
        let term = self.settings.term;
        let mut jobs: Vec<Job> = records.into_iter().map(|record| Job::recovered(record, term)).collect();
        jobs.sort_by_cached_key(|job| (job.finished, job.number));
        self.jobs.reserve(jobs.len());
        for mut job in jobs {
            self.take_models_products(&mut job);
            for Saved { stage, step, products } in saved.remove(&job.id).unwrap_or_default() {
                if products != job.products {
                    job.saved.of_another_way = true;
                } else if step == 0 {
                    job.saved.outputs.insert(stage);
                } else {
                    job.saw_saved(&stage, step, self.now);
                }
            }
            job.plan = self.jobs.share(Plan::clone(&job.plan));
            self.watch_deadline(&job);
            if !job.is_over() {
                // In the order in which they came: their tags are made anew.
                let weight = self.tenants.limits(&job.tenant).weight;
                self.queue.add(&job.spec.model, job.priority, job.number, &job.tenant, estimate::pixel_steps(&job), weight);
            }
            self.jobs.add(job);
        }
        let until = self.now + SETTLE;
        self.settling = Some(Settling { until, holdings: BTreeMap::new(), reports: Vec::new() });
    }

    /// A job that is not over is computed as its model is multiplied now. What was computed of it in another way is no part of its
    /// pictures: the same seed gives the same bits in each way, and others where two are mixed.
    fn take_models_products(&self, job: &mut Job) {
        if let Some(model) = self.model(&job.spec.model).filter(|_| !job.is_over()) {
            job.products = model.config.products;
        }
    }

    /// A report that must wait until it is known whose it is.
    pub(super) fn set_aside(&mut self, worker_id: &str, report: Report) -> Option<Report> {
        let about_task = matches!(
            report,
            Report::TaskStarted(_)
                | Report::TaskProgress(_)
                | Report::TaskComputed(_)
                | Report::TaskDone(_)
                | Report::TaskFailed(_)
                | Report::TaskParked(_)
                | Report::GroupLost(_)
        );
        match &mut self.settling {
            Some(settling) if about_task => {
                settling.reports.push((worker_id.to_owned(), report));
                None
            }
            _ => Some(report),
        }
    }

    /// A worker says what it holds from before.
    pub(super) fn worker_holds(&mut self, worker_id: &str, holding: Holding) {
        if holding.draining {
            self.draining.insert(worker_id.to_owned());
            self.groups.members_changed(worker_id);
        }
        match &mut self.settling {
            Some(settling) => drop(settling.holdings.insert(worker_id.to_owned(), holding)),
            // Too late: what it held has begun anew, or will.
            None => self.give_up(worker_id, &holding),
        }
    }

    pub(super) fn forget_holding(&mut self, worker_id: &str) {
        if let Some(settling) = &mut self.settling {
            settling.holdings.remove(worker_id);
            settling.reports.retain(|(other, _)| other != worker_id);
        }
    }

    /// Ends the waiting when its time is over.
    pub(super) fn settle(&mut self) {
        let Some(settling) = &self.settling else {
            return;
        };
        let cards = self.workers.is_empty() || self.models.iter().all(|model| model.is_settled());
        if self.now < settling.until || (!cards && self.now < settling.until + SETTLE_FOR_CARDS) {
            return;
        }
        let Some(settling) = self.settling.take() else {
            return;
        };
        self.adopt_groups(&settling.holdings);
        self.adopt_jobs(&settling);
        for (worker, report) in settling.reports {
            self.report(&worker, report);
        }
    }

    /// Groups whose every rank came back ready in the newest epoch that was begun go on. One of an older epoch does not, though it
    /// be whole: members of the newer one may be at work where nobody sees them.
    fn adopt_groups(&mut self, holdings: &BTreeMap<String, Holding>) {
        let mut epochs: BTreeMap<(String, u64), Seats<'_>> = BTreeMap::new();
        for (worker, holding) in holdings {
            for rank in &holding.ranks {
                if let Some(join) = &rank.join {
                    let ranks = epochs.entry((join.group_id.clone(), join.epoch)).or_default();
                    ranks.insert(join.rank, (worker, rank));
                }
            }
        }
        // Newest epochs first: at most one of a group can be whole and fit.
        for ((group_id, epoch), ranks) in epochs.into_iter().rev() {
            if !self.try_adopt(&group_id, epoch, &ranks) {
                for (worker, _) in ranks.values() {
                    self.send(worker, Command::LeaveGroup(LeaveGroup { group_id: group_id.clone(), epoch }));
                }
            }
        }
    }

    fn try_adopt(&mut self, group_id: &str, epoch: u64, ranks: &Seats<'_>) -> bool {
        let Some(group) = self.groups.get(group_id).filter(|group| group.may_adopt(epoch)) else {
            return false;
        };
        let wanted = &group.wanted;
        let Some(model) = self.model(&wanted.model) else {
            return false;
        };
        let (paths, adapters) = (model.config.paths(), model.adapter_files());
        let (controls, fingerprint) = (model.control_folders(&wanted.component), model.fingerprint(&wanted.component));
        let fits = |rank: &HeldRank| {
            rank.ready
                && rank.join.as_ref().is_some_and(|join| {
                    join.layout.is_some_and(|layout| layout.is_same(&wanted.layout))
                        && join.component == wanted.component
                        && join.products() == wanted.products
                        && [&join.path, &join.refiner_path] == [&paths[0], &paths[1]]
                        && join.adapters == adapters
                        && same_controls(&join.controls, &controls)
                        && same_files(&join.fingerprint, &fingerprint)
                })
        };
        let whole = ranks.keys().copied().eq(0..wanted.size() as u32) && ranks.values().all(|(_, rank)| fits(rank));
        if whole {
            let members: Members = ranks.values().map(|(worker, _)| (*worker).to_owned()).collect();
            if let Some(group) = self.groups.get_mut(group_id) {
                group.adopt(epoch, members);
            }
        }
        whole
    }

    /// Jobs go on of which every task that is left is held, or was reported, by the leader of a group that goes on.
    fn adopt_jobs(&mut self, settling: &Settling) {
        let mut claims: BTreeMap<String, Vec<Claim>> = BTreeMap::new();
        for (worker, holding) in &settling.holdings {
            for held in &holding.tasks {
                if let Some(task) = held.task.clone() {
                    let claim = Claim { worker: worker.clone(), task: task.clone(), held: Some(held.clone()) };
                    claims.entry(task.job_id).or_default().push(claim);
                }
            }
        }
        // Workers keep how a task ended and tell it again to one who gives it again: no new try may bear such a number.
        let mut ended: BTreeMap<&str, u32> = BTreeMap::new();
        for (worker, report) in &settling.reports {
            let (task, is_done) = match report {
                Report::TaskDone(done) => (&done.task, true),
                Report::TaskFailed(failed) => (&failed.task, false),
                Report::TaskParked(parked) => (&parked.task, false),
                _ => continue,
            };
            let Some(task) = task else { continue };
            let newest = ended.entry(&task.job_id).or_default();
            *newest = task.attempt.max(*newest);
            let claims = claims.entry(task.job_id.clone()).or_default();
            if is_done && !claims.iter().any(|claim| claim.task == *task) {
                claims.push(Claim { worker: worker.clone(), task: task.clone(), held: None });
            }
        }
        let waiting: Vec<(u64, String)> =
            self.jobs.iter().filter(|job| !job.is_over()).map(|job| (job.number, job.id.clone())).collect();
        for (number, job_id) in waiting {
            let claims = claims.remove(&job_id).unwrap_or_default();
            let ended = ended.get(job_id.as_str()).copied();
            self.adopt_job(number, claims, ended);
        }
        for claim in claims.into_values().flatten() {
            self.give_up_task(&claim.worker, claim.task, true);
        }
    }

    /// `ended`: the newest try of which a task is known to have ended.
    fn adopt_job(&mut self, number: u64, claims: Vec<Claim>, ended: Option<u32>) {
        let newest = claims.iter().map(|claim| claim.task.attempt).max().max(ended);
        let (current, old): (Vec<Claim>, Vec<Claim>) = claims.into_iter().partition(|claim| Some(claim.task.attempt) == newest);
        for claim in old {
            self.give_up_task(&claim.worker, claim.task, false);
        }
        let Some(job) = self.jobs.get(number) else {
            return;
        };
        let cancelling = job.cancelling;
        let of_group = |claim: &&Claim| {
            // What an earlier coordinator had told to stop does not go on.
            let stops = claim.held.as_ref().is_some_and(|held| held.stopping);
            let group = self.groups.get(&claim.task.group_id).filter(|_| !stops);
            group.is_some_and(|group| group.epoch == claim.task.epoch && group.leader() == Some(claim.worker.as_str()))
        };
        let held: BTreeSet<&str> = current.iter().filter(of_group).map(|claim| claim.task.stage.as_str()).collect();
        // What waits for an input that nobody is to send any more waits for ever, though the input be stored: its sender was lost
        // between the two.
        let comes = |input: &String| {
            held.contains(input.as_str()) || current.iter().any(|claim| claim.held.is_none() && claim.task.stage == *input)
        };
        let starves = |claim: &Claim| {
            let waits = claim.held.as_ref().is_some_and(|held| !held.started);
            let inputs = job.plan.stage(&claim.task.stage).map_or(&[][..], |stage| &stage.inputs);
            waits && !inputs.iter().all(comes)
        };
        let whole = !held.is_empty()
            && job.remaining().stages.iter().all(|stage| held.contains(stage.id.as_str()))
            && !current.iter().any(starves);
        if whole && !cancelling {
            let known: Vec<Claim> = current.into_iter().filter(|claim| job.plan.stage(&claim.task.stage).is_some()).collect();
            self.take_over(number, known);
            return;
        }
        let begun = newest.is_some() || !job.saved.is_nothing();
        for claim in current {
            self.give_up_task(&claim.worker, claim.task, false);
        }
        if cancelling {
            self.end_job(number, End::Cancelled);
        } else if begun && let Some(job) = self.jobs.get_mut(number) {
            job.attempt = job.attempt.max(newest.unwrap_or_default());
            let unused = format!(", and what was done of it in another way than {} is not used", job.products);
            let unused = if job.saved.of_another_way { unused.as_str() } else { "" };
            job.wait_again(Why::Restarted, format!("a new coordinator leads{unused}"), self.now);
            self.job_changed(number);
        }
    }

    fn take_over(&mut self, number: u64, claims: Vec<Claim>) {
        let Some(job) = self.jobs.get_mut(number) else {
            return;
        };
        self.queue.take(&job.spec.model, number);
        job.attempt = claims.first().map_or(job.attempt, |claim| claim.task.attempt);
        job.placed = self.now;
        for claim in claims {
            let Claim { worker, task, held } = claim;
            let Some(group) = self.groups.get_mut(&task.group_id) else {
                continue;
            };
            group.tasks.insert((number, task.stage.clone()));
            group.pace.begin(self.now);
            job.told.insert(worker.clone());
            let mut mine = Task::new(task.group_id, task.epoch, worker, 0);
            let held = held.unwrap_or_default();
            if held.started {
                mine.phase = TaskPhase::Running;
            }
            job.tasks.insert(task.stage.clone(), mine);
            job.saw_saved(&task.stage, held.saved_step, self.now);
            if held.steps > 0 {
                job.stage_progressed(&task.stage, held.step, held.steps, self.now);
            }
        }
        if job.has_task(TaskPhase::Running) {
            job.enter(JobState::Running, self.now);
        }
        self.note_placed(number);
        self.job_changed(number);
    }

    fn give_up(&mut self, worker_id: &str, holding: &Holding) {
        for join in holding.ranks.iter().filter_map(|rank| rank.join.as_ref()) {
            let (group_id, epoch) = (join.group_id.clone(), join.epoch);
            self.send(worker_id, Command::LeaveGroup(LeaveGroup { group_id, epoch }));
        }
        for HeldTask { task, .. } in &holding.tasks {
            if let Some(task) = task.clone() {
                let over = self.jobs.by_id(&task.job_id).is_none_or(Job::is_over);
                self.give_up_task(worker_id, task, over);
            }
        }
    }

    pub(super) fn give_up_task(&mut self, worker_id: &str, task: TaskRef, forget: bool) {
        let job_id = task.job_id.clone();
        self.send(worker_id, Command::CancelTask(CancelTask { task: Some(task) }));
        if forget {
            self.send(worker_id, Command::ForgetJob(ForgetJob { job_id }));
        } else if let Some(number) = self.jobs.by_id(&job_id).map(|job| job.number)
            && let Some(job) = self.jobs.get_mut(number)
        {
            job.told.insert(worker_id.to_owned());
        }
    }
}

/// Whether two fingerprints are of the same files, as far as is known: programs of before fingerprints say none.
fn same_files(one: &str, other: &str) -> bool {
    one.is_empty() || other.is_empty() || one == other
}

fn same_controls(held: &[ControlFolder], known: &[ControlFolder]) -> bool {
    let same = |(held, known): (&ControlFolder, &ControlFolder)| {
        [&held.name, &held.path, &held.digest] == [&known.name, &known.path, &known.digest]
            && same_files(&held.fingerprint, &known.fingerprint)
    };
    held.len() == known.len() && held.iter().zip(known).all(same)
}

/// The ranks of one epoch that came back, with the worker of each.
type Seats<'a> = BTreeMap<u32, (&'a str, &'a HeldRank)>;

/// A task that a worker holds or has reported.
struct Claim {
    worker: String,
    task: TaskRef,
    held: Option<HeldTask>,
}
