//! Where the tensors of a GGUF file are (<https://github.com/ggml-org/ggml/blob/master/docs/gguf.md>).

use candle_core::DType;
use candle_core::quantized::GgmlDType;
use kernels::blocks::BlockType;

use super::{Stored, Tensor};
use crate::safetensors_header::{MAX_DIMS, MAX_TENSORS};

/// Versions that differ in nothing that is read here; the first had other lengths.
const VERSIONS: [u32; 2] = [2, 3];
/// Most entries of metadata; a language model has some dozens.
const MAX_ENTRIES: u64 = 10_000;
/// How deep lists may hold lists.
const MAX_DEPTH: usize = 4;
/// Longest name of a tensor: ggml's own limit is 64 bytes.
const MAX_NAME_BYTES: usize = 1024;
/// Where tensors begin, unless `general.alignment` says otherwise.
const ALIGNMENT: u64 = 32;

/// Every tensor of `file`, by name; what is wrong with it, for people. Metadata is passed over: nothing is kept of it.
pub(super) fn read(file: &[u8]) -> Result<Vec<(String, Tensor)>, String> {
    let mut header = Header { rest: file };
    if header.take(4)? != b"GGUF" {
        return Err("it does not begin with `GGUF`".into());
    }
    let version = header.u32()?;
    if !VERSIONS.contains(&version) {
        return Err(format!("GGUF of version {version}, which is none of {VERSIONS:?}"));
    }
    let (tensors, entries) = (header.u64()?, header.u64()?);
    if tensors > MAX_TENSORS as u64 {
        return Err(format!("it holds more than {MAX_TENSORS} tensors"));
    }
    if entries > MAX_ENTRIES {
        return Err(format!("it has more than {MAX_ENTRIES} entries of metadata"));
    }
    let mut alignment = ALIGNMENT;
    for _ in 0..entries {
        let key = header.text()?;
        let kind = header.u32()?;
        if key == b"general.alignment" && kind == 4 {
            alignment = u64::from(header.u32()?).max(1);
        } else {
            header.skip_value(kind, 0)?;
        }
    }
    let mut infos = Vec::new();
    for _ in 0..tensors {
        infos.push(info(&mut header)?);
    }
    let data = ((file.len() - header.rest.len()) as u64).next_multiple_of(alignment);
    infos.into_iter().map(|(name, info)| located(name, info, data, file.len())).collect()
}

/// What the header says of a tensor.
struct Info {
    kind: u32,
    shape: Vec<usize>,
    /// From where the tensors begin.
    offset: u64,
}

fn info(header: &mut Header<'_>) -> Result<(String, Info), String> {
    let name = header.text()?;
    let name = std::str::from_utf8(name).ok().filter(|name| name.len() <= MAX_NAME_BYTES);
    let name = name.ok_or("a tensor's name is too long, or not UTF-8")?.to_owned();
    let dims = header.u32()? as usize;
    if dims > MAX_DIMS {
        return Err(format!("tensor `{name}` has more than {MAX_DIMS} dimensions"));
    }
    // The last one comes first.
    let mut shape =
        (0..dims).map(|_| Ok(usize::try_from(header.u64()?).unwrap_or(usize::MAX))).collect::<Result<Vec<_>, String>>()?;
    shape.reverse();
    Ok((name, Info { kind: header.u32()?, shape, offset: header.u64()? }))
}

/// Where in a file of `length` bytes a tensor is.
fn located(name: String, info: Info, data: u64, length: usize) -> Result<(String, Tensor), String> {
    let Info { kind, shape, offset } = info;
    let stored = stored(kind).ok_or_else(|| format!("tensor `{name}` has the unsupported type {kind}"))?;
    let last = shape.last().copied().unwrap_or(1);
    if let Stored::Blocks(kind) = stored
        && !last.is_multiple_of(kind.values())
    {
        return Err(format!("tensor `{name}` has rows of {last}, which are no blocks of {}", kind.values()));
    }
    // A zero must not hide a product that is too large.
    let bounded = shape.iter().try_fold(1usize, |product, dim| product.checked_mul((*dim).max(1)));
    let fits = |elements: usize| elements.checked_mul(8).is_some();
    let start = data.checked_add(offset).and_then(|start| usize::try_from(start).ok());
    let elements = || shape.iter().product::<usize>();
    match (start, bounded.filter(|elements| fits(*elements))) {
        (Some(start), Some(_)) if start.checked_add(stored.bytes(elements())).is_some_and(|end| end <= length) => {
            Ok((name, Tensor { stored, shape, start }))
        }
        _ => Err(format!("tensor `{name}` goes beyond the file; it may be truncated")),
    }
}

