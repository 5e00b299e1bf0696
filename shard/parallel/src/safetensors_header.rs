//! What a safetensors file claims, checked before anything is allocated for it: its header is JSON, of any length and with any number of
//! entries, and a parser pays for each.

use std::collections::HashMap;
use std::ops::Range;

use candle_core::DType;
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensorError, SafeTensors};

/// Longest header that is read. The full FLUX.1 transformer's is 0.1 MB; a hostile one costs memory.
pub const MAX_HEADER_BYTES: u64 = 8 << 20;
/// Most tensors of one file, and of one component; the full FLUX.1 transformer has 1,446.
pub const MAX_TENSORS: usize = 20_000;
/// Most numbers of one list: a shape's dimensions. Tensors here have five at most.
pub const MAX_DIMS: usize = 8;
/// Bytes of the header's length, with which a file begins.
pub const LENGTH_BYTES: usize = 8;

/// A tensor of a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// As the file calls it.
    pub name: String,
    /// What it is made of.
    pub dtype: DType,
    /// Its dimensions.
    pub shape: Vec<usize>,
    /// Where in the file its bytes are.
    pub bytes: Range<usize>,
}

/// Every tensor of a `file`, and what it says of itself beside them.
///
/// # Errors
/// What is wrong with it, for people: it is not whole, claims too much, or holds types that are not numbers.
pub fn entries(file: &[u8]) -> Result<(Vec<Entry>, HashMap<String, String>), String> {
    let length = length(file, file.len() as u64)?;
    check(&file[LENGTH_BYTES..LENGTH_BYTES + length])?;
    let broken = |error: SafeTensorError| format!("{error}; it may be truncated");
    let (_, metadata) = SafeTensors::read_metadata(file).map_err(broken)?;
    let tensors = SafeTensors::deserialize(file).map_err(broken)?;
    if tensors.len() > MAX_TENSORS {
        return Err(format!("it holds more than {MAX_TENSORS} tensors"));
    }
    let base = file.as_ptr().addr();
    let entry = |(name, view): (&str, TensorView<'_>)| {
        let dtype = dtype(view.dtype()).ok_or_else(|| format!("tensor `{name}` has the unsupported type {:?}", view.dtype()))?;
        let start = view.data().as_ptr().addr() - base;
        Ok(Entry { name: name.to_owned(), dtype, shape: view.shape().to_vec(), bytes: start..start + view.data().len() })
    };
    let entries = tensors.iter().map(entry).collect::<Result<_, String>>()?;
    Ok((entries, metadata.metadata().clone().unwrap_or_default()))
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

/// Bytes of the header of a file of `file_bytes` bytes that begins with `first`.
///
/// # Errors
/// What is wrong with it, for people: it is cut short, or the header is too long or goes beyond the file.
pub fn length(first: &[u8], file_bytes: u64) -> Result<usize, String> {
    let length = first.first_chunk::<LENGTH_BYTES>().map(|bytes| u64::from_le_bytes(*bytes));
    let length = length.ok_or_else(|| format!("it is shorter than {LENGTH_BYTES} bytes"))?;
    if length > MAX_HEADER_BYTES {
        return Err(format!("its header claims {length} bytes; the limit is {MAX_HEADER_BYTES}"));
    }
    if length + LENGTH_BYTES as u64 > file_bytes {
        return Err(format!("its header claims {length} bytes of a file of {file_bytes}; it may be truncated"));
    }
    Ok(length as usize)
}

/// Reads over a header once and counts. What is malformed is left to the parser, which then has little to do.
///
/// # Errors
/// What is wrong with it, for people: too many tensors, or a tensor of too many dimensions.
pub fn check(header: &[u8]) -> Result<(), String> {
    let (mut in_text, mut escaped) = (false, false);
    let (mut depth, mut tensors) = (0usize, 0usize);
    // Within a list: how many numbers it has.
    let mut numbers = None;
    for byte in header {
        if in_text {
            match byte {
                _ if escaped => escaped = false,
                b'\\' => escaped = true,
                b'"' => in_text = false,
                _ => {}
            }
            continue;
        }
        match byte {
            b'"' => in_text = true,
            b'{' => {
                depth += 1;
                // The entries of the outermost object; one more may be the file's own metadata.
                tensors += usize::from(depth == 2);
                if tensors > MAX_TENSORS + 1 {
                    return Err(format!("it holds more than {MAX_TENSORS} tensors"));
                }
            }
            b'}' => depth = depth.saturating_sub(1),
            b'[' => numbers = Some(1),
            b']' => numbers = None,
            b',' => {
                numbers = numbers.map(|numbers| numbers + 1);
                if numbers > Some(MAX_DIMS) {
                    return Err(format!("one of its tensors has more than {MAX_DIMS} dimensions"));
                }
            }
            _ => {}
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entries(count: usize) -> String {
        let entry = |i| format!(r#""t{i}":{{"dtype":"F32","shape":[1],"data_offsets":[{},{}]}}"#, 4 * i, 4 * i + 4);
        format!("{{{}}}", (0..count).map(entry).collect::<Vec<_>>().join(","))
    }

    #[test]
    fn a_header_is_as_long_as_it_says_within_its_file_and_the_limit() {
        assert_eq!(length(&10u64.to_le_bytes(), 18), Ok(10));
        for (claimed, file, problem) in
            [(10, 17, "of a file of 17"), (100_000_000, 100_000_008, "the limit is 8388608"), (u64::MAX, 8, "the limit")]
        {
            let error = length(&u64::to_le_bytes(claimed), file).unwrap_err();
            assert!(error.contains(problem), "{error}");
        }
        assert!(length(&[0; 7], 7).unwrap_err().contains("shorter than 8 bytes"));
    }

    #[test]
    fn tensors_and_dimensions_are_counted_and_text_is_not() {
        assert_eq!(check(entries(MAX_TENSORS).as_bytes()), Ok(()));
        assert!(check(entries(MAX_TENSORS + 2).as_bytes()).unwrap_err().contains("more than 20000 tensors"));
        // What adapters carry in their metadata: JSON in JSON.
        let nested = r#"{"a":1,\"b\":[1,2]},{"#.replace('"', "\\\"").repeat(30_000);
        let text = format!(r#"{{"__metadata__":{{"x":"{nested}"}},"t":{{"dtype":"F32","shape":[2,3],"data_offsets":[0,24]}}}}"#);
        assert_eq!(check(text.as_bytes()), Ok(()));
        let shape =
            |dims: usize| format!(r#"{{"t":{{"dtype":"F32","shape":[{}],"data_offsets":[0,4]}}}}"#, vec!["1"; dims].join(","));
        assert_eq!(check(shape(MAX_DIMS).as_bytes()), Ok(()));
        assert!(check(shape(MAX_DIMS + 1).as_bytes()).unwrap_err().contains("more than 8 dimensions"));
    }

    #[test]
    fn what_is_not_json_is_left_to_the_parser() {
        for bytes in [&b""[..], b"}}}}", b"]]", b"\"\\", b"\xff\xfe", b"[[[[[,,,"] {
            assert_eq!(check(bytes), Ok(()), "{bytes:?}");
        }
    }
}
