//! What was seen, and what must be true of it.

use std::{collections::BTreeMap, time::Duration};

use coordinator::stand_in::{POISON, picture};
use proto::v1::{CreateJobRequest, GroupState, Job, JobEvent, JobSpec, JobState, ModelStatus, job_event::Kind};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

/// What a run came to.
#[derive(Debug)]
pub(crate) struct Outcome {
    /// What was seen, with its time.
    pub(crate) history: Vec<String>,
    /// What was promised and not kept.
    pub(crate) violations: Vec<String>,
    /// Simulated time.
    pub(crate) simulated: Duration,
    /// Jobs that were acknowledged.
    pub(crate) accepted: u64,
    /// Those of them that have a picture.
    pub(crate) succeeded: u64,
    /// What went wrong.
    pub(crate) faults: u64,
    /// How often the coordinator started.
    pub(crate) lives: u64,
}

impl Outcome {
    /// For another process.
    pub(crate) fn to_json(&self) -> Value {
        let Self { history, violations, simulated, accepted, succeeded, faults, lives } = self;
        json!([history, violations, simulated.as_millis() as u64, accepted, succeeded, faults, lives])
    }

    /// From another process.
    pub(crate) fn from_json(text: &str) -> Option<Self> {
        let (history, violations, simulated, accepted, succeeded, faults, lives) = serde_json::from_str(text).ok()?;
        let simulated = Duration::from_millis(simulated);
        Some(Self { history, violations, simulated, accepted, succeeded, faults, lives })
    }

    /// The same for the same history.
    pub(crate) fn hash(&self) -> String {
        let digest = self.history.iter().fold(Sha256::new(), |hash, line| hash.chain_update(line).chain_update("\n"));
        format!("{:x}", digest.finalize())
    }
}

/// What is known of an accepted job.
#[derive(Debug)]
struct Known {
    id: String,
    spec: JobSpec,
    /// It must be over within a time.
    timed: bool,
    /// The newest event that was watched.
    watched: u64,
    /// How it ended: the job as it was first seen to be over, and when.
    over: Option<(Duration, Job)>,
    /// A cancellation was acknowledged before it was over.
    cancelled: bool,
}

/// What clients saw, checked as it is seen.
#[derive(Debug)]
pub(crate) struct History {
    /// Where they look for a coordinator: first where they found one last.
    coordinators: Vec<&'static str>,
    /// Who leads, as far as anybody knows, and in which term.
    leader: (&'static str, u64),
    lines: Vec<String>,
    violations: Vec<String>,
    /// By request id.
    jobs: BTreeMap<String, Known>,
    /// The newest epoch that was seen of each group, and who was in it.
    epochs: BTreeMap<String, (u64, Vec<String>)>,
}

fn is_over(job: &Job) -> bool {
    matches!(job.state(), JobState::Succeeded | JobState::Failed | JobState::Cancelled)
}

/// What may not change once a job is over.
fn ending(job: &Job) -> impl PartialEq + std::fmt::Debug {
    (job.state, job.failure.clone(), job.images.clone(), job.finish_time)
}

impl History {
    /// Nothing was seen yet.
    pub(crate) fn new(coordinators: &[&'static str]) -> Self {
        let (lines, violations, jobs, epochs) = Default::default();
        Self { coordinators: coordinators.to_vec(), leader: (coordinators[0], 0), lines, violations, jobs, epochs }
    }

    /// Where to look for a coordinator, in order.
    pub(crate) fn coordinators(&self) -> Vec<&'static str> {
        self.coordinators.clone()
    }

    /// This one answers.
    pub(crate) fn answers(&mut self, name: &str) {
        self.coordinators.sort_by_key(|other| *other != name);
    }

    /// A coordinator leads from now on.
    pub(crate) fn leads(&mut self, name: &'static str, term: u64) {
        self.saw(format!("{name} leads in term {term}"));
        if term <= self.leader.1 {
            self.violation(format!("{name} leads in term {term}, after {:?}", self.leader));
        }
        self.leader = (name, term);
    }

