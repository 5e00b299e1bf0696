//! What a worker shows by HTTP, at `/metrics`. A rank counts in cells of its own, which nobody else writes.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use models::registry::LoadProgress;
use models::stage::Forwards;
use telemetry::{CONTENT_TYPE, Histogram, Page, Reply, SHORT};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::counted::Traffic;
use crate::groups::Groups;
use crate::home::Home;
use crate::tasks::Tasks;

/// What one rank counts, for as long as it is held.
#[derive(Debug)]
pub(crate) struct RankMeter {
    pub(crate) model: String,
    pub(crate) component: String,
    pub(crate) group_id: String,
    pub(crate) rank: usize,
    pub(crate) traffic: Arc<Traffic>,
    loading: Mutex<Option<LoadProgress>>,
    forwards: AtomicU64,
    pictures: AtomicU64,
    steps: Mutex<Histogram>,
}

impl RankMeter {
    pub(crate) fn new(model: &str, component: &str, group_id: &str, rank: usize) -> Arc<Self> {
        Arc::new(Self {
            model: model.to_owned(),
            component: component.to_owned(),
            group_id: group_id.to_owned(),
            rank,
            traffic: Arc::default(),
            loading: Mutex::default(),
            forwards: AtomicU64::new(0),
            pictures: AtomicU64::new(0),
            steps: Mutex::new(Histogram::new(SHORT)),
        })
    }

    /// Its weights are being read.
    pub(crate) fn loads(&self, progress: LoadProgress) {
        *lock(&self.loading) = Some(progress);
    }

    /// A task made a step that took so long.
    pub(crate) fn stepped(&self, took: Duration) {
        lock(&self.steps).observe(took.as_secs_f64());
    }

    pub(crate) fn forwards(&self, forwards: Forwards) {
        self.forwards.store(forwards.count, Ordering::Relaxed);
        self.pictures.store(forwards.pictures, Ordering::Relaxed);
    }

    fn labels(&self) -> [String; 4] {
        [self.model.clone(), self.component.clone(), self.group_id.clone(), self.rank.to_string()]
    }
}

/// How long writing to the checkpoint store took.
#[derive(Debug)]
pub(crate) struct Saves {
    took: Mutex<Histogram>,
    failed: AtomicU64,
}

impl Default for Saves {
    fn default() -> Self {
        Self { took: Mutex::new(Histogram::new(SHORT)), failed: AtomicU64::new(0) }
    }
}

impl Saves {
    pub(crate) fn took(&self, time: Duration, stored: bool) {
        if stored {
            lock(&self.took).observe(time.as_secs_f64());
        } else {
            self.failed.fetch_add(1, Ordering::Relaxed);
        }
    }
}

/// Where readings are taken.
pub(crate) struct Readings {
    pub(crate) groups: Arc<Groups>,
    pub(crate) home: Arc<Home>,
}

impl Readings {
    /// Serves until `stop`.
    pub(crate) async fn serve(
        self,
        listener: tokio::net::TcpListener,
        tasks: Arc<Tasks>,
        led: watch::Receiver<bool>,
        stop: CancellationToken,
    ) {
        let started = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs_f64();
        let answer = move |path: String| {
            let page = (path == "/metrics").then(|| self.page(started, tasks.count(), *led.borrow()));
            let text = page.and_then(|page| page.text().ok());
            std::future::ready(text.map(|body| Reply { content_type: CONTENT_TYPE, body }))
        };
        telemetry::serve(listener, answer, stop).await;
    }

    fn page(&self, started: f64, tasks: usize, led: bool) -> Page {
        let mut page = Page::default();
        page.process(env!("CARGO_PKG_VERSION"), started);
        page.gauge("atelier_worker_led", "1: a coordinator commands this worker.", f64::from(u8::from(led)));
        page.gauge("atelier_worker_tasks", "Stages of jobs that this worker leads.", tasks as f64);
        let saves = &self.home.saves;
        let help = "How long it took until a checkpoint or a stage's output was stored.";
        page.histograms("atelier_worker_checkpoint_seconds", help, [], [([], lock(&saves.took).clone())]);
        let failed = saves.failed.load(Ordering::Relaxed) as f64;
        let help = "Checkpoints and outputs of stages that could not be stored.";
        page.counters("atelier_worker_checkpoint_failures", help, [], [([], failed)]);
        measure_ranks(&mut page, &self.groups.meters());
        page
    }
}

