//! A file system in memory that can be broken: for tests and simulations of the journal.
//!
//! It keeps what a disk keeps. What was not synced is lost at a [`MemoryDisk::crash`], or stays in part, torn at sectors,
//! zeroed or garbled; names that were not synced stay up to some point in their order, as with a journaling file system.

use std::{
    collections::BTreeMap,
    io,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use super::disk::{Disk, DiskFile};

/// What a disk writes at once.
const SECTOR: usize = 512;
/// What Linux says of a broken disk, and of a full one.
const EIO: i32 = 5;
const ENOSPC: i32 = 28;

/// A call that changes something.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Call {
    /// [`Disk::create`].
    Create,
    /// [`DiskFile::append`].
    Append,
    /// [`DiskFile::sync`].
    Sync,
    /// [`Disk::rename`].
    Rename,
    /// [`Disk::remove`].
    Remove,
    /// [`Disk::sync_folder`].
    SyncFolder,
}

/// What goes wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Failure {
    /// The disk is broken: EIO.
    Broken,
    /// The disk is full: ENOSPC. An append leaves half of its bytes.
    Full,
}

/// A file system in memory. Cheap to clone; clones share the files.
#[derive(Debug, Clone, Default)]
pub struct MemoryDisk {
    state: Arc<Mutex<State>>,
}

#[derive(Debug, Default)]
struct State {
    names: BTreeMap<PathBuf, usize>,
    durable_names: BTreeMap<PathBuf, usize>,
    /// Since the last sync of the folder.
    unsynced_names: Vec<Renaming>,
    contents: Vec<Content>,
    locked: BTreeMap<PathBuf, u64>,
    /// Grows with each crash: what was opened before is dead.
    life: u64,
    calls: u64,
    crash_at: Option<u64>,
    faults: Vec<(Call, u64, Failure)>,
    /// Files are not synced when they are said to be.
    lies: bool,
}

#[derive(Debug, Default)]
struct Content {
    bytes: Vec<u8>,
    synced: usize,
}

#[derive(Debug, Clone)]
enum Renaming {
    Named(PathBuf, usize),
    Removed(PathBuf),
}

impl Renaming {
    fn apply(&self, names: &mut BTreeMap<PathBuf, usize>) {
        match self {
            Self::Named(path, content) => drop(names.insert(path.clone(), *content)),
            Self::Removed(path) => drop(names.remove(path)),
        }
    }
}

impl MemoryDisk {
    /// An empty disk.
    pub fn new() -> Self {
        Self::default()
    }

    /// The disk as a process sees it that starts now: after the next crash its every call fails.
    pub fn mount(&self) -> Arc<dyn Disk> {
        let life = self.lock_state().life;
        Arc::new(Mounted { disk: self.clone(), life })
    }

    /// The `nth` call of this kind from now on (0: the next) fails, once.
    pub fn fail(&self, call: Call, nth: u64, failure: Failure) {
        self.lock_state().faults.push((call, nth, failure));
    }

    /// From now on a file's sync does nothing and says that all is well: for tests of tests, which must find out.
    pub fn lie(&self) {
        self.lock_state().lies = true;
    }

    /// From the `nth` changing call from now on (0: the next), every call fails, as if the machine had stopped there.
    pub fn stop_at(&self, nth: u64) {
        let mut state = self.lock_state();
        state.crash_at = Some(state.calls + nth);
    }

    /// Changing calls so far.
    pub fn calls(&self) -> u64 {
        self.lock_state().calls
    }

    /// The machine stops and starts again: what was not synced is lost, as `seed` will have it; open files are dead, locks
    /// are free, faults are over.
    pub fn crash(&self, seed: u64) {
        let mut random = Random(seed);
        let mut state = self.lock_state();
        let survive = random.below(state.unsynced_names.len() + 1);
        let State { names, durable_names, unsynced_names, contents, locked, life, crash_at, faults, .. } = &mut *state;
        unsynced_names.drain(..).take(survive).for_each(|renaming| renaming.apply(durable_names));
        *names = durable_names.clone();
        for content in contents {
            content.crash(&mut random);
        }
        locked.clear();
        faults.clear();
        *crash_at = None;
        *life += 1;
    }

    /// The bytes of a file.
    pub fn bytes(&self, path: &Path) -> Option<Vec<u8>> {
        let state = self.lock_state();
        state.names.get(path).map(|content| state.contents[*content].bytes.clone())
    }

    /// Puts a file there as it is, all of it durable.
    pub fn put(&self, path: &Path, bytes: &[u8]) {
        let mut state = self.lock_state();
        state.contents.push(Content { bytes: bytes.to_vec(), synced: bytes.len() });
        let content = state.contents.len() - 1;
        state.names.insert(path.to_owned(), content);
        state.durable_names.insert(path.to_owned(), content);
    }

    /// Every file.
    pub fn files(&self) -> Vec<PathBuf> {
        self.lock_state().names.keys().cloned().collect()
    }

    /// A disk with the same files, all of them durable.
    pub fn copy(&self) -> Self {
        let copy = Self::new();
        for path in self.files() {
            copy.put(&path, &self.bytes(&path).unwrap_or_default());
        }
        copy
    }

