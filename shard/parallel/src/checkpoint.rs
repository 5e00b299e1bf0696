//! A component's checkpoint on disk: which files it is, and where in them which tensor lies.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fs::File;
use std::ops::Range;
use std::path::{Path, PathBuf};

use candle_core::DType;
use kernels::blocks::BlockType;
use memmap2::Mmap;

use crate::safetensors_header::MAX_TENSORS;
use crate::{Error, Result};

mod files;
mod gguf;
mod safetensors;

pub use files::checkpoint_files;
pub(crate) use gguf::candles;

/// A component's checkpoint.
pub(crate) struct Checkpoint {
    pub(crate) dir: PathBuf,
    pub(crate) entries: BTreeMap<String, Entry>,
    files: Vec<Mmap>,
}

/// Where a tensor lies, and what it is.
#[derive(Clone, Debug)]
pub(crate) struct Entry {
    pub(crate) stored: Stored,
    pub(crate) shape: Vec<usize>,
    file: usize,
    /// Bytes of the file; one after the other, they are its rows.
    spans: Vec<Range<usize>>,
}

/// What the numbers are stored as.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Stored {
    Plain(DType),
    /// In blocks along the last dimension.
    Blocks(BlockType),
}

impl Stored {
    /// Bytes of `elements`, which are whole blocks.
    pub(crate) fn bytes(self, elements: usize) -> usize {
        match self {
            Stored::Plain(dtype) => elements * dtype.size_in_bytes(),
            Stored::Blocks(kind) => elements / kind.values() * kind.bytes(),
        }
    }
}

/// Some rows (elements of the first dimension) of a stored tensor, and the name that the model knows them by.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Part {
    /// The model's name.
    pub name: String,
    /// One range after the other.
    pub rows: Vec<Range<usize>>,
}

impl Part {
    /// All of a tensor of `shape`.
    pub fn whole(name: impl Into<String>, shape: &[usize]) -> Self {
        Self { name: name.into(), rows: std::iter::once(0..shape.first().copied().unwrap_or(1)).collect() }
    }
}

/// What the model calls a stored tensor, by its name and shape: parts of it under names of their own. `None`: what it is called
/// already.
pub type Names<'a> = &'a dyn Fn(&str, &[usize]) -> Option<Vec<Part>>;

impl Checkpoint {
    /// Maps the files of a component's folder and reads where its tensors are.
    pub(crate) fn open(dir: &Path, names: Names<'_>) -> Result<Self> {
        let mut checkpoint = Self { dir: dir.to_owned(), entries: BTreeMap::new(), files: Vec::new() };
        for path in checkpoint_files(dir)? {
            let bad = |reason: String| Error::Checkpoint { path: path.clone(), reason };
            let map = map_file(&path)?;
            let found = if files::is_gguf(&path) { gguf::read(&map) } else { safetensors::read(&map) }.map_err(bad)?;
            for (name, tensor) in found {
                checkpoint.add(&name, tensor, names).map_err(bad)?;
            }
            checkpoint.files.push(map);
        }
        Ok(checkpoint)
    }

    /// Bytes of all tensors.
    pub(crate) fn total_bytes(&self) -> u64 {
        self.entries.values().flat_map(|entry| &entry.spans).map(|span| span.len() as u64).sum()
    }