fn measure_ranks(page: &mut Page, ranks: &[(Arc<RankMeter>, bool)]) {
    let keys = ["model", "component", "group", "rank"];
    let ready = ranks.iter().map(|(meter, ready)| (meter.labels(), f64::from(u8::from(*ready))));
    page.gauges("atelier_worker_rank_ready", "1: the rank has its weights and its peers.", keys, ready);
    let bytes = |of: fn(&LoadProgress) -> u64| {
        let loading = move |meter: &RankMeter| lock(&meter.loading).as_ref().map_or(0, of) as f64;
        ranks.iter().map(move |(meter, _)| (meter.labels(), loading(meter)))
    };
    let help = "Bytes of weights that the rank is to read.";
    page.gauges("atelier_worker_planned_bytes", help, keys, bytes(|progress| progress.total));
    let help = "Bytes of weights that the rank has read.";
    page.gauges("atelier_worker_loaded_bytes", help, keys, bytes(|progress| progress.read()));
    let steps = ranks.iter().filter(|(meter, _)| meter.rank == 0);
    let steps = steps.map(|(meter, _)| (meter.labels(), lock(&meter.steps).clone()));
    let help = "How long steps took: a job's denoising step, or a whole stage that has none. Told by rank 0.";
    page.histograms("atelier_worker_step_seconds", help, keys, steps);
    let count = |of: fn(&RankMeter) -> &AtomicU64| {
        ranks.iter().map(move |(meter, _)| (meter.labels(), of(meter).load(Ordering::Relaxed) as f64))
    };
    let help = "Forward passes that the rank began for its group. Told by rank 0 of a denoiser.";
    page.counters("atelier_worker_forwards", help, keys, count(|meter| &meter.forwards));
    let help = "Pictures in these forward passes: over their number, the mean batch.";
    page.counters("atelier_worker_forward_pictures", help, keys, count(|meter| &meter.pictures));
    let help = "Bytes that the rank handed to other ranks of its group.";
    page.counters("atelier_worker_collective_sent_bytes", help, keys, count(|meter| &meter.traffic.sent_bytes));
    let help = "Bytes that the rank took from other ranks of its group.";
    page.counters("atelier_worker_collective_received_bytes", help, keys, count(|meter| &meter.traffic.received_bytes));
    let seconds = ranks.iter().flat_map(|(meter, _)| {
        let [model, component, group, rank] = meter.labels();
        [("exchange", &meter.traffic.exchange_nanos), ("receive", &meter.traffic.receive_nanos)].map(|(word, nanos)| {
            let labels = [model.clone(), component.clone(), group.clone(), rank.clone(), word.to_owned()];
            (labels, Duration::from_nanos(nanos.load(Ordering::Relaxed)).as_secs_f64())
        })
    });
    let keys = ["model", "component", "group", "rank", "operation"];
    let help = "Time in sums and gathers (exchange), and waiting for another rank's tensor (receive; work to do is one, too).";
    page.counters("atelier_worker_collective_seconds", help, keys, seconds);
}

fn lock<T>(cell: &Mutex<T>) -> MutexGuard<'_, T> {
    cell.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rank_that_follows_tells_no_steps() {
        let ranks = [0, 1].map(|rank| (RankMeter::new("m", "transformer", "m/transformer/0", rank), true));
        ranks[0].0.stepped(Duration::from_millis(20));
        ranks[0].0.forwards(Forwards { count: 2, pictures: 6 });
        let mut page = Page::default();
        measure_ranks(&mut page, &ranks);
        let text = page.text().unwrap();
        let labels = |rank: u32| format!("{{model=\"m\",component=\"transformer\",group=\"m/transformer/0\",rank=\"{rank}\"}}");
        assert!(text.contains(&format!("atelier_worker_step_seconds_count{} 1\n", labels(0))), "{text}");
        assert!(!text.contains(&format!("atelier_worker_step_seconds_count{}", labels(1))), "{text}");
        assert!(text.contains(&format!("atelier_worker_forward_pictures_total{} 6.0\n", labels(0))), "{text}");
    }
}
