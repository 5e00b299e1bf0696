//! Reading this rank's slice of a checkpoint, and nothing else.

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt::{self, Display};
use std::ops::Range;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use candle_core::{DType, Device, Tensor};
use kernels::blocks::BlockType;
use kernels::gemm::{BlockRows, Piece};

use crate::checkpoint::{Checkpoint, Entry, Names, Stored};
use crate::collective::Collective;
use crate::lora::Adapters;
use crate::ops::{Chunks, Matrix, Values, has_kernels};
use crate::{Error, Result};

pub use crate::checkpoint::checkpoint_files;

/// How one tensor is divided over the ranks of a group.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Shard {
    /// Every rank holds the whole tensor.
    Replicated,
    /// `dim` is a concatenation of `blocks` (in elements); each rank holds an equal slice of every block.
    Split {
        /// The dimension that is cut.
        dim: usize,
        /// The sizes of the parts packed along it: one for a plain tensor, several for a fused one.
        blocks: Vec<usize>,
    },
    /// This rank holds `parts` of `dim`, one after the other, whatever the others hold: heads that several ranks need, the one
    /// frame of a kernel that is used.
    Parts {
        /// The dimension that is cut.
        dim: usize,
        /// What is held of it.
        parts: Vec<Range<usize>>,
    },
}

impl Shard {
    /// A plain (not packed) tensor cut along `dim`, which has `size` elements.
    pub fn split(dim: usize, size: usize) -> Self {
        Shard::Split { dim, blocks: vec![size] }
    }

    /// One part of `dim`, whatever the other ranks hold.
    pub fn part(dim: usize, part: Range<usize>) -> Self {
        Shard::Parts { dim, parts: vec![part] }
    }
}

/// A component's checkpoint seen from one rank: like candle's `VarBuilder`, but a rank reads only its own bytes, the full
/// shape is checked although a slice is read, and nothing may be left over unexplained.
#[derive(Clone)]
pub struct Weights {
    checkpoint: Arc<Checkpoint>,
    taken: Arc<Taken>,
    prefix: String,
    group: Arc<dyn Collective>,
    dtype: DType,
    device: Device,
    /// Count bytes instead of reading them.
    measuring: bool,
    adapters: Arc<Adapters>,
}

/// What has been taken of a checkpoint.
#[derive(Default)]
struct Taken {
    names: Mutex<BTreeSet<String>>,
    bytes_read: Arc<AtomicU64>,
    bytes_held: AtomicU64,
    measured: Mutex<BTreeMap<String, Measured>>,
}

/// What a rank would take of a tensor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Measured {
    /// Bytes, as stored.
    pub bytes: u64,
    /// All of it, whatever the number of ranks.
    pub whole: bool,
}

/// A tensor, and what of it this rank holds.
struct Held<'a> {
    name: String,
    entry: &'a Entry,
    /// Of which dimension; `None`: all of the tensor.
    parts: Option<(usize, Vec<Range<usize>>)>,
    shape: Vec<usize>,
}

impl Weights {
    /// Opens the checkpoint in a component's folder: see [`checkpoint_files`]. Tensors come out as `dtype` on `device`.
    pub fn open(dir: &Path, group: Arc<dyn Collective>, dtype: DType, device: &Device) -> Result<Self> {
        Self::open_as(dir, group, dtype, device, &|_, _| None)
    }

    /// As [`Self::open`], for a checkpoint that may have other names than the model's.
    pub fn open_as(dir: &Path, group: Arc<dyn Collective>, dtype: DType, device: &Device, names: Names<'_>) -> Result<Self> {
        Ok(Self {
            checkpoint: Arc::new(Checkpoint::open(dir, names)?),
            taken: Arc::default(),
            prefix: String::new(),
            group,
            dtype,
            device: device.clone(),
            measuring: false,
            adapters: Arc::new(Adapters::on(device)),
        })
    }

    /// The same checkpoint, from which tensors come out as zeros that take no memory: what a rank would read and hold is
    /// counted, and nothing is read.
    pub fn measuring(self) -> Self {
        Self { measuring: true, ..self }
    }