/// What is left of a header.
struct Header<'a> {
    rest: &'a [u8],
}

impl<'a> Header<'a> {
    fn take(&mut self, bytes: u64) -> Result<&'a [u8], String> {
        let bytes = usize::try_from(bytes).ok();
        let (head, rest) = bytes
            .and_then(|bytes| self.rest.split_at_checked(bytes))
            .ok_or("its header goes beyond the file; it may be truncated")?;
        self.rest = rest;
        Ok(head)
    }

    fn u32(&mut self) -> Result<u32, String> {
        Ok(self.take(4)?.iter().rev().fold(0, |number, byte| number << 8 | u32::from(*byte)))
    }

    fn u64(&mut self) -> Result<u64, String> {
        Ok(self.take(8)?.iter().rev().fold(0, |number, byte| number << 8 | u64::from(*byte)))
    }

    fn text(&mut self) -> Result<&'a [u8], String> {
        let length = self.u64()?;
        self.take(length)
    }

    /// Passes over a value of metadata.
    fn skip_value(&mut self, kind: u32, depth: usize) -> Result<(), String> {
        if let Some(bytes) = fixed(kind) {
            return self.take(bytes).map(drop);
        }
        match kind {
            8 => self.text().map(drop),
            9 if depth < MAX_DEPTH => {
                let (kind, count) = (self.u32()?, self.u64()?);
                if let Some(bytes) = fixed(kind) {
                    return self.take(bytes.checked_mul(count).ok_or("a list that is too long")?).map(drop);
                }
                // Each takes bytes of the file: this ends.
                (0..count).try_for_each(|_| self.skip_value(kind, depth + 1))
            }
            9 => Err(format!("lists within lists, more than {MAX_DEPTH} deep")),
            _ => Err(format!("metadata of the unknown type {kind}")),
        }
    }
}

/// Bytes of a value of metadata that always has as many.
fn fixed(kind: u32) -> Option<u64> {
    match kind {
        0 | 1 | 7 => Some(1),
        2 | 3 => Some(2),
        4..=6 => Some(4),
        10..=12 => Some(8),
        _ => None,
    }
}

/// By ggml's numbers (`enum ggml_type`); formats of activations and what is newer are none.
fn stored(kind: u32) -> Option<Stored> {
    Some(match kind {
        0 => Stored::Plain(DType::F32),
        1 => Stored::Plain(DType::F16),
        30 => Stored::Plain(DType::BF16),
        2 => Stored::Blocks(BlockType::Q4_0),
        3 => Stored::Blocks(BlockType::Q4_1),
        6 => Stored::Blocks(BlockType::Q5_0),
        7 => Stored::Blocks(BlockType::Q5_1),
        8 => Stored::Blocks(BlockType::Q8_0),
        10 => Stored::Blocks(BlockType::Q2K),
        11 => Stored::Blocks(BlockType::Q3K),
        12 => Stored::Blocks(BlockType::Q4K),
        13 => Stored::Blocks(BlockType::Q5K),
        14 => Stored::Blocks(BlockType::Q6K),
        _ => return None,
    })
}