    /// A tensor's bytes, in order.
    pub(crate) fn data(&self, entry: &Entry) -> Cow<'_, [u8]> {
        let file = &self.files[entry.file];
        match entry.spans.as_slice() {
            [span] => Cow::Borrowed(&file[span.clone()]),
            spans => Cow::Owned(spans.iter().flat_map(|span| &file[span.clone()]).copied().collect()),
        }
    }

    /// Takes in a tensor of the file that comes next.
    fn add(&mut self, name: &str, tensor: Tensor, names: Names<'_>) -> Result<(), String> {
        let Tensor { stored, shape, start } = tensor;
        let parts = names(name, &shape);
        let whole = || vec![Part::whole(name, &shape)];
        let row: usize = shape.iter().skip(1).product();
        for Part { name: known, rows } in parts.unwrap_or_else(whole) {
            let mut shape = shape.clone();
            if let Some(first) = shape.first_mut() {
                if let Some(beyond) = rows.iter().find(|rows| rows.start > rows.end || rows.end > *first) {
                    return Err(format!("tensor `{name}` has {first} rows, and `{known}` is its rows {beyond:?}"));
                }
                *first = rows.iter().map(Range::len).sum();
            }
            let cut = |at: usize| match stored {
                Stored::Blocks(kind) if !(at * row).is_multiple_of(kind.values()) => {
                    Err(format!("tensor `{name}` would be cut within a block for `{known}`"))
                }
                _ => Ok(start + stored.bytes(at * row)),
            };
            let spans = rows.into_iter().map(|rows| Ok(cut(rows.start)?..cut(rows.end)?)).collect::<Result<_, String>>()?;
            let entry = Entry { stored, shape, file: self.files.len(), spans };
            if self.entries.insert(known.clone(), entry).is_some() {
                return Err(format!("tensor `{known}` is there twice"));
            }
            if self.entries.len() > MAX_TENSORS {
                return Err(format!("it holds more than {MAX_TENSORS} tensors"));
            }
        }
        Ok(())
    }
}

/// A tensor of one file: all of its bytes are in the file.
struct Tensor {
    stored: Stored,
    shape: Vec<usize>,
    start: usize,
}

#[allow(unsafe_code)] // the one mapping of checkpoints
fn map_file(path: &Path) -> Result<Mmap> {
    let io = |source| Error::Io { path: path.to_owned(), source };
    let file = File::open(path).map_err(io)?;
    // SAFETY: the mapping is read-only and private to `Weights`. Checkpoints are immutable while they are served (README,
    // "Models"): a file that is truncated under a running worker ends that process, as it would for any mapped program.
    unsafe { Mmap::map(&file) }.map_err(io)
}

#[cfg(test)]
#[allow(clippy::single_range_in_vec_init)] // lists of ranges are meant
mod tests {
    use super::*;

    fn checkpoint() -> Checkpoint {
        Checkpoint { dir: PathBuf::new(), entries: BTreeMap::new(), files: Vec::new() }
    }

    fn tensor(stored: Stored, shape: &[usize]) -> Tensor {
        Tensor { stored, shape: shape.to_vec(), start: 1000 }
    }

    fn part(rows: &[Range<usize>]) -> Option<Vec<Part>> {
        Some(vec![Part { name: "new".into(), rows: rows.to_vec() }])
    }

    #[test]
    fn a_part_is_its_rows() {
        let mut found = checkpoint();
        found.add("old", tensor(Stored::Plain(DType::F32), &[4, 3]), &|_, _| part(&[2..4, 0..1])).unwrap();
        assert_eq!(
            (&found.entries["new"].shape[..], &found.entries["new"].spans[..]),
            (&[3, 3][..], &[1024..1048, 1000..1012][..])
        );
        let q8 = Stored::Blocks(BlockType::Q8_0);
        found.add("line", tensor(q8, &[64]), &|_, _| None).unwrap();
        assert_eq!(found.entries["line"].spans, [1000..1068], "one dimension is one row of blocks");
    }

    #[test]
    fn a_part_that_cannot_be_is_refused() {
        let q8 = Stored::Blocks(BlockType::Q8_0);
        let refused = |stored, shape: &[usize], rows: Range<usize>| {
            checkpoint().add("old", tensor(stored, shape), &|_, _| part(std::slice::from_ref(&rows))).unwrap_err()
        };
        assert!(refused(q8, &[64], 0..40).contains("within a block"));
        assert!(refused(q8, &[4, 32], 2..5).contains("has 4 rows"));
        let mut twice = checkpoint();
        twice.add("old", tensor(q8, &[4, 32]), &|_, _| part(&[0..1])).unwrap();
        assert!(twice.add("older", tensor(q8, &[4, 32]), &|_, _| part(&[0..1])).unwrap_err().contains("there twice"));
    }
}