    /// What it says may be old, for another leads and it has not noticed yet. It changes nothing any more: what it accepts counts.
    fn is_deposed(&self, from: &str) -> bool {
        from != self.leader.0
    }

    /// The simulated time.
    pub(crate) fn now() -> Duration {
        turmoil::sim_elapsed().unwrap_or_default()
    }

    /// Writes down what happened.
    pub(crate) fn note(&mut self, at: Duration, what: String) {
        self.lines.push(format!("{:>7} ms  {what}", at.as_millis()));
    }

    /// As [`Self::note`], now.
    pub(crate) fn saw(&mut self, what: String) {
        self.note(Self::now(), what);
    }

    /// Something is not as promised.
    pub(crate) fn violation(&mut self, what: String) {
        self.saw(format!("VIOLATION: {what}"));
        self.violations.push(what);
    }

    /// A submission was acknowledged.
    pub(crate) fn accepted(&mut self, from: &str, request: &CreateJobRequest, asked: Duration, job: &Job) {
        let request_id = request.request_id.as_str();
        self.saw(format!("accepted {request_id} as {} {}", job.id, job.state().as_str_name()));
        match self.jobs.get(request_id) {
            None => {
                let (spec, timed) = (request.spec.clone().unwrap_or_default(), request.timeout.is_some());
                let known = Known { id: job.id.clone(), spec, timed, watched: 0, over: None, cancelled: false };
                self.jobs.insert(request_id.to_owned(), known);
            }
            Some(known) if known.id != job.id => {
                let first = known.id.clone();
                self.violation(format!("{request_id} was accepted as {first} and as {}", job.id));
            }
            Some(_) => {}
        }
        self.state(from, request_id, asked, job);
    }

    /// The id of an accepted job.
    pub(crate) fn id(&self, request_id: &str) -> Option<String> {
        self.jobs.get(request_id).map(|known| known.id.clone())
    }

    /// An accepted job as it was read.
    pub(crate) fn read(&mut self, from: &str, request_id: &str, asked: Duration, job: &Job) {
        let failure = job.failure.as_ref().map(|failure| failure.reason.as_str()).unwrap_or_default();
        self.saw(format!(
            "read {request_id}: {} {failure} attempt {} sequence {}",
            job.state().as_str_name(),
            job.attempt,
            job.sequence
        ));
        self.state(from, request_id, asked, job);
    }

    /// An event of an accepted job came, after all those before it.
    pub(crate) fn event(&mut self, from: &str, request_id: &str, event: &JobEvent) {
        let kind = event.kind.as_ref().map(|kind| match kind {
            Kind::StateChanged(job) => format!("is {}", job.state().as_str_name()),
            other => format!("{other:?}"),
        });
        self.saw(format!("event {} of {request_id}: {}", event.sequence, kind.unwrap_or_default()));
        if let Some(known) = self.jobs.get_mut(request_id) {
            let before = known.watched;
            known.watched = before.max(event.sequence);
            if event.sequence <= before {
                self.violation(format!("{request_id}: event {} came after event {before}", event.sequence));
            }
        }
        if let Some(Kind::StateChanged(job)) = &event.kind {
            // It tells what was.
            self.state(from, request_id, Duration::ZERO, job);
        }
    }

    /// The newest event that was watched of a job.
    pub(crate) fn watched(&self, request_id: &str) -> u64 {
        self.jobs.get(request_id).map_or(0, |known| known.watched)
    }

    /// A cancellation was acknowledged.
    pub(crate) fn cancelled(&mut self, from: &str, request_id: &str, asked: Duration, job: &Job) {
        self.saw(format!("cancelled {request_id}: {}", job.state().as_str_name()));
        self.state(from, request_id, asked, job);
        if let Some(known) = self.jobs.get_mut(request_id)
            && known.over.is_none()
        {
            known.cancelled = true;
        }
    }

    /// Nobody has heard of an accepted job.
    pub(crate) fn forgotten(&mut self, from: &str, request_id: &str, by: &str) {
        if self.is_deposed(from) {
            return;
        }
        self.violation(format!("{request_id} was accepted and is not known to {by}"));
    }

