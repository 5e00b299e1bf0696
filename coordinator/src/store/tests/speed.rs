//! Figures, printed: `cargo test --release --workspace --lib store::tests::speed -- --nocapture`.

use std::time::Instant;

use super::*;
use crate::store::{Journal, RealDisk, bench};

#[test]
fn a_hundred_thousand_jobs_are_read() {
    let folder = tempfile::tempdir().unwrap();
    let (handle, _) = Journal::open(folder.path(), Arc::new(RealDisk)).unwrap();
    let mut last = 0;
    for number in 0..100_000 {
        let mut record = record(number, 1);
        record.spec.get_or_insert_default().prompt = "x".repeat(600);
        last = handle.write(vec![Change::Put(Box::new(record))]);
    }
    block_on(handle.until_durable(last)).unwrap();
    drop(handle);
    let start = Instant::now();
    let (_handle, recovered) = Journal::open(folder.path(), Arc::new(RealDisk)).unwrap();
    println!("journal: {} jobs of 600 B prompts opened in {:.0?}", recovered.jobs.len(), start.elapsed());
    assert_eq!(recovered.jobs.len(), 100_000);
}

#[test]
fn many_writers_share_a_sync() {
    let folder = tempfile::tempdir().unwrap();
    let (handle, _) = Journal::open(folder.path(), Arc::new(RealDisk)).unwrap();
    let figures = bench::group_commit(&handle, 64, Duration::from_secs(1));
    println!("journal: {figures}");
    assert!(figures.writes > 0);
}
