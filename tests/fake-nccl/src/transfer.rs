//! Messages between the processes of a communicator: files in a folder of its own, each written under another name first.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

/// How long a receiver sleeps before it looks again.
const LOOK: Duration = Duration::from_micros(30);

/// The folder of one communicator, seen by one rank.
#[derive(Debug)]
pub(crate) struct Mailbox {
    folder: PathBuf,
    rank: usize,
    /// Messages sent to and taken from each rank so far.
    sent: Vec<AtomicU64>,
    taken: Vec<AtomicU64>,
    given_up: AtomicBool,
}

impl Mailbox {
    /// In `folder`, which all ranks share.
    pub(crate) fn new(folder: PathBuf, rank: usize, size: usize) -> Self {
        let counters = || (0..size).map(|_| AtomicU64::new(0)).collect();
        Self { folder, rank, sent: counters(), taken: counters(), given_up: AtomicBool::new(false) }
    }

    /// Says that this rank is there, and waits until all are; `false` if it was given up before.
    pub(crate) fn meet(&self) -> io::Result<bool> {
        fs::create_dir_all(&self.folder)?;
        self.put(&format!("rank-{}", self.rank), &[])?;
        Ok((0..self.sent.len()).all(|rank| self.wait(&self.folder.join(format!("rank-{rank}")))))
    }

    /// The next message to `to`.
    pub(crate) fn send(&self, to: usize, bytes: &[u8]) -> io::Result<()> {
        let number = self.sent[to].fetch_add(1, Ordering::SeqCst);
        self.put(&format!("from-{}-to-{to}-{number}", self.rank), bytes)
    }

    /// The next message from `from`; `None` if this end was given up before it came.
    pub(crate) fn receive(&self, from: usize) -> io::Result<Option<Vec<u8>>> {
        let number = self.taken[from].fetch_add(1, Ordering::SeqCst);
        let path = self.folder.join(format!("from-{from}-to-{}-{number}", self.rank));
        if !self.wait(&path) {
            return Ok(None);
        }
        let bytes = fs::read(&path)?;
        fs::remove_file(&path)?;
        Ok(Some(bytes))
    }

    /// Never comes back by itself.
    pub(crate) fn hang(&self) {
        while !self.given_up.load(Ordering::SeqCst) {
            thread::sleep(LOOK);
        }
    }

    /// Ends all waits at this end.
    pub(crate) fn give_up(&self) {
        self.given_up.store(true, Ordering::SeqCst);
    }

    fn wait(&self, path: &Path) -> bool {
        while !path.exists() {
            if self.given_up.load(Ordering::SeqCst) {
                return false;
            }
            thread::sleep(LOOK);
        }
        true
    }

    fn put(&self, name: &str, bytes: &[u8]) -> io::Result<()> {
        let draft = self.folder.join(format!("draft-of-{name}"));
        fs::write(&draft, bytes)?;
        fs::rename(draft, self.folder.join(name))
    }
}
