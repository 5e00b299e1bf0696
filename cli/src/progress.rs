//! A job's stages as bars, and their times at the end.

use std::collections::BTreeMap;
use std::io::IsTerminal;
use std::time::{Duration, Instant};

use indicatif::{MultiProgress, ProgressBar, ProgressStyle};
use proto::v1::job_event::Kind;

/// The bars of one job.
#[derive(Debug)]
pub(crate) struct Progress {
    all: MultiProgress,
    bars: BTreeMap<String, ProgressBar>,
    /// (stage, group, seconds) in the order they finished.
    finished: Vec<(String, f64)>,
    groups: BTreeMap<String, String>,
    started: Instant,
    waiting: ProgressBar,
    /// Bars cannot be drawn: what a person should know is told in lines.
    in_lines: bool,
    told: String,
}

impl Progress {
    pub(crate) fn new(quiet: bool) -> Self {
        let all =
            if quiet { MultiProgress::with_draw_target(indicatif::ProgressDrawTarget::hidden()) } else { MultiProgress::new() };
        let waiting = all.add(ProgressBar::new_spinner());
        waiting.set_style(style("{spinner} {msg}"));
        waiting.set_message("waiting for the server");
        waiting.enable_steady_tick(Duration::from_millis(120));
        let in_lines = !quiet && !std::io::stderr().is_terminal();
        Self {
            all,
            bars: BTreeMap::new(),
            finished: Vec::new(),
            groups: BTreeMap::new(),
            started: Instant::now(),
            waiting,
            in_lines,
            told: String::new(),
        }
    }

    /// What is waited for while no stage runs.
    pub(crate) fn say(&self, text: impl Into<String>) {
        self.waiting.set_message(text.into());
    }

    /// As [`Self::say`], of something that is not as it should be: without a terminal too, once.
    pub(crate) fn tell(&mut self, text: impl Into<String>) {
        let text = text.into();
        if self.in_lines && text != self.told {
            eprintln!("{text}");
            self.told.clone_from(&text);
        }
        self.say(text);
    }

    /// Takes in one event of the job.
    pub(crate) fn on_event(&mut self, kind: &Kind) {
        match kind {
            Kind::StateChanged(job) => self.say(format!("{:?}", job.state()).to_lowercase()),
            Kind::StageStarted(stage) => {
                self.groups.insert(stage.stage.clone(), stage.group_id.clone());
                self.bar(&stage.stage);
            }
            Kind::Requeued(again) => self.tell(format!("waiting for a group again: {}", again.message)),
            Kind::StageProgress(stage) => {
                let bar = self.bar(&stage.stage);
                bar.set_length(stage.steps.into());
                bar.set_position(stage.step.into());
            }
            Kind::StageFinished(stage) => {
                self.finished.push((stage.stage.clone(), stage.seconds));
                let bar = self.bar(&stage.stage);
                bar.set_position(bar.length().unwrap_or(1));
                bar.finish();
            }
        }
    }

    fn bar(&mut self, stage: &str) -> ProgressBar {
        let group = self.groups.get(stage).cloned().unwrap_or_default();
        let all = &self.all;
        let make = || {
            let bar = all.add(ProgressBar::new(1));
            bar.set_style(style("  {prefix:14} {bar:30} {pos:>3}/{len:<3} {elapsed:>4}  {msg}"));
            bar.set_prefix(stage.to_owned());
            bar.set_message(group);
            bar.tick();
            bar
        };
        self.bars.entry(stage.to_owned()).or_insert_with(make).clone()
    }

    /// Takes the bars down and says how long each stage took.
    pub(crate) fn finish(self) -> String {
        self.waiting.finish_and_clear();
        for bar in self.bars.values() {
            bar.abandon();
        }
        let stages: Vec<String> = self.finished.iter().map(|(stage, seconds)| format!("{stage} {seconds:.2} s")).collect();
        format!("{} | total {:.2} s", stages.join(", "), self.started.elapsed().as_secs_f64())
    }
}

fn style(template: &str) -> ProgressStyle {
    ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar())
}
