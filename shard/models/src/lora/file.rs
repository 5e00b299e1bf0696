//! An adapter's file: one safetensors, checked before anything of it is believed.

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use parallel::safetensors_header::{self, Entry, LENGTH_BYTES};
use parallel::{DType, Device, Tensor};
use sha2::{Digest, Sha256};

use super::bad;
use crate::Result;
use crate::model_dir::hex;

/// Largest file that is read. The largest published ones (rank 128 for Qwen-Image) have 2.4 GB.
pub const MAX_BYTES: u64 = 8 << 30;
/// Key of the safetensors metadata under which diffusers keeps the adapter's configuration, as JSON.
const CONFIG_KEY: &str = "lora_adapter_metadata";

/// A file in memory.
pub struct AdapterFile {
    path: PathBuf,
    bytes: Vec<u8>,
    entries: BTreeMap<String, Entry>,
    config: serde_json::Map<String, serde_json::Value>,
    digest: String,
}

impl AdapterFile {
    /// Reads a safetensors file, or the only one in a folder.
    ///
    /// # Errors
    /// When there is none or there are several, and when the file is too large, not whole, or holds types that are not numbers.
    pub fn open(path: &Path) -> Result<Self> {
        let path = resolve(path)?;
        let bytes = read(&path)?;
        Self::parse(path, bytes)
    }

    /// Takes the bytes of a safetensors file; `path` is what errors call it.
    ///
    /// # Errors
    /// When it is not whole, claims too much, or holds types that are not numbers.
    pub fn parse(path: PathBuf, bytes: Vec<u8>) -> Result<Self> {
        let digest = hex(&Sha256::digest(&bytes));
        let (entries, metadata) = entries(&path, &bytes)?;
        let config = match metadata.get(CONFIG_KEY) {
            Some(text) => serde_json::from_str(text).map_err(|e| bad(&path, format!("metadata `{CONFIG_KEY}`: {e}")))?,
            None => serde_json::Map::new(),
        };
        Ok(Self { path, bytes, entries, config, digest })
    }

    /// The safetensors file itself.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// sha256 of the whole file, in hex.
    pub fn digest(&self) -> &str {
        &self.digest
    }

    /// Bytes of the whole file.
    pub fn byte_size(&self) -> u64 {
        self.bytes.len() as u64
    }

    /// The names of its tensors.
    pub fn keys(&self) -> impl Iterator<Item = &str> {
        self.entries.keys().map(String::as_str)
    }

    /// The shape of a tensor.
    pub fn shape(&self, key: &str) -> Option<&[usize]> {
        self.entries.get(key).map(|entry| entry.shape.as_slice())
    }

    /// An entry of the configuration that diffusers wrote into the file, such as `transformer.lora_alpha`.
    pub fn config(&self, key: &str) -> Option<&serde_json::Value> {
        self.config.get(key)
    }

    /// A tensor, in f32.
    pub fn tensor(&self, key: &str) -> Result<Tensor> {
        let entry = self.entries.get(key).ok_or_else(|| bad(&self.path, format!("there is no tensor `{key}`")))?;
        let tensor = Tensor::from_raw_buffer(&self.bytes[entry.bytes.clone()], entry.dtype, &entry.shape, &Device::Cpu)?;
        Ok(tensor.to_dtype(DType::F32)?)
    }

    /// A tensor of one number.
    pub fn number(&self, key: &str) -> Result<f64> {
        let values = self.tensor(key)?.flatten_all()?.to_vec1::<f32>()?;
        match values.as_slice() {
            [value] if value.is_finite() => Ok(f64::from(*value)),
            _ => Err(bad(&self.path, format!("tensor `{key}` is not one finite number"))),
        }
    }
}

impl std::fmt::Debug for AdapterFile {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "AdapterFile({}, {} tensors)", self.path.display(), self.entries.len())
    }
}

/// The file itself, or the only safetensors of the folder.
fn resolve(path: &Path) -> Result<PathBuf> {
    if !path.is_dir() {
        return Ok(path.to_owned());
    }
    let unreadable = |error: std::io::Error| bad(path, format!("could not be read: {error}"));
    let mut found = Vec::new();
    for entry in std::fs::read_dir(path).map_err(unreadable)? {
        let file = entry.map_err(unreadable)?.path();
        if file.extension().is_some_and(|extension| extension == "safetensors") {
            found.push(file);
        }
    }
    match (found.pop(), found.len()) {
        (Some(file), 0) => Ok(file),
        (None, _) => Err(bad(path, "there is no safetensors file in this folder")),
        (Some(_), more) => Err(bad(path, format!("there are {} safetensors files in this folder: name one", more + 1))),
    }
}

fn read(path: &Path) -> Result<Vec<u8>> {
    let unreadable = |error: std::io::Error| bad(path, format!("could not be read: {error}"));
    let file = File::open(path).map_err(unreadable)?;
    let size = file.metadata().map_err(unreadable)?.len();
    if size > MAX_BYTES {
        return Err(bad(path, format!("it has {size} bytes; the limit is {MAX_BYTES}")));
    }
    // Its header is looked at before there is room for the rest.
    let mut file = file.take(size);
    let mut bytes = Vec::new();
    (&mut file).take(LENGTH_BYTES as u64).read_to_end(&mut bytes).map_err(unreadable)?;
    let length = safetensors_header::length(&bytes, size).map_err(|reason| bad(path, reason))?;
    bytes.reserve_exact(length);
    (&mut file).take(length as u64).read_to_end(&mut bytes).map_err(unreadable)?;
    safetensors_header::check(&bytes[LENGTH_BYTES..]).map_err(|reason| bad(path, reason))?;
    bytes.reserve_exact(file.limit() as usize);
    file.read_to_end(&mut bytes).map_err(unreadable)?;
    Ok(bytes)
}

fn entries(path: &Path, bytes: &[u8]) -> Result<(BTreeMap<String, Entry>, HashMap<String, String>)> {
    let (entries, metadata) = safetensors_header::entries(bytes).map_err(|reason| bad(path, reason))?;
    // An alpha may be a whole number; nothing is of bytes.
    if let Some(entry) = entries.iter().find(|entry| matches!(entry.dtype, DType::U8 | DType::U32)) {
        return Err(bad(path, format!("tensor `{}` has the unsupported type {:?}", entry.name, entry.dtype)));
    }
    Ok((entries.into_iter().map(|entry| (entry.name.clone(), entry)).collect(), metadata))
}
