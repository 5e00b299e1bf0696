//! Memory of one host that two ranks share: the sender writes large tensors into a ring, the receiver copies them out, and the
//! connection says where they lie. So a tensor is copied twice on its way, and neither through the kernel nor a cipher; pieces of a sum are
//! added from where they lie, and copied once.
//!
//! The memory is a file without a name (memfd) of the sender's, sealed so that it cannot shrink under the receiver, which finds it
//! below `/proc` by the sender's process and number of the file and believes it when it holds the token that the connection
//! said. On another host, in another container, or as another user it is not found: tensors go over the connection then.
#![allow(unsafe_code)] // a mapping, and copies in and out of it

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd};
use std::path::PathBuf;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU64, Ordering};

use super::frame::Offer;

/// Smallest tensor that is worth it.
pub(super) const LEAST_BYTES: usize = 64 << 10;
/// A ring holds so many of the largest tensor seen so far, at least.
const TENSORS: usize = 2;
/// Smallest ring: some pieces of a large sum (`mesh.rs`).
const LEAST_RING: usize = 8 << 20;
/// Largest ring; larger tensors go over the connection.
const MOST_BYTES: usize = 512 << 20;
/// Before the ring: the token, and how much of all that was ever written was read.
const HEADER: usize = 4096;
const READ_AT: usize = 64;
/// Tensors begin at multiples of this.
const ALIGNMENT: u64 = 64;
const NAME: &std::ffi::CStr = c"atelier-ranks";

/// A mapped ring.
#[derive(Debug)]
struct Ring {
    start: NonNull<u8>,
    /// Of the ring, without the header.
    bytes: usize,
}

// SAFETY: the mapping is reached through the methods below alone, by one writer and one reader.
unsafe impl Send for Ring {}
unsafe impl Sync for Ring {}

impl Ring {
    fn map(file: &File, bytes: usize) -> io::Result<Self> {
        // SAFETY: a fresh shared mapping of a file that is sealed at its size.
        let start = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                HEADER + bytes,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                file.as_raw_fd(),
                0,
            )
        };
        if start == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let start = NonNull::new(start.cast()).ok_or_else(|| io::Error::other("mapped at zero"))?;
        Ok(Self { start, bytes })
    }

    /// How much of all that was ever written was read.
    fn read(&self) -> &AtomicU64 {
        // SAFETY: inside the header, aligned, and only ever seen as this.
        unsafe { AtomicU64::from_ptr(self.start.as_ptr().add(READ_AT).cast()) }
    }

    fn token(&self) -> [u8; 16] {
        // SAFETY: inside the header, which nobody writes after the offer.
        unsafe { self.start.as_ptr().cast::<[u8; 16]>().read() }
    }

    /// Where the ring's byte `at` of all lies, if `len` from there do not go round.
    fn place(&self, at: u64, len: usize) -> Option<*mut u8> {
        let offset = (at % self.bytes as u64) as usize;
        // SAFETY: inside the mapping.
        (offset.checked_add(len)? <= self.bytes).then(|| unsafe { self.start.as_ptr().add(HEADER + offset) })
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        // SAFETY: the mapping is this ring's, and nothing borrows from it.
        unsafe { libc::munmap(self.start.as_ptr().cast(), HEADER + self.bytes) };
    }
}

/// The sender's end.
#[derive(Debug)]
pub(super) struct Outgoing {
    ring: Ring,
    file: File,
    /// Bytes ever written, what was skipped at the end of the ring among them.
    written: u64,
    /// All before this was read: it was the next place when the ring was last begun anew.
    begun: u64,
    token: [u8; 16],
    /// Whether the peer has it too.
    taken: bool,
}

impl Outgoing {
    /// A ring for tensors of `len` bytes; `None` where there can be none.
    pub(super) fn new(len: usize) -> Option<Self> {
        let bytes = len.checked_mul(TENSORS)?.max(LEAST_RING).checked_next_power_of_two().filter(|bytes| *bytes <= MOST_BYTES)?;
        Self::of(bytes).inspect_err(|error| tracing::debug!(%error, "no memory to share")).ok()
    }

