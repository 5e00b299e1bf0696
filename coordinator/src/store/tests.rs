//! The journal on a disk that breaks.

mod crashes;
mod damage;
mod speed;

use std::{
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use futures::executor::block_on;
use proto::v1::{GroupRecord, JobRecord, JobSpec};

use super::{
    Change, Recovered, Result, StoreError, StoreHandle,
    disk::RealDisk,
    journal::{self, Tuning},
    memory::{Call, Failure, MemoryDisk},
};

const FOLDER: &str = "/journal";
const IMPATIENT: Tuning = Tuning { compact_bytes: 16 << 20, log_bytes: 64 << 20, lock_patience: Duration::ZERO, first_term: 1 };

fn folder() -> &'static Path {
    Path::new(FOLDER)
}

fn record(number: u64, attempt: u32) -> JobRecord {
    let spec = JobSpec { model: "emoji".into(), prompt: format!("picture {number}"), ..JobSpec::default() };
    JobRecord { id: format!("job-{number}"), number, attempt, spec: Some(spec), ..JobRecord::default() }
}

fn put(number: u64, attempt: u32) -> Change {
    Change::Put(Box::new(record(number, attempt)))
}

fn forget(number: u64) -> Change {
    Change::Forget { job_id: format!("job-{number}") }
}

fn open(disk: &MemoryDisk) -> Result<(StoreHandle, Recovered)> {
    // What a test leaves behind ends in a moment.
    journal::open(folder(), disk.mount(), Tuning { lock_patience: Duration::from_secs(10), ..IMPATIENT })
}

/// Writes batches one by one, each durable before the next.
fn write_each(handle: &StoreHandle, batches: impl IntoIterator<Item = Vec<Change>>) {
    for changes in batches {
        let batch = handle.write(changes);
        block_on(handle.until_durable(batch)).unwrap();
    }
}

/// What a journal holds after it was closed and opened again.
fn reopened(disk: &MemoryDisk) -> Vec<JobRecord> {
    open(disk).unwrap().1.jobs
}

#[test]
fn the_newest_record_of_every_job_is_there_after_reopening() {
    let disk = MemoryDisk::new();
    let (handle, recovered) = open(&disk).unwrap();
    assert_eq!((recovered.jobs, recovered.term), (vec![], 1));
    assert_eq!(handle.write(vec![put(2, 1), put(1, 1)]), 1);
    assert_eq!(handle.write(vec![put(1, 2), put(3, 1)]), 2);
    assert_eq!(handle.write(vec![forget(3)]), 3);
    block_on(handle.until_durable(3)).unwrap();
    drop(handle);
    let (_handle, recovered) = open(&disk).unwrap();
    assert_eq!((recovered.jobs, recovered.term), (vec![record(1, 2), record(2, 1)], 2));
}

fn group(id: &str, epoch: u64) -> GroupRecord {
    GroupRecord { group_id: id.into(), epoch }
}

#[test]
fn the_newest_epoch_of_every_group_outlives_reopening_and_compaction() {
    let disk = MemoryDisk::new();
    let small = Tuning { compact_bytes: 1, lock_patience: Duration::from_secs(10), ..IMPATIENT };
    let (handle, recovered) = journal::open(folder(), disk.mount(), small).unwrap();
    assert_eq!(recovered.groups, []);
    let changes = |attempt| vec![put(1, attempt), Change::Group(group("m/t/0", u64::from(attempt) + 7))];
    write_each(&handle, std::iter::once(vec![Change::Group(group("m/vae/0", 3))]).chain((1..40).map(changes)));
    drop(handle);
    let (_handle, mut recovered) = open(&disk).unwrap();
    let names = disk.mount().list(folder()).unwrap();
    assert!(names.iter().any(|name| name.starts_with("snapshot-")), "nothing was compacted: {names:?}");
    recovered.groups.sort_by(|a, b| a.group_id.cmp(&b.group_id));
    assert_eq!(recovered.groups, [group("m/t/0", 46), group("m/vae/0", 3)]);
    assert_eq!(recovered.jobs, [record(1, 39)]);
}

#[test]
fn one_process_at_a_time_has_the_folder() {
    let folder = tempfile::tempdir().unwrap();
    let (handle, _) = journal::open(folder.path(), Arc::new(RealDisk), IMPATIENT).unwrap();
    let second = journal::open(folder.path(), Arc::new(RealDisk), IMPATIENT).unwrap_err();
    assert!(matches!(&second, StoreError::InUse(path) if path.ends_with("LOCK")), "{second}");
    write_each(&handle, [vec![put(1, 1)]]);
    drop(handle);
    let patient = Tuning { lock_patience: Duration::from_secs(10), ..IMPATIENT };
    let (_handle, recovered) = journal::open(folder.path(), Arc::new(RealDisk), patient).unwrap();
    assert_eq!(recovered.jobs, [record(1, 1)]);
}

