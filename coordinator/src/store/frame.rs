//! How a segment looks on disk: a header, then frames, each of one group commit.
//!
//! ```text
//! header  "ATELJRNL" version:u32 kind:u32 term:u64 first:u64 salt:u64 crc:u32            little endian, 44 bytes
//! frame   "AJF1" length:u32 number:u64 crc:u32, then `length` bytes of changes
//! change  kind:u8 (1 put, 2 forget, 3 group) id_length:u16 id length:u32 record
//! ```
//!
//! Frames are numbered without a gap, from one log to the next. A frame is written only after the one before it was
//! synced, and an idle log ends with an empty frame: so a frame that cannot be read *with a good one behind it* was
//! durable once and is damaged, and one with nothing good behind it was never acknowledged and does not count. The salt, drawn
//! for each file, goes into every checksum: no old block of the disk and no text of a client passes for a frame.

use crate::store::Change;
use prost::Message;

/// The format that is written, and the newest that is read. 1 had no groups.
pub(super) const VERSION: u32 = 2;
const OLDEST_VERSION: u32 = 1;
pub(super) const HEADER_BYTES: usize = 44;
pub(super) const FRAME_BYTES: usize = 20;
/// Most bytes of a frame's changes: a group commit, or one batch if that is larger.
const MAX_FRAME_BYTES: usize = 1 << 30;
const HEADER_MAGIC: &[u8; 8] = b"ATELJRNL";
const FRAME_MAGIC: &[u8; 4] = b"AJF1";
const PUT: u8 = 1;
const FORGET: u8 = 2;
const GROUP: u8 = 3;

/// What a segment holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// Commits, as they came.
    Log,
    /// All jobs as they were before commit `first`.
    Snapshot,
}

/// The beginning of a segment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Header {
    pub(super) kind: Kind,
    /// The opening that wrote it.
    pub(super) term: u64,
    /// A log's first frame has this number; a snapshot takes the place of all logs before it.
    pub(super) first: u64,
    pub(super) salt: u64,
}

impl Header {
    /// Number of the first frame.
    pub(super) fn first_frame(&self) -> u64 {
        match self.kind {
            Kind::Log => self.first,
            Kind::Snapshot => 1,
        }
    }

    pub(super) fn encode(&self) -> Vec<u8> {
        let kind: u32 = match self.kind {
            Kind::Log => 0,
            Kind::Snapshot => 1,
        };
        let mut bytes = Vec::with_capacity(HEADER_BYTES);
        bytes.extend_from_slice(HEADER_MAGIC);
        bytes.extend_from_slice(&VERSION.to_le_bytes());
        bytes.extend_from_slice(&kind.to_le_bytes());
        bytes.extend_from_slice(&self.term.to_le_bytes());
        bytes.extend_from_slice(&self.first.to_le_bytes());
        bytes.extend_from_slice(&self.salt.to_le_bytes());
        bytes.extend_from_slice(&crc32fast::hash(&bytes).to_le_bytes());
        bytes
    }

    /// The header, or the version of one that is not read, or what is wrong with it.
    pub(super) fn decode(bytes: &[u8]) -> Result<Self, BadHeader> {
        let bytes = bytes.get(..HEADER_BYTES).ok_or(BadHeader::Damaged("the header is cut short"))?;
        let (fields, crc) = bytes.split_at(HEADER_BYTES - 4);
        if &fields[..8] != HEADER_MAGIC {
            return Err(BadHeader::Damaged("this is no segment of a journal"));
        }
        if crc32fast::hash(fields) != u32_at(crc, 0) {
            return Err(BadHeader::Damaged("the header's checksum is wrong"));
        }
        let version = u32_at(fields, 8);
        if !(OLDEST_VERSION..=VERSION).contains(&version) {
            return Err(BadHeader::Version(version));
        }
        let kind = match u32_at(fields, 12) {
            0 => Kind::Log,
            1 => Kind::Snapshot,
            _ => return Err(BadHeader::Damaged("the segment is of no known kind")),
        };
        Ok(Self { kind, term: u64_at(fields, 16), first: u64_at(fields, 24), salt: u64_at(fields, 32) })
    }
}

/// Why a header cannot be used.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum BadHeader {
    Version(u32),
    Damaged(&'static str),
}

/// A frame that is being filled.
#[derive(Debug, Default)]
pub(super) struct Builder {
    /// Room for the frame's own header, then changes.
    bytes: Vec<u8>,
}

impl Builder {
    /// Bytes of all changes.
    pub(super) fn len(&self) -> usize {
        self.bytes.len().saturating_sub(FRAME_BYTES)
    }

    /// Adds a change and gives the bytes it takes; nothing if it has more than the format can say.
    pub(super) fn push(&mut self, change: &Change) -> Option<usize> {
        match change {
            Change::Put(record) => self.raw(PUT, &record.id, &record.encode_to_vec()),
            Change::Forget { job_id } => self.raw(FORGET, job_id, &[]),
            Change::Group(record) => self.raw(GROUP, &record.group_id, &record.encode_to_vec()),
        }
    }

    /// Adds a job as it was encoded before.
    pub(super) fn push_job(&mut self, job_id: &str, record: &[u8]) -> Option<usize> {
        self.raw(PUT, job_id, record)
    }