    fn of(bytes: usize) -> io::Result<Self> {
        // SAFETY: a C call with a constant name; the file is owned from here on.
        let file = unsafe {
            let file = libc::memfd_create(NAME.as_ptr(), libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING);
            if file < 0 {
                return Err(io::Error::last_os_error());
            }
            File::from_raw_fd(file)
        };
        file.set_len((HEADER + bytes) as u64)?;
        let seals = libc::F_SEAL_SHRINK | libc::F_SEAL_GROW | libc::F_SEAL_SEAL;
        // SAFETY: a C call on a file of ours.
        if unsafe { libc::fcntl(file.as_raw_fd(), libc::F_ADD_SEALS, seals) } < 0 {
            return Err(io::Error::last_os_error());
        }
        let ring = Ring::map(&file, bytes)?;
        let mut token = [0; 16];
        // SAFETY: 16 bytes of ours, and 16 of the header before anybody else has it.
        unsafe {
            if libc::getrandom(token.as_mut_ptr().cast(), token.len(), 0) != token.len() as isize {
                return Err(io::Error::last_os_error());
            }
            ring.start.as_ptr().cast::<[u8; 16]>().write(token);
        }
        Ok(Self { ring, file, written: 0, begun: 0, token, taken: false })
    }

    pub(super) fn offer(&self) -> Offer {
        let file = self.file.as_raw_fd() as u32;
        Offer { process: std::process::id(), file, bytes: self.ring.bytes as u64, token: self.token }
    }

    pub(super) fn take(&mut self) {
        self.taken = true;
    }

    /// Whether tensors of `len` bytes are too large for it.
    pub(super) fn is_small_for(&self, len: usize) -> bool {
        len > self.ring.bytes / TENSORS && len.saturating_mul(TENSORS) <= MOST_BYTES
    }

    /// Copies `data` in and says where; `None` when the peer does not have the ring or has not read enough of it.
    pub(super) fn write(&mut self, data: &[u8]) -> Option<u64> {
        let size = self.ring.bytes as u64;
        let (mut at, read) = (self.written.next_multiple_of(ALIGNMENT), self.ring.read().load(Ordering::Acquire));
        let all_read = read.max(self.begun) >= self.written;
        // From the beginning if it does not fit before the end, or all was read: the same memory each time is in the caches.
        if at % size + data.len() as u64 > size || all_read {
            at = at.next_multiple_of(size);
        }
        let begun = if all_read { at } else { self.begun };
        let (end, unread) = (at + data.len() as u64, read.max(begun));
        if !self.taken || end - unread > size {
            return None;
        }
        let place = self.ring.place(at, data.len())?;
        // SAFETY: inside the ring, where the reader has read and does not look until it is told.
        unsafe { std::ptr::copy_nonoverlapping(data.as_ptr(), place, data.len()) };
        (self.written, self.begun) = (end, begun);
        Some(at)
    }
}

/// The receiver's end.
#[derive(Debug)]
pub(super) struct Incoming {
    ring: Ring,
}

