//! Reading this rank's slice of a checkpoint, and nothing else.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::{self, Display};
use std::fs::File;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use candle_core::{DType, Device, Tensor};
use memmap2::Mmap;
use safetensors::{Dtype, SafeTensors};
use serde::Deserialize;

use crate::collective::Collective;
use crate::lora::Adapters;
use crate::safetensors_header::{self, LENGTH_BYTES, MAX_TENSORS};
use crate::{Error, Result};

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
    prefix: String,
    group: Arc<dyn Collective>,
    dtype: DType,
    device: Device,
    /// Count bytes instead of reading them.
    measuring: bool,
    adapters: Arc<Adapters>,
}

struct Checkpoint {
    dir: PathBuf,
    files: Vec<Mmap>,
    entries: BTreeMap<String, Entry>,
    taken: Mutex<BTreeSet<String>>,
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

#[derive(Clone)]
struct Entry {
    file: usize,
    dtype: DType,
    shape: Vec<usize>,
    start: usize,
    end: usize,
}

#[derive(Deserialize)]
struct Index {
    weight_map: BTreeMap<String, String>,
}

impl Weights {
    /// Opens the safetensors of a component's folder: one file (`diffusion_pytorch_model.safetensors` or
    /// `model.safetensors`) or several with an index. Tensors come out as `dtype` on `device`.
    pub fn open(dir: &Path, group: Arc<dyn Collective>, dtype: DType, device: &Device) -> Result<Self> {
        let (mut files, mut entries) = (Vec::new(), BTreeMap::new());
        for path in checkpoint_files(dir)? {
            let map = map_file(&path)?;
            read_entries(&path, &map, files.len(), &mut entries)?;
            files.push(map);
        }
        let checkpoint = Checkpoint {
            dir: dir.to_owned(),
            files,
            entries,
            taken: Mutex::default(),
            bytes_read: Arc::default(),
            bytes_held: AtomicU64::new(0),
            measured: Mutex::default(),
        };
        Ok(Self {
            checkpoint: Arc::new(checkpoint),
            prefix: String::new(),
            group,
            dtype,
            device: device.clone(),
            measuring: false,
            adapters: Arc::default(),
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
        let name = self.full_name(name);
        let entry = self.checkpoint.entries.get(&name).ok_or_else(|| Error::MissingTensor { name: name.clone() })?;
        if entry.shape != full_shape {
            return Err(Error::Shape { name, found: entry.shape.clone(), expected: full_shape.to_vec() });
        }
        self.checkpoint.taken.lock().unwrap_or_else(PoisonError::into_inner).insert(name.clone());
        let parts = self.parts(&name, entry, shard)?;
        let mut shape = entry.shape.clone();
        if let Some((dim, parts)) = &parts {
            shape[*dim] = parts.iter().map(Range::len).sum();
        }
        if self.measuring {
            return self.measure(name, entry, shape, parts.is_none());
        }
        let data = &self.checkpoint.files[entry.file][entry.start..entry.end];
        match parts {
            None => self.tensor(data, entry.dtype, &shape),
            Some((dim, parts)) => self.tensor(&slice(data, entry, dim, &parts), entry.dtype, &shape),
        }
    }

    /// Marks every tensor under `prefix` as somebody else's: another block range's, or a buffer the model does not need.
    pub fn skip(&self, prefix: impl Display) {
        let prefix = self.full_name(&prefix.to_string());
        let mut taken = self.checkpoint.taken.lock().unwrap_or_else(PoisonError::into_inner);
        let below = format!("{prefix}.");
        taken.extend(self.checkpoint.entries.keys().filter(|k| **k == prefix || k.starts_with(&below)).cloned());
    }

    /// To be called when the model is loaded: a tensor that nobody took or skipped is an error.
    pub fn finish(&self) -> Result<()> {
        let taken = self.checkpoint.taken.lock().unwrap_or_else(PoisonError::into_inner);
        let names: Vec<String> = self.checkpoint.entries.keys().filter(|k| !taken.contains(*k)).cloned().collect();
        if names.is_empty() { Ok(()) } else { Err(Error::UnusedTensors { names }) }
    }

    /// Bytes of weights this rank has read so far; shared, so that a loading bar can watch it.
    pub fn bytes_read(&self) -> Arc<AtomicU64> {
        self.checkpoint.bytes_read.clone()
    }

    /// Bytes of the tensors that were given out, in the type they were given out in.
    pub fn bytes_held(&self) -> u64 {
        self.checkpoint.bytes_held.load(Ordering::Relaxed)
    }

    /// What was counted of each tensor, by its full name; empty unless this is [`Self::measuring`].
    pub fn measured(&self) -> BTreeMap<String, Measured> {
        self.checkpoint.measured.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Bytes of weights in the whole checkpoint, as stored.
    pub fn total_bytes(&self) -> u64 {
        self.checkpoint.entries.values().map(|e| (e.end - e.start) as u64).sum()
    }

    fn full_name(&self, name: &str) -> String {
        if self.prefix.is_empty() { name.to_owned() } else { format!("{}.{name}", self.prefix) }
    }

    fn tensor(&self, data: &[u8], dtype: DType, shape: &[usize]) -> Result<Tensor> {
        self.count(data.len() / dtype.size_in_bytes(), dtype);
        Ok(Tensor::from_raw_buffer(data, dtype, shape, &self.device)?.to_dtype(self.dtype)?)
    }

    fn count(&self, elements: usize, stored: DType) {
        let Checkpoint { bytes_read, bytes_held, .. } = &*self.checkpoint;
        bytes_read.fetch_add((elements * stored.size_in_bytes()) as u64, Ordering::Relaxed);
        bytes_held.fetch_add((elements * self.dtype.size_in_bytes()) as u64, Ordering::Relaxed);
    }

    /// Zeros in the shape of this rank's slice, all in one element; its bytes are counted as read.
    fn measure(&self, name: String, entry: &Entry, shape: Vec<usize>, whole: bool) -> Result<Tensor> {
        let elements = shape.iter().product();
        self.count(elements, entry.dtype);
        let taken = Measured { bytes: (elements * entry.dtype.size_in_bytes()) as u64, whole };
        self.checkpoint.measured.lock().unwrap_or_else(PoisonError::into_inner).insert(name, taken);
        Ok(Tensor::zeros((), self.dtype, &self.device)?.broadcast_as(shape)?)
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

/// The bytes of `parts` along `dim`.
fn slice(data: &[u8], entry: &Entry, dim: usize, parts: &[Range<usize>]) -> Vec<u8> {
    let full = entry.shape[dim];
    let unit = entry.shape[dim + 1..].iter().product::<usize>() * entry.dtype.size_in_bytes();
    let held: usize = parts.iter().map(Range::len).sum();
    let mut bytes = Vec::with_capacity(data.len() / full.max(1) * held);
    for row in data.chunks_exact((full * unit).max(1)) {
        for part in parts {
            bytes.extend_from_slice(&row[part.start * unit..part.end * unit]);
        }
    }
    bytes
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

/// The safetensors files of a component's folder.
///
/// # Errors
/// When there are none, or an index names a file outside the folder.
pub fn checkpoint_files(dir: &Path) -> Result<Vec<PathBuf>> {
    for stem in ["diffusion_pytorch_model", "model"] {
        let one = dir.join(format!("{stem}.safetensors"));
        if one.is_file() {
            return Ok(vec![one]);
        }
        let index = dir.join(format!("{stem}.safetensors.index.json"));
        if index.is_file() {
            return index_files(dir, &index);
        }
    }
    let reason = "there is no diffusion_pytorch_model.safetensors or model.safetensors (and no index of several)".to_owned();
    Err(Error::Checkpoint { path: dir.to_owned(), reason })
}

fn index_files(dir: &Path, index: &Path) -> Result<Vec<PathBuf>> {
    let bad = |reason: String| Error::Checkpoint { path: index.to_owned(), reason };
    let text = std::fs::read(index).map_err(|source| Error::Io { path: index.to_owned(), source })?;
    let index: Index = serde_json::from_slice(&text).map_err(|e| bad(e.to_string()))?;
    let names: BTreeSet<&String> = index.weight_map.values().collect();
    if let Some(name) = names.iter().find(|n| n.contains('/') || n.contains('\\') || n.starts_with('.')) {
        return Err(bad(format!("`{name}` is not a plain file name")));
    }
    Ok(names.into_iter().map(|name| dir.join(name)).collect())
}

#[allow(unsafe_code)] // the one mapping of checkpoints
fn map_file(path: &Path) -> Result<Mmap> {
    let io = |source| Error::Io { path: path.to_owned(), source };
    let file = File::open(path).map_err(io)?;
    // SAFETY: the mapping is read-only and private to `Weights`. Checkpoints are immutable while they are served (README,
    // "Models"): a file that is truncated under a running worker ends that process, as it would for any mapped program.
    unsafe { Mmap::map(&file) }.map_err(io)
}

fn read_entries(path: &Path, map: &Mmap, file: usize, entries: &mut BTreeMap<String, Entry>) -> Result<()> {
    let bad = |reason: String| Error::Checkpoint { path: path.to_owned(), reason };
    let length = safetensors_header::length(map, map.len() as u64).map_err(bad)?;
    safetensors_header::check(&map[LENGTH_BYTES..LENGTH_BYTES + length]).map_err(bad)?;
    let tensors = SafeTensors::deserialize(map).map_err(|e| bad(format!("{e}; it may be truncated")))?;
    if tensors.len() + entries.len() > MAX_TENSORS {
        return Err(bad(format!("it holds more than {MAX_TENSORS} tensors")));
    }
    let base = map.as_ptr() as usize;
    for (name, view) in tensors.iter() {
        let dtype =
            dtype(view.dtype()).ok_or_else(|| bad(format!("tensor `{name}` has the unsupported type {:?}", view.dtype())))?;
        let start = view.data().as_ptr() as usize - base;
        let entry = Entry { file, dtype, shape: view.shape().to_vec(), start, end: start + view.data().len() };
        if entries.insert(name.to_owned(), entry).is_some() {
            return Err(bad(format!("tensor `{name}` is there twice")));
        }
    }
    Ok(())
}

fn dtype(dtype: Dtype) -> Option<DType> {
    Some(match dtype {
        Dtype::F64 => DType::F64,
        Dtype::F32 => DType::F32,
        Dtype::F16 => DType::F16,
        Dtype::BF16 => DType::BF16,
        Dtype::I64 => DType::I64,
        Dtype::U32 => DType::U32,
        Dtype::U8 => DType::U8,
        _ => return None,
    })
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

    #[test]
    fn an_index_may_not_leave_its_folder() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("model.safetensors.index.json"), r#"{"weight_map": {"a": "../secret.safetensors"}}"#)
            .unwrap();
        let error = checkpoint_files(dir.path()).unwrap_err();
        assert!(error.to_string().contains("../secret.safetensors"), "{error}");
    }
}