    fn lock_state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    /// Counts a call and says whether it fails.
    fn call(&mut self, call: Call) -> io::Result<()> {
        let number = self.calls;
        self.calls += 1;
        if self.crash_at.is_some_and(|at| number >= at) {
            return Err(io::Error::from_raw_os_error(EIO));
        }
        let mut failure = None;
        self.faults.retain_mut(|(of, nth, how)| {
            if *of != call {
                return true;
            }
            let now = *nth == 0;
            if now {
                failure = Some(*how);
            }
            *nth = nth.saturating_sub(1);
            !now
        });
        match failure {
            None => Ok(()),
            Some(Failure::Broken) => Err(io::Error::from_raw_os_error(EIO)),
            Some(Failure::Full) => Err(io::Error::from_raw_os_error(ENOSPC)),
        }
    }

    fn name(&mut self, renaming: Renaming) {
        renaming.apply(&mut self.names);
        self.unsynced_names.push(renaming);
    }

    fn find(&self, path: &Path) -> io::Result<usize> {
        self.names.get(path).copied().ok_or_else(|| io::ErrorKind::NotFound.into())
    }
}

impl Content {
    /// Of what was not synced, a part stays, and sectors of that may be zeros or garbage.
    fn crash(&mut self, random: &mut Random) {
        let unsynced = self.bytes.len() - self.synced;
        self.bytes.truncate(self.synced + random.below(unsynced + 1));
        for sector in self.bytes[self.synced..].chunks_mut(SECTOR) {
            match random.below(4) {
                0 => sector.fill(0),
                1 => sector.iter_mut().for_each(|byte| *byte ^= random.below(256) as u8),
                _ => {}
            }
        }
        self.synced = self.bytes.len();
    }
}

/// The disk within one life of the machine.
#[derive(Debug, Clone)]
struct Mounted {
    disk: MemoryDisk,
    life: u64,
}

impl Mounted {
    fn alive(&self) -> io::Result<MutexGuard<'_, State>> {
        let state = self.disk.lock_state();
        if state.life == self.life { Ok(state) } else { Err(io::Error::from_raw_os_error(EIO)) }
    }

    fn call(&self, call: Call) -> io::Result<MutexGuard<'_, State>> {
        let mut state = self.alive()?;
        state.call(call)?;
        Ok(state)
    }
}

impl Disk for Mounted {
    fn make_folder(&self, _: &Path) -> io::Result<()> {
        self.alive().map(drop)
    }

    fn list(&self, folder: &Path) -> io::Result<Vec<String>> {
        let state = self.alive()?;
        let names = state.names.keys().filter_map(|path| path.strip_prefix(folder).ok());
        Ok(names.map(|name| name.to_string_lossy().into_owned()).collect())
    }

    fn create(&self, path: &Path) -> io::Result<Box<dyn DiskFile>> {
        let mut state = self.call(Call::Create)?;
        if state.names.contains_key(path) {
            return Err(io::ErrorKind::AlreadyExists.into());
        }
        state.contents.push(Content::default());
        let content = state.contents.len() - 1;
        state.name(Renaming::Named(path.to_owned(), content));
        Ok(Box::new(MemoryFile { mounted: self.clone(), content }))
    }

    fn read(&self, path: &Path) -> io::Result<Vec<u8>> {
        let state = self.alive()?;
        Ok(state.contents[state.find(path)?].bytes.clone())
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        let mut state = self.call(Call::Rename)?;
        let content = state.find(from)?;
        state.name(Renaming::Named(to.to_owned(), content));
        state.name(Renaming::Removed(from.to_owned()));
        Ok(())
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        self.alive()?.find(path)?;
        let mut state = self.call(Call::Remove)?;
        state.name(Renaming::Removed(path.to_owned()));
        Ok(())
    }

    fn sync_folder(&self, _: &Path) -> io::Result<()> {
        let mut state = self.call(Call::SyncFolder)?;
        state.unsynced_names.clear();
        state.durable_names = state.names.clone();
        Ok(())
    }

    fn lock(&self, path: &Path) -> io::Result<Option<Box<dyn Send>>> {
        let mut state = self.alive()?;
        if state.locked.contains_key(path) {
            return Ok(None);
        }
        state.locked.insert(path.to_owned(), self.life);
        Ok(Some(Box::new(MemoryLock { mounted: self.clone(), path: path.to_owned() })))
    }
}

struct MemoryLock {
    mounted: Mounted,
    path: PathBuf,
}

impl Drop for MemoryLock {
    fn drop(&mut self) {
        if let Ok(mut state) = self.mounted.alive() {
            state.locked.remove(&self.path);
        }
    }
}

#[derive(Debug)]
struct MemoryFile {
    mounted: Mounted,
    content: usize,
}

impl DiskFile for MemoryFile {
    fn append(&mut self, bytes: &[u8]) -> io::Result<()> {
        let mut state = self.mounted.alive()?;
        let called = state.call(Call::Append);
        let written = if called.is_ok() { bytes } else { &bytes[..bytes.len() / 2] };
        state.contents[self.content].bytes.extend_from_slice(written);
        called
    }

    fn sync(&mut self) -> io::Result<()> {
        let mut state = self.mounted.call(Call::Sync)?;
        if state.lies {
            return Ok(());
        }
        let content = &mut state.contents[self.content];
        content.synced = content.bytes.len();
        Ok(())
    }
}

/// SplitMix64: the same numbers for the same seed, everywhere.
#[derive(Debug)]
struct Random(u64);

impl Random {
    fn below(&mut self, limit: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((mixed ^ (mixed >> 31)) % limit.max(1) as u64) as usize
    }
}
