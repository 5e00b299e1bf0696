//! What Prometheus is given: families of values with labels, made anew for each reading from a snapshot.

use std::fmt;

use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, NoLabelSet, text::encode},
    metrics::MetricType,
    registry::Registry,
};

use crate::Histogram;

/// Of the text that [`Page::text`] gives.
pub const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// Labels with their values, such as `("model", "emoji")`.
type Labels = Vec<(&'static str, String)>;

/// Families in the order they were added.
#[derive(Debug, Default)]
pub struct Page {
    families: Vec<Family>,
}

#[derive(Debug)]
struct Family {
    name: &'static str,
    help: &'static str,
    samples: Samples,
}

#[derive(Debug)]
enum Samples {
    Gauges(Vec<(Labels, f64)>),
    Counters(Vec<(Labels, f64)>),
    Histograms(Vec<(Labels, Histogram)>),
}

impl Page {
    /// Adds values that go up and down. A family without values is shown all the same: it exists.
    pub fn gauges<const N: usize>(
        &mut self,
        name: &'static str,
        help: &'static str,
        keys: [&'static str; N],
        samples: impl IntoIterator<Item = ([String; N], f64)>,
    ) {
        let samples = samples.into_iter().map(|(values, value)| (labels(keys, values), value));
        self.families.push(Family { name, help, samples: Samples::Gauges(samples.collect()) });
    }

    /// Adds one value without labels.
    pub fn gauge(&mut self, name: &'static str, help: &'static str, value: f64) {
        self.gauges(name, help, [], [([], value)]);
    }

    /// Adds values that only go up. Prometheus sees them as `name` with `_total` at its end, which `name` has not.
    pub fn counters<const N: usize>(
        &mut self,
        name: &'static str,
        help: &'static str,
        keys: [&'static str; N],
        samples: impl IntoIterator<Item = ([String; N], f64)>,
    ) {
        let samples = samples.into_iter().map(|(values, value)| (labels(keys, values), value));
        self.families.push(Family { name, help, samples: Samples::Counters(samples.collect()) });
    }

    /// Adds distributions.
    pub fn histograms<const N: usize>(
        &mut self,
        name: &'static str,
        help: &'static str,
        keys: [&'static str; N],
        samples: impl IntoIterator<Item = ([String; N], Histogram)>,
    ) {
        let samples = samples.into_iter().map(|(values, value)| (labels(keys, values), value));
        self.families.push(Family { name, help, samples: Samples::Histograms(samples.collect()) });
    }

    /// What every process says of itself: its version, and the memory it has.
    pub fn process(&mut self, version: &str, started: f64) {
        let help = "The version of the program, as a label.";
        self.gauges("atelier_build_info", help, ["version"], [([version.to_owned()], 1.0)]);
        self.gauge("process_start_time_seconds", "When the process began, in seconds since 1970.", started);
        let resident = resident_bytes().map(|bytes| ([], bytes as f64));
        self.gauges("process_resident_memory_bytes", "Memory that the process has, in bytes.", [], resident);
    }

    /// Adds all families of another page behind these.
    pub fn append(&mut self, other: Self) {
        self.families.extend(other.families);
    }

    /// The page in the text format of OpenMetrics.
    ///
    /// # Errors
    /// Never in practice: only when a string cannot grow.
    pub fn text(self) -> Result<String, fmt::Error> {
        let mut registry = Registry::default();
        registry.register_collector(Box::new(self));
        let mut text = String::new();
        encode(&mut text, &registry)?;
        Ok(text)
    }
}

fn labels<const N: usize>(keys: [&'static str; N], values: [String; N]) -> Labels {
    keys.into_iter().zip(values).collect()
}

/// From the kernel; nothing where there is no `/proc`.
fn resident_bytes() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
    let kibibytes: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kibibytes * 1024)
}

impl Collector for Page {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        for Family { name, help, samples } in &self.families {
            let kind = match samples {
                Samples::Gauges(_) => MetricType::Gauge,
                Samples::Counters(_) => MetricType::Counter,
                Samples::Histograms(_) => MetricType::Histogram,
            };
            let mut family = encoder.encode_descriptor(name, help, None, kind)?;
            match samples {
                Samples::Gauges(samples) => {
                    for (labels, value) in samples {
                        family.encode_family(labels)?.encode_gauge(value)?;
                    }
                }
                Samples::Counters(samples) => {
                    for (labels, value) in samples {
                        family.encode_family(labels)?.encode_counter::<NoLabelSet, f64, f64>(value, None)?;
                    }
                }
                Samples::Histograms(samples) => {
                    for (labels, value) in samples {
                        let mut sample = family.encode_family(labels)?;
                        sample.encode_histogram::<NoLabelSet>(value.sum(), value.count(), &value.buckets(), None)?;
                    }
                }
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_is_what_prometheus_reads() {
        let mut page = Page::default();
        page.gauges("jobs", "Jobs.", ["model"], [(["a\"b".to_owned()], 2.0)]);
        page.counters("losses", "Losses.", [], [([], 3.0)]);
        let mut histogram = Histogram::new(&[1.0]);
        histogram.observe(0.5);
        histogram.observe(7.0);
        page.histograms("took_seconds", "Times.", ["stage"], [(["decode".to_owned()], histogram)]);
        let text = page.text().unwrap();
        let expected = "# HELP jobs Jobs.\n# TYPE jobs gauge\njobs{model=\"a\\\"b\"} 2.0\n\
                        # HELP losses Losses.\n# TYPE losses counter\nlosses_total 3.0\n\
                        # HELP took_seconds Times.\n# TYPE took_seconds histogram\n\
                        took_seconds_sum{stage=\"decode\"} 7.5\ntook_seconds_count{stage=\"decode\"} 2\n\
                        took_seconds_bucket{le=\"1.0\",stage=\"decode\"} 1\n\
                        took_seconds_bucket{le=\"+Inf\",stage=\"decode\"} 2\n# EOF\n";
        assert_eq!(text, expected);
    }
}
