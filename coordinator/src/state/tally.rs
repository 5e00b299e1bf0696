//! What is counted as it happens, for [`State::measure`](super::State::measure). Labels are names that an operator chose or words
//! of ours: what comes from elsewhere is counted as [`OTHER`].

use std::collections::BTreeMap;

use proto::v1::{JobState, StageKind};
use telemetry::{Histogram, LONG};

use super::{Millis, estimate, job::Job, requeue::Why};
use crate::plan::Stage;

/// Reasons for which jobs fail.
pub(super) const FAILURES: [&str; 13] = [
    "ADAPTER_UNUSABLE",
    "CANCELLED",
    "CHECKPOINT_LOST",
    "CONTROL_UNUSABLE",
    "DEADLINE_EXCEEDED",
    "INTERNAL",
    "INVALID_IMAGE",
    "INVALID_REQUEST",
    "OVERLOADED",
    "PAYLOAD_REFUSED",
    "PEER_LOST",
    "STORE_UNAVAILABLE",
    "TRIES_EXHAUSTED",
];
/// Any other reason.
pub(super) const OTHER: &str = "OTHER";
/// Seconds that a stage of a job is taken for while no job of its model has been through it: long enough that an autoscaler that
/// starts from no worker starts one.
const UNKNOWN_SECONDS: f64 = 10.0;
/// Weight of the newest stage in what a stage usually takes.
const NEWEST: f64 = 0.2;

/// A model and one more word.
type Pair = (String, &'static str);
/// A model and the id of a stage of its card.
type ModelStage = (String, String);

/// Counts since this coordinator began.
#[derive(Debug, Default)]
pub(super) struct Tally {
    pub(super) accepted: BTreeMap<String, u64>,
    pub(super) ended: BTreeMap<Pair, u64>,
    pub(super) failed: BTreeMap<Pair, u64>,
    pub(super) requeued: BTreeMap<Pair, u64>,
    /// Ends of epochs, by model, component, and whether a worker had asked for it.
    pub(super) epochs_ended: BTreeMap<(String, String, bool), u64>,
    pub(super) waited: BTreeMap<String, Histogram>,
    pub(super) took: BTreeMap<String, Histogram>,
    pub(super) stages: BTreeMap<ModelStage, Histogram>,
    /// Seconds for one unit of work.
    costs: BTreeMap<ModelStage, f64>,
}

impl Tally {
    pub(super) fn accepted(&mut self, model: &str) {
        *self.accepted.entry(model.to_owned()).or_default() += 1;
    }

    /// A job that had waited so long has its groups.
    pub(super) fn placed(&mut self, model: &str, waited: Millis) {
        observe(&mut self.waited, model.to_owned(), waited as f64 / 1000.0);
    }

    pub(super) fn requeued(&mut self, model: &str, why: Why) {
        *self.requeued.entry((model.to_owned(), why.reason())).or_default() += 1;
    }

    pub(super) fn epoch_ended(&mut self, model: &str, component: &str, planned: bool) {
        *self.epochs_ended.entry((model.to_owned(), component.to_owned(), planned)).or_default() += 1;
    }

    /// A stage took so long, beside others that the group worked on.
    pub(super) fn stage_done(&mut self, model: &str, stage: &str, seconds: f64, beside: usize, units: f64) {
        let key = (model.to_owned(), stage.to_owned());
        observe(&mut self.stages, key.clone(), seconds);
        if !seconds.is_finite() || seconds < 0.0 {
            return;
        }
        let sample = seconds / beside.max(1) as f64 / units.max(1.0);
        self.costs.entry(key).and_modify(|usual| *usual += NEWEST * (sample - *usual)).or_insert(sample);
    }

    /// The job has come to its end.
    pub(super) fn ended(&mut self, job: &Job) {
        let model = &job.spec.model;
        *self.ended.entry((model.clone(), ending(job.state))).or_default() += 1;
        if job.state == JobState::Succeeded {
            let took = job.finished.unwrap_or_default().saturating_sub(job.created());
            observe(&mut self.took, model.clone(), took as f64 / 1000.0);
        }
        if let Some(failure) = &job.failure {
            let known = FAILURES.into_iter().find(|reason| *reason == failure.reason);
            *self.failed.entry((model.clone(), known.unwrap_or(OTHER))).or_default() += 1;
        }
    }

    /// Seconds of work for one group that a stage of the job is expected to be.
    pub(super) fn expected(&self, job: &Job, stage: &Stage) -> f64 {
        let cost = self.costs.get(&(job.spec.model.clone(), stage.id.clone()));
        let saved = job.saved.steps.get(&stage.id).copied().unwrap_or_default();
        cost.map_or(UNKNOWN_SECONDS, |cost| cost * units(job, stage, saved))
    }
}

/// How a job that is over ended, in a word.
pub(super) fn ending(state: JobState) -> &'static str {
    match state {
        JobState::Succeeded => "succeeded",
        JobState::Cancelled => "cancelled",
        _ => "failed",
    }
}

/// What a stage's time grows with, in a try that begins after `begin` of its steps.
pub(super) fn units(job: &Job, stage: &Stage, begin: u32) -> f64 {
    match stage.kind {
        StageKind::Denoise => {
            let steps = f64::from(job.spec.num_inference_steps.unwrap_or(1).max(1));
            let own = (steps * part_of_steps(job, stage)).max(1.0);
            let left = (own - f64::from(begin)).max(1.0);
            estimate::work(job) * left / steps
        }
        StageKind::EncodeText | StageKind::Unspecified => 1.0,
        StageKind::EncodeImage => job.pixels() as f64,
        StageKind::Decode | StageKind::Inpaint => job.drawn_pixels() as f64,
    }
}

/// The part of a job's steps that one of its denoisers makes: a base model those before `denoising_end`, its refiner the rest.
fn part_of_steps(job: &Job, stage: &Stage) -> f64 {
    let end = job.spec.denoising_end.unwrap_or(1.0).clamp(0.0, 1.0);
    let denoisers = || job.plan.stages.iter().filter(|stage| stage.kind == StageKind::Denoise);
    match denoisers().position(|other| other.id == stage.id) {
        Some(0) if denoisers().count() > 1 => end,
        Some(0) | None => 1.0,
        Some(_) => 1.0 - end,
    }
}

fn observe<K: Ord>(histograms: &mut BTreeMap<K, Histogram>, key: K, seconds: f64) {
    histograms.entry(key).or_insert_with(|| Histogram::new(LONG)).observe(seconds);
}