    /// Whether bytes are counted instead of read.
    pub fn is_measuring(&self) -> bool {
        self.measuring
    }

    /// The same checkpoint one level down.
    pub fn pp(&self, name: impl Display) -> Self {
        let prefix = self.full_name(&name.to_string());
        Self { prefix, ..self.clone() }
    }

    /// The ranks that share the split tensors.
    pub fn group(&self) -> &Arc<dyn Collective> {
        &self.group
    }

    /// Where the layers that are loaded from here register, and look for adapters.
    pub fn adapters(&self) -> &Arc<Adapters> {
        &self.adapters
    }

    /// The full name of where this is in the checkpoint; empty at its root.
    pub fn prefix(&self) -> &str {
        &self.prefix
    }

    /// The type tensors come out as.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// The device tensors are made on.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// Whether the checkpoint has this tensor.
    pub fn contains(&self, name: &str) -> bool {
        self.checkpoint.entries.contains_key(&self.full_name(name))
    }

    /// This rank's slice of `name`.
    ///
    /// # Errors
    /// When it is missing, when the *full* tensor has another shape than `full_shape`, or when a block cannot be divided.
    pub fn get(&self, name: &str, full_shape: &[usize], shard: Shard) -> Result<Tensor> {
        self.tensor(self.held(name, full_shape, shard)?, self.dtype)
    }

    /// As [`Self::get`], but as it is stored if that is a type of 16 bits: for tables whose rows are looked up, and widened
    /// then.
    pub fn get_narrow(&self, name: &str, full_shape: &[usize], shard: Shard) -> Result<Tensor> {
        let held = self.held(name, full_shape, shard)?;
        let dtype = self.narrow(held.entry.stored);
        self.tensor(held, dtype)
    }

    /// This rank's slice of a linear layer's weight `[d_out, d_in..]`, ready to be multiplied with: as it is stored, where that is
    /// in 16 bits or in blocks. `chunks` says how a product is cut; `None`: it is one sum.
    ///
    /// # Errors
    /// As [`Self::get`].
    pub(crate) fn matrix(&self, name: &str, full_shape: &[usize], shard: Shard, chunks: Option<Chunks>) -> Result<Matrix> {
        let held = self.held(name, full_shape, shard)?;
        let chunks = chunks.unwrap_or_else(|| vec![vec![(0, held.shape.iter().skip(1).product())]]);
        match held.entry.stored {
            Stored::Plain(stored) => {
                let dtype = self.narrow(held.entry.stored);
                if dtype == stored
                    && let Some(matrix) = self.mapped(&held, stored, &chunks)
                {
                    return Ok(matrix);
                }
                let weight = self.tensor(held, dtype)?;
                let weight = if weight.rank() > 2 { weight.flatten_from(1)? } else { weight };
                if self.measuring { Matrix::measured(&weight) } else { Matrix::in_chunks(&weight, chunks) }
            }
            Stored::Blocks(kind) => self.blocks(held, kind, chunks),
        }
    }

