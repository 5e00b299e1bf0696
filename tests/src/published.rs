//! Published models as their headers say they are: true configurations, true names and shapes of all tensors, and a hole where
//! the numbers would be. Enough to plan how a model is cut, and next to nothing to keep.

use std::fs::File;
use std::io::{Result, Write};
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value, json};

/// A tensor of a published checkpoint.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Published {
    /// Its name.
    pub name: String,
    /// Its type, as safetensors writes it.
    pub dtype: String,
    /// Its shape.
    pub shape: Vec<usize>,
}

impl Published {
    /// Numbers in it.
    pub fn parameters(&self) -> u64 {
        self.shape.iter().map(|d| *d as u64).product()
    }

    /// Bytes of it.
    pub fn bytes(&self) -> u64 {
        let size = match self.dtype.as_str() {
            "I64" => 8,
            "F32" => 4,
            _ => 2,
        };
        self.parameters() * size
    }
}

/// A folder of `tests/plan`.
pub fn folder(model: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("plan").join(model)
}

/// A component's tensors: a line each of name, type and shape, where `{a..b}` in a name stands for a, a + 1, .. up to b - 1.
///
/// # Errors
/// When the file is not there.
///
/// # Panics
/// When a line is none.
pub fn tensors(model: &str, component: &str) -> Result<Vec<Published>> {
    let text = std::fs::read_to_string(folder(model).join(format!("{component}.tensors")))?;
    let line = |line: &str| {
        let mut words = line.split(' ');
        let (name, dtype) = (words.next().expect("a name"), words.next().expect("a type").to_owned());
        let shape: Vec<usize> = words.map(|word| word.parse().expect("a size")).collect();
        expand(name).into_iter().map(move |name| Published { name, dtype: dtype.clone(), shape: shape.clone() })
    };
    Ok(text.lines().flat_map(line).collect())
}

fn expand(name: &str) -> Vec<String> {
    let Some((before, rest)) = name.split_once('{') else { return vec![name.to_owned()] };
    let (range, after) = rest.split_once('}').expect("a closed range");
    let (from, to) = range.split_once("..").expect("a range");
    let (from, to): (usize, usize) = (from.parse().expect("a number"), to.parse().expect("a number"));
    (from..to).flat_map(|i| expand(&format!("{before}{i}{after}"))).collect()
}

/// The model as a folder to plan from. Its tokenizers, which weigh nothing, are those of `tokenizers`, a model's folder.
///
/// # Errors
/// When a file cannot be read or written.
pub fn model(name: &str, tokenizers: &Path) -> Result<tempfile::TempDir> {
    let dir = tempfile::tempdir()?;
    std::fs::copy(folder(name).join("model_index.json"), dir.path().join("model_index.json"))?;
    for entry in std::fs::read_dir(folder(name))? {
        let from = entry?.path();
        if !from.is_dir() {
            continue;
        }
        let component = from.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let to = dir.path().join(&component);
        std::fs::create_dir(&to)?;
        for entry in std::fs::read_dir(&from)? {
            let config = entry?;
            std::fs::copy(config.path(), to.join(config.file_name()))?;
        }
        if folder(name).join(format!("{component}.tensors")).is_file() {
            let file = if component.starts_with("text_encoder") { "model" } else { "diffusion_pytorch_model" };
            write_header(&to.join(format!("{file}.safetensors")), &tensors(name, &component)?)?;
        }
    }
    for entry in std::fs::read_dir(tokenizers)? {
        let path = entry?.path();
        let name = path.file_name().unwrap_or_default();
        if name.to_string_lossy().starts_with("tokenizer") {
            symlink(path.canonicalize()?, dir.path().join(name))?;
        }
    }
    Ok(dir)
}

/// A safetensors file of which only the header is there: the file system keeps no room for the rest.
fn write_header(path: &Path, tensors: &[Published]) -> Result<()> {
    let (mut header, mut end) = (Map::new(), 0);
    for tensor in tensors {
        let start = end;
        end += tensor.bytes();
        let entry = json!({ "dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": [start, end] });
        header.insert(tensor.name.clone(), entry);
    }
    let mut header = Value::Object(header).to_string().into_bytes();
    header.resize(header.len().next_multiple_of(8), b' ');
    let mut file = File::create(path)?;
    file.write_all(&(header.len() as u64).to_le_bytes())?;
    file.write_all(&header)?;
    file.set_len(8 + header.len() as u64 + end)
}
