//! A checkpoint: the check before the parser refuses nothing that is within its limits, and what passes both can be read whole.
#![no_main]

use std::sync::Arc;

use libfuzzer_sys::fuzz_target;
use parallel::safetensors_header::{self, LENGTH_BYTES, MAX_DIMS, MAX_TENSORS};
use parallel::{DType, Device, Shard, Solo, Weights};

fn before(bytes: &[u8]) -> Result<(), String> {
    let length = safetensors_header::length(bytes, bytes.len() as u64)?;
    safetensors_header::check(&bytes[LENGTH_BYTES..LENGTH_BYTES + length])
}

fuzz_target!(|bytes: &[u8]| {
    let checked = before(bytes);
    let Ok(tensors) = safetensors::SafeTensors::deserialize(bytes) else { return };
    let small = tensors.len() <= MAX_TENSORS && tensors.iter().all(|(_, view)| view.shape().len() <= MAX_DIMS);
    if small {
        checked.expect("within the limits");
    }
    let folder = tempfile::tempdir().expect("a folder");
    std::fs::write(folder.path().join("model.safetensors"), bytes).expect("a file");
    let Ok(weights) = Weights::open(folder.path(), Arc::new(Solo), DType::F32, &Device::Cpu) else { return };
    for (name, view) in tensors.iter() {
        drop(weights.get(name, view.shape(), Shard::Replicated));
        drop(weights.get(name, view.shape(), Shard::part(0, 0..1)));
    }
    weights.finish().expect("all were taken");
});