    fn held(&self, name: &str, full_shape: &[usize], shard: Shard) -> Result<Held<'_>> {
        let name = self.full_name(name);
        let entry = self.checkpoint.entries.get(&name).ok_or_else(|| Error::MissingTensor { name: name.clone() })?;
        if entry.shape != full_shape {
            return Err(Error::Shape { name, found: entry.shape.clone(), expected: full_shape.to_vec() });
        }
        self.taken.names.lock().unwrap_or_else(PoisonError::into_inner).insert(name.clone());
        let parts = self.parts(&name, entry, shard)?;
        let mut shape = entry.shape.clone();
        if let Some((dim, parts)) = &parts {
            shape[*dim] = parts.iter().map(Range::len).sum();
        }
        Ok(Held { name, entry, parts, shape })
    }

    /// Marks every tensor under `prefix` as somebody else's: another block range's, or a buffer the model does not need.
    pub fn skip(&self, prefix: impl Display) {
        let prefix = self.full_name(&prefix.to_string());
        let mut taken = self.taken.names.lock().unwrap_or_else(PoisonError::into_inner);
        let below = format!("{prefix}.");
        taken.extend(self.checkpoint.entries.keys().filter(|k| **k == prefix || k.starts_with(&below)).cloned());
    }

    /// To be called when the model is loaded: a tensor that nobody took or skipped is an error.
    pub fn finish(&self) -> Result<()> {
        let taken = self.taken.names.lock().unwrap_or_else(PoisonError::into_inner);
        let names: Vec<String> = self.checkpoint.entries.keys().filter(|k| !taken.contains(*k)).cloned().collect();
        if names.is_empty() { Ok(()) } else { Err(Error::UnusedTensors { names }) }
    }

    /// Bytes of weights this rank has read so far; shared, so that a loading bar can watch it.
    pub fn bytes_read(&self) -> Arc<AtomicU64> {
        self.taken.bytes_read.clone()
    }

    /// Bytes of the tensors that were given out, in the type they were given out in.
    pub fn bytes_held(&self) -> u64 {
        self.taken.bytes_held.load(Ordering::Relaxed)
    }

    /// What was counted of each tensor, by its full name; empty unless this is [`Self::measuring`].
    pub fn measured(&self) -> BTreeMap<String, Measured> {
        self.taken.measured.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Every tensor of the checkpoint: its full name and shape, and its type unless it is in blocks.
    pub fn tensors(&self) -> Vec<(String, Vec<usize>, Option<DType>)> {
        let tensor = |(name, entry): (&String, &Entry)| {
            let stored = match entry.stored {
                Stored::Plain(dtype) => Some(dtype),
                Stored::Blocks(_) => None,
            };
            (name.clone(), entry.shape.clone(), stored)
        };
        self.checkpoint.entries.iter().map(tensor).collect()
    }

    /// Bytes of weights in the whole checkpoint, as stored.
    pub fn total_bytes(&self) -> u64 {
        self.checkpoint.total_bytes()
    }

    fn full_name(&self, name: &str) -> String {
        if self.prefix.is_empty() { name.to_owned() } else { format!("{}.{name}", self.prefix) }
    }

    fn tensor(&self, held: Held<'_>, dtype: DType) -> Result<Tensor> {
        let Held { name, entry, parts, shape } = held;
        let elements: usize = shape.iter().product();
        let taken = match entry.stored {
            Stored::Plain(stored) => elements * stored.size_in_bytes(),
            // Blocks that are cut are read whole; close enough for the few tensors that are widened.
            Stored::Blocks(kind) => elements.div_ceil(kind.values()) * kind.bytes(),
        };
        self.count(taken, elements * dtype.size_in_bytes());
        if self.measuring {
            // Zeros in the shape of this rank's slice, all in one element.
            self.measured_tensor(name, taken, parts.is_none());
            return Ok(Tensor::zeros((), dtype, &self.device)?.broadcast_as(shape)?);
        }
        let data = self.checkpoint.data(entry);
        let (data, stored) = match entry.stored {
            Stored::Plain(stored) => (data, stored),
            Stored::Blocks(kind) => (Cow::Owned(widened(kind, &data)), DType::F32),
        };
        let tensor = match parts {
            None => Tensor::from_raw_buffer(&data, stored, &shape, &self.device),
            Some((dim, parts)) => {
                Tensor::from_raw_buffer(&slice(&data, &entry.shape, stored, dim, &parts), stored, &shape, &self.device)
            }
        };
        Ok(tensor?.to_dtype(dtype)?)
    }

    /// A weight that is packed from the mapped file, for our kernels; `None` if the rows that this rank holds do not lie there one after
    /// the other. (A copy would leave gaps in memory when it is freed, as large as the largest weights.)
    fn mapped(&self, held: &Held<'_>, stored: DType, chunks: &Chunks) -> Option<Matrix> {
        if self.measuring || !has_kernels(&self.device) {
            return None;
        }
        let (d_out, width) = (held.entry.shape[0], held.entry.shape.iter().skip(1).product::<usize>());
        let all = || std::iter::once(0..width).collect();
        let (rows, columns): (_, Vec<_>) = match &held.parts {
            None => (0..d_out, all()),
            Some((0, rows)) if rows.len() == 1 => (rows[0].clone(), all()),
            Some((1, columns)) if held.entry.shape.len() == 2 => (0..d_out, columns.clone()),
            Some(_) => return None,
        };
        let Cow::Borrowed(data) = self.checkpoint.data(held.entry) else {
            return None;
        };
        let row = width * stored.size_in_bytes();
        let values = Values::of(&data[rows.start * row..rows.end * row], stored)?;
        let taken = held.shape.iter().product::<usize>() * stored.size_in_bytes();
        self.count(taken, taken);
        let piece = |columns: Range<usize>| (columns.start, columns.len());
        let in_file = chunks.iter().map(|chunk| pieces_of(&columns, chunk).into_iter().map(piece).collect()).collect();
        Some(Matrix::of_stored(values, [rows.len(), width], &in_file, chunks.clone()))
    }

    fn blocks(&self, held: Held<'_>, kind: BlockType, chunks: Chunks) -> Result<Matrix> {
        let Held { name, entry, parts, shape } = held;
        let (d_out, stored) = (entry.shape[0], entry.shape.iter().skip(1).product::<usize>());
        let all = |count: usize| -> Vec<Range<usize>> { std::iter::once(0..count).collect() };
        let (rows, columns) = match &parts {
            None => (all(d_out), all(stored)),
            Some((0, rows)) => (rows.clone(), all(stored)),
            Some((1, columns)) if entry.shape.len() == 2 => (all(d_out), columns.clone()),
            Some((dim, _)) => {
                return Err(Error::Operands { reason: format!("a weight in blocks, `{name}`, cut along dimension {dim}") });
            }
        };
        let columns: Vec<_> = chunks.iter().flat_map(|chunk| pieces_of(&columns, chunk)).collect();
        let taken = BlockRows::bytes_of(kind, shape[0], &columns);
        self.count(taken, taken);
        if self.measuring {
            self.measured_tensor(name, taken, parts.is_none());
            return Matrix::measured(&Tensor::zeros((), self.dtype, &self.device)?.broadcast_as(shape)?);
        }
        let rows = BlockRows::of(kind, &self.checkpoint.data(entry), stored, &rows, &columns);
        Matrix::of_blocks(rows, chunks, &self.device)
    }

    /// The type in which a matrix or a table is held: 16 bits stay, since they are widened exactly when they are used.
    fn narrow(&self, stored: Stored) -> DType {
        match stored {
            Stored::Plain(stored @ (DType::BF16 | DType::F16)) if self.dtype == DType::F32 => stored,
            _ => self.dtype,
        }
    }

    /// Counts bytes that a layer holds beyond what it took.
    pub(crate) fn holds_more(&self, bytes: usize) {
        self.count(0, bytes);
    }

    fn count(&self, read: usize, held: usize) {
        self.taken.bytes_read.fetch_add(read as u64, Ordering::Relaxed);
        self.taken.bytes_held.fetch_add(held as u64, Ordering::Relaxed);
    }

    fn measured_tensor(&self, name: String, bytes: usize, whole: bool) {
        let taken = Measured { bytes: bytes as u64, whole };
        self.taken.measured.lock().unwrap_or_else(PoisonError::into_inner).insert(name, taken);
    }

    /// What this rank holds of which dimension; `None`: all of the tensor.
    fn parts(&self, name: &str, entry: &Entry, shard: Shard) -> Result<Option<(usize, Vec<Range<usize>>)>> {
        match shard {
            Shard::Replicated => Ok(None),
            Shard::Split { dim, blocks } => {
                self.check_blocks(name, entry, dim, &blocks)?;
                let (rank, tp) = (self.group.rank(), self.group.size());
                let mut start = 0;
                let part = |block: usize| {
                    let at = start + rank * (block / tp);
                    start += block;
                    at..at + block / tp
                };
                Ok(Some((dim, blocks.into_iter().map(part).collect())))
            }
            Shard::Parts { dim, parts } => {
                let full = entry.shape.get(dim).copied().unwrap_or(0);
                match parts.iter().find(|part| part.start > part.end || part.end > full) {
                    Some(part) => Err(Error::Shape { name: name.to_owned(), found: vec![full], expected: vec![part.end] }),
                    None => Ok(Some((dim, parts))),
                }
            }
        }
    }

    fn check_blocks(&self, name: &str, entry: &Entry, dim: usize, blocks: &[usize]) -> Result<()> {
        let tp = self.group.size();
        let full = entry.shape.get(dim).copied().unwrap_or(0);
        if blocks.iter().sum::<usize>() != full {
            return Err(Error::Shape { name: name.to_owned(), found: vec![full], expected: blocks.to_vec() });
        }
        match blocks.iter().find(|b| *b % tp != 0) {
            Some(block) => Err(Error::Indivisible { what: name.to_owned(), size: *block, tp }),
            None => Ok(()),
        }
    }
}