impl Incoming {
    /// Takes what was offered.
    ///
    /// # Errors
    /// When it is not there, or is not what it should be.
    pub(super) fn open(offer: &Offer) -> io::Result<Self> {
        let bad = |what: &str| Err(io::Error::new(io::ErrorKind::InvalidData, what));
        let bytes = usize::try_from(offer.bytes).ok().filter(|bytes| *bytes <= MOST_BYTES && *bytes >= LEAST_BYTES);
        let Some(bytes) = bytes else { return bad("a size that nobody offers") };
        let path = PathBuf::from(format!("/proc/{}/fd/{}", offer.process, offer.file));
        // Not opened before it is known for one of these: opening may do things.
        if !std::fs::read_link(&path)?.to_string_lossy().starts_with("/memfd:atelier-ranks") {
            return bad("not memory to share");
        }
        let file = File::options().read(true).write(true).open(&path)?;
        let wanted = libc::F_SEAL_SHRINK | libc::F_SEAL_GROW;
        // SAFETY: a C call on a file of ours.
        let seals = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_GET_SEALS) };
        if seals < 0 || seals & wanted != wanted || file.metadata()?.len() != (HEADER + bytes) as u64 {
            return bad("memory that could change its size");
        }
        let ring = Ring::map(&file, bytes)?;
        if ring.token() != offer.token {
            return bad("somebody else's memory");
        }
        Ok(Self { ring })
    }

    /// Whether there may be `len` bytes at `at`.
    ///
    /// # Errors
    /// When that is outside.
    pub(super) fn check(&self, at: u64, len: usize) -> io::Result<()> {
        self.place(at, len).map(drop)
    }

    fn place(&self, at: u64, len: usize) -> io::Result<*mut u8> {
        let outside = || io::Error::new(io::ErrorKind::InvalidData, "a place outside the shared memory");
        self.ring.place(at, len).ok_or_else(outside)
    }

    /// Lends the `len` bytes that were written at `at`; when `f` is done, they may be written over.
    pub(super) fn read<R>(&self, at: u64, len: usize, f: impl FnOnce(&[u8]) -> R) -> io::Result<R> {
        let place = self.place(at, len)?;
        // SAFETY: inside the ring; the writer leaves it alone until `read` says otherwise. A peer that does not keep to that is one
        // that was believed with its certificate, and gives wrong numbers: bytes are valid whatever they are.
        let got = f(unsafe { std::slice::from_raw_parts(place, len) });
        self.ring.read().store(at.saturating_add(len as u64), Ordering::Release);
        Ok(got)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pair(bytes: usize) -> (Outgoing, Incoming) {
        let mut outgoing = Outgoing::of(bytes).unwrap();
        let incoming = Incoming::open(&outgoing.offer()).unwrap();
        outgoing.take();
        (outgoing, incoming)
    }

    #[test]
    fn what_is_written_is_read_round_and_round() {
        let (mut outgoing, incoming) = pair(1 << 17);
        for i in 0..200usize {
            let data: Vec<u8> = (0..20_000 + 777 * (i % 7)).map(|j| ((i + j) % 251) as u8).collect();
            let at = outgoing.write(&data).unwrap();
            assert!(incoming.read(at, data.len(), |got| got == data).unwrap(), "tensor {i}");
        }
    }

    #[test]
    fn what_was_not_read_is_not_written_over() {
        let (mut outgoing, incoming) = pair(1 << 17);
        let data = vec![1; 40_000];
        let places: Vec<u64> = std::iter::from_fn(|| outgoing.write(&data)).collect();
        assert_eq!(places.len(), 3, "{places:?}");
        incoming.read(places[0], data.len(), |_| ()).unwrap();
        assert!(outgoing.write(&data).is_some());
        assert!(outgoing.write(&data).is_none());
        // Once all is read, from the beginning.
        let at = places[2] + data.len() as u64;
        incoming.read(at.next_multiple_of(1 << 17), data.len(), |_| ()).unwrap();
        assert_eq!(outgoing.write(&data), Some(2 << 17));
    }

    #[test]
    fn what_is_skipped_takes_no_room() {
        let (mut outgoing, incoming) = pair(1 << 17);
        let data = vec![1; 40_000];
        for round in 0..3 {
            // Begun anew each time, with room for three.
            let places: Vec<u64> = (0..3).map(|_| outgoing.write(&data).unwrap()).collect();
            assert_eq!(places[0], round << 17);
            places.iter().for_each(|at| incoming.read(*at, data.len(), |_| ()).unwrap());
        }
        // Also where not all is read: the first of three is, and the next one goes where it lay.
        let places: Vec<u64> = (0..3).map(|_| outgoing.write(&data).unwrap()).collect();
        incoming.read(places[0], data.len(), |_| ()).unwrap();
        assert_eq!(outgoing.write(&data), Some(4 << 17));
        assert_eq!(outgoing.write(&data), None);
    }

    #[test]
    fn only_what_was_offered_is_taken() {
        let outgoing = Outgoing::of(1 << 17).unwrap();
        let offer = outgoing.offer();
        let refused = |offer: Offer| Incoming::open(&offer).unwrap_err().to_string();
        assert!(refused(Offer { token: [0; 16], ..offer }).contains("somebody else's"));
        assert!(refused(Offer { bytes: 1 << 18, ..offer }).contains("change its size"));
        assert!(refused(Offer { bytes: u64::MAX, ..offer }).contains("nobody offers"));
        let other = tempfile::tempfile().unwrap();
        assert!(refused(Offer { file: other.as_raw_fd() as u32, ..offer }).contains("not memory to share"));
        Incoming::open(&Offer { file: u32::MAX, ..offer }).unwrap_err();
    }

    #[test]
    fn a_place_outside_is_refused() {
        let (_outgoing, incoming) = pair(1 << 17);
        assert!(incoming.read((1 << 17) - 10, 11, |_| ()).is_err());
        assert!(incoming.read(0, usize::MAX, |_| ()).is_err());
    }

    #[test]
    fn a_ring_grows_with_what_goes_through_it() {
        let outgoing = Outgoing::new(LEAST_BYTES).unwrap();
        assert!(!outgoing.is_small_for(LEAST_RING / TENSORS) && outgoing.is_small_for(LEAST_RING / TENSORS + 1));
        assert!(!outgoing.is_small_for(MOST_BYTES), "nothing holds that");
        assert!(Outgoing::new(MOST_BYTES).is_none());
    }
}
