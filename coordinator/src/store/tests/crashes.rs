//! Machines that stop at any call and lose what was not synced, as chance will have it.

use std::collections::BTreeMap;

use proptest::prelude::*;

use super::*;

type Jobs = BTreeMap<String, JobRecord>;

#[derive(Debug, Clone)]
struct Life {
    /// Of a batch, (job, forget it).
    batches: Vec<Vec<(u64, bool)>>,
    /// Batches that are given before anybody waits.
    in_flight: usize,
    stop_at: u64,
    seed: u64,
}

fn life() -> impl Strategy<Value = Life> {
    let change = (0..6u64, prop::bool::weighted(0.2));
    let batches = prop::collection::vec(prop::collection::vec(change, 1..4), 1..30);
    let life = (batches, 1..5usize, 0..90u64, any::<u64>());
    life.prop_map(|(batches, in_flight, stop_at, seed)| Life { batches, in_flight, stop_at, seed })
}

fn apply(jobs: &mut Jobs, changes: &[Change]) {
    for change in changes {
        match change {
            Change::Put(record) => drop(jobs.insert(record.id.clone(), (**record).clone())),
            Change::Forget { job_id } => drop(jobs.remove(job_id)),
            Change::Group(_) => {}
        }
    }
}

/// One life of a journal on `disk`, from `before`: every state it may have left.
fn live(disk: &MemoryDisk, before: &Jobs, life: &Life, attempt: &mut u32) -> Result<Vec<Jobs>, TestCaseError> {
    let small = Tuning { compact_bytes: 1500, log_bytes: 700, lock_patience: Duration::from_secs(10), first_term: 1 };
    disk.stop_at(life.stop_at);
    let Ok((handle, recovered)) = journal::open(folder(), disk.mount(), small) else {
        return Ok(vec![before.clone()]);
    };
    let found: Jobs = recovered.jobs.into_iter().map(|job| (job.id.clone(), job)).collect();
    prop_assert_eq!(&found, before, "opening again finds the same");
    let mut states = vec![before.clone()];
    let mut acknowledged = 0;
    'life: for batches in life.batches.chunks(life.in_flight) {
        let mut last = 0;
        for batch in batches {
            *attempt += 1;
            let change = |(number, gone): &(u64, bool)| if *gone { forget(*number) } else { put(*number, *attempt) };
            let changes: Vec<Change> = batch.iter().map(change).collect();
            let mut next = states.last().cloned().unwrap_or_default();
            apply(&mut next, &changes);
            states.push(next);
            last = handle.write(changes);
        }
        if block_on(handle.until_durable(last)).is_err() {
            acknowledged = handle.durable().borrow().batch;
            break 'life;
        }
        acknowledged = last;
    }
    drop(handle);
    Ok(states.split_off(acknowledged as usize))
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn whatever_is_acknowledged_is_there_after_every_crash(lives in prop::collection::vec(life(), 1..5)) {
        let disk = MemoryDisk::new();
        let (mut before, mut term, mut attempt) = (Jobs::new(), 0, 0);
        for life in &lives {
            let possible = live(&disk, &before, life, &mut attempt)?;
            disk.crash(life.seed);
            let (handle, recovered) = open(&disk).map_err(|error| TestCaseError::fail(error.to_string()))?;
            prop_assert!(recovered.term > term, "the term {} follows {term}", recovered.term);
            term = recovered.term;
            let found: Jobs = recovered.jobs.into_iter().map(|job| (job.id.clone(), job)).collect();
            prop_assert!(possible.contains(&found), "found {found:?}, possible {possible:?}");
            before = found;
            drop(handle);
        }
    }
}