/// The bytes of `parts` along `dim` of a tensor of `shape`.
fn slice(data: &[u8], shape: &[usize], dtype: DType, dim: usize, parts: &[Range<usize>]) -> Vec<u8> {
    let full = shape[dim];
    let unit = shape[dim + 1..].iter().product::<usize>() * dtype.size_in_bytes();
    let held: usize = parts.iter().map(Range::len).sum();
    let mut bytes = Vec::with_capacity(data.len() / full.max(1) * held);
    for row in data.chunks_exact((full * unit).max(1)) {
        for part in parts {
            bytes.extend_from_slice(&row[part.start * unit..part.end * unit]);
        }
    }
    bytes
}

/// Blocks as bytes of f32.
fn widened(kind: BlockType, blocks: &[u8]) -> Vec<u8> {
    let mut wide = vec![0f32; blocks.len() / kind.bytes() * kind.values()];
    kind.widen(blocks, &mut wide);
    wide.iter().flat_map(|v| v.to_le_bytes()).collect()
}

/// The columns of the stored weight that the pieces of a chunk are, one after the other. Pieces count in what is held: `columns`,
/// one run after the other.
fn pieces_of(columns: &[Range<usize>], chunk: &[Piece]) -> Vec<Range<usize>> {
    let piece = |(start, len): &(usize, usize)| {
        let (start, end) = (*start, start + len);
        let mut before = 0;
        let part = move |run: &Range<usize>| {
            let (from, until) = (start.clamp(before, before + run.len()), end.clamp(before, before + run.len()));
            let part = run.start + from - before..run.start + until - before;
            before += run.len();
            part
        };
        columns.iter().map(part).filter(|part| !part.is_empty()).collect::<Vec<_>>()
    };
    chunk.iter().flat_map(piece).collect()
}