    /// What was answered to a call that began at `asked`: an answer may be older than what another call has told.
    fn state(&mut self, from: &str, request_id: &str, asked: Duration, job: &Job) {
        let deposed = self.is_deposed(from);
        let Some(known) = self.jobs.get_mut(request_id) else { return };
        let mut wrong = Vec::new();
        if known.id != job.id || job.request_id != request_id {
            wrong.push(format!("{request_id} is {}, and was given {}", known.id, job.id));
        }
        match &known.over {
            Some((at, over)) if (is_over(job) || (asked > *at && !deposed)) && ending(over) != ending(job) => {
                wrong.push(format!("{request_id} was over as {:?} and is now {:?}", ending(over), ending(job)));
            }
            None if is_over(job) => {
                known.over = Some((Self::now(), job.clone()));
                wrong.extend(wrong_end(known, job).map(|problem| format!("{request_id}: {problem}")));
            }
            _ => {}
        }
        wrong.into_iter().for_each(|problem| self.violation(problem));
    }

    /// The cluster was asked about its groups.
    pub(crate) fn models(&mut self, from: &str, models: &[ModelStatus]) {
        if self.is_deposed(from) {
            return;
        }
        for group in models.iter().flat_map(|model| &model.groups) {
            // Without members there is no epoch.
            if group.state() == GroupState::Waiting {
                continue;
            }
            let now = (group.epoch, group.worker_ids.clone());
            let before = self.epochs.insert(group.group_id.clone(), now.clone());
            let Some(before) = before else { continue };
            if now.0 < before.0 || (now.0 == before.0 && now.1 != before.1) {
                self.violation(format!("{}: epoch {before:?}, then {now:?}", group.group_id));
            }
            if now != before {
                self.saw(format!("{}: epoch {now:?}", group.group_id));
            }
        }
    }

    /// Accepted jobs that are not over.
    pub(crate) fn unfinished(&self) -> Vec<String> {
        self.jobs.iter().filter(|(_, known)| known.over.is_none()).map(|(request_id, _)| request_id.clone()).collect()
    }

    /// Request ids and ids of accepted jobs.
    pub(crate) fn ids(&self) -> Vec<(String, String)> {
        self.jobs.iter().map(|(request_id, known)| (request_id.clone(), known.id.clone())).collect()
    }

    /// A job has its picture.
    pub(crate) fn has_succeeded(&self, request_id: &str) -> bool {
        self.jobs.get(request_id).and_then(|known| known.over.as_ref()).is_some_and(|(_, job)| job.state() == JobState::Succeeded)
    }

    /// All of it.
    pub(crate) fn outcome(self, simulated: Duration, faults: u64, lives: u64) -> Outcome {
        let succeeded = self.jobs.keys().filter(|request_id| self.has_succeeded(request_id)).count() as u64;
        let accepted = self.jobs.len() as u64;
        Outcome { history: self.lines, violations: self.violations, simulated, accepted, succeeded, faults, lives }
    }
}

/// What is wrong with how a job ended.
fn wrong_end(known: &Known, job: &Job) -> Option<String> {
    // A picture that was there already is handed over.
    if known.cancelled && job.state() == JobState::Failed {
        return Some(format!("its cancellation was acknowledged, it is {}", job.state().as_str_name()));
    }
    match job.state() {
        JobState::Succeeded if known.spec.prompt.contains(POISON) => Some("a poisoned job has a picture".into()),
        JobState::Succeeded => {
            let right = format!("{:x}", Sha256::digest(picture(&known.spec, job.products())));
            let given: Vec<_> = job.images.iter().map(|image| image.blob_id.clone()).collect();
            (given != [right.as_str()]).then(|| format!("its picture is {given:?} and should be {right}"))
        }
        JobState::Failed => {
            let reason = job.failure.as_ref().map(|failure| failure.reason.as_str()).unwrap_or_default();
            let expected = reason == "TRIES_EXHAUSTED" || (known.timed && reason == "DEADLINE_EXCEEDED");
            (!expected).then(|| format!("it failed with {reason:?}"))
        }
        _ => None,
    }
}