    /// Adds a group as it was encoded before.
    pub(super) fn push_group(&mut self, group_id: &str, record: &[u8]) -> Option<usize> {
        self.raw(GROUP, group_id, record)
    }

    /// Adds the changes of another frame.
    pub(super) fn push_changes(&mut self, changes: &[u8]) {
        self.bytes.resize(self.bytes.len().max(FRAME_BYTES), 0);
        self.bytes.extend_from_slice(changes);
    }

    fn raw(&mut self, kind: u8, id: &str, record: &[u8]) -> Option<usize> {
        let id_length = u16::try_from(id.len()).ok()?;
        let length = u32::try_from(record.len()).ok()?;
        self.bytes.resize(self.bytes.len().max(FRAME_BYTES), 0);
        let before = self.bytes.len();
        self.bytes.push(kind);
        self.bytes.extend_from_slice(&id_length.to_le_bytes());
        self.bytes.extend_from_slice(id.as_bytes());
        self.bytes.extend_from_slice(&length.to_le_bytes());
        self.bytes.extend_from_slice(record);
        (self.len() <= MAX_FRAME_BYTES).then(|| self.bytes.len() - before)
    }

    /// The frame's bytes; the builder is empty afterwards.
    pub(super) fn finish(&mut self, salt: u64, number: u64) -> Vec<u8> {
        let mut bytes = std::mem::take(&mut self.bytes);
        bytes.resize(bytes.len().max(FRAME_BYTES), 0);
        let length = (bytes.len() - FRAME_BYTES) as u32;
        bytes[..4].copy_from_slice(FRAME_MAGIC);
        bytes[4..8].copy_from_slice(&length.to_le_bytes());
        bytes[8..16].copy_from_slice(&number.to_le_bytes());
        let crc = checksum(salt, &bytes[4..16], &bytes[FRAME_BYTES..]);
        bytes[16..20].copy_from_slice(&crc.to_le_bytes());
        bytes
    }
}

/// A whole frame.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Frame<'a> {
    pub(super) number: u64,
    pub(super) changes: &'a [u8],
    /// Where it ends.
    pub(super) end: usize,
}

/// The frame at `start`, if there is a whole one.
pub(super) fn frame_at(bytes: &[u8], start: usize, salt: u64) -> Option<Frame<'_>> {
    let head = bytes.get(start..start.checked_add(FRAME_BYTES)?)?;
    if &head[..4] != FRAME_MAGIC {
        return None;
    }
    let end = (start + FRAME_BYTES).checked_add(u32_at(head, 4) as usize)?;
    let changes = bytes.get(start + FRAME_BYTES..end)?;
    let fits = checksum(salt, &head[4..16], changes) == u32_at(head, 16);
    fits.then(|| Frame { number: u64_at(head, 8), changes, end })
}

/// A whole frame begins somewhere in `bytes` behind `start`.
pub(super) fn frame_behind(bytes: &[u8], start: usize, salt: u64) -> bool {
    let magic = FRAME_MAGIC.len();
    (start + 1..(bytes.len() + 1).saturating_sub(magic))
        .any(|at| &bytes[at..at + magic] == FRAME_MAGIC && frame_at(bytes, at, salt).is_some())
}

/// One change as it was written: an id, and what is kept under it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Written<'a> {
    Job(&'a str, &'a [u8]),
    Forgotten(&'a str),
    Group(&'a str, &'a [u8]),
}

/// The changes of a frame; nothing in place of one that makes no sense.
pub(super) fn changes(mut rest: &[u8]) -> impl Iterator<Item = Option<Written<'_>>> {
    std::iter::from_fn(move || {
        if rest.is_empty() {
            return None;
        }
        let Some((change, after)) = take_change(rest) else {
            rest = &[];
            return Some(None);
        };
        rest = after;
        Some(Some(change))
    })
}

fn take_change(bytes: &[u8]) -> Option<(Written<'_>, &[u8])> {
    let (kind, rest) = bytes.split_first()?;
    let (length, rest) = rest.split_at_checked(2)?;
    let (id, rest) = rest.split_at_checked(u16_at(length) as usize)?;
    let (length, rest) = rest.split_at_checked(4)?;
    let (record, rest) = rest.split_at_checked(u32_at(length, 0) as usize)?;
    let id = std::str::from_utf8(id).ok()?;
    let change = match *kind {
        PUT => Written::Job(id, record),
        FORGET => Written::Forgotten(id),
        GROUP => Written::Group(id, record),
        _ => return None,
    };
    Some((change, rest))
}

fn checksum(salt: u64, head: &[u8], changes: &[u8]) -> u32 {
    let mut crc = crc32fast::Hasher::new();
    crc.update(&salt.to_le_bytes());
    crc.update(head);
    crc.update(changes);
    crc.finalize()
}

// Of slices that are long enough: their lengths were checked, or are constants.
fn u16_at(bytes: &[u8]) -> u16 {
    u16::from_le_bytes([bytes[0], bytes[1]])
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    let mut four = [0; 4];
    four.copy_from_slice(&bytes[at..at + 4]);
    u32::from_le_bytes(four)
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    let mut eight = [0; 8];
    eight.copy_from_slice(&bytes[at..at + 8]);
    u64::from_le_bytes(eight)
}
