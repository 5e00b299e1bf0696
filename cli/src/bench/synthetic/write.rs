//! Checkpoints of any size, written as a stream: numbers repeat after a prime number of blocks, so that gigabytes need not be made up.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

use candle_core::quantized::{GgmlDType, QTensor};
use parallel::{Device, Error, Tensor};

use super::noise;
use crate::gguf;

/// Numbers of the pattern: a prime number of the largest blocks.
const PATTERN: usize = 4099 * 256;

/// What weights are stored as.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(in crate::bench) enum Format {
    /// safetensors of 32 bits.
    F32,
    /// safetensors of 16 bits.
    Bf16,
    /// GGUF, blocks of 32 values of 8 bits.
    #[value(name = "q8_0")]
    Q8_0,
    /// GGUF, blocks of 256 values of 4 bits.
    #[value(name = "q4_k")]
    Q4K,
}

impl Format {
    /// What a weight of `shape` is stored as in a GGUF file.
    fn ggml(self, shape: &[usize]) -> GgmlDType {
        let wanted = match self {
            Format::Q8_0 => GgmlDType::Q8_0,
            Format::Q4K => GgmlDType::Q4K,
            Format::F32 | Format::Bf16 => GgmlDType::F32,
        };
        let whole = shape.len() == 2 && shape[1].is_multiple_of(wanted.block_size());
        if whole { wanted } else { GgmlDType::F32 }
    }
}

/// One tensor to be written.
struct Entry<'a> {
    name: &'a str,
    shape: &'a [usize],
    bytes: usize,
    pattern: &'a Pattern,
    /// Its type in a GGUF file.
    kind: GgmlDType,
}

