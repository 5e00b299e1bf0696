//! What this process holds.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

/// How often memory is looked at.
const LOOK: Duration = Duration::from_millis(20);

/// Memory of this process that is not a file's, watched by a thread of its own.
pub(super) struct Memory {
    peak: Arc<AtomicU64>,
    stop: Arc<AtomicBool>,
}

impl Memory {
    pub(super) fn watch() -> Self {
        let memory = Self { peak: Arc::default(), stop: Arc::default() };
        let (peak, stop) = (memory.peak.clone(), memory.stop.clone());
        thread::spawn(move || {
            while !stop.load(Ordering::Relaxed) {
                peak.fetch_max(anonymous_bytes(), Ordering::Relaxed);
                thread::sleep(LOOK);
            }
        });
        memory
    }

    pub(super) fn now(&self) -> u64 {
        anonymous_bytes()
    }

    pub(super) fn peak(&self) -> u64 {
        self.peak.load(Ordering::Relaxed)
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

/// Of this process; 0 where the system does not say.
pub(super) fn anonymous_bytes() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let kib =
        status.lines().find_map(|line| line.strip_prefix("RssAnon:")?.trim().strip_suffix("kB")?.trim().parse::<u64>().ok());
    kib.unwrap_or_default() * 1024
}

/// Of this process so far, those that needed no disk; 0 where the system does not say.
pub(super) fn page_faults() -> u64 {
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap_or_default();
    // Fields after the name, which is in brackets and may hold anything: the tenth of all is minflt.
    let after = stat.rsplit_once(')').map_or("", |(_, after)| after);
    after.split_ascii_whitespace().nth(7).and_then(|field| field.parse().ok()).unwrap_or_default()
}
