//! A journal's folder after anything: opening it gives what it holds or says what is wrong, and what it gave it gives again.
#![no_main]

use std::path::Path;
use std::time::Duration;

use coordinator::store::Journal;
use coordinator::store::memory::MemoryDisk;
use libfuzzer_sys::fuzz_target;

const FOLDER: &str = "/journal";

/// With every checksum right, so that what is behind them is reached: a segment of frames whose changes are parts of the input.
fn segment(kind: u32, first: u64, frames: &[&[u8]]) -> Vec<u8> {
    let salt = 7u64;
    let mut bytes = b"ATELJRNL".to_vec();
    bytes.extend(1u32.to_le_bytes());
    bytes.extend(kind.to_le_bytes());
    bytes.extend(3u64.to_le_bytes());
    bytes.extend(first.to_le_bytes());
    bytes.extend(salt.to_le_bytes());
    bytes.extend(crc32fast::hash(&bytes).to_le_bytes());
    let begin = if kind == 0 { first } else { 1 };
    for (number, changes) in (begin..).zip(frames) {
        let mut head = (changes.len() as u32).to_le_bytes().to_vec();
        head.extend(number.to_le_bytes());
        let mut crc = crc32fast::Hasher::new();
        [&salt.to_le_bytes()[..], &head, changes].iter().for_each(|part| crc.update(part));
        bytes.extend(b"AJF1");
        bytes.extend(head);
        bytes.extend(crc.finalize().to_le_bytes());
        bytes.extend(*changes);
    }
    bytes
}

fn name(kind: u8, first: u64) -> String {
    format!("{FOLDER}/{}-{first:020}", if kind == 0 { "log" } else { "snapshot" })
}

fuzz_target!(|bytes: &[u8]| {
    let Some((how, rest)) = bytes.split_first() else { return };
    let disk = MemoryDisk::new();
    let (kind, first) = (how & 1, 1 + u64::from(how >> 6));
    if how & 2 == 0 {
        disk.put(Path::new(&name(kind, first)), rest);
    } else {
        let frames: Vec<&[u8]> = rest.split(|byte| *byte == 0xfe).collect();
        let mut log = segment(u32::from(kind), first, &frames);
        if how & 4 != 0 {
            let cut = usize::from(*rest.first().unwrap_or(&0)).min(log.len());
            log.truncate(log.len() - cut);
        }
        disk.put(Path::new(&name(kind, first)), &log);
        if how & 8 != 0 {
            disk.put(Path::new(&name(0, first + frames.len() as u64)), &segment(0, first + frames.len() as u64, &[b""]));
        }
    }
    let open = || Journal::open_driven(Path::new(FOLDER), disk.mount(), Duration::ZERO).map(|(_, recovered, _)| recovered);
    let Ok(once) = open() else { return };
    let twice = open().expect("what could be opened can be opened again");
    assert_eq!((once.jobs, once.term + 1), (twice.jobs, twice.term));
});