/// Writes a checkpoint into `folder`.
pub(super) fn write(
    folder: &Path,
    shapes: &[(String, Vec<usize>)],
    format: Format,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<(), Error> {
    let patterns = Patterns::new(format)?;
    let entries: Vec<Entry<'_>> = shapes.iter().map(|(name, shape)| patterns.entry(name, shape, format)).collect();
    let in_blocks = matches!(format, Format::Q8_0 | Format::Q4K);
    let path = folder.join(if in_blocks { "model.gguf" } else { "model.safetensors" });
    let io = |source| Error::Io { path: path.clone(), source };
    let mut file = Counted { file: BufWriter::with_capacity(1 << 20, File::create(&path).map_err(io)?), written: 0 };
    let tensors = entries.iter().map(|Entry { name, shape, kind, .. }| gguf::Tensor { name, shape, kind: *kind });
    let header = if in_blocks { gguf::header("synthetic", tensors) } else { safetensors_header(&entries, format, &path)? };
    file.put(&header).map_err(io)?;
    let alignment = if in_blocks { gguf::ALIGNMENT } else { 1 };
    let total = entries.iter().map(|entry| entry.bytes.next_multiple_of(alignment) as u64).sum();
    let start = file.written;
    for (i, entry) in entries.iter().enumerate() {
        entry.pattern.repeat(i, entry.bytes, &mut file).map_err(io)?;
        file.put(&vec![0; entry.bytes.next_multiple_of(alignment) - entry.bytes]).map_err(io)?;
        progress(file.written - start, total);
    }
    file.file.flush().map_err(io)
}

struct Counted {
    file: BufWriter<File>,
    written: u64,
}

impl Counted {
    fn put(&mut self, bytes: &[u8]) -> std::io::Result<()> {
        self.written += bytes.len() as u64;
        self.file.write_all(bytes)
    }
}

fn safetensors_header(entries: &[Entry<'_>], format: Format, path: &Path) -> Result<Vec<u8>, Error> {
    let dtype = if format == Format::Bf16 { "BF16" } else { "F32" };
    let mut at = 0;
    let tensor = |entry: &Entry<'_>| {
        let value = serde_json::json!({"dtype": dtype, "shape": entry.shape, "data_offsets": [at, at + entry.bytes]});
        at += entry.bytes;
        (entry.name.to_owned(), value)
    };
    let header: serde_json::Map<_, _> = entries.iter().map(tensor).collect();
    let bad = |e: serde_json::Error| Error::Checkpoint { path: PathBuf::from(path), reason: e.to_string() };
    let mut header = serde_json::to_vec(&header).map_err(bad)?;
    header.resize(header.len().next_multiple_of(8), b' ');
    Ok([&(header.len() as u64).to_le_bytes()[..], &header].concat())
}

/// Numbers as they are stored, again and again.
struct Pattern {
    data: Vec<u8>,
    /// Bytes of what cannot be cut: a number or a block.
    unit: usize,
    /// Numbers of a unit.
    numbers: usize,
}

impl Pattern {
    /// `bytes` of it, from a place that depends on `index`.
    fn repeat(&self, index: usize, bytes: usize, to: &mut Counted) -> std::io::Result<()> {
        let units = self.data.len() / self.unit;
        let (mut at, mut left) = (index * 7919 % units * self.unit, bytes);
        while left > 0 {
            let part = left.min(self.data.len() - at);
            to.put(&self.data[at..at + part])?;
            (at, left) = ((at + part) % self.data.len(), left - part);
        }
        Ok(())
    }
}

struct Patterns {
    /// Small numbers, in the format.
    weights: Pattern,
    /// The same for what is not in blocks.
    plain: Pattern,
    /// Near one, for norms.
    ones: Pattern,
}

impl Patterns {
    fn new(format: Format) -> Result<Self, Error> {
        let numbers = |center: f32, spread: f32| (0..PATTERN).map(|i| center + spread * noise(i)).collect::<Vec<_>>();
        let plain = |values: Vec<f32>| match format {
            // The upper half of an f32.
            Format::Bf16 => Pattern {
                data: values.iter().flat_map(|v| ((v.to_bits() >> 16) as u16).to_le_bytes()).collect(),
                unit: 2,
                numbers: 1,
            },
            _ => Pattern { data: values.iter().flat_map(|v| v.to_le_bytes()).collect(), unit: 4, numbers: 1 },
        };
        let kind = format.ggml(&[1, PATTERN]);
        let weights = if kind == GgmlDType::F32 {
            plain(numbers(0.0, 0.04))
        } else {
            let weight = Tensor::from_vec(numbers(0.0, 0.04), (1, PATTERN), &Device::Cpu)?;
            let data = QTensor::quantize(&weight, kind)?.data()?.into_owned();
            Pattern { data, unit: kind.type_size(), numbers: kind.block_size() }
        };
        Ok(Self { weights, plain: plain(numbers(0.0, 0.04)), ones: plain(numbers(1.0, 0.2)) })
    }

    fn entry<'a>(&'a self, name: &'a str, shape: &'a [usize], format: Format) -> Entry<'a> {
        let kind = format.ggml(shape);
        let pattern = match shape.len() {
            1 if name.contains("norm") && name.ends_with("weight") => &self.ones,
            2 if kind != GgmlDType::F32 || matches!(format, Format::F32 | Format::Bf16) => &self.weights,
            _ => &self.plain,
        };
        let bytes = shape.iter().product::<usize>() / pattern.numbers * pattern.unit;
        Entry { name, shape, bytes, pattern, kind }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use parallel::{DType, Shard, Solo, Weights};

    use super::*;

    #[test]
    fn what_is_written_is_read_in_every_format() {
        let shapes: Vec<(String, Vec<usize>)> =
            [("a.weight", vec![3, 512]), ("a.bias", vec![3]), ("b.norm.weight", vec![5]), ("c.weight", vec![2, 40])]
                .map(|(name, shape)| (name.to_owned(), shape))
                .into();
        for format in [Format::F32, Format::Bf16, Format::Q8_0, Format::Q4K] {
            let folder = tempfile::tempdir().unwrap();
            let mut told = Vec::new();
            write(folder.path(), &shapes, format, &mut |done, all| told.push((done, all))).unwrap();
            assert_eq!(told.len(), 4, "{format:?}");
            assert!(told.last().is_some_and(|(done, all)| done == all), "{format:?}: {told:?}");
            let weights = Weights::open(folder.path(), Arc::new(Solo), DType::F32, &Device::Cpu).unwrap();
            for (name, shape) in &shapes {
                let values =
                    weights.get(name, shape, Shard::Replicated).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
                let center = if name.contains("norm") { 1.0 } else { 0.0 };
                assert!(values.iter().all(|v| (v - center).abs() < 0.25), "{format:?} {name}");
                assert!(values.windows(2).any(|pair| pair[0] != pair[1]), "{format:?} {name}");
            }
            weights.finish().unwrap();
        }
    }
}
