//! What Prometheus is told of the cluster. Reads; changes nothing. A reading looks at every job that waits or runs: a millisecond
//! for ten thousand.

use std::collections::BTreeMap;

use proto::v1::{GroupState, StageKind};
use telemetry::{Histogram, LONG, Page};

use super::{
    State,
    job::{Job, TaskPhase},
    requeue::Why,
    tally::{FAILURES, OTHER},
};

/// The states of a group, as they are called in a label.
const GROUP_STATES: [(GroupState, &str); 3] =
    [(GroupState::Waiting, "waiting"), (GroupState::Loading, "forming"), (GroupState::Ready, "ready")];

/// Why jobs wait again.
const WHYS: [Why; 5] = [Why::GroupLost, Why::Drained, Why::Preempted, Why::Postponed, Why::Restarted];

impl State {
    /// Adds all that is known of the cluster.
    pub fn measure(&self, page: &mut Page) {
        self.measure_queue(page);
        self.measure_jobs(page);
        self.measure_times(page);
        self.measure_groups(page);
        self.measure_workers(page);
        let stale = self.stale_reports as f64;
        let help = "Reports of workers on an epoch or a try that was over.";
        page.counters("atelier_stale_reports", help, [], [([], stale)]);
    }

    fn measure_queue(&self, page: &mut Page) {
        let mut waiting: BTreeMap<(&str, &str), (f64, f64)> = BTreeMap::new();
        for model in &self.models {
            let name = model.config.name.as_str();
            let stages = model.card.iter().flat_map(|card| &card.stages);
            waiting.extend(stages.map(|stage| ((name, stage.id.as_str()), (0.0, 0.0))));
        }
        for model in &self.models {
            for job in self.queue.of(&model.config.name).filter_map(|number| self.jobs.get(number)) {
                self.add_waiting(&mut waiting, &model.config.name, job);
            }
        }
        let all = || waiting.iter().map(|((model, stage), value)| ([(*model).to_owned(), (*stage).to_owned()], *value));
        let help = "Jobs that wait for a group and need this stage.";
        page.gauges("atelier_queue_jobs", help, ["model", "stage"], all().map(|(labels, (jobs, _))| (labels, jobs)));
        let help = "Seconds of work that wait for a group of this stage, from what earlier jobs took.";
        page.gauges(
            "atelier_queue_work_seconds",
            help,
            ["model", "stage"],
            all().map(|(labels, (_, seconds))| (labels, seconds)),
        );
        let oldest = self.models.iter().map(|model| {
            let since = self.queue.of(&model.config.name).filter_map(|number| self.jobs.get(number)).map(|job| job.queued).min();
            let age = since.map_or(0, |since| self.now.saturating_sub(since));
            ([model.config.name.clone()], age as f64 / 1000.0)
        });
        page.gauges("atelier_queue_oldest_seconds", "How long the job has waited that waits longest.", ["model"], oldest);
    }

