//! A checkpoint in GGUF: what is taken for one can be read whole, by rows and by columns.
#![no_main]

use std::sync::Arc;

use libfuzzer_sys::fuzz_target;
use parallel::{DType, Device, Shard, Solo, Weights};

/// A tensor of more is not read: blocks of zeros are cheap to write and dear to widen.
const MOST_ELEMENTS: usize = 1 << 20;

fuzz_target!(|bytes: &[u8]| {
    let folder = tempfile::tempdir().expect("a folder");
    std::fs::write(folder.path().join("model.gguf"), bytes).expect("a file");
    let Ok(weights) = Weights::open(folder.path(), Arc::new(Solo), DType::F32, &Device::Cpu) else { return };
    for (name, shape, _) in weights.tensors() {
        let elements: usize = shape.iter().product();
        if elements > MOST_ELEMENTS {
            weights.skip(&name);
            continue;
        }
        assert_eq!(weights.get(&name, &shape, Shard::Replicated).expect("it is there").elem_count(), elements);
        for dim in 0..shape.len() {
            drop(weights.get(&name, &shape, Shard::part(dim, 0..1)));
        }
    }
    weights.finish().expect("all were taken");
});