/// candle's name of a block format.
pub(crate) fn candles(kind: BlockType) -> GgmlDType {
    match kind {
        BlockType::Q4_0 => GgmlDType::Q4_0,
        BlockType::Q4_1 => GgmlDType::Q4_1,
        BlockType::Q5_0 => GgmlDType::Q5_0,
        BlockType::Q5_1 => GgmlDType::Q5_1,
        BlockType::Q8_0 => GgmlDType::Q8_0,
        BlockType::Q2K => GgmlDType::Q2K,
        BlockType::Q3K => GgmlDType::Q3K,
        BlockType::Q4K => GgmlDType::Q4K,
        BlockType::Q5K => GgmlDType::Q5K,
        BlockType::Q6K => GgmlDType::Q6K,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(text: &str) -> Vec<u8> {
        [&(text.len() as u64).to_le_bytes()[..], text.as_bytes()].concat()
    }

    fn header(tensors: u64, entries: u64) -> Vec<u8> {
        [&b"GGUF"[..], &3u32.to_le_bytes(), &tensors.to_le_bytes(), &entries.to_le_bytes()].concat()
    }

    fn tensor(name: &str, dims: &[u64], kind: u32, offset: u64) -> Vec<u8> {
        let dims_bytes: Vec<u8> = dims.iter().flat_map(|dim| dim.to_le_bytes()).collect();
        [text(name), (dims.len() as u32).to_le_bytes().into(), dims_bytes, kind.to_le_bytes().into(), offset.to_le_bytes().into()]
            .concat()
    }

    fn refused(file: &[u8]) -> String {
        read(file).err().unwrap()
    }

    #[test]
    fn metadata_is_passed_over_whatever_it_is() {
        let list =
            [9u32.to_le_bytes().to_vec(), 8u32.to_le_bytes().into(), 2u64.to_le_bytes().into(), text("a"), text("bc")].concat();
        let nested = [
            9u32.to_le_bytes().to_vec(),
            9u32.to_le_bytes().into(),
            1u64.to_le_bytes().into(),
            4u32.to_le_bytes().into(),
            2u64.to_le_bytes().into(),
            vec![0; 8],
        ]
        .concat();
        let alignment = [text("general.alignment"), 4u32.to_le_bytes().into(), 64u32.to_le_bytes().into()].concat();
        let entries = [text("a"), list, text("b"), nested, alignment, text("c"), 7u32.to_le_bytes().into(), vec![1]].concat();
        let mut file = [header(1, 4), entries, tensor("w", &[32, 2], 8, 0)].concat();
        let start = file.len().next_multiple_of(64);
        file.resize(start + 68, 0);
        let found = read(&file).unwrap();
        let [(name, found)] = &found[..] else { panic!("one tensor") };
        assert_eq!((name.as_str(), &found.shape[..], found.start), ("w", &[2, 32][..], start));
        assert_eq!(found.stored, Stored::Blocks(BlockType::Q8_0));
        assert!(refused(&file[..file.len() - 1]).contains("`w` goes beyond"));
    }

    #[test]
    fn what_is_claimed_and_not_there_is_refused() {
        let most = u64::MAX;
        let list_of = |kind: u32, count: u64| {
            [text("k"), 9u32.to_le_bytes().into(), kind.to_le_bytes().into(), count.to_le_bytes().into()].concat()
        };
        let deep = [text("k"), [9u32.to_le_bytes(), 9u32.to_le_bytes()].concat()].concat();
        let deep = [deep, (0..20).flat_map(|_| [&1u64.to_le_bytes()[..], &9u32.to_le_bytes()].concat()).collect()].concat();
        for (file, problem) in [
            (b"GGU".to_vec(), "goes beyond"),
            (b"GGML".to_vec(), "does not begin"),
            ([&b"GGUF"[..], &1u32.to_le_bytes()].concat(), "version 1"),
            (header(most, 0), "more than 20000 tensors"),
            (header(0, most), "entries of metadata"),
            ([header(0, 1), most.to_le_bytes().into()].concat(), "goes beyond"),
            ([header(0, 1), list_of(10, most)].concat(), "too long"),
            ([header(0, 1), list_of(8, most)].concat(), "goes beyond"),
            ([header(0, 1), list_of(99, 1)].concat(), "unknown type 99"),
            ([header(0, 1), deep].concat(), "more than 4 deep"),
            ([header(1, 0), tensor("w", &[1; 9], 0, 0)].concat(), "more than 8 dimensions"),
            ([header(1, 0), tensor("w", &[most, most], 0, 0)].concat(), "goes beyond"),
            ([header(1, 0), tensor("w", &[0, most, most], 0, 0)].concat(), "goes beyond"),
            ([header(1, 0), tensor("w", &[1], 0, most)].concat(), "goes beyond"),
            ([header(1, 0), tensor("w", &[33], 8, 0)].concat(), "no blocks of 32"),
            ([header(1, 0), tensor("w", &[32], 15, 0)].concat(), "unsupported type 15"),
        ] {
            let error = refused(&file);
            assert!(error.contains(problem), "{error}, not {problem}");
        }
    }
}