    fn add_waiting<'a>(&self, waiting: &mut BTreeMap<(&'a str, &'a str), (f64, f64)>, model: &'a str, job: &'a Job) {
        let left = (!job.saved.outputs.is_empty()).then(|| job.remaining());
        let needed = job.plan.stages.iter().filter(|stage| left.as_ref().is_none_or(|left| left.stage(&stage.id).is_some()));
        for stage in needed {
            let (jobs, seconds) = waiting.entry((model, &stage.id)).or_default();
            *jobs += 1.0;
            *seconds += self.tally.expected(job, stage);
        }
    }

    fn measure_jobs(&self, page: &mut Page) {
        let names = || self.models.iter().map(|model| model.config.name.clone());
        let now = names().flat_map(|model| {
            let (queued, running) = (self.queue.of(model.as_str()).count(), self.jobs.running(&model));
            [([model.clone(), "queued".to_owned()], queued as f64), ([model, "running".to_owned()], running as f64)]
        });
        page.gauges("atelier_jobs", "Jobs that wait, and jobs that have their groups.", ["model", "state"], now);
        let tally = &self.tally;
        let accepted = names().map(|model| {
            let jobs = tally.accepted.get(&model).copied().unwrap_or_default();
            ([model], jobs as f64)
        });
        page.counters("atelier_jobs_accepted", "Jobs that were accepted.", ["model"], accepted);
        // All of them from the beginning: a counter that first appears at 1 has not risen, for Prometheus.
        let each = |words: &[&'static str], counts: &BTreeMap<(String, &'static str), u64>| {
            let pairs = names().flat_map(|model| words.iter().map(move |word| (model.clone(), *word)));
            let count = |(model, word): (String, &'static str)| {
                let count = counts.get(&(model.clone(), word)).copied().unwrap_or_default();
                ([model, word.to_owned()], count as f64)
            };
            pairs.map(count).collect::<Vec<_>>()
        };
        let ended = each(&["succeeded", "failed", "cancelled"], &tally.ended);
        page.counters("atelier_jobs_finished", "Jobs that came to their end.", ["model", "state"], ended);
        let reasons: Vec<&'static str> = FAILURES.into_iter().chain([OTHER]).collect();
        page.counters("atelier_jobs_failed", "Jobs that failed.", ["model", "reason"], each(&reasons, &tally.failed));
        let requeued = each(&WHYS.map(Why::reason), &tally.requeued);
        page.counters(
            "atelier_requeues",
            "Times that a job was taken off its groups to wait again.",
            ["model", "reason"],
            requeued,
        );
    }

    fn measure_times(&self, page: &mut Page) {
        let tally = &self.tally;
        let models = |times: &BTreeMap<String, Histogram>| {
            let of = |name: &String| times.get(name).cloned().unwrap_or_else(|| Histogram::new(LONG));
            self.models.iter().map(|model| ([model.config.name.clone()], of(&model.config.name))).collect::<Vec<_>>()
        };
        page.histograms("atelier_job_wait_seconds", "How long jobs waited for their groups.", ["model"], models(&tally.waited));
        let help = "How long jobs took that succeeded, from being accepted.";
        page.histograms("atelier_job_seconds", help, ["model"], models(&tally.took));
        let stages = self.models.iter().flat_map(|model| {
            let stages = model.card.iter().flat_map(|card| &card.stages);
            stages.map(|stage| {
                let key = (model.config.name.clone(), stage.id.clone());
                let times = tally.stages.get(&key).cloned().unwrap_or_else(|| Histogram::new(LONG));
                ([key.0, key.1], times)
            })
        });
        page.histograms("atelier_stage_seconds", "How long stages took, from their first turn.", ["model", "stage"], stages);
        let ages = self.models.iter().map(|model| ([model.config.name.clone()], self.oldest_checkpoint(&model.config.name)));
        let help = "How long ago the denoising job was stored last that was so longest ago; 0: none runs.";
        page.gauges("atelier_checkpoint_age_seconds", help, ["model"], ages);
    }

    /// Only jobs with a task in a group are looked at.
    fn oldest_checkpoint(&self, model: &str) -> f64 {
        let groups = self.groups.iter().filter(|(_, group)| group.wanted.model == model);
        let tasks = groups.flat_map(|(_, group)| &group.tasks);
        let since = tasks.filter_map(|(number, stage)| {
            let job = self.jobs.get(*number)?;
            let denoises = job.plan.stage(stage)?.kind == StageKind::Denoise;
            (denoises && job.tasks.get(stage)?.phase == TaskPhase::Running).then_some(job.saved_at)
        });
        since.min().map_or(0.0, |since| self.now.saturating_sub(since) as f64 / 1000.0)
    }

    fn measure_groups(&self, page: &mut Page) {
        let ready = self.models.iter().map(|model| ([model.config.name.clone()], f64::from(u8::from(self.is_ready(model)))));
        page.gauges("atelier_model_ready", "1: every component has a group that is ready.", ["model"], ready);
        let names = |id: &String, model: &str, component: &str| [model.to_owned(), component.to_owned(), id.clone()];
        let keys = ["model", "component", "group"];
        let states = self.groups.iter().flat_map(|(id, group)| {
            GROUP_STATES.map(|(state, word)| {
                let [model, component, group_id] = names(id, &group.wanted.model, &group.wanted.component);
                ([model, component, group_id, word.to_owned()], f64::from(u8::from(group.phase == state)))
            })
        });
        let help = "1 for the state that the group is in: waiting for workers, forming, or ready.";
        page.gauges("atelier_group_state", help, ["model", "component", "group", "state"], states);
        let statuses: Vec<_> = self
            .groups
            .iter()
            .map(|(id, group)| (names(id, &group.wanted.model, &group.wanted.component), group.status()))
            .collect();
        let epochs = statuses.iter().map(|(labels, status)| (labels.clone(), status.epoch as f64));
        page.gauges("atelier_group_epoch", "The group's incarnation; it rises with each.", keys, epochs);
        let tasks = statuses.iter().map(|(labels, status)| (labels.clone(), f64::from(status.running_tasks)));
        page.gauges("atelier_group_tasks", "Stages of jobs that the group has.", keys, tasks);
        let planned = statuses.iter().map(|(labels, status)| (labels.clone(), status.total_bytes as f64));
        page.gauges("atelier_group_planned_bytes", "Bytes of weights that its ranks read together.", keys, planned);
        let components = self.models.iter().flat_map(|model| {
            let components = model.card.iter().flat_map(|card| &card.components);
            components.map(|component| (model.config.name.clone(), component.name.clone()))
        });
        let ends = components.flat_map(|(model, component)| {
            [(true, "drained"), (false, "lost")].map(|(planned, word)| {
                let key = (model.clone(), component.clone(), planned);
                let count = self.tally.epochs_ended.get(&key).copied().unwrap_or_default();
                ([key.0, key.1, word.to_owned()], count as f64)
            })
        });
        let help = "Epochs of groups that ended: a rank was lost, or a worker went as it was told.";
        page.counters("atelier_group_epochs_ended", help, ["model", "component", "reason"], ends);
    }

    fn measure_workers(&self, page: &mut Page) {
        let (away, all) = (self.away.len(), self.workers.len());
        let draining = self.draining.difference(&self.away).count();
        let states = [("connected", all.saturating_sub(away + draining)), ("draining", draining), ("away", away)];
        let states = states.map(|(word, count)| ([word.to_owned()], count as f64));
        let help = "Workers that are connected, that want to go, and whose stream broke a moment ago.";
        page.gauges("atelier_workers", help, ["state"], states);
    }
}
