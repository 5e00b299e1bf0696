//! Journals that are cut and flipped.

use prost::Message;

use super::*;
use crate::store::{frame, segment::Log};

/// A disk with one log: ten jobs, each durable before the next, and three that were `in_flight` together when the machine
/// stopped, or durable one by one as well. With it, where the last three begin and end.
fn journal(acknowledged: bool) -> (MemoryDisk, PathBuf, std::ops::Range<usize>) {
    let disk = MemoryDisk::new();
    let (handle, _) = open(&disk).unwrap();
    write_each(&handle, (1..=10).map(|number| vec![put(number, 1)]));
    let length = |disk: &MemoryDisk| disk.bytes(&only_log(disk)).unwrap().len();
    settle(&disk);
    let start = length(&disk);
    if acknowledged {
        write_each(&handle, (11..=13).map(|number| vec![put(number, 1)]));
        settle(&disk);
    } else {
        // The frame is written, its sync fails: nobody is told.
        disk.fail(Call::Sync, 0, Failure::Broken);
        let batch = handle.write((11..=13).map(|number| put(number, 1)).collect());
        block_on(handle.until_durable(batch)).unwrap_err();
    }
    let path = only_log(&disk);
    let end = length(&disk);
    drop(handle);
    (disk, path, start..end)
}

fn numbers(jobs: &[JobRecord]) -> Vec<u64> {
    jobs.iter().map(|job| job.number).collect()
}

#[test]
fn an_unacknowledged_tail_may_be_cut_or_flipped_at_every_byte() {
    let (disk, path, tail) = journal(false);
    let whole = disk.bytes(&path).unwrap();
    let acknowledged: Vec<u64> = (1..=10).collect();
    let all: Vec<u64> = (1..=13).collect();
    let check = |bytes: &[u8], what: &str| {
        let disk = disk.copy();
        disk.put(&path, bytes);
        let found = numbers(&reopened(&disk));
        assert!(found == acknowledged || found == all, "{what}: found {found:?}");
        assert_eq!(numbers(&reopened(&disk)), found, "{what}: and it stays so");
    };
    for at in tail {
        check(&whole[..at], &format!("cut at {at}"));
        for bit in [0, 3, 7] {
            let mut bytes = whole.clone();
            bytes[at] ^= 1 << bit;
            check(&bytes, &format!("bit {bit} of {at} flipped"));
        }
    }
}

#[test]
fn an_acknowledged_record_that_is_flipped_stops_the_start_and_is_never_lost_in_silence() {
    let (disk, path, tail) = journal(true);
    let whole = disk.bytes(&path).unwrap();
    let (mut refused, mut found_all) = (0, 0);
    for at in tail {
        let disk = disk.copy();
        let mut bytes = whole.clone();
        bytes[at] ^= 0x10;
        disk.put(&path, &bytes);
        match open(&disk) {
            Ok((_handle, recovered)) => {
                assert_eq!(numbers(&recovered.jobs), (1..=13).collect::<Vec<_>>(), "flipped at {at}");
                found_all += 1;
            }
            Err(error) => {
                assert!(matches!(&error, StoreError::Damaged { path: of, .. } if *of == path), "{error}");
                assert!(error.to_string().starts_with("DATA_LOSS: "), "{error}");
                refused += 1;
            }
        }
    }
    // Only the mark at the end is worth nothing.
    assert_eq!((found_all, refused > 100), (super::super::frame::FRAME_BYTES, true));
}

#[test]
fn an_acknowledged_tail_that_is_cut_leaves_a_beginning_and_nothing_else() {
    let (disk, path, tail) = journal(true);
    let whole = disk.bytes(&path).unwrap();
    for at in tail {
        let disk = disk.copy();
        disk.put(&path, &whole[..at]);
        let found = numbers(&reopened(&disk));
        assert!(found.len() >= 10 && found == (1..=found.len() as u64).collect::<Vec<_>>(), "cut at {at}: {found:?}");
    }
}

#[test]
fn damage_before_the_tail_stops_the_start() {
    let (disk, path, tail) = journal(true);
    let whole = disk.bytes(&path).unwrap();
    for at in (0..tail.start).step_by(7) {
        let disk = disk.copy();
        let mut bytes = whole.clone();
        bytes[at] ^= 0x10;
        disk.put(&path, &bytes);
        let error = open(&disk).unwrap_err();
        assert!(matches!(error, StoreError::Damaged { .. }), "flipped at {at}: {error}");
    }
}

#[test]
fn a_log_or_a_snapshot_that_is_missing_stops_the_start() {
    let disk = MemoryDisk::new();
    for number in 1..=3 {
        let (handle, _) = open(&disk).unwrap();
        write_each(&handle, [vec![put(number, 1)]]);
    }
    drop(open(&disk).unwrap());
    let files: Vec<_> = disk.files().into_iter().filter(|path| !path.ends_with("LOCK")).collect();
    assert_eq!(files.len(), 4);
    for missing in &files[..3] {
        let rest = MemoryDisk::new();
        files.iter().filter(|path| *path != missing).for_each(|path| rest.put(path, &disk.bytes(path).unwrap()));
        let error = open(&rest).unwrap_err();
        assert!(matches!(error, StoreError::Damaged { .. }), "{error}");
    }
}

#[test]
fn a_later_format_is_left_alone() {
    let (disk, path, _) = journal(true);
    with_format(&disk, &path, 3);
    assert!(matches!(open(&disk), Err(StoreError::Version { found: 3, known: 2, .. })));
}

#[test]
fn the_format_without_groups_is_read() {
    let (disk, path, _) = journal(true);
    with_format(&disk, &path, 1);
    assert_eq!(numbers(&reopened(&disk)), (1..=13).collect::<Vec<_>>());
}

#[test]
fn a_record_under_the_id_of_another_job_stops_the_start() {
    let disk = MemoryDisk::new();
    let mut changes = frame::Builder::default();
    changes.push_job("job-1", &record(2, 1).encode_to_vec()).unwrap();
    drop(Log::create(disk.mount().as_ref(), folder(), 1, 1, changes).unwrap());
    let error = open(&disk).unwrap_err().to_string();
    assert!(error.starts_with("DATA_LOSS") && error.contains("job-1 holds the record of \"job-2\""), "{error}");
}

fn with_format(disk: &MemoryDisk, path: &Path, version: u8) {
    let mut bytes = disk.bytes(path).unwrap();
    bytes[8] = version;
    let crc = crc32fast::hash(&bytes[..40]).to_le_bytes();
    bytes[40..44].copy_from_slice(&crc);
    disk.put(path, &bytes);
}

/// A process that is killed between writing and syncing leaves what its successor reads and the disk does not have yet.
#[test]
fn what_was_never_synced_may_be_lost_after_another_process_has_read_it() {
    for seed in 0..20 {
        let disk = MemoryDisk::new();
        let (handle, _) = open(&disk).unwrap();
        write_each(&handle, [vec![put(1, 1)], vec![put(2, 1)]]);
        settle(&disk);
        disk.fail(Call::Sync, 0, Failure::Broken);
        let batch = handle.write(vec![put(3, 1)]);
        block_on(handle.until_durable(batch)).unwrap_err();
        drop(handle);
        // It was not acknowledged, and is there; from now on it stays.
        let (handle, recovered) = open(&disk).unwrap();
        assert_eq!(numbers(&recovered.jobs), [1, 2, 3]);
        write_each(&handle, [vec![put(4, 1)]]);
        disk.crash(seed);
        drop(handle);
        assert_eq!(numbers(&reopened(&disk)), [1, 2, 3, 4], "seed {seed}");
    }
}