impl fmt::Debug for Weights {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "Weights({} at `{}`, rank {} of {})",
            self.checkpoint.dir.display(),
            self.prefix,
            self.group.rank(),
            self.group.size()
        )
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use super::*;
    use crate::Solo;
    use crate::collective::Placeholder;

    /// A checkpoint of `packed: [6, 4]` (two parts of 2 and 4 rows) and `bias: [4]`.
    fn checkpoint() -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        let packed = Tensor::arange(0f32, 24.0, &Device::Cpu).unwrap().reshape((6, 4)).unwrap();
        let bias = Tensor::ones(4, DType::F32, &Device::Cpu).unwrap();
        let tensors = HashMap::from([("a.packed".to_owned(), packed), ("a.bias".to_owned(), bias)]);
        candle_core::safetensors::save(&tensors, dir.path().join("model.safetensors")).unwrap();
        dir
    }

    fn open(dir: &Path, rank: usize, size: usize) -> Weights {
        Weights::open(dir, Arc::new(Placeholder { rank, size }), DType::F32, &Device::Cpu).unwrap().pp("a")
    }

    #[test]
    fn a_rank_reads_its_slice_of_every_packed_part_and_no_more() {
        let dir = checkpoint();
        let w = open(dir.path(), 1, 2);
        let slice = w.get("packed", &[6, 4], Shard::Split { dim: 0, blocks: vec![2, 4] }).unwrap();
        let first: Vec<f32> = slice.to_vec2::<f32>().unwrap().iter().map(|row| row[0]).collect();
        assert_eq!(first, [4.0, 16.0, 20.0], "row 1 of the first part, rows 2 and 3 of the second");
        assert_eq!(w.bytes_read().load(Ordering::Relaxed), 3 * 4 * 4);
        let columns = w.get("packed", &[6, 4], Shard::split(1, 4)).unwrap();
        assert_eq!(columns.to_vec2::<f32>().unwrap()[5], [22.0, 23.0]);
    }

    #[test]
    fn a_rank_reads_the_parts_it_names_and_no_more() {
        let dir = checkpoint();
        let w = open(dir.path(), 1, 4);
        let shard = Shard::Parts { dim: 0, parts: vec![4..6, 1..2] };
        let rows = w.get("packed", &[6, 4], shard).unwrap();
        let first: Vec<f32> = rows.to_vec2::<f32>().unwrap().iter().map(|row| row[0]).collect();
        assert_eq!(first, [16.0, 20.0, 4.0]);
        let column = w.get("packed", &[6, 4], Shard::part(1, 3..4)).unwrap();
        assert_eq!(column.flatten_all().unwrap().to_vec1::<f32>().unwrap(), [3.0, 7.0, 11.0, 15.0, 19.0, 23.0]);
        assert_eq!(w.bytes_read().load(Ordering::Relaxed), (3 * 4 + 6) * 4);
        let beyond = w.get("packed", &[6, 4], Shard::part(0, 4..7));
        assert!(matches!(beyond, Err(Error::Shape { name, .. }) if name == "a.packed"));
    }

    #[test]
    fn measuring_counts_what_reading_would_read() {
        let dir = checkpoint();
        let (read, measured) = (open(dir.path(), 0, 2), open(dir.path(), 0, 2).measuring());
        for w in [&read, &measured] {
            let shape = w.get("packed", &[6, 4], Shard::split(0, 6)).unwrap().dims().to_vec();
            assert_eq!(shape, [3, 4]);
        }
        assert_eq!(read.bytes_read().load(Ordering::Relaxed), measured.bytes_read().load(Ordering::Relaxed));
        assert_eq!((read.bytes_held(), measured.bytes_held()), (48, 48));
    }

    #[test]
    fn what_is_wrong_is_named() {
        let dir = checkpoint();
        let w = open(dir.path(), 0, 4);
        assert!(matches!(w.get("no", &[1], Shard::Replicated), Err(Error::MissingTensor { name }) if name == "a.no"));
        assert!(matches!(w.get("packed", &[4, 6], Shard::Replicated), Err(Error::Shape { .. })));
        assert!(matches!(w.get("packed", &[6, 4], Shard::split(0, 6)), Err(Error::Indivisible { size: 6, tp: 4, .. })));
        w.get("packed", &[6, 4], Shard::Replicated).unwrap();
        assert!(matches!(w.finish(), Err(Error::UnusedTensors { names }) if names == ["a.bias"]));
        w.skip("bias");
        w.finish().unwrap();
    }

    #[test]
    fn a_file_that_is_not_whole_or_claims_too_much_is_refused() {
        let whole = std::fs::read(checkpoint().path().join("model.safetensors")).unwrap();
        let check = |bytes: &[u8], part: &str| {
            let dir = tempfile::tempdir().unwrap();
            std::fs::write(dir.path().join("model.safetensors"), bytes).unwrap();
            let error = Weights::open(dir.path(), Arc::new(Solo), DType::F32, &Device::Cpu).unwrap_err();
            assert!(matches!(&error, Error::Checkpoint { reason, .. } if reason.contains(part)), "{error}");
        };
        for cut in [8, 20, whole.len() / 2, whole.len() - 1] {
            check(&whole[..cut], "truncated");
        }
        check(&whole[..5], "shorter than 8 bytes");
        check(&[&(100u64 << 20).to_le_bytes()[..], &whole[8..]].concat(), "header claims");
        check(&[&whole[..], b"more"].concat(), "");
    }
}
