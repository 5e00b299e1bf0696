//! Where a client says that it was: a sequence number, a page's token, a job's id. Nothing is skipped and nothing comes twice.
#![no_main]

use std::collections::BTreeMap;

use coordinator::config::Limits;
use coordinator::state::{Key, Settings, State};
use libfuzzer_sys::fuzz_target;
use prost::Message;
use proto::v1::{JobEnd, JobRecord, JobSpec, JobState};

const JOBS: u64 = 5;

fn state(change: &[u8]) -> State {
    let settings = Settings {
        models: Vec::new(),
        limits: Limits::default(),
        blob_address: "localhost:1".into(),
        key: Key([7; 32]),
        max_record_bytes: None,
        term: 2,
        first_epoch: 1,
    };
    let mut state = State::new(settings);
    let spec = JobSpec { model: "model".into(), prompt: "a red car".into(), ..JobSpec::default() };
    let mut records: Vec<JobRecord> = (1..=JOBS)
        .map(|number| JobRecord {
            id: format!("job-{number}"),
            request_id: format!("request-{number}"),
            spec: Some(spec.clone()),
            number: number * 1000,
            end: (number % 2 == 0).then(|| JobEnd { state: JobState::Cancelled as i32, sequence: number, ..JobEnd::default() }),
            ..JobRecord::default()
        })
        .collect();
    // One that was written by anybody.
    records.extend(JobRecord::decode(change).ok().filter(|record| records.iter().all(|known| known.number != record.number)));
    state.recover(1, records, Vec::new(), BTreeMap::new());
    state
}

fuzz_target!(|input: (u64, u32, &str, &str, &[u8])| {
    let (after, page_size, token, id, record) = input;
    let state = state(record);
    drop(state.job(id));
    let ids = (1..=JOBS).map(|number| format!("job-{number}")).chain([id.to_owned()]);
    for id in ids {
        let Ok(page) = state.events_after(&id, after) else { continue };
        let mut last = after;
        for event in page.events {
            assert!(event.sequence > last, "{} after {last}", event.sequence);
            last = event.sequence;
        }
    }
    // From any token a client comes to the end, and sees each job once.
    let (mut token, mut seen) = (token.to_owned(), Vec::new());
    for _ in 0..=JOBS + 2 {
        let Ok((jobs, next)) = state.jobs("", page_size, &token) else { return };
        seen.extend(jobs.into_iter().map(|job| job.id));
        if next.is_empty() {
            let count = seen.len();
            seen.sort();
            seen.dedup();
            assert_eq!(seen.len(), count, "a job came twice");
            return;
        }
        token = next;
    }
    panic!("no end of pages");
});