#[test]
fn a_log_that_is_mostly_old_is_compacted_and_loses_nothing() {
    let disk = MemoryDisk::new();
    let small = Tuning { compact_bytes: 4000, log_bytes: 1500, lock_patience: Duration::from_secs(10), first_term: 1 };
    let expected: Vec<_> = (0..5).map(|number| record(number, 200)).collect();
    let (handle, _) = journal::open(folder(), disk.mount(), small).unwrap();
    write_each(&handle, (1..=200).flat_map(|attempt| (0..6).map(move |number| vec![put(number, attempt)])));
    write_each(&handle, [vec![forget(5)]]);
    drop(handle);
    // However much was written while the last compaction went on, the next commit begins one of all that, and closing waits for it.
    let (handle, _) = journal::open(folder(), disk.mount(), small).unwrap();
    write_each(&handle, [vec![put(0, 200)]]);
    drop(handle);
    assert_eq!(reopened(&disk), expected);
    let bytes: usize = disk.files().iter().filter_map(|path| disk.bytes(path)).map(|bytes| bytes.len()).sum();
    assert!(bytes < 30_000, "{bytes} bytes are left of 100,000 written");
    assert!(disk.files().iter().any(|path| path.to_string_lossy().contains("snapshot-")));
}

#[test]
fn what_was_not_durable_when_the_disk_broke_is_never_acknowledged() {
    for call in [Call::Append, Call::Sync] {
        for failure in [Failure::Broken, Failure::Full] {
            let disk = MemoryDisk::new();
            let (handle, _) = open(&disk).unwrap();
            write_each(&handle, [vec![put(1, 1)]]);
            settle(&disk);
            disk.fail(call, 0, failure);
            let batches: Vec<u64> = (2..5).map(|number| handle.write(vec![put(number, 1)])).collect();
            let mut durable = handle.durable();
            let last = block_on(durable.wait_for(|durable| durable.failed.is_some())).unwrap().clone();
            assert_eq!(last.batch, 1);
            for batch in batches {
                let refused = block_on(handle.until_durable(batch)).unwrap_err();
                assert!(refused.contains("/journal"), "{refused}");
            }
            // The disk works again, but nobody knows what is on it.
            let later = handle.write(vec![put(9, 1)]);
            assert!(block_on(handle.until_durable(later)).is_err());
            assert_eq!(handle.durable().borrow().batch, last.batch);
            drop(handle);
            disk.crash(7);
            let jobs = reopened(&disk);
            assert!(jobs.len() as u64 >= last.batch && jobs.iter().all(|job| job.number < 5), "{jobs:?}");
        }
    }
}

#[test]
fn a_journal_that_cannot_begin_a_log_does_not_open() {
    for call in [Call::Create, Call::Append, Call::Sync, Call::Rename, Call::SyncFolder] {
        for failure in [Failure::Broken, Failure::Full] {
            let disk = MemoryDisk::new();
            let (handle, _) = open(&disk).unwrap();
            write_each(&handle, [vec![put(1, 1)]]);
            drop(handle);
            drop(open(&disk).unwrap());
            disk.fail(call, 0, failure);
            assert!(matches!(open(&disk), Err(StoreError::Io { .. })), "{call:?} {failure:?}");
            disk.crash(3);
            assert_eq!(reopened(&disk), [record(1, 1)], "and nothing is lost");
        }
    }
}

#[test]
fn a_compaction_that_fails_leaves_the_logs() {
    for call in [Call::Create, Call::Sync, Call::Rename, Call::SyncFolder, Call::Remove] {
        let disk = MemoryDisk::new();
        let small = Tuning { compact_bytes: 2000, log_bytes: 1 << 20, lock_patience: Duration::from_secs(10), first_term: 1 };
        let (handle, _) = journal::open(folder(), disk.mount(), small).unwrap();
        // The first of these calls, except for syncs, is for the next log, the second for the snapshot.
        disk.fail(call, 1, Failure::Full);
        let mut newest = 0;
        for attempt in 1..=100 {
            let batch = handle.write(vec![put(1, attempt)]);
            if block_on(handle.until_durable(batch)).is_err() {
                break;
            }
            newest = attempt;
        }
        drop(handle);
        disk.crash(u64::from(newest));
        let jobs = reopened(&disk);
        assert!(jobs.len() == 1 && jobs[0].attempt >= newest, "{call:?}: {newest} was acknowledged, found {jobs:?}");
    }
}

/// Waits for the mark behind the last commit.
fn settle(disk: &MemoryDisk) {
    let mut calls = 0;
    while calls != disk.calls() {
        calls = disk.calls();
        std::thread::sleep(Duration::from_millis(20));
    }
}

fn only_log(disk: &MemoryDisk) -> PathBuf {
    let logs: Vec<_> = disk.files().into_iter().filter(|path| path.to_string_lossy().contains("log-")).collect();
    assert_eq!(logs.len(), 1, "{logs:?}");
    logs[0].clone()
}
